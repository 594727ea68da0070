"""Files of shards: torch reads them back bit by bit, memory stays bounded, and every failure names file and bytes."""

from __future__ import annotations

import errno
import io
import itertools
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
import xxhash

from shardway.core.dtypes import dtype_of_torch
from shardway.core.errors import Code, ShardwayError
from shardway.live import blocks, writer
from shardway.live.blocks import Blocks
from shardway.live.records import ObjectShard, Shard
from shardway.live.state import LiveState
from shardway.live.writer import write_shards
from shardway.live.written import WriterResult
from shardway.run import writeback

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DTYPES = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES += [torch.float8_e4m3fn, torch.complex64]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def state_of(tensors: dict[str, torch.Tensor], objects: dict[str, bytes] | None = None) -> LiveState:
    held = []
    for key, tensor in tensors.items():
        shape = tuple(tensor.shape)
        held.append((Shard(key, dtype_of_torch(str(tensor.dtype)), shape, (0,) * len(shape), shape, 0), tensor))
    blobs = [(ObjectShard(key, 0, len(data)), data) for key, data in (objects or {}).items()]
    return LiveState.of(held, blobs)


def write_all(state: LiveState, folder: Path, **options: Any) -> WriterResult:
    defaults: dict[str, Any] = {"rank": 0, "on_progress": lambda _: None, "fsync": False}
    return write_shards(state, state.shards, state.objects, folder, **(defaults | options))


def check(result: WriterResult, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Every blob is a file of torch.save with the tensor's bytes, aligned, and digested; nothing overlaps."""
    spans: dict[str, list[tuple[int, int]]] = {}
    assert [shard.key for shard, _, _ in result.shards] == list(tensors)
    for shard, location, digest in result.shards:
        blob = (folder / location.file).read_bytes()[location.offset : location.offset + location.length]
        loaded, expected = torch.load(io.BytesIO(blob), weights_only=True), tensors[shard.key]
        data = bytes_of(expected)
        assert (loaded.shape, loaded.dtype, bytes_of(loaded)) == (expected.shape, expected.dtype, data)
        assert digest == xxhash.xxh3_128(data).hexdigest()
        if len(data) >= 64:
            assert (location.offset + blob.index(data)) % 64 == 0
        spans.setdefault(location.file, []).append((location.offset, location.length))
    sizes = {file.name: file.num_bytes for file in result.files}
    for key, location in result.objects:
        assert location.offset + location.length <= sizes[location.file], key
    for name, found in spans.items():
        assert (folder / name).stat().st_size == sizes[name]
        found.sort()
        for (low, length), (following, _) in itertools.pairwise(found):
            assert low + length == following


@pytest.mark.parametrize("num_files", [1, 2, 3])
def test_torch_reads_what_was_written(num_files: int, tmp_path: Path) -> None:
    tensors = {f"{dtype}": random_tensor((5, 7), dtype, seed) for seed, dtype in enumerate(DTYPES)}
    tensors |= {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "transposed": random_tensor((33, 65), torch.bfloat16).t(),
        "slice": random_tensor((40, 50), torch.float32)[3:20, 5:45:2],
        "expanded": torch.arange(3.0).expand(4, 3),
        "parameter": torch.nn.Parameter(torch.ones(3, 3)),
        "conjugate": random_tensor((3,), torch.complex64).conj(),
    }
    state = state_of(tensors, {"a": b"object", "b": b"other", "c": b"object"})
    result = write_all(state, tmp_path, num_files=num_files)
    check(result, tmp_path, {key: tensor.detach().resolve_conj() for key, tensor in tensors.items()})
    assert [file.name for file in result.files] == [f"__0_{number}.distcp" for number in range(num_files)]
    places = dict(result.objects)
    assert places["a"] == places["c"] != places["b"]
    for key, data in (("a", b"object"), ("b", b"other")):
        file, offset, length = places[key]
        assert (tmp_path / file).read_bytes()[offset : offset + length] == data


def test_tensors_larger_than_a_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BUFFER_BYTES", 1000)
    monkeypatch.setattr(writer, "_STEP_BYTES", 300)
    tensors = {
        "plain": random_tensor((1000,), torch.int16),
        "rows": random_tensor((60, 40), torch.bfloat16).t(),
        "cube": random_tensor((7, 9, 11), torch.float32).permute(2, 0, 1),
        "long rows": random_tensor((600, 3), torch.float32).t(),
        "small": random_tensor((4, 4), torch.float32).t(),
        "last": random_tensor((4, 400), torch.float32).t(),
    }
    result = write_all(state_of(tensors), tmp_path, num_files=2)
    check(result, tmp_path, tensors)


def test_the_bytes_are_spread_evenly(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.zeros(1000 * (number + 1)) for number in range(9)}
    sizes = [file.num_bytes for file in write_all(state_of(tensors), tmp_path, num_files=3).files]
    assert max(sizes) < 1.1 * sum(sizes) / 3


def test_nothing_assigned_is_no_file(tmp_path: Path) -> None:
    state = state_of({"t": torch.zeros(3)}, {"o": b"x"})
    result = write_shards(state, [], [], tmp_path, rank=3, on_progress=lambda _: None, fsync=True)
    assert result == WriterResult(rank=3, files=(), shards=(), objects=())
    assert list(tmp_path.iterdir()) == []


def test_objects_alone_and_a_second_turn(tmp_path: Path) -> None:
    state = state_of({"t": torch.zeros(3)}, {"o": b"x"})
    first = write_shards(state, [], state.objects, tmp_path, rank=3, on_progress=lambda _: None, fsync=True)
    second = write_shards(
        state, state.shards, [], tmp_path, rank=3, on_progress=lambda _: None, fsync=True, first_file=2
    )
    assert [file.name for file in first.files + second.files] == ["__3_0.distcp", "__3_2.distcp"]
    assert (tmp_path / "__3_0.distcp").read_bytes() == b"x"


def test_progress_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writeback, "_START_BYTES", 2**20)
    monkeypatch.setattr(writeback, "_BEHIND_BYTES", 2**21)
    calls: list[int] = []
    tensors = {"a": torch.zeros(3 * 2**18 + 1), "b": torch.zeros(2**20).view(1024, 1024).t()}
    result = write_all(state_of(tensors), tmp_path, num_files=2, on_progress=calls.append, fsync=True)
    assert sum(calls) == result.num_bytes
    assert max(calls) <= 2**20 + 4096


def test_an_exception_of_the_callback_ends_the_writing(tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise TimeoutError

    others = set(threading.enumerate())
    with pytest.raises(TimeoutError):
        write_all(state_of({f"t{k}": torch.zeros(2**20) for k in range(4)}), tmp_path, num_files=2, on_progress=stop)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2**23
    assert set(threading.enumerate()) <= others


def test_a_result_travels_as_bytes(tmp_path: Path) -> None:
    result = write_all(state_of({"t": torch.zeros(3), "s": torch.tensor(1)}, {"o": b"x"}), tmp_path, num_files=2)
    data = result.to_bytes()
    assert WriterResult.from_bytes(data) == result
    assert isinstance(WriterResult.from_bytes(data).shards[0].shard, Shard)


def test_a_result_is_compact(tmp_path: Path) -> None:
    layers = {f"decoder.layers.{k}.self_attention.linear_proj.weight": torch.zeros(k + 1) for k in range(500)}
    state = state_of(layers)
    data = write_all(state, tmp_path).to_bytes()
    assert len(data) / 500 < 64


class Slow:
    """Stands in for a CUDA stage: the copy happens only when it is waited for, as late as an asynchronous one may."""

    log: list[str]

    def __init__(self, name: int, log: list[str]) -> None:
        self.name = name
        self.log = log
        self._pending: torch.Tensor | None = None
        self._buffer = torch.empty(blocks.BUFFER_BYTES, dtype=torch.uint8)

    def begin(self, source: torch.Tensor) -> None:
        assert self._pending is None, "the buffer is still in use"
        self._buffer.fill_(0xEE)  # what was in it is lost from here on
        self._pending = source
        self.log.append(f"begin {self.name}")

    def finish(self) -> memoryview:
        assert self._pending is not None
        source, self._pending = self._pending.contiguous().reshape(-1).view(torch.uint8), None
        self._buffer[: len(source)] = source
        self.log.append(f"finish {self.name}")
        array = self._buffer[: len(source)].numpy()
        return memoryview(array)  # type: ignore[arg-type]


@pytest.fixture
def slow_stages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every tensor passes through buffers that behave as CUDA's would."""
    log: list[str] = []
    numbers = iter(range(100))
    monkeypatch.setattr(blocks, "BUFFER_BYTES", 256)
    monkeypatch.setattr(Blocks, "_make_stage", lambda *_: Slow(next(numbers), log))
    monkeypatch.setattr(blocks, "_is_plain", lambda _: False)
    return iter([log])


def test_a_copy_is_under_way_while_a_block_is_written(slow_stages: Iterator[list[str]]) -> None:
    log = next(slow_stages)
    tensors = [torch.arange(160.0), torch.arange(3.0), torch.arange(20.0).reshape(4, 5).t()]
    found: dict[int, bytes] = {}
    for number, view in Blocks().of(tensors):
        log.append("write")
        found[number] = found.get(number, b"") + bytes(view)
    assert [bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) for tensor in tensors] == list(
        found.values()
    )
    assert log[:6] == ["begin 0", "begin 1", "finish 0", "write", "begin 0", "finish 1"]
    assert log[-3:] == ["write", "finish 0", "write"]
    assert log.count("write") == 5


def test_staged_tensors_of_any_layout(slow_stages: Iterator[list[str]], tmp_path: Path) -> None:
    tensors = {
        "a": random_tensor((40, 30), torch.bfloat16),
        "b": random_tensor((40, 30), torch.bfloat16).t(),
        "empty": torch.empty(0),
        "scalar": torch.tensor(2.0),
    }
    check(write_all(state_of(tensors), tmp_path, num_files=2), tmp_path, tensors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu(tmp_path: Path) -> None:
    tensors = {
        "large": random_tensor((3000, 5000), torch.bfloat16),
        "transposed": random_tensor((3000, 5000), torch.bfloat16).t(),
        "small": random_tensor((3,), torch.float32),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0),
    }
    # Not `.cuda()` of a contiguous copy: the transposed one shall stay transposed.
    on_gpu = {key: tensor.t().cuda().t() if key == "transposed" else tensor.cuda() for key, tensor in tensors.items()}
    state = state_of(on_gpu)
    check(write_all(state, tmp_path, num_files=2), tmp_path, tensors)
    copy = state.snapshot()
    for tensor in on_gpu.values():
        tensor.zero_()
    for shard in copy.shards:
        assert copy.tensor_of(shard).is_pinned()
        assert bytes_of(copy.tensor_of(shard)) == bytes_of(tensors[shard.key])
    assert copy.snapshot().tensor_of(state.shards[0]).device.type == "cpu"


def _raiser(number: int) -> Callable[..., int]:
    def fail(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, Code.NO_SPACE), (errno.EDQUOT, Code.NO_SPACE), (errno.EIO, Code.IO_FAILED)],
)
@pytest.mark.parametrize("function", ["pwritev", "fsync", "writeback", "open"])
def test_failures_name_file_and_errno(
    function: str, number: int, code: Code, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of({"a": torch.zeros(3000), "b": torch.zeros(4000)})
    if function == "writeback":
        monkeypatch.setattr(writeback.Writeback, "written", _raiser(number))
    else:
        monkeypatch.setattr(os, function, _raiser(number))
    with pytest.raises(ShardwayError) as caught:
        write_all(state, tmp_path, num_files=2, fsync=True)
    monkeypatch.undo()
    assert caught.value.code is code
    assert "__0_" in str(caught.value)
    assert errno.errorcode[number] in str(caught.value)
    if function == "pwritev":
        assert "bytes at" in str(caught.value)
    assert not os.listdir("/proc/self/fd") or all("distcp" not in _target(fd) for fd in os.listdir("/proc/self/fd"))


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def test_a_write_that_stops_short_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.pwritev

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        first = memoryview(buffers[0])
        return original(fd, [first[: max(1, len(first) // 2)]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    tensors = {"a": random_tensor((5000,), torch.float32), "b": random_tensor((3, 3), torch.bfloat16).t()}
    check(write_all(state_of(tensors), tmp_path), tmp_path, tensors)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ShardwayError) as caught:
        write_all(state_of({"a": torch.zeros(3)}), tmp_path / "gone")
    assert caught.value.code is Code.IO_FAILED
    assert str(tmp_path / "gone") in str(caught.value)


def test_a_folder_that_vanishes_while_it_is_written_to(tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "staging"
    folder.mkdir()
    with pytest.raises(ShardwayError) as caught:
        write_all(
            state_of({"a": torch.zeros(3)}), folder, on_progress=lambda _: shutil.rmtree(folder, ignore_errors=True)
        )
    assert caught.value.code is Code.IO_FAILED
    assert "__0_0.distcp" in str(caught.value)


def test_a_file_that_is_there_already_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"theirs")
    with pytest.raises(ShardwayError) as caught:
        write_all(state_of({"a": torch.zeros(3)}), tmp_path)
    assert caught.value.code is Code.IO_FAILED
    assert (tmp_path / "__0_0.distcp").read_bytes() == b"theirs"


_MEMORY = """
import resource, sys
from pathlib import Path
import torch
sys.path.insert(0, {root!r})
from tests.unit.live.test_writer import state_of, write_all
tensors = {{f"t{{k}}": torch.ones(2**25) for k in range(3)}}
tensors["transposed"] = torch.ones(2**12, 2**13).t()
state = state_of(tensors)
write_all(state_of({{"warm": torch.ones(4, 4).t()}}), Path({folder!r}), rank=1, num_files=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_all(state, Path({folder!r}), num_files=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_no_second_copy_of_the_model_is_made(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    script = _MEMORY.format(root=str(request.config.rootpath), folder=str(tmp_path))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 64e6
