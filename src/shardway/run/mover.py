"""Moving one stream: bytes pass through a small buffer from the files of one side to the files of the other.

A buffer of two megabytes stays in the processor's cache, so that the digest of what passes costs next to nothing
(docs/design/0003-moving-bytes.md has the measurements).
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from shardway.core.boxes import Box
from shardway.core.errors import Code, Problem, ShardwayError
from shardway.core.tiles import linearise, runs
from shardway.plans.model import Direction
from shardway.plans.streams import frame
from shardway.run.engine import Worker
from shardway.run.files import WRITE_BYTES, page_buffer
from shardway.run.losses import Losses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from shardway.core.tensors import Chunk, Shape
    from shardway.plans.model import Plan, Stream
    from shardway.run.clone import Cloner
    from shardway.run.files import Files, OpenFile

BUFFER_BYTES = 4 * WRITE_BYTES
_NEAR_BYTES = 64  # between places in a page; 31 or fewer are too near where it was measured
_SHORT_RUN_BYTES = 4096
_FEW_RUNS = 64
_RUNS_AHEAD = 256  # of streams that are prepared together
_FILES_AHEAD = 16  # that such streams have open together
_MOST_FILES = 128  # that a single stream has open; one that needs more is moved as blocks, which open one at a time
_WORTH_SHARING_BYTES = 2**16  # smaller chunks are not aligned for it either


class Run(NamedTuple):
    """Bytes that are contiguous in a chunk and in a file of the other side."""

    chunk_offset: int
    file: str
    offset: int
    num_bytes: int


Transfer = tuple["OpenFile", memoryview, int]  # a file, bytes of the buffer, and their offset in the file


class Round(NamedTuple):
    """What passes through the buffer at a time.

    Attributes:
        literals: Bytes that frame the data, and where they are to lie.
        reads: What is read.
        data: What the digest is taken of.
        writes: What is written.
    """

    literals: list[tuple[memoryview, bytes]]
    reads: list[Transfer]
    data: memoryview
    writes: list[Transfer]


class Mover(Worker):
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
        self._importing = plan.direction is Direction.IMPORT
        self._hf = hf
        self._mcore = mcore
        self._advance = advance
        self._expected = expected
        self._cloner = cloner
        self._memory = page_buffer(BUFFER_BYTES + 2 * _NEAR_BYTES)
        self._ready: list[tuple[Stream, list[Run] | None, Iterable[Round] | None]] = []  # the next one last
        # Of chunks that were written, by the file that they are in.
        self.digests: dict[str, dict[tuple[str, Shape], str]] = {}
        self.losses = Losses()

    @contextlib.contextmanager
    def prepared(self, streams: Sequence[Stream]) -> Iterator[None]:
        """Work out what is to be read and written for streams that are moved next, and open the files.

        For one stream after the other that would take several times as long: the bytes of each drive from the
        processor's cache what working out the next needs.
        """
        ahead = list(self._ahead(streams))
        found = [(stream, runs) for stream, runs in ahead if runs is not None]
        ours = {stream.chunks[0].file for stream, _ in found}
        theirs = {run.file for _, runs in found for run in runs}
        with self._mcore.all_opened(ours) as mcore, self._hf.all_opened(theirs) as hf:
            self._ready = []
            for stream, runs in reversed(ahead):
                rounds = self._rounds(stream, runs, mcore, hf)
                self._ready.append((stream, runs, list(rounds) if rounds and len(ahead) > 1 else rounds))
            yield
            self._ready = []

    def _ahead(self, streams: Sequence[Stream]) -> Iterator[tuple[Stream, list[Run] | None]]:
        """Streams and their runs, at least one, as long as they are few and in few files."""
        files: set[str] = set()
        num_runs = 0
        for number, stream in enumerate(streams):
            found = self._runs(stream)
            if found is not None:
                files.add(stream.chunks[0].file)
                files.update([run.file for run in found])
                num_runs += len(found)
            if number and (num_runs > _RUNS_AHEAD or len(files) > _FILES_AHEAD):
                return
            yield stream, found

    def move(self, stream: Stream) -> None:
        """Move one stream from end to end and record the digest of each chunk that is written.

        Raises:
            ShardwayError: `io-failed`, `no-space`, `source-changed`, or `digest-mismatch`.
        """
        if not (self._ready and self._ready[-1][0] is stream):
            with self.prepared([stream]):
                self.move(stream)
            return
        _, found, rounds = self._ready.pop()
        if rounds is not None:
            digests = [self._carry_out(rounds)]
        elif found is not None:
            digests = [self._share(stream, found)]
        else:
            from shardway.run.blocks import move_blocks

            digests = move_blocks(self._plan, stream, self._hf, self._mcore, self._advance, self.losses)
        for chunk, digest in zip(stream.chunks, digests, strict=True):
            if self._importing:
                self.digests.setdefault(chunk.file, {})[stream.tensor, chunk.start] = digest
            else:
                self._check(stream, chunk, digest)

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
            length = grid.run_elements
            if len(found) + grid.num_elements // length > limit:
                return None
            for hf, mcore in runs(grid):
                found.append(Run(mcore * itemsize, chunk.file, chunk.offset + hf * itemsize, length * itemsize))
        if len(found) > _MOST_FILES and len({run.file for run in found}) > _MOST_FILES:
            return None
        found.sort()
        return found

    def _rounds(
        self, stream: Stream, found: list[Run] | None, mcore: Mapping[str, OpenFile], hf: Mapping[str, OpenFile]
    ) -> Iterable[Round] | None:
        """What passes through the buffer; None for a stream of blocks, or if extents may be shared."""
        if found is None:
            return None
        file = mcore[stream.chunks[0].file]
        if not self._importing:
            return self._scatter(stream, found, file, hf)
        if self._cloner.supported and stream.num_bytes >= _WORTH_SHARING_BYTES:
            return None
        return self._gather(stream, found, file, hf)

    def _carry_out(self, rounds: Iterable[Round]) -> str:
        """Read and write; return the digest of the chunk's bytes."""
        hasher = xxhash.xxh3_128()
        for literals, reads, data, writes in rounds:
            for view, literal in literals:
                view[:] = literal
            for file, view, offset in reads:
                file.read_into(view, offset)
            hasher.update(data)
            for file, view, offset in writes:
                file.write_from(view, offset)
            self._advance(len(data))
        return str(hasher.hexdigest())

    def _gather(self, stream: Stream, found: list[Run], file: OpenFile, hf: Mapping[str, OpenFile]) -> Iterator[Round]:
        """The runs into a new chunk of a file, framed as a torch.save blob."""
        chunk = stream.chunks[0]
        at, (head, tail, _) = frame(self._plan, stream.dtype, chunk)
        buffer = self._buffer(found[0].offset - len(head) if found else 0, at)
        data = fill = len(head)
        literals = [(buffer[:fill], head)]
        reads: list[Transfer] = []
        for run in found:
            offset, left = run.offset, run.num_bytes
            while left:
                take = min(left, BUFFER_BYTES - fill)
                reads.append((hf[run.file], buffer[fill : fill + take], offset))
                fill += take
                offset += take
                left -= take
                if fill == BUFFER_BYTES:
                    yield Round(literals, reads, buffer[data:], [(file, buffer, at)])
                    at += fill
                    literals, reads, data, fill = [], [], 0, 0
        if fill + len(tail) > BUFFER_BYTES:
            yield Round(literals, reads, buffer[data:fill], [(file, buffer[:fill], at)])
            at += fill
            literals, reads, data, fill = [], [], 0, 0
        past = fill + len(tail)
        literals.append((buffer[fill:past], tail))
        yield Round(literals, reads, buffer[data:fill], [(file, buffer[:past], at)])

    def _scatter(self, stream: Stream, found: list[Run], file: OpenFile, hf: Mapping[str, OpenFile]) -> Iterator[Round]:
        """A chunk of a file to the runs."""
        chunk = stream.chunks[0]
        total = stream.num_bytes
        buffer = self._buffer(chunk.offset, found[0].offset - found[0].chunk_offset if found else 0)
        position = 0  # of the buffer's first byte in the chunk
        waiting = found[::-1]
        live: list[Run] = []  # several at once where a tensor is written twice, as a tied head beside its embedding
        while position < total:
            past = min(position + BUFFER_BYTES, total)
            while waiting and waiting[-1].chunk_offset < past:
                live.append(waiting.pop())
            writes = []
            for begin, name, offset, num_bytes in live:
                low, high = max(begin, position), min(begin + num_bytes, past)
                writes.append((hf[name], buffer[low - position : high - position], offset + low - begin))
            live = [run for run in live if run.chunk_offset + run.num_bytes > past]
            data = buffer[: past - position]
            yield Round([], [(file, data, chunk.offset + position)], data, writes)
            position = past

    def _share(self, stream: Stream, found: list[Run]) -> str:
        """Import a chunk whose whole blocks appear in the file without a copy; every byte is read for the digest."""
        chunk = stream.chunks[0]
        _, (head, tail, _) = frame(self._plan, stream.dtype, chunk)
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

    def _buffer(self, source: int, target: int) -> memoryview:
        """The buffer for bytes from an offset in a file to an offset in another, where both copies are fast.

        The kernel's copy is four times slower, on some processors, where the place in its page of what is written
        lies a few bytes behind that of what is read (docs/design/0003-moving-bytes.md).
        """
        at = 0
        while 0 < (at - source) % mmap.PAGESIZE < _NEAR_BYTES or 0 < (target - at) % mmap.PAGESIZE < _NEAR_BYTES:
            at += _NEAR_BYTES  # twice at most: either rules out one of three
        return self._memory[at : at + BUFFER_BYTES]

    def _check(self, stream: Stream, chunk: Chunk, digest: str) -> None:
        expected = self._expected.get((stream.tensor, chunk.start))
        if expected is not None and digest != expected:
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
