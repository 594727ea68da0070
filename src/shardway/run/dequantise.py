"""Computing parts of quantised tensors from their codes and scales, as numpy arrays.

Every value is the code times its scale in float32, rounded once to the type that is wanted, to nearest even.
"""

from __future__ import annotations

import math
from functools import cache
from operator import mul
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from shardway.core.boxes import row_major_strides
from shardway.core.dtypes import BFLOAT16
from shardway.formats.quantised import Scheme
from shardway.run.strided import gather

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from shardway.core.dtypes import DType
    from shardway.core.tiles import Tile
    from shardway.formats.quantised import Quantised
    from shardway.run.files import Files

    Array = npt.NDArray[Any]

_STEP_VALUES = 2**16  # what is computed at once stays in the processor's cache
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def read_quantised(source: Quantised, part: Tile, files: Files, dtype: DType) -> Array:
    """The values of a part of a quantised tensor.

    Args:
        source: What is stored.
        part: The part; its Hugging Face side is the tensor that is presented.
        files: Open files of the checkpoint.
        dtype: bfloat16 or float32.

    Returns:
        The bits of the values in the shape of the part's grid: unsigned integers of 16 or 32 bits.

    Raises:
        ShardwayError: `io-failed`, `source-changed`.
    """
    rank = len(source.shape)
    stored = [*range(rank - 2), rank - 1, rank - 2] if source.swapped else list(range(rank))
    base = [part.hf.base[axis] for axis in stored]
    walks = [(stored[axis], step) for axis, step in part.hf.steps]
    within = [k for k, (axis, _) in enumerate(walks) if axis == rank - 1]
    outer = [k for k, (axis, _) in enumerate(walks) if axis != rank - 1]
    first, last = base[-1], base[-1] + sum((part.sizes[k] - 1) * walks[k][1] for k in within)
    per_byte = source.values_per_byte
    begin = first // per_byte * per_byte
    codes = _read_codes(source, base, [(part.sizes[k], walks[k]) for k in outer], (begin, last + 1), files)
    places = [np.asarray(low) for low in base[:-1]]
    for n, k in enumerate(outer):
        axis, step = walks[k]
        places[axis] = places[axis] + _along(part.sizes[k], n, len(outer)) * step
    scales, rows = _read_scales(source, places, [part.sizes[k] for k in outer], (begin, last), files)
    values = dequantise(source.scheme, codes, scales, rows, begin % source.group[-1], source.group[-1], dtype)
    values = values[:, first - begin : last + 1 - begin]
    if within:
        wanted = sum(_along(part.sizes[k], n, len(within)) * walks[k][1] for n, k in enumerate(within))
        flat = np.asarray(wanted).reshape(-1)
        if len(flat) != values.shape[1] or np.any(flat[1:] < flat[:-1]):
            values = values[:, flat]
    grid = values.reshape([part.sizes[k] for k in (*outer, *within)])
    return grid.transpose(np.argsort([*outer, *within]))


def _along(size: int, place: int, rank: int) -> Array:
    """0, 1, ... `size` - 1 along one of `rank` axes."""
    return np.arange(size).reshape([size if axis == place else 1 for axis in range(rank)])


def _read_codes(
    source: Quantised,
    base: Sequence[int],
    outer: Sequence[tuple[int, tuple[int, int]]],
    columns: tuple[int, int],
    files: Files,
) -> Array:
    """The bytes that hold some columns of the rows of a grid, as [rows, bytes]."""
    chunk = source.codes.chunks[0]
    row_bytes = source.codes.num_bytes // max(math.prod(source.shape[:-1]), 1)
    strides = [row_bytes * stride for stride in row_major_strides(source.shape[:-1])]
    at = chunk.offset + sum(map(mul, base[:-1], strides)) + columns[0] // source.values_per_byte
    num_bytes = -(-columns[1] // source.values_per_byte) - columns[0] // source.values_per_byte
    sizes = (*(size for size, _ in outer), num_bytes)
    distances = (*(strides[axis] * step for _, (axis, step) in outer), 1)
    found = gather(files, chunk.file, at, sizes, distances, np.dtype(np.uint8))[0]
    return np.ascontiguousarray(found).reshape(-1, num_bytes)


def _read_scales(
    source: Quantised, places: Sequence[Any], sizes: Sequence[int], columns: tuple[int, int], files: Files
) -> tuple[Array, Array]:
    """Scales that some columns of rows need, and for each row which of them are its own.

    Args:
        source: What is stored.
        places: For each axis but the last the index of every row, as arrays that broadcast to the rows' grid.
        sizes: Extents of the rows' grid.
        columns: The first and the last column.
        files: Open files of the checkpoint.

    Returns:
        float32 [groups of rows, groups of columns], and an index into the first axis for each row.
    """
    grid = source.grid
    itemsize = source.scales.dtype.itemsize
    strides = row_major_strides(grid)
    groups = [np.asarray(place) // group for place, group in zip(places, source.group, strict=False)]
    lows = [int(group.min()) for group in groups]
    extents = [int(group.max()) - low + 1 for group, low in zip(groups, lows, strict=True)]
    first, past = columns[0] // source.group[-1], min(columns[1] // source.group[-1] + 1, grid[-1])
    chunk = source.scales.chunks[0]
    at = chunk.offset + itemsize * (sum(map(mul, lows, strides)) + first)
    raw = gather(files, chunk.file, at, (*extents, past - first), strides, np.dtype(f"u{itemsize}"))[0]
    rows: Any = 0
    for group, low, extent in zip(groups, lows, extents, strict=True):
        rows = rows * extent + group - low
    flat = np.broadcast_to(rows, sizes).reshape(-1)
    return as_scales(np.ascontiguousarray(raw).reshape(-1, past - first), source.scales.dtype), flat


def as_scales(raw: Array, dtype: DType) -> Array:
    """Stored scales as float32.

    Args:
        raw: Their bits.
        dtype: What they are; bytes are exponents of two, biased by 127.
    """
    if dtype.name == "uint8":
        return np.asarray(np.ldexp(np.ones(raw.shape, np.float32), raw.astype(np.int32) - 127))
    return np.asarray(raw.view(dtype.numpy()), np.float32)


def dequantise(
    scheme: Scheme, codes: Array, scales: Array, rows: Array, offset: int, group: int, dtype: DType
) -> Array:
    """Compute values.

    Args:
        scheme: What the codes are.
        codes: Bytes [rows, bytes], contiguous.
        scales: float32 [groups of rows, groups of columns].
        rows: For each row its group.
        offset: Place of the first value of each row in its group of columns.
        group: How many columns share a scale.
        dtype: bfloat16 or float32.

    Returns:
        The bits of the values [rows, columns]; as many columns as the bytes hold.
    """
    num_rows, num_bytes = codes.shape
    num_columns = num_bytes if scheme.startswith("fp8") else 2 * num_bytes
    target = dtype.numpy()
    values = np.empty((num_rows, num_columns), target)
    step = max(1, _STEP_VALUES // max(num_columns, 1))
    wide = np.empty((min(step, num_rows), num_columns), np.float32)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for low in range(0, num_rows, step):
            high = min(low + step, num_rows)
            part = wide[: high - low]
            _decode(scheme, codes[low:high], part)
            mine = rows[low:high]
            if mine[0] == mine[-1] and np.all(mine == mine[0]):
                mine = mine[:1]
            spread = scales[mine]
            if spread.shape[1] > 1:
                spread = np.repeat(spread, group, axis=1)[:, offset : offset + num_columns]
            np.multiply(part, spread, out=values[low:high] if dtype is not BFLOAT16 else part)
            if dtype is BFLOAT16:
                np.copyto(values[low:high], part, casting="unsafe")
    return values.view(np.uint16 if dtype is BFLOAT16 else np.uint32)


def _decode(scheme: Scheme, codes: Array, values: Array) -> None:
    """Codes [rows, bytes] as float32 [rows, values]."""
    flat = codes.reshape(-1)
    if not scheme.startswith("fp8"):
        np.take(_nibbles(scheme), flat, out=values.reshape(-1).view(np.uint64), mode="wrap")
    elif flat.size % 2:
        np.take(_fp8(), flat, out=values.reshape(-1), mode="wrap")
    else:
        np.take(_fp8_pairs(), flat.view(np.uint16), out=values.reshape(-1).view(np.uint64), mode="wrap")


@cache
def _fp8() -> Array:
    """The value of each code of float8_e4m3fn, as float32."""
    return np.asarray(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn), np.float32)


@cache
def _fp8_pairs() -> Array:
    """The two values of each pair of codes, as two float32 in one element."""
    pairs = np.arange(65536, dtype=np.uint32)
    both = np.stack([_fp8()[pairs & 255], _fp8()[pairs >> 8]], axis=1)
    return both.view(np.uint64).reshape(-1)


@cache
def _nibbles(scheme: Scheme) -> Array:
    """The two values of each byte, as two float32 in one element."""
    if scheme is Scheme.MXFP4:
        values = np.array([*_FP4, *(-value for value in _FP4)], np.float32)
    else:
        values = np.arange(-8, 8, dtype=np.float32)
    codes = np.arange(256)
    both = np.stack([values[codes & 15], values[codes >> 4]], axis=1)
    return both.view(np.uint64).reshape(-1)
