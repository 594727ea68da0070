"""Moving tiles between files of any chunking, in buffers so small that every boundary is crossed, against numpy."""

from __future__ import annotations

import contextlib
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.property.tilings import Mosaic, chunkings, mosaics

from shardway.core.boxes import Box
from shardway.core.dtypes import DType, dtype_of_torch
from shardway.core.errors import ShardwayError
from shardway.core.tensors import Catalog, Chunk, Shape, StoredTensor
from shardway.formats.torch_file import tensor_blob_frame
from shardway.plans.model import Direction, Plan, TargetFile
from shardway.plans.streams import build_streams, chunk_problems, slabs
from shardway.run import blocks, mover, strided
from shardway.run.execute import execute
from shardway.run.files import Files, OpenFile
from shardway.run.journal import Finished, Journal, read_journal
from shardway.run.lease import JOURNAL, Lease, staging_directory
from shardway.run.publish import Staging
from shardway.verification.compare import compare_plan, compare_streams

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = settings(max_examples=60, deadline=None)
DTYPES = [dtype_of_torch(name) for name in ("uint8", "bfloat16", "float32", "float64", "complex128")]

Array = npt.NDArray[Any]


class Limits(NamedTuple):
    """Sizes of buffers and the like, in bytes, and counts of runs."""

    buffer: int
    block: int
    few_runs: int
    runs_ahead: int
    files_ahead: int
    most_files: int
    sieve_run: int
    sieve_waste: int
    workers: int


LIMITS = st.builds(
    Limits,
    buffer=st.integers(1100, 1200),
    block=st.sampled_from([1, 16, 60, 200, 1 << 20]),
    few_runs=st.sampled_from([0, 64]),
    runs_ahead=st.sampled_from([1, 5, 256]),
    files_ahead=st.sampled_from([2, 3, 16]),
    most_files=st.sampled_from([1, 2, 128]),
    sieve_run=st.sampled_from([0, 8, 8192]),
    sieve_waste=st.sampled_from([1, 4, 1000]),
    workers=st.integers(1, 4),
)


@contextlib.contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """Run with other limits."""
    with (
        mock.patch.multiple(mover, BUFFER_BYTES=limits.buffer, _FEW_RUNS=limits.few_runs, _SHORT_RUN_BYTES=1 << 40),
        mock.patch.multiple(
            mover, _RUNS_AHEAD=limits.runs_ahead, _FILES_AHEAD=limits.files_ahead, _MOST_FILES=limits.most_files
        ),
        mock.patch.multiple(blocks, BLOCK_BYTES=limits.block),
        mock.patch.multiple(strided, _SIEVE_RUN_BYTES=limits.sieve_run, _SIEVE_WASTE=limits.sieve_waste),
    ):
        yield


class Job(NamedTuple):
    """A mosaic with contents, and where its chunks lie on both sides."""

    mosaic: Mosaic
    dtype: DType
    hf: dict[str, Array]
    mcore: Array
    hf_tensors: dict[str, StoredTensor]
    hf_files: dict[str, int]
    mcore_tensors: dict[str, StoredTensor]
    mcore_files: dict[str, int]
    blob_offsets: dict[Chunk, int]


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Random mosaics, chunked and spread over files at random."""
    mosaic, dtype = draw(mosaics()), draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = strided.raw_dtype(dtype.itemsize)
    hf = {
        name: rng.integers(0, 256, size=(math.prod(shape) * dtype.itemsize,), dtype=np.uint8).view(kind).reshape(shape)
        for name, shape in mosaic.hf.items()
    }
    hf_tensors: dict[str, StoredTensor] = {}
    hf_files: dict[str, int] = {}
    for name, shape in mosaic.hf.items():
        bricks = draw(chunkings(shape)) if draw(st.booleans()) else [Box((0,) * len(shape), shape)]
        found = []
        for box in bricks:
            file = draw(st.sampled_from(["a", "b"]))
            at = hf_files.get(file, 0)
            found.append(Chunk(box.start, box.size, file, at))
            hf_files[file] = at + box.num_elements * dtype.itemsize
        hf_tensors[name] = StoredTensor(name, dtype, shape, tuple(found))
    mcore_files: dict[str, int] = {}
    blob_offsets: dict[Chunk, int] = {}
    found = []
    for box in draw(chunkings(mosaic.mcore)):
        file = draw(st.sampled_from(["x", "y"]))
        at = mcore_files.get(file, 0)
        frame = tensor_blob_frame(dtype, box.size, offset=at, align=draw(st.sampled_from([64, 128])))
        found.append(Chunk(box.start, box.size, file, at + len(frame.head)))
        blob_offsets[found[-1]] = at
        mcore_files[file] = at + frame.length
    mcore_tensors = {"m": StoredTensor("m", dtype, mosaic.mcore, tuple(found))}
    return Job(mosaic, dtype, hf, mosaic.make(hf), hf_tensors, hf_files, mcore_tensors, mcore_files, blob_offsets)


def lay_down(root: Path, tensors: dict[str, StoredTensor], files: dict[str, int], arrays: dict[str, Array]) -> None:
    """Write the chunks of tensors into files."""
    root.mkdir()
    contents = {name: np.full(size, 0xEE, np.uint8) for name, size in files.items()}
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            data = np.ascontiguousarray(arrays[name][_slices(chunk)]).reshape(-1).view(np.uint8)
            contents[chunk.file][chunk.offset : chunk.offset + len(data)] = data
    for name, data in contents.items():
        (root / name).write_bytes(data.tobytes())


def pick_up(root: Path, tensor: StoredTensor) -> Array:
    """Read a tensor's chunks."""
    array = np.zeros(tensor.shape, strided.raw_dtype(tensor.dtype.itemsize))
    for chunk in tensor.chunks:
        count = math.prod(chunk.size)
        read = np.fromfile(root / chunk.file, array.dtype, count, offset=chunk.offset)
        array[_slices(chunk)] = read.reshape(chunk.size)
    return array


def _slices(chunk: Chunk) -> tuple[slice, ...]:
    return tuple(slice(first, first + size) for first, size in zip(chunk.start, chunk.size, strict=True))


@contextlib.contextmanager
def writes_counted(files: dict[str, int]) -> Iterator[dict[str, Array]]:
    """Count how often each byte of the files is written."""
    times = {name: np.zeros(size, np.int64) for name, size in files.items()}
    original = OpenFile.write_from

    def write_from(self: OpenFile, view: memoryview | bytes, offset: int) -> None:
        name = self.path.name
        assert 0 <= offset <= offset + len(view) <= files[name]
        times[name][offset : offset + len(view)] += 1
        original(self, view, offset)

    with mock.patch.object(OpenFile, "write_from", write_from):
        yield times


@contextlib.contextmanager
def staged(destination: Path) -> Iterator[tuple[Staging, Journal]]:
    lease = Lease.create(destination, key="key", doing="test")
    assert lease is not None
    with lease, contextlib.closing(Journal(lease.journal, "key", Finished())) as journal:
        yield Staging(lease, replace=False, sync=False), journal


def journal_of(destination: Path) -> Path:
    return staging_directory(destination) / JOURNAL


def run(job: Job, direction: Direction, limits: Limits, root: Path) -> tuple[Plan, Path]:
    """Carry out a job; every byte of every file has to be written exactly once, and the digests have to be right."""
    importing = direction is Direction.IMPORT
    if importing:
        lay_down(root / "source", job.hf_tensors, job.hf_files, job.hf)
    else:
        lay_down(root / "source", job.mcore_tensors, job.mcore_files, {"m": job.mcore})
    destination = root / "out"
    files = job.mcore_files if importing else job.hf_files
    plan = Plan(
        direction=direction,
        hf=Catalog(root=root / "source" if importing else destination, tensors=job.hf_tensors),
        mcore=Catalog(root=destination if importing else root / "source", tensors=job.mcore_tensors),
        streams=build_streams(job.mosaic.tiles, job.hf_tensors, job.mcore_tensors, importing=importing),
        targets=tuple(TargetFile(name, size) for name, size in files.items()),
        blob_offset=job.blob_offsets.__getitem__,
    )
    right = {
        ("m", chunk.start): xxhash.xxh3_128_hexdigest(np.ascontiguousarray(job.mcore[_slices(chunk)]).tobytes())
        for chunk in job.mcore_tensors["m"].chunks
    }
    expected = {} if importing else right
    advanced: list[int] = []
    with writes_counted(files) as times, staged(destination) as (staging, journal), limited(limits):
        digests = execute(plan, staging, root, limits.workers, advanced.append, expected, journal, Finished())
        assert digests == (right if importing else {})
        compare_plan(plan, staging.path, limits.workers, None, right)
        noted = read_journal(journal_of(destination), "key").files
        assert noted.keys() == {name for name, size in files.items() if size}
        assert not importing or {key: each for found in noted.values() for key, each in found.items()} == digests
        staging.seal()
        staging.publish()
    assert all((count == 1).all() for count in times.values())
    assert sum(advanced) == plan.num_bytes == job.mcore.nbytes
    return plan, destination


@EXAMPLES
@given(job=jobs(), limits=LIMITS)
def test_import(job: Job, limits: Limits) -> None:
    with tempfile.TemporaryDirectory() as directory:
        _, out = run(job, Direction.IMPORT, limits, Path(directory))
        assert np.array_equal(pick_up(out, job.mcore_tensors["m"]), job.mcore)


@EXAMPLES
@given(job=jobs(), limits=LIMITS, buffer=st.integers(1, 100))
def test_export(job: Job, limits: Limits, buffer: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        _, out = run(job, Direction.EXPORT, limits._replace(buffer=buffer), Path(directory))
        for name, array in job.hf.items():
            assert np.array_equal(pick_up(out, job.hf_tensors[name]), array), name


@EXAMPLES
@given(job=jobs(), limits=LIMITS, data=st.data())
def test_a_comparison_finds_the_element_that_differs(job: Job, limits: Limits, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(job.hf)))
    places = data.draw(
        st.lists(st.integers(0, job.hf[name].size - 1), min_size=1, max_size=3, unique=True), label="elements"
    )
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        changed = {key: array.copy() for key, array in job.hf.items()}
        for place in places:
            raw = changed[name].reshape(-1).view(np.uint8)
            raw[place * job.dtype.itemsize + data.draw(st.integers(0, job.dtype.itemsize - 1))] ^= 1
        lay_down(root / "hf", job.hf_tensors, job.hf_files, changed)
        lay_down(root / "mcore", job.mcore_tensors, job.mcore_files, {"m": job.mcore})
        plan = Plan(
            direction=Direction.COMPARE,
            hf=Catalog(root=root / "hf", tensors=job.hf_tensors),
            mcore=Catalog(root=root / "mcore", tensors=job.mcore_tensors),
            streams=build_streams(job.mosaic.tiles, job.hf_tensors, job.mcore_tensors),
        )
        with limited(limits):
            differences, damaged = compare_streams(plan, limits.workers)
    assert damaged == []
    assert list(differences) == [name]
    assert differences[name].num_elements == len(places)
    first = np.unravel_index(min(places), job.hf[name].shape)
    assert differences[name].first_index == tuple(map(int, first))


@EXAMPLES
@given(job=jobs(), limits=LIMITS, data=st.data())
def test_a_flipped_bit_is_a_digest_mismatch(job: Job, limits: Limits, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        good = {}
        for chunk in job.mcore_tensors["m"].chunks:
            contents = np.ascontiguousarray(job.mcore[_slices(chunk)]).tobytes()
            good["m", chunk.start] = xxhash.xxh3_128_hexdigest(contents)
        changed = job.mcore.copy()
        raw = changed.reshape(-1).view(np.uint8)
        raw[data.draw(st.integers(0, raw.size - 1))] ^= 1
        lay_down(root / "source", job.mcore_tensors, job.mcore_files, {"m": changed})
        plan = Plan(
            direction=Direction.EXPORT,
            hf=Catalog(root=root / "out", tensors=job.hf_tensors),
            mcore=Catalog(root=root / "source", tensors=job.mcore_tensors),
            streams=build_streams(job.mosaic.tiles, job.hf_tensors, job.mcore_tensors),
            targets=tuple(TargetFile(name, size) for name, size in job.hf_files.items()),
        )
        with staged(root / "out") as (staging, journal), limited(limits):
            with pytest.raises(ShardwayError) as caught:
                execute(plan, staging, root, limits.workers, lambda _: None, good, journal, Finished())
            assert caught.value.codes == {"digest-mismatch"}
            assert caught.value.problems[0].tensor == "m"
        assert sorted(path.name for path in root.iterdir()) == ["source"]


@EXAMPLES
@given(job=jobs())
def test_slabs_are_contiguous_and_cover_the_tensor(job: Job) -> None:
    tensor = job.mcore_tensors["m"]
    assert chunk_problems([tensor]) == []
    seen = np.zeros(tensor.shape, np.int64)
    at = 0
    numbers = np.arange(tensor.num_elements).reshape(tensor.shape)
    for box, chunks in slabs(tensor):
        inside = tuple(slice(first, first + size) for first, size in zip(box.start, box.size, strict=True))
        assert numbers[inside].reshape(-1).tolist() == list(range(at, at + box.num_elements))
        at += box.num_elements
        within = np.zeros(tensor.shape, np.int64)
        for chunk in chunks:
            within[_slices(chunk)] += 1
        seen += within
        assert (within[inside] == 1).all()
        assert within.sum() == box.num_elements
    assert (seen == 1).all()


@EXAMPLES
@given(job=jobs())
def test_streams_hold_every_element_once(job: Job) -> None:
    streams = build_streams(job.mosaic.tiles, job.hf_tensors, job.mcore_tensors)
    for stream in streams:
        assert sum(piece.tile.num_elements for piece in stream.pieces) == stream.box.num_elements
        for piece in stream.pieces:
            assert piece.hf in job.hf_tensors[piece.tile.hf.tensor].chunks
    assert sum(stream.box.num_elements for stream in streams) == math.prod(job.mosaic.mcore)


SHAPE = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@EXAMPLES
@given(shape=SHAPE, data=st.data())
def test_gather_and_scatter(shape: Shape, data: st.DataObject) -> None:
    """A grid anywhere in a file, with axes in any order and gaps between them."""
    order = data.draw(st.permutations(range(len(shape))))
    strides, reach = [0] * len(shape), 0
    for axis in order:
        strides[axis] = reach + 1 + data.draw(st.integers(0, 3))
        reach += strides[axis] * (shape[axis] - 1)
    offset = data.draw(st.integers(0, 3))
    kind = strided.raw_dtype(data.draw(st.sampled_from([1, 2, 4, 8, 16])))
    rng = np.random.default_rng(0)
    flat = rng.integers(0, 256, size=((offset + reach + 4) * kind.itemsize,), dtype=np.uint8).view(kind)
    limits = data.draw(LIMITS)
    with tempfile.TemporaryDirectory() as directory, limited(limits):
        root = Path(directory)
        flat.tofile(root / "f")
        expected = strided.grid_view(flat, offset, shape, tuple(strides))
        for index in np.ndindex(*shape):
            at = offset + sum(i * s for i, s in zip(index, strides, strict=True))
            assert expected[index] == flat[at]
        with Files(root) as files:
            read, num_bytes = strided.gather(files, "f", offset * kind.itemsize, shape, tuple(strides), kind)
        assert np.array_equal(read, expected)
        assert num_bytes >= expected.nbytes
        (root / "g").write_bytes(bytes(flat.nbytes))
        with writes_counted({"g": flat.nbytes}) as times, Files(root, writable=True) as files:
            strided.scatter(files, "g", offset * kind.itemsize, tuple(strides), read)
        written = np.fromfile(root / "g", kind)
        assert np.array_equal(strided.grid_view(written, offset, shape, tuple(strides)), expected)
        assert times["g"].sum() == expected.nbytes
        assert times["g"].max() == 1
