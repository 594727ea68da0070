"""Moving strided grids of elements between files and memory: what byte runs are too short for, and casts."""

from __future__ import annotations

import itertools
import math
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from shardway.core.tensors import Shape
    from shardway.run.files import Files

    Array = npt.NDArray[Any]

# A system call costs as much as reading this many bytes.
_SIEVE_RUN_BYTES = 8192
_SIEVE_WASTE = 4


def raw_dtype(itemsize: int) -> np.dtype[np.generic]:
    """An unsigned integer or void type of `itemsize` bytes, to carry bits without meaning."""
    return np.dtype(f"u{itemsize}") if itemsize in (1, 2, 4, 8) else np.dtype(f"V{itemsize}")


def grid_view(flat: Array, offset: int, sizes: Shape, strides: Shape) -> Array:
    """The grid of a one-dimensional array's elements at `offset + sum(index[k] * strides[k])`, without a copy."""
    reach = offset + hull_elements(sizes, strides)
    if reach > flat.size:
        raise IndexError(f"grid reaches element {reach - 1} of {flat.size}")
    byte_strides = tuple(s * flat.itemsize for s in strides)
    return np.lib.stride_tricks.as_strided(flat[offset:], sizes, byte_strides)


class Scratch(threading.local):
    """Memory that each thread uses again and again: the first use of new memory costs more than what is done in it."""

    def __init__(self) -> None:
        self._flat: dict[str, Array] = {}

    def array(self, use: str, shape: Shape, dtype: np.dtype[np.generic]) -> Array:
        """An array of any contents, which holds until the thread asks for another one for this use."""
        num_bytes = math.prod(shape) * dtype.itemsize
        flat = self._flat.get(use)
        if flat is None or flat.size < num_bytes:
            flat = self._flat[use] = np.empty(num_bytes, np.uint8)
        return flat[:num_bytes].view(dtype).reshape(shape)


def gather(
    files: Files,
    name: str,
    offset: int,
    sizes: Shape,
    strides: Shape,
    dtype: np.dtype[np.generic],
    scratch: Scratch | None = None,
) -> tuple[Array, int]:
    """Read a grid of elements from a file.

    Args:
        files: Open files.
        name: The file.
        offset: Byte offset of the grid's first element.
        sizes: Extents of the grid.
        strides: Distance per axis, in elements.
        dtype: Element type.
        scratch: Where to read to, for the use ``"gather"``; None for new memory.

    Returns:
        An array of shape `sizes`, in any memory order, and the bytes that were read.
    """
    order, run_axes = _file_order(sizes, strides)
    depth = _sieve_depth(order, run_axes, sizes, strides, dtype.itemsize)
    extent = hull_elements([sizes[k] for k in order[depth:]], [strides[k] for k in order[depth:]])
    count = math.prod(sizes[k] for k in order[:depth])
    flat = (count * extent,)
    memory = np.empty(flat, dtype) if scratch is None else scratch.array("gather", flat, dtype)
    view = memory.view(np.uint8).data
    num_bytes = extent * dtype.itemsize
    for k, at in enumerate(_run_offsets(order, len(order) - depth, sizes, strides)):
        files.read_into(name, view[k * num_bytes : (k + 1) * num_bytes], offset + at * dtype.itemsize)
    distance = list(strides)
    for k in reversed(order[:depth]):
        distance[k] = extent
        extent *= sizes[k]
    return grid_view(memory, 0, sizes, tuple(distance)), memory.nbytes


def scatter(files: Files, name: str, offset: int, strides: Shape, grid: Array) -> None:
    """Write a grid of elements to a file, touching no byte between them; the arguments are those of `gather`."""
    order, run_axes = _file_order(grid.shape, strides)
    dense = np.ascontiguousarray(grid.transpose(order))
    run_bytes = math.prod(dense.shape[len(order) - run_axes :]) * dense.itemsize
    view = dense.reshape(-1).view(np.uint8).data
    for k, at in enumerate(_run_offsets(order, run_axes, grid.shape, strides)):
        files.write_from(name, view[k * run_bytes : (k + 1) * run_bytes], offset + at * dense.itemsize)


def _file_order(sizes: Shape, strides: Shape) -> tuple[list[int], int]:
    """Axes by falling distance in the file, and how many of the last of them are contiguous together."""
    order = sorted(range(len(sizes)), key=lambda k: (-strides[k], sizes[k]))
    run_axes = 0
    length = 1
    for k in reversed(order):
        if sizes[k] != 1 and strides[k] != length:
            break
        length *= sizes[k]
        run_axes += 1
    return order, run_axes


def hull_elements(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements lie from a grid's first to its last, both included."""
    return 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))


def _sieve_depth(order: Sequence[int], run_axes: int, sizes: Shape, strides: Shape, itemsize: int) -> int:
    """Along how many axes, in the order of the file, a grid is best read piece by piece.

    What a piece spans is read whole, the elements between those of the grid too: fewer calls against more bytes.
    """
    total = math.prod(sizes)
    best = len(order) - run_axes
    lowest = math.inf
    for depth in range(best, -1, -1):
        extent = hull_elements([sizes[k] for k in order[depth:]], [strides[k] for k in order[depth:]])
        count = math.prod(sizes[k] for k in order[:depth])
        cost = count * (_SIEVE_RUN_BYTES + extent * itemsize)
        if cost < lowest and count * extent <= _SIEVE_WASTE * total:
            best, lowest = depth, cost
    return best


def _run_offsets(order: Sequence[int], run_axes: int, sizes: Shape, strides: Shape) -> list[int]:
    outer = order[: len(order) - run_axes]
    return [
        sum(i * strides[k] for i, k in zip(index, outer, strict=True))
        for index in itertools.product(*(range(sizes[k]) for k in outer))
    ]
