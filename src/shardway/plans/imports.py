"""Planning an import: a Hugging Face checkpoint in, a Megatron torch_dist iteration folder out."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.dtypes import dtype_of_torch
from shardway.core.errors import Code, Problems
from shardway.core.tensors import Catalog, StoredTensor
from shardway.families.bridge import TRAINED_IN, BridgeVersion, run_config
from shardway.families.megatron_lm import args_of
from shardway.formats.dcp import write_metadata
from shardway.formats.huggingface import is_tokenizer_file
from shardway.formats.iterations import TRAIN_STATE
from shardway.formats.quantised import copy_problems, dequantised_notes
from shardway.formats.run_config import RUN_CONFIG, run_config_yaml
from shardway.formats.torch_dist import common_pt, extra_state, metadata_json, train_state_pt
from shardway.plans.chunking import chunks_for, layer_chunks
from shardway.plans.laying import Blob, Described, lay_out
from shardway.plans.matching import match_huggingface
from shardway.plans.model import Direction, Plan
from shardway.plans.streams import BLOCK_BYTES, build_streams, chunk_streams

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Chunk
    from shardway.families.mapping import ModelMapping
    from shardway.families.parallel import Parallelism
    from shardway.formats.huggingface import HuggingFaceCheckpoint
    from shardway.plans.laying import Laid
    from shardway.plans.streams import Streams

HF_FOLDER = "hf"
TOKENIZER_FOLDER = "tokenizer"
_ALIGN = 64
_ALIGN_WORTHWHILE_BYTES = 2**16
_MAX_FRAME_BYTES = 2 * BLOCK_BYTES  # a head with its padding, and a tail


class ImportOptions(NamedTuple):
    """What an import may be told.

    Attributes:
        dtype: Type to cast floating-point tensors to; None keeps every tensor's bits.
        iteration: Number of the iteration folder; None for ``release``.
        bridge: The Megatron Bridge that is to take the checkpoint as its own; None for none.
        megatron_lm: Whether Megatron-LM is to find its arguments in it.
        tokenizer: What those are to load the tokenizer from: a name on the Hub, or a directory.
        max_file_bytes: No ``.distcp`` file grows larger, but for the least: one chunk of 4 KiB and what frames it.
        parallel: The job along whose shards chunks are cut; None for one chunk for each layer and expert.
    """

    dtype: DType | None = None
    iteration: int | None = 0
    bridge: BridgeVersion | None = BridgeVersion.V0_7
    megatron_lm: bool = False
    tokenizer: str = TOKENIZER_FOLDER
    max_file_bytes: int = 4 * 2**30
    parallel: Parallelism | None = None


def plan_import(
    source: HuggingFaceCheckpoint, mapping: ModelMapping, destination: Path, options: ImportOptions
) -> Plan:
    """Plan an import completely; nothing is read but what `source` holds already.

    Args:
        source: The checkpoint, its headers read and checked.
        mapping: The model's mapping, in the layout and form that are wanted.
        destination: The iteration folder to be.
        options: What the user chose.

    Raises:
        ShardwayError: Everything that is missing, unexpected, misshapen, unsupported or mixed, together.
    """
    problems = Problems()
    problems.extend(source.faults)
    matched = match_huggingface(mapping, source.catalog.tensors, problems)
    problems.extend(copy_problems(matched.copies, source))
    problems.raise_if_any()
    dtypes = _dtypes(source.catalog.tensors, mapping, options.dtype, problems)
    problems.raise_if_any()

    laid, chunks, streams = _lay_out(source, mapping, dtypes, options)
    catalog = Catalog(
        root=destination,
        tensors={
            key: StoredTensor(key, dtypes[key], shape, tuple(chunks.pop(key))) for key, shape in mapping.mcore.items()
        },
    )
    if streams is None:
        streams = build_streams(mapping.tiles, source.catalog.tensors, catalog.tensors, importing=True)
    trained_in = options.dtype.name if options.dtype is not None else _usual_dtype(source.catalog.tensors)
    args = _args(mapping, trained_in, options) if options.megatron_lm else None
    small_files = {
        ".metadata": write_metadata(
            Described(catalog.tensors, laid), dict.fromkeys(mapping.extra_state, laid.objects[0])
        ),
        "metadata.json": metadata_json(),
        "common.pt": common_pt(options.iteration or 0, mapping.content_metadata, args),
        TRAIN_STATE: train_state_pt(options.iteration or 0),
    }
    copied = {f"{HF_FOLDER}/{file.name}": file.name for file in source.small_files}
    if options.bridge is not None:
        document = run_config(mapping, trained_in, options.tokenizer, options.bridge)
        small_files[RUN_CONFIG] = run_config_yaml(document)
        tokenizer = (file.name for file in source.small_files if is_tokenizer_file(file.name))
        copied |= {f"{TOKENIZER_FOLDER}/{name}": name for name in tokenizer}
    if options.dtype is not None:
        small_files[f"{HF_FOLDER}/config.json"] = config_with_dtype(source.config, options.dtype)
        del copied[f"{HF_FOLDER}/config.json"]
    return Plan(
        direction=Direction.IMPORT,
        hf=source.catalog,
        mcore=catalog,
        streams=streams,
        targets=tuple(laid.targets),
        small_files=small_files,
        copied_files=tuple(copied.items()),
        shifts=mapping.shifts,
        copies=matched.copies,
        notes=tuple(_notes(source, mapping, options.dtype, matched.left_out)),
        blob_offset=laid.blob_offset,
        quantised=source.quantised,
    )


def _usual_dtype(tensors: Mapping[str, StoredTensor]) -> str | None:
    """What most elements are, where that is a type that Megatron trains in."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        counts[tensor.dtype.name] = counts.get(tensor.dtype.name, 0) + tensor.num_elements
    usual = max(counts, key=lambda name: counts[name], default="")
    return usual if usual in TRAINED_IN else None


def _args(mapping: ModelMapping, trained_in: str | None, options: ImportOptions) -> dict[str, object]:
    dtype = dtype_of_torch(trained_in or "float32")
    return args_of(mapping.megatron_config, options.tokenizer) | {
        "params_dtype": dtype,
        "bf16": dtype.name == "bfloat16",
        "fp16": dtype.name == "float16",
        "iteration": options.iteration or 0,
    }


def config_with_dtype(config: Mapping[str, object], dtype: DType | None) -> bytes:
    """A config.json that declares `dtype`, under the key that it used already; None leaves it as it is."""
    if dtype is None:
        return (json.dumps(config, indent=2) + "\n").encode()
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return (json.dumps({**config, key: dtype.name}, indent=2, sort_keys=True) + "\n").encode()


def _dtypes(
    tensors: Mapping[str, StoredTensor], mapping: ModelMapping, wanted: DType | None, problems: Problems
) -> dict[str, DType]:
    """The type of every Megatron tensor; tensors that would need two are problems."""
    parts: dict[str, dict[DType, str]] = {}
    pinned = {key: dtype_of_torch(name) for key, name in mapping.dtypes.items()}
    for tile in mapping.tiles:
        dtype = tensors[tile.hf.tensor].dtype
        held = pinned.get(tile.mcore.tensor)
        if held is not None and dtype.bits > held.bits:
            problems.add(
                Code.DTYPE_UNSUPPORTED,
                f"{tile.hf.tensor} is {dtype.name}; Megatron holds it in {held.name}, which can't express that",
                tensor=tile.hf.tensor,
                file=tensors[tile.hf.tensor].chunks[0].file,
                cure=f"cast it to {held.name} in the source",
            )
        parts.setdefault(tile.mcore.tensor, {}).setdefault(held or wanted or dtype, tile.hf.tensor)
    for key, found in parts.items():
        if len(found) > 1:
            problems.add(
                Code.DTYPE_MIXED,
                f"{key} is made of tensors of different dtypes",
                tensor=key,
                facts=[f"{name} is {dtype.name}" for dtype, name in found.items()],
                cure="choose one dtype with --dtype, or, where layers differ, keep them apart with --layout per-layer",
            )
    return {key: next(iter(found)) for key, found in parts.items()}


def widened(source: HuggingFaceCheckpoint, mapping: ModelMapping) -> dict[str, str]:
    """Tensors that Megatron holds in a wider type than the source does, and the source's type by torch's name."""
    found = {}
    for tile in mapping.tiles:
        held = mapping.dtypes.get(tile.mcore.tensor)
        dtype = source.catalog.tensors[tile.hf.tensor].dtype.name
        if held is not None and held != dtype:
            found[tile.hf.tensor] = dtype
    return found


def _lay_out(
    source: HuggingFaceCheckpoint,
    mapping: ModelMapping,
    dtypes: Mapping[str, DType],
    options: ImportOptions,
) -> tuple[Laid, dict[str, list[Chunk]], Streams | None]:
    """Give every chunk its file and place, in the order of the model's layers.

    Returns:
        Where everything goes, the chunks by key, and the streams, unless chunks are cut for a job.
    """
    order = {name: place for place, name in enumerate(mapping.hf)}
    tensors = source.catalog.tensors
    most = max(options.max_file_bytes - _MAX_FRAME_BYTES, BLOCK_BYTES)
    parallel = options.parallel
    chunks = chunks_for(parallel, mapping, dtypes, most) if parallel else layer_chunks(mapping, dtypes, most)
    blobs: list[Blob] = []
    for key, box, leader, first_tile, tiles in chunks:
        dtype = dtypes[key]
        align, phase = _phase(tensors[leader], math.prod(box.size) * dtype.itemsize, dtype)
        blobs.append(Blob(order[leader], key, box, dtype, align, phase, first_tile, tiles))
    blobs.sort()
    laid, found = lay_out(blobs, [extra_state()], options.max_file_bytes)
    return laid, found, None if parallel else chunk_streams(blobs, found, mapping.tiles, tensors)


def _phase(tensor: StoredTensor, num_bytes: int, dtype: DType) -> tuple[int, int]:
    """Alignment and place in it of a chunk's first element, so that a filesystem can share the source's blocks."""
    if num_bytes < _ALIGN_WORTHWHILE_BYTES or dtype is not tensor.dtype:
        return _ALIGN, 0
    offset = tensor.chunks[0].offset
    return (BLOCK_BYTES, offset % BLOCK_BYTES) if offset % 8 == 0 else (_ALIGN, 0)


def _notes(
    source: HuggingFaceCheckpoint, mapping: ModelMapping, wanted: DType | None, left_out: tuple[str, ...]
) -> list[str]:
    notes = [*mapping.caveats, *dequantised_notes(source)]
    found: dict[str, int] = {}
    held = {tile.hf.tensor: mapping.dtypes.get(tile.mcore.tensor) for tile in mapping.tiles} if mapping.dtypes else {}
    for name in mapping.hf:
        dtype = source.catalog.tensors[name].dtype.name
        if dtype != held.get(name) and name not in source.quantised:
            found[dtype] = found.get(dtype, 0) + 1
    declared = source.config.get("dtype", source.config.get("torch_dtype"))
    if wanted is not None:
        changed = {dtype: count for dtype, count in found.items() if dtype != wanted.name}
        notes += [f"{count} tensors were cast from {dtype} to {wanted.name}" for dtype, count in changed.items()]
    elif isinstance(declared, str):
        declared = declared.removeprefix("torch.")
        notes += [
            f"{count} tensors are {dtype} although config.json says {declared}; their bits were kept"
            for dtype, count in found.items()
            if dtype != declared
        ]
    if left_out:
        notes.append(f"{len(left_out)} buffers that the config determines were left out, such as {left_out[0]}")
    if source.left_out:
        listed = ", ".join(source.left_out[:4]) + (", ..." if len(source.left_out) > 4 else "")
        notes.append(f"{len(source.left_out)} files of the source were not carried along: {listed}")
    return notes
