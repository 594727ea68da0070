"""A Megatron checkpoint held against its own record: all of it, its small files, or a sample of its chunks."""

from __future__ import annotations

import math
import os
import threading
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.core.tensors import Chunk
from shardway.formats.dcp import read_metadata
from shardway.formats.file_problems import missing_file
from shardway.formats.iterations import (
    LATEST_TRAIN_STATE,
    RELEASE,
    TRACKER,
    TRAIN_STATE,
    find_iteration,
    tracker_text,
)
from shardway.formats.record import RECORD_FILE, read_record
from shardway.formats.small_files import read_small_file
from shardway.formats.torch_file import find_framed, read_tensor_blob
from shardway.run.files import Files, page_buffer
from shardway.run.mover import digest_mismatch
from shardway.run.progress import Meter
from shardway.verification.opening import is_megatron
from shardway.verification.recording import digest_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Container, Iterable, Sequence
    from pathlib import Path

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape
    from shardway.formats.record import FileDigest, Record
    from shardway.formats.torch_dist import TorchDistCheckpoint
    from shardway.run.progress import Progress

METADATA_FILE = ".metadata"
_MAX_METADATA_BYTES = 1 << 30
_MAX_STATE_BYTES = 1 << 24
_STEP_BYTES = 2**20
_CURE = "the file was changed or damaged after it was written: copy the checkpoint again, or convert it again"


class Recorded(NamedTuple):
    """What holding a checkpoint against its record has found.

    Attributes:
        problems: Everything that is not as it was recorded; `digest-mismatch`, `file-missing` and others.
        num_tensors: Tensors in it.
        num_bytes: Bytes of its files.
        num_digests: Digests that were compared.
    """

    problems: tuple[Problem, ...]
    num_tensors: int
    num_bytes: int
    num_digests: int


def check_recorded(path: Path, num_workers: int, progress: Callable[[Progress], None] | None = None) -> Recorded:
    """Hold every bit of a checkpoint that shardway wrote against what was recorded when it was written.

    Covered are all files that the record names, the record itself, and, where `path` is a root, the tracker and the
    training state beside it. Files that others have added since are none of the record's business.

    Args:
        path: Root of a Megatron checkpoint, where the tracker names the iteration, or an iteration folder.
        num_workers: Threads; a file is read by one of them, from its first byte to its last.
        progress: Called from the threads, one call at a time.

    Raises:
        ShardwayError: `record-missing`; `record-invalid` when the record itself was damaged; `tracker-invalid` and the
            like when there is no such checkpoint.
    """
    from concurrent.futures import ThreadPoolExecutor

    if path.is_dir() and not is_megatron(path) and not (path / RECORD_FILE).exists():
        raise _no_record(path, "only Megatron checkpoints that shardway wrote have one")
    folder = find_iteration(path)
    record = read_record(folder)
    if record is None:
        raise _no_record(folder, "whoever wrote the checkpoint left no digests of it")
    metadata = record.files.get(METADATA_FILE)
    if metadata is None:
        raise ShardwayError(
            Problem(
                code=Code.RECORD_INVALID, what=f"the record knows nothing of {METADATA_FILE}", file=folder / RECORD_FILE
            )
        )
    problems, blobs, num_tensors = _read_metadata(folder, metadata, record)
    trusted = not problems
    if path != folder:
        problems += _root_problems(path, folder, record)
    names = [name for name in record.files if name != METADATA_FILE and (trusted or not name.endswith(".distcp"))]
    meter = Meter("verify", sum(record.files[name].num_bytes for name in names), progress)
    checker = _Checker(folder, record, blobs, meter.advance)
    try:
        with ThreadPoolExecutor(num_workers) as pool:
            for found in pool.map(checker.check, names):
                problems += found
    except BaseException:
        checker.stop.set()
        raise
    return Recorded(
        problems=tuple(problems),
        num_tensors=num_tensors,
        num_bytes=sum(file.num_bytes for file in record.files.values()),
        num_digests=len(record.files) + len(record.digests),
    )


def check_small_files(checkpoint: TorchDistCheckpoint, record: Record, also: Collection[str]) -> None:
    """Hold the files from which the tensors are known against the record, and others that are about to be used.

    Files that have been removed since are not missed here.

    Args:
        checkpoint: The checkpoint.
        record: Its record.
        also: Further files, by their paths in the iteration folder.

    Raises:
        ShardwayError: `digest-mismatch` for every one that is not as it was written, `io-failed`.
    """
    checker = _Checker(checkpoint.root, record, {}, lambda _: None)
    problems: list[Problem] = []
    for name in (METADATA_FILE, "metadata.json", "common.pt", *also):
        if name in checkpoint.files and name in record.files:
            found = checker.check(name)
            problems += map(_changed_on_purpose, found) if name in also else found
    if problems:
        raise ShardwayError(problems)


def _changed_on_purpose(problem: Problem) -> Problem:
    if problem.code is not Code.DIGEST_MISMATCH:
        return problem
    cure = (
        f"{_CURE}; if it was changed on purpose, pass --hf DIR, a directory with the model's config.json and tokenizer"
    )
    return problem._replace(cure=cure)


def check_sample(
    checkpoint: TorchDistCheckpoint,
    *,
    max_bytes: int = 64 * 2**20,
    tensors: Container[str] | None = None,
    seed: int | None = None,
) -> int:
    """Check chunks that are chosen at random against their recorded digests, before the checkpoint is loaded.

    Args:
        checkpoint: The checkpoint.
        max_bytes: The most bytes to read; a chunk is read whole or not at all.
        tensors: Keys of the tensors to choose from; by default all.
        seed: Of the choice. Ranks that pass different ones check different chunks.

    Returns:
        Bytes that were checked; 0 where nothing was recorded.

    Raises:
        ShardwayError: `digest-mismatch` for every chunk that does not hold what was recorded, with its file, tensor and
            place; `record-invalid`; `io-failed`.

    *Ranks*: local.
    """
    import random

    record = read_record(checkpoint.root)
    if record is None:
        return 0
    chunks = [
        (tensor, chunk)
        for key, tensor in checkpoint.catalog.tensors.items()
        if tensors is None or key in tensors
        for chunk in tensor.chunks
        if (key, chunk.start) in record.digests
    ]
    random.Random(seed).shuffle(chunks)  # noqa: S311 - no secret
    problems: list[Problem] = []
    checked = 0
    with Files(checkpoint.root) as files:
        buffer = page_buffer(_STEP_BYTES)
        for tensor, chunk in chunks:
            num_bytes = tensor.dtype.num_bytes(math.prod(chunk.size))
            if checked + num_bytes > max_bytes:
                continue
            checked += num_bytes
            hasher = xxhash.xxh3_128()
            for at in range(0, num_bytes, _STEP_BYTES):
                view = buffer[: min(_STEP_BYTES, num_bytes - at)]
                files.read_into(chunk.file, view, chunk.offset + at)
                hasher.update(view)
            expected = record.digests[tensor.name, chunk.start]
            if hasher.hexdigest() != expected:
                problems += digest_mismatch(tensor.name, chunk, expected, hasher.hexdigest(), num_bytes).problems
    if problems:
        raise ShardwayError(problems)
    return checked


class _Blob(NamedTuple):
    """A chunk as ``.metadata`` describes it."""

    offset: int
    length: int
    tensor: str
    dtype: DType
    start: Shape
    size: Shape


def _read_metadata(
    folder: Path, recorded: FileDigest, record: Record
) -> tuple[list[Problem], dict[str, list[_Blob]], int]:
    """What is wrong with ``.metadata``; if nothing is, the chunks in each file, and the number of tensors."""
    path = folder / METADATA_FILE
    try:
        data = read_small_file(path, _MAX_METADATA_BYTES)
    except ShardwayError as error:
        return list(error.problems), {}, 0
    found = xxhash.xxh3_128_hexdigest(data)
    if found != recorded.digest:
        facts = ("where the tensors lie is not known without it: the .distcp files were not checked",)
        return [_changed(path, recorded.digest, found, facts)], {}, 0
    metadata = read_metadata(data, str(path))
    blobs: dict[str, list[_Blob]] = {}
    for key, tensor in metadata.tensors.items():
        for start, size, (file, offset, length) in tensor.chunks:
            blobs.setdefault(file, []).append(_Blob(offset, length, key, tensor.dtype, start, size))
    problems = [
        Problem(
            code=Code.RECORD_INVALID, what=f"the record has no digest of a file that {METADATA_FILE} names", file=name
        )
        for name in blobs.keys() - record.files.keys()
    ]
    return problems, blobs, len(metadata.tensors)


def _root_problems(root: Path, folder: Path, record: Record) -> list[Problem]:
    """What is wrong beside the iteration folder that the tracker names."""
    problems = []
    tracker, latest = root / TRACKER, root / LATEST_TRAIN_STATE
    iteration = None if folder.name == RELEASE else int(folder.name.removeprefix("iter_"))
    if read_small_file(tracker, 4096).strip() != tracker_text(iteration):
        what = f"{TRACKER} names {folder.name} in an odd way"
        problems.append(Problem(code=Code.DIGEST_MISMATCH, what=what, file=tracker, cure=_CURE))
    expected = record.files.get(TRAIN_STATE)
    if expected is None:
        return problems
    try:
        if digest_bytes(read_small_file(latest, _MAX_STATE_BYTES)) != expected:
            what = f"{LATEST_TRAIN_STATE} is no copy of what was written to {folder.name}/{TRAIN_STATE}"
            problems.append(Problem(code=Code.DIGEST_MISMATCH, what=what, file=latest, cure=_CURE))
    except ShardwayError as error:
        problems += error.problems
    return problems


class _Checker:
    """Checks files, from any number of threads."""

    def __init__(
        self, folder: Path, record: Record, blobs: dict[str, list[_Blob]], advance: Callable[[int], None]
    ) -> None:
        self._folder = folder
        self._record = record
        self._blobs = blobs
        self._advance = advance
        self.stop = threading.Event()

    def check(self, name: str) -> list[Problem]:
        """What in a file is not as it was recorded."""
        path = self._folder / name
        recorded = self._record.files[name]
        try:
            # O_NONBLOCK: to open a pipe would wait until someone writes to it.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                num_bytes = os.fstat(descriptor).st_size
                if num_bytes != recorded.num_bytes:
                    return [_other_size(path, recorded.num_bytes, num_bytes)]
                return self._read(path, descriptor, recorded, sorted(self._blobs.get(name, ())))
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return [missing_file(path)]
        except OSError as error:
            what = f"cannot read {name}: {error.strerror or error}"
            return [Problem(code=Code.IO_FAILED, what=what, file=path, cure="look at the filesystem")]

    def _read(self, path: Path, descriptor: int, recorded: FileDigest, blobs: Sequence[_Blob]) -> list[Problem]:
        """Read a file from its first byte to its last: elements of chunks to digests of their own, the rest to one."""
        problems: list[Problem] = []
        around = xxhash.xxh3_128()
        buffer = page_buffer(max(1, min(_STEP_BYTES, recorded.num_bytes)))
        at = 0

        def read(end: int, hasher: xxhash.xxh3_128) -> None:
            nonlocal at
            while at < end and not self.stop.is_set():
                done = os.preadv(descriptor, [buffer[: min(len(buffer), end - at)]], at)
                if not done:
                    raise OSError("it ended while it was read")
                hasher.update(buffer[:done])
                self._advance(done)
                at += done

        frames_fit = True
        for blob in blobs:
            try:
                place = read_tensor_blob(descriptor, blob.offset, blob.length, file=str(path), tensor=blob.tensor)
            except ShardwayError as error:
                problems += error.problems
                frames_fit = False
                continue
            if (place.dtype, place.shape) != (blob.dtype, blob.size) or place.data_offset < at:
                problems.append(_broken_frame(path, blob))
                frames_fit = False
                continue
            read(place.data_offset, around)
            hasher = xxhash.xxh3_128()
            read(at + place.num_bytes, hasher)
            expected = self._record.digests.get((blob.tensor, blob.start), "nothing")
            if hasher.hexdigest() != expected:
                chunk = Chunk(blob.start, blob.size, str(path), place.data_offset)
                problems += digest_mismatch(blob.tensor, chunk, expected, hasher.hexdigest(), place.num_bytes).problems
        read(recorded.num_bytes, around)
        if frames_fit and around.hexdigest() != recorded.digest:
            frames = _frame_problems(path, descriptor, blobs)
            problems += frames or [_changed(path, recorded.digest, around.hexdigest(), _outside(blobs))]
        return problems


def _frame_problems(path: Path, descriptor: int, blobs: Iterable[_Blob]) -> list[Problem]:
    """The chunks whose frames are not what this version of shardway would write around them."""
    return [
        _broken_frame(path, blob)
        for blob in blobs
        if find_framed(descriptor, blob.offset, blob.length, blob.dtype, blob.size) is None
    ]


def _broken_frame(path: Path, blob: _Blob) -> Problem:
    return Problem(
        code=Code.DIGEST_MISMATCH,
        what=f"the bytes around a chunk of {blob.tensor} are not those that were written",
        tensor=blob.tensor,
        file=path,
        facts=(
            f"chunk from {list(blob.start)} of extent {list(blob.size)}",
            f"with what is around it, bytes {blob.offset:,} to {blob.offset + blob.length:,} of the file",
        ),
        cure=_CURE,
    )


def _outside(blobs: Sequence[_Blob]) -> tuple[str, ...]:
    return ("outside of the tensors in it: in a pickled object, or between them",) if blobs else ()


def _changed(path: Path, expected: str, found: str, facts: tuple[str, ...] = ()) -> Problem:
    return Problem(
        code=Code.DIGEST_MISMATCH,
        what=f"{path.name} does not hold the bytes that were written",
        file=path,
        facts=(f"recorded xxh3-128 {expected}, found {found}", *facts),
        cure=_CURE,
    )


def _other_size(path: Path, expected: int, found: int) -> Problem:
    return Problem(
        code=Code.DIGEST_MISMATCH,
        what=f"{path.name} has another size than when it was written",
        file=path,
        facts=(f"{expected:,} bytes written, {found:,} found",),
        cure=_CURE,
    )


def _no_record(path: Path, why: str) -> ShardwayError:
    return ShardwayError(
        Problem(
            code=Code.RECORD_MISSING,
            what=f"{path} has no {RECORD_FILE}, so there is nothing to hold it against",
            file=path,
            facts=(why,),
            cure="compare it with where it came from: shardway verify A B",
        )
    )
