"""`.metadata`: what torch and Megatron wrote is understood, what shardway writes torch takes for its own."""

from __future__ import annotations

import copy
import json
import pickle
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardway.core.dtypes import BFLOAT16, FLOAT32, all_dtypes
from shardway.core.errors import Code, ShardwayError
from shardway.formats.dcp import DcpChunk, DcpLocation, DcpMetadata, DcpTensor, read_metadata, write_metadata

torch = pytest.importorskip("torch")

from torch.distributed.checkpoint import filesystem, metadata, planner  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES_07 = (
    "deepseek_v3 deepseek_v3_mtp deepseek_v3_pp2 llama llama_tp2 nemotron_h nemotron_h_super qwen3 qwen3_moe"
    " qwen3_moe_ep2 qwen3_next"
)
FIXTURES = ("megatron_bridge_0.3.1/llama", *(f"megatron_bridge_0.7.0/{name}" for name in NAMES_07.split()))
CODES = {
    Code.PICKLE_INVALID,
    Code.PICKLE_FORBIDDEN,
    Code.METADATA_INVALID,
    Code.CHUNK_OUT_OF_BOUNDS,
    Code.PATH_ESCAPES,
    Code.BACKEND_UNSUPPORTED,
}


def tensor(shape: tuple[int, ...], *chunks: tuple[tuple[int, ...], tuple[int, ...]], at: int = 0) -> DcpTensor:
    places = (DcpLocation("__0_0.distcp", at + 1000 * number, 900) for number in range(len(chunks)))
    return DcpTensor(BFLOAT16, shape, tuple(DcpChunk(*box, place) for box, place in zip(chunks, places, strict=True)))


TENSORS = {
    "a.weight": tensor((4, 6), ((0, 0), (2, 6)), ((2, 0), (2, 6))),
    "b.bias": DcpTensor(FLOAT32, (300,), (DcpChunk((0,), (300,), DcpLocation("sub/__1_0.distcp", 2**40, 2**33)),)),
    "scalar": tensor((), ((), ()), at=5000),
}
OBJECTS = {f"{name}._extra_state/shard_0_1": DcpLocation("__0_0.distcp", 9000, 400) for name in "ab"}


def torch_metadata(tensors: dict[str, DcpTensor], objects: dict[str, DcpLocation], save_id: str | None = None) -> Any:
    """The same with torch's own classes."""
    entries: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for key, value in tensors.items():
        chunks = []
        for start, size, location in value.chunks:
            chunks.append(metadata.ChunkStorageMetadata(torch.Size(start), torch.Size(size)))
            places[metadata.MetadataIndex(key, torch.Size(start))] = filesystem._StorageInfo(*location)
        properties = metadata.TensorProperties(getattr(torch, value.dtype.name))
        entries[key] = metadata.TensorStorageMetadata(properties, torch.Size(value.shape), chunks)
    for key, location in objects.items():
        entries[key] = metadata.BytesStorageMetadata()
        places[metadata.MetadataIndex(key)] = filesystem._StorageInfo(*location)
    return metadata.Metadata(
        state_dict_metadata=entries,
        storage_data=places,
        storage_meta=metadata.StorageMeta(save_id=save_id),
        **({"version": "1.0.0"} if hasattr(metadata.Metadata, "version") else {}),
    )


def test_torch_reads_its_own_objects() -> None:
    for save_id in (None, "some-id"):
        loaded = pickle.loads(write_metadata(TENSORS, OBJECTS, save_id=save_id))
        expected = torch_metadata(TENSORS, OBJECTS, save_id)
        assert loaded == expected
        assert list(loaded.state_dict_metadata) == [*TENSORS, *OBJECTS]
        for index, place in loaded.storage_data.items():
            assert (type(index), type(place)) == (metadata.MetadataIndex, filesystem._StorageInfo)
            assert index.__dict__.keys() == next(key for key in expected.storage_data if key == index).__dict__.keys()
            assert place.transform_descriptors is None
        assert type(loaded.state_dict_metadata["a.weight"].size) is torch.Size
        assert pickle.loads(pickle.dumps(loaded)) == expected
        assert copy.deepcopy(loaded) == expected


@pytest.mark.parametrize("dtype", [dtype for dtype in all_dtypes() if hasattr(torch, dtype.name)], ids=lambda d: d.name)
def test_dtypes(dtype: Any) -> None:
    tensors = {"x": DcpTensor(dtype, (3,), (DcpChunk((0,), (3,), DcpLocation("f", 0, 9)),))}
    assert pickle.loads(write_metadata(tensors, {})) == torch_metadata(tensors, {})
    assert read_metadata(pickle.dumps(torch_metadata(tensors, {})), "f").tensors == tensors


NAMES = st.text(st.characters(categories=["L", "N", "P"]), min_size=1)
COUNTS = st.integers(0, 2**62)


@given(
    st.dictionaries(NAMES, st.tuples(st.lists(st.integers(0, 2**20), max_size=3), COUNTS, COUNTS)),
    st.dictionaries(NAMES, st.tuples(COUNTS, COUNTS)),
)
def test_written_is_read(described: dict[str, tuple[list[int], int, int]], places: dict[str, tuple[int, int]]) -> None:
    tensors = {}
    for key, (shape, offset, length) in described.items():
        chunk = DcpChunk((0,) * len(shape), tuple(shape), DcpLocation("__0_0.distcp", offset, length))
        tensors[key] = DcpTensor(BFLOAT16, tuple(shape), (chunk,))
    objects = {f"/{key}": DcpLocation("x.distcp", *place) for key, place in places.items() if f"/{key}" not in tensors}
    data = write_metadata(tensors, objects)
    assert read_metadata(data, "f") == DcpMetadata(tensors=tensors, objects=objects, version="1.0.0")
    assert pickle.loads(data) == torch_metadata(tensors, objects)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_protocol(protocol: int) -> None:
    saved = torch_metadata(TENSORS, OBJECTS)
    data = pickle.dumps(saved, protocol)
    assert read_metadata(data, "f") == DcpMetadata(tensors=TENSORS, objects=OBJECTS, version="1.0.0")


def test_what_newer_and_older_megatron_add() -> None:
    saved = torch_metadata(TENSORS, OBJECTS)
    saved.mcore_data = {"a.weight": {"nd_reformulated_orig_global_shape": (4, 6)}}
    saved.planner_data = {"a.weight": ("model", "a", 0)}
    entry = saved.state_dict_metadata["a.weight"]
    write = planner.TensorWriteData(entry.chunks[0], entry.properties, entry.size)
    items = [
        planner.WriteItem(metadata.MetadataIndex("a.weight", [0, 0]), planner.WriteItemType.SHARD, tensor_data=write),
        planner.WriteItem(metadata.MetadataIndex("a"), planner.WriteItemType.BYTE_IO, planner.BytesIOWriteData(5)),
    ]
    saved.all_local_plans = [planner.SavePlan(items, filesystem._StoragePrefix("__0_"), {})]
    saved.storage_meta = metadata.StorageMeta(Path("/some/where"), "id", modules=["m"])
    assert read_metadata(pickle.dumps(saved), "f").tensors == TENSORS


@pytest.mark.parametrize("protocol", [2, 4])
def test_enums_as_python_3_11_0_to_3_11_3_pickle_them(protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those versions of Enum.__reduce_ex__ returned ``getattr, (self.__class__, self._name_)``."""
    for enum in (metadata._MEM_FORMAT_ENCODING, planner.WriteItemType):
        monkeypatch.setattr(enum, "__reduce_ex__", lambda self, _: (getattr, (self.__class__, self._name_)))
    saved = torch_metadata(TENSORS, OBJECTS)
    items = [planner.WriteItem(metadata.MetadataIndex("a"), planner.WriteItemType.BYTE_IO, planner.BytesIOWriteData(5))]
    saved.all_local_plans = [planner.SavePlan(items, None, None)]
    data = pickle.dumps(saved, protocol)
    assert data.count(b"getattr") == 1
    assert b"BYTE_IO" in data
    assert b"TORCH_CONTIGUOUS_FORMAT" in data
    assert read_metadata(data, "f") == DcpMetadata(tensors=TENSORS, objects=OBJECTS, version="1.0.0")


@pytest.mark.parametrize("name", FIXTURES)
def test_fixtures(name: str, shared_fixtures: Path) -> None:
    path = shared_fixtures / name / "iter_0000000" / ".metadata"
    description = shared_fixtures / f"{name}.json"
    data = path.read_bytes()
    found = read_metadata(data, str(path))
    trusted = pickle.loads(data)
    assert torch_metadata(dict(found.tensors), dict(found.objects)).state_dict_metadata == trusted.state_dict_metadata
    assert torch_metadata(dict(found.tensors), dict(found.objects)).storage_data == trusted.storage_data
    assert found.version == "1.0.0"
    if description.exists():
        described = json.loads(description.read_text())
        assert set(found.objects) == set(described["bytes"])
        assert set(found.tensors) == set(described["tensors"])
    again = read_metadata(write_metadata(found.tensors, found.objects), "again")
    assert again == found


def error_of(data: bytes) -> ShardwayError:
    with pytest.raises(ShardwayError) as caught:
        read_metadata(data, "some/.metadata")
    assert caught.value.codes <= CODES
    assert all(problem.file == "some/.metadata" for problem in caught.value.problems)
    return caught.value


def changed(change: Callable[[Any], object]) -> ShardwayError:
    saved = torch_metadata(TENSORS, OBJECTS)
    change(saved)
    return error_of(pickle.dumps(saved))


def index_of(saved: Any, key: str) -> Any:
    return next(index for index in saved.storage_data if index.fqn == key)


def entry_of(saved: Any, key: str = "a.weight") -> Any:
    return saved.state_dict_metadata[key]


def place_of(saved: Any, key: str) -> Any:
    return saved.storage_data[index_of(saved, key)]


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "a/../../x", "..", ".", "", "a//b", "a/", "a\\b", "..\\x", "C:x", "a\0b", "./a", "a\x1b"],
)
def test_paths_that_leave_the_folder(name: str) -> None:
    error = changed(lambda saved: setattr(place_of(saved, "scalar"), "relative_path", name))
    assert Code.PATH_ESCAPES in error.codes
    assert "scalar" in str(error)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda m: m.storage_data.pop(index_of(m, "scalar")), Code.METADATA_INVALID, "scalar at [] has no place"),
        (
            lambda m: m.storage_data.pop(index_of(m, "a._extra_state/shard_0_1")),
            Code.METADATA_INVALID,
            "a._extra_state",
        ),
        (lambda m: m.state_dict_metadata.pop("scalar"), Code.METADATA_INVALID, "no tensor or object has: scalar"),
        (lambda m: entry_of(m).chunks.pop(), Code.METADATA_INVALID, "no tensor or object has"),
        (
            lambda m: entry_of(m).chunks.append(entry_of(m).chunks[0]),
            Code.METADATA_INVALID,
            "listed twice",
        ),
        (
            lambda m: setattr(entry_of(m).chunks[1], "sizes", (3, 6)),
            Code.CHUNK_OUT_OF_BOUNDS,
            "[3, 6]",
        ),
        (
            lambda m: setattr(entry_of(m).chunks[1], "sizes", (2, 7)),
            Code.CHUNK_OUT_OF_BOUNDS,
            "[2, 7]",
        ),
        (
            lambda m: setattr(entry_of(m).chunks[1], "sizes", (2,)),
            Code.CHUNK_OUT_OF_BOUNDS,
            "outside",
        ),
        (lambda m: setattr(entry_of(m), "size", (4, 6, 1)), Code.CHUNK_OUT_OF_BOUNDS, "outside"),
        (
            lambda m: setattr(entry_of(m).chunks[1], "sizes", (-2, 6)),
            Code.METADATA_INVALID,
            "chunk",
        ),
        (
            lambda m: setattr(entry_of(m).chunks[1], "sizes", (2.0, 6)),
            Code.METADATA_INVALID,
            "chunk",
        ),
        (lambda m: setattr(entry_of(m), "size", (2**63, 6)), Code.METADATA_INVALID, "a.weight"),
        (
            lambda m: setattr(entry_of(m), "size", (2**40, 2**40)),
            Code.METADATA_INVALID,
            "impossible",
        ),
        (lambda m: setattr(entry_of(m), "size", None), Code.METADATA_INVALID, "a.weight"),
        (lambda m: setattr(entry_of(m), "chunks", {}), Code.METADATA_INVALID, "a.weight"),
        (lambda m: setattr(entry_of(m), "properties", 1), Code.METADATA_INVALID, "a.weight"),
        (lambda m: setattr(place_of(m, "scalar"), "offset", -1), Code.METADATA_INVALID, "scalar"),
        (lambda m: setattr(place_of(m, "scalar"), "offset", 2**63), Code.METADATA_INVALID, "scalar"),
        (lambda m: setattr(place_of(m, "scalar"), "length", "9"), Code.METADATA_INVALID, "scalar"),
        (lambda m: setattr(place_of(m, "scalar"), "length", True), Code.METADATA_INVALID, "scalar"),
        (lambda m: setattr(place_of(m, "scalar"), "transform_descriptors", ["zstd"]), Code.BACKEND_UNSUPPORTED, "zstd"),
        (lambda m: m.state_dict_metadata.update({"evil\x1b[2J": 1}), Code.METADATA_INVALID, "evil\\x1b"),
        (lambda m: m.state_dict_metadata.update({5: 1}), Code.METADATA_INVALID, "no name"),
        (lambda m: m.state_dict_metadata.update({"x": 1}), Code.METADATA_INVALID, "x is neither"),
        (lambda m: m.storage_data.update({"x": 1}), Code.METADATA_INVALID, "not an index"),
        (lambda m: setattr(m, "storage_data", None), Code.METADATA_INVALID, "lacks"),
        (lambda m: setattr(m, "state_dict_metadata", []), Code.METADATA_INVALID, "lacks"),
    ],
)
def test_contradictions(change: Callable[[Any], object], code: Code, words: str) -> None:
    error = changed(change)
    assert error.code == code
    assert words in str(error)


def test_all_problems_are_reported_together() -> None:
    def change(saved: Any) -> None:
        place_of(saved, "scalar").relative_path = "/x"
        saved.state_dict_metadata["a.weight"].size = (1, 6)
        saved.state_dict_metadata["b.bias"].properties = None

    assert changed(change).codes == {Code.PATH_ESCAPES, Code.CHUNK_OUT_OF_BOUNDS, Code.METADATA_INVALID}


def test_other_pickles() -> None:
    value: object
    for value in (None, {}, [1], torch.Size([1]), metadata.BytesStorageMetadata()):
        assert "not a torch.distributed.checkpoint Metadata" in str(error_of(pickle.dumps(value)))
    assert error_of(pickle.dumps(print)).code == Code.PICKLE_FORBIDDEN


def test_every_truncation_is_an_error() -> None:
    for data in (write_metadata(TENSORS, OBJECTS), pickle.dumps(torch_metadata(TENSORS, OBJECTS))):
        for length in range(len(data)):
            assert error_of(data[:length]).code == Code.PICKLE_INVALID


@given(st.data())
@settings(max_examples=200)
def test_mutations_end_in_metadata_or_an_error(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from([WRITTEN, PICKLED])))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_metadata(bytes(content), "f")
    except ShardwayError as error:
        assert_expected(error)


def assert_expected(error: ShardwayError) -> None:
    assert error.codes <= CODES


WRITTEN = write_metadata(TENSORS, OBJECTS)
PICKLED = pickle.dumps(torch_metadata(TENSORS, OBJECTS))


def test_fifty_thousand_chunks_take_seconds_at_most() -> None:
    tensors = {
        f"decoder.layers.{layer}.mlp.experts.experts.linear_fc1.weight": tensor(
            (50, 64, 8), *(((expert, 0, 0), (1, 64, 8)) for expert in range(50)), at=layer * 50_000
        )
        for layer in range(1000)
    }
    start = time.monotonic()
    data = write_metadata(tensors, {})
    written = time.monotonic()
    assert len(data) < 120 * 50_000
    assert read_metadata(data, "f").tensors == tensors
    # Measured 0.3 s and 0.7 s; the bounds are for busy machines.
    assert written - start < 5
    assert time.monotonic() - written < 10
