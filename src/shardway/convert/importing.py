"""Importing: a Hugging Face directory becomes a Megatron torch_dist checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from shardway import __version__
from shardway.convert.options import (
    For,
    IfExists,
    Spec,
    choice,
    invalid_option,
    parse_dtype,
    parse_size,
)
from shardway.convert.report import ConversionReport
from shardway.core.errors import Code, Problem, ShardwayError
from shardway.families.bridge import BridgeVersion
from shardway.families.config import HFConfig
from shardway.families.layout import Layout
from shardway.families.mapping import map_model, variants_in
from shardway.formats.huggingface import CONFIG_FILE, open_huggingface
from shardway.formats.iterations import TRAIN_STATE
from shardway.formats.record import RECORD_FILE, Record, read_record
from shardway.formats.torch_dist import TRACKER, iteration_folder, open_torch_dist, tracker_text
from shardway.plans.imports import ImportOptions, plan_import, widened
from shardway.run.destination import Tracker, holds_checkpoint, in_the_way, refuse_older
from shardway.run.engine import parse_workers
from shardway.run.execute import check_apart, execute, preflight
from shardway.run.losses import Losses, rounding_notes
from shardway.run.progress import Meter
from shardway.run.publish import Staging
from shardway.verification.compare import check_copies, check_readable, compare_plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardway.families.mapping import ModelMapping
    from shardway.formats.huggingface import HuggingFaceCheckpoint
    from shardway.plans.model import Plan
    from shardway.run.progress import Progress


def import_hf(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str = "auto",
    layout: str = "auto",
    spec: str = "te",
    target: str = "megatron-bridge",
    bridge_version: str = "0.7.0",
    iteration: int = 0,
    release: bool = False,
    if_exists: str = "error",
    workers: int | None = None,
    max_file_size: str | int = "4GiB",
    fsync: bool = True,
    verify: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> ConversionReport:
    """Convert a Hugging Face checkpoint to a Megatron ``torch_dist`` checkpoint that appears whole or not at all.

    Every element of every tensor is carried exactly once: the mapping is proven to cover both sides before a byte is
    written. The source is only read. Needs no GPU, no process group and no torch, and about 60 MB of memory whatever
    the size of the model. An existing checkpoint is never changed in place.

    Args:
        source: Directory with ``config.json`` and ``*.safetensors``.
        destination: Root of the checkpoint; gets ``iter_0000000/`` (or ``release/``) and the tracker file.
        dtype: ``"auto"`` keeps every tensor's bits; ``"bf16"``, ``"fp16"``, ``"fp32"`` cast floating-point tensors.
        layout: ``"stacked"`` (layers on a leading axis), ``"per-layer"``, or ``"auto"`` for what Megatron expects.
        spec: Whose names a few norms get: ``"te"`` for models of Transformer Engine layers, ``"local"`` for those of
            megatron-core's own.
        target: Who is to take the checkpoint as its own: ``"megatron-bridge"`` finds its run_config.yaml and tokenizer
            in it, ``"megatron-lm"`` the arguments for ``--use-checkpoint-args``.
        bridge_version: Which Megatron Bridge run_config.yaml is for: ``"0.7.0"`` or ``"0.3.1"``.
        iteration: Number of the iteration folder, at least 0.
        release: Write ``release/`` instead of an iteration folder.
        if_exists: ``"error"``; ``"reuse"`` accepts a complete checkpoint made from the same source with the same
            options; ``"replace"`` swaps the new one in when it is complete.
        workers: Threads; by default one per processor, at most 16.
        max_file_size: No ``.distcp`` file grows larger: bytes, or text such as ``"4GiB"``.
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
    root, origin = Path(destination), Path(source)
    exists = choice("if_exists", if_exists, IfExists)
    num_workers = parse_workers(workers)
    if not 0 <= iteration < 10**7:
        raise invalid_option("iteration", iteration, "a number from 0 to 9999999")
    wanted = None if layout == "auto" else choice("layout", layout, Layout)
    names = choice("spec", spec, Spec)
    taker = choice("target", target, For)
    version = choice("bridge_version", bridge_version, BridgeVersion)
    options = ImportOptions(
        bridge=version if taker is For.BRIDGE else None,
        megatron_lm=taker is For.MEGATRON_LM,
        dtype=parse_dtype(dtype),
        iteration=None if release else iteration,
        max_file_bytes=parse_size("max_file_size", max_file_size),
    )
    checkpoint = open_huggingface(origin)
    config = HFConfig(checkpoint.config, str(origin / CONFIG_FILE))
    variants = variants_in(config, hf=checkpoint.catalog.tensors) | {"te": names is Spec.TE}
    mapping = map_model(config, wanted, variants=variants)
    folder = root / iteration_folder(options.iteration)
    plan = plan_import(checkpoint, mapping, folder, options)
    record = _record(checkpoint, mapping, plan, options)
    check_apart(origin, root)
    reuse = _check_destination(root, folder, origin, options, record, exists)

    def report(*, reused: bool, notes: tuple[str, ...] = ()) -> ConversionReport:
        dtypes: dict[str, int] = {}
        for name in mapping.hf:
            kind = checkpoint.catalog.tensors[name].dtype.name
            dtypes[kind] = dtypes.get(kind, 0) + 1
        return ConversionReport(
            source=str(source),
            destination=str(destination),
            architecture=mapping.architecture,
            family=mapping.family,
            layout=mapping.layout.value,
            iteration=folder.name,
            num_tensors=len(mapping.hf),
            num_parameters=plan.mcore.num_elements,
            num_bytes=plan.mcore.num_bytes,
            dtypes=dtypes,
            num_files=len(plan.targets),
            seconds=time.perf_counter() - began,
            reused=reused,
            verified=verify and not reused,
            notes=plan.notes + notes,
        )

    if reuse:
        return report(reused=True)
    preflight(plan, folder, origin)
    check_copies(plan, num_workers)
    meter = Meter("copy", plan.num_bytes, progress)
    with Staging(folder, sync=fsync) as staging:
        losses = Losses()
        digests = execute(plan, staging, origin, num_workers, meter.advance, {}, losses)
        staging.write(RECORD_FILE, record.with_digests(digests).to_json())
        if verify:
            check_readable(plan, staging.path)
            compare_plan(plan, staging.path, num_workers, progress, digests)
        _check_unchanged(checkpoint, record.source)
        with Tracker(root, options.iteration, plan.small_files[TRAIN_STATE], sync=fsync) as tracker:
            staging.publish()
            notes = (*rounding_notes(losses), *tracker.publish())
    return report(reused=False, notes=notes)


def fingerprint(checkpoint: HuggingFaceCheckpoint) -> str:
    """What tells one source from another: names, sizes and times of change of its files, as an xxh3-128.

    Raises:
        ShardwayError: `source-changed` when a file is no longer there.
    """
    import xxhash

    root = checkpoint.catalog.root
    hasher = xxhash.xxh3_128()
    for name in sorted({*checkpoint.files, *(file.name for file in checkpoint.small_files)}):
        try:
            status = (root / name).stat()
        except OSError as error:
            raise ShardwayError(
                Problem(code=Code.SOURCE_CHANGED, what=f"{name} is no longer readable: {error}", file=root / name)
            ) from error
        hasher.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return str(hasher.hexdigest())


def _record(checkpoint: HuggingFaceCheckpoint, mapping: ModelMapping, plan: Plan, options: ImportOptions) -> Record:
    return Record(
        written_by=f"shardway {__version__}",
        family=mapping.family,
        architecture=mapping.architecture,
        source=fingerprint(checkpoint),
        options={
            "layout": mapping.layout.value,
            "dtype": options.dtype.name if options.dtype else "auto",
            "max_file_bytes": options.max_file_bytes,
            "for": f"megatron-bridge {options.bridge}" if options.bridge else "megatron-lm",
        },
        copies=plan.copies,
        variants=mapping.variants,
        dtypes=widened(checkpoint, mapping),
        megatron_config=mapping.megatron_config,
    )


def _check_unchanged(checkpoint: HuggingFaceCheckpoint, before: str) -> None:
    if fingerprint(checkpoint) != before:
        raise ShardwayError(
            Problem(
                code=Code.SOURCE_CHANGED,
                what="the source's files changed while they were being read",
                file=checkpoint.catalog.root,
                cure="wait until nothing writes to them, and run the command again",
            )
        )


def _check_destination(
    root: Path, folder: Path, source: Path, options: ImportOptions, record: Record, exists: IfExists
) -> bool:
    """Refuse a destination that holds something else; True when what it holds can be reused."""
    if source.resolve().is_relative_to(folder.resolve()):
        raise in_the_way(folder, "the source lies inside of it", "choose another destination")
    if not holds_checkpoint(root, folder):
        refuse_older(root, folder, options.iteration)
        return False
    if exists is IfExists.ERROR:
        raise in_the_way(folder, "it holds a checkpoint", "choose another destination, or --if-exists reuse or replace")
    if exists is IfExists.REPLACE:
        return False
    why = _why_not_reusable(root, folder, options, record)
    if why:
        raise in_the_way(folder, f"it can't be reused: {why}", "choose --if-exists replace to replace it")
    return True


def _why_not_reusable(root: Path, folder: Path, options: ImportOptions, record: Record) -> str | None:
    try:
        found = read_record(folder)
        if found is None:
            return "it was not written by shardway, so its source is unknown"
        if found.source != record.source:
            return "it was made from other files, or they have changed since"
        if dict(found.options) != dict(record.options):
            return f"it was made with other options: {dict(found.options)}"
        open_torch_dist(folder)
        tracker = (root / TRACKER).read_bytes().strip()
    except (ShardwayError, OSError) as error:
        return f"it is not complete: {error}"
    if tracker != tracker_text(options.iteration).strip():
        return f"the tracker names {tracker.decode(errors='replace')!r}, not this iteration"
    return None
