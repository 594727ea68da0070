"""Moving a stream as strided blocks in bounded memory: casts, transposed tiles, interleaved tensor-parallel chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from shardway.core.boxes import Box, hull
from shardway.core.dtypes import FLOAT16, FLOAT32
from shardway.core.tiles import addresses, restrict
from shardway.plans.chunking import split_box
from shardway.plans.combs import complete, grid_in, keep_whole
from shardway.plans.model import Direction
from shardway.plans.streams import frame
from shardway.run.strided import Scratch, gather, grid_view, raw_dtype, scatter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Chunk
    from shardway.core.tiles import Tile
    from shardway.plans.combs import Grid
    from shardway.plans.model import Piece, Plan, Stream
    from shardway.run.files import Files
    from shardway.run.losses import Losses

    Array = npt.NDArray[Any]

BLOCK_BYTES = 8 * 2**20
_SCRATCH = Scratch()


def move_blocks(
    plan: Plan,
    stream: Stream,
    hf: Files,
    mcore: Files,
    advance: Callable[[int], None],
    losses: Losses,
) -> list[str]:
    """Move a stream block by block.

    Args:
        plan: The plan, of direction IMPORT or EXPORT.
        stream: The stream to move.
        hf: Open files of the Hugging Face side.
        mcore: Open files of the Megatron side.
        advance: Called with the bytes of the Megatron side that have passed.
        losses: Receives what conversions of values lost.

    Returns:
        The xxh3-128 digest of each of the stream's chunks.
    """
    importing = plan.direction is Direction.IMPORT
    hashers = [xxhash.xxh3_128() for _ in stream.chunks]
    done = [0] * len(stream.chunks)
    for block in blocks_of(stream, plan):
        if importing:
            memory = read_pieces(plan, stream, block, hf, losses)
            _write_chunks(plan, stream, block, memory.reshape(block.size), mcore, hashers, done)
        else:
            memory = read_chunks(stream, block, mcore, hashers, done)
            _write_pieces(plan, stream, block, hf, memory, losses)
        advance(memory.nbytes)
    if importing:
        for k, chunk in enumerate(stream.chunks):
            _, (_, tail, _) = frame(plan, stream.dtype, chunk)
            mcore.write_from(chunk.file, tail, chunk.offset + done[k])
    return [str(hasher.hexdigest()) for hasher in hashers]


def blocks_of(stream: Stream, plan: Plan | None = None) -> list[Box]:
    """The stream's slab cut into boxes of bounded size that follow each other in row-major order.

    Only what fills a comb (`plans.combs`) stays together whatever its size: an expert's gate and up, for one. Values
    that are computed fill none.
    """
    quantised = plan.quantised if plan is not None else {}
    stored = [piece for piece in stream.pieces if piece.tile.hf.tensor not in quantised]
    found = split_box(stream.box, BLOCK_BYTES // stream.dtype.itemsize)
    if len(found) == 1 or not stored:
        return found
    memories = ((piece.tile, Box(piece.hf.start, piece.hf.size)) for piece in stored)
    past = tuple(start + size for start, size in zip(stream.box.start, stream.box.size, strict=True))
    return [hull(found[begin:end]) for begin, end in keep_whole(found, memories, past)]


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
    plan: Plan,
    stream: Stream,
    block: Box,
    array: Array,
    mcore: Files,
    hashers: Sequence[xxhash.xxh3_128],
    done: list[int],
) -> None:
    for k, chunk in enumerate(stream.chunks):
        inside = _overlap(block, chunk)
        if inside is None:
            continue
        if not done[k]:
            at, (head, _, _) = frame(plan, stream.dtype, chunk)
            mcore.write_from(chunk.file, head, at)
        view = np.ascontiguousarray(array[inside]).reshape(-1).view(np.uint8).data
        mcore.write_from(chunk.file, view, chunk.offset + done[k])
        hashers[k].update(view)
        done[k] += len(view)


def read_pieces(plan: Plan, stream: Stream, block: Box, hf: Files, losses: Losses) -> Array:
    """The elements of a block, row-major and as Megatron has them, read from the Hugging Face side.

    They hold until the thread's next call.
    """
    memory = _SCRATCH.array("block", (block.num_elements,), _array_type(stream.dtype))
    shift = plan.shifts.get(stream.tensor, 0.0)
    for piece, part in pieces_in(stream, block):
        dtype = plan.hf.tensors[part.hf.tensor].dtype
        place = part_of(memory, part, block)
        values = read_part(plan, piece, part, hf, losses, None if shift or dtype is not stream.dtype else place)
        if values is not place:
            place[...] = convert(values, dtype, stream.dtype, part.hf.tensor, losses, shift)
    return memory


def parts_of(plan: Plan, stream: Stream, block: Box, hf: Files, losses: Losses) -> Iterator[tuple[Tile, Array]]:
    """The parts of tiles that lie in a block, each with its values as Megatron has them, read from the other side."""
    shift = plan.shifts.get(stream.tensor, 0.0)
    for piece, part in pieces_in(stream, block):
        dtype = plan.hf.tensors[part.hf.tensor].dtype
        values = read_part(plan, piece, part, hf, losses)
        yield part, convert(values, dtype, stream.dtype, part.hf.tensor, losses, shift)


def read_part(plan: Plan, piece: Piece, part: Tile, hf: Files, losses: Losses, into: Array | None = None) -> Array:
    """The bits of a part of a piece, as the Hugging Face side has them, in the shape of the part's grid.

    Values that are computed may be written to `into`, which is then returned.
    """
    dtype = plan.hf.tensors[part.hf.tensor].dtype
    source = plan.quantised.get(part.hf.tensor)
    if source is not None:
        from shardway.run.dequantise import read_quantised

        computed = FLOAT32 if dtype is FLOAT16 else dtype
        place = into if computed is dtype else None
        return convert(read_quantised(source, part, hf, computed, place), computed, dtype, part.hf.tensor, losses)
    offset, strides = addresses(part.hf, Box(piece.hf.start, piece.hf.size))
    at = piece.hf.offset + offset * dtype.itemsize
    return gather(hf, piece.hf.file, at, part.sizes, tuple(strides), _array_type(dtype))[0]


def part_of(memory: Array, part: Tile, block: Box) -> Array:
    """The place of a part in the row-major memory of a block, in the shape of the part's grid."""
    offset, strides = addresses(part.mcore, block)
    return grid_view(memory, offset, part.sizes, tuple(strides))


def as_exported(plan: Plan, stream: Stream, part: Tile, values: Array, losses: Losses) -> Array:
    """A part's values, as Megatron has them, the way an export writes them."""
    dtype = plan.hf.tensors[part.hf.tensor].dtype
    return convert(values, stream.dtype, dtype, part.hf.tensor, losses, -plan.shifts.get(stream.tensor, 0.0))


def _write_pieces(plan: Plan, stream: Stream, block: Box, hf: Files, memory: Array, losses: Losses) -> None:
    teeth: dict[tuple[str, int], list[tuple[Grid, Array]]] = {}
    for piece, part in pieces_in(stream, block):
        converted = as_exported(plan, stream, part, part_of(memory, part, block), losses)
        grid = grid_in(part, Box(piece.hf.start, piece.hf.size))
        if grid.is_comb:
            teeth.setdefault((piece.hf.file, piece.hf.offset), []).append((grid, converted))
        else:
            scatter(hf, piece.hf.file, piece.hf.offset + grid.offset * converted.itemsize, grid.strides, converted)
    for (file, at), found in teeth.items():
        _write_combs(hf, file, at, found)


def _write_combs(hf: Files, file: str, at: int, teeth: Sequence[tuple[Grid, Array]]) -> None:
    """Write grids in which no two elements are neighbours; those that fill a stretch together, in one piece."""
    grids = [grid for grid, _ in teeth]
    left = dict(enumerate(teeth))
    for group in complete(grids):
        first = grids[group[0]].offset
        together = np.empty(max(grids[k].past for k in group) - first, teeth[group[0]][1].dtype)
        for k in group:
            grid, values = left.pop(k)
            grid_view(together, grid.offset - first, grid.sizes, grid.strides)[...] = values
        hf.write_from(file, together.view(np.uint8).data, at + first * together.itemsize)
    for grid, values in left.values():
        scatter(hf, file, at + grid.offset * values.itemsize, grid.strides, values)


def pieces_in(stream: Stream, block: Box) -> Iterator[tuple[Piece, Tile]]:
    """The pieces of a stream that reach into a block, each with a part of its tile that lies in the block."""
    for piece in stream.pieces:
        for part in restrict(piece.tile, block, mcore=True):
            yield piece, part


def convert(values: Array, source: DType, target: DType, tensor: str, losses: Losses, shift: float = 0.0) -> Array:
    """Values of `source` type as `target` type, rounded to nearest even.

    Args:
        values: The bits of the values, as `raw_dtype` has them.
        source: Their type.
        target: The type wanted.
        tensor: Name of the Hugging Face tensor that they belong to.
        losses: Counts finite values that become infinite, and those that the shift doesn't give back.
        shift: What is added to each value, in float32.

    Returns:
        The bits of the converted values.
    """
    if source is target and not shift:
        return values
    wide = values.view(source.numpy())
    with np.errstate(over="ignore", invalid="ignore"):
        if shift:
            moved = wide.astype(np.float32) + np.float32(shift)
            narrow = moved.astype(target.numpy())
            back = (narrow.astype(np.float32) - np.float32(shift)).astype(source.numpy())
            rounded = int(np.count_nonzero(back.view(values.dtype) != values))
            if rounded:
                losses.rounded[tensor] += rounded
        else:
            narrow = wide.astype(target.numpy())
        lost = int(np.count_nonzero(np.isinf(narrow) & np.isfinite(wide)))
    if lost:
        losses.overflowed[tensor] += lost
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
