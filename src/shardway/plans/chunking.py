"""How an import cuts Megatron tensors into chunks, and chunks into files."""

from __future__ import annotations

import math
from operator import mul
from typing import TYPE_CHECKING

from shardway.core.boxes import Box, hull, row_major_strides, span, whole
from shardway.core.errors import Code
from shardway.core.tiles import reach
from shardway.families.parallel import UnevenError, loaded_boxes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardway.core.errors import Problems
    from shardway.core.tensors import Shape
    from shardway.core.tiles import Tile
    from shardway.families.parallel import Parallelism

# Two writers on one file wait for each other (ext4 and XFS lock the inode), so even a small checkpoint is spread over
# several files; past this many more only cost metadata operations on a shared filesystem.
_SPREAD_FILES = 16
_SPREAD_BYTES = 64 * 2**20


def chunk_boxes(shape: Shape, tiles: Sequence[Tile], max_elements: int) -> list[tuple[Box, Sequence[Tile]]]:
    """Cut a Megatron tensor into the chunks that an import writes.

    A chunk is what one layer's tiles fill together: interleaved parts (query, key, value) share one, parts that lie
    one after the other (gate, up) get one each, as Megatron Bridge writes them.

    Args:
        shape: Global shape of the tensor.
        tiles: All its tiles.
        max_elements: No chunk gets more elements than this.

    Returns:
        Boxes that are contiguous in row-major order and cover the tensor exactly once, by rising position; with each
        the tiles that may reach into it, by rising position.
    """
    strides = row_major_strides(shape)
    spans = []
    lengths: dict[Shape, int] = {}
    for number, (sizes, _, (_, base, steps)) in enumerate(tiles):
        extent = reach(sizes, steps, len(shape))
        if extent not in lengths:
            first, last = span(whole(extent), strides)
            lengths[extent] = last - first
        first = sum(map(mul, base, strides))
        spans.append((first, first + lengths[extent], number, extent))
    spans.sort()
    groups: list[tuple[list[Box], list[Tile]]] = []
    reached = -1
    for first, last, number, extent in spans:
        tile = tiles[number]
        box = Box(tile.mcore.base, extent)
        if first > reached:
            groups.append(([box], [tile]))
        else:
            boxes, on_them = groups[-1]
            boxes.append(box)
            on_them.append(tile)
        reached = max(reached, last)
    return [(part, on_them) for boxes, on_them in groups for part in split_box(hull(boxes), max_elements)]


def shard_boxes(key: str, shape: Shape, parallel: Parallelism | None, problems: Problems) -> list[Box] | None:
    """The chunks along whose edges the ranks of a job load a tensor.

    Args:
        key: The tensor's key on disk.
        shape: Its global shape.
        parallel: The job; None for none.
        problems: Gets `option-invalid` where its ranks can't have equal parts.

    Returns:
        Boxes that cover the tensor exactly once; None without a job, and for tensors that are not a model's.
    """
    try:
        return None if parallel is None else loaded_boxes(key, shape, parallel)
    except UnevenError as error:
        problems.add(
            Code.OPTION_INVALID,
            f"{key} can't be cut along the shards of that job: {error}",
            tensor=key,
            facts=(f"shape {list(shape)}",),
            cure="choose sizes that divide it, or leave out --chunk-for",
        )
        return None


def split_box(box: Box, max_elements: int) -> list[Box]:
    """Cut a box along its leading axes into boxes of at most `max_elements`, each contiguous within it.

    Only a single element is ever left over the limit (`max_elements` < 1 counts as 1).
    """
    total = box.num_elements
    if total <= max(max_elements, 1):
        return [box]
    axis = next(k for k, size in enumerate(box.size) if size > 1)
    inner = math.prod(box.size[axis + 1 :])
    rows = max(1, max_elements // inner)
    parts = []
    for at in range(0, box.size[axis], rows):
        start = (*box.start[:axis], box.start[axis] + at, *box.start[axis + 1 :])
        size = (*box.size[:axis], min(rows, box.size[axis] - at), *box.size[axis + 1 :])
        parts += [Box(start, size)] if inner <= max_elements else split_box(Box(start, size), max_elements)
    return parts


def assign_files(sizes: Sequence[int], max_file_bytes: int) -> list[int]:
    """Spread blobs over files in order, evenly by bytes.

    Args:
        sizes: Bytes of each blob, in the order in which they are to be laid down.
        max_file_bytes: No file gets more than this, unless a single blob has.

    Returns:
        For each blob the number of its file, counted from 0 without gaps.
    """
    total = sum(sizes)
    wanted = max(-(-total // max_file_bytes), min(_SPREAD_FILES, -(-total // _SPREAD_BYTES)), 1)
    goal = -(-total // wanted)
    numbers = []
    number = filled = passed = 0
    for size in sizes:
        # A file is closed at the point nearest to its even share, or before it would grow past the limit.
        if filled and (filled + size > max_file_bytes or passed + size // 2 >= goal * (number + 1)):
            number += 1
            filled = 0
        numbers.append(number)
        filled += size
        passed += size
    return numbers
