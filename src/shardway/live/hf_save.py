"""Saving a live model as a Hugging Face directory: the protocol of `save.py`, with other files."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch.distributed as dist

from shardway.core.errors import ShardwayError
from shardway.families.config import HFConfig
from shardway.formats.huggingface import CONFIG_FILE, open_huggingface
from shardway.formats.quantised import QUANTIZATION_CONFIG, present, without_quantisation
from shardway.live.blocks import synchronise
from shardway.live.export import held
from shardway.live.hf_folder import HuggingFaceFolder
from shardway.live.hf_layout import lay_out_weights
from shardway.live.rendezvous import save_together
from shardway.live.save import CheckpointConfig, SaveReport, job_id, meeting_place
from shardway.live.saving import Needed, SaveIdentity, SaveOptions
from shardway.plans.imports import config_with_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from shardway.core.dtypes import DType
    from shardway.core.tensors import StoredTensor
    from shardway.families.mapping import ModelMapping
    from shardway.live.rendezvous import StoreLike
    from shardway.live.save import Companions

_DEFAULT_TIMEOUT_MINUTES = 10.0


def save_huggingface(
    model: nn.Module | Sequence[nn.Module],
    path: str | os.PathLike[str],
    *,
    companions: Companions,
    source: Path | None = None,
    config: CheckpointConfig | None = None,
    participants: Sequence[int] | None = None,
    store: StoreLike | Literal["file"] | None = None,
    dtype: DType | None = None,
    max_shard_bytes: int | None = None,
) -> SaveReport:
    """Save a live Megatron model as a Hugging Face directory, with whoever of the job calls this; it can't hang.

    As `save.save_megatron_model`: no collective, the same store, the same proof that all of the model was written,
    the same rename that makes it appear whole or not at all, the same errors on all ranks. Each rank writes its own
    pieces into their places in the safetensors files.

    Args:
        model: A megatron-core model, or the list of its pipeline chunks on this rank.
        path: The directory, on a filesystem that all ranks see.
        companions: Config, which names the architecture, and the small files that go along.
        source: Directory of the original weights, where there is one: tensors get their types, and are divided into
            files, as there.
        config: How to go about it; the same on every rank. `async_save` and `writers_per_rank` don't count here.
        participants: See `save.save_megatron_model`.
        store: See `save.save_megatron_model`.
        dtype: Type of all tensors; None for those of the source, else the one that the config declares.
        max_shard_bytes: Most tensor bytes in one file; None for the files of the source, else a default.

    Returns:
        What was done.

    Raises:
        SaveIncomplete: Some part of the model has no holder among those who came within the deadline.
        ShardwayError: What any rank ran into, the same on all of them. Nothing was published.

    *Ranks*: every rank that holds something which no other rank holds must call this; any other rank may.
    """
    began = time.perf_counter()
    config = config or CheckpointConfig()
    folder = Path(os.path.abspath(path))
    made = tuple(directory for directory in folder.parents if not directory.exists())
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    original = _original(source)
    state, mapping = held(model, companions.config, list(original))
    written = mapping.with_copies(_copies(mapping, original))
    declared = HFConfig(companions.config, CONFIG_FILE).dtype
    layout = lay_out_weights(written, original, dtype=dtype, declared=declared, max_shard_bytes=max_shard_bytes)
    files = dict(companions.files)
    if dtype is not None or QUANTIZATION_CONFIG in companions.config:
        files[CONFIG_FILE] = config_with_dtype(without_quantisation(companions.config), dtype)
    synchronise(state.devices)
    actions = HuggingFaceFolder(
        folder=folder,
        rank=rank,
        state=state,
        mapping=written,
        layout=layout,
        companions=files,
        replace=config.if_exists == "replace",
        sync=config.fsync,
        made=made,
    )
    try:
        outcome = save_together(
            store=meeting_place(store, folder.parent),
            rank=rank,
            identity=SaveIdentity(
                destination=str(folder), iteration=0, token=f"hf {job_id() if store == 'file' else ''}"
            ),
            shards=state.shards,
            objects=(),
            needed=Needed(
                tensors={key: (None, shape) for key, shape in mapping.mcore.items()},
                participants=tuple(range(world) if participants is None else participants),
            ),
            agreement={
                "config": str(config),
                "layout": layout.digest,
                "megatron_config": str(sorted(mapping.megatron_config.items())),
            },
            options=SaveOptions(
                fully_parallel=config.fully_parallel_save,
                validate=config.validate_access_integrity,
                deadline_s=60.0 * (config.distributed_timeout_minutes or _DEFAULT_TIMEOUT_MINUTES),
                grace_s=config.grace_seconds,
            ),
            actions=actions,
        )
    finally:
        actions.close()
    return SaveReport(
        path=str(folder),
        arrived=outcome.arrived,
        lost=outcome.lost,
        coordinator=outcome.coordinator,
        num_files=len(layout.files),
        num_bytes=layout.num_bytes,
        wrote_bytes=outcome.wrote_bytes,
        seconds=time.perf_counter() - began,
    )


def _original(source: Path | None) -> Mapping[str, StoredTensor]:
    """The tensors of the original, where it is there and whole."""
    if source is None:
        return {}
    try:
        return present(open_huggingface(source)).catalog.tensors
    except ShardwayError:
        return {}


def _copies(mapping: ModelMapping, original: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Tensors that are written as copies of others: those that the original has, or released models have."""
    known = {name: of for name, of in mapping.aliases.items() if name in original} if original else mapping.restored
    return {name: of for name, of in known.items() if of in mapping.hf}
