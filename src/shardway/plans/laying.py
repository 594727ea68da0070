"""Laying chunks and objects down in ``.distcp`` files."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.tensors import Chunk
from shardway.formats.dcp import DcpChunk, DcpLocation, DcpTensor
from shardway.formats.torch_file import tensor_blob_extent
from shardway.plans.chunking import assign_files
from shardway.plans.model import TargetFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shardway.core.boxes import Box
    from shardway.core.dtypes import DType
    from shardway.core.tensors import StoredTensor


class Blob(NamedTuple):
    """A chunk that is to be laid down.

    Attributes:
        place: Its place in an order of blobs; those of the same are ordered by key and box.
        key: Key of its tensor.
        box: Which part of the tensor it is.
        dtype: The tensor's type.
        align: Its first element comes to lie at a multiple of this many bytes ...
        phase: ... and so many bytes.
        first_tile: What the numbers of its tiles count from, as a place in the mosaic.
        tiles: Those of the tiles that reach into it, where they are known; some that don't may be among them.
    """

    place: int
    key: str
    box: Box
    dtype: DType
    align: int
    phase: int
    first_tile: int = 0
    tiles: Sequence[int] = ()


class Laid:
    """Where everything goes.

    Attributes:
        targets: The files.
        objects: Where each object is.
        edges: By file, where the blobs of chunks start, one after the other, and where the last one ends.
    """

    def __init__(self) -> None:
        self.targets: list[TargetFile] = []
        self.objects: list[DcpLocation] = []
        self.edges: dict[str, array[int]] = {}

    def blob(self, chunk: Chunk) -> tuple[int, int]:
        """Where the blob of a chunk starts in its file, and its size in bytes."""
        edges = self.edges[chunk.file]
        past = bisect_right(edges, chunk.offset)
        return edges[past - 1], edges[past] - edges[past - 1]

    def blob_offset(self, chunk: Chunk) -> int:
        """Where the blob of a chunk starts in its file."""
        return self.blob(chunk)[0]


class Described(Mapping[str, DcpTensor]):
    """Tensors as ``.metadata`` describes them, each made when it is asked for.

    Args:
        tensors: By key, with the chunks that were laid down.
        laid: Where their blobs are.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], laid: Laid) -> None:
        self._tensors = tensors
        self._laid = laid

    def __getitem__(self, key: str) -> DcpTensor:
        _, dtype, shape, chunks = self._tensors[key]
        blob = self._laid.blob
        return DcpTensor(dtype, shape, tuple(DcpChunk(c.start, c.size, DcpLocation(c.file, *blob(c))) for c in chunks))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def lay_out(
    blobs: Sequence[Blob], objects: Sequence[bytes], max_file_bytes: int
) -> tuple[Laid, dict[str, list[Chunk]]]:
    """Give everything its file and place: objects first, then chunks in their order, files filled evenly.

    Args:
        blobs: The chunks.
        objects: Files of `torch.save`.
        max_file_bytes: No file grows larger, unless a single chunk or object does.

    Returns:
        Where everything goes, and the chunks by key, in the order of the blobs.
    """
    laid = Laid()
    chunks: dict[str, list[Chunk]] = {}
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
    edges = laid.edges[name] = array("Q")
    sizes = [math.prod(box.size) * dtype.itemsize for _, _, box, dtype, *_ in blobs]
    for number, (_, key, box, dtype, align, phase, *_) in zip(assign_files(sizes, max_file_bytes), blobs, strict=True):
        head, length = tensor_blob_extent(dtype, box.size, offset=at, align=align, phase=phase)
        if number != last or (at and at + length > max_file_bytes):
            laid.targets.append(TargetFile(name, at, literals))
            edges.append(at)
            name, at, literals, last = _file_name(len(laid.targets)), 0, (), number
            edges = laid.edges[name] = array("Q")
            head, length = tensor_blob_extent(dtype, box.size, offset=at, align=align, phase=phase)
        chunks.setdefault(key, []).append(Chunk(box.start, box.size, name, at + head))
        edges.append(at)
        at += length
    edges.append(at)
    laid.targets.append(TargetFile(name, at, literals))
    return laid, chunks


def _file_name(number: int) -> str:
    return f"__0_{number}.distcp"
