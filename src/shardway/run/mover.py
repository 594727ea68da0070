"""Moving one stream: bytes pass through a small buffer from the files of one side to the files of the other.

A buffer of two megabytes stays in the processor's cache, so that the digest of what passes costs next to nothing
(docs/design/0003-moving-bytes.md has the measurements).
"""

from __future__ import annotations

import math
import mmap
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from shardway.core.boxes import Box
from shardway.core.errors import Code, Problem, ShardwayError
from shardway.core.tiles import linearise, runs
from shardway.plans.model import Direction
from shardway.plans.streams import frame
from shardway.run.files import WRITE_BYTES
from shardway.run.losses import Losses

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shardway.core.tensors import Chunk, Shape
    from shardway.plans.model import Plan, Stream
    from shardway.run.clone import Cloner
    from shardway.run.files import Files

BUFFER_BYTES = 4 * WRITE_BYTES
_NEAR_BYTES = 64  # between places in a page; 31 or fewer are too near where it was measured
_SHORT_RUN_BYTES = 4096
_FEW_RUNS = 64
_WORTH_SHARING_BYTES = 2**16  # smaller chunks are not aligned for it either


class Run(NamedTuple):
    """Bytes that are contiguous in a chunk and in a file of the other side."""

    chunk_offset: int
    file: str
    offset: int
    num_bytes: int


class Mover:
    """Moves streams one after the other; each worker thread has one of its own.

    Args:
        plan: The plan that the streams belong to; its direction says which side is read.
        hf: Open files of the Hugging Face side.
        mcore: Open files of the Megatron side.
        advance: Called with the number of bytes of the Megatron side that have passed since the last call.
        expected: Digests that chunks which are read must have, by tensor and chunk start.
        cloner: Shares extents between files where the filesystem can.
    """

    def __init__(
        self,
        plan: Plan,
        hf: Files,
        mcore: Files,
        advance: Callable[[int], None],
        expected: Mapping[tuple[str, tuple[int, ...]], str],
        cloner: Cloner,
    ) -> None:
        self._plan = plan
        self._hf = hf
        self._mcore = mcore
        self._advance = advance
        self._expected = expected
        self._cloner = cloner
        self._memory = memoryview(mmap.mmap(-1, BUFFER_BYTES + 2 * _NEAR_BYTES))  # begins with a page
        # Of chunks that were written, by the file that they are in.
        self.digests: dict[str, dict[tuple[str, Shape], str]] = {}
        self.losses = Losses()

    def move(self, stream: Stream) -> None:
        """Move one stream from end to end and record the digest of each chunk that is written.

        Raises:
            ShardwayError: `io-failed`, `no-space`, `source-changed`, or `digest-mismatch`.
        """
        found = self._runs(stream)
        if found is None:
            from shardway.run.blocks import move_blocks

            digests = move_blocks(self._plan, stream, self._hf, self._mcore, self._advance, self.losses)
        elif self._plan.direction is Direction.IMPORT:
            digests = [self._import(stream, found)]
        else:
            digests = [self._export(stream, found)]
        for chunk, digest in zip(stream.chunks, digests, strict=True):
            self._check(stream, chunk, digest)
            if self._plan.direction is Direction.IMPORT:
                self.digests.setdefault(chunk.file, {})[stream.tensor, chunk.start] = digest

    def _runs(self, stream: Stream) -> list[Run] | None:
        """The stream as byte runs in chunk order; None where it has to be moved as strided blocks."""
        if len(stream.chunks) != 1 or stream.dtype.bits % 8 or stream.tensor in self._plan.shifts:
            return None
        itemsize = stream.dtype.itemsize
        found: list[Run] = []
        limit = max(_FEW_RUNS, stream.num_bytes // _SHORT_RUN_BYTES)
        for tile, chunk in stream.pieces:
            name = tile.hf.tensor
            if self._plan.hf.tensors[name].dtype is not stream.dtype or name in self._plan.quantised:
                return None
            grid = linearise(tile, Box(chunk.start, chunk.size), stream.box)
            num_bytes = grid.run_elements * itemsize
            if len(found) + grid.num_elements // grid.run_elements > limit:
                return None
            found += [
                Run(mcore * itemsize, chunk.file, chunk.offset + hf * itemsize, num_bytes) for hf, mcore in runs(grid)
            ]
        found.sort()
        return found

    def _import(self, stream: Stream, found: list[Run]) -> str:
        """Gather the runs into a new chunk, framed as a torch.save blob; return the digest of the chunk's bytes."""
        chunk = stream.chunks[0]
        at, (head, tail, _) = frame(self._plan, stream.dtype, chunk)
        hasher = xxhash.xxh3_128()
        if self._cloner.supported and stream.num_bytes >= _WORTH_SHARING_BYTES:
            return self._share(stream, found, head, tail)
        buffer = self._buffer(found[0].offset - len(head) if found else 0, at)
        data = fill = len(head)
        buffer[:fill] = head
        for run in found:
            offset, left = run.offset, run.num_bytes
            while left:
                take = min(left, BUFFER_BYTES - fill)
                self._hf.read_into(run.file, buffer[fill : fill + take], offset)
                fill += take
                offset += take
                left -= take
                if fill == BUFFER_BYTES:
                    at = self._flush(chunk.file, at, buffer, data, hasher)
                    data = fill = 0
        if fill + len(tail) > BUFFER_BYTES:
            at = self._flush(chunk.file, at, buffer[:fill], data, hasher)
            data = fill = 0
        hasher.update(buffer[data:fill])
        self._advance(fill - data)
        buffer[fill : fill + len(tail)] = tail
        self._mcore.write_from(chunk.file, buffer[: fill + len(tail)], at)
        return str(hasher.hexdigest())

    def _share(self, stream: Stream, found: list[Run], head: bytes, tail: bytes) -> str:
        """Import a chunk whose whole blocks appear in the file without a copy; every byte is read for the digest."""
        chunk = stream.chunks[0]
        hasher = xxhash.xxh3_128()
        self._mcore.write_from(chunk.file, head, chunk.offset - len(head))
        for run in found:
            place = chunk.offset + run.chunk_offset
            buffer = self._buffer(run.offset, place)
            begin, end = self._cloner.share(run.file, run.offset, chunk.file, place, run.num_bytes)
            for low in range(0, run.num_bytes, BUFFER_BYTES):
                high = min(low + BUFFER_BYTES, run.num_bytes)
                view = buffer[: high - low]
                self._hf.read_into(run.file, view, run.offset + low)
                hasher.update(view)
                if low < begin:
                    self._mcore.write_from(chunk.file, view[: min(high, begin) - low], place + low)
                if high > end:
                    first = max(low, end)
                    self._mcore.write_from(chunk.file, view[first - low :], place + first)
                self._advance(high - low)
        self._mcore.write_from(chunk.file, tail, chunk.offset + stream.num_bytes)
        return str(hasher.hexdigest())

    def _flush(self, file: str, at: int, filled: memoryview, data: int, hasher: xxhash.xxh3_128) -> int:
        hasher.update(filled[data:])
        self._mcore.write_from(file, filled, at)
        self._advance(len(filled) - data)
        return at + len(filled)

    def _buffer(self, source: int, target: int) -> memoryview:
        """The buffer for bytes from an offset in a file to an offset in another, where both copies are fast.

        The kernel's copy is four times slower, on some processors, where the place in its page of what is written
        lies a few bytes behind that of what is read (docs/design/0003-moving-bytes.md).
        """
        at = next(
            at
            for at in (0, _NEAR_BYTES, 2 * _NEAR_BYTES)
            if not 0 < (at - source) % mmap.PAGESIZE < _NEAR_BYTES
            and not 0 < (target - at) % mmap.PAGESIZE < _NEAR_BYTES
        )
        return self._memory[at : at + BUFFER_BYTES]

    def _export(self, stream: Stream, found: list[Run]) -> str:
        """Scatter a chunk to the runs; return the digest of the chunk's bytes."""
        chunk = stream.chunks[0]
        hasher = xxhash.xxh3_128()
        total = stream.num_bytes
        buffer = self._buffer(chunk.offset, found[0].offset - found[0].chunk_offset if found else 0)
        position = 0  # of the buffer's first byte in the chunk
        waiting = list(reversed(found))
        live: list[Run] = []  # several at once where a tensor is written twice, as a tied head beside its embedding
        while position < total:
            take = min(BUFFER_BYTES, total - position)
            self._mcore.read_into(chunk.file, buffer[:take], chunk.offset + position)
            hasher.update(buffer[:take])
            past = position + take
            while waiting and waiting[-1].chunk_offset < past:
                live.append(waiting.pop())
            for run in live:
                low = max(run.chunk_offset, position)
                high = min(run.chunk_offset + run.num_bytes, past)
                self._hf.write_from(
                    run.file, buffer[low - position : high - position], run.offset + low - run.chunk_offset
                )
            live = [run for run in live if run.chunk_offset + run.num_bytes > past]
            position = past
            self._advance(take)
        return str(hasher.hexdigest())

    def _check(self, stream: Stream, chunk: Chunk, digest: str) -> None:
        expected = self._expected.get((stream.tensor, chunk.start))
        if expected is not None and digest != expected and self._plan.direction is not Direction.IMPORT:
            raise digest_mismatch(stream.tensor, chunk, expected, digest, stream.dtype.num_bytes(math.prod(chunk.size)))


def digest_mismatch(tensor: str, chunk: Chunk, expected: str, digest: str, num_bytes: int) -> ShardwayError:
    """The error of a chunk whose bytes are not those that were recorded when it was written."""
    return ShardwayError(
        Problem(
            code=Code.DIGEST_MISMATCH,
            what=f"{tensor} does not hold the bytes that were written",
            tensor=tensor,
            file=chunk.file,
            facts=(
                f"chunk from {list(chunk.start)} of extent {list(chunk.size)}: {num_bytes} bytes at {chunk.offset}",
                f"recorded xxh3-128 {expected}, found {digest}",
            ),
            cure="the file was changed or damaged after it was written; convert again from the source",
        )
    )
