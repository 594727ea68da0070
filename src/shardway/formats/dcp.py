"""The ``.metadata`` of torch.distributed.checkpoint: which file holds which box of which tensor."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from shardway.core.dtypes import DType
from shardway.core.errors import Code, Problem, Problems, ShardwayError
from shardway.formats import torch_file
from shardway.formats.pickle_writer import (
    APPENDS,
    EMPTY_DICT,
    EMPTY_LIST,
    FALSE,
    MARK,
    NEW_OBJECT,
    NONE,
    REDUCE,
    SETITEMS,
    STOP,
    PickleWriter,
    integer,
)
from shardway.formats.pickles import Reference, SavedObject, load_pickle

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from shardway.core.tensors import Shape

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_PLANNER = "torch.distributed.checkpoint.planner"


class DcpLocation(NamedTuple):
    """Where a blob lies: a file beside ``.metadata``, a byte offset in it and a number of bytes."""

    file: str
    offset: int
    length: int


class DcpChunk(NamedTuple):
    """A box of a tensor, and the blob (a file of `torch.save`) that holds it."""

    start: Shape
    size: Shape
    location: DcpLocation


class DcpTensor(NamedTuple):
    """A tensor as ``.metadata`` describes it."""

    dtype: DType
    shape: Shape
    chunks: tuple[DcpChunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DcpMetadata:
    """What a ``.metadata`` file says.

    Attributes:
        tensors: By key.
        objects: Blobs of pickled objects, by key.
        version: The format's version as written, or None.
    """

    tensors: Mapping[str, DcpTensor]
    objects: Mapping[str, DcpLocation] = field(default_factory=dict)
    version: str | None = None


def write_metadata(
    tensors: Mapping[str, DcpTensor], objects: Mapping[str, DcpLocation], *, save_id: str | None = None
) -> bytes:
    """A ``.metadata`` file that torch 2.6 and later read as `torch.distributed.checkpoint.metadata.Metadata`.

    Args:
        tensors: By key; the order is kept.
        objects: Blobs of pickled objects, by key; several keys may name the same blob.
        save_id: An identifier of the save, or None.

    Returns:
        The file's bytes (pickle protocol 4).
    """
    return _Emitter().metadata(tensors, objects, save_id)


class _Emitter:
    """Emits the objects of ``.metadata``; strings, sizes and classes are written once and referred to after that."""

    def __init__(self) -> None:
        self._writer = PickleWriter(4)

    def metadata(
        self, tensors: Mapping[str, DcpTensor], objects: Mapping[str, DcpLocation], save_id: str | None
    ) -> bytes:
        writer = self._writer
        parts = [writer.start, writer.reference(_METADATA, "Metadata"), NEW_OBJECT, EMPTY_DICT, MARK]
        parts += (writer.text("state_dict_metadata"), EMPTY_DICT, MARK)
        for key, tensor in tensors.items():
            self._tensor(parts, key, tensor)
        for key in objects:
            parts += (writer.text(key), writer.reference(_METADATA, "BytesStorageMetadata"), NEW_OBJECT)
        parts += (SETITEMS, writer.text("planner_data"), NONE)
        parts += (writer.text("storage_data"), EMPTY_DICT, MARK)
        for key, tensor in tensors.items():
            for start, _, location in tensor.chunks:
                self._index(parts, key, start)
                self._location(parts, location)
        for key, location in objects.items():
            self._index(parts, key, None)
            self._location(parts, location)
        parts += (SETITEMS, writer.text("storage_meta"), writer.reference(_METADATA, "StorageMeta"), NEW_OBJECT)
        parts += (EMPTY_DICT, MARK, writer.text("checkpoint_id"), NONE)
        parts += (writer.text("save_id"), NONE if save_id is None else writer.text(save_id))
        parts += (writer.text("load_id"), NONE, writer.text("modules"), EMPTY_LIST, SETITEMS, b"b")
        parts += (writer.text("version"), writer.text("1.0.0"), SETITEMS, b"b", STOP)
        return b"".join(parts)

    def _tensor(self, parts: list[bytes], key: str, tensor: DcpTensor) -> None:
        writer = self._writer
        parts += (writer.text(key), writer.reference(_METADATA, "TensorStorageMetadata"), NEW_OBJECT, EMPTY_DICT, MARK)
        parts += (
            writer.text("properties"),
            self._properties(tensor.dtype),
            writer.text("size"),
            self._size(tensor.shape),
        )
        parts += (writer.text("chunks"), EMPTY_LIST, MARK)
        for start, size, _ in tensor.chunks:
            parts += (writer.reference(_METADATA, "ChunkStorageMetadata"), NEW_OBJECT, EMPTY_DICT, MARK)
            parts += (writer.text("offsets"), self._size(start), writer.text("sizes"), self._size(size), SETITEMS, b"b")
        parts += (APPENDS, SETITEMS, b"b")

    def _properties(self, dtype: DType) -> bytes:
        writer = self._writer
        known = writer.recall(dtype)
        if known is not None:
            return known
        cls = writer.reference(_METADATA, "TensorProperties") + NEW_OBJECT
        state = (
            MARK,
            writer.reference("torch", dtype.name),
            self._layout(),
            FALSE,
            self._memory_format(),
            FALSE,
            b"tb",
        )
        return writer.memoise(dtype, cls + b"".join(state))

    def _layout(self) -> bytes:
        writer = self._writer
        known = writer.recall(("layout",))
        if known is not None:
            return known
        function = writer.reference("torch.serialization", "_get_layout")
        return writer.memoise(("layout",), function + writer.text("torch.strided") + b"\x85" + REDUCE)

    def _memory_format(self) -> bytes:
        writer = self._writer
        known = writer.recall(("memory format",))
        if known is not None:
            return known
        cls = writer.reference(_METADATA, "_MEM_FORMAT_ENCODING")
        return writer.memoise(("memory format",), cls + integer(0) + b"\x85" + REDUCE)

    def _size(self, values: Shape) -> bytes:
        writer = self._writer
        known = writer.recall(("size", values))
        if known is not None:
            return known
        return writer.memoise(
            ("size", values), writer.reference("torch", "Size") + writer.integers(values) + b"\x85" + REDUCE
        )

    def _index(self, parts: list[bytes], key: str, start: Shape | None) -> None:
        writer = self._writer
        parts += (writer.reference(_METADATA, "MetadataIndex"), NEW_OBJECT, EMPTY_DICT, MARK)
        parts += (writer.text("fqn"), writer.text(key), writer.text("index"), NONE)
        if start is not None:
            parts += (writer.text("offset"), self._size(start))
        parts += (SETITEMS, b"b")

    def _location(self, parts: list[bytes], location: DcpLocation) -> None:
        writer = self._writer
        parts += (writer.reference(_FILESYSTEM, "_StorageInfo"), NEW_OBJECT, EMPTY_DICT, MARK)
        parts += (writer.text("relative_path"), writer.text(location.file))
        parts += (writer.text("offset"), integer(location.offset), writer.text("length"), integer(location.length))
        parts += (SETITEMS, b"b")


def read_metadata(data: bytes, file: str) -> DcpMetadata:
    """The tensors and objects that a ``.metadata`` file names, every chunk with its place; nothing is executed.

    That the chunks of a tensor cover it exactly once is proven elsewhere.

    Args:
        data: The file's bytes.
        file: The file to name in errors.

    Returns:
        Tensors and objects.

    Raises:
        ShardwayError: `pickle-forbidden`, `pickle-invalid`, `metadata-invalid`, `chunk-out-of-bounds`, `path-escapes`,
            `backend-unsupported` or `dtype-unknown`; all problems of a file together.

    Source: torch/distributed/checkpoint/metadata.py and filesystem.py (2.13).
    """
    collecting = gc.isenabled()
    gc.disable()  # a million small objects, none of them garbage: the collector would take as long as the reading
    try:
        return _read(data, file)
    finally:
        if collecting:
            gc.enable()


def _read(data: bytes, file: str) -> DcpMetadata:
    root = load_pickle(data, allowed=_NAMES, file=file)
    if not _is(root, "Metadata"):
        raise _invalid(f"it holds a {type(root).__name__}, not a torch.distributed.checkpoint Metadata", file)
    state = root.state
    entries, places = state.get("state_dict_metadata"), state.get("storage_data")
    if type(entries) is not dict or type(places) is not dict:
        raise _invalid("it lacks state_dict_metadata or storage_data", file)
    problems = Problems()
    locations = _locations(places, file, problems)
    tensors: dict[str, DcpTensor] = {}
    objects: dict[str, DcpLocation] = {}
    for key, entry in entries.items():
        if _is(entry, "TensorStorageMetadata") and type(key) is str:
            tensor = _tensor(key, entry.state, locations, file, problems)
            if tensor is not None:
                tensors[key] = tensor
        elif type(entry) is SavedObject and entry.type_name == _BYTES and type(key) is str:
            location = locations.pop((key, None), None)
            if location is None:
                problems.add(Code.METADATA_INVALID, f"{key} has no place in any file", tensor=key, file=file)
            else:
                objects[key] = location
        else:
            problems.add(Code.METADATA_INVALID, f"the entry of {key!r:.200} is neither tensor nor bytes", file=file)
    _report_strays(locations, file, problems)
    problems.raise_if_any()
    version = state.get("version")
    return DcpMetadata(tensors=tensors, objects=objects, version=version if type(version) is str else None)


def _is(value: object, name: str) -> bool:
    """Whether `value` is a saved `name` of the metadata module with a dict of attributes."""
    return type(value) is SavedObject and value.type_name == f"{_METADATA}.{name}" and type(value.state) is dict


def _locations(
    places: dict[object, object], file: str, problems: Problems
) -> dict[tuple[str, Shape | None], DcpLocation]:
    found: dict[tuple[str, Shape | None], DcpLocation] = {}
    safe_names: set[str] = set()
    for index, place in places.items():
        key = _index(index)
        if key is None or type(place) is not SavedObject or place.type_name != _STORAGE_INFO:
            problems.add(Code.METADATA_INVALID, "storage_data has an entry that is not an index and a place", file=file)
            continue
        state = place.state if type(place.state) is dict else {}
        name, offset, length = state.get("relative_path"), state.get("offset"), state.get("length")
        if type(name) is not str or not _is_count(offset) or not _is_count(length):
            problems.add(Code.METADATA_INVALID, f"{key[0]} has no proper place", tensor=key[0], file=file)
            continue
        if state.get("transform_descriptors"):
            _report_transforms(key[0], state["transform_descriptors"], file, problems)
            continue
        if name not in safe_names:
            if not is_plain_path(name):
                _report_escape(key[0], name, file, problems)
                continue
            safe_names.add(name)
        if key in found:
            problems.add(Code.METADATA_INVALID, f"{key[0]} has two places", tensor=key[0], file=file)
        found[key] = DcpLocation(name, offset, length)
    return found


def _index(index: object) -> tuple[str, Shape | None] | None:
    state = index.state if type(index) is SavedObject and index.type_name == _INDEX else None
    if type(state) is not dict:
        return None
    key, start = state.get("fqn"), state.get("offset")
    return (key, start) if type(key) is str and (start is None or is_shape(start)) else None


def _tensor(
    key: str,
    state: dict[str, object],
    locations: dict[tuple[str, Shape | None], DcpLocation],
    file: str,
    problems: Problems,
) -> DcpTensor | None:
    properties, shape, saved_chunks = state.get("properties"), state.get("size"), state.get("chunks")
    dtype = _dtype(properties)
    if dtype is None or not is_shape(shape) or type(saved_chunks) is not list:
        problems.add(
            Code.METADATA_INVALID, f"the entry of {key} has no proper type, shape or chunks", tensor=key, file=file
        )
        return None
    if math.prod(shape) >= 2**63 // 16:
        problems.add(Code.METADATA_INVALID, f"{key} has an impossible shape {list(shape)}", tensor=key, file=file)
        return None
    chunks = []
    for saved in saved_chunks:
        box = saved.state if type(saved) is SavedObject and saved.type_name == _CHUNK else None
        start, size = (box.get("offsets"), box.get("sizes")) if type(box) is dict else (None, None)
        if not is_shape(start) or not is_shape(size):
            problems.add(Code.METADATA_INVALID, f"a chunk of {key} has no proper place", tensor=key, file=file)
            return None
        if len(start) != len(shape) or len(size) != len(shape) or _outside(start, size, shape):
            problems.add(
                Code.CHUNK_OUT_OF_BOUNDS,
                f"a chunk of {key} lies outside the tensor",
                tensor=key,
                file=file,
                facts=(f"chunk at {list(start)} of size {list(size)}, tensor of shape {list(shape)}",),
                cure="the checkpoint is damaged: copy or save it again",
            )
            return None
        location = locations.pop((key, start), None)
        if location is None:
            problems.add(
                Code.METADATA_INVALID,
                f"the chunk of {key} at {list(start)} has no place in any file, or is listed twice",
                tensor=key,
                file=file,
            )
            return None
        chunks.append(DcpChunk(start, size, location))
    return DcpTensor(dtype, shape, tuple(chunks))


def _outside(start: Shape, size: Shape, shape: Shape) -> bool:
    return any(first + extent > full for first, extent, full in zip(start, size, shape, strict=True))


def _dtype(properties: object) -> DType | None:
    # The state is the tuple of TensorProperties.__getstate__; its other four fields are deprecated.
    if type(properties) is not SavedObject or not properties.type_name.endswith(".TensorProperties"):
        return None
    state = properties.state
    dtype = state[0] if type(state) is tuple and state else None
    return dtype if type(dtype) is DType else None


def is_shape(value: object) -> TypeGuard[Shape]:
    """Whether `value` is a tuple of counts that fit in 63 bits."""
    return type(value) is tuple and len(value) <= 64 and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**63


def is_plain_path(name: str) -> bool:
    """Whether a file name from a checkpoint stays inside the checkpoint's folder, on every platform."""
    if "\\" in name or "\0" in name or ":" in name:
        return False
    return all(part not in {"", ".", ".."} for part in name.split("/"))


def _report_escape(key: str, name: str, file: str, problems: Problems) -> None:
    problems.add(
        Code.PATH_ESCAPES,
        f"the file of {key} is {name[:200]!r}, which is not a plain path inside the checkpoint",
        tensor=key,
        file=file,
        cure="do not trust this checkpoint: no writer of torch_dist names files outside its folder",
    )


def _report_transforms(key: str, transforms: object, file: str, problems: Problems) -> None:
    problems.add(
        Code.BACKEND_UNSUPPORTED,
        f"{key} is stored transformed ({transforms!r:.100})",
        tensor=key,
        file=file,
        facts=("shardway moves bytes as they are: it reads no compressed or encrypted DCP streams",),
        cure="save it without storage extensions",
    )


def _report_strays(locations: Iterable[tuple[str, Shape | None]], file: str, problems: Problems) -> None:
    strays = sorted({key for key, _ in locations})
    if strays:
        shown = ", ".join(strays[:8]) + (f" and {len(strays) - 8:,} more" if len(strays) > 8 else "")
        problems.add(
            Code.METADATA_INVALID,
            f"storage_data places chunks that no tensor or object has: {shown}",
            tensor=strays[0],
            file=file,
        )


def _invalid(what: str, file: str) -> ShardwayError:
    cure = "the checkpoint is damaged: copy or save it again"
    return ShardwayError(
        Problem(code=Code.METADATA_INVALID, what=f"cannot read .metadata: {what}", file=file, cure=cure)
    )


_BYTES = f"{_METADATA}.BytesStorageMetadata"
_CHUNK = f"{_METADATA}.ChunkStorageMetadata"
_INDEX = f"{_METADATA}.MetadataIndex"
_STORAGE_INFO = f"{_FILESYSTEM}._StorageInfo"

# Everything that torch 2.1 to 2.13 and megatron-core put into .metadata: `all_local_plans` of newer megatron-core
# brings the planner's classes, `mcore_data` of older ones only dicts.
_OLD_SHARDS = "torch.distributed._shard.sharded_tensor.metadata"
_INERT = {
    _METADATA: (
        "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata MetadataIndex TensorProperties"
        " StorageMeta _MEM_FORMAT_ENCODING"
    ),
    _FILESYSTEM: "_StorageInfo _StoragePrefix",
    _PLANNER: "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    _OLD_SHARDS: "TensorProperties MEM_FORMAT_ENCODING",
    "torch.serialization": "_get_layout",
    "pathlib": "Path PosixPath PurePosixPath",
    "pathlib._local": "Path PosixPath PurePosixPath",
}
_NAMES: dict[tuple[str, str], object] = {
    **torch_file.DTYPE_NAMES,
    **{(module, name): Reference(f"{module}.{name}") for module, names in _INERT.items() for name in names.split()},
    ("torch", "Size"): Reference("torch.Size", torch_file.size_of),
    ("collections", "OrderedDict"): Reference("collections.OrderedDict", torch_file.ordered_dict),
}
