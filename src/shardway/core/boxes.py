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


UNPROVEN = -2
# Looks at boxes that the proof of an irregular cover may take: in all, and for each box. Boxes that lie side by side on
# every axis, as all kinds of parallelism cut them, take none; those made to be entangled, their number to the power of
# the rank.
_MOST_LOOKS = 100_000
_MOST_LOOKS_PER_BOX = 32


class CoverFault(NamedTuple):
    """Where a set of boxes fails to cover a shape exactly once.

    Attributes:
        box: A part of the shape.
        times: How many boxes cover it; 0 is a hole, -1 a box that lies outside the shape, `UNPROVEN` a set of boxes
            cut so irregularly that a proof would take too long.
    """

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
    """Prove that every index of `shape` lies in exactly one of `boxes`, in time that is bounded whatever they are.

    Args:
        shape: Extents of the space, in elements.
        boxes: Boxes of the same rank; empty ones count for nothing.

    Returns:
        None when the cover is exact, else one box that is covered never, or more than once, or that lies
        outside the shape (then `times` is -1); the whole shape as `UNPROVEN` when the proof was given up.
    """
    for box in boxes:
        for start, size, extent in zip(box.start, box.size, shape, strict=True):
            if start < 0 or size < 0 or start + size > extent:
                return CoverFault(box, -1)
    filled = [box for box in boxes if box.num_elements]
    if not math.prod(shape):
        return None
    try:
        return _fault(filled, 0, shape, (), [_MOST_LOOKS + _MOST_LOOKS_PER_BOX * len(filled)])
    except _GivenUpError:
        return CoverFault(whole(shape), UNPROVEN)


class _GivenUpError(Exception):
    """The looks are used up."""


def _fault(
    boxes: list[Box], axis: int, shape: Shape, prefix: tuple[tuple[int, int], ...], looks: list[int]
) -> CoverFault | None:
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
            fault = _fault(by_interval[interval], axis + 1, shape, (*prefix, interval), looks)
            if fault:
                return fault
        return None
    for interval, members in _cut(by_interval, shape[axis], looks):
        fault = _fault(members, axis + 1, shape, (*prefix, interval), looks)
        if fault:
            return fault
    return None


def _cut(
    by_interval: dict[tuple[int, int], list[Box]], extent: int, looks: list[int]
) -> Iterator[tuple[tuple[int, int], list[Box]]]:
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
        members = [box for interval in live for box in by_interval[interval]]
        looks[0] -= len(live) + len(members)
        if looks[0] < 0:
            raise _GivenUpError
        yield (low, high - low), members


def _box_of(intervals: Sequence[tuple[int, int]]) -> Box:
    return Box(tuple(start for start, _ in intervals), tuple(size for _, size in intervals))
