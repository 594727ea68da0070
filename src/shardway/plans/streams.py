"""Cutting a mapping into streams: which tiles, and which parts of them, lie in which slab of which tensor."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING

from shardway.core.boxes import UNPROVEN, Box, exact_cover, hull, row_major_strides, span, whole
from shardway.core.errors import Code, Problem
from shardway.core.tiles import reach, restrict
from shardway.formats.torch_file import tensor_blob_frame
from shardway.plans.combs import keep_whole
from shardway.plans.model import Piece, Stream

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from shardway.core.tensors import Chunk, Shape, StoredTensor
    from shardway.core.tiles import Tile
    from shardway.formats.torch_file import TensorFrame

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
    tiles: Iterable[Tile],
    hf: Mapping[str, StoredTensor],
    mcore: Mapping[str, StoredTensor],
    blob_offsets: Mapping[tuple[str, int], int] | None = None,
) -> tuple[Stream, ...]:
    """Cut tiles into streams.

    Args:
        tiles: The mosaic; tiles of tensors that `mcore` lacks are left out.
        hf: The tensors of the Hugging Face side; their chunks cover them exactly once.
        mcore: The tensors of the Megatron side; likewise.
        blob_offsets: Where the blob of a chunk to be written starts, by the chunk's file and offset.

    Returns:
        Streams that together hold every element of every tensor in `mcore` once, ordered by file and offset.
    """
    on: dict[str, list[Tile]] = {}
    for tile in tiles:
        on.setdefault(tile.mcore.tensor, []).append(tile)
    finders = {name: _ChunkFinder(tensor) for name, tensor in hf.items() if len(tensor.chunks) > 1}
    streams: list[Stream] = []
    for name, tensor in mcore.items():
        strides = row_major_strides(tensor.shape)
        spans = ((*span(_box(tile), strides), k, tile) for k, tile in enumerate(on.get(name, ())))
        waiting = sorted(spans, reverse=True)
        live: list[tuple[int, Tile]] = []
        found = slabs(tensor)
        if blob_offsets is None:
            found = _with_whole_combs(found, on.get(name, ()), hf, tensor.shape)
        for box, chunks in found:
            first, last = span(box, strides)
            live = [(end, tile) for end, tile in live if end >= first]
            while waiting and waiting[-1][0] <= last:
                _, end, _, tile = waiting.pop()
                live.append((end, tile))
            pieces: list[Piece] = []
            for end, tile in live:
                if end < first:
                    continue
                for cut in restrict(tile, box, mcore=True):
                    source = hf[cut.hf.tensor]
                    if len(source.chunks) == 1:
                        pieces.append(Piece(cut, source.chunks[0]))
                    else:
                        pieces += finders[cut.hf.tensor].pieces(cut)
            offsets = tuple(blob_offsets[chunk.file, chunk.offset] for chunk in chunks) if blob_offsets else ()
            streams.append(Stream(name, tensor.dtype, box, chunks, tuple(pieces), offsets))
    streams.sort(key=_place)
    return tuple(streams)


def _with_whole_combs(
    found: list[tuple[Box, tuple[Chunk, ...]]], tiles: Iterable[Tile], hf: Mapping[str, StoredTensor], shape: Shape
) -> list[tuple[Box, tuple[Chunk, ...]]]:
    """Slabs joined where they would cut what an export can write in one piece only together."""
    memories = ((tile, whole(hf[tile.hf.tensor].shape)) for tile in tiles if len(hf[tile.hf.tensor].chunks) == 1)
    return [
        (hull([box for box, _ in found[begin:end]]), tuple(chunk for _, chunks in found[begin:end] for chunk in chunks))
        for begin, end in keep_whole([box for box, _ in found], memories, shape)
    ]


def frame(stream: Stream, number: int) -> TensorFrame:
    """The bytes around chunk `number` of a stream that is being imported, as they were planned."""
    chunk = stream.chunks[number]
    # With the chunk's own offset as the phase, any alignment above the planned padding gives the planned padding.
    return tensor_blob_frame(
        stream.dtype,
        chunk.size,
        offset=stream.blob_offsets[number],
        align=BLOCK_BYTES,
        phase=chunk.offset % BLOCK_BYTES,
    )


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


def _place(stream: Stream) -> tuple[str, int]:
    return stream.chunks[0].file, stream.chunks[0].offset
