"""What a conversion may be told, parsed and checked."""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, TypeVar

from shardway.core.dtypes import BFLOAT16, FLOAT16, FLOAT32
from shardway.core.errors import Code, Problem, ShardwayError

if TYPE_CHECKING:
    from shardway.core.dtypes import DType

_Choice = TypeVar("_Choice", bound=enum.StrEnum)
_DTYPES = {"bf16": BFLOAT16, "fp16": FLOAT16, "fp32": FLOAT32}
_DTYPES |= {dtype.name: dtype for dtype in _DTYPES.values()}
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{infix}B": base ** (power + 1)
    for infix, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("KMGT")
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class IfExists(enum.StrEnum):
    """What to do when the destination is there already."""

    ERROR = "error"
    REUSE = "reuse"
    REPLACE = "replace"


class Spec(enum.StrEnum):
    """Whose layers a Megatron model is made of; they store a few norms under different names."""

    TE = "te"
    LOCAL = "local"


class For(enum.StrEnum):
    """Who is to take an imported checkpoint as its own."""

    BRIDGE = "megatron-bridge"
    MEGATRON_LM = "megatron-lm"


def choice(name: str, value: str, allowed: type[_Choice]) -> _Choice:
    """A member of an enumeration by its value.

    Raises:
        ShardwayError: `option-invalid`, with the values that are allowed.
    """
    try:
        return allowed(value)
    except ValueError:
        raise invalid_option(name, value, "one of " + ", ".join(allowed)) from None


def parse_dtype(value: str) -> DType | None:
    """The dtype that ``--dtype`` names; None for ``auto``.

    Raises:
        ShardwayError: `option-invalid`.
    """
    if value == "auto":
        return None
    if value not in _DTYPES:
        raise invalid_option("dtype", value, "one of auto, bf16, fp16, fp32")
    return _DTYPES[value]


def parse_size(name: str, value: str | int) -> int:
    """Bytes, from a number or text such as ``"5GB"`` (1000s) or ``"4GiB"`` (1024s).

    Raises:
        ShardwayError: `option-invalid`, also for less than one byte.
    """
    match = _SIZE.fullmatch(str(value))
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if match is None or match[2].lower() not in units or isinstance(value, bool):
        raise invalid_option(name, value, "a size such as 5GB or 4GiB")
    num_bytes = int(float(match[1]) * units[match[2].lower()])
    if num_bytes < 1:
        raise invalid_option(name, value, "at least one byte")
    return num_bytes


def parse_shard_size(value: str | int) -> int | None:
    """Bytes of ``--max-shard-size``; None for ``auto``.

    Raises:
        ShardwayError: `option-invalid`.
    """
    return None if value == "auto" else parse_size("max_shard_size", value)


def invalid_option(name: str, value: object, expected: str) -> ShardwayError:
    """The error of an option with a value that it can't have."""
    return ShardwayError(Problem(code=Code.OPTION_INVALID, what=f"{name}={value!r}; expected {expected}"))
