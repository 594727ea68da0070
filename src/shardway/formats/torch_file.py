"""Tensors inside files of `torch.save`: found without reading their bytes, framed without copying them."""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats.pickles import load_pickle
from shardway.formats.tensor_pickles import TENSOR_NAMES, View, storage_of_id, tensor_pickle
from shardway.formats.zips import (
    END_BYTES,
    Entry,
    ZipInvalidError,
    central_entry,
    content_offset,
    directory_end,
    local_entry,
    local_header,
    local_header_bytes,
    read_directory,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape

MAX_PICKLE_BYTES = 32 << 20
_MAX_TENSOR_PICKLE_BYTES = 16 << 10  # of one tensor; torch writes 150 to 250 bytes, and they are cached
_MAX_TENSOR_DIRECTORY_BYTES = 4 << 10  # of one tensor; torch writes 400 bytes for its half-dozen entries
_ONE_READ_BYTES = 8192  # blobs up to here are read whole: one read costs less than two
_HEAD_BYTES = 2048  # torch puts data.pkl and the header of the first tensor in the first 700 bytes
_MAX_PADDING = 2**15  # the header counts it in 16 bits
_TAIL_BYTES = 1024  # and 561 bytes of directory at the end


class TensorBlob(NamedTuple):
    """Where the elements of a tensor lie that `torch.save` wrote.

    Attributes:
        dtype: Type of its elements.
        shape: Its shape; the elements are row-major and contiguous.
        data_offset: Byte offset of the first element in the file (not in the blob).
        num_bytes: Bytes of its elements.
    """

    dtype: DType
    shape: Shape
    data_offset: int
    num_bytes: int


class TensorFrame(NamedTuple):
    """The bytes around a tensor's elements that make a file of `torch.save`: `head`, the elements, `tail`."""

    head: bytes
    tail: bytes
    num_bytes: int

    @property
    def length(self) -> int:
        """Bytes of the whole blob."""
        return len(self.head) + self.num_bytes + len(self.tail)


def read_tensor_blob(fd: int, offset: int, length: int, *, file: str, tensor: str) -> TensorBlob:
    """Where the elements of one `torch.save(tensor)` lie, with all sizes proven to fit; the elements are not read.

    Args:
        fd: An open file.
        offset: Byte offset of the blob in it.
        length: Bytes of the blob.
        file: The file to name in errors.
        tensor: The tensor to name in errors.

    Returns:
        Type, shape and place of the elements.

    Raises:
        ShardwayError: `torch-file-invalid`, `pickle-forbidden`, `pickle-invalid` or `dtype-unsupported`.

    Source: torch/serialization.py `_save`, torch/_utils.py `_rebuild_tensor_v2` (2.13).
    """

    def read(at: int, size: int) -> bytes:
        return os.pread(fd, max(0, min(size, length - at)), offset + at)

    if offset < 0 or length < 0 or offset + length >= 2**63:
        raise _invalid("its place is no place in a file", file, tensor, offset, length)
    if length <= _ONE_READ_BYTES:
        head = tail = os.pread(fd, length, offset)
        wanted = length
    else:
        head = os.pread(fd, _HEAD_BYTES, offset)
        tail = os.pread(fd, _TAIL_BYTES, offset + length - _TAIL_BYTES)
        wanted = _TAIL_BYTES
    if len(tail) != wanted:
        raise _cut_off(file, tensor, offset, length)
    try:
        entries = read_directory(tail, length, read, _MAX_TENSOR_DIRECTORY_BYTES)
        prefix, data = open_archive(entries, head, read, _MAX_TENSOR_PICKLE_BYTES)
        try:
            view = _view_of_pickle(data)
        except ShardwayError as error:
            raise _located(error, file, tensor) from None
        name = prefix + b"/data/" + view.storage.key.encode()
        place = storage_offset(entries, name, view, head, read)
    except ZipInvalidError as error:
        raise _invalid(str(error), file, tensor, offset, length) from None
    return TensorBlob(view.dtype, view.shape, offset + place, view.num_bytes)


def tensor_blob_frame(dtype: DType, shape: Shape, *, offset: int = 0, align: int = 64, phase: int = 0) -> TensorFrame:
    """The bytes that go before and after a tensor's elements so that `torch.load` reads the whole as the tensor.

    The first element comes to lie at a file offset that is `phase` modulo `align`.

    Args:
        dtype: Type of the elements.
        shape: Shape of the tensor.
        offset: Byte offset in the file at which the blob will start.
        align: Bytes, at most 32,768; 64 as torch does, or a filesystem's block size where extents are to be shared.
        phase: Bytes, below `align`.

    Returns:
        Head, tail and the number of bytes that go between.

    Raises:
        ShardwayError: `dtype-unsupported` for elements smaller than a byte.
    """
    return _framed(dtype, shape, _padding(_template(dtype, shape), offset, align, phase))


def tensor_blob_extent(dtype: DType, shape: Shape, *, offset: int, align: int, phase: int) -> tuple[int, int]:
    """Bytes before the elements, and of the whole blob, that `tensor_blob_frame` would frame, without framing it."""
    template = _template(dtype, shape)
    head = template.min_head + _padding(template, offset, align, phase)
    return head, head + template.num_bytes + len(template.central) + END_BYTES


def find_framed(fd: int, offset: int, length: int, dtype: DType, shape: Shape) -> int | None:
    """Where the elements of a tensor lie whose blob is, byte for byte, what `tensor_blob_frame` makes; None otherwise.

    Half the time of `read_tensor_blob`, which understands what others have written.

    Args:
        fd: An open file.
        offset: Byte offset of the blob in it.
        length: Bytes of the blob.
        dtype: Type of the elements.
        shape: Shape of the tensor.

    Returns:
        Byte offset of the first element in the file (not in the blob).

    Raises:
        OSError: The file can't be read.
    """
    if dtype.bits % 8 or offset < 0 or not math.prod(shape) * dtype.itemsize <= length < 2**63 - offset:
        return None
    template = _template(dtype, shape)
    before = length - template.num_bytes - len(template.central) - END_BYTES
    if not template.min_head + 4 <= before <= template.min_head + _MAX_PADDING:
        return None
    head, tail, _ = tensor_blob_frame(dtype, shape, align=_MAX_PADDING, phase=before % _MAX_PADDING)
    if os.pread(fd, len(head), offset) != head or os.pread(fd, len(tail), offset + length - len(tail)) != tail:
        return None
    return offset + len(head)


def _padding(template: _Template, offset: int, align: int, phase: int) -> int:
    return 4 + (phase - offset - template.min_head - 4) % align


class _Template(NamedTuple):
    before: bytes
    min_head: int
    central: bytes
    num_bytes: int


_DATA = b"archive/data/0"


@lru_cache(maxsize=256)
def _framed(dtype: DType, shape: Shape, padding: int) -> TensorFrame:
    """The frame with this padding, which experts and layers that lie alike in their files share."""
    template = _template(dtype, shape)
    head = template.before + local_header(_DATA, template.num_bytes, padding)
    start = len(head) + template.num_bytes
    return TensorFrame(head, template.central + directory_end(4, len(template.central), start), template.num_bytes)


@lru_cache(maxsize=4096)
def _template(dtype: DType, shape: Shape) -> _Template:
    num_bytes = math.prod(shape) * dtype.itemsize
    before, central = b"", b""
    small = (
        (b"archive/data.pkl", tensor_pickle(dtype, shape)),
        (b"archive/byteorder", b"little"),
        (b"archive/version", b"3\n"),
    )
    for name, content in small:
        entry = local_entry(name, content)
        central += central_entry(name, len(before), len(content), int.from_bytes(entry[14:18], "little"))
        before += entry
    central += central_entry(_DATA, len(before), num_bytes)
    return _Template(before, len(before) + local_header_bytes(_DATA, num_bytes), central, num_bytes)


def open_archive(
    entries: dict[bytes, Entry], head: bytes, read: Callable[[int, int], bytes], most: int = MAX_PICKLE_BYTES
) -> tuple[bytes, bytes]:
    """The archive's name, which is the folder of its first entry, and its pickle of at most `most` bytes."""
    first = next(reversed(entries), b"")  # read_directory collects from the last entry to the first
    prefix = first.partition(b"/")[0]
    name = prefix + b"/data.pkl"
    data = _content(entries, name, head, read, most)
    order = prefix + b"/byteorder"
    if order in entries and _content(entries, order, head, read, 16) != b"little":
        raise ZipInvalidError("it was written by a big-endian machine")
    return prefix, data


def _content(
    entries: dict[bytes, Entry], name: bytes, head: bytes, read: Callable[[int, int], bytes], most: int
) -> bytes:
    entry = entries.get(name)
    if entry is None:
        raise ZipInvalidError(f"it has no entry {name.decode('utf-8', 'replace')!r}")
    if entry.size > most:
        raise ZipInvalidError(f"entry {name.decode('utf-8', 'replace')!r} has {entry.size:,} bytes; at most {most:,}")
    start = content_offset(entry, name, head, read)
    if start + entry.size <= len(head):
        return head[start : start + entry.size]
    data = read(start, entry.size)
    if len(data) != entry.size:
        raise ZipInvalidError(f"entry {name.decode('utf-8', 'replace')!r} is cut off")
    return data


def storage_offset(
    entries: dict[bytes, Entry], name: bytes, view: View, head: bytes, read: Callable[[int, int], bytes]
) -> int:
    """Offset from the archive's start of a view's first element."""
    entry = entries.get(name)
    if entry is None:
        raise ZipInvalidError(f"it has no entry {name.decode('utf-8', 'replace')!r}")
    if entry.size != view.storage_bytes:
        raise ZipInvalidError(
            f"storage {view.storage.key[:80]!a} should have {view.storage_bytes:,} bytes, has {entry.size:,}"
        )
    if view.start_bytes + view.num_bytes > entry.size:
        raise ZipInvalidError(
            f"a tensor of shape {list(view.shape)} ends at byte {view.start_bytes + view.num_bytes:,} "
            f"of a storage of {entry.size:,}"
        )
    return content_offset(entry, name, head, read) + view.start_bytes


@lru_cache(maxsize=4096)
def _view_of_pickle(data: bytes) -> View:
    """The tensor of a ``data.pkl``; chunks of the same type and shape share the same bytes, hence the cache."""
    view = load_pickle(data, allowed=TENSOR_NAMES, persistent=storage_of_id, file="data.pkl")
    if type(view) is not View:
        raise ShardwayError(Problem(code=Code.TORCH_FILE_INVALID, what="the file does not hold one tensor"))
    return view


def _cut_off(file: str, tensor: str, offset: int, length: int) -> ShardwayError:
    return ShardwayError(
        Problem(
            code=Code.DISTCP_TRUNCATED,
            what=f"the file ends before {tensor} does",
            tensor=tensor,
            file=file,
            facts=(f"it should go on to byte {offset + length:,}",),
            cure="the file is cut off: copy or save it again",
        )
    )


def _invalid(what: str, file: str, tensor: str, offset: int, length: int) -> ShardwayError:
    return ShardwayError(
        Problem(
            code=Code.TORCH_FILE_INVALID,
            what=f"cannot read {tensor}: {what}",
            tensor=tensor,
            file=file,
            facts=(f"bytes {offset:,} to {offset + length:,} of the file should hold one torch.save(tensor)",),
            cure="the file is damaged or was not written by torch.save: copy or save it again",
        )
    )


def _located(error: ShardwayError, file: str, tensor: str) -> ShardwayError:
    """`error` with the file and the tensor that the cached parser does not know."""
    return ShardwayError(
        Problem(
            code=problem.code,
            what=f"cannot read {tensor}: {problem.what}",
            tensor=tensor,
            file=file,
            facts=problem.facts,
            cure=problem.cure or "save the tensor again with torch.save",
        )
        for problem in error.problems
    )
