"""safetensors headers: agreement with the reference library, and one case for each way to be malformed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardway.core.dtypes import DType, all_dtypes, dtype_of_torch
from shardway.core.errors import Code, ShardwayError
from shardway.core.tensors import Chunk, Shape, StoredTensor
from shardway.formats.file_problems import printable
from shardway.formats.safetensors import read_safetensors
from shardway.formats.safetensors_layout import SafetensorsLayout, lay_out

FIXTURES = Path(__file__).parents[4] / "shared" / "fixtures" / "hf"
F32 = dtype_of_torch("float32")
BF16 = dtype_of_torch("bfloat16")
U8 = dtype_of_torch("uint8")


def framed(header: str | bytes, data: bytes = b"") -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: object = "F32", shape: object = (2,), data_offsets: object = (0, 8), **extra: object) -> str:
    return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": data_offsets, **extra}})


def two(first: tuple[int, int], second: tuple[int, int]) -> str:
    return json.dumps(
        {
            "w": {"dtype": "U8", "shape": [first[1] - first[0]], "data_offsets": first},
            "x": {"dtype": "U8", "shape": [second[1] - second[0]], "data_offsets": second},
        }
    )


W = '"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
EIGHT = bytes(8)
HEADER, TRUNCATED, GAP, OVERLAP = (
    Code.SAFETENSORS_HEADER,
    Code.SAFETENSORS_TRUNCATED,
    Code.SAFETENSORS_GAP,
    Code.SAFETENSORS_OVERLAP,
)

MALFORMED: dict[str, tuple[bytes, Code, tuple[str, ...]]] = {
    "empty file": (b"", TRUNCATED, ("0 bytes", "takes 8")),
    "shorter than the length": (b"\x02\0\0\0\0\0\0", TRUNCATED, ("7 bytes",)),
    "header length 0": (framed(""), HEADER, ("0 bytes",)),
    "header length over the limit": ((100_000_001).to_bytes(8, "little") + b"{}", HEADER, ("100000001", "100000000")),
    "header length over 63 bits": (b"\xff" * 8 + b"{}", HEADER, ("18446744073709551615",)),
    "header past the end": ((3).to_bytes(8, "little") + b"{}", TRUNCATED, ("10 bytes", "byte 11")),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", HEADER, ("Git LFS", "git lfs pull")),
    "leading space": (framed(" {}"), HEADER, ("b' '",)),
    "a list": (framed("[]"), HEADER, ("b'['",)),
    "not UTF-8": (framed(b'{"\xff":1}'), HEADER, ("UTF-8", "byte 2")),
    "not JSON": (framed('{"w":}'), HEADER, ("JSON", "column 6")),
    "bytes after the object": (framed("{}{}"), HEADER, ("JSON",)),
    "nested too deeply": (framed('{"w":' + "[" * 200_000), HEADER, ("too deeply",)),
    "number of 5,000 digits": (framed('{"w":' + "9" * 5000 + "}"), HEADER, ("JSON", "digits")),
    "half a surrogate pair": (framed(W.replace("w", "\\ud800").join("{}"), b"\0"), HEADER, ("\\ud800", "Unicode")),
    "tensor twice": (framed("{" + W + "," + W + "}", b"\0"), Code.TENSOR_DUPLICATE, ("tensor w",)),
    "field twice": (framed("{" + W.replace('"dtype"', '"dtype":"I8","dtype"') + "}", b"\0"), HEADER, ("w", "dtype")),
    "metadata twice": (framed('{"__metadata__":{},"__metadata__":{}}'), HEADER, ("__metadata__",)),
    "metadata not an object": (framed('{"__metadata__":"pt"}'), HEADER, ("__metadata__", "'pt'")),
    "header like an entry": (
        framed('{"dtype":"F32","shape":[1],"data_offsets":[0,4]}', bytes(4)),
        HEADER,
        ("an entry itself", "without a name"),
    ),
    "metadata like an entry": (
        framed('{"__metadata__":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        HEADER,
        ("__metadata__", "a tensor's entry"),
    ),
    "metadata null": (framed('{"__metadata__":null}'), HEADER, ("__metadata__", "None")),
    "metadata not strings": (framed('{"__metadata__":{"format":1}}'), HEADER, ("format", "1")),
    "entry not an object": (framed('{"w":[1]}'), HEADER, ("tensor w", "[1]")),
    "field missing": (framed('{"w":{"dtype":"F32","shape":[2]}}', EIGHT), HEADER, ("tensor w", "data_offsets")),
    "field extra": (framed(entry(strides=[1]), EIGHT), HEADER, ("tensor w", "strides")),
    "dtype unknown": (framed(entry("F31"), EIGHT), Code.DTYPE_UNKNOWN, ("tensor w", "F31", "BF16")),
    "dtype not a string": (framed(entry(32), EIGHT), HEADER, ("tensor w", "32")),
    "shape not a list": (framed(entry(shape=2), EIGHT), HEADER, ("tensor w", "shape is 2")),
    "shape of 65 axes": (framed(entry(shape=[1] * 65, data_offsets=(0, 4)), b"1234"), HEADER, ("tensor w", "64")),
    "axis negative": (framed(entry(shape=[-2]), EIGHT), HEADER, ("tensor w", "-2")),
    "axis a bool": (framed(entry(shape=[2, True]), EIGHT), HEADER, ("tensor w", "True")),
    "axis a float": (framed(entry(shape=[2.0]), EIGHT), HEADER, ("tensor w", "2.0")),
    "axis not a number": (framed('{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', EIGHT), HEADER, ("nan",)),
    "axis over 63 bits": (framed(entry(shape=[2**63]), EIGHT), HEADER, ("tensor w", "9223372036854775808")),
    "product overflows": (framed(entry(shape=[2**61 + 1, 8]), EIGHT), HEADER, ("73786976294838206496", "got 8")),
    "offsets not a pair": (framed(entry(data_offsets=(0, 4, 8)), EIGHT), HEADER, ("tensor w", "two numbers")),
    "offset negative": (framed(entry(data_offsets=(-8, 0)), EIGHT), HEADER, ("tensor w", "-8")),
    "offset a bool": (framed(entry(data_offsets=(False, 8)), EIGHT), HEADER, ("tensor w", "False")),
    "offset a string": (framed(entry(data_offsets=(0, "8")), EIGHT), HEADER, ("tensor w", "'8'")),
    "offset over 63 bits": (framed(entry(data_offsets=(2**64, 2**64 + 8)), EIGHT), HEADER, ("18446744073709551616",)),
    "offsets backwards": (framed(entry(data_offsets=(8, 0)), EIGHT), HEADER, ("tensor w", "byte 8", "byte 0")),
    "offsets against shape": (framed(entry(shape=[3]), EIGHT), HEADER, ("tensor w", "expected 12", "got 8")),
    "half a byte": (framed(entry("F4", [3], (0, 2)), b"12"), HEADER, ("tensor w", "12 bits")),
    "overlap": (framed(two((0, 4), (2, 6)), bytes(6)), OVERLAP, ("tensor x", "tensor w", "byte 2", "byte 4")),
    "same bytes": (framed(two((0, 4), (0, 4)), bytes(4)), OVERLAP, ("tensor x", "tensor w")),
    "empty tensor inside another": (framed(two((0, 4), (2, 2)), bytes(4)), OVERLAP, ("tensor x", "tensor w")),
    "gap at the start": (framed(two((1, 4), (4, 6)), bytes(6)), GAP, ("1 bytes before tensor w",)),
    "gap in the middle": (framed(two((0, 2), (4, 6)), bytes(6)), GAP, ("2 bytes before tensor x", "expected 2")),
    "bytes left over": (framed(two((0, 2), (2, 6)), bytes(9)), GAP, ("3 bytes at the end",)),
    "no tensors but data": (framed("{}", b"1"), GAP, ("1 bytes at the end",)),
    "cut short": (framed(two((0, 2), (2, 6)), bytes(5)), TRUNCATED, ("1 bytes", "1 of 2 tensors", "from x")),
    "offset far past the end": (framed(two((0, 2), (2**62, 2**62 + 1)), bytes(3)), GAP, ("tensor x",)),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_header_is_named(kind: str, tmp_path: Path) -> None:
    content, code, said = MALFORMED[kind]
    path = tmp_path / "shard.safetensors"
    path.write_bytes(content)
    with pytest.raises(ShardwayError) as caught:
        read_safetensors(path)
    assert caught.value.code is code
    text = str(caught.value)
    assert f"file {path}" in text
    for part in said:
        assert part in text


def test_every_malformed_header_is_refused_by_the_reference_too(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    # The reference reader lets these pass, against the format's text or for want of a limit.
    lenient = {"leading space", "metadata null", "field extra", "shape of 65 axes", "tensor twice"}
    accepted = set()
    for kind, (content, _, _) in MALFORMED.items():
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        try:
            with safetensors.safe_open(path, framework="np") as opened:
                opened.keys()
            accepted.add(kind)
        except Exception:
            continue
    assert accepted <= lenient


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "F32", "shape": [True], "data_offsets": [4, 8]},
        "c": 3,
    }
    path = tmp_path / "shard.safetensors"
    path.write_bytes(framed(json.dumps(header), EIGHT))
    with pytest.raises(ShardwayError) as caught:
        read_safetensors(path)
    assert [problem.tensor for problem in caught.value.problems] == ["a", "b", "c"]
    assert caught.value.codes == {Code.DTYPE_UNKNOWN, Code.SAFETENSORS_HEADER}


@pytest.mark.parametrize(
    "content", ["{" + ",".join(f'"{i}":0' for i in range(1000)) + "}", "{" + '"a":0,' * 999 + '"a":0}']
)
def test_a_thousand_problems_are_counted_not_listed(content: str, tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(framed(content))
    with pytest.raises(ShardwayError, match=r"and \d{3} more problems in shard\.safetensors") as caught:
        read_safetensors(path)
    assert len(caught.value.problems) == 33


def test_names_cannot_garble_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(framed(json.dumps({"\x1b[2J\n" + "w" * 10_000: 0})))
    with pytest.raises(ShardwayError) as caught:
        read_safetensors(path)
    what = caught.value.problems[0].what
    assert what.isprintable()
    assert len(what) < 300
    assert printable("model.embed_tokens.weight") == "model.embed_tokens.weight"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ShardwayError, match=r"nowhere\.safetensors does not exist") as caught:
        read_safetensors(tmp_path / "nowhere.safetensors")
    assert caught.value.codes == {Code.FILE_MISSING}


def test_broken_link_names_its_target(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").symlink_to("../blobs/0123")
    with pytest.raises(ShardwayError, match=r"w.safetensors is a symbolic link to \.\./blobs/0123") as caught:
        read_safetensors(tmp_path / "w.safetensors")
    assert caught.value.codes == {Code.FILE_MISSING}


def test_directory_pipe_and_loop_are_unreadable(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("directory", "pipe", "loop", "nul\0"):
        with pytest.raises(ShardwayError, match="cannot read") as caught:
            read_safetensors(tmp_path / name)
        assert caught.value.codes == {Code.FILE_UNREADABLE}


def test_io_error_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(framed("{}"))

    def fail(descriptor: int, num_bytes: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(ShardwayError, match="Input/output error") as caught:
        read_safetensors(path)
    assert caught.value.codes == {Code.FILE_UNREADABLE}


def test_short_reads_are_continued_and_data_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    content = framed(entry(), EIGHT)
    path.write_bytes(content)
    touched = []
    whole_pread = os.pread

    def short_pread(descriptor: int, num_bytes: int, offset: int) -> bytes:
        data = whole_pread(descriptor, min(num_bytes, 3), offset)
        touched.append(offset + len(data))
        return data

    monkeypatch.setattr(os, "pread", short_pread)
    read = read_safetensors(path)
    assert read.tensors["w"].shape == (2,)
    assert max(touched) == 8 + read.header_bytes == len(content) - 8


def test_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    header = {
        "__metadata__": {"format": "pt"},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [6, 10]},
        "empty": {"dtype": "BF16", "shape": [0, 2**62, 2**62], "data_offsets": [6, 6]},
        "matrix": {"dtype": "BF16", "shape": [3, 1], "data_offsets": [0, 6]},
    }
    content = framed(json.dumps(header) + "   ", bytes(10))
    path.write_bytes(content)
    read = read_safetensors(path, file="sub/w.safetensors")
    start = len(content) - 10
    assert read.path == path
    assert read.metadata == {"format": "pt"}
    assert read.header_bytes == start - 8
    assert read.num_bytes == len(content)
    file = "sub/w.safetensors"
    assert list(read.tensors.values()) == [
        StoredTensor("scalar", F32, (), (Chunk((), (), file, start + 6),)),
        StoredTensor("empty", BF16, (0, 2**62, 2**62), (Chunk((0, 0, 0), (0, 2**62, 2**62), file, start + 6),)),
        StoredTensor("matrix", BF16, (3, 1), (Chunk((0, 0), (3, 1), file, start),)),
    ]
    assert read_safetensors(path).tensors["scalar"].chunks[0].file == "w.safetensors"


def test_fifty_thousand_tensors(tmp_path: Path) -> None:
    tensors = [(f"model.layers.{i // 500}.mlp.experts.{i % 500}.weight", BF16, (2048, 768)) for i in range(50_000)]
    layout = lay_out(tensors, {"format": "pt"})
    path = tmp_path / "model.safetensors"
    path.write_bytes(layout.header)
    os.truncate(path, layout.num_bytes)  # sparse: 157 GB that take no space
    read = read_safetensors(path)
    assert tuple(tensor.chunks[0].offset for tensor in read.tensors.values()) == layout.offsets
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in read.tensors.values()] == tensors


def test_empty_file_of_no_tensors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(lay_out([], {}).header)
    assert read_safetensors(path).tensors == {}


def test_widest_elements_come_first_and_offsets_keep_the_given_order(tmp_path: Path) -> None:
    layout = lay_out([("a", U8, (3,)), ("b", F32, (1,)), ("c", U8, (2,)), ("d", BF16, (5,))], {"format": "pt"})
    start = len(layout.header)
    assert start % 8 == 0
    assert layout.offsets == (start + 14, start, start + 17, start + 4)
    assert layout.num_bytes == start + 19


@pytest.mark.parametrize(
    ("tensors", "code", "said"),
    [
        ([("w", dtype_of_torch("complex128"), (1,))], Code.DTYPE_UNSUPPORTED, "tensor w is complex128"),
        ([("w", dtype_of_torch("float4_e2m1fn_x2"), (3,))], Code.DTYPE_UNSUPPORTED, "tensor w ends inside a byte"),
        ([("w", U8, (1,)), ("w", U8, (2,))], Code.TENSOR_DUPLICATE, "tensor w is to be written twice"),
        ([("__metadata__", U8, (1,))], Code.SAFETENSORS_HEADER, "__metadata__"),
        ([("w\ud800", U8, (1,))], Code.SAFETENSORS_HEADER, "not valid Unicode"),
        ([("w" * 100_000_000, U8, (1,))], Code.SAFETENSORS_HEADER, "readers accept 100000000"),
    ],
    ids=["no tag", "half a byte", "twice", "reserved", "surrogate", "too big"],
)
def test_unwritable(tensors: list[tuple[str, DType, Shape]], code: Code, said: str) -> None:
    with pytest.raises(ShardwayError) as caught:
        lay_out(tensors, {"format": "pt"})
    assert caught.value.codes == {code}
    assert said in str(caught.value)


def fill(path: Path, layout: SafetensorsLayout) -> bytes:
    """Write a file of `layout` whose data bytes count up from 0; returns the data."""
    data = bytes(i % 251 for i in range(layout.num_bytes - len(layout.header)))
    path.write_bytes(layout.header + data)
    return data


NAMES = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__")
WRITABLE = [dtype for dtype in all_dtypes() if dtype.safetensors]
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@given(
    tensors=st.dictionaries(NAMES, st.tuples(st.sampled_from(WRITABLE), SHAPES), max_size=12),
    metadata=st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), st.text(st.characters(codec="utf-8"))),
)
@settings(deadline=None, max_examples=80)
def test_what_is_laid_out_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[DType, Shape]],
    metadata: dict[str, str],
) -> None:
    given_tensors = [
        (name, dtype, shape) for name, (dtype, shape) in tensors.items() if math.prod(shape) * dtype.bits % 8 == 0
    ]
    path = tmp_path_factory.mktemp("layout") / "w.safetensors"
    layout = lay_out(given_tensors, metadata)
    fill(path, layout)
    read = read_safetensors(path)
    assert read.metadata == metadata
    assert read.num_bytes == layout.num_bytes
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in read.tensors.items()} == {
        name: (dtype, shape) for name, dtype, shape in given_tensors
    }
    for (name, dtype, _), offset in zip(given_tensors, layout.offsets, strict=True):
        assert read.tensors[name].chunks[0].offset == offset
        assert offset % max(1, dtype.bits // 8) == 0


@given(content=st.binary(max_size=64) | st.binary(max_size=64).map(lambda raw: framed(b"{" + raw)))
@settings(deadline=None, max_examples=150)
def test_arbitrary_bytes_never_crash(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "w.safetensors"
    path.write_bytes(content)
    try:
        read_safetensors(path)
    except ShardwayError as error:
        assert error.problems[0].file == path  # noqa: PT017


def test_every_dtype_of_torch_is_read_by_the_reference(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("safetensors")
    dtypes = [dtype for dtype in WRITABLE if hasattr(torch, dtype.name)]
    tensors: list[tuple[str, DType, Shape]] = [(dtype.name, dtype, (3, 4)) for dtype in dtypes]
    layout = lay_out(tensors, {"format": "pt"})
    path = tmp_path / "model.safetensors"
    fill(path, layout)
    content = path.read_bytes()
    with reference.safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        for (name, dtype, shape), offset in zip(tensors, layout.offsets, strict=True):
            tensor = opened.get_tensor(name)
            assert tensor.dtype is getattr(torch, name)
            expected = content[offset : offset + dtype.num_bytes(math.prod(shape))]
            assert bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()) == expected
    assert len(dtypes) >= 18


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the checkpoints that transformers wrote are not here")
@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*/*.safetensors")), ids=lambda path: path.parent.name)
def test_agrees_with_the_reference_about_what_transformers_wrote(path: Path) -> None:
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("safetensors")
    read = read_safetensors(path)
    content = path.read_bytes()
    with reference.safe_open(path, framework="pt") as opened:
        assert read.metadata == opened.metadata()
        assert read.tensors.keys() == set(opened.keys())
        for name, stored in read.tensors.items():
            view = opened.get_slice(name)
            assert stored.shape == tuple(view.get_shape())
            assert stored.dtype.safetensors == view.get_dtype()
            tensor = opened.get_tensor(name)
            offset = stored.chunks[0].offset
            assert bytes(tensor.reshape(-1).view(torch.uint8).numpy()) == content[offset : offset + stored.num_bytes]


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the checkpoints that transformers wrote are not here")
@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*/*.safetensors")), ids=lambda path: path.parent.name)
def test_lays_out_what_the_reference_wrote_byte_for_byte(path: Path) -> None:
    read = read_safetensors(path)
    in_file_order = sorted(read.tensors.values(), key=lambda tensor: tensor.chunks[0].offset)
    layout = lay_out([(tensor.name, tensor.dtype, tensor.shape) for tensor in in_file_order], read.metadata)
    assert path.read_bytes().startswith(layout.header)
    assert layout.offsets == tuple(tensor.chunks[0].offset for tensor in in_file_order)
    assert layout.num_bytes == read.num_bytes
