"""Stored tensors: where in which file the elements of a named tensor lie, whatever the format."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from shardway.core.dtypes import DType

Shape = tuple[int, ...]


class Chunk(NamedTuple):
    """A box of a tensor that lies row-major and contiguous in a file.

    Attributes:
        start: First index of the box on each axis of the tensor.
        size: Extent of the box on each axis.
        file: Path relative to the checkpoint's root.
        offset: Byte offset in the file of the box's first element.
    """

    start: Shape
    size: Shape
    file: str
    offset: int


class StoredTensor(NamedTuple):
    """A tensor on disk: its type, its global shape, and chunks that together cover it exactly once."""

    name: str
    dtype: DType
    shape: Shape
    chunks: tuple[Chunk, ...]

    @property
    def num_elements(self) -> int:
        """Number of elements of the global tensor."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the global tensor's elements."""
        return self.dtype.num_bytes(math.prod(self.shape))


class Catalog(NamedTuple):
    """The tensors of a checkpoint, by name, with the directory that their chunks' file names are relative to."""

    root: Path
    tensors: Mapping[str, StoredTensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def num_elements(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.num_elements for tensor in self.tensors.values())
