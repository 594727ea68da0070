"""The ``.metadata`` of torch.distributed.checkpoint: which file holds which box of which tensor."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from shardway.core.collector import collector_paused
from shardway.core.dtypes import DType
from shardway.core.errors import Code, Problem, Problems, ShardwayError
from shardway.formats import tensor_pickles
from shardway.formats.dcp_writer import FILESYSTEM, METADATA, MetadataEmitter
from shardway.formats.pickles import Reference, SavedObject, enum_lookup, load_pickle

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from shardway.core.tensors import Shape

_PLANNER = "torch.distributed.checkpoint.planner"


_MAX_NAME_LENGTH = 4096
_MAX_PROBLEMS = 32  # a damaged file of 50,000 chunks would have as many to tell of


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


class DcpMetadata(NamedTuple):
    """What a ``.metadata`` file says.

    Attributes:
        tensors: By key.
        objects: Blobs of pickled objects, by key.
        version: The format's version as written, or None.
    """

    tensors: Mapping[str, DcpTensor]
    objects: Mapping[str, DcpLocation] = {}
    version: str | None = None


def write_metadata(
    tensors: Mapping[str, DcpTensor], objects: Mapping[str, DcpLocation], *, save_id: str | None = None
) -> bytes:
    """A ``.metadata`` file that torch 2.6 and later read as `torch.distributed.checkpoint.metadata.Metadata`.

    Args:
        tensors: By key; the order is kept.
        objects: Blobs of pickled objects, by key; several keys may name the same blob.
            All offsets and lengths are below 2**63.
        save_id: An identifier of the save, or None.

    Returns:
        The file's bytes (pickle protocol 4).
    """
    return MetadataEmitter().metadata(tensors, objects, save_id)


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
    with collector_paused():
        root = load_pickle(data, allowed=_NAMES, file=file, fields=_FIELDS)
        del data  # what is read takes several times as much, and each part of it goes once it is converted
        return _convert(root, file)


def _convert(root: object, file: str) -> DcpMetadata:
    """What a pickled Metadata says; takes its entries out of it."""
    state = root.state if type(root) is SavedObject and root.type_name == _METADATA else None
    if type(state) is not dict:
        raise _invalid(f"it holds a {type(root).__name__}, not a torch.distributed.checkpoint Metadata", file)
    entries, places = state.get("state_dict_metadata"), state.get("storage_data")
    if type(entries) is not dict or type(places) is not dict:
        raise _invalid("it lacks state_dict_metadata or storage_data", file)
    problems = Problems()
    locations = _locations(places, file, problems)
    tensors: dict[str, DcpTensor] = {}
    objects: dict[str, DcpLocation] = {}
    for key in list(entries):
        if len(problems) >= _MAX_PROBLEMS:
            break
        entry = entries.pop(key)
        if not _is_name(key):
            shown = f"{key[:200]!a}" if type(key) is str else f"a {type(key).__name__}"
            problems.add(Code.METADATA_INVALID, f"{shown} is no name of a tensor", file=file)
        elif (saved := _state(entry, _TENSOR)) is not None:
            tensor = _tensor(key, saved, locations, file, problems)
            if tensor is not None:
                tensors[key] = tensor
        elif type(entry) is SavedObject and entry.type_name == _BYTES:
            location = locations.pop((key, None), None)
            if location is None:
                problems.add(Code.METADATA_INVALID, f"{key} has no place in any file", tensor=key, file=file)
            else:
                objects[key] = location
        else:
            problems.add(Code.METADATA_INVALID, f"the entry of {key} is neither tensor nor bytes", file=file)
    if not len(problems):  # what a broken tensor left behind is no problem of its own
        _report_strays(locations, file, problems)
    problems.raise_if_any()
    version = state.get("version")
    return DcpMetadata(tensors=tensors, objects=objects, version=version if type(version) is str else None)


def _state(value: object, type_name: str) -> tuple[Any, ...] | None:
    """The attributes of interest of a saved object of this class; None for anything else."""
    if type(value) is SavedObject and value.type_name == type_name and type(value.state) is tuple:
        return value.state
    return None


def _locations(
    places: dict[object, object], file: str, problems: Problems
) -> dict[tuple[str, Shape | None], DcpLocation]:
    found: dict[tuple[str, Shape | None], DcpLocation] = {}
    shared: dict[DcpLocation, DcpLocation] = {}  # all layers may have one object
    safe_names: set[str] = set()
    for index in list(places):
        if len(problems) >= _MAX_PROBLEMS:
            break
        place = places.pop(index)
        key = _index(index)
        if key is None or type(place) is not SavedObject or place.type_name != _STORAGE_INFO:
            problems.add(Code.METADATA_INVALID, "storage_data has an entry that is not an index and a place", file=file)
            continue
        name, offset, length, transforms = _state(place, _STORAGE_INFO) or (None, None, None, None)
        if type(name) is not str or not _is_count(offset) or not _is_count(length):
            problems.add(Code.METADATA_INVALID, f"{key[0]} has no proper place", tensor=key[0], file=file)
            continue
        if transforms:
            _report_transforms(key[0], transforms if type(transforms) is list else [], file, problems)
            continue
        if name not in safe_names:
            if not is_plain_path(name):
                _report_escape(key[0], name, file, problems)
                continue
            safe_names.add(name)
        if key in found:
            problems.add(Code.METADATA_INVALID, f"{key[0]} has two places", tensor=key[0], file=file)
        location = DcpLocation(name, offset, length)
        found[key] = location if key[1] is not None else shared.setdefault(location, location)
    return found


def _index(index: object) -> tuple[str, Shape | None] | None:
    key, start = _state(index, _INDEX) or (None, None)
    return (key, start) if _is_name(key) and (start is None or is_shape(start)) else None


def _tensor(
    key: str,
    state: tuple[Any, ...],
    locations: dict[tuple[str, Shape | None], DcpLocation],
    file: str,
    problems: Problems,
) -> DcpTensor | None:
    properties, shape, saved_chunks = state
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
        start, size = _state(saved, _CHUNK) or (None, None)
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


def _is_name(value: object) -> TypeGuard[str]:
    """Whether `value` can be a tensor's name: what cannot be printed is none, and could fool a terminal."""
    return type(value) is str and len(value) <= _MAX_NAME_LENGTH and value.isprintable()


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**63


def is_plain_path(name: str) -> bool:
    """Whether a file name from a checkpoint stays inside the checkpoint's folder, on every platform."""
    if "\\" in name or ":" in name or not name.isprintable() or len(name) > _MAX_NAME_LENGTH:
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


def _report_transforms(key: str, transforms: list[object], file: str, problems: Problems) -> None:
    shown = ", ".join(item[:40] for item in transforms if type(item) is str and item.isprintable())[:200]
    problems.add(
        Code.BACKEND_UNSUPPORTED,
        f"{key} is stored transformed ({shown})",
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


_BYTES = f"{METADATA}.BytesStorageMetadata"
_CHUNK = f"{METADATA}.ChunkStorageMetadata"
_INDEX = f"{METADATA}.MetadataIndex"
_METADATA = f"{METADATA}.Metadata"
_STORAGE_INFO = f"{FILESYSTEM}._StorageInfo"
_TENSOR = f"{METADATA}.TensorStorageMetadata"
_FIELDS = {
    _CHUNK: ("offsets", "sizes"),
    _INDEX: ("fqn", "offset"),
    _STORAGE_INFO: ("relative_path", "offset", "length", "transform_descriptors"),
    _TENSOR: ("properties", "size", "chunks"),
}

# Everything that torch 2.1 to 2.13 and megatron-core put into .metadata: `all_local_plans` of newer megatron-core
# brings the planner's classes, `mcore_data` of older ones only dicts.
_OLD_SHARDS = "torch.distributed._shard.sharded_tensor.metadata"
_INERT = {
    METADATA: (
        "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata MetadataIndex TensorProperties"
        " StorageMeta _MEM_FORMAT_ENCODING"
    ),
    FILESYSTEM: "_StorageInfo _StoragePrefix",
    _PLANNER: "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    _OLD_SHARDS: "TensorProperties MEM_FORMAT_ENCODING",
    "torch.serialization": "_get_layout",
    "pathlib": "Path PosixPath PurePosixPath",
    "pathlib._local": "Path PosixPath PurePosixPath",
}
_ENUMS = {f"{METADATA}._MEM_FORMAT_ENCODING", f"{_OLD_SHARDS}.MEM_FORMAT_ENCODING", f"{_PLANNER}.WriteItemType"}
_NAMES: dict[tuple[str, str], object] = {
    **dict.fromkeys((("builtins", "getattr"), ("__builtin__", "getattr")), enum_lookup(_ENUMS.__contains__)),
    **tensor_pickles.DTYPE_NAMES,
    **{(module, name): Reference(f"{module}.{name}") for module, names in _INERT.items() for name in names.split()},
    ("torch", "Size"): Reference("torch.Size", tensor_pickles.size_of),
    ("collections", "OrderedDict"): Reference("collections.OrderedDict", tensor_pickles.ordered_dict),
}
