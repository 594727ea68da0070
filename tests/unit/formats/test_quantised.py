"""Which quantised weights are recognised, and what is wrong with scales: everything, at once, and never a cast."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.quantised import fp8_block, fp8_whole
from tests.tiny import Tiny, read_safetensors, write_safetensors

import shardway
from shardway.core.dtypes import BFLOAT16, FLOAT16, FLOAT32
from shardway.formats.huggingface import open_huggingface
from shardway.formats.quantised import Scheme, present

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

MODEL = Tiny(layers=1, hidden=40, heads=4, head_dim=10, ffn=48)
Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    return fp8_block(MODEL.write(tmp_path / "hf"), (16, 32))


def edit(path: Path, change: Callable[[dict[str, tuple[str, Any]]], None]) -> None:
    entries = read_safetensors(path)
    change(entries)
    write_safetensors(path / "model.safetensors", entries)


def configure(path: Path, settings: Mapping[str, object] | None, **values: object) -> None:
    config = json.loads((path / "config.json").read_text()) | values
    if settings is None:
        del config["quantization_config"]
    else:
        config["quantization_config"] = settings
    (path / "config.json").write_text(json.dumps(config))


def problems_of(path: Path) -> set[tuple[str, str | None]]:
    """Code and tensor of every problem of an import; `plan` finds the same."""
    with pytest.raises(shardway.ShardwayError) as caught:
        shardway.import_hf(path, path.parent / "out", fsync=False)
    found = [(problem.code.value, problem.tensor) for problem in caught.value.problems]
    assert len(set(found)) == len(found)
    assert set(found) == {(problem.code.value, problem.tensor) for problem in shardway.plan(path).problems}
    assert all(problem.cure for problem in caught.value.problems)
    assert not (path.parent / "out").exists()
    return set(found)


def test_blocks_are_presented_under_the_plain_names(blocks: Path) -> None:
    stored = open_huggingface(blocks)
    found = present(stored)
    assert found.catalog.tensors.keys() == MODEL.shapes.keys()
    assert {name: tensor.shape for name, tensor in found.catalog.tensors.items()} == MODEL.shapes
    assert {tensor.dtype for tensor in found.catalog.tensors.values()} == {BFLOAT16}
    source = found.quantised[Q]
    assert (source.scheme, source.group, source.grid) == (Scheme.FP8_BLOCK, (16, 32), (3, 2))
    assert source.codes == stored.catalog.tensors[Q]
    assert source.scales == stored.catalog.tensors[f"{Q}_scale_inv"]
    assert not found.faults


@pytest.mark.parametrize(
    ("declared", "asked", "computed"),
    [
        ("bfloat16", None, BFLOAT16),
        ("float32", None, FLOAT32),
        ("float16", None, FLOAT16),
        ("float8_e4m3fn", None, BFLOAT16),
        ("bfloat16", FLOAT32, FLOAT32),
        ("float32", BFLOAT16, BFLOAT16),
        ("bfloat16", FLOAT16, FLOAT32),
    ],
)
def test_values_are_computed_to_what_is_declared_or_asked_for(
    declared: str, asked: Any, computed: Any, blocks: Path
) -> None:
    configure(blocks, {"quant_method": "fp8", "weight_block_size": [16, 32]}, torch_dtype=declared)
    assert present(open_huggingface(blocks), asked).catalog.tensors[Q].dtype is computed


def test_a_plain_checkpoint_is_presented_as_it_is(tmp_path: Path) -> None:
    plain = open_huggingface(MODEL.write(tmp_path / "hf"))
    assert present(plain) is plain


@pytest.mark.parametrize(
    "settings", [None, {"quant_method": "awq"}, {"quant_method": "modelopt", "quant_algo": "NVFP4"}]
)
def test_schemes_that_are_not_known_stay_an_error(settings: dict[str, object] | None, blocks: Path) -> None:
    configure(blocks, settings)
    found = problems_of(blocks)
    assert ("dtype-unsupported", Q) in found
    assert ("tensor-unexpected", f"{Q}_scale_inv") in found
    assert len(found) == 14


def test_every_scale_that_is_missing_surplus_misshapen_or_of_another_type_is_named(blocks: Path) -> None:
    others = {name: f"model.layers.0.{name}.weight" for name in ("self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj")}

    def change(entries: dict[str, tuple[str, Any]]) -> None:
        del entries[f"{Q}_scale_inv"], entries[f"{others['mlp.up_proj']}_scale_inv"]
        tag, array = entries[f"{DOWN}_scale_inv"]
        entries[f"{DOWN}_scale_inv"] = tag, array.T.copy()
        entries[f"{others['self_attn.k_proj']}_scale_inv"] = "I32", np.ones((2, 2), np.uint32)
        entries[others["mlp.gate_proj"]] = "BF16", np.ones((48, 40), np.uint16)  # no longer quantised
        entries["lm_head.weight_scale_inv"] = "F32", np.ones((1, 2), np.uint32)

    edit(blocks, change)
    assert problems_of(blocks) == {
        ("tensor-missing", f"{Q}_scale_inv"),
        ("tensor-missing", f"{others['mlp.up_proj']}_scale_inv"),
        ("shape-mismatch", f"{DOWN}_scale_inv"),
        ("dtype-unsupported", f"{others['self_attn.k_proj']}_scale_inv"),
        ("tensor-unexpected", f"{others['mlp.gate_proj']}_scale_inv"),
        ("tensor-unexpected", "lm_head.weight_scale_inv"),
    }
    with pytest.raises(shardway.ShardwayError, match="no file holds"):
        shardway.verify(blocks, MODEL.write(blocks.parent / "plain"))


def test_a_block_size_that_is_none_is_an_error(blocks: Path) -> None:
    configure(blocks, {"quant_method": "fp8", "weight_block_size": [128, 0]})
    assert ("config-invalid", None) in problems_of(blocks)


def test_a_block_size_that_others_have_is_an_error(blocks: Path) -> None:
    configure(blocks, {"quant_method": "fp8"})  # 128 x 128 by default
    assert {code for code, _ in problems_of(blocks)} == {"shape-mismatch"}


def test_a_wrong_shape_of_codes_is_found_too(blocks: Path) -> None:
    def change(entries: dict[str, tuple[str, Any]]) -> None:
        entries[Q] = "F8_E4M3", entries[Q][1][:-1].copy()

    edit(blocks, change)
    assert problems_of(blocks) == {("shape-mismatch", Q)}


def test_int8_weights_are_never_cast(blocks: Path) -> None:
    def change(entries: dict[str, tuple[str, Any]]) -> None:
        entries[Q] = "I8", entries[Q][1]

    edit(blocks, change)
    assert problems_of(blocks) == {("dtype-unsupported", Q), ("tensor-unexpected", f"{Q}_scale_inv")}


def test_a_head_that_is_tied_to_a_quantised_embedding_is_refused(tmp_path: Path) -> None:
    import dataclasses

    model = dataclasses.replace(MODEL, tied=True).write(tmp_path / "hf")
    codes = np.ones((11, 40), np.uint8)

    def change(entries: dict[str, tuple[str, Any]]) -> None:
        entries["model.embed_tokens.weight"] = "F8_E4M3", codes
        entries["model.embed_tokens.weight_scale_inv"] = "F32", np.ones((1, 1), np.uint32)
        entries["lm_head.weight"] = "BF16", codes.astype(np.uint16)

    edit(model, change)
    configure(model, {"quant_method": "fp8"})
    assert problems_of(model) == {("dtype-unsupported", "lm_head.weight")}


def test_scales_of_activations_and_caches_are_left_out_and_reported(tmp_path: Path) -> None:
    model = fp8_whole(MODEL.write(tmp_path / "hf"), "tensor", "modelopt")

    def change(entries: dict[str, tuple[str, Any]]) -> None:
        entries["model.layers.0.self_attn.k_proj.k_scale"] = "F32", np.ones((), np.uint32)
        entries["model.layers.0.self_attn.v_scale"] = "F32", np.ones((), np.uint32)

    edit(model, change)
    report = shardway.import_hf(model, tmp_path / "out", fsync=False)
    assert "9 scales of activations and caches were left out" in report.notes
    assert report.dequantised == {"fp8-tensor": 7}
    assert report.dtypes == {"bfloat16": 5, "float8_e4m3fn": 7}
    edit(model, lambda entries: entries.update({"model.norm.input_scale": ("F32", np.ones((), np.uint32))}))
    (problem,) = shardway.plan(model).problems
    assert (problem.code.value, problem.tensor) == ("tensor-unexpected", "model.norm.input_scale")


def test_what_is_read_is_counted_in_stored_bytes(blocks: Path) -> None:
    (num_bytes,) = shardway.plan(blocks).reads.values()
    assert num_bytes == open_huggingface(blocks).catalog.num_bytes


def test_a_record_names_what_was_dequantised(blocks: Path, tmp_path: Path) -> None:
    shardway.import_hf(blocks, tmp_path / "out", fsync=False)
    document = json.loads((tmp_path / "out/iter_0000000/shardway.json").read_text())
    assert document["quantised"] == {"fp8-block": [name for name in MODEL.shapes if "_proj" in name]}
    assert shardway.verify(tmp_path / "out").equal
    assert shardway.import_hf(blocks, tmp_path / "out", fsync=False, if_exists="reuse").reused


@pytest.mark.parametrize(
    "settings",
    [
        "fp8",
        [],
        {"quant_method": []},
        {"quant_method": {"fp8": 1}, "quant_algo": ["FP8"]},
        {"quant_method": "modelopt", "quant_algo": {}},
        {"quant_method": "fp8", "weight_block_size": "128"},
        {"quant_method": "fp8", "weight_block_size": [True, 128]},
        {"quant_method": "fp8", "weight_block_size": [2**70, 1]},
        {"quant_method": "fp8", "weight_block_size": {}},
        {"quant_method": "compressed-tensors", "config_groups": [1]},
        {"quant_method": "compressed-tensors", "config_groups": {"a": 3, "b": {"weights": []}}},
        {"quant_method": "compressed-tensors", "config_groups": {"b": {"weights": {"num_bits": [], "group_size": {}}}}},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"b": {"weights": {"num_bits": 8, "strategy": "block", "block_structure": "128x128"}}},
        },
    ],
)
def test_no_config_makes_more_than_problems_of_it(settings: Any, blocks: Path) -> None:
    configure(blocks, settings)
    assert problems_of(blocks)
