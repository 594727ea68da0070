"""How an import cuts Megatron tensors into chunks, and chunks into files."""

from __future__ import annotations

import math
from operator import add, sub
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.boxes import Box, hull, row_major_strides, span
from shardway.core.errors import Code, Problems
from shardway.core.tiles import reach
from shardway.families.parallel import UnevenError, loaded_boxes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape
    from shardway.core.tiles import Tile
    from shardway.families.mapping import ModelMapping
    from shardway.families.parallel import Parallelism

# Two writers on one file wait for each other (ext4 and XFS lock the inode), so even a small checkpoint is spread over
# several files; past this many more only cost metadata operations on a shared filesystem.
_SPREAD_FILES = 16
_SPREAD_BYTES = 64 * 2**20


def layer_chunks(
    mapping: ModelMapping, dtypes: Mapping[str, DType], most: int
) -> Iterator[tuple[str, Box, str, int, tuple[int, ...]]]:
    """The chunks that an import writes: one for each layer and expert.

    Args:
        mapping: The mapping.
        dtypes: Type of every Megatron tensor.
        most: No chunk gets more bytes, unless a single element has.

    Yields:
        Key and box, the Hugging Face tensor that the chunk begins with, the place in the mosaic from which its tiles
        count, and their numbers.
    """
    cuts: dict[tuple[int, int], list[_Cut]] = {}
    for kind, first_tile, tiles in mapping.runs():
        key = tiles[0].mcore.tensor
        itemsize = dtypes[key].itemsize
        if (kind, itemsize) not in cuts:
            cuts[kind, itemsize] = _cuts_of(mapping.mcore[key], tiles, most // itemsize)
        for leader, offset, size, numbers in cuts[kind, itemsize]:
            _, (name, _, _), (_, start, _) = tiles[leader]
            yield key, Box(start if offset is None else tuple(map(add, start, offset)), size), name, first_tile, numbers


def chunks_for(
    parallel: Parallelism, mapping: ModelMapping, dtypes: Mapping[str, DType], most: int
) -> Iterator[tuple[str, Box, str, int, tuple[int, ...]]]:
    """Those of a job instead, cut along the shards of its ranks; their tiles are not numbered.

    Raises:
        ShardwayError: `option-invalid`, for all tensors that can't be cut for it.
    """
    on: dict[str, list[Tile]] = {}
    for tile in mapping.tiles:
        on.setdefault(tile.mcore.tensor, []).append(tile)
    problems = Problems()
    for key, shape in mapping.mcore.items():
        max_elements = most // dtypes[key].itemsize
        boxes = shard_boxes(key, shape, parallel, problems)
        if boxes is None:
            boxes = [box for box, _ in chunk_boxes(shape, on[key], max_elements)]
        names = {tile.mcore.base: tile.hf.tensor for tile in on[key]}
        name = on[key][0].hf.tensor
        for box in boxes:
            for part in split_box(box, max_elements):
                name = names.get(part.start, name)
                yield key, part, name, 0, ()
    problems.raise_if_any()


class _Cut(NamedTuple):
    """A chunk of a run of tiles, and of all runs of that kind.

    Attributes:
        leader: Number of the tile that it begins with.
        offset: Where it begins, from where that tile does; None where that is the same.
        size: Extent of its box.
        tiles: Numbers of the tiles that may reach into it.
    """

    leader: int
    offset: Shape | None
    size: Shape
    tiles: tuple[int, ...]


def _cuts_of(shape: Shape, tiles: Sequence[Tile], max_elements: int) -> list[_Cut]:
    """The chunks of a tensor, or of a layer of it."""
    first = {tile.mcore.base: number for number, tile in enumerate(tiles)}
    leader = 0
    found = []
    for (start, size), numbers in chunk_boxes(shape, tiles, max_elements):
        leader = first.get(start, leader)
        base = tiles[leader].mcore.base
        found.append(_Cut(leader, None if start == base else tuple(map(sub, start, base)), size, numbers))
    return found


def chunk_boxes(shape: Shape, tiles: Sequence[Tile], max_elements: int) -> list[tuple[Box, tuple[int, ...]]]:
    """Cut a Megatron tensor, or a layer of it, into the chunks that an import writes.

    A chunk is what one layer's tiles fill together: interleaved parts (query, key, value) share one, parts that lie
    one after the other (gate, up) get one each, as Megatron Bridge writes them.

    Args:
        shape: Global shape of the tensor.
        tiles: All tiles that it, or the layer, has.
        max_elements: No chunk gets more elements than this.

    Returns:
        Boxes that are contiguous in row-major order and cover what the tiles do exactly once, by rising position; with
        each the numbers of the tiles that may reach into it, by rising position of these.
    """
    strides = row_major_strides(shape)
    spans = []
    for number, tile in enumerate(tiles):
        box = Box(tile.mcore.base, reach(tile.sizes, tile.mcore.steps, len(shape)))
        spans.append((*span(box, strides), number, box))
    spans.sort()
    groups: list[tuple[list[Box], list[int]]] = []
    reached = -1
    for first, last, number, box in spans:
        if first > reached:
            groups.append(([box], [number]))
        else:
            boxes, numbers = groups[-1]
            boxes.append(box)
            numbers.append(number)
        reached = max(reached, last)
    return [(part, tuple(numbers)) for boxes, numbers in groups for part in split_box(hull(boxes), max_elements)]


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
