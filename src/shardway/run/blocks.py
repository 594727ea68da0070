"""Moving a stream as strided blocks in bounded memory: casts, transposed tiles, interleaved tensor-parallel chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from shardway.core.boxes import Box
from shardway.core.tiles import linearise, restrict
from shardway.plans.chunking import split_box
from shardway.plans.model import Direction
from shardway.plans.streams import frame
from shardway.run.strided import gather, grid_view, raw_dtype, scatter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Chunk
    from shardway.plans.model import Plan, Stream
    from shardway.run.files import Files

    Array = npt.NDArray[Any]

BLOCK_BYTES = 8 * 2**20


def move_blocks(
    plan: Plan,
    stream: Stream,
    hf: Files,
    mcore: Files,
    advance: Callable[[int], None],
    overflows: dict[str, int],
) -> list[str]:
    """Move a stream block by block.

    Args:
        plan: The plan, of direction IMPORT or EXPORT.
        stream: The stream to move.
        hf: Open files of the Hugging Face side.
        mcore: Open files of the Megatron side.
        advance: Called with the bytes of the Megatron side that have passed.
        overflows: Receives for each tensor how many finite values a cast made infinite.

    Returns:
        The xxh3-128 digest of each of the stream's chunks.
    """
    importing = plan.direction is Direction.IMPORT
    hashers = [xxhash.xxh3_128() for _ in stream.chunks]
    done = [0] * len(stream.chunks)
    for block in blocks_of(stream):
        if importing:
            memory = read_pieces(plan, stream, block, hf, stream.dtype, overflows)
            _write_chunks(stream, block, memory.reshape(block.size), mcore, hashers, done)
        else:
            memory = read_chunks(stream, block, mcore, hashers, done)
            _write_pieces(plan, stream, block, hf, memory, overflows)
        advance(memory.nbytes)
    if importing:
        for k, chunk in enumerate(stream.chunks):
            mcore.write_from(chunk.file, frame(stream, k).tail, chunk.offset + done[k])
    return [str(hasher.hexdigest()) for hasher in hashers]


def blocks_of(stream: Stream) -> list[Box]:
    """The stream's slab cut into boxes of bounded size that follow each other in row-major order."""
    return split_box(stream.box, BLOCK_BYTES // stream.dtype.itemsize)


def read_chunks(stream: Stream, block: Box, mcore: Files, hashers: Sequence[xxhash.xxh3_128], done: list[int]) -> Array:
    """The elements of a block, row-major, read from the stream's chunks in their order.

    Args:
        stream: The stream that the block belongs to.
        block: One of `blocks_of(stream)`; they have to be read in order.
        mcore: Open files of the Megatron side.
        hashers: One for each chunk; fed with its bytes.
        done: Bytes read of each chunk so far; updated.
    """
    array = np.empty(block.size, _array_type(stream.dtype))
    for k, chunk in enumerate(stream.chunks):
        inside = _overlap(block, chunk)
        if inside is None:
            continue
        part = np.empty_like(array[inside])
        view = part.reshape(-1).view(np.uint8).data
        mcore.read_into(chunk.file, view, chunk.offset + done[k])
        hashers[k].update(view)
        done[k] += len(view)
        array[inside] = part
    return array.reshape(-1)


def _write_chunks(
    stream: Stream, block: Box, array: Array, mcore: Files, hashers: Sequence[xxhash.xxh3_128], done: list[int]
) -> None:
    for k, chunk in enumerate(stream.chunks):
        inside = _overlap(block, chunk)
        if inside is None:
            continue
        if not done[k]:
            mcore.write_from(chunk.file, frame(stream, k).head, stream.blob_offsets[k])
        view = np.ascontiguousarray(array[inside]).reshape(-1).view(np.uint8).data
        mcore.write_from(chunk.file, view, chunk.offset + done[k])
        hashers[k].update(view)
        done[k] += len(view)


def read_pieces(plan: Plan, stream: Stream, block: Box, hf: Files, wanted: DType, overflows: dict[str, int]) -> Array:
    """The elements of a block, row-major and cast to the `wanted` dtype, read from the Hugging Face side."""
    memory = np.empty(block.num_elements, _array_type(wanted))
    for piece in stream.pieces:
        dtype = plan.hf.tensors[piece.tile.hf.tensor].dtype
        for part in restrict(piece.tile, block, mcore=True):
            grid = linearise(part, Box(piece.hf.start, piece.hf.size), block)
            kind = _array_type(dtype)
            offset = piece.hf.offset + grid.hf_offset * dtype.itemsize
            values, _ = gather(hf, piece.hf.file, offset, grid.sizes, grid.hf_strides, kind)
            target = grid_view(memory, grid.mcore_offset, grid.sizes, grid.mcore_strides)
            target[...] = cast(values, dtype, wanted, part.hf.tensor, overflows)
    return memory


def _write_pieces(plan: Plan, stream: Stream, block: Box, hf: Files, memory: Array, overflows: dict[str, int]) -> None:
    for piece in stream.pieces:
        dtype = plan.hf.tensors[piece.tile.hf.tensor].dtype
        for part in restrict(piece.tile, block, mcore=True):
            grid = linearise(part, Box(piece.hf.start, piece.hf.size), block)
            values = grid_view(memory, grid.mcore_offset, grid.sizes, grid.mcore_strides)
            offset = piece.hf.offset + grid.hf_offset * dtype.itemsize
            converted = cast(values, stream.dtype, dtype, part.hf.tensor, overflows)
            scatter(hf, piece.hf.file, offset, grid.hf_strides, converted)


def cast(values: Array, source: DType, target: DType, tensor: str, overflows: dict[str, int]) -> Array:
    """Values of `source` type as `target` type, rounded to nearest even; counts finite values that become infinite."""
    if source is target:
        return values
    wide = values.view(source.numpy())
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = wide.astype(target.numpy())
        lost = int(np.count_nonzero(np.isinf(narrow) & np.isfinite(wide)))
    if lost:
        overflows[tensor] = overflows.get(tensor, 0) + lost
    return narrow.view(_array_type(target))


def _array_type(dtype: DType) -> np.dtype[np.generic]:
    return raw_dtype(dtype.itemsize)


def _overlap(block: Box, chunk: Chunk) -> tuple[slice, ...] | None:
    slices = []
    for low, size, start, extent in zip(block.start, block.size, chunk.start, chunk.size, strict=True):
        begin, end = max(low, start), min(low + size, start + extent)
        if begin >= end:
            return None
        slices.append(slice(begin - low, end - low))
    return tuple(slices)
