"""Writing a rank's shards to its own ``.distcp`` files, straight from the model's memory."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats.dcp import DcpLocation
from shardway.formats.torch_file import TensorFrame, tensor_blob_frame
from shardway.live.blocks import Blocks, synchronise
from shardway.live.written import WriterResult, WrittenFile, WrittenObject, WrittenShard
from shardway.run.files import WRITE_BYTES, failing
from shardway.run.team import Team
from shardway.run.writeback import Writeback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from shardway.live.records import ObjectShard, Shard
    from shardway.live.state import LiveState

_STEP_BYTES = 2 * WRITE_BYTES  # hashed and then written while it is in the cache


class _Job(NamedTuple):
    """A blob and its place in a file."""

    shard: Shard
    offset: int
    frame: TensorFrame


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """One file to be written by one thread: objects first, then shards."""

    name: str
    literals: tuple[bytes, ...]
    jobs: tuple[_Job, ...]
    num_bytes: int


def write_shards(
    state: LiveState,
    shards: Sequence[Shard],
    objects: Sequence[ObjectShard],
    folder: Path,
    *,
    rank: int,
    on_progress: Callable[[int], None],
    fsync: bool,
    num_files: int = 1,
    first_file: int = 0,
) -> WriterResult:
    """Write what was assigned to this rank to files of its own; every byte of every shard, or an error.

    Each shard becomes one blob that `torch.load` reads, its elements aligned to 64 bytes. No second copy of the model
    is made: contiguous host tensors are written from where they are, others pass through two buffers of 8 MiB for
    each file. Files of the same names must not exist. The model must not change until this returns; CUDA work that
    the calling thread has enqueued on its current stream is waited for first.

    Args:
        state: What this rank holds.
        shards: Which of its shards to write.
        objects: Which of its objects to write; equal ones share a blob.
        folder: The staging folder, which exists.
        rank: Number of this rank in the job; names the files.
        on_progress: Called with the number of bytes written since the last call, at least once a MiB, from the
            threads that write, one call at a time. An exception that it raises ends the writing.
        fsync: Force the files to the device before returning.
        num_files: Files, and threads, at most; the bytes are spread evenly over them.
        first_file: Number of the first file; higher than 0 for a rank that writes a second time.

    Returns:
        Where everything lies; what a coordinator needs for `assemble`. No file when nothing was assigned.

    Raises:
        ShardwayError: `no-space` or `io-failed` with the path and the bytes of the failing step, `tensor-missing` or
            `shape-mismatch`; the files are then incomplete and must not be published.

    *Ranks*: each that was assigned something, on its own; nothing here communicates.
    """
    synchronise(state.devices)
    files = _lay_out(state, shards, objects, rank, num_files, first_file)
    run = _Run(state, folder, on_progress, fsync=fsync)
    run.write(files)
    return _result(rank, files, shards, objects, state, run)


def _lay_out(
    state: LiveState,
    shards: Sequence[Shard],
    objects: Sequence[ObjectShard],
    rank: int,
    num_files: int,
    first_file: int,
) -> list[_File]:
    """Spread the shards over files, largest first to the emptiest; within a file they keep their order."""
    literals = tuple(dict.fromkeys(state.object_bytes(record.key) for record in objects))
    sizes = [_num_bytes(shard) for shard in shards]
    groups: list[list[int]] = [[] for _ in range(max(1, min(num_files, len(shards))))]
    filled = [0] * len(groups)
    for number in sorted(range(len(shards)), key=lambda number: -sizes[number]):
        emptiest = filled.index(min(filled))
        groups[emptiest].append(number)
        filled[emptiest] += sizes[number] + 1024
    files = []
    for place, group in enumerate(groups):
        own = literals if place == 0 else ()
        at = sum(map(len, own))
        jobs = []
        for number in sorted(group):
            shard = shards[number]
            frame = tensor_blob_frame(shard.dtype, shard.size, offset=at)
            jobs.append(_Job(shard, at, frame))
            at += frame.length
        if at:
            name = f"__{rank}_{first_file + place}.distcp"
            files.append(_File(name=name, literals=own, jobs=tuple(jobs), num_bytes=at))
    return files


def _num_bytes(shard: Shard) -> int:
    return tensor_blob_frame(shard.dtype, shard.size).num_bytes


class _Run:
    """The threads of one call: they share the progress callback, and the first error stops all."""

    def __init__(self, state: LiveState, folder: Path, on_progress: Callable[[int], None], *, fsync: bool) -> None:
        self._state = state
        self._folder = folder
        self._on_progress = on_progress
        self._fsync = fsync
        self._lock = threading.Lock()
        self._team = Team()
        self.digests: dict[Shard, str] = {}
        self.around: dict[str, str] = {}

    def write(self, files: Sequence[_File]) -> None:
        """Write all files, each on a thread of its own; raise what any raised, the project's own errors as one."""
        self._team.run([partial(self._write, file) for file in files], "shardway-write")

    def _write(self, file: _File) -> None:
        path = self._folder / file.name
        with failing(f"create a file of {file.num_bytes:,} bytes", path):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            output = _Output(descriptor, path, self._advance, fsync=self._fsync)
            output.put([memoryview(literal) for literal in file.literals])
            around = xxhash.xxh3_128(b"".join(file.literals))
            self._write_shards(file.jobs, output, around)
            self.around[file.name] = around.hexdigest()
            if not self._team.stopped.is_set():
                output.finish(file.num_bytes)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise
        with failing(f"close a file of {file.num_bytes:,} bytes", path):
            os.close(descriptor)

    def _write_shards(self, jobs: Sequence[_Job], output: _Output, around: xxhash.xxh3_128) -> None:
        hasher = xxhash.xxh3_128()
        last = -1
        for number, view in Blocks().of(self._state.tensor_of(job.shard) for job in jobs):
            job = jobs[number]
            if number != last:
                if last >= 0:
                    self._end(jobs[last], hasher, output, around)
                hasher, last = xxhash.xxh3_128(), number
                output.defer(job.frame.head)
                around.update(job.frame.head)
            for at in range(0, len(view), _STEP_BYTES):
                if self._team.stopped.is_set():
                    return
                step = view[at : at + _STEP_BYTES]
                hasher.update(step)
                output.put([step])
        if last >= 0:
            self._end(jobs[last], hasher, output, around)
        output.put([])

    def _end(self, job: _Job, hasher: xxhash.xxh3_128, output: _Output, around: xxhash.xxh3_128) -> None:
        output.defer(job.frame.tail)
        around.update(job.frame.tail)
        self.digests[job.shard] = str(hasher.hexdigest())

    def _advance(self, num_bytes: int) -> None:
        with self._lock:
            self._on_progress(num_bytes)


class _Output:
    """A file that is written from its beginning to its end."""

    def __init__(self, descriptor: int, path: Path, advance: Callable[[int], None], *, fsync: bool) -> None:
        self._descriptor = descriptor
        self._path = path
        self._advance = advance
        self._fsync = fsync
        self._writeback = Writeback(descriptor)
        self._waiting: list[memoryview] = []
        self._at = 0

    def defer(self, data: bytes) -> None:
        """Write a few bytes together with what comes next."""
        self._waiting.append(memoryview(data))

    def put(self, views: Iterable[memoryview]) -> None:
        """Write all bytes of the views, after those deferred."""
        pending = [view for view in (*self._waiting, *views) if len(view)]
        self._waiting = []
        total = sum(map(len, pending))
        if not total:
            return
        with failing(f"write {total:,} bytes at {self._at:,}", self._path):
            while pending:
                done = os.pwritev(self._descriptor, _first(pending), self._at)
                self._at += done
                while pending and done >= len(pending[0]):
                    done -= len(pending.pop(0))
                if done:
                    pending[0] = pending[0][done:]
        if self._fsync:
            with failing(f"force bytes before {self._at:,} to the device", self._path):
                self._writeback.written(self._at)
        self._advance(total)

    def finish(self, num_bytes: int) -> None:
        """Make sure that the file is complete and still where it was created, and force it to the device."""
        with failing(f"finish a file of {num_bytes:,} bytes", self._path):
            if self._fsync:
                os.fsync(self._descriptor)
            opened, named = os.fstat(self._descriptor), os.stat(self._path)
        if (opened.st_dev, opened.st_ino, opened.st_size) != (named.st_dev, named.st_ino, num_bytes):
            raise ShardwayError(
                Problem(
                    code=Code.IO_FAILED,
                    what=f"{self._path.name} was changed or replaced while it was being written",
                    file=self._path,
                    facts=(f"expected {num_bytes:,} bytes, found {named.st_size:,}",),
                    cure="make sure that nothing else writes to this folder, and save again",
                )
            )


_MAX_VECTORS = 512  # IOV_MAX is 1,024 on Linux


def _first(views: Sequence[memoryview]) -> list[memoryview]:
    """What one call writes of them: no more than `WRITE_BYTES`."""
    found: list[memoryview] = []
    left = WRITE_BYTES
    for view in views[:_MAX_VECTORS]:
        found.append(view[:left])
        left -= len(found[-1])
        if not left:
            break
    return found


def _result(
    rank: int,
    files: Sequence[_File],
    shards: Sequence[Shard],
    objects: Sequence[ObjectShard],
    state: LiveState,
    run: _Run,
) -> WriterResult:
    places: dict[Shard, DcpLocation] = {}
    literals: dict[bytes, DcpLocation] = {}
    for file in files:
        at = 0
        for literal in file.literals:
            literals[literal] = DcpLocation(file.name, at, len(literal))
            at += len(literal)
        for job in file.jobs:
            places[job.shard] = DcpLocation(file.name, job.offset, job.frame.length)
    return WriterResult(
        rank=rank,
        files=tuple(WrittenFile(file.name, file.num_bytes, run.around[file.name]) for file in files),
        shards=tuple(WrittenShard(shard, places[shard], run.digests[shard]) for shard in shards),
        objects=tuple(WrittenObject(record.key, literals[state.object_bytes(record.key)]) for record in objects),
    )
