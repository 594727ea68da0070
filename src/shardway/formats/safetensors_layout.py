"""safetensors files: laying one out that is yet to be written.

Source: the format as published (safetensors README, "Format").
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.errors import Code, Problem, Problems, ShardwayError
from shardway.formats.file_problems import printable
from shardway.formats.safetensors import LENGTH_BYTES, MAX_HEADER_BYTES, METADATA

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape

_ENTRIES_AT_ONCE = 1000  # as JSON an entry takes a quarter of what it takes as objects


class SafetensorsLayout(NamedTuple):
    """Where everything goes in a safetensors file that is yet to be written.

    Attributes:
        header: The first bytes of the file, up to where the data starts.
        offsets: Absolute byte offset of each tensor, in the order in which the tensors were given.
        num_bytes: Bytes of the whole file.
    """

    header: bytes
    offsets: tuple[int, ...]
    num_bytes: int


def lay_out(tensors: Sequence[tuple[str, DType, Shape]], metadata: Mapping[str, str]) -> SafetensorsLayout:
    """Lay out a safetensors file in which every tensor is aligned to its element size.

    Like the reference writer, puts the tensors of the widest elements first (otherwise in the given order) and pads
    the header with spaces to a multiple of 8 bytes.

    Args:
        tensors: Name, dtype and shape (elements) of each tensor.
        metadata: The ``__metadata__`` to write; transformers wants ``{"format": "pt"}``.

    Returns:
        The header's bytes and the absolute byte offset of each tensor, in the order of `tensors`.

    Raises:
        ShardwayError: `dtype-unsupported` for a dtype that the format can't hold, `tensor-duplicate`, or
            `safetensors-header` for a name or a header that no reader would accept.
    """
    _check_writable(tensors)
    entries: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    members: list[bytes] = []
    begins = [0] * len(tensors)
    position = 0
    for index in sorted(range(len(tensors)), key=lambda index: -tensors[index][1].bits):
        name, dtype, shape = tensors[index]
        begins[index] = position
        position += dtype.num_bytes(math.prod(shape))
        entries[name] = {"dtype": dtype.safetensors, "shape": shape, "data_offsets": (begins[index], position)}
        if len(entries) == _ENTRIES_AT_ONCE:
            members.append(_members(entries))
            entries = {}
    if entries:
        members.append(_members(entries))
    raw = b",".join(members)
    del members
    padding = b" " * (-(len(raw) + 2) % LENGTH_BYTES)
    header_bytes = len(raw) + 2 + len(padding)
    if header_bytes > MAX_HEADER_BYTES:
        what = f"the header of {len(tensors)} tensors takes {header_bytes} bytes; readers accept {MAX_HEADER_BYTES}"
        cure = "choose a smaller shard size, so that each file holds fewer tensors"
        raise ShardwayError(Problem(code=Code.SAFETENSORS_HEADER, what=what, cure=cure))
    data_start = LENGTH_BYTES + header_bytes
    return SafetensorsLayout(
        header=b"".join((header_bytes.to_bytes(LENGTH_BYTES, "little"), b"{", raw, b"}", padding)),
        offsets=tuple(data_start + begin for begin in begins),
        num_bytes=data_start + position,
    )


def _members(entries: Mapping[str, object]) -> bytes:
    """Entries of a header as they stand between its braces."""
    try:
        return json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()[1:-1]
    except UnicodeEncodeError as error:
        what = f"a name or metadata is not valid Unicode: {printable(error.object[: error.end][-100:])}"
        raise ShardwayError(Problem(code=Code.SAFETENSORS_HEADER, what=what)) from None


def _check_writable(tensors: Sequence[tuple[str, DType, Shape]]) -> None:
    problems = Problems()
    seen: set[str] = set()
    for name, dtype, shape in tensors:
        shown = printable(name)
        if name in seen:
            problems.add(Code.TENSOR_DUPLICATE, f"tensor {shown} is to be written twice to one file", tensor=name)
        seen.add(name)
        if name == METADATA:
            problems.add(Code.SAFETENSORS_HEADER, f"no tensor can be called {METADATA}", tensor=name)
        if dtype.safetensors is None:
            problems.add(
                Code.DTYPE_UNSUPPORTED,
                f"tensor {shown} is {dtype.name}, which safetensors can't hold",
                tensor=name,
                cure="leave the tensor out, or convert it to another dtype first",
            )
        elif math.prod(shape) * dtype.bits % 8:
            problems.add(
                Code.DTYPE_UNSUPPORTED,
                f"tensor {shown} ends inside a byte: {math.prod(shape)} elements of {dtype.bits} bits",
                tensor=name,
                facts=(f"dtype {dtype.name}, shape {list(shape)}",),
            )
    problems.raise_if_any()
