"""Small files of `torch.save` read into plain values and written from them: common.pt, train_state.pt, extra state."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

from shardway.core.dtypes import DType
from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats import tensor_pickles, torch_file
from shardway.formats.pickle_writer import (
    APPENDS,
    EMPTY_DICT,
    EMPTY_LIST,
    FALSE,
    MARK,
    NEW_OBJECT,
    NONE,
    SETITEMS,
    STOP,
    TRUE,
    PickleWriter,
    integer,
    real,
)
from shardway.formats.pickles import Reference, SavedObject, enum_lookup, load_pickle
from shardway.formats.small_files import read_small_file
from shardway.formats.zips import (
    Entry,
    ZipInvalidError,
    archive,
    read_directory,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shardway.core.tensors import Shape

MAX_FILE_BYTES = 256 << 20
_MAX_DEPTH = 100
_MAX_MEMBERS = 50_000  # of all sets: whoever chooses numbers can make their hashes collide
_MAX_VALUES = 2_000_000  # counted as if nothing were shared: what a reader that prints or copies it has to visit


class SavedTensor:
    """A small tensor with its bytes, row-major and little-endian."""

    __slots__ = ("data", "dtype", "shape")

    def __init__(self, dtype: DType, shape: Shape, data: bytes) -> None:
        self.dtype = dtype
        self.shape = shape
        self.data = data

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SavedTensor):
            return NotImplemented
        return (self.dtype, self.shape, self.data) == (other.dtype, other.shape, other.data)

    def __hash__(self) -> int:
        return hash((self.dtype, self.shape, self.data))

    def __repr__(self) -> str:
        return f"SavedTensor({self.dtype.name}, {list(self.shape)}, {len(self.data)} bytes)"

    def item(self) -> bool | int | float:
        """The only element of a tensor of one element.

        Raises:
            ShardwayError: `shape-mismatch` for more or fewer elements, `dtype-unsupported` for exotic types.
        """
        if len(self.data) != self.dtype.itemsize:
            what = f"a tensor of shape {list(self.shape)} is not one number"
            raise ShardwayError(Problem(code=Code.SHAPE_MISMATCH, what=what))
        if self.dtype.name == "bfloat16":
            return float(struct.unpack("<f", b"\0\0" + self.data)[0])
        code = _STRUCT_CODES.get(self.dtype.name)
        if code is None:
            what = f"a {self.dtype.name} element has no Python value"
            raise ShardwayError(Problem(code=Code.DTYPE_UNSUPPORTED, what=what))
        value: bool | int | float = struct.unpack("<" + code, self.data)[0]
        return value


_STRUCT_CODES = {
    "bool": "?", "uint8": "B", "int8": "b", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I", "int64": "q",
    "uint64": "Q", "float16": "e", "float32": "f", "float64": "d",
}  # fmt: skip


def read_torch_file(path: Path) -> object:
    """The object in a small file of `torch.save`; nothing that it names is imported or executed.

    Args:
        path: A regular file of at most 256 MiB.

    Returns:
        See `read_torch_bytes`.

    Raises:
        ShardwayError: `file-missing`, `file-unreadable` or what `read_torch_bytes` raises.
    """
    return read_torch_bytes(read_small_file(path, MAX_FILE_BYTES), file=str(path))


def read_torch_bytes(data: bytes, *, file: str) -> object:
    """The object in the bytes of a `torch.save`; nothing that it names is imported or executed.

    Args:
        data: All bytes.
        file: The file to name in errors.

    Returns:
        None, bools, numbers, strings, bytes, tuples, lists, dicts (also for OrderedDict and defaultdict) and sets;
        `SavedTensor` for tensors, `DType` for torch dtypes, a tuple for torch.Size, `SavedObject` for enum members,
        argparse.Namespace and other objects of a closed list of classes, `Reference` for their functions and classes.

    Raises:
        ShardwayError: `torch-file-invalid`, `pickle-forbidden` or `pickle-invalid`.
    """
    if data[:4] != b"PK\x03\x04":
        legacy = data[:2] == b"\x80\x02" or data[:1] == b"\x80"
        raise _invalid("it is in the legacy form of torch.save, before torch 1.6" if legacy else "it is no zip", file)

    def read(at: int, size: int) -> bytes:
        return data[at : at + size] if at >= 0 else b""

    try:
        entries = read_directory(data, len(data), read)
        prefix, pickle = torch_file.open_archive(entries, data, read)
    except ZipInvalidError as error:
        raise _invalid(str(error), file) from None
    archive = _Archive(data, entries, prefix, file)
    value = load_pickle(
        pickle,
        allowed={**_NAMES, **archive.names()},
        file=file,
        persistent=tensor_pickles.storage_of_id,
        inert_packages=_INERT_PACKAGES,
    )
    _check_tree(value, file)
    return value


class _Archive:
    """An open file of `torch.save`, and what its pickle may call to copy bytes out of it, within a budget.

    Without the budget a small pickle that asks for the same large tensor again and again would fill the memory.
    """

    def __init__(self, data: bytes, entries: dict[bytes, Entry], prefix: bytes, file: str) -> None:
        self._data = data
        self._entries = entries
        self._prefix = prefix
        self._file = file
        self._budget = MAX_FILE_BYTES
        self._num_members = 0

    def names(self) -> dict[tuple[str, str], object]:
        """The names whose stand-ins copy."""
        calls: dict[tuple[str, str], Callable[..., object]] = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor_v2,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_v3,
            ("_codecs", "encode"): self._bytes,
        }
        for module in ("builtins", "__builtin__"):
            calls |= {(module, name): self._bytes for name in ("bytes", "bytearray")}
            calls |= {(module, name): self._set for name in ("set", "frozenset")}
        return {(module, name): Reference(f"{module}.{name}", make) for (module, name), make in calls.items()}

    def _charge(self, num_bytes: int) -> None:
        self._budget -= num_bytes
        if self._budget < 0:
            raise _invalid(f"its values take more than {MAX_FILE_BYTES:,} bytes", self._file)

    def _tensor_v2(self, *args: Any) -> SavedTensor:
        return self._tensor(tensor_pickles.rebuild_tensor(*args))

    def _tensor_v3(self, *args: Any) -> SavedTensor:
        return self._tensor(tensor_pickles.rebuild_untyped(*args))

    def _tensor(self, view: tensor_pickles.View) -> SavedTensor:
        name = self._prefix + b"/data/" + view.storage.key.encode()
        try:
            start = torch_file.storage_offset(self._entries, name, view, self._data, self._read)
        except ZipInvalidError as error:
            raise _invalid(str(error), self._file) from None
        self._charge(view.num_bytes)
        return SavedTensor(view.dtype, view.shape, self._data[start : start + view.num_bytes])

    def _read(self, at: int, size: int) -> bytes:
        return self._data[at : at + size]

    def _bytes(self, text: object = b"", encoding: object = "latin1") -> bytes:
        if type(text) is bytes:
            return text
        if type(text) is not str or encoding not in ("latin1", "latin-1"):
            raise _bad_call("bytes")
        self._charge(len(text))
        return text.encode("latin1")

    def _set(self, items: object = ()) -> set[object]:
        if type(items) is not list or not all(type(item) in (str, int, float, bool, bytes) for item in items):
            raise _bad_call("set")
        self._num_members += len(items)
        if self._num_members > _MAX_MEMBERS:
            raise _invalid(f"its sets have more than {_MAX_MEMBERS:,} members", self._file)
        self._charge(256)
        return set(items)


_CONTAINERS = (dict, list, tuple, set, frozenset, SavedObject)


def _check_tree(value: object, file: str) -> None:
    """Refuse values that contain themselves, are nested absurdly, or expand to absurd sizes."""
    sizes: dict[int, int] = {}  # values seen, by identity; -1 while their parts are being visited
    pending: list[tuple[object, bool]] = [(value, False)]
    depth = 0
    while pending:
        item, done = pending.pop()
        if done:
            depth -= 1
            sizes[id(item)] = total = 1 + sum(sizes.get(id(part)) or _leaf(part) for part in _parts(item))
            if total > _MAX_VALUES:
                raise _invalid(f"it expands to more than {_MAX_VALUES:,} values", file)
            continue
        known = sizes.get(id(item))
        if known == -1:
            raise _invalid("a value contains itself", file)
        parts = _parts(item) if known is None else ()
        if parts:
            depth += 1
            if depth > _MAX_DEPTH:
                raise _invalid(f"its values are nested more than {_MAX_DEPTH} deep", file)
            sizes[id(item)] = -1
            pending.append((item, True))
            pending.extend((part, False) for part in parts if part and isinstance(part, _CONTAINERS))
            if len(sizes) > _MAX_VALUES:
                raise _invalid(f"it holds more than {_MAX_VALUES:,} values", file)


def _leaf(value: object) -> int:
    return 1 + len(value) // 64 if isinstance(value, str | bytes) else 1


def _parts(value: object) -> tuple[object, ...]:
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(value)
    return (value.args, value.state) if type(value) is SavedObject else ()


def write_torch_file(value: object, *, name: str = "archive") -> bytes:
    """The bytes of a `torch.save` of a plain value; `torch.load(weights_only=True)` reads them back.

    Args:
        value: None, bools, numbers, strings, tuples, lists, dicts, `DType`, `SavedTensor`, and `SavedObject` without
            arguments, such as argparse.Namespace (which torch then loads with ``weights_only=False`` only).
        name: The folder in the archive; torch uses the file's stem.

    Returns:
        A zip archive.
    """
    emitter = _Emitter()
    pickle = emitter.writer.start + emitter.value(value) + STOP
    pieces = [(b"data.pkl", pickle), (b"byteorder", b"little")]
    pieces += [(b"data/%d" % number, tensor.data) for number, tensor in enumerate(emitter.tensors)]
    pieces.append((b"version", b"3\n"))
    for tensor in emitter.tensors:
        if len(tensor.data) != tensor.dtype.num_bytes(math.prod(tensor.shape)):
            raise ValueError(f"{len(tensor.data)} bytes for a {tensor.dtype.name} tensor of shape {list(tensor.shape)}")
    return archive(name.encode(), pieces)


class _Emitter:
    def __init__(self) -> None:
        self.writer = PickleWriter(2)
        self.tensors: list[SavedTensor] = []

    def value(self, value: object) -> bytes:
        writer = self.writer
        match value:
            case None:
                return NONE
            case bool():
                return TRUE if value else FALSE
            case int():
                return integer(value)
            case float():
                return real(value)
            case str():
                return writer.text(value)
            case DType():
                return writer.reference("torch", value.name)
            case SavedTensor():
                self.tensors.append(value)
                return tensor_pickles.write_tensor(writer, value.dtype, value.shape, str(len(self.tensors) - 1))
            case tuple():
                return writer.sequence([self.value(item) for item in value])
            case list():
                return b"".join((EMPTY_LIST, MARK, *[self.value(item) for item in value], APPENDS))
            case dict():
                items = [self.value(part) for item in value.items() for part in item]
                return b"".join((EMPTY_DICT, MARK, *items, SETITEMS))
            case SavedObject() if not value.args and isinstance(value.state, dict):
                cls = writer.reference(*value.type_name.rsplit(".", 1)) + NEW_OBJECT
                return cls + self.value(value.state) + b"b"
        raise TypeError(f"cannot write a {type(value).__name__} as torch.save would")


def _invalid(what: str, file: str) -> ShardwayError:
    return ShardwayError(
        Problem(
            code=Code.TORCH_FILE_INVALID,
            what=f"cannot read it as a file of torch.save: {what}",
            file=file,
            cure="the file is damaged or was not written by torch.save: copy or save it again",
        )
    )


# What the pickles of these files may call, by stand-ins that only build plain values. Protocol 2, which torch.save
# uses, writes some built-in types under their Python 2 names.


def _bad_call(name: str) -> ShardwayError:
    return ShardwayError(
        Problem(code=Code.PICKLE_INVALID, what=f"{name} is called with other arguments than pickle writes")
    )


def _deque(items: object = (), most: object = None) -> list[object]:
    del most
    if type(items) is list:
        return items
    if items != ():
        raise _bad_call("deque")
    return []


def _complex(real_part: object, imaginary_part: object) -> complex:
    if type(real_part) is not float or type(imaginary_part) is not float:
        raise _bad_call("complex")
    return complex(real_part, imaginary_part)


def _default_dict(factory: object = None) -> dict[object, object]:
    del factory
    return {}


_CALLS: dict[str, dict[str, Callable[..., object]]] = {
    "builtins": {"complex": _complex},
    "collections": {"OrderedDict": tensor_pickles.ordered_dict, "defaultdict": _default_dict, "deque": _deque},
}
# Kept as what they are called with. Megatron-LM's `args` name some of them; the factories of defaultdicts the others.
_INERT = {
    "builtins": "int float bool str list dict tuple slice range",
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "functools": "partial",
    "signal": "Signals",
    "datetime": "datetime date time timedelta timezone",
    "pathlib": "Path PosixPath PurePosixPath WindowsPath PureWindowsPath",
    "torch": "device strided contiguous_format channels_last preserve_format",
    "torch.serialization": "_get_layout",
    "numpy": "dtype",
    "numpy.core.multiarray": "scalar",
}
_RENAMED = {
    "builtins": "__builtin__",
    "pathlib": "pathlib._local",
    "numpy.core.multiarray": "numpy._core.multiarray",
}
# Enums, dataclasses and functions of these packages differ from release to release; as nothing is imported, any
# name inside them can stand for itself.
_INERT_PACKAGES = ("megatron.", "transformer_engine.", "torch.nn.functional.", "torch._C._nn.")


def _is_inert(name: str) -> bool:
    return name.startswith(_INERT_PACKAGES)


def _table() -> dict[tuple[str, str], object]:
    table = {
        (module, name): Reference(f"{module}.{name}") for module, names in _INERT.items() for name in names.split()
    }
    for module, calls in _CALLS.items():
        table |= {(module, name): Reference(f"{module}.{name}", make) for name, make in calls.items()}
    for module, other in _RENAMED.items():
        table |= {(other, name): value for (own, name), value in table.items() if own == module}
    table |= dict.fromkeys((("builtins", "getattr"), ("__builtin__", "getattr")), enum_lookup(_is_inert))
    for old, new in (("xrange", "range"), ("long", "int"), ("unicode", "str")):
        table[("__builtin__", old)] = table[("builtins", new)]
    return {**tensor_pickles.TENSOR_NAMES, **table}


_NAMES = _table()
