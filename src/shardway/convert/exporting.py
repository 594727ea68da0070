"""Exporting: a Megatron torch_dist checkpoint becomes a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from shardway.convert.configuring import config_json, restored_config
from shardway.convert.options import IfExists, choice, parse_dtype, parse_shard_size
from shardway.convert.report import ConversionReport
from shardway.core.errors import ShardwayError
from shardway.families.config import HFConfig
from shardway.families.layout import layout_of
from shardway.families.mapping import map_model, variants_in
from shardway.formats.huggingface import CONFIG_FILE, open_huggingface, read_companions
from shardway.formats.record import read_record
from shardway.formats.torch_dist import open_torch_dist
from shardway.plans.exports import ExportOptions, plan_export
from shardway.plans.streams import build_streams
from shardway.run.destination import in_the_way
from shardway.run.engine import parse_workers
from shardway.run.execute import check_apart, execute, preflight
from shardway.run.progress import Meter
from shardway.run.publish import Staging
from shardway.verification.compare import check_readable, compare_plan, compare_streams
from shardway.verification.opening import is_model_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardway.families.mapping import ModelMapping
    from shardway.formats.record import ChunkDigests
    from shardway.formats.torch_dist import TorchDistCheckpoint
    from shardway.plans.model import Plan
    from shardway.run.progress import Progress


def export_hf(
    source: str | Path,
    destination: str | Path,
    *,
    hf: str | Path | None = None,
    dtype: str = "auto",
    max_shard_size: str | int = "auto",
    if_exists: str = "error",
    workers: int | None = None,
    fsync: bool = True,
    verify: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> ConversionReport:
    """Convert a Megatron ``torch_dist`` checkpoint to a Hugging Face directory that appears whole or not at all.

    Any chunking is read, whoever and however many ranks wrote it; training state beside the weights is left out and
    reported. Where the checkpoint records digests (as those that shardway wrote do), every chunk is checked as it
    passes. The source is only read.

    Args:
        source: Root of the checkpoint, where the tracker file names the iteration, or an iteration folder.
        destination: Directory to be made.
        hf: Directory with ``config.json``, tokenizer and other small files; by default the ``hf`` folder that an
            import left in the iteration folder, or else what Megatron's own config there says (run_config.yaml or
            ``args``), where that is enough.
        dtype: ``"auto"`` keeps every tensor's bits; ``"bf16"``, ``"fp16"``, ``"fp32"`` cast floating-point tensors.
        max_shard_size: Most tensor bytes in one safetensors file: bytes, or text such as ``"5GB"``.
            ``"auto"``: 5 GB, or less where that makes eight files of at least 512 MB, which are written side by side.
        if_exists: ``"error"``; ``"reuse"`` accepts a directory whose tensors are all bit-equal to what would be
            written; ``"replace"`` swaps the new one in when it is complete.
        workers: Threads; by default one per processor, at most 16.
        fsync: Force everything to the device before it is published.
        verify: Read the result back and compare it with the source before it is published.
        progress: Called from the worker threads, one call at a time.

    Returns:
        What was done.

    Raises:
        ShardwayError: All problems that were found, each with a code (docs/errors.md); nothing is published then and
            nothing is left behind.
    """
    began = time.perf_counter()
    origin, target = Path(source), Path(destination)
    exists = choice("if_exists", if_exists, IfExists)
    num_workers = parse_workers(workers)
    options = ExportOptions(dtype=parse_dtype(dtype), max_shard_bytes=parse_shard_size(max_shard_size))
    checkpoint = open_torch_dist(origin, wanted=is_model_state)
    job = prepare_export(checkpoint, None if hf is None else Path(hf), target, options)
    plan = job.plan
    check_apart(checkpoint.root, target)
    reuse = _check_destination(target, checkpoint.root, plan, exists, num_workers, progress)
    if not reuse:
        preflight(plan, target, job.companions)
        meter = Meter("copy", plan.num_bytes, progress)
        with Staging(target, sync=fsync) as staging:
            execute(plan, staging, job.companions, num_workers, meter.advance, job.digests)
            if verify:
                check_readable(plan, staging.path)
                compare_plan(plan, staging.path, num_workers, progress, job.digests)
            staging.publish()
    return ConversionReport(
        source=str(source),
        destination=str(destination),
        architecture=job.mapping.architecture,
        family=job.mapping.family,
        layout=job.mapping.layout.value,
        iteration=checkpoint.root.name,
        num_tensors=len(plan.hf.tensors),
        num_parameters=plan.mcore.num_elements,
        num_bytes=plan.mcore.num_bytes,
        dtypes=dict(Counter(tensor.dtype.name for tensor in plan.hf.tensors.values())),
        num_files=len(plan.targets),
        seconds=time.perf_counter() - began,
        reused=reuse,
        verified=verify and not reuse,
        notes=plan.notes,
    )


class ExportJob(NamedTuple):
    """An export that is ready to be executed.

    Attributes:
        plan: What will be read and written.
        mapping: The model's mapping.
        companions: Directory of the config and the other small files.
        digests: Digests that the checkpoint records for its chunks.
    """

    plan: Plan
    mapping: ModelMapping
    companions: Path
    digests: ChunkDigests


def prepare_export(checkpoint: TorchDistCheckpoint, hf: Path | None, target: Path, options: ExportOptions) -> ExportJob:
    """Find the config that goes with a Megatron checkpoint and plan its export.

    Args:
        checkpoint: The checkpoint, its training state left out.
        hf: Directory with the config; None for the one inside the checkpoint, or what its Megatron config says.
        target: Directory to be made.
        options: What the user chose.

    Raises:
        ShardwayError: `config-missing`, `record-invalid`, and what `map_model` and `plan_export` raise.
    """
    companions = hf or checkpoint.hf_dir
    restored = None
    if companions is None:
        companions, restored = checkpoint.root, restored_config(checkpoint)
        config, copied = restored.config, restored.files
    else:
        config, small_files = read_companions(companions)
        copied = tuple((file.name, file.name) for file in small_files)
    record = read_record(checkpoint.root)
    hf_config = HFConfig(config, str(companions / CONFIG_FILE))
    keys = checkpoint.catalog.tensors
    variants = variants_in(hf_config, mcore=keys, recorded=record.variants if record else None)
    mapping = map_model(hf_config, layout_of(keys), variants=variants)
    known = record.copies if record else mapping.restored
    copies = {name: of for name, of in known.items() if mapping.aliases.get(name) == of}
    narrowed = record.dtypes if record else {}
    plan = plan_export(checkpoint, mapping, config, copied, copies, narrowed, target, options)
    if restored is not None:
        small = {CONFIG_FILE: config_json(config), **plan.small_files}
        plan = dataclasses.replace(plan, small_files=small, notes=(restored.note, *plan.notes))
    return ExportJob(plan, mapping, companions, record.digests if record else {})


def _check_destination(
    target: Path,
    source: Path,
    plan: Plan,
    exists: IfExists,
    num_workers: int,
    progress: Callable[[Progress], None] | None,
) -> bool:
    """Refuse a destination that holds something else; True when what it holds can be reused."""
    if source.resolve().is_relative_to(target.resolve()):
        raise in_the_way(target, "the source lies inside of it", "choose another destination")
    if not target.exists():
        return False
    if not target.is_dir():
        raise in_the_way(target, "it is not a directory", "choose another destination")
    present = sorted(path.name for path in target.iterdir())
    if not present:
        return False
    if CONFIG_FILE not in present and not any(name.endswith(".safetensors") for name in present):
        listed = ", ".join(present[:4]) + (", ..." if len(present) > 4 else "")
        raise in_the_way(
            target, f"it is not empty and no Hugging Face checkpoint: {listed}", "choose another destination"
        )
    if exists is IfExists.ERROR:
        raise in_the_way(target, "it holds a checkpoint", "choose another destination, or --if-exists reuse or replace")
    if exists is IfExists.REPLACE:
        return False
    why = _why_not_reusable(target, plan, num_workers, progress)
    if why:
        raise in_the_way(target, f"it can't be reused: {why}", "choose --if-exists replace to replace it")
    return True


def _why_not_reusable(
    target: Path, plan: Plan, num_workers: int, progress: Callable[[Progress], None] | None
) -> str | None:
    try:
        found = open_huggingface(target).catalog
    except ShardwayError as error:
        return f"it is not complete: {error}"
    wanted = {name: (tensor.dtype, tensor.shape) for name, tensor in plan.hf.tensors.items()}
    if wanted != {name: (tensor.dtype, tensor.shape) for name, tensor in found.tensors.items()}:
        return "its tensors have other names, dtypes or shapes"
    tiles = [piece.tile for stream in plan.streams for piece in stream.pieces]
    compared = dataclasses.replace(plan, hf=found, streams=build_streams(tiles, found.tensors, plan.mcore.tensors))
    differences, damaged = compare_streams(compared, num_workers, progress)
    if differences or damaged:
        return f"{len(differences) + len(damaged)} of its tensors hold other values"
    return None
