"""Tiles: pieces of the mosaic that relate the elements of Hugging Face tensors to those of Megatron tensors.

A tile is an n-dimensional grid of elements together with an affine map from the grid into the index space of
one tensor on each side. Query-group interleaving, gate above up, stacked layers and experts, split projections
and transpositions are all of this form, and it is closed under cutting: the part of a tile that lies in a box of
either tensor is again a few tiles. One tile serves both directions.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from operator import sub
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.boxes import Box, CoverFault, exact_cover, row_major_strides, whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shardway.core.tensors import Shape


# For each axis of a grid, the tensor axis that it walks along and the distance per step.
Steps = tuple[tuple[int, int], ...]


class Side(NamedTuple):
    """Where a tile's grid lies in a tensor.

    Attributes:
        tensor: Name of the tensor.
        base: Index of the grid's first element on each axis of the tensor.
        steps: For each axis of the grid, the tensor axis that it walks along and the distance per step (>= 1).
    """

    tensor: str
    base: Shape
    steps: Steps


class Tile(NamedTuple):
    """A grid of `sizes` elements and where it lies in a Hugging Face and in a Megatron tensor."""

    sizes: Shape
    hf: Side
    mcore: Side

    @property
    def num_elements(self) -> int:
        """Number of elements that the tile relates."""
        return math.prod(self.sizes)


class Strided(NamedTuple):
    """A grid of elements in linear memory: `offset + sum(index[k] * strides[k])`, in elements.

    `sizes` is common to both sides; axes are ordered by falling Megatron stride and merged where both sides allow,
    so a grid that is contiguous on both sides has one axis with strides of 1.
    """

    sizes: Shape
    hf_offset: int
    hf_strides: Shape
    mcore_offset: int
    mcore_strides: Shape

    @property
    def run_elements(self) -> int:
        """Length in elements of the runs that are contiguous on both sides."""
        if self.sizes and self.hf_strides[-1] == 1 and self.mcore_strides[-1] == 1:
            return self.sizes[-1]
        return 1

    @property
    def num_elements(self) -> int:
        """Number of elements of the grid."""
        return math.prod(self.sizes)


def identity(name: str, other: str, shape: Shape) -> Tile:
    """The tile that relates two tensors of one shape element by element."""
    base = (0,) * len(shape)
    steps = tuple((axis, 1) for axis in range(len(shape)))
    return Tile(shape, Side(name, base, steps), Side(other, base, steps))


def restrict(tile: Tile, box: Box, *, mcore: bool) -> list[Tile]:
    """The part of a tile that lies in a box of one of its tensors, as tiles.

    Args:
        tile: The tile to cut.
        box: A box of the Megatron tensor (`mcore=True`) or of the Hugging Face tensor.
        mcore: Which side the box belongs to.

    Returns:
        Tiles that are disjoint and together hold exactly the elements in the box; empty when none do.
    """
    side = tile.mcore if mcore else tile.hf
    if side.base == box.start and reach(tile.sizes, side.steps, len(box.size)) == box.size:
        return [tile]
    choices: list[list[tuple[tuple[int, int, int], ...]]] = []
    for axis, (low, size) in enumerate(zip(box.start, box.size, strict=True)):
        walks = sorted(
            ((step, k, tile.sizes[k]) for k, (on, step) in enumerate(side.steps) if on == axis), reverse=True
        )
        first = side.base[axis]
        last = first + sum(step * (count - 1) for step, _, count in walks)
        high = low + size
        if first >= high or last < low:
            return []
        if first >= low and last < high:
            continue
        choices.append([tuple(cut) for cut in _cut_axis(walks, first, low, high)])
    if not choices:
        return [tile]
    parts: list[Tile] = []
    for combination in itertools.product(*choices):
        origin = [0] * len(tile.sizes)
        sizes = list(tile.sizes)
        for k, begin, count in itertools.chain.from_iterable(combination):
            origin[k], sizes[k] = begin, count
        parts.append(Tile(tuple(sizes), _moved(tile.hf, origin), _moved(tile.mcore, origin)))
    return parts


@lru_cache(maxsize=4096)
def reach(sizes: Shape, steps: Steps, rank: int) -> Shape:
    """Extent on each axis of a tensor of `rank` axes of the smallest box that holds a grid."""
    extent = [1] * rank
    for size, (axis, step) in zip(sizes, steps, strict=True):
        extent[axis] += (size - 1) * step
    return tuple(extent)


def linearise(tile: Tile, hf_box: Box, mcore_box: Box) -> Strided:
    """Express a tile in the linear memory of two boxes that hold it, each row-major and contiguous.

    Args:
        tile: A tile that lies wholly in both boxes.
        hf_box: The box of the Hugging Face tensor whose memory is addressed.
        mcore_box: The same of the Megatron tensor.

    Returns:
        Offsets and strides in elements from the first element of each box.
    """
    hf, mcore = (
        (tuple(map(sub, side.base, box.start)), side.steps, box.size)
        for side, box in ((tile.hf, hf_box), (tile.mcore, mcore_box))
    )
    return _linearised(tile.sizes, hf, mcore)


@lru_cache(maxsize=1024)  # the same in every layer
def _linearised(sizes: Shape, hf: tuple[Shape, Steps, Shape], mcore: tuple[Shape, Steps, Shape]) -> Strided:
    """`linearise`, of bases within the boxes, steps, and sizes of the boxes."""
    (hf_offset, hf_strides), (mcore_offset, mcore_strides) = (
        addresses(Side("", base, steps), whole(size)) for base, steps, size in (hf, mcore)
    )
    axes = [(m, h, n) for m, h, n in zip(mcore_strides, hf_strides, sizes, strict=True) if n != 1]
    axes.sort(key=_falling_stride)
    merged: list[tuple[int, int, int]] = []
    for m, h, n in axes:
        if merged and merged[-1][0] == m * n and merged[-1][1] == h * n:
            merged[-1] = (m, h, n * merged[-1][2])
        else:
            merged.append((m, h, n))
    if not merged:
        merged = [(1, 1, 1)]
    m_strides, h_strides, counts = zip(*merged, strict=True)
    return Strided(counts, hf_offset, h_strides, mcore_offset, m_strides)


def addresses(side: Side, box: Box) -> tuple[int, list[int]]:
    """Where a tile's grid lies in the row-major memory of a box that holds it.

    Returns:
        Offset of the grid's first element from the box's first, and the stride of each axis of the grid, in elements.
    """
    memory = row_major_strides(box.size)
    offset = sum((first - start) * stride for first, start, stride in zip(side.base, box.start, memory, strict=True))
    return offset, [step * memory[axis] for axis, step in side.steps]


def runs(strided: Strided) -> Iterator[tuple[int, int]]:
    """Offsets (hf, mcore), in elements, of the runs of `strided.run_elements` elements, by rising Megatron offset."""
    sizes, hf, mcore = strided.sizes, strided.hf_strides, strided.mcore_strides
    if strided.run_elements != 1 or (hf[-1] == 1 and mcore[-1] == 1):
        sizes, hf, mcore = sizes[:-1], hf[:-1], mcore[:-1]
    if not sizes:
        yield strided.hf_offset, strided.mcore_offset
        return
    for index in itertools.product(*map(range, sizes)):
        yield (
            strided.hf_offset + sum(i * s for i, s in zip(index, hf, strict=True)),
            strided.mcore_offset + sum(i * s for i, s in zip(index, mcore, strict=True)),
        )


def cover_fault(shape: Shape, tiles: Sequence[Tile], *, mcore: bool) -> CoverFault | None:
    """Prove that the tiles on one tensor cover each of its elements exactly once.

    Args:
        shape: Global shape of the tensor.
        tiles: All tiles whose Hugging Face (or Megatron) side is that tensor.
        mcore: Which side of the tiles is meant.

    Returns:
        None when every element has exactly one tile, else a box of the tensor that has none or several (`times` is -1
        where a tile lies outside the tensor).
    """
    if len(tiles) == 1:
        sizes, *sides = tiles[0]
        _, base, steps = sides[mcore]
        return _fault_of(shape, ((sizes, base, steps),))
    if mcore:
        return _fault(shape, tuple([(sizes, base, steps) for sizes, _, (_, base, steps) in tiles]))
    return _fault(shape, tuple([(sizes, base, steps) for sizes, (_, base, steps), _ in tiles]))


# A tile as one of its tensors sees it: sizes, base, steps.
_Grid = tuple["Shape", "Shape", Steps]


def _fault(shape: Shape, grids: tuple[_Grid, ...]) -> CoverFault | None:
    """The fault of a cover; what is the same in every layer or expert is proven once."""
    if len(grids) < 2 or len(shape) < 2:
        return _fault_of(shape, grids)
    slices: dict[int, list[_Grid]] = {}
    for sizes, base, steps in grids:
        inner = _inner(steps)
        if inner is None:
            return _fault_of(shape, grids)
        slices.setdefault(base[0], []).append((sizes, base[1:], inner))
    proven = None
    for index in range(shape[0]):
        inside = slices.pop(index, [])
        if inside == proven:
            continue
        fault = _fault(shape[1:], tuple(inside))
        if fault:
            start, size = fault.box
            return CoverFault(Box((index, *start), (1, *size)), fault.times)
        proven = inside
    for index in slices:  # a grid outside the shape
        return CoverFault(Box((index,) + (0,) * (len(shape) - 1), (1, *shape[1:])), -1)
    return None


@lru_cache(maxsize=256)
def _inner(steps: Steps) -> Steps | None:
    """The steps within a slice of the first axis; None where that axis is walked along."""
    return None if any(axis == 0 for axis, _ in steps) else tuple((axis - 1, step) for axis, step in steps)


@lru_cache(maxsize=256)
def _fault_of(shape: Shape, grids: tuple[_Grid, ...]) -> CoverFault | None:
    if any(len(base) != len(shape) for _, base, _ in grids):
        return CoverFault(whole(shape), -1)
    patterns = [_pattern(grid, len(shape)) for grid in grids]
    splits = [_split_of(axis, extent, patterns) for axis, extent in enumerate(shape)]
    view = tuple(n for extent, split in zip(shape, splits, strict=True) for n in ((extent // split), split))
    boxes: list[Box] = []
    for pattern in patterns:
        per_axis = [_intervals(walk, split) for walk, split in zip(pattern, splits, strict=True)]
        for combination in itertools.product(*per_axis):
            flat = [interval for pair in combination for interval in pair]
            boxes.append(Box(tuple(start for start, _ in flat), tuple(size for _, size in flat)))
    fault = exact_cover(view, boxes)
    if fault is None:
        return None
    start, size = fault.box
    return CoverFault(
        Box(
            tuple(start[2 * k] * split + start[2 * k + 1] for k, split in enumerate(splits)),
            tuple((size[2 * k] - 1) * split + size[2 * k + 1] for k, split in enumerate(splits)),
        ),
        fault.times,
    )


# One axis of one side: the first index, and the walks along it as (count, step) by falling step; the last has step 1.
_Walk = tuple[int, tuple[tuple[int, int], ...]]


def _pattern(grid: _Grid, rank: int) -> list[_Walk]:
    sizes, base, steps = grid
    walks: list[list[tuple[int, int]]] = [[] for _ in range(rank)]
    for count, (axis, step) in zip(sizes, steps, strict=True):
        if count != 1:
            walks[axis].append((count, step))
    pattern: list[_Walk] = []
    for first, walk in zip(base, walks, strict=True):
        walk.sort(key=_rising_step)
        merged: list[tuple[int, int]] = [(1, 1)]
        for count, step in walk:
            inner_count, inner_step = merged[-1]
            if step == inner_count * inner_step:
                merged[-1] = (count * inner_count, inner_step)
            else:
                merged.append((count, step))
        pattern.append((first, tuple(reversed(merged))))
    return pattern


def _split_of(axis: int, extent: int, patterns: Sequence[Sequence[_Walk]]) -> int:
    """The period in which an axis is best split so that the periodic patterns along it become boxes, or 1."""
    periods = {walks[-2][1] for _, walks in (pattern[axis] for pattern in patterns) if len(walks) > 1}
    split = math.gcd(extent, *periods) if periods else 1
    return split if periods == {split} else 1


def _intervals(walk: _Walk, split: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """A walk along an axis as intervals of (period, place in the period)."""
    first, walks = walk
    *outer, (count, _) = walks
    if outer and outer[-1][1] == split and first % split + count <= split:
        periods = outer.pop()[0]
        offsets = [
            sum(i * step for i, (_, step) in zip(index, outer, strict=True))
            for index in itertools.product(*(range(n) for n, _ in outer))
        ]
        return [(((first + at) // split, periods), ((first + at) % split, count)) for at in offsets]
    found: list[tuple[tuple[int, int], tuple[int, int]]] = []
    for index in itertools.product(*(range(n) for n, _ in outer)):
        low = first + sum(i * step for i, (_, step) in zip(index, outer, strict=True))
        high = low + count
        while low < high:
            period, place = divmod(low, split)
            if place == 0 and high - low >= split:
                found.append(((period, (high - low) // split), (0, split)))
                low += (high - low) // split * split
            else:
                size = min(split - place, high - low)
                found.append(((period, 1), (place, size)))
                low += size
    return found


def _cut_axis(
    walks: Sequence[tuple[int, int, int]], first: int, low: int, high: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Cut nested walks (step, grid axis, count), by falling step, to low <= index < high.

    Yields:
        Sub-grids as lists of (grid axis, begin, count); axes that are not named are whole.
    """
    if not walks:
        if low <= first < high:
            yield []
        return
    (step, axis, count), *inner = walks
    reach = sum(s * (n - 1) for s, _, n in inner)
    begin = max(0, -((first + reach - low) // step))  # the first that reaches low
    end = min(count, (high - 1 - first) // step + 1)  # past the last that starts below high
    if not inner:
        if begin < end:
            yield [(axis, begin, end - begin)]
        return
    full_begin = max(begin, -((first - low) // step))
    full_end = min(end, (high - 1 - reach - first) // step + 1)
    if full_begin < full_end:
        yield [(axis, full_begin, full_end - full_begin)]
    else:
        full_begin = full_end = end
    for i in itertools.chain(range(begin, full_begin), range(full_end, end)):
        for cut in _cut_axis(inner, first + i * step, low, high):
            yield [(axis, i, 1), *cut]


def _moved(side: Side, origin: Sequence[int]) -> Side:
    base = list(side.base)
    for begin, (axis, step) in zip(origin, side.steps, strict=True):
        base[axis] += begin * step
    return Side(side.tensor, tuple(base), side.steps)


def _falling_stride(axis: tuple[int, int, int]) -> tuple[int, int]:
    return -axis[0], -axis[1]


def _rising_step(walk: tuple[int, int]) -> int:
    return walk[1]
