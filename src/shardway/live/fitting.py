"""Whether a live model and a checkpoint belong together, and which stored tensors its tensors are made of."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problems
from shardway.core.tiles import Side, Tile
from shardway.plans.matching import match_megatron

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from shardway.core.tensors import Shape, StoredTensor
    from shardway.families.mapping import ModelMapping
    from shardway.live.memory import ModelMemory

_LAYERS = "decoder.layers."
_PER_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)", re.DOTALL)
_BLOCK = re.compile(r"(?:decoder|mtp)\.layers\.\d+\.")
_LAST = ("decoder.final_layernorm.", "decoder.final_norm.", "output_layer.")
_CURE_MODEL = "build the model with to_megatron_model, or compare its config with the checkpoint's"


def check_model(memory: ModelMemory, mapping: ModelMapping, problems: Problems) -> None:
    """Check that what this rank holds of a model is what a config says.

    A pipeline stage, and a rank of an expert-parallel group, hold a part; but what is there of a layer, or of the last
    stage, has to be there entirely.

    Args:
        memory: The model on this rank.
        mapping: What the config promises, in the model's layout.
        problems: Receives everything that is wrong.
    """
    shapes = {target.shard.key: target.shard.global_shape for target in memory.targets}
    layers = mapping.megatron_config.get("num_layers")
    if memory.num_layers is not None and isinstance(layers, int) and memory.num_layers != layers:
        what = f"the model has {memory.num_layers} layers, and the config describes {layers}"
        problems.add(Code.CONFIG_INVALID, what, cure=_CURE_MODEL)
    for key, shape in shapes.items():
        wanted = mapping.mcore.get(key)
        if wanted is None:
            what = f"the model has a tensor {key}, which the config does not describe"
            facts = (f"shape {list(shape)}",)
            problems.add(Code.TENSOR_UNEXPECTED, what, tensor=key, facts=facts, cure=_CURE_MODEL)
        elif not _fits(shape, wanted, resizable=key in memory.resizable):
            facts = (f"the config asks for {list(wanted)}, the model has {list(shape)}",)
            what = f"{key} has another shape in the model"
            problems.add(Code.SHAPE_MISMATCH, what, tensor=key, facts=facts, cure=_CURE_MODEL)
    for key, where in _lacking(memory, mapping.mcore):
        what = f"the model has no tensor {key}{where}, which the config describes"
        problems.add(Code.TENSOR_MISSING, what, tensor=key, cure=_CURE_MODEL)


def relate(
    memory: ModelMemory,
    shapes: Mapping[str, Shape],
    mapping: ModelMapping | None,
    stored: ModelMapping | None,
    problems: Problems,
) -> list[Tile]:
    """How a model's tensors are made of those of a Megatron checkpoint, stacked or per layer as each of them is.

    Args:
        memory: The model on this rank.
        shapes: Global shape of every tensor of the checkpoint, training state left out.
        mapping: What the config promises of the model, where it is known: a padded vocabulary is told from a larger
            one by it, and norms that other layers of megatron-core call by another name are found.
        stored: The same of the checkpoint.
        problems: Receives every tensor that the checkpoint lacks or that has another shape there.
    """
    tiles: list[Tile] = []
    renamed = _composed(mapping, stored, shapes) if mapping is not None and stored is not None else {}
    for key, shape in {target.shard.key: target.shard.global_shape for target in memory.targets}.items():
        found = _origin(key, shape, shapes)
        if found is None and key in renamed:
            tiles += renamed[key]
        elif found is None:
            what = f"the model asks for {key}, which the checkpoint does not hold"
            facts = (f"shape {list(shape)}",)
            problems.add(Code.TENSOR_MISSING, what, tensor=key, facts=facts, cure=_CURE_MODEL)
        for name, layer, place in found or ():
            have, want = shapes[name], shape
            if layer is not None:
                have = have[1:]
            if place is not None:
                want = want[1:]
            if key in memory.resizable and mapping is not None and key in mapping.mcore:
                want = mapping.mcore[key]
                have = want if _fits(have, want, resizable=True) else have
            if have != want and not (key in memory.resizable and _fits(want, have, resizable=True)):
                facts = (f"the model's is {list(want)}, the checkpoint's {list(have)}",)
                what = f"{key} has another shape in the checkpoint"
                problems.add(Code.SHAPE_MISMATCH, what, tensor=name, facts=facts, cure=_CURE_MODEL)
                continue
            tiles.append(_tile(name, layer, key, place, have))
    return tiles


def match_stored(
    mapping: ModelMapping, tensors: Mapping[str, StoredTensor], resizable: Iterable[str], problems: Problems
) -> None:
    """Check that a Megatron checkpoint holds exactly the model's tensors; a padded vocabulary is none of its faults.

    Args:
        mapping: What the config promises, in the checkpoint's layout.
        tensors: What the files hold, training state left out.
        resizable: Keys of tensors that may be padded on their first axis.
        problems: Receives everything that is wrong.
    """
    padded = {
        key: tensors[key].shape
        for key in resizable
        if key in tensors and key in mapping.mcore and _fits(tensors[key].shape, mapping.mcore[key], resizable=True)
    }
    match_megatron(mapping._replace(mcore={**mapping.mcore, **padded}), tensors, problems)


def tail_of(key: str) -> str:
    """A key without what tells layers apart, the same whether layers are stacked or not."""
    match = _PER_LAYER.fullmatch(key)
    return match[2] if match else key.removeprefix(_LAYERS)


def _fits(shape: Shape, wanted: Shape, *, resizable: bool) -> bool:
    """Whether a tensor of `shape` can hold one of `wanted` shape, padded on its first axis at most."""
    return shape == wanted or (
        resizable and len(shape) == len(wanted) and shape[1:] == wanted[1:] and shape[0] >= wanted[0]
    )


def _lacking(memory: ModelMemory, expected: Mapping[str, Shape]) -> list[tuple[str, str]]:
    """Expected tensors that this rank should have a part of, and where in them (text) it is missing."""
    held: dict[str, set[int]] = {}
    for target in memory.targets:
        held.setdefault(target.shard.key, set()).add(target.shard.start[0] if target.shard.start else 0)
    if memory.is_whole:
        absent = [(key, "") for key in expected if key not in held]
    else:
        blocks = {match[0] for key in held if (match := _BLOCK.match(key))}
        is_last = any(key.startswith(_LAST) for key in held)
        absent = [
            (key, "")
            for key in expected
            if key not in held
            and (
                (match[0] in blocks if (match := _BLOCK.match(key)) else key.startswith(_LAYERS) and _stacked(held))
                or (is_last and key.startswith(_LAST))
            )
        ]
    layers = set().union(*(places for key, places in held.items() if _is_stacked(key)))
    for key in expected:
        missing = layers - held[key] if _is_stacked(key) and key in held else set()
        if missing:
            absent.append((key, f" in layers {', '.join(map(str, sorted(missing)))}"))
    return absent


def _is_stacked(key: str) -> bool:
    return key.startswith(_LAYERS) and _PER_LAYER.fullmatch(key) is None


def _stacked(keys: Iterable[str]) -> bool:
    return any(map(_is_stacked, keys))


def _origin(key: str, shape: Shape, stored: Mapping[str, Shape]) -> list[tuple[str, int | None, int | None]] | None:
    """The stored tensors that a tensor is made of: name, layer in it, and place on the tensor's first axis."""
    if key in stored:
        return [(key, None, None)]
    if match := _PER_LAYER.fullmatch(key):
        name = f"{_LAYERS}{match[2]}"
        if name in stored and int(match[1]) < stored[name][0]:
            return [(name, int(match[1]), None)]
    elif key.startswith(_LAYERS) and shape:
        names = [f"{_LAYERS}{layer}.{key.removeprefix(_LAYERS)}" for layer in range(shape[0])]
        if all(name in stored for name in names):
            return [(name, None, layer) for layer, name in enumerate(names)]
    return None


def _composed(mapping: ModelMapping, stored: ModelMapping, shapes: Mapping[str, Shape]) -> dict[str, list[Tile]]:
    """For tensors that the checkpoint has under another name, what they are made of, by way of Hugging Face's names."""
    others = {key for key in stored.mcore if key in shapes and key not in mapping.mcore}
    there = {(tile.hf, tile.sizes): tile.mcore for tile in stored.tiles if tile.mcore.tensor in others}
    found: dict[str, list[Tile]] = {}
    for tile in mapping.tiles:
        origin = there.get((tile.hf, tile.sizes))
        if origin is not None:
            found.setdefault(tile.mcore.tensor, []).append(Tile(tile.sizes, origin, tile.mcore))
    return found


def _tile(name: str, layer: int | None, key: str, place: int | None, shape: Shape) -> Tile:
    def side(tensor: str, index: int | None) -> Side:
        shift = 0 if index is None else 1
        base = (0,) * len(shape) if index is None else (index, *(0,) * len(shape))
        return Side(tensor, base, tuple((axis + shift, 1) for axis in range(len(shape))))

    return Tile(shape, side(name, layer), side(key, place))
