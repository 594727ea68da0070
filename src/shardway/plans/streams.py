"""Cutting a mapping into streams: which tiles, and which parts of them, lie in which slab of which tensor."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, overload

from shardway.core.boxes import UNPROVEN, Box, exact_cover, hull, row_major_strides, span, whole
from shardway.core.errors import Code, Problem
from shardway.core.tiles import reach, restrict
from shardway.formats.torch_file import tensor_blob_frame
from shardway.plans.combs import keep_whole
from shardway.plans.model import Piece, Stream

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Chunk, Shape, StoredTensor
    from shardway.core.tiles import Tile
    from shardway.formats.torch_file import TensorFrame
    from shardway.plans.laying import Blob
    from shardway.plans.model import Plan

# Extents can be shared between files only in whole filesystem blocks, at the same place within a block on both sides.
BLOCK_BYTES = 4096


def chunk_problems(tensors: Iterable[StoredTensor]) -> list[Problem]:
    """Every tensor whose chunks do not cover it exactly once, as a problem that says where.

    Args:
        tensors: Tensors as a checkpoint's metadata describes them.
    """
    problems = []
    for tensor in tensors:
        fault = exact_cover(tensor.shape, [Box(chunk.start, chunk.size) for chunk in tensor.chunks])
        if fault is None:
            continue
        code, what = {
            0: (Code.CHUNK_HOLE, "is not covered by any chunk"),
            -1: (Code.CHUNK_OUT_OF_BOUNDS, "is a chunk that lies outside the tensor"),
            UNPROVEN: (Code.METADATA_INVALID, "is cut so irregularly that it can't be proven to be covered once"),
        }.get(fault.times, (Code.CHUNK_OVERLAP, f"is covered by {fault.times} chunks"))
        problems.append(
            Problem(
                code=code,
                what=f"a part of {tensor.name} {what}",
                tensor=tensor.name,
                facts=(
                    (
                        f"the part starts at {list(fault.box.start)} and extends {list(fault.box.size)}; "
                        f"the tensor's shape is {list(tensor.shape)}, in {len(tensor.chunks)} chunks"
                    ),
                ),
                cure="the checkpoint's .metadata is damaged or its save was incomplete",
            )
        )
    return problems


def build_streams(
    tiles: Sequence[Tile],
    hf: Mapping[str, StoredTensor],
    mcore: Mapping[str, StoredTensor],
    *,
    importing: bool = False,
) -> Streams:
    """Cut tiles into streams.

    Args:
        tiles: The mosaic; tiles of tensors that `mcore` lacks are left out.
        hf: The tensors of the Hugging Face side; their chunks cover them exactly once.
        mcore: The tensors of the Megatron side; likewise.
        importing: Whether it is the chunks that are to be written. If not, what an export can write in one piece only
            together stays together.

    Returns:
        Streams that together hold every element of every tensor in `mcore` once, ordered by file and offset.
    """
    table = _Table(hf, tiles)
    # Side by side in the order of names, for lists of the tiles of each tensor would take more memory than the streams.
    numbers = array("I", sorted(range(len(tiles)), key=lambda number: tiles[number].mcore.tensor))
    reached = 0
    for name in sorted(mcore):
        on_it = []
        while reached < len(numbers) and (on := tiles[numbers[reached]].mcore.tensor) <= name:
            if on == name:
                on_it.append(numbers[reached])
            reached += 1
        tensor = mcore[name]
        strides = row_major_strides(tensor.shape)
        found = slabs(tensor)
        if not importing:
            found = _with_whole_combs(found, [tiles[number] for number in on_it], hf, tensor.shape)
        waiting = sorted(((*span(_box(tiles[number]), strides), number) for number in on_it), reverse=True)
        live: list[tuple[int, int]] = []
        for box, chunks in found:
            first, last = span(box, strides)
            live = [(past, number) for past, number in live if past >= first]
            while waiting and waiting[-1][0] <= last:
                _, past, number = waiting.pop()
                if past >= first:
                    live.append((past, number))
            table.add(name, tensor.dtype, chunks, [number for _, number in live])
    return Streams(table, array("I", sorted(range(len(table)), key=table.place)))


def chunk_streams(
    blobs: Iterable[Blob], chunks: Mapping[str, list[Chunk]], tiles: Sequence[Tile], hf: Mapping[str, StoredTensor]
) -> Streams:
    """A stream for each chunk: what `build_streams` makes of chunks that are contiguous in their tensors.

    Args:
        blobs: In the order in which they lie in the files, with their tiles.
        chunks: What has been made of them, by key and in that order.
        tiles: The mosaic.
        hf: The tensors of the Hugging Face side; their chunks cover them exactly once.
    """
    table = _Table(hf, tiles)
    following = {key: iter(found) for key, found in chunks.items()}
    for _, key, box, dtype, _, _, first, numbers in blobs:
        chunk = next(following[key])
        if math.prod(box.size):
            table.add(key, dtype, (chunk,), [first + number for number in numbers])
    return Streams(table, range(len(table)))


class _Table:
    """What streams are made from: numbers, which take a tenth of the memory that the streams would.

    Args:
        hf: The tensors of the Hugging Face side.
        tiles: What the numbers of tiles count.
    """

    def __init__(self, hf: Mapping[str, StoredTensor], tiles: Sequence[Tile]) -> None:
        self._tiles = tiles
        self._hf = hf
        self._finders = {name: _ChunkFinder(tensor) for name, tensor in hf.items() if len(tensor.chunks) > 1}
        self._chunks: list[Chunk] = []
        self._tile_numbers = array("I")
        # For each stream, its tensor, and how many chunks and numbers of tiles are those of it or before.
        self._names: list[str] = []
        self._dtypes: list[DType] = []
        self._past_chunk = array("I")
        self._past_tile = array("I")

    def __len__(self) -> int:
        return len(self._past_chunk)

    def place(self, number: int) -> tuple[str, int]:
        """The file of a stream's first chunk, and where it is in it."""
        chunk = self._chunks[self._past_chunk[number - 1] if number else 0]
        return chunk.file, chunk.offset

    def add(self, name: str, dtype: DType, chunks: tuple[Chunk, ...], tile_numbers: Iterable[int]) -> None:
        """Add a stream: its tensor, its chunks, and the tiles that may reach into it."""
        self._chunks += chunks
        self._tile_numbers.extend(tile_numbers)
        self._names.append(name)
        self._dtypes.append(dtype)
        self._past_chunk.append(len(self._chunks))
        self._past_tile.append(len(self._tile_numbers))

    def make(self, number: int) -> Stream:
        chunks = self._chunks_of(number)
        box = _hull(chunks)
        return Stream(self._names[number], self._dtypes[number], box, chunks, partial(self._pieces, number, box))

    def has_pieces(self, number: int) -> bool:
        """Whether a stream has a place on the Hugging Face side."""
        box = _hull(self._chunks_of(number))
        return any(restrict(tile, box, mcore=True) for tile in self._tiles_of(number))

    def _chunks_of(self, number: int) -> tuple[Chunk, ...]:
        return tuple(self._chunks[self._past_chunk[number - 1] if number else 0 : self._past_chunk[number]])

    def _tiles_of(self, number: int) -> Iterator[Tile]:
        begin = self._past_tile[number - 1] if number else 0
        return map(self._tiles.__getitem__, self._tile_numbers[begin : self._past_tile[number]])

    def _pieces(self, number: int, box: Box) -> tuple[Piece, ...]:
        pieces: list[Piece] = []
        for tile in self._tiles_of(number):
            for cut in restrict(tile, box, mcore=True):
                source = self._hf[cut.hf.tensor]
                if len(source.chunks) == 1:
                    pieces.append(Piece(cut, source.chunks[0]))
                else:
                    pieces += self._finders[cut.hf.tensor].pieces(cut)
        return tuple(pieces)


def _hull(chunks: tuple[Chunk, ...]) -> Box:
    if len(chunks) == 1:  # so that of most streams only this box is made
        return Box(chunks[0].start, chunks[0].size)
    return hull([Box(chunk.start, chunk.size) for chunk in chunks])


class Streams(Sequence[Stream]):
    """Streams that are made whenever they are asked for, and not kept.

    Args:
        table: What they are made from.
        order: Their numbers in it.
    """

    def __init__(self, table: _Table, order: Sequence[int]) -> None:
        self._table = table
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, place: int) -> Stream: ...
    @overload
    def __getitem__(self, place: slice) -> Streams: ...
    def __getitem__(self, place: int | slice) -> Stream | Streams:
        if isinstance(place, slice):
            return Streams(self._table, self._order[place])
        return self._table.make(self._order[place])

    def with_pieces(self) -> Streams:
        """Those that have a place on the Hugging Face side."""
        return Streams(self._table, array("I", (number for number in self._order if self._table.has_pieces(number))))


def _with_whole_combs(
    found: list[tuple[Box, tuple[Chunk, ...]]], tiles: Iterable[Tile], hf: Mapping[str, StoredTensor], shape: Shape
) -> list[tuple[Box, tuple[Chunk, ...]]]:
    """Slabs joined where they would cut what an export can write in one piece only together."""
    memories = ((tile, whole(hf[tile.hf.tensor].shape)) for tile in tiles if len(hf[tile.hf.tensor].chunks) == 1)
    ranges = keep_whole([box for box, _ in found], memories, shape)
    if len(ranges) == len(found):
        return found
    return [
        (hull([box for box, _ in found[begin:end]]), tuple(chunk for _, chunks in found[begin:end] for chunk in chunks))
        for begin, end in ranges
    ]


def frame(plan: Plan, dtype: DType, chunk: Chunk) -> tuple[int, TensorFrame]:
    """Where the blob of a chunk that is to be written starts in its file, and the bytes around the chunk."""
    at = plan.blob_offset(chunk)
    # With the chunk's own offset as the phase, any alignment above the planned padding gives the planned padding.
    return at, tensor_blob_frame(dtype, chunk.size, offset=at, align=BLOCK_BYTES, phase=chunk.offset % BLOCK_BYTES)


def slabs(tensor: StoredTensor) -> list[tuple[Box, tuple[Chunk, ...]]]:
    """Group a tensor's chunks into slabs: boxes that are contiguous in the tensor's row-major order.

    Args:
        tensor: A tensor whose chunks cover it exactly once.

    Returns:
        Slabs by rising position, each with its chunks by rising start.
    """
    if not math.prod(tensor.shape):
        return []
    strides = row_major_strides(tensor.shape)
    ordered = sorted(
        (*span(Box(chunk.start, chunk.size), strides), chunk) for chunk in tensor.chunks if math.prod(chunk.size)
    )
    groups: list[list[Chunk]] = []
    reached = -1
    for first, last, chunk in ordered:
        if first > reached:
            groups.append([])
        groups[-1].append(chunk)
        reached = max(reached, last)
    found = []
    for chunks in groups:
        box = hull([Box(chunk.start, chunk.size) for chunk in chunks])
        if len(chunks) > 1 and box.num_elements != sum(math.prod(chunk.size) for chunk in chunks):
            return [(whole(tensor.shape), tuple(chunk for _, _, chunk in ordered))]
        found.append((box, tuple(chunks)))
    return found


class _ChunkFinder:
    """Finds the chunks of a Hugging Face tensor that a tile lies in without looking at all of them."""

    def __init__(self, tensor: StoredTensor) -> None:
        self._strides = row_major_strides(tensor.shape)
        self._slabs = slabs(tensor)
        self._firsts = [span(box, self._strides)[0] for box, _ in self._slabs]

    def pieces(self, tile: Tile) -> list[Piece]:
        first, last = span(Box(tile.hf.base, reach(tile.sizes, tile.hf.steps, len(self._strides))), self._strides)
        begin = max(bisect_right(self._firsts, first) - 1, 0)
        end = bisect_right(self._firsts, last)
        return [
            Piece(part, chunk)
            for _, chunks in self._slabs[begin:end]
            for chunk in chunks
            for part in restrict(tile, Box(chunk.start, chunk.size), mcore=False)
        ]


def _box(tile: Tile) -> Box:
    return Box(tile.mcore.base, reach(tile.sizes, tile.mcore.steps, len(tile.mcore.base)))
