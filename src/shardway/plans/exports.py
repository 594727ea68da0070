"""Planning an export: a Megatron torch_dist iteration folder in, a Hugging Face checkpoint out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.dtypes import dtype_of_torch
from shardway.core.errors import Problems
from shardway.core.tensors import Catalog, Chunk, StoredTensor
from shardway.formats.quantised import QUANTIZATION_CONFIG, without_quantisation
from shardway.formats.safetensors_layout import lay_out
from shardway.formats.sharding import INDEX_FILE, index_json, shard_tensors
from shardway.plans.imports import config_with_dtype
from shardway.plans.matching import match_megatron, padded_rows
from shardway.plans.model import Direction, Plan, TargetFile
from shardway.plans.requantised import block_of, names_to_quantise, plan_requantised, stored_as
from shardway.plans.streams import build_streams, chunk_problems
from shardway.plans.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape
    from shardway.families.mapping import ModelMapping

_LARGEST_SHARD_BYTES = 5 * 10**9
_SMALLEST_SHARD_BYTES = 512 * 10**6
_SHARDS = 8


class ExportOptions(NamedTuple):
    """What an export may be told.

    Attributes:
        dtype: Type to cast floating-point tensors to; None keeps every tensor's bits.
        max_shard_bytes: No safetensors file holds more tensor bytes, unless a single tensor has. None: 5 GB, or less
            where that makes eight files of at least 512 MB, so that threads need not write to one file.
        weights: Which copy of the weights is meant, where a training checkpoint holds two.
        quantize: Whether what came from FP8 blocks is quantised again.
    """

    dtype: DType | None = None
    max_shard_bytes: int | None = None
    weights: Weights = Weights.MODEL
    quantize: bool = False


def plan_export(
    source: Catalog,
    mapping: ModelMapping,
    config: Mapping[str, object],
    copied_files: tuple[tuple[str, str], ...],
    copies: Mapping[str, str],
    narrowed: Mapping[str, str],
    quantised: Mapping[str, tuple[str, ...]],
    destination: Path,
    options: ExportOptions,
) -> Plan:
    """Plan an export completely; nothing is read but what `source` holds already.

    Args:
        source: The weights, found and checked; rows beyond the mapping's vocabulary are cut off.
        mapping: The model's mapping in the checkpoint's layout.
        config: The Hugging Face config that goes with it.
        copied_files: Files to go along: name in the destination, and path.
        copies: Tensors that the original held as copies of another one (name: which one), to be restored.
        narrowed: Tensors that the original held in another type than Megatron does, and that type by torch's name.
        quantised: By scheme, the tensors that the original held quantised.
        destination: The directory to be.
        options: What the user chose.

    Raises:
        ShardwayError: Everything that is missing, unexpected, misshapen or not covered once, together;
            `option-invalid` where there is nothing to quantise.
    """
    problems = Problems()
    padded = padded_rows(mapping, source.tensors)
    match_megatron(mapping._replace(mcore={**mapping.mcore, **padded}), source.tensors, problems)
    problems.extend(chunk_problems(source.tensors.values()))
    problems.raise_if_any()
    mapping = mapping.with_copies(copies)
    dtypes: dict[str, DType] = {}
    for tile in mapping.tiles:
        stored = source.tensors[tile.mcore.tensor].dtype
        name = tile.hf.tensor
        if options.dtype is not None and stored.floating:
            dtypes[name] = options.dtype
        else:
            dtypes[name] = dtype_of_torch(narrowed[name]) if name in narrowed else stored
    names = names_to_quantise(quantised, mapping.hf) if options.quantize else frozenset()
    block, _ = block_of(config) if names else ((1, 1), False)
    tensors, targets, index = _lay_out(mapping.hf, dtypes, names, block, options.max_shard_bytes)
    small_files = {INDEX_FILE: index} if index is not None else {}
    if options.dtype is not None or (QUANTIZATION_CONFIG in config and not names):
        plain = config if names else without_quantisation(config)
        small_files["config.json"] = config_with_dtype(plain, options.dtype)
        copied_files = tuple(file for file in copied_files if file[0] != "config.json")
    notes = tuple(_notes(source, mapping, dtypes, narrowed, padded, config, names))
    del dtypes  # as large as all that building streams takes
    carried = [tile for tile in mapping.tiles if tile.hf.tensor not in names] if names else mapping.tiles
    streams = build_streams(carried, tensors, source.tensors).with_pieces()
    made = plan_requantised(names, config, mapping.tiles, tensors, source.tensors, streams) if names else None
    return Plan(
        direction=Direction.EXPORT,
        hf=Catalog(root=destination, tensors=tensors),
        mcore=source,
        streams=streams,
        shifts=mapping.shifts,
        targets=tuple(targets),
        small_files=small_files,
        copied_files=copied_files,
        notes=notes,
        requantised=made,
    )


def _lay_out(
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, DType],
    quantised: Collection[str],
    block: tuple[int, int],
    max_shard_bytes: int | None,
) -> tuple[dict[str, StoredTensor], list[TargetFile], bytes | None]:
    """Give every tensor its file and place.

    Args:
        shapes: Shape of every tensor, by name, in the order in which they are written.
        dtypes: Their types.
        quantised: Those that are written as codes and scales.
        block: Rows and columns that have a scale in common.
        max_shard_bytes: As `ExportOptions` has it.

    Returns:
        The tensors in their places, the files, and the index where there are several.
    """
    wanted = []
    for name, shape in shapes.items():
        wanted += stored_as(name, shape, block) if name in quantised else [(name, dtypes[name], shape)]
    shards = shard_tensors(wanted, max_shard_bytes or default_shard_bytes(wanted))
    tensors: dict[str, StoredTensor] = {}
    targets = []
    origins: dict[int, Shape] = {}  # by the number of axes
    for shard in shards:
        layout = lay_out(shard.tensors, {"format": "pt"})
        targets.append(TargetFile(shard.file, layout.num_bytes, ((0, layout.header),)))
        for (name, dtype, shape), offset in zip(shard.tensors, layout.offsets, strict=True):
            origin = origins.setdefault(len(shape), (0,) * len(shape))
            chunk = Chunk(origin, shape, shard.file, offset)
            tensors[name] = StoredTensor(name, dtype, shape, (chunk,))
    return tensors, targets, index_json(shards) if len(shards) > 1 else None


def default_shard_bytes(tensors: list[tuple[str, DType, Shape]]) -> int:
    """The default limit of a shard: a few files that threads can write side by side, none too large to handle."""
    total = sum(dtype.num_bytes(math.prod(shape)) for _, dtype, shape in tensors)
    return min(_LARGEST_SHARD_BYTES, max(_SMALLEST_SHARD_BYTES, -(-total // _SHARDS)))


def _notes(
    source: Catalog,
    mapping: ModelMapping,
    dtypes: Mapping[str, DType],
    narrowed: Mapping[str, str],
    padded: Mapping[str, Shape],
    config: Mapping[str, object],
    names: Collection[str],
) -> list[str]:
    cast: dict[tuple[str, str], set[str]] = {}
    for tile in mapping.tiles:
        stored, written = source.tensors[tile.mcore.tensor].dtype, dtypes[tile.hf.tensor]
        if stored is not written and tile.hf.tensor not in narrowed and tile.hf.tensor not in names:
            cast.setdefault((stored.name, written.name), set()).add(tile.hf.tensor)
    notes = [f"{len(names)} tensors were cast from {old} to {new}" for (old, new), names in cast.items()]
    if QUANTIZATION_CONFIG in config and not names:
        notes.append(f"{QUANTIZATION_CONFIG} was left out of config.json: the weights are not quantised")
    for name, (rows, *_) in padded.items():
        wanted = mapping.mcore[name][0]
        notes.append(f"{name} has {rows:,} rows for the config's {wanted:,} tokens; the padding was cut off")
    return notes
