"""Tensors in the pickles of `torch.save`: what stands in for torch's functions when reading, and their opcodes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.dtypes import DType, all_dtypes
from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats.pickle_writer import (
    BINPERSID,
    EMPTY_TUPLE,
    FALSE,
    MARK,
    REDUCE,
    STOP,
    TUPLE,
    PickleWriter,
    integer,
)
from shardway.formats.pickles import Reference

if TYPE_CHECKING:
    from shardway.core.tensors import Shape


class Storage(NamedTuple):
    """A storage that a pickle names: the entry ``data/<key>``; `dtype` is None for an untyped one, counted in bytes."""

    dtype: DType | None
    key: str
    num_elements: int


class View(NamedTuple):
    """A contiguous row-major tensor in a storage."""

    storage: Storage
    dtype: DType
    start_bytes: int
    shape: Shape

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def storage_bytes(self) -> int:
        """Bytes of the whole storage."""
        return self.storage.num_elements * (self.storage.dtype.itemsize if self.storage.dtype else 1)


class _StorageClass(NamedTuple):
    dtype: DType | None


def tensor_pickle(dtype: DType, shape: Shape) -> bytes:
    """The ``data.pkl`` of a file that holds one tensor in storage 0."""
    writer = PickleWriter(2)
    return writer.start + write_tensor(writer, dtype, shape, "0") + STOP


def write_tensor(writer: PickleWriter, dtype: DType, shape: Shape, key: str) -> bytes:
    """Opcodes for a tensor that fills storage `key`."""
    num_elements = math.prod(shape)
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    if dtype.storage is not None:
        function = writer.reference("torch._utils", "_rebuild_tensor_v2")
        storage_class = ("torch", dtype.storage)
    else:
        function = writer.reference("torch._utils", "_rebuild_tensor_v3")
        storage_class = ("torch.storage", "UntypedStorage")
        num_elements *= dtype.itemsize
    parts = [MARK, writer.text("storage"), writer.reference(*storage_class), writer.text(key), writer.text("cpu")]
    parts += [
        integer(num_elements),
        b"t",
        BINPERSID,
        integer(0),
        writer.integers(shape),
        writer.integers(tuple(strides)),
    ]
    parts += [FALSE, writer.reference("collections", "OrderedDict"), EMPTY_TUPLE, REDUCE]
    if dtype.storage is None:
        parts.append(writer.reference("torch", dtype.name))
    return b"".join((function, MARK, *parts, TUPLE, REDUCE))


def storage_of_id(identity: object) -> Storage:
    """The storage that a persistent id of `torch.save` describes."""
    match identity:
        case ("storage", _StorageClass(dtype), str(key), str(_), int(num_elements)) if 0 <= num_elements < 2**63:
            return Storage(dtype, key, num_elements)
    raise ShardwayError(Problem(code=Code.PICKLE_INVALID, what="a persistent id is not that of a storage"))


def rebuild_tensor(
    storage: object,
    start: object,
    shape: object,
    strides: object,
    requires_grad: object = False,
    hooks: object = None,
    metadata: object = None,
) -> View:
    """Stands in for ``torch._utils._rebuild_tensor_v2``."""
    del requires_grad
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise _unfit("a tensor is not built on a storage of known type")
    return _rebuild(storage, storage.dtype, start, shape, strides, hooks, metadata)


def rebuild_untyped(
    storage: object,
    start: object,
    shape: object,
    strides: object,
    requires_grad: object,
    hooks: object,
    dtype: object,
    metadata: object = None,
) -> View:
    """Stands in for ``torch._utils._rebuild_tensor_v3``."""
    del requires_grad
    if not isinstance(storage, Storage) or type(dtype) is not DType:
        raise _unfit("a tensor is not built on a storage of known type")
    return _rebuild(storage, dtype, start, shape, strides, hooks, metadata)


def rebuild_parameter(data: object, requires_grad: object, hooks: object, state: object = None) -> object:
    """Stands in for ``torch._utils._rebuild_parameter``: the parameter's tensor."""
    del requires_grad, hooks, state
    return data


def rebuild_from_type(function: object, cls: object, args: object, state: object) -> object:
    """Stands in for ``torch._tensor._rebuild_from_type_v2``: a tensor with attributes, which are dropped."""
    del state
    if (
        type(function) is not Reference
        or function.make is None
        or type(cls) is not Reference
        or type(args) is not tuple
    ):
        raise _unfit("a tensor with attributes is not built from a tensor")
    if cls.name not in {"torch.Tensor", "torch.nn.parameter.Parameter"}:
        raise _unfit(f"the tensor is a {cls.name}; save a plain one")
    return function.make(*args)


def _rebuild(
    storage: Storage, dtype: DType, start: object, shape: object, strides: object, hooks: object, metadata: object
) -> View:
    sizes, steps = _integers(shape), _integers(strides)
    if sizes is None or steps is None or len(sizes) != len(steps) or type(start) is not int or start < 0 or hooks:
        raise _unfit("a tensor's shape, strides or offset are no counts")
    if metadata:
        raise _unfit("the tensor is conjugated or negated lazily; resolve it before saving (tensor.resolve_conj())")
    step = 1
    for size, actual in zip(reversed(sizes), reversed(steps), strict=True):
        if size > 1 and actual != step and 0 not in sizes:
            raise _unfit(f"the tensor of shape {list(sizes)} has strides {list(steps)}: save it contiguous")
        step *= size
    return View(storage, dtype, start * dtype.itemsize, sizes)


def _integers(values: object) -> Shape | None:
    if type(values) is not tuple or len(values) > 64:
        return None
    return values if all(type(value) is int and 0 <= value < 2**63 for value in values) else None


def size_of(values: object = ()) -> Shape:
    """Stands in for ``torch.Size``."""
    sizes = _integers(values)
    if sizes is None:
        raise ShardwayError(Problem(code=Code.PICKLE_INVALID, what="a torch.Size is not made of counts"))
    return sizes


def ordered_dict(items: object = ()) -> dict[object, object]:
    """Stands in for ``collections.OrderedDict``; items are set by opcodes of their own."""
    if items:
        raise ShardwayError(Problem(code=Code.PICKLE_INVALID, what="an OrderedDict is made from a sequence"))
    return {}


def _unfit(what: str) -> ShardwayError:
    return ShardwayError(Problem(code=Code.TORCH_FILE_INVALID, what=what, file="data.pkl"))


DTYPE_NAMES: dict[tuple[str, str], object] = {("torch", dtype.name): dtype for dtype in all_dtypes()}
TENSOR_NAMES: dict[tuple[str, str], object] = {
    **DTYPE_NAMES,
    **{("torch", dtype.storage): _StorageClass(dtype) for dtype in all_dtypes() if dtype.storage},
    ("torch.storage", "UntypedStorage"): _StorageClass(None),
    ("torch", "Size"): Reference("torch.Size", size_of),
    ("torch._utils", "_rebuild_tensor_v2"): Reference("torch._utils._rebuild_tensor_v2", rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Reference("torch._utils._rebuild_tensor_v3", rebuild_untyped),
    ("torch._utils", "_rebuild_parameter"): Reference("torch._utils._rebuild_parameter", rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Reference(
        "torch._utils._rebuild_parameter_with_state", rebuild_parameter
    ),
    ("torch._tensor", "_rebuild_from_type_v2"): Reference("torch._tensor._rebuild_from_type_v2", rebuild_from_type),
    ("torch", "Tensor"): Reference("torch.Tensor"),
    ("torch.nn.parameter", "Parameter"): Reference("torch.nn.parameter.Parameter"),
    ("collections", "OrderedDict"): Reference("collections.OrderedDict", ordered_dict),
}
