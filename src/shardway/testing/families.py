"""What every model family must do: claim every tensor once, carry every bit both ways, refuse what it doesn't know."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from shardway.convert.exporting import export_hf
from shardway.convert.importing import import_hf
from shardway.core.dtypes import dtype_of_torch
from shardway.core.errors import Code, ShardwayError
from shardway.families.config import HFConfig
from shardway.families.layout import Layout
from shardway.families.mapping import cover_problems, map_model, variants_in
from shardway.families.registry import family_of
from shardway.formats.huggingface import open_huggingface
from shardway.formats.safetensors_layout import lay_out
from shardway.formats.torch_dist import open_torch_dist
from shardway.verification.pair import verify

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy.typing as npt

    from shardway.core.tensors import Shape
    from shardway.families.family import Family
    from shardway.families.mapping import ModelMapping

    Weights = Mapping[str, npt.NDArray[Any]]

_LAYER = re.compile(r"decoder\.layers\.\d+\.")


def check_family(
    config: Mapping[str, object],
    scratch: Path,
    *,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str],
) -> None:
    """Hold the family of a model against what shardway promises of every family.

    Writes a model of random bits with these tensors, imports it in every layout that applies, compares, exports, and
    compares again; then leaves out, adds and misshapes a tensor and copies one wrongly.

    Args:
        config: Content of the model's config.json.
        scratch: An empty directory to work in; a model of a few hundred kB takes a second.
        shapes: Name and shape of every tensor that such a model has, from a source other than the family itself:
            transformers, or the index of a published model.
        dtypes: The type of each, by torch's name.

    Raises:
        AssertionError: With what is not as it should be.
        ShardwayError: When the family itself refuses the model.
    """
    hf_config = HFConfig(config)
    variants = variants_in(hf_config, hf=shapes)
    mapping = map_model(hf_config, variants=variants)
    check_words(family_of(hf_config))
    _claims_every_tensor(mapping, shapes)
    _covers_every_tensor(mapping)
    layouts = [mapping.layout]
    try:
        other = Layout.PER_LAYER if mapping.layout is Layout.STACKED else Layout.STACKED
        _covers_every_tensor(map_model(hf_config, other, variants=variants))
        layouts.append(other)
    except ShardwayError as error:
        _expect(error.codes == {Code.OPTION_INVALID}, f"another layout is refused for the wrong reason: {error}")
    weights = _weights(mapping, shapes, dtypes)
    model = _write(scratch / "model", config, weights, dtypes)
    for layout in layouts:
        _carries_every_bit(model, scratch / layout.value, layout)
    _refuses(scratch, config, weights, dtypes, mapping)


def check_words(family: Family) -> None:
    """Check that every word that a family's rules ask for can ever hold.

    Raises:
        AssertionError: With the words that no flag, variant or kind of layer of the family goes by.
    """
    conditions = [*(rule.when for rule in family.rules), *(alias.when for alias in family.aliases)]
    asked = {word.lstrip("!") for condition in conditions for word in condition.split()}
    known = {"tied", *family.flags, *(variant.flag for variant in family.variants), *family.kinds}
    _expect(asked <= known, f"no flag, variant or kind of layer is called {sorted(asked - known)}")


def _claims_every_tensor(mapping: ModelMapping, shapes: Mapping[str, Shape]) -> None:
    found = {name: tuple(shape) for name, shape in shapes.items() if name not in mapping.aliases}
    _expect(set(mapping.hf) == set(found), f"the names differ: {sorted(set(mapping.hf) ^ set(found))[:8]}")
    differing = [f"{name} {shape} {found[name]}" for name, shape in mapping.hf.items() if shape != found[name]]
    _expect(not differing, f"the shapes differ: {differing[:8]}")
    wrong = [key for key in mapping.mcore if bool(_LAYER.match(key)) is not (mapping.layout is Layout.PER_LAYER)]
    _expect(
        all(not key.startswith("decoder.layers.") for key in wrong), f"{mapping.layout} does not show in {wrong[:8]}"
    )


def _covers_every_tensor(mapping: ModelMapping) -> None:
    """Look at every tile, where `map_model` itself looks at one layer of each kind."""
    problems = cover_problems(mapping.tiles, mapping.hf, mapping.mcore)
    _expect(not problems, f"{len(problems)} tensors are not covered once, element by element")


def _weights(mapping: ModelMapping, shapes: Mapping[str, Shape], dtypes: Mapping[str, str]) -> Weights:
    """Random bits; random numbers near 1 for tensors whose values are converted; copies where they are copies."""
    rng = np.random.default_rng(0)
    converted = {tile.hf.tensor for tile in mapping.tiles if tile.mcore.tensor in (*mapping.dtypes, *mapping.shifts)}
    weights: dict[str, npt.NDArray[Any]] = {}
    for name, shape in shapes.items():
        dtype = dtype_of_torch(dtypes[name])
        if name in converted:
            weights[name] = rng.uniform(0.5, 1.5, shape).astype(dtype.numpy())
        else:
            bits = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
            weights[name] = bits.reshape(-1).view(dtype.numpy()).reshape(shape)
    return weights | {name: weights[of] for name, of in mapping.aliases.items() if name in shapes}


def _write(path: Path, config: Mapping[str, object], weights: Weights, dtypes: Mapping[str, str]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    layout = lay_out([(name, dtype_of_torch(dtypes[name]), array.shape) for name, array in weights.items()], {})
    file = bytearray(layout.num_bytes)
    file[: len(layout.header)] = layout.header
    for offset, array in zip(layout.offsets, weights.values(), strict=True):
        file[offset : offset + array.nbytes] = array.tobytes()
    (path / "model.safetensors").write_bytes(file)
    return path


def _carries_every_bit(model: Path, scratch: Path, layout: Layout) -> None:
    report = import_hf(model, scratch / "megatron", layout=layout.value, fsync=False, verify=True)
    _expect(report.layout == layout.value, f"asked for {layout}, got {report.layout}")
    found = verify(model, scratch / "megatron")
    _expect(found.equal, f"an import differs from its source: {found.differences[:4]}")
    checkpoint = open_torch_dist(scratch / "megatron")
    _expect(bool(checkpoint.objects), "the import has no _extra_state objects")
    export_hf(scratch / "megatron", scratch / "hf", fsync=False, verify=True)
    found = verify(model, scratch / "hf")
    _expect(found.equal, f"an export differs from the source of the import: {found.differences[:4]}")
    names = set(open_huggingface(model).catalog.tensors), set(open_huggingface(scratch / "hf").catalog.tensors)
    _expect(names[0] == names[1], f"an export has other tensors: {sorted(names[0] ^ names[1])[:8]}")


def _refuses(
    scratch: Path,
    config: Mapping[str, object],
    weights: Weights,
    dtypes: Mapping[str, str],
    mapping: ModelMapping,
) -> None:
    """A model with one tensor less, one more, or one of another shape is refused, with the name of that tensor."""
    last = list(mapping.hf)[-1]
    largest = max(mapping.hf, key=lambda name: weights[name].size)
    shorter = {**weights, largest: weights[largest][:-1]}
    cases = {
        "less": ({name: array for name, array in weights.items() if name != last}, last, Code.TENSOR_MISSING),
        "more": ({**weights, f"{last}.more": weights[last]}, f"{last}.more", Code.TENSOR_UNEXPECTED),
        "shape": (shorter, largest, Code.SHAPE_MISMATCH),
    }
    alias = next((name for name in mapping.aliases if name in weights), None)
    if alias is not None:
        cases["copy"] = ({**weights, alias: np.zeros_like(weights[alias])}, alias, Code.TIED_WEIGHTS_DIFFER)
    for name, (changed, tensor, code) in cases.items():
        model = _write(scratch / name, config, changed, {**dtypes, f"{last}.more": dtypes[last]})
        try:
            import_hf(model, scratch / f"{name}_megatron", fsync=False)
        except ShardwayError as error:
            found = {(problem.code, problem.tensor) for problem in error.problems}
            _expect((code, tensor) in found, f"{tensor}: expected {code}, got {sorted(map(str, found))}")
        else:
            raise AssertionError(f"a model with {tensor} ({name}) was imported")


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)
