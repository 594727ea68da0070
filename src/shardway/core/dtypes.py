"""Element types: one table that joins the names of torch, safetensors, torch's storages and numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np


class DType:
    """An element type; there is one of each, also after a copy or a pickle.

    Attributes:
        name: torch's name, such as ``"bfloat16"``.
        bits: Bits of one element of a shape as safetensors counts it (4 for the two halves of a packed fp4 pair).
        safetensors: The tag in a safetensors header, or None where the format has none.
        storage: The class in `torch` that a pickled tensor of this type names; None where torch pickles an
            ``UntypedStorage`` and passes the dtype to ``_rebuild_tensor_v3``.
        floating: Whether it is a real floating-point type, which ``--dtype`` may cast.
        numpy_name: The name that numpy with ml_dtypes knows it by, or None where there is no array form.
    """

    __slots__ = ("bits", "floating", "name", "numpy_name", "safetensors", "storage")

    def __init__(
        self,
        name: str,
        bits: int,
        safetensors: str | None,
        storage: str | None,
        floating: bool,
        numpy_name: str | None,
    ) -> None:
        self.name = name
        self.bits = bits
        self.safetensors = safetensors
        self.storage = storage
        self.floating = floating
        self.numpy_name = numpy_name

    def __repr__(self) -> str:
        return f"DType({self.name!r})"

    def __reduce__(self) -> tuple[Callable[[str], DType], tuple[str]]:
        return dtype_of_torch, (self.name,)

    def num_bytes(self, num_elements: int) -> int:
        """Bytes that `num_elements` elements take, rounded up to whole bytes."""
        return (num_elements * self.bits + 7) // 8

    @property
    def itemsize(self) -> int:
        """Bytes of one element; only byte-sized types have one (`ShardwayError` otherwise)."""
        if self.bits % 8:
            raise ShardwayError(
                Problem(code=Code.DTYPE_UNSUPPORTED, what=f"{self.name} packs elements into less than a byte each")
            )
        return self.bits // 8

    def numpy(self) -> np.dtype[np.generic]:
        """The numpy dtype (ml_dtypes for bfloat16 and the 8-bit floats); imports numpy on first use."""
        import ml_dtypes
        import numpy as np

        if self.numpy_name is None:
            raise ShardwayError(
                Problem(code=Code.DTYPE_UNSUPPORTED, what=f"{self.name} has no array form; its bytes can only be moved")
            )
        return np.dtype(getattr(ml_dtypes, self.numpy_name, self.numpy_name))


# Source: safetensors' Dtype enum (safetensors/src/tensor.rs, 0.6), torch/storage.py `_dtype_to_storage_type_map`
# and torch/serialization.py of torch 2.13. 6-bit floats exist in safetensors alone; torch's bits*, *int1-7 and
# quantised types can't be stored in a checkpoint of either kind with their meaning intact and are left out.
_TABLE = (
    DType("bool", 8, "BOOL", "BoolStorage", False, "bool"),
    DType("uint8", 8, "U8", "ByteStorage", False, "uint8"),
    DType("int8", 8, "I8", "CharStorage", False, "int8"),
    DType("int16", 16, "I16", "ShortStorage", False, "int16"),
    DType("uint16", 16, "U16", None, False, "uint16"),
    DType("int32", 32, "I32", "IntStorage", False, "int32"),
    DType("uint32", 32, "U32", None, False, "uint32"),
    DType("int64", 64, "I64", "LongStorage", False, "int64"),
    DType("uint64", 64, "U64", None, False, "uint64"),
    DType("float16", 16, "F16", "HalfStorage", True, "float16"),
    DType("bfloat16", 16, "BF16", "BFloat16Storage", True, "bfloat16"),
    DType("float32", 32, "F32", "FloatStorage", True, "float32"),
    DType("float64", 64, "F64", "DoubleStorage", True, "float64"),
    DType("float8_e4m3fn", 8, "F8_E4M3", None, True, "float8_e4m3fn"),
    DType("float8_e5m2", 8, "F8_E5M2", None, True, "float8_e5m2"),
    DType("float8_e4m3fnuz", 8, "F8_E4M3FNUZ", None, True, "float8_e4m3fnuz"),
    DType("float8_e5m2fnuz", 8, "F8_E5M2FNUZ", None, True, "float8_e5m2fnuz"),
    DType("float8_e8m0fnu", 8, "F8_E8M0", None, True, "float8_e8m0fnu"),
    DType("float4_e2m1fn_x2", 4, "F4", None, False, None),
    DType("float6_e2m3", 6, "F6_E2M3", None, False, None),
    DType("float6_e3m2", 6, "F6_E3M2", None, False, None),
    DType("complex32", 32, None, None, False, None),
    DType("complex64", 64, "C64", "ComplexFloatStorage", False, "complex64"),
    DType("complex128", 128, None, "ComplexDoubleStorage", False, "complex128"),
)
_BY_NAME = {dtype.name: dtype for dtype in _TABLE}
_BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in _TABLE if dtype.safetensors}

BFLOAT16 = _BY_NAME["bfloat16"]
FLOAT16 = _BY_NAME["float16"]
FLOAT32 = _BY_NAME["float32"]
UINT8 = _BY_NAME["uint8"]


def all_dtypes() -> tuple[DType, ...]:
    """Every element type that shardway knows."""
    return _TABLE


def dtype_of_torch(name: str) -> DType:
    """The dtype that torch calls `name` (``"bfloat16"``; a leading ``"torch."`` is allowed).

    Raises:
        ShardwayError: `dtype-unknown` for any other name; there is no default.
    """
    return _look_up(_BY_NAME, name.removeprefix("torch."), "torch")


def dtype_of_safetensors(tag: str) -> DType:
    """The dtype that a safetensors header calls `tag` (``"BF16"``).

    Raises:
        ShardwayError: `dtype-unknown` for any other tag; there is no default.
    """
    return _look_up(_BY_SAFETENSORS, tag, "safetensors")


def _look_up(table: dict[str, DType], name: str, kind: str) -> DType:
    try:
        return table[name]
    except (KeyError, TypeError):
        known = ", ".join(sorted(table))
        raise ShardwayError(
            Problem(code=Code.DTYPE_UNKNOWN, what=f"unknown {kind} dtype {name!r}", facts=(f"known: {known}",))
        ) from None
