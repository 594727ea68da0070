"""Opening a checkpoint of either kind by looking at what the directory holds."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

from shardway.core.dtypes import UINT8
from shardway.core.errors import ShardwayError
from shardway.core.tensors import Catalog, Chunk, StoredTensor
from shardway.formats.huggingface import HuggingFaceCheckpoint, open_huggingface
from shardway.formats.iterations import find_iteration
from shardway.formats.torch_dist import TRACKER, TorchDistCheckpoint, open_torch_dist
from shardway.plans.matching import is_training_state
from shardway.plans.streams import chunk_problems
from shardway.run.source import Snapshot

if TYPE_CHECKING:
    from pathlib import Path

Checkpoint = HuggingFaceCheckpoint | TorchDistCheckpoint


def is_megatron(path: Path) -> bool:
    """Whether a directory looks like a Megatron checkpoint: its root, or an iteration folder."""
    if (path / ".metadata").is_file() or (path / TRACKER).is_file() or (path / "metadata.json").is_file():
        return True
    return path.is_dir() and any(path.glob("iter_*/.metadata"))


def is_model_state(key: str) -> bool:
    """Whether a key of a Megatron checkpoint belongs to the model, not to the training run."""
    return not is_training_state(key)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face directory, or a Megatron root or iteration folder; prove that its chunks cover its tensors.

    Raises:
        ShardwayError: What is wrong with it, all problems together.
    """
    if not is_megatron(path):
        return open_huggingface(path)
    checkpoint = open_torch_dist(path, wanted=is_model_state)
    problems = chunk_problems(checkpoint.catalog.tensors.values())
    if problems:
        raise ShardwayError(problems)
    return checkpoint


def snapshot_of(path: Path) -> Snapshot:
    """A snapshot of the directory that `open_checkpoint` would read.

    Raises:
        ShardwayError: What `find_iteration` raises.
    """
    if is_megatron(path):
        with contextlib.suppress(OSError):  # opening it will tell
            path = find_iteration(path)
    return Snapshot(path)


def in_whole_bytes(catalog: Catalog) -> Catalog:
    """The catalog with tensors of elements smaller than a byte presented as the bytes that hold them."""
    tensors = {
        name: tensor if tensor.dtype.bits % 8 == 0 else _as_bytes(tensor) for name, tensor in catalog.tensors.items()
    }
    return Catalog(root=catalog.root, tensors=tensors)


def _as_bytes(tensor: StoredTensor) -> StoredTensor:
    shape = (tensor.dtype.num_bytes(math.prod(tensor.shape)),)
    (chunk,) = tensor.chunks
    return StoredTensor(tensor.name, UINT8, shape, (Chunk((0,), shape, chunk.file, chunk.offset),))
