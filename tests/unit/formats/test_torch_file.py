"""Files of torch.save: what torch writes is found, what shardway writes torch reads, and damage is an error."""

from __future__ import annotations

import argparse
import collections
import functools
import io
import math
import os
import pathlib
import pickle
import struct
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardway.core.dtypes import BFLOAT16, FLOAT32, UINT8, DType, all_dtypes, dtype_of_torch
from shardway.core.errors import Code, ShardwayError
from shardway.formats import saved_objects
from shardway.formats.pickles import Reference, SavedObject
from shardway.formats.saved_objects import SavedTensor, read_torch_bytes, read_torch_file, write_torch_file
from shardway.formats.torch_file import TensorBlob, find_framed, read_tensor_blob, tensor_blob_frame
from shardway.formats.zips import central_entry, directory_end, local_entry

if TYPE_CHECKING:
    from collections.abc import Callable

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # complex32 is experimental, says torch

CODES = {
    Code.TORCH_FILE_INVALID,
    Code.PICKLE_FORBIDDEN,
    Code.PICKLE_INVALID,
    Code.DISTCP_TRUNCATED,
    Code.DTYPE_UNSUPPORTED,
}
DTYPES = [dtype for dtype in all_dtypes() if dtype.bits % 8 == 0 and hasattr(torch, dtype.name)]


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def bytes_of(tensor: Any) -> bytes:
    raw: bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return raw


def some_tensor(dtype: DType, shape: tuple[int, ...]) -> Any:
    count = math.prod(shape)
    if dtype.name == "bool":
        return torch.arange(count).reshape(shape) % 3 == 0
    raw = torch.arange(count * dtype.itemsize, dtype=torch.int32).mul(37).to(torch.uint8)
    return raw.view(getattr(torch, dtype.name)).reshape(shape)


@pytest.fixture
def blob(tmp_path: Path) -> Callable[..., TensorBlob]:
    """Finds the tensor in a blob that lies in the middle of a file."""

    def read(data: bytes, before: int = 1000, length: int | None = None) -> TensorBlob:
        path = tmp_path / "blob"
        path.write_bytes(bytes(before) + data + b"PK\x05\x06 something else follows")
        fd = os.open(path, os.O_RDONLY)
        try:
            found = read_tensor_blob(fd, before, len(data) if length is None else length, file="x.distcp", tensor="t.w")
            if length is None:
                assert before < found.data_offset
                assert found.data_offset + found.num_bytes < before + len(data)
            return found
        finally:
            os.close(fd)

    return read


def read(data: bytes) -> Any:
    return read_torch_bytes(data, file="f")


def at(data: bytes, found: TensorBlob, before: int = 1000) -> bytes:
    start = found.data_offset - before
    return data[start : start + found.num_bytes]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (1, 5, 1), (40, 300)], ids=str)
def test_tensors_of_torch_are_found(dtype: DType, shape: tuple[int, ...], blob: Callable[..., TensorBlob]) -> None:
    tensor = some_tensor(dtype, shape)
    data = saved(tensor)
    found = blob(data)
    assert (found.dtype, found.shape, found.num_bytes) == (dtype, shape, tensor.numel() * dtype.itemsize)
    assert at(data, found) == bytes_of(tensor)


def test_parameters_views_and_attributes(blob: Callable[..., TensorBlob]) -> None:
    whole = torch.arange(60, dtype=torch.float32)
    attributed = torch.nn.Parameter(torch.ones(2, 3))
    attributed.allreduce = True
    plain_attributed = torch.zeros(4)
    plain_attributed.mark = "x"
    for tensor in (
        torch.nn.Parameter(torch.ones(2, 3)),
        whole[7:13].view(2, 3),
        attributed,
        plain_attributed,
        whole[5],
    ):
        data = saved(tensor)
        found = blob(data)
        assert found.shape == tuple(tensor.shape)
        assert at(data, found) == bytes_of(tensor)


def test_any_archive_name(tmp_path: Path) -> None:
    path = tmp_path / "some name.with.dots.pt"
    torch.save(torch.arange(5), path)
    fd = os.open(path, os.O_RDONLY)
    assert read_tensor_blob(fd, 0, path.stat().st_size, file="x", tensor="t").shape == (5,)
    os.close(fd)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0, 2), (5, 1, 6)], ids=str)
def test_frames_are_read_by_torch(dtype: DType, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = some_tensor(dtype, shape)
    frame = tensor_blob_frame(dtype, shape)
    assert len(frame.head) % 64 == 0
    assert frame.num_bytes == tensor.numel() * dtype.itemsize
    data = frame.head + bytes_of(tensor) + frame.tail
    assert len(data) == frame.length
    path = tmp_path / "t.pt"
    path.write_bytes(data)
    for loaded in (
        torch.load(io.BytesIO(data), weights_only=True),
        torch.load(path, weights_only=True, mmap=True),
        torch.load(path, weights_only=False),
    ):
        assert (loaded.dtype, tuple(loaded.shape), loaded.stride()) == (tensor.dtype, shape, tensor.stride())
        assert bytes_of(loaded) == bytes_of(tensor)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["archive/data.pkl", "archive/byteorder", "archive/version", "archive/data/0"]
        assert archive.read("archive/byteorder") == b"little"  # the small entries have true CRCs


@given(
    st.integers(0, 2**40),
    st.sampled_from([1, 2, 8, 64, 512, 4096, 32768]),
    st.integers(0, 2**20),
    st.lists(st.integers(0, 2**20), max_size=3),
)
def test_frames_put_the_data_where_they_are_told(offset: int, align: int, phase: int, shape: list[int]) -> None:
    frame = tensor_blob_frame(BFLOAT16, tuple(shape), offset=offset, align=align, phase=phase % align)
    assert (offset + len(frame.head)) % align == phase % align
    assert len(frame.head) < 700 + align


@given(st.integers(0, 5000), st.sampled_from([1, 64, 4096]), st.integers(0, 4095), st.integers(0, 6000))
@settings(max_examples=30)
def test_frames_are_found_again(offset: int, align: int, phase: int, count: int) -> None:
    frame = tensor_blob_frame(UINT8, (count,), offset=offset, align=align, phase=phase % align)
    content = bytes(offset) + frame.head + bytes(range(256)) * (count // 256) + bytes(count % 256) + frame.tail
    fd = os.memfd_create("blob")
    try:
        os.write(fd, content)
        found = read_tensor_blob(fd, offset, frame.length, file="x", tensor="t")
        assert find_framed(fd, offset, frame.length, UINT8, (count,)) == offset + len(frame.head)
        # Whatever differs by one byte, or is said to be something else, has to be understood and not recognised.
        assert find_framed(fd, offset, frame.length, BFLOAT16, (count // 2,)) is None
        assert find_framed(fd, offset, frame.length, UINT8, (count + 1,)) is None
        assert find_framed(fd, offset, frame.length - 1, UINT8, (count,)) is None
        assert find_framed(fd, -1, frame.length, UINT8, (count,)) is None
        assert find_framed(fd, offset, frame.length, UINT8, (2**62,)) is None
        for place in (0, len(frame.head) - 1, len(frame.head) + count, frame.length - 1):
            os.pwrite(fd, bytes([content[offset + place] ^ 1]), offset + place)
            assert find_framed(fd, offset, frame.length, UINT8, (count,)) is None
            os.pwrite(fd, content[offset + place : offset + place + 1], offset + place)
    finally:
        os.close(fd)
    assert found == TensorBlob(UINT8, (count,), offset + len(frame.head), count)


@pytest.mark.parametrize("num_bytes", [2**32 - 2, 2**32 - 1, 2**32, 5 * 2**30 + 3])
def test_frames_beyond_four_gigabytes(num_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "huge.pt"
    frame = tensor_blob_frame(UINT8, (num_bytes,))
    with path.open("wb") as file:  # sparse: takes a few blocks
        file.write(frame.head + b"first")
        file.seek(len(frame.head) + num_bytes - 4)
        file.write(b"last" + frame.tail)
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded.shape == (num_bytes,)
    assert bytes(loaded[:5].tolist()) == b"first"
    assert bytes(loaded[-4:].tolist()) == b"last"
    fd = os.open(path, os.O_RDONLY)
    found = read_tensor_blob(fd, 0, frame.length, file="x", tensor="t")
    os.close(fd)
    assert found == TensorBlob(UINT8, (num_bytes,), len(frame.head), num_bytes)
    path.unlink()


def assert_expected(error: ShardwayError) -> None:
    assert error.codes <= CODES


def error_of(call: Callable[[], object]) -> ShardwayError:
    with pytest.raises(ShardwayError) as caught:
        call()
    assert caught.value.codes <= CODES
    return caught.value


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        (lambda: torch.arange(6).view(2, 3).t(), Code.TORCH_FILE_INVALID, "strides [1, 3]"),
        (lambda: torch.ones(1).expand(5), Code.TORCH_FILE_INVALID, "strides [0]"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), Code.TORCH_FILE_INVALID, "conjugated"),
        (lambda: [torch.ones(2)], Code.TORCH_FILE_INVALID, "one tensor"),
        (lambda: {"a": 1}, Code.TORCH_FILE_INVALID, "one tensor"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            Code.PICKLE_FORBIDDEN,
            "qint8|_rebuild_q",
        ),
        (lambda: torch.eye(3).to_sparse(), Code.PICKLE_FORBIDDEN, "_rebuild_sparse_tensor"),
        (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), Code.DTYPE_UNSUPPORTED, "float4"),
    ],
)
def test_tensors_that_cannot_be_moved(
    value: Callable[[], object], code: Code, words: str, blob: Callable[..., TensorBlob]
) -> None:
    error = error_of(lambda: blob(saved(value())))
    assert error.code == code
    assert any(word in str(error) for word in words.split("|"))
    assert "t.w" in str(error)
    assert "x.distcp" in str(error)


def rezipped(data: bytes, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return buffer.getvalue()


def test_rezipped_files_are_read(blob: Callable[..., TensorBlob]) -> None:
    data = rezipped(saved(torch.arange(3)), lambda name, content: content)
    assert at(data, blob(data)) == struct.pack("<3q", 0, 1, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name, content: b"big" if "byteorder" in name else content, "big-endian"),
        (lambda name, content: None if "data.pkl" in name else content, "no entry"),
        (lambda name, content: None if "data/0" in name else content, "no entry"),
        (lambda name, content: content + bytes(20_000) if "data.pkl" in name else content, "at most 16,384"),
        (lambda name, content: content[:-1] if "data/0" in name else content, "should have 24 bytes, has 23"),
        (lambda name, content: content + b"x" if "data/0" in name else content, "should have 24 bytes, has 25"),
        (
            lambda name, content: content.replace(b"K\x03\x85", b"K\x04\x85") if "pkl" in name else content,
            "ends at byte",
        ),
        (lambda name, content: content.replace(b"QK\x00", b"QK\x01") if "pkl" in name else content, "ends at byte"),
        (
            lambda name, content: content.replace(b"LongStorage", b"os\nsystem\n#") if "pkl" in name else content,
            "opcode|os",
        ),
    ],
)
def test_archives_that_contradict_themselves(
    change: Callable[[str, bytes], bytes | None], words: str, blob: Callable[..., TensorBlob]
) -> None:
    error = error_of(lambda: blob(rezipped(saved(torch.arange(3)), change)))
    assert any(word in str(error) for word in words.split("|")), str(error)


def test_compressed_archives(blob: Callable[..., TensorBlob]) -> None:
    data = rezipped(saved(torch.arange(300)), lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert "compressed" in str(error_of(lambda: blob(data)))


def archive_of(entries: list[tuple[bytes, int, int]], body: bytes) -> bytes:
    """An archive whose directory says anything: (name, header offset, size)."""
    directory = b"".join(central_entry(name, header, size) for name, header, size in entries)
    return body + directory + directory_end(len(entries), len(directory), len(body))


def test_overlapping_and_repeated_entries(blob: Callable[..., TensorBlob]) -> None:
    pkl, order = local_entry(b"a/data.pkl", b"N."), local_entry(b"a/byteorder", b"little")
    body = pkl + order
    name, other = b"a/data.pkl", b"a/byteorder"
    assert read(archive_of([(name, 0, 2), (other, len(pkl), 6)], body)) is None
    for entries, words in (
        ([(name, 0, 2), (name, len(pkl), 6)], "same name"),
        ([(name, 0, 2), (other, 0, 6)], "overlaps"),
        ([(name, 0, 40), (other, len(pkl), 6)], "overlaps"),
        ([(name, 0, 2), (other, len(pkl), 7)], "do not fit|overlaps"),
        ([(name, 0, 2), (other, len(body) + 10, 6)], "do not fit"),
        ([(name, 2, 2), (other, len(pkl), 6)], "not where|overlaps"),
        ([(b"a/data.plk", 0, 2), (other, len(pkl), 6)], "no entry"),
        ([(b"b/data.pkl", 0, 2), (other, len(pkl), 6)], "not where"),
        ([(name, 0, 2**40), (other, 2**31, 6)], "overlaps"),
        ([], "no entry"),
    ):
        error = error_of(functools.partial(blob, archive_of(entries, body)))
        assert any(word in str(error) for word in words.split("|")), (entries, str(error))


def test_local_extra_fields_that_reach_into_the_next_entry(blob: Callable[..., TensorBlob]) -> None:
    data = bytearray(saved(torch.arange(3)))
    assert data[:4] == b"PK\x03\x04"
    data[28:30] = struct.pack("<H", 60_000)
    assert "overlaps" in str(error_of(lambda: blob(bytes(data))))


@pytest.mark.parametrize("value", [(2**40, 100), (100, 2**40), (2**63, 2**63)])
def test_absurd_directories(value: tuple[int, int], blob: Callable[..., TensorBlob]) -> None:
    data = saved(torch.arange(3))
    cut = data[: -(56 + 20 + 22)]
    end = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, value[0], value[0], value[1], 0)
    end += struct.pack("<4sIQI", b"PK\x06\x07", 0, len(cut), 1)
    end += struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    error_of(lambda: blob(cut + end))


def test_every_truncation_is_an_error(blob: Callable[..., TensorBlob]) -> None:
    for data in (saved(torch.arange(3)), tensor_blob_frame(FLOAT32, (0,)).head + tensor_blob_frame(FLOAT32, (0,)).tail):
        blob(data)
        for length in range(len(data)):
            error_of(functools.partial(blob, data, length=length))


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    for count in (10, 10_000):
        path = tmp_path / "cut"
        data = saved(torch.arange(count))
        path.write_bytes(data[:-10])
        fd = os.open(path, os.O_RDONLY)
        error = error_of(functools.partial(read_tensor_blob, fd, 0, len(data), file="x", tensor="t"))
        assert error.code == Code.DISTCP_TRUNCATED
        for offset, length in ((-1, 5), (0, -5), (2**63, 5), (2**40, 2000), (5, 2**63 - 1), (2**62, 10**6)):
            error_of(functools.partial(read_tensor_blob, fd, offset, length, file="x", tensor="t"))
        os.close(fd)


@given(st.data())
@settings(max_examples=300)
def test_mutations_end_in_a_tensor_or_an_error(data: st.DataObject) -> None:
    source = data.draw(st.sampled_from(MUTATED))
    content = bytearray(source)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    fd = os.memfd_create("blob")
    try:
        os.write(fd, content)
        found = read_tensor_blob(fd, 0, len(content), file="x", tensor="t")
        assert 0 <= found.data_offset <= found.data_offset + found.num_bytes <= len(content)
    except ShardwayError as error:
        assert_expected(error)
    finally:
        os.close(fd)


MUTATED = [
    saved(torch.arange(3)),
    saved(torch.ones(2, 3, dtype=torch.float8_e4m3fn)),
    tensor_blob_frame(BFLOAT16, (2, 2)).head + b"12345678" + tensor_blob_frame(BFLOAT16, (2, 2)).tail,
]


def assert_same(found: object, expected: object) -> None:
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, SavedTensor)
        assert (found.dtype.name, found.shape) == (str(expected.dtype).removeprefix("torch."), tuple(expected.shape))
        assert found.data == bytes_of(expected)
    elif isinstance(expected, dict):
        assert isinstance(found, dict)
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple | collections.deque):
        assert isinstance(found, list | tuple)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected
        assert type(found) is type(expected)


PLAIN: dict[object, object] = {
    "none": None,
    "numbers": [1, -2, 3.5, True, 2**70, 1 + 2j],
    "text": "é",
    "bytes": b"\x00\xff",
    "empty bytes": b"",
    "tuple": (1, (2, ())),
    "sets": {1, 2},
    "shape": torch.Size([2, 3]),
    "ordered": collections.OrderedDict(a=1, b=torch.ones(2)),
    "deque": collections.deque([1, 2], maxlen=5),
    "tensors": [torch.arange(6).view(2, 3)[1], torch.ones(2, dtype=torch.bfloat16), torch.zeros(0)],
    "parameter": torch.nn.Parameter(torch.ones(3)),
    3: {"nested": [{}]},
}


def test_plain_values_of_torch_are_read() -> None:
    found = read(saved(PLAIN))
    assert_same(found, PLAIN)
    counts: collections.defaultdict[str, int] = collections.defaultdict(int, a=1)
    assert read(saved([counts, bytearray(b"xy"), frozenset([5])])) == [{"a": 1}, b"xy", {5}]


def test_what_megatrons_arguments_hold() -> None:
    enums = pytest.importorskip("megatron.core.transformer.enums")
    arguments = argparse.Namespace(
        backend=enums.AttnBackend.flash,
        params_dtype=torch.bfloat16,
        device=torch.device("cuda", 1),
        save=pathlib.PurePosixPath("/a/b"),
        activation=torch.nn.functional.silu,
        gelu=torch.nn.functional.gelu,
        partial=functools.partial(torch.nn.functional.gelu, approximate="tanh"),
        lengths=[1, 2],
    )
    found = read(saved({"args": arguments}))["args"]
    assert isinstance(found, SavedObject)
    assert found.type_name == "argparse.Namespace"
    state: Any = found.state
    assert state["params_dtype"] is BFLOAT16
    assert state["lengths"] == [1, 2]
    assert (state["backend"].type_name, state["backend"].args) == ("megatron.core.transformer.enums.AttnBackend", (1,))
    assert (state["device"].type_name, state["device"].args) == ("torch.device", ("cuda", 1))
    assert state["save"].args[-1] == "b"
    assert isinstance(state["activation"], Reference)
    assert state["activation"].name == "torch.nn.functional.silu"
    assert state["gelu"].name == "torch._C._nn.gelu"
    assert state["partial"].type_name == "functools.partial"


@pytest.mark.parametrize("protocol", [2, 4])
def test_enums_as_python_3_11_0_to_3_11_3_pickle_them(protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those versions of Enum.__reduce_ex__ returned ``getattr, (self.__class__, self._name_)``."""
    enums = pytest.importorskip("megatron.core.transformer.enums")
    monkeypatch.setattr(enums.AttnBackend, "__reduce_ex__", lambda self, _: (getattr, (self.__class__, self._name_)))
    stream = io.BytesIO()
    torch.save({"backend": enums.AttnBackend.flash}, stream, pickle_protocol=protocol)
    assert b"getattr" in stream.getvalue()
    found: Any = read(stream.getvalue())
    assert (found["backend"].type_name, found["backend"].args) == (
        "megatron.core.transformer.enums.AttnBackend",
        ("flash",),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_items(dtype: DType) -> None:
    tensor = some_tensor(dtype, (3,))[1]
    found = read(saved(tensor))
    if dtype.name.startswith(("float8", "complex")):
        with pytest.raises(ShardwayError, match="no Python value"):
            found.item()
    else:
        assert struct.pack("<d", float(found.item())) == struct.pack("<d", float(tensor.item()))
    with pytest.raises(ShardwayError, match="not one number"):
        read(saved(some_tensor(dtype, (2,)))).item()


def test_written_values_are_read_by_torch() -> None:
    value: dict[str | int, Any] = {
        "a": [None, True, False, 1, -1, 2**40, 1.5, "text", "text", (), (1, 2, 3, 4), {}, []],
        "t": SavedTensor(FLOAT32, (2,), struct.pack("<2f", 1.5, -2)),
        "s": SavedTensor(dtype_of_torch("uint16"), (), b"\x07\x00"),
        "e": SavedTensor(BFLOAT16, (0, 3), b""),
        "dtype": BFLOAT16,
        1: {"nested": ["x"] * 300},
    }
    data = write_torch_file(value, name="some")
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    assert loaded["a"] == value["a"]
    assert loaded["t"].tolist() == [1.5, -2]
    assert (loaded["s"].item(), loaded["s"].dtype) == (7, torch.uint16)
    assert tuple(loaded["e"].shape) == (0, 3)
    assert loaded["dtype"] is torch.bfloat16
    assert loaded[1] == value[1]
    assert read(data) == value
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None


def test_written_namespaces_are_read_by_torch() -> None:
    data = write_torch_file({"args": SavedObject("argparse.Namespace", state={"lr": 0.1})})
    assert torch.load(io.BytesIO(data), weights_only=False) == {"args": argparse.Namespace(lr=0.1)}


def test_values_that_cannot_be_written() -> None:
    for value in (object(), {1, 2}, SavedObject("a.b", (1,)), Reference("a.b"), b"x"):
        with pytest.raises(TypeError, match="cannot write"):
            write_torch_file([value])
    with pytest.raises(ValueError, match="3 bytes for a float32"):
        write_torch_file(SavedTensor(FLOAT32, (1,), b"abc"))


class Attack:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch executed",)


def test_attacks_in_torch_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = error_of(lambda: read_torch_bytes(saved({"args": [Attack()]}), file="evil.pt"))
    assert error.code == Code.PICKLE_FORBIDDEN
    assert "system" in str(error)
    assert "evil.pt" in str(error)
    assert not list(tmp_path.iterdir())


def test_legacy_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"a": 1}, path, _use_new_zipfile_serialization=False)
    assert "legacy" in str(error_of(lambda: read_torch_file(path)))
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "legacy" in str(error_of(lambda: read_torch_file(path)))
    path.write_bytes(b"")
    error_of(lambda: read_torch_file(path))
    for bad in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ShardwayError) as caught:
            read_torch_file(bad)
        assert caught.value.code in {Code.FILE_MISSING, Code.FILE_UNREADABLE}
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ShardwayError, match="not a regular file"):
        read_torch_file(tmp_path / "pipe")


def test_files_too_large(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    with path.open("wb") as file:
        file.truncate(saved_objects.MAX_FILE_BYTES + 1)
    with pytest.raises(ShardwayError, match="at most"):
        read_torch_file(path)


def pickle_file(data: bytes) -> bytes:
    """An archive with any pickle."""
    entries = [(b"a/data.pkl", data), (b"a/byteorder", b"little"), (b"a/data/0", bytes(1000))]
    body, places = b"", []
    for name, content in entries:
        places.append((name, len(body), len(content)))
        body += local_entry(name, content)
    return archive_of(places, body)


def test_values_that_multiply_or_contain_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_objects, "MAX_FILE_BYTES", 50_000)
    storage = b"(X\x07\x00\x00\x00storagectorch\nByteStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuM\xe8\x03tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00M\xe8\x03\x85K\x01\x85\x89}tR"
    assert len(read(pickle_file(b"\x80\x02](" + tensor * 50 + b"e."))) == 50
    text = b"X" + struct.pack("<I", 1000) + b"a" * 1000
    encoded = b"c_codecs\nencode\n" + text + b"X\x06\x00\x00\x00latin1\x86R"
    laughs = b"".join(b"](" + (b"h" + bytes((depth,))) * 20 + b"e\x94" for depth in range(12))
    for data, words in (
        (b"\x80\x02](" + tensor * 51 + b"e.", "take more than"),
        (b"\x80\x02](" + encoded * 51 + b"e.", "take more"),
        (b"\x80\x04(]\x94" + laughs + b"t.", "expands"),
        (b"\x80\x02]q\x00h\x00a.", "contains itself"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00\x85s.", "contains itself"),
        (b"\x80\x02cargparse\nNamespace\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.", "contains itself"),
        (b"\x80\x02" + b"]" * 500 + b"a" * 499 + b".", "nested"),
        (b"\x80\x02c__builtin__\nset\n]]a\x85R.", "set"),
        (b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "bytes"),
        (b"\x80\x02c__builtin__\nbytes\nK\x05\x85R.", "bytes"),
        (b"\x80\x02c__builtin__\ncomplex\nX\x02\x00\x00\x001jK\x01\x86R.", "complex"),
        (b"\x80\x02ccollections\nOrderedDict\n](K\x01K\x02\x86e\x85R.", "OrderedDict"),
        (b"\x80\x02ccollections\ndeque\nK\x01\x85R.", "deque"),
        (b"\x80\x02ctorch\nSize\n](K\x01e\x85R.", "torch.Size"),
        (b"\x80\x02ctorch\nSize\nJ\xff\xff\xff\xff\x85\x85R.", "torch.Size"),
    ):
        assert words in str(error_of(functools.partial(read_torch_bytes, pickle_file(data), file=words)))


def test_every_truncation_of_a_small_file_is_an_error() -> None:
    data = saved({"checkpoint_version": 3.0, "tensor": torch.ones(2), "args": argparse.Namespace(a=1)})
    read(data)
    for length in range(len(data)):
        error_of(functools.partial(read_torch_bytes, data[:length], file="f"))


SMALL = saved({"a": [1, torch.ones(2)], "args": argparse.Namespace(a=1)})


@given(st.data())
def test_mutated_small_files_end_in_a_value_or_an_error(data: st.DataObject) -> None:
    content = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        read(bytes(content))
    except ShardwayError as error:
        assert_expected(error)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_an_error(content: bytes) -> None:
    error_of(lambda: read(content))
    error_of(lambda: read(b"PK\x03\x04" + content))
