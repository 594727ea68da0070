"""Exporting: a Megatron torch_dist checkpoint becomes a Hugging Face directory."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from shardway.convert.configuring import config_json, restored_config
from shardway.convert.existing import holds_one
from shardway.convert.making import Running
from shardway.convert.options import IfExists, choice, invalid_option, parse_dtype, parse_shard_size
from shardway.convert.report import ConversionReport
from shardway.convert.turns import inode, resume, resumed_bytes, take_turn, was_published, work_key
from shardway.core.collector import collector_paused
from shardway.core.dtypes import FLOAT32
from shardway.core.errors import Problems, ShardwayError
from shardway.families.config import HFConfig
from shardway.families.layout import layout_of
from shardway.families.mapping import map_model, variants_in
from shardway.formats.huggingface import CONFIG_FILE, open_huggingface, read_companions
from shardway.formats.iterations import find_iteration
from shardway.formats.quantised import Scheme
from shardway.formats.record import RECORD_FILE, read_record
from shardway.formats.run_config import RUN_CONFIG
from shardway.formats.torch_dist import open_torch_dist
from shardway.plans.exports import ExportOptions, plan_export
from shardway.plans.imports import HF_FOLDER
from shardway.plans.streams import build_streams
from shardway.plans.weights import Weights, model_state
from shardway.run.destination import in_the_way
from shardway.run.engine import parse_workers
from shardway.run.execute import execute
from shardway.run.files import failing
from shardway.run.lease import look
from shardway.run.losses import Losses, exactness_notes
from shardway.run.preflight import bytes_needed, check_apart, check_room
from shardway.run.progress import Meter
from shardway.run.publish import Staging
from shardway.run.source import Snapshot, unchanged
from shardway.verification.compare import check_readable, compare_plan, compare_streams
from shardway.verification.integrity import check_small_files
from shardway.verification.masters import check_masters

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from shardway.core.tensors import StoredTensor
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
    weights: str = "model",
    quantize: str | None = None,
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
        weights: ``"model"`` takes the model's own weights; ``"fp32"`` the float32 copies that the optimizer trains,
            where a training checkpoint stores them by name, and writes float32 unless `dtype` says otherwise.
        quantize: ``"fp8-block"`` quantises again what came from FP8 blocks, by the checkpoint's record, and leaves
            ``quantization_config`` in config.json; the report says how exact that is (docs/formats/quantised.md).
        max_shard_size: Most tensor bytes in one safetensors file: bytes, or text such as ``"5GB"``.
            ``"auto"``: 5 GB, or less where that makes eight files of at least 512 MB, which are written side by side.
        if_exists: ``"error"``; ``"reuse"`` accepts a directory whose tensors are all bit-equal to what would be
            written; ``"replace"`` swaps the new one in when it is complete.
        workers: Threads; by default one per processor, at most 16.
        fsync: Force everything to the device before it is published.
        verify: Read the result back and compare it with the source before it is published; float32 copies also with
            the model's own weights, to which they have to round.
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
    options = export_options(dtype, weights, max_shard_size, quantize)
    checked = _prepare(origin, target, None if hf is None else Path(hf), options, exists, num_workers, progress)
    job, checkpoint = checked.job, checked.checkpoint
    plan = job.plan
    reuse, resumed = checked.reusable, 0
    losses = Losses()
    if not reuse:
        running = Running(exists=exists, num_workers=num_workers, fsync=fsync, verify=verify, progress=progress)
        reuse, resumed = _convert(checked, target, running, losses)
    return ConversionReport(
        source=str(source),
        destination=str(destination),
        architecture=job.mapping.architecture,
        family=job.mapping.family,
        layout=job.mapping.layout.value,
        iteration=checkpoint.root.name,
        num_tensors=len(plan.hf.tensors),
        num_parameters=sum(map(math.prod, job.mapping.mcore.values())),
        num_bytes=plan.mcore.num_bytes,
        dtypes=dict(Counter(tensor.dtype.name for tensor in plan.hf.tensors.values())),
        num_files=len(plan.targets),
        seconds=time.perf_counter() - began,
        reused=reuse,
        resumed=resumed,
        verified=verify and not reuse,
        notes=(*plan.notes, *exactness_notes(losses.exactness)),
        left_out=job.left_out,
        dequantised={},
        requantised=losses.exactness._asdict() if losses.exactness.num_tensors else None,
    )


def export_options(dtype: str, weights: str, max_shard_size: str | int, quantize: str | None = None) -> ExportOptions:
    """What an export is told, parsed.

    Raises:
        ShardwayError: `option-invalid`.
    """
    which = choice("weights", weights, Weights)
    if quantize not in {None, Scheme.FP8_BLOCK.value}:
        raise invalid_option("quantize", quantize, Scheme.FP8_BLOCK.value)
    return ExportOptions(
        dtype=parse_dtype(dtype) or (FLOAT32 if which is Weights.FP32 else None),
        max_shard_bytes=parse_shard_size(max_shard_size),
        weights=which,
        quantize=quantize is not None,
    )


class _Checked(NamedTuple):
    """An export that is ready to be executed, its destination looked at.

    Attributes:
        job: What to do.
        checkpoint: The source.
        key: What tells it from other exports to the same place.
        reads: Files that are read, below each of the directories of the source.
        reusable: Whether the destination is what would be written.
    """

    job: ExportJob
    checkpoint: TorchDistCheckpoint
    key: str
    reads: tuple[tuple[Snapshot, tuple[str, ...]], ...]
    reusable: bool


def _prepare(
    origin: Path,
    target: Path,
    hf: Path | None,
    options: ExportOptions,
    exists: IfExists,
    num_workers: int,
    progress: Callable[[Progress], None] | None,
) -> _Checked:
    """Plan an export and look at its destination; nothing is written.

    Raises:
        ShardwayError: Everything that stands in the way on either side, together.
    """
    problems = Problems()
    root = origin
    planned = None
    snapshot = Snapshot(origin)
    try:
        with contextlib.suppress(OSError):  # opening it will tell
            root = find_iteration(origin)
        snapshot = Snapshot(root)
        with unchanged((snapshot, None)):
            checkpoint = open_torch_dist(root, wanted=options.weights.wants)
            companions = Snapshot(hf or checkpoint.hf_dir or root)
            planned = checkpoint, companions, prepare_export(checkpoint, hf, target, options)
    except ShardwayError as error:
        problems.extend(error.problems)
    reusable = False
    reads: tuple[tuple[Snapshot, tuple[str, ...]], ...] = ()
    key = ""
    if planned is not None:
        checkpoint, companions, job = planned
        files = {chunk.file for tensor in checkpoint.catalog.tensors.values() for chunk in tensor.chunks}
        config_file = () if hf is None and checkpoint.hf_dir is None else (CONFIG_FILE,)
        files |= {".metadata", "metadata.json", RECORD_FILE} & checkpoint.files.keys()
        reads = (
            (snapshot, tuple(sorted(files))),
            (companions, (*config_file, *(name for _, name in job.plan.copied_files))),
        )
        key = work_key(job.plan, " ".join((options.weights, *(found.fingerprint(names) for found, names in reads))))
    try:
        check_apart(root, target)
        if root.resolve().is_relative_to(target.resolve()):
            raise in_the_way(target, "the source lies inside of it", "choose another destination")
        seen = look(target)
        if (seen is None or seen.sign.key != key) and _holds_one(target, exists):
            reusable = planned is not None and _is_reusable(target, job.plan, num_workers, progress)
        if not reusable:
            estimate = snapshot.num_bytes(".distcp")
            check_room(target, estimate if planned is None else bytes_needed(job.plan, job.companions, problems))
    except ShardwayError as error:
        problems.extend(error.problems)
    problems.raise_if_any()
    if planned is None:
        raise RuntimeError(f"{origin} can't be planned, and no problem was found")
    return _Checked(job, checkpoint, key, reads, reusable)


def _convert(checked: _Checked, target: Path, running: Running, losses: Losses) -> tuple[bool, int]:
    """Write and publish, unless another process does the same; `losses` receives what conversions lost.

    Returns:
        Whether that was so, and how many files an earlier run had finished.
    """
    plan, job, key = checked.job.plan, checked.job, checked.key
    exists, num_workers, progress = running.exists, running.num_workers, running.progress
    old = inode(target)
    lease = take_turn(
        target,
        key=key,
        doing="export",
        wait=exists is not IfExists.ERROR,
        done=lambda: inode(target) not in (None, old) and _why_not_reusable(target, plan, num_workers, None) is None,
        progress=progress,
    )
    if lease is None:
        return True, 0
    with lease:
        if was_published(target, key):
            return True, 0
        if _holds_one(target, exists) and _is_reusable(target, plan, num_workers, progress):
            return True, 0
        staging = Staging(lease, replace=exists is IfExists.REPLACE, sync=running.fsync)
        finished, journal = resume(plan, lease, staging, num_workers, progress)
        with contextlib.closing(journal):
            meter = Meter("copy", plan.mcore.num_bytes, progress)
            meter.advance(resumed_bytes(plan, finished))
            with unchanged(*checked.reads):
                found = job.digests, journal, finished, losses
                execute(plan, staging, job.companions, num_workers, meter.advance, *found)
                if running.verify:
                    check_readable(plan, staging.path)
                    compare_plan(plan, staging.path, num_workers, progress, job.digests)
                    if job.passed_over:
                        check_masters(job.passed_over, plan.mcore, num_workers, progress)
            journal.publishing(staging.seal())
            with staging.published():
                staging.validate()
    return False, len(finished.files)


class ExportJob(NamedTuple):
    """An export that is ready to be executed.

    Attributes:
        plan: What will be read and written.
        mapping: The model's mapping.
        companions: Directory of the config and the other small files.
        digests: Digests that the checkpoint records for its chunks.
        left_out: Everything in the checkpoint that is no weight.
        passed_over: The model's own weights in whose place wider copies are taken.
    """

    plan: Plan
    mapping: ModelMapping
    companions: Path
    digests: ChunkDigests
    left_out: tuple[str, ...]
    passed_over: Mapping[str, StoredTensor]


@collector_paused()
def prepare_export(checkpoint: TorchDistCheckpoint, hf: Path | None, target: Path, options: ExportOptions) -> ExportJob:
    """Find the config that goes with a Megatron checkpoint and plan its export.

    Args:
        checkpoint: The checkpoint, in which what `options.weights` wants has been found.
        hf: Directory with the config; None for the one inside the checkpoint, or what its Megatron config says.
        target: Directory to be made.
        options: What the user chose.

    Raises:
        ShardwayError: `masters-missing`, `config-missing`, `record-invalid`, `digest-mismatch` for a small file that is
            not as it was written, and what `model_state`, `map_model` and `plan_export` raise.
    """
    state = model_state(checkpoint, options.weights)
    checkpoint = checkpoint._replace(catalog=state.catalog)
    companions = hf or checkpoint.hf_dir
    restored = None
    used: Collection[str] = ()
    if companions is None:
        companions, restored = checkpoint.root, restored_config(checkpoint)
        config, copied = restored.config, restored.files
        used = (RUN_CONFIG, *(name for _, name in copied))
    else:
        config, small_files = read_companions(companions)
        copied = tuple((file.name, file.name) for file in small_files)
        if hf is None:
            used = [f"{HF_FOLDER}/{name}" for name, _ in copied]
    record = read_record(checkpoint.root, checkpoint.catalog.tensors)
    if record is not None:
        check_small_files(checkpoint, record, used)
    hf_config = HFConfig(config, str(companions / CONFIG_FILE))
    keys = checkpoint.catalog.tensors
    variants = variants_in(hf_config, mcore=keys, recorded=record.variants if record else None)
    names = itertools.chain(keys, checkpoint.places)
    mapping = map_model(hf_config, layout_of(keys), variants=variants, known=names)
    known = record.copies if record else mapping.restored
    copies = {name: of for name, of in known.items() if mapping.aliases.get(name) == of}
    narrowed = record.dtypes if record else {}
    quantised = record.quantised if record else {}
    plan = plan_export(state.catalog, mapping, config, copied, copies, narrowed, quantised, target, options)
    plan = plan._replace(notes=plan.notes + state.notes)
    if restored is not None:
        small = {CONFIG_FILE: config_json(config), **plan.small_files}
        plan = plan._replace(small_files=small, notes=(restored.note, *plan.notes))
    digests = state.digests(record.digests) if record else {}
    return ExportJob(plan, mapping, companions, digests, state.left_out, state.passed_over)


def _holds_one(target: Path, exists: IfExists) -> bool:
    """Refuse a destination that holds something else, or a checkpoint where that was not allowed for.

    Returns:
        Whether it holds a checkpoint that is to be reused if it can be.

    Raises:
        ShardwayError: `destination-exists`.
    """
    with failing("look at what is there", target):
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
        raise holds_one(target)
    return exists is IfExists.REUSE


def _is_reusable(target: Path, plan: Plan, num_workers: int, progress: Callable[[Progress], None] | None) -> bool:
    """True when a checkpoint is what would be written.

    Raises:
        ShardwayError: `destination-exists`, with the reason, when it is not.
    """
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
    compared = plan._replace(hf=found, streams=build_streams(tiles, found.tensors, plan.mcore.tensors))
    differences, damaged = compare_streams(compared, num_workers, progress)
    changed = len(differences) + len(damaged)
    if plan.requantised is not None:
        from shardway.run.requantise import check_requantised

        changed += len(check_requantised(plan, found, num_workers))
    if changed:
        return f"{changed} of its tensors hold other values"
    return None
