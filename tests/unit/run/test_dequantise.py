"""Dequantisation against torch, bit for bit: every code, every kind of scale, any part of a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.quantised import bf16_bits, fp8_codes, grid, one_nan, scales, torch_fp4, torch_int4, torch_values

from shardway.core.boxes import Box
from shardway.core.dtypes import BFLOAT16, FLOAT32, dtype_of_torch
from shardway.core.tensors import Chunk, StoredTensor
from shardway.core.tiles import Side, Tile, identity, restrict
from shardway.formats.quantised import Quantised, Scheme
from shardway.run.dequantise import read_quantised
from shardway.run.files import Files

if TYPE_CHECKING:
    from pathlib import Path

_PADDING = 5  # nothing in a file is aligned


def stored(path: Path, name: str, array: Any, dtype: str) -> StoredTensor:
    (path / name).write_bytes(bytes(_PADDING) + np.ascontiguousarray(array).tobytes())
    chunk = Chunk((0,) * array.ndim, array.shape, name, _PADDING)
    return StoredTensor(name, dtype_of_torch(dtype), array.shape, (chunk,))


def quantised(path: Path, scheme: Scheme, codes: Any, scale: Any, group: tuple[int, ...], **kinds: Any) -> Quantised:
    code_type = {Scheme.INT4_GROUP: "int32", Scheme.MXFP4: "uint8"}.get(scheme, "float8_e4m3fn")
    shape = kinds.pop("shape", codes.shape)
    return Quantised(
        scheme=scheme,
        codes=stored(path, "codes", codes, code_type),
        scales=stored(path, "scales", scale, kinds.pop("scale_type", "float32")),
        shape=shape,
        group=group,
        **kinds,
    )


def read(path: Path, source: Quantised, tile: Tile | None = None, dtype: Any = BFLOAT16) -> Any:
    with Files(path) as files:
        return read_quantised(source, tile or identity("w", "m", source.shown), files, dtype).copy()


def group_of(scheme: Scheme, shape: tuple[int, int]) -> tuple[int, int]:
    return {Scheme.FP8_BLOCK: (128, 128), Scheme.FP8_CHANNEL: (1, shape[1]), Scheme.FP8_TENSOR: shape}[scheme]


@pytest.mark.parametrize("scheme", [Scheme.FP8_BLOCK, Scheme.FP8_CHANNEL, Scheme.FP8_TENSOR])
@pytest.mark.parametrize("shape", [(128, 256), (1, 1), (129, 127), (300, 391), (64, 1000)])
def test_fp8_is_what_torch_makes_of_it(scheme: Scheme, shape: tuple[int, int], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    group = group_of(scheme, shape)
    codes, scale = fp8_codes(rng, shape, nans=True), scales(rng, grid(shape, group))
    source = quantised(tmp_path, scheme, codes, scale, group)
    expected = torch_values(codes, scale, group)
    assert (one_nan(read(tmp_path, source)) == bf16_bits(expected)).all()
    wide = read(tmp_path, source, dtype=FLOAT32).view(np.float32)
    np.testing.assert_array_equal(wide, expected.numpy())
    assert (np.signbit(wide) == np.signbit(expected.numpy()))[~np.isnan(wide)].all()


@pytest.mark.parametrize(
    "scale", [0.0, -0.0, -1.5, 1e-45, 2.0**-126, 1e-38, 3e-41, 1.0, 2.0**119, 3e38, np.inf, -np.inf, np.nan]
)
def test_every_code_with_scales_at_the_edges(scale: float, tmp_path: Path) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    bits = np.full((1, 1), scale, np.float32).view(np.uint32)
    source = quantised(tmp_path, Scheme.FP8_BLOCK, codes, bits, (128, 128))
    found = one_nan(read(tmp_path, source))
    assert (found == bf16_bits(torch_values(codes, bits, (128, 128)))).all()
    assert found[15, 15] == found[7, 15] == 0x7FC0  # the two codes that are no numbers
    if scale == 0:
        assert found[0, 1] != found[8, 1]  # the sign of a zero is kept
        assert set(np.unique(found)) == {0, 0x8000, 0x7FC0}


@pytest.mark.parametrize(
    ("kind", "bits", "values"),
    [
        ("bfloat16", np.array([[0x3C01, 0x3F80]], np.uint16), None),
        ("float16", np.array([[0x1001, 0x3C00]], np.uint16), None),
        ("float8_e8m0fnu", np.array([[0, 120]], np.uint8), [2.0**-127, 2.0**-7]),
        ("uint8", np.array([[127, 254]], np.uint8), [1.0, 2.0**127]),
    ],
)
def test_scales_of_other_types(kind: str, bits: Any, values: list[float] | None, tmp_path: Path) -> None:
    codes = fp8_codes(np.random.default_rng(2), (100, 256))
    source = quantised(tmp_path, Scheme.FP8_BLOCK, codes, bits, (128, 128), scale_type=kind)
    if values is None:
        values = torch.from_numpy(bits.copy()).view(getattr(torch, kind)).float().flatten().tolist()
    wide = np.array([values], np.float32).view(np.uint32)
    assert (read(tmp_path, source) == bf16_bits(torch_values(codes, wide, (128, 128)))).all()


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(3, 64), (5, 96), (1, 8), (40, 40)])
def test_int4_is_what_torch_makes_of_it(kind: str, shape: tuple[int, int], tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    words = rng.integers(0, 2**32, (shape[0], shape[1] // 8), np.uint32)
    scale = torch.from_numpy(rng.normal(0, 0.01, grid(shape, (1, 32)))).to(getattr(torch, kind))
    raw = scale.view(torch.int16 if kind == "bfloat16" else torch.int32).numpy()
    source = quantised(tmp_path, Scheme.INT4_GROUP, words, raw, (1, 32), shape=shape, scale_type=kind)
    expected = bf16_bits(torch_int4(words, scale, 32))
    # Megatron has no use for the sign of 0 * scale, but the bits are to be the same.
    assert (read(tmp_path, source) == expected).all()


def test_mxfp4_is_what_torch_makes_of_it_the_other_way_round(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    blocks = rng.integers(0, 256, (3, 10, 3, 16), np.uint8)
    exponents = rng.integers(0, 255, (3, 10, 3), np.uint8)
    exponents[0, 0] = 0, 1, 254
    source = quantised(
        tmp_path, Scheme.MXFP4, blocks, exponents, (1, 1, 32), shape=(3, 10, 96), scale_type="uint8", swapped=True
    )
    assert source.shown == (3, 96, 10)
    expected = bf16_bits(torch_fp4(blocks, exponents)).transpose(0, 2, 1)
    assert (read(tmp_path, source) == expected).all()


@pytest.mark.parametrize("scheme", list(Scheme))
def test_any_part_is_that_part_of_the_whole(scheme: Scheme, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    if scheme is Scheme.MXFP4:
        codes, scale = rng.integers(0, 256, (2, 24, 3, 16), np.uint8), rng.integers(100, 130, (2, 24, 3), np.uint8)
        source = quantised(
            tmp_path, scheme, codes, scale, (1, 1, 32), shape=(2, 24, 96), scale_type="uint8", swapped=True
        )
    elif scheme is Scheme.INT4_GROUP:
        codes, scale = rng.integers(0, 2**32, (36, 11), np.uint32), scales(rng, (36, 3))
        source = quantised(tmp_path, scheme, codes, scale, (1, 32), shape=(36, 88))
    else:
        shape = (2, 36, 94)
        group = {Scheme.FP8_BLOCK: (1, 16, 32), Scheme.FP8_CHANNEL: (1, 1, 94), Scheme.FP8_TENSOR: (1, 36, 94)}[scheme]
        source = quantised(tmp_path, scheme, fp8_codes(rng, shape), scales(rng, grid(shape, group)), group)
    whole = read(tmp_path, source)
    tile = identity("w", "m", source.shown)
    for _ in range(60):
        start = [int(rng.integers(0, n)) for n in source.shown]
        size = [int(rng.integers(1, n - low + 1)) for n, low in zip(source.shown, start, strict=True)]
        (part,) = restrict(tile, Box(tuple(start), tuple(size)), mcore=False)
        where = tuple(slice(low, low + n) for low, n in zip(start, size, strict=True))
        assert (read(tmp_path, source, part) == whole[where]).all()


@pytest.mark.parametrize("swapped", [False, True])
def test_grids_that_take_turns_and_are_turned_round(swapped: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    codes, scale = fp8_codes(rng, (24, 36)), scales(rng, (2, 3))
    source = quantised(tmp_path, Scheme.FP8_BLOCK, codes, scale, (16, 16), swapped=swapped)
    whole = read(tmp_path, source)
    rows = 2 if not swapped else 3  # of the second axis of the grid below, along the first axis of the tensor
    base = (1, 4)
    walks = [(3, 0, 6), (4, 1, 5), (rows, 0, 2), (2, 1, 1)]  # size, axis, step
    side = Side("w", base, tuple((axis, step) for _, axis, step in walks))
    sizes = tuple(size for size, _, _ in walks)
    check_everywhere(tmp_path, source, Tile(sizes, side, side._replace(tensor="m")), whole)


@pytest.mark.parametrize(
    "walks",
    [
        [(24, 0, 1), (36, 1, 1)],
        [(2, 0, 12), (12, 0, 1), (4, 1, 9), (9, 1, 1)],
        [(24, 0, 1), (9, 1, 1), (4, 1, 9)],  # all columns, in another order
        [(36, 1, 1), (24, 0, 1)],
        [(12, 0, 2), (36, 1, 1)],
    ],
)
def test_values_may_be_computed_where_they_belong(walks: list[tuple[int, int, int]], tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    source = quantised(tmp_path, Scheme.FP8_BLOCK, fp8_codes(rng, (24, 36)), scales(rng, (2, 3)), (16, 16))
    whole = read(tmp_path, source)
    side = Side("w", (0, 0), tuple((axis, step) for _, axis, step in walks))
    tile = Tile(tuple(size for size, _, _ in walks), side, side._replace(tensor="m"))
    check_everywhere(tmp_path, source, tile, whole)


def check_everywhere(path: Path, source: Quantised, tile: Tile, whole: Any) -> None:
    """Hold a tile's values, new ones and those in memory of each kind, against the whole tensor."""
    wanted = np.empty(tile.sizes, np.uint16)
    for index in np.ndindex(*tile.sizes):
        place = list(tile.hf.base)
        for at, (axis, step) in zip(index, tile.hf.steps, strict=True):
            place[axis] += at * step
        wanted[index] = whole[tuple(place)]
    assert (read(path, source, tile) == wanted).all()
    dense = np.zeros(tile.sizes, np.uint16)
    apart = np.zeros((*tile.sizes[:-1], 2 * tile.sizes[-1]), np.uint16)[..., : tile.sizes[-1]]
    turned = np.zeros(tile.sizes[::-1], np.uint16).transpose()
    for into in (dense, apart, turned):
        with Files(path) as files:
            found = read_quantised(source, tile, files, BFLOAT16, into)
        if found is not into:
            into[...] = found
        assert (into == wanted).all()
