"""The plan: streams of a checkpoint's bytes in the order of the Megatron side, and the files that they fill."""

from __future__ import annotations

import enum
import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from shardway.core.boxes import Box
    from shardway.core.dtypes import DType
    from shardway.core.tensors import Catalog, Chunk
    from shardway.core.tiles import Tile
    from shardway.formats.quantised import Quantised
    from shardway.plans.requantised import Requantised


class Direction(enum.Enum):
    """Which side is read and which is written."""

    IMPORT = "import"  # Hugging Face to Megatron
    EXPORT = "export"  # Megatron to Hugging Face
    COMPARE = "compare"  # both are read


class Piece(NamedTuple):
    """A tile, or the part of one that lies in one slab and in one chunk of the Hugging Face tensor."""

    tile: Tile
    hf: Chunk


class Stream(NamedTuple):
    """A slab of a Megatron tensor: a box that is contiguous in the tensor's row-major order.

    It is the unit of streaming: its chunks are read or written from first byte to last, so that their digests can be
    taken as the bytes pass, and the pieces on the other side are reached wherever they lie.

    Attributes:
        tensor: Key of the Megatron tensor.
        dtype: Its element type.
        box: The slab; its chunks cover it exactly once.
        chunks: Where it lies on the Megatron side. One, unless chunks interleave (tensor-parallel columns).
        cut: Finds the pieces; it is the longest part of making a stream, and many who look at streams don't ask.
    """

    tensor: str
    dtype: DType
    box: Box
    chunks: tuple[Chunk, ...]
    cut: Callable[[], tuple[Piece, ...]]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Where it lies on the Hugging Face side; found anew each time."""
        return self.cut()

    @property
    def num_bytes(self) -> int:
        """Bytes of the slab on the Megatron side."""
        return self.dtype.num_bytes(math.prod(self.box.size))


def _no_blob(chunk: Chunk) -> int:
    raise RuntimeError(f"no blob frames {chunk}: it is not to be written")


class TargetFile(NamedTuple):
    """A file to be written: its size and the literal bytes in it; the streams fill the rest.

    Attributes:
        name: Path relative to the destination's root.
        num_bytes: Its size.
        literals: (byte offset, bytes) to be written as they are.
    """

    name: str
    num_bytes: int
    literals: tuple[tuple[int, bytes], ...] = ()


class Plan(NamedTuple):
    """All that an executor needs to move one checkpoint; it decides nothing itself.

    Attributes:
        direction: Which side is read.
        hf: The tensors of the Hugging Face side, where they are or will be.
        mcore: The same of the Megatron side.
        streams: The work, file by file in the order of the bytes of the Megatron side; they may be made when they are
            asked for, and not kept.
        targets: The large files to be created.
        small_files: Further files of the destination, whole: path relative to its root and contents.
        copied_files: Files to be copied as they are: destination path and source path, each relative to its root.
        shifts: Megatron tensors whose values are the source's plus a number, computed in float32, and that number.
        copies: Hugging Face tensors that must be bit-equal copies of another one before anything is published.
        notes: What a user should know about the result, one sentence each.
        blob_offset: Of a chunk that is to be written, the byte offset in its file of the blob that frames it.
        quantised: Hugging Face tensors whose values are computed from what is stored, and what that is.
        requantised: Of an export: what is quantised; no stream writes it.
    """

    direction: Direction
    hf: Catalog
    mcore: Catalog
    streams: Sequence[Stream]
    targets: tuple[TargetFile, ...] = ()
    small_files: Mapping[str, bytes] = {}
    copied_files: tuple[tuple[str, str], ...] = ()
    shifts: Mapping[str, float] = {}
    copies: Mapping[str, str] = {}
    notes: tuple[str, ...] = ()
    blob_offset: Callable[[Chunk], int] = _no_blob
    quantised: Mapping[str, Quantised] = {}
    requantised: Requantised | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of tensors on the Megatron side that the streams carry, and of codes that are made."""
        made = self.requantised.num_bytes if self.requantised is not None else 0
        return sum(stream.num_bytes for stream in self.streams) + made

    @property
    def disk_bytes(self) -> int:
        """Bytes that the destination will take."""
        return sum(target.num_bytes for target in self.targets) + sum(map(len, self.small_files.values()))
