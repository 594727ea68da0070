"""Cutting a mapping into streams: which tiles, and which parts of them, lie in which slab of which tensor."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from shardway.core.boxes import Box, exact_cover, row_major_strides, whole
from shardway.core.errors import Code, Problem
from shardway.core.tiles import restrict
from shardway.formats.torch_file import tensor_blob_frame
from shardway.plans.model import Piece, Stream

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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
    streams: list[Stream] = []
    for name, tensor in mcore.items():
        strides = row_major_strides(tensor.shape)
        waiting = sorted(((_first(tile, strides), k, tile) for k, tile in enumerate(on.get(name, ()))), reverse=True)
        live: list[tuple[int, Tile]] = []
        for box, chunks in slabs(tensor):
            first = sum(map(int.__mul__, box.start, strides))
            past = first + math.prod(box.size)
            live = [(last, tile) for last, tile in live if last >= first]
            while waiting and waiting[-1][0] < past:
                tile = waiting.pop()[2]
                live.append((_last(tile, strides), tile))
            pieces = tuple(
                Piece(part, chunk)
                for last, tile in live
                if last >= first
                for cut in restrict(tile, box, mcore=True)
                for part, chunk in _by_chunk(cut, hf[tile.hf.tensor])
            )
            offsets = tuple(blob_offsets[chunk.file, chunk.offset] for chunk in chunks) if blob_offsets else ()
            streams.append(Stream(name, tensor.dtype, box, chunks, pieces, offsets))
    streams.sort(key=_place)
    return tuple(streams)


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
    hulls = []
    for chunk in tensor.chunks:
        if not math.prod(chunk.size):
            continue
        first = sum(map(int.__mul__, chunk.start, strides))
        reach = sum((size - 1) * stride for size, stride in zip(chunk.size, strides, strict=True))
        hulls.append((first, first + reach, chunk))
    hulls.sort()
    groups: list[tuple[int, list[Chunk]]] = []
    for first, last, chunk in hulls:
        if groups and first <= groups[-1][0]:
            groups[-1][1].append(chunk)
            groups[-1] = (max(last, groups[-1][0]), groups[-1][1])
        else:
            groups.append((last, [chunk]))
    found = []
    for _, chunks in groups:
        box = _hull(chunks)
        if box.num_elements != sum(math.prod(chunk.size) for chunk in chunks):
            return [(whole(tensor.shape), tuple(chunk for _, _, chunk in hulls))]
        found.append((box, tuple(chunks)))
    return found


def _hull(chunks: Sequence[Chunk]) -> Box:
    if len(chunks) == 1:
        return Box(chunks[0].start, chunks[0].size)
    start = tuple(map(min, zip(*(chunk.start for chunk in chunks), strict=True)))
    ends = (tuple(map(int.__add__, chunk.start, chunk.size)) for chunk in chunks)
    return Box(start, tuple(map(int.__sub__, map(max, zip(*ends, strict=True)), start)))


def _by_chunk(tile: Tile, tensor: StoredTensor) -> Iterable[tuple[Tile, Chunk]]:
    if len(tensor.chunks) == 1:
        return ((tile, tensor.chunks[0]),)
    return [
        (part, chunk) for chunk in tensor.chunks for part in restrict(tile, Box(chunk.start, chunk.size), mcore=False)
    ]


def _first(tile: Tile, strides: Shape) -> int:
    return sum(map(int.__mul__, tile.mcore.base, strides))


def _last(tile: Tile, strides: Shape) -> int:
    reach = sum(
        (size - 1) * step * strides[axis] for size, (axis, step) in zip(tile.sizes, tile.mcore.steps, strict=True)
    )
    return _first(tile, strides) + reach


def _place(stream: Stream) -> tuple[str, int]:
    return stream.chunks[0].file, stream.chunks[0].offset
