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
from shardway.formats.quantised import Scheme
from shardway.run.strided import Scratch, gather

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from shardway.core.dtypes import DType
    from shardway.core.tiles import Tile
    from shardway.formats.quantised import Quantised
    from shardway.run.files import Files

    Array = npt.NDArray[Any]

_STEP_VALUES = 2**18  # less costs more calls, more does not stay in the processor's cache
_CODES = 256
_FEW = 1 / 8  # a table of all values is worth making where it is so much smaller than what is looked up
_SCRATCH = Scratch()
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def read_quantised(source: Quantised, part: Tile, files: Files, dtype: DType, into: Array | None = None) -> Array:
    """The values of a part of a quantised tensor.

    Args:
        source: What is stored.
        part: The part; its Hugging Face side is the tensor that is presented.
        files: Open files of the checkpoint.
        dtype: bfloat16 or float32.
        into: Where the values belong, in the shape of the part's grid; they are computed there where that can be.

    Returns:
        The bits of the values in the shape of the part's grid: unsigned integers of 16 or 32 bits. They hold until the
        thread's next call, unless they are `into`.

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
    wanted = sum(_along(part.sizes[k], n, len(within)) * walks[k][1] for n, k in enumerate(within))
    columns = np.asarray(wanted).reshape(-1)
    straight = len(columns) == last + 1 - first and not np.any(columns[1:] < columns[:-1])
    place = None
    if into is not None and straight and [*outer, *within] == list(range(len(walks))):
        flat = into.reshape(len(codes), -1)
        place = flat if np.may_share_memory(flat, into) and flat.shape[1] == codes.shape[1] * per_byte else None
    at = begin % source.group[-1], source.group[-1]
    values = dequantise(source.scheme, codes, scales, rows, *at, dtype, place)
    if place is not None and into is not None:
        return into
    values = values[:, first - begin : last + 1 - begin]
    if not straight:
        values = values[:, columns]
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
    found = gather(files, chunk.file, at, sizes, distances, np.dtype(np.uint8), _SCRATCH)[0]
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
    scheme: Scheme,
    codes: Array,
    scales: Array,
    rows: Array,
    offset: int,
    group: int,
    dtype: DType,
    into: Array | None = None,
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
        into: Where to write the bits of the values [rows, columns]; None for memory that is used again.

    Returns:
        The bits of the values [rows, columns]; as many columns as the bytes hold. They hold until the next call.
    """
    num_rows, num_bytes = codes.shape
    num_columns = num_bytes if scheme.startswith("fp8") else 2 * num_bytes
    values = (
        _SCRATCH.array("values", (num_rows, num_columns), dtype.numpy()) if into is None else into.view(dtype.numpy())
    )
    step = max(1, _STEP_VALUES // max(num_columns, 1))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if scheme.startswith("fp8") and _CODES * scales.size <= _FEW * codes.size:
            work: _LookUp | _Multiply = _LookUp(scales, group, offset, num_columns, dtype)
        else:
            work = _Multiply(scheme, scales, group, offset, (min(step, num_rows), num_columns))
        for low in range(0, num_rows, step):
            mine = rows[low : low + step]
            if mine[0] == mine[-1] and np.all(mine == mine[0]):
                mine = mine[:1]
            work.compute(codes[low : low + step], mine, values[low : low + step])
    return values.view(np.dtype(f"u{values.itemsize}"))


class _LookUp:
    """Looks values up in a table that has all of them: 256 for each scale.

    Args:
        scales: float32 [groups of rows, groups of columns].
        group: How many columns share a scale.
        offset: Place of the first column in its group.
        num_columns: How many columns there are.
        dtype: Of the values.
    """

    def __init__(self, scales: Array, group: int, offset: int, num_columns: int, dtype: DType) -> None:
        self._table = (
            (scales[..., None] * fp8_values()).astype(dtype.numpy()).view(np.dtype(f"u{dtype.itemsize}")).reshape(-1)
        )
        self._stride = _CODES * scales.shape[1]
        firsts = np.arange(scales.shape[1]) * _CODES
        self._firsts = np.repeat(firsts, group)[offset : offset + num_columns] if len(firsts) > 1 else firsts

    def compute(self, codes: Array, rows: Array, values: Array) -> None:
        """Write the values of some rows; `rows` is the group of each, or of all."""
        firsts = rows[:, None] * self._stride + self._firsts
        places = np.add(codes, firsts, out=_SCRATCH.array("places", codes.shape, np.dtype(np.intp)))
        np.take(self._table, places, out=values.view(self._table.dtype), mode="wrap")


class _Multiply:
    """Multiplies codes by scales; the arguments are those of `_LookUp`."""

    def __init__(self, scheme: Scheme, scales: Array, group: int, offset: int, shape: tuple[int, int]) -> None:
        self._scheme = scheme
        self._scales = scales
        self._group = group
        self._columns = slice(offset, offset + shape[1])
        self._wide = _SCRATCH.array("wide", shape, np.dtype(np.float32))

    def compute(self, codes: Array, rows: Array, values: Array) -> None:
        """Write the values of some rows; `rows` is the group of each, or of all."""
        wide = self._wide[: len(codes)]
        _decode(self._scheme, codes, wide)
        spread = self._scales[rows]
        if spread.shape[1] > 1:
            spread = np.repeat(spread, self._group, axis=1)[:, self._columns]
        np.multiply(wide, spread, out=values, casting="unsafe", dtype=np.float32)


def _decode(scheme: Scheme, codes: Array, values: Array) -> None:
    """Codes [rows, bytes] as float32 [rows, values]."""
    flat = codes.reshape(-1)
    if scheme.startswith("fp8"):
        np.take(fp8_values(), flat, out=values.reshape(-1), mode="wrap")
    else:
        np.take(_nibbles(scheme), flat, out=values.reshape(-1).view(np.uint64), mode="wrap")


@cache
def fp8_values() -> Array:
    """The value of each code of float8_e4m3fn, as float32."""
    return np.asarray(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn), np.float32)


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
