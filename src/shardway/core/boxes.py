"""Axis-aligned boxes in the index space of a tensor, and the proof that boxes cover it exactly once."""

from __future__ import annotations

import itertools
import math
from operator import add, mul, sub
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shardway.core.tensors import Shape


class Box(NamedTuple):
    """The indices `start[k] <= i < start[k] + size[k]` on every axis k."""

    start: Shape
    size: Shape

    @property
    def num_elements(self) -> int:
        """Number of indices in the box."""
        return math.prod(self.size)


class CoverFault(NamedTuple):
    """Where a set of boxes fails to cover a shape exactly once: a box covered `times` times (0 is a hole)."""

    box: Box
    times: int


def whole(shape: Shape) -> Box:
    """The box of all indices of `shape`."""
    return Box((0,) * len(shape), shape)


def row_major_strides(shape: Sequence[int]) -> Shape:
    """Distance in elements between neighbours on each axis of a contiguous row-major array of `shape`."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def span(box: Box, strides: Shape) -> tuple[int, int]:
    """Offsets in elements of a box's first and last element in linear memory with these strides."""
    first = sum(map(mul, box.start, strides))
    return first, first + sum(map(mul, box.size, strides)) - sum(strides)


def hull(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of `boxes`, of which there is at least one."""
    if len(boxes) == 1:
        return boxes[0]
    start = tuple(map(min, zip(*(box.start for box in boxes), strict=True)))
    ends = (tuple(map(add, box.start, box.size)) for box in boxes)
    return Box(start, tuple(map(sub, map(max, zip(*ends, strict=True)), start)))


def exact_cover(shape: Shape, boxes: Sequence[Box]) -> CoverFault | None:
    """Prove that every index of `shape` lies in exactly one of `boxes`.

    Args:
        shape: Extents of the space, in elements.
        boxes: Boxes of the same rank; empty ones count for nothing.

    Returns:
        None when the cover is exact, else one box that is covered never, or more than once, or that lies
        outside the shape (then `times` is -1).
    """
    for box in boxes:
        for start, size, extent in zip(box.start, box.size, shape, strict=True):
            if start < 0 or size < 0 or start + size > extent:
                return CoverFault(box, -1)
    filled = [box for box in boxes if box.num_elements]
    if not math.prod(shape):
        return None
    return _fault(filled, 0, shape, ())


def _fault(boxes: list[Box], axis: int, shape: Shape, prefix: tuple[tuple[int, int], ...]) -> CoverFault | None:
    """The first fault among `boxes`, all of which span the intervals `prefix` on the axes before `axis`."""
    if len(boxes) == 1 and not any(boxes[0].start[axis:]) and boxes[0].size[axis:] == shape[axis:]:
        return None
    if axis == len(shape) or not boxes:
        rest = tuple((0, extent) for extent in shape[axis:])
        return None if len(boxes) == 1 else CoverFault(_box_of((*prefix, *rest)), len(boxes))
    by_interval: dict[tuple[int, int], list[Box]] = {}
    for box in boxes:
        by_interval.setdefault((box.start[axis], box.size[axis]), []).append(box)
    intervals = sorted(by_interval)
    ends = [start + size for start, size in intervals]
    if [start for start, _ in intervals] == [0, *ends[:-1]] and ends[-1] == shape[axis]:
        for interval in intervals:  # the usual case: the intervals lie side by side
            fault = _fault(by_interval[interval], axis + 1, shape, (*prefix, interval))
            if fault:
                return fault
        return None
    for interval, members in _cut(by_interval, shape[axis]):
        fault = _fault(members, axis + 1, shape, (*prefix, interval))
        if fault:
            return fault
    return None


def _cut(by_interval: dict[tuple[int, int], list[Box]], extent: int) -> Iterator[tuple[tuple[int, int], list[Box]]]:
    """Cut an axis at every edge of an interval; yield each piece with the boxes that span it."""
    edges = {0, extent}
    opening: dict[int, list[tuple[int, int]]] = {}
    for start, size in by_interval:
        edges.update((start, start + size))
        opening.setdefault(start, []).append((start, size))
    ordered = sorted(edges)
    live: list[tuple[int, int]] = []
    for low, high in itertools.pairwise(ordered):
        live = [interval for interval in live if interval[0] + interval[1] > low] + opening.get(low, [])
        yield (low, high - low), [box for interval in live for box in by_interval[interval]]


def _box_of(intervals: Sequence[tuple[int, int]]) -> Box:
    return Box(tuple(start for start, _ in intervals), tuple(size for _, size in intervals))
