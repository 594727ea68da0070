"""Where every tensor of a Hugging Face directory will lie that the ranks of a job write together.

It follows from the config, the source's headers and the options alone, so that each rank works out the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from shardway.core.dtypes import dtype_of_torch
from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats.safetensors_layout import lay_out
from shardway.formats.sharding import INDEX_FILE, HuggingFaceShard, index_json, shard_tensors
from shardway.plans.exports import default_shard_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape, StoredTensor
    from shardway.families.mapping import ModelMapping

_MIN_BITS = 16  # narrower types mean nothing without their scales


@dataclass(frozen=True, slots=True, kw_only=True)
class HFLayout:
    """The files of a directory of weights.

    Attributes:
        files: Bytes of each.
        headers: Their first bytes.
        places: For each tensor its file, the byte offset of its first element there, and its type.
        index: Content of ``model.safetensors.index.json``; empty for a single file.
    """

    files: Mapping[str, int]
    headers: Mapping[str, bytes]
    places: Mapping[str, tuple[str, int, DType]]
    index: bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    @property
    def small_files(self) -> dict[str, bytes]:
        """What goes with the weights."""
        return {INDEX_FILE: self.index} if self.index else {}

    @property
    def digest(self) -> str:
        """Tells layouts apart."""
        hasher = xxhash.xxh3_128()
        for name, header in sorted(self.headers.items()):
            hasher.update(name.encode() + b"\0" + header)
        return str(hasher.hexdigest())


def lay_out_weights(
    mapping: ModelMapping,
    source: Mapping[str, StoredTensor],
    *,
    dtype: DType | None,
    declared: str | None,
    max_shard_bytes: int | None,
) -> HFLayout:
    """Lay out the tensors of a mapping.

    Args:
        mapping: What is to be written; copies included.
        source: The tensors of the original, where it is there: their types and their division into files are kept.
        dtype: Type of all tensors; None for that of the original, else the declared one.
        declared: The type that the config declares, by torch's name.
        max_shard_bytes: Most tensor bytes in one file; None for the division of the original, else a default.

    Raises:
        ShardwayError: `config-invalid` where nothing says which type the tensors are to have.
    """
    kept = {tile.hf.tensor: mapping.dtypes.get(tile.mcore.tensor) for tile in mapping.tiles}
    dtypes: dict[str, DType] = {}
    for name in mapping.hf:
        original = source.get(name)
        if dtype is not None:
            dtypes[name] = dtype
        elif original is not None and original.dtype.floating and original.dtype.bits >= _MIN_BITS:
            dtypes[name] = original.dtype
        elif kept[name] is not None or declared is not None:
            dtypes[name] = dtype_of_torch(kept[name] or declared or "")
        else:
            what = "the config declares no dtype, and there are no original weights to take it from"
            raise ShardwayError(Problem(code=Code.CONFIG_INVALID, what=what, cure="pass dtype='bf16' or the like"))
    wanted = [(name, dtypes[name], shape) for name, shape in mapping.hf.items()]
    if max_shard_bytes is None and all(name in source for name in mapping.hf):
        shards = _as_in_the_source(wanted, source)
    else:
        shards = shard_tensors(wanted, max_shard_bytes or default_shard_bytes(wanted))
    files: dict[str, int] = {}
    headers: dict[str, bytes] = {}
    places: dict[str, tuple[str, int, DType]] = {}
    for shard in shards:
        layout = lay_out(shard.tensors, {"format": "pt"})
        files[shard.file], headers[shard.file] = layout.num_bytes, layout.header
        for (name, kind, _), offset in zip(shard.tensors, layout.offsets, strict=True):
            places[name] = shard.file, offset, kind
    index = index_json(shards) if len(shards) > 1 else b""
    return HFLayout(files=files, headers=headers, places=places, index=index)


def _as_in_the_source(
    wanted: list[tuple[str, DType, Shape]], source: Mapping[str, StoredTensor]
) -> tuple[HuggingFaceShard, ...]:
    """The division into files of the original, with the order of the tensors in each."""
    by_file: dict[str, list[tuple[int, tuple[str, DType, Shape]]]] = {}
    for item in wanted:
        chunk = source[item[0]].chunks[0]
        by_file.setdefault(chunk.file, []).append((chunk.offset, item))
    return tuple(
        HuggingFaceShard(file=file, tensors=tuple(item for _, item in sorted(items)))
        for file, items in sorted(by_file.items())
    )
