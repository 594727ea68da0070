"""Casts against torch, and what happens to values that don't fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.tiny import Tiny, bits, listing, read_distcp, read_safetensors, same, write_model

import shardway
from shardway.core.dtypes import dtype_of_torch
from shardway.run.blocks import convert
from shardway.run.losses import Losses, rounding_notes

if TYPE_CHECKING:
    from pathlib import Path

Array = npt.NDArray[Any]


def with_torch(values: Array, source: str, target: str) -> Array:
    torch = pytest.importorskip("torch")
    signed = values.view(f"i{values.itemsize}")
    tensor = torch.from_numpy(signed.copy()).view(getattr(torch, source)).to(getattr(torch, target))
    width = tensor.element_size()
    found: Array = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[width]).numpy().view(f"u{width}")
    return found


def ours(values: Array, source: str, target: str) -> tuple[Array, int]:
    losses = Losses()
    found = convert(values, dtype_of_torch(source), dtype_of_torch(target), "w", losses)
    return found, losses.overflowed["w"]


def is_nan(values: Array, dtype: str) -> Array:
    mantissa = {"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}[dtype]
    width = 8 * values.itemsize
    exponent = ((1 << (width - 1)) - 1) >> mantissa << mantissa
    found: Array = (values & values.dtype.type((1 << (width - 1)) - 1)) > values.dtype.type(exponent)
    return found


def interesting(dtype: str) -> Array:
    """Random bits, numbers around the ties between two bfloat16 or float16 numbers, subnormal numbers, the largest."""
    if dtype in {"bfloat16", "float16"}:
        return np.arange(2**16, dtype=np.uint16)
    kind, floats = (np.dtype("u4"), np.dtype("f4")) if dtype == "float32" else (np.dtype("u8"), np.dtype("f8"))
    random = np.frombuffer(np.random.default_rng(1).bytes(200_000 * kind.itemsize), kind)
    grid = np.arange(0, 2**16, 7, dtype=np.uint16)
    ties: list[Array] = []
    with np.errstate(all="ignore"):
        for low, half_step in (
            (grid.view(np.float16), 2.0**-11),
            ((grid.astype("u4") << 16).view(np.float32), 2.0**-8),
        ):
            exact: Array = low.astype(floats)
            half = exact * floats.type(1 + half_step)
            ties += [exact, half, np.nextafter(half, floats.type(0)), np.nextafter(half, floats.type(np.inf))]
    return np.concatenate([random, np.concatenate(ties).astype(floats).view(kind)])


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("float32", "bfloat16"),
        ("float32", "float16"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("bfloat16", "float16"),
        ("float16", "bfloat16"),
        ("float64", "float32"),
        ("float64", "bfloat16"),
    ],
)
def test_casts_are_those_of_torch(source: str, target: str) -> None:
    values = interesting(source)
    found, overflows = ours(values, source, target)
    expected = with_torch(values, source, target)
    nan = is_nan(values, source)
    assert np.array_equal(found[~nan], expected[~nan])
    assert is_nan(found[nan], target).all()
    infinite = with_torch(values, source, "float64").view(np.float64)
    became = with_torch(expected, target, "float64").view(np.float64)
    assert overflows == int((np.isinf(became) & np.isfinite(infinite)).sum())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_there_and_back_is_the_identity(dtype: str) -> None:
    values = np.arange(2**16, dtype=np.uint16)
    wide, lost = ours(values, dtype, "float32")
    back, lost_back = ours(wide, "float32", dtype)
    nan = is_nan(values, dtype)
    assert np.array_equal(back[~nan], values[~nan])
    assert is_nan(back[nan], dtype).all()
    assert lost == lost_back == 0


def float32_model(path: Path, largest: float = 1.0) -> tuple[Tiny, dict[str, Array]]:
    model = Tiny(dtype="float32", attention_bias=True)
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(size=array.shape).astype(np.float32).view(np.uint32) for name, array in model.weights().items()
    }
    weights["model.layers.1.mlp.up_proj.weight"][2, 3] = np.float32(largest).view(np.uint32)
    write_model(path, model.config, weights, "F32")
    return model, weights


@pytest.mark.parametrize(("option", "name"), [("bf16", "bfloat16"), ("fp16", "float16")])
@pytest.mark.parametrize("verify", [False, True])
def test_import_casts(option: str, name: str, verify: bool, tmp_path: Path) -> None:
    model, weights = float32_model(tmp_path / "hf")
    report = shardway.import_hf(tmp_path / "hf", tmp_path / "out", dtype=option, verify=verify, fsync=False)
    narrow = {key: with_torch(array, "float32", name) for key, array in weights.items()}
    assert same(read_distcp(tmp_path / "out"), model.megatron(narrow))
    assert any("cast from float32" in note for note in report.notes)
    shardway.export_hf(tmp_path / "out", tmp_path / "back", fsync=False)
    read = read_safetensors(tmp_path / "back")
    assert same(bits(read.items()), narrow)
    assert {tag for tag, _ in read.values()} == {"BF16" if name == "bfloat16" else "F16"}
    assert f'"torch_dtype": "{name}"' in (tmp_path / "back/config.json").read_text()


@pytest.mark.parametrize(("option", "name"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_export_casts_and_its_result_can_be_reused(option: str, name: str, tmp_path: Path) -> None:
    _, weights = float32_model(tmp_path / "hf")
    shardway.import_hf(tmp_path / "hf", tmp_path / "mcore", fsync=False)
    shardway.export_hf(tmp_path / "mcore", tmp_path / "out", dtype=option, verify=True, fsync=False)
    narrow = {key: with_torch(array, "float32", name) for key, array in weights.items()}
    assert same(bits(read_safetensors(tmp_path / "out").items()), narrow)
    again = shardway.export_hf(tmp_path / "mcore", tmp_path / "out", dtype=option, if_exists="reuse", fsync=False)
    assert again.reused
    file = tmp_path / "out/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(shardway.ShardwayError, match="other values"):
        shardway.export_hf(tmp_path / "mcore", tmp_path / "out", dtype=option, if_exists="reuse", fsync=False)


def test_widening_loses_nothing(tmp_path: Path) -> None:
    model = Tiny()
    weights = {name: array & np.uint16(0xBFFF) for name, array in model.weights().items()}  # no infinities, no NaNs
    write_model(tmp_path / "hf", model.config, weights)
    shardway.import_hf(tmp_path / "hf", tmp_path / "wide", dtype="fp32", verify=True, fsync=False)
    assert same(
        read_distcp(tmp_path / "wide"),
        model.megatron({k: with_torch(w, "bfloat16", "float32") for k, w in weights.items()}),
    )
    shardway.export_hf(tmp_path / "wide", tmp_path / "back", dtype="bf16", verify=True, fsync=False)
    assert same(bits(read_safetensors(tmp_path / "back").items()), weights)


@pytest.mark.parametrize("workers", [1, 4])
def test_an_overflow_publishes_nothing(workers: int, tmp_path: Path) -> None:
    float32_model(tmp_path / "hf", largest=70_000.0)
    before = listing(tmp_path)
    with pytest.raises(shardway.ShardwayError) as caught:
        shardway.import_hf(
            tmp_path / "hf", tmp_path / "out", dtype="fp16", workers=workers, max_file_size=1, fsync=False
        )
    (problem,) = caught.value.problems
    assert problem.code == "cast-overflow"
    assert problem.tensor == "model.layers.1.mlp.up_proj.weight"
    assert problem.what.startswith("1 finite value")
    assert problem.file == "model.safetensors"
    assert "bf16" in str(problem)
    assert listing(tmp_path) == before


def test_an_overflow_at_export_publishes_nothing(tmp_path: Path) -> None:
    float32_model(tmp_path / "hf", largest=-70_000.0)
    shardway.import_hf(tmp_path / "hf", tmp_path / "mcore", fsync=False)
    before = listing(tmp_path)
    with pytest.raises(shardway.ShardwayError) as caught:
        shardway.export_hf(tmp_path / "mcore", tmp_path / "out", dtype="fp16", fsync=False)
    assert [(p.code, p.tensor) for p in caught.value.problems] == [
        ("cast-overflow", "model.layers.1.mlp.up_proj.weight")
    ]
    assert listing(tmp_path) == before


def test_infinities_and_nans_are_no_overflow(tmp_path: Path) -> None:
    model, weights = float32_model(tmp_path / "hf")
    weights["model.norm.weight"][:3] = np.array([np.inf, -np.inf, np.nan], np.float32).view(np.uint32)
    write_model(tmp_path / "hf", model.config, weights, "F32")
    shardway.import_hf(tmp_path / "hf", tmp_path / "out", dtype="fp16", verify=True, fsync=False)
    found = read_distcp(tmp_path / "out")["decoder.final_layernorm.weight"][:3].view(np.float16)
    assert np.isposinf(found[0])
    assert np.isneginf(found[1])
    assert np.isnan(found[2])


def test_a_shift_is_taken_back_exactly_or_counted() -> None:
    bf16, fp32 = dtype_of_torch("bfloat16"), dtype_of_torch("float32")
    # Every bfloat16 from 2**-16 to 2 in size, of both signs: the difference has at most 24 significant bits.
    sizes = np.arange(0x3780, 0x4000, dtype=np.uint16)
    values = np.concatenate([sizes, sizes | np.uint16(0x8000)])
    losses = Losses()
    held = convert(values, bf16, fp32, "w", losses, -1.0)
    assert (held.view(np.float32) == values.view(bf16.numpy()).astype(np.float64) - 1).all()
    assert (convert(held, fp32, bf16, "w", losses, 1.0) == values).all()
    assert not losses.rounded
    # Smaller ones lose bits, and negative zero its sign.
    lossy = np.array([0x2F81, 0x8000, 0x3F80], np.uint16)
    convert(lossy, bf16, fp32, "w", losses, -1.0)
    assert losses.rounded == {"w": 2}
    assert "2 values of w were rounded" in rounding_notes(losses)[0]
