"""Laying chunks and objects down in ``.distcp`` files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.tensors import Chunk
from shardway.formats.dcp import DcpChunk, DcpLocation
from shardway.formats.torch_file import tensor_blob_frame
from shardway.plans.chunking import assign_files
from shardway.plans.model import TargetFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardway.core.boxes import Box
    from shardway.core.dtypes import DType


class Blob(NamedTuple):
    """A chunk that is to be laid down.

    Attributes:
        key: Key of its tensor.
        box: Which part of the tensor it is.
        dtype: The tensor's type.
        align: Its first element comes to lie at a multiple of this many bytes ...
        phase: ... and so many bytes.
    """

    key: str
    box: Box
    dtype: DType
    align: int
    phase: int


@dataclass(slots=True)
class Laid:
    """Where everything goes.

    Attributes:
        chunks: By key.
        dcp: The same as ``.metadata`` describes them.
        blob_offsets: Where the blob of a chunk starts, by the chunk's file and offset.
        targets: The files.
        objects: Where each object is.
    """

    chunks: dict[str, list[Chunk]] = field(default_factory=dict)
    dcp: dict[str, list[DcpChunk]] = field(default_factory=dict)
    blob_offsets: dict[tuple[str, int], int] = field(default_factory=dict)
    targets: list[TargetFile] = field(default_factory=list)
    objects: list[DcpLocation] = field(default_factory=list)


def lay_out(blobs: Sequence[Blob], objects: Sequence[bytes], max_file_bytes: int) -> Laid:
    """Give everything its file and place: objects first, then chunks in their order, files filled evenly.

    Args:
        blobs: The chunks.
        objects: Files of `torch.save`.
        max_file_bytes: No file grows larger, unless a single chunk or object does.
    """
    laid = Laid()
    name, at = _file_name(0), 0
    literals: tuple[tuple[int, bytes], ...] = ()
    for contents in objects:
        if at and at + len(contents) > max_file_bytes:
            laid.targets.append(TargetFile(name, at, literals))
            name, at, literals = _file_name(len(laid.targets)), 0, ()
        laid.objects.append(DcpLocation(name, at, len(contents)))
        literals = (*literals, (at, contents))
        at += len(contents)
    last = 0
    sizes = [blob.box.num_elements * blob.dtype.itemsize for blob in blobs]
    for number, (key, box, dtype, align, phase) in zip(assign_files(sizes, max_file_bytes), blobs, strict=True):
        frame = tensor_blob_frame(dtype, box.size, offset=at, align=align, phase=phase)
        if number != last or (at and at + frame.length > max_file_bytes):
            laid.targets.append(TargetFile(name, at, literals))
            name, at, literals, last = _file_name(len(laid.targets)), 0, (), number
            frame = tensor_blob_frame(dtype, box.size, offset=at, align=align, phase=phase)
        chunk = Chunk(box.start, box.size, name, at + len(frame.head))
        laid.chunks.setdefault(key, []).append(chunk)
        laid.dcp.setdefault(key, []).append(DcpChunk(box.start, box.size, DcpLocation(name, at, frame.length)))
        laid.blob_offsets[name, chunk.offset] = at
        at += frame.length
    laid.targets.append(TargetFile(name, at, literals))
    return laid


def _file_name(number: int) -> str:
    return f"__0_{number}.distcp"
