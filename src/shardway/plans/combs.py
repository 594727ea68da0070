"""Combs: tiles that take turns element by element in a Hugging Face tensor, such as interleaved gate and up columns.

Written one after the other, every element would be a write of its own. So what fills a comb stays together: it is read
whole from the Megatron side, and written in one piece.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.boxes import Box, hull, row_major_strides, span
from shardway.core.tiles import addresses, reach

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from shardway.core.tensors import Shape
    from shardway.core.tiles import Tile


class Grid(NamedTuple):
    """Where a tile lies in the memory of a chunk: offset of its first element, extents, distances, in elements."""

    offset: int
    sizes: Shape
    strides: Shape

    @property
    def is_comb(self) -> bool:
        """Whether no two of its elements are neighbours."""
        distances = [stride for size, stride in zip(self.sizes, self.strides, strict=True) if size > 1]
        return bool(distances) and min(distances) > 1

    @property
    def past(self) -> int:
        """Offset just past its last element."""
        return self.offset + 1 + sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True))


def grid_in(tile: Tile, box: Box) -> Grid:
    """Where the Hugging Face side of a tile lies in the memory of a box of that tensor."""
    offset, strides = addresses(tile.hf, box)
    return Grid(offset, tile.sizes, tuple(strides))


def complete(grids: Sequence[Grid]) -> Iterator[list[int]]:
    """The combs that grids of one memory make up and fill without a gap, as indices of the grids.

    Args:
        grids: Grids that have no element in common.
    """
    order = sorted((k for k, grid in enumerate(grids) if grid.is_comb), key=lambda k: grids[k].offset)
    group: list[int] = []
    past = 0
    for k in [*order, None]:
        if group and (k is None or grids[k].offset >= past):
            count = sum(math.prod(grids[one].sizes) for one in group)
            if count == past - grids[group[0]].offset:
                yield group
            group = []
        if k is not None:
            group.append(k)
            past = max(past, grids[k].past)


def keep_whole(boxes: Sequence[Box], tiles: Iterable[tuple[Tile, Box]], shape: Shape) -> list[tuple[int, int]]:
    """Which of consecutive boxes of a Megatron tensor have to stay together so that no comb is cut.

    Args:
        boxes: Boxes that follow each other without a gap in the tensor's row-major order.
        tiles: Tiles of the tensor, each with the box of the Hugging Face tensor that is one memory.
        shape: Shape of the Megatron tensor, or any that holds all boxes and tiles.

    Returns:
        The boxes in ranges, as begin and end of each: all that belong together form a box too.
    """
    alone = [(k, k + 1) for k in range(len(boxes))]
    in_memory: dict[tuple[str, Box], list[Tile]] = {}
    for tile, box in tiles:
        if (len(tile.hf.base) - 1, 1) not in tile.hf.steps:
            in_memory.setdefault((tile.hf.tensor, box), []).append(tile)
    if len(boxes) < 2 or not in_memory:
        return alone
    strides = row_major_strides(shape)
    spans = []
    for (_, box), combs in in_memory.items():
        for group in complete([grid_in(tile, box) for tile in combs]):
            reached = [Box(combs[k].mcore.base, reach(combs[k].sizes, combs[k].mcore.steps, len(shape))) for k in group]
            spans.append(span(hull(reached), strides))
    spans.sort(reverse=True)
    ranges: list[tuple[int, int]] = []
    last = -1  # of the elements that have to stay with those before
    for k, box in enumerate(boxes):
        first, end = span(box, strides)
        if first <= last:
            ranges[-1] = (ranges[-1][0], k + 1)
        else:
            ranges.append((k, k + 1))
        while spans and spans[-1][0] <= end:
            last = max(last, spans.pop()[1])
    return [part for begin, end in ranges for part in _as_box(boxes, begin, end)]


def _as_box(boxes: Sequence[Box], begin: int, end: int) -> list[tuple[int, int]]:
    together = hull(boxes[begin:end])
    if together.num_elements == sum(box.num_elements for box in boxes[begin:end]):
        return [(begin, end)]
    return [(k, k + 1) for k in range(begin, end)]
