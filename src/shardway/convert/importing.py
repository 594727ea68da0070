"""Importing: a Hugging Face directory becomes a Megatron torch_dist checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from shardway import __version__
from shardway.convert.chunk_for import parse_chunk_for
from shardway.convert.existing import Settled, Wanted, holds_one
from shardway.convert.making import Running, Work, make
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
from shardway.convert.turns import work_key
from shardway.core.collector import collector_paused
from shardway.core.errors import Code, Problem, Problems, ShardwayError
from shardway.families.bridge import BridgeVersion
from shardway.families.config import HFConfig
from shardway.families.layout import Layout
from shardway.families.mapping import map_model, variants_in
from shardway.families.parallel import described
from shardway.formats.huggingface import CONFIG_FILE, survey_huggingface
from shardway.formats.iterations import TRAIN_STATE
from shardway.formats.quantised import count_schemes, names_by_scheme, present
from shardway.formats.record import Record
from shardway.formats.torch_dist import iteration_folder
from shardway.hub.names import is_repository, refuse_revision
from shardway.plans.imports import ImportOptions, plan_import, widened
from shardway.run.destination import holds_checkpoint, in_the_way
from shardway.run.engine import parse_workers
from shardway.run.preflight import bytes_needed, check_apart, check_room
from shardway.run.source import Snapshot, unchanged
from shardway.verification.compare import check_copies

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardway.families.mapping import ModelMapping
    from shardway.formats.huggingface import HuggingFaceCheckpoint
    from shardway.hub.source import HubSource
    from shardway.hub.supply import HubSupply
    from shardway.plans.model import Plan
    from shardway.run.lease import Lease
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
    chunk_for: str = "",
    fsync: bool = True,
    verify: bool = False,
    revision: str | None = None,
    keep_source: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> ConversionReport:
    """Convert a Hugging Face checkpoint to a Megatron ``torch_dist`` checkpoint that appears whole or not at all.

    Every element of every tensor is carried exactly once: the mapping is proven to cover both sides before a byte is
    written. The source is only read. Needs no GPU, no process group and no torch, and little memory: 25 MB, and 2 MB
    more for every thousand tensors, whatever their size. An existing checkpoint is never changed in place.

    Args:
        source: Directory with ``config.json`` and ``*.safetensors``; or ``"org/name"``, a repository on the Hub, where
            there is nothing of that name: what is missing in the local cache is fetched, never code.
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
        chunk_for: Text such as ``"tp=8,ep=8"``: chunks are cut along the shards of such a job, so that no rank reads
            another's bytes; empty: one for each layer and expert.
        fsync: Force everything to the device before it is published.
        verify: Read the result back and compare it with the source before it is published.
        revision: Of a repository on the Hub: branch, tag or commit; by default ``main``.
        keep_source: Whether what is fetched from the Hub stays in the local cache. Otherwise two files or few more are
            there at a time, beside the destination; where the network fails, what is done stays for the same call to go
            on with.
        progress: Called from the worker threads, one call at a time.

    Returns:
        What was done.

    Raises:
        ShardwayError: All problems that were found, each with a code (docs/errors.md); nothing is published then and
            nothing is left behind.
    """
    began = time.perf_counter()
    root = Path(destination)
    exists = choice("if_exists", if_exists, IfExists)
    num_workers = parse_workers(workers)
    if not 0 <= iteration < 10**7:
        raise invalid_option("iteration", iteration, "a number from 0 to 9999999")
    chosen = None if layout == "auto" else choice("layout", layout, Layout)
    names = choice("spec", spec, Spec)
    taker = choice("target", target, For)
    version = choice("bridge_version", bridge_version, BridgeVersion)
    options = ImportOptions(
        bridge=version if taker is For.BRIDGE else None,
        megatron_lm=taker is For.MEGATRON_LM,
        dtype=parse_dtype(dtype),
        iteration=None if release else iteration,
        max_file_bytes=parse_size("max_file_size", max_file_size),
        parallel=parse_chunk_for(chunk_for),
    )
    running = Running(exists=exists, num_workers=num_workers, fsync=fsync, verify=verify, progress=progress)
    if not is_repository(source):
        refuse_revision(source, revision)
        if not keep_source:
            what = f"{source} is not the name of a repository on the Hub; it stays where it is"
            raise ShardwayError(Problem(code=Code.OPTION_INVALID, what=what))
        report = _import(Path(source), None, root, options, _Names(chosen, names), running)
    elif verify and not keep_source:
        what = "verify=True would have to read the source again, which keep_source=False does not keep"
        cure = "leave one of them out; `shardway verify DST` holds the result against its digests at any time"
        raise ShardwayError(Problem(code=Code.OPTION_INVALID, what=what, cure=cure))
    else:
        from shardway.hub.source import open_hub

        with open_hub(str(source), revision, keep=keep_source) as hub:
            report = _import(hub.root, hub, root, options, _Names(chosen, names), running)
    return report._replace(source=str(source), seconds=time.perf_counter() - began)


def _import(
    origin: Path,
    hub: HubSource | None,
    root: Path,
    options: ImportOptions,
    names: _Names,
    running: Running,
) -> ConversionReport:
    """Import from a directory, or from a repository of which the directory shows the headers."""
    snapshot = Snapshot(origin)
    job = _prepare(origin, hub, root, options, names, running.exists, snapshot)
    plan = job.plan

    def begin(lease: Lease) -> tuple[Plan, HubSupply | None]:
        if hub is not None:
            return hub.supply(plan, lease.source, running.progress)
        check_copies(plan, running.num_workers)
        return plan, None

    made = make(
        Work(
            doing="import",
            wanted=job.wanted,
            settled=job.settled,
            snapshot=snapshot,
            reads=job.reads,
            companions=origin,
            train_state=plan.small_files[TRAIN_STATE],
            begin=begin,
            check=lambda _: None,
        ),
        running,
    )
    notes = (*(hub.notes if hub is not None else ()), *plan.notes, *made.notes)
    if made.resumed and plan.shifts:
        notes = (*notes, "values that were rounded in files of the earlier run are not counted here")
    return job.planned._replace(
        reused=made.reused,
        resumed=made.resumed,
        verified=running.verify and not made.reused,
        notes=notes,
    )


class _Names(NamedTuple):
    """Under which names tensors are stored, as far as the user has a say in it."""

    layout: Layout | None
    spec: Spec


class _Job(NamedTuple):
    """An import that is ready to be executed.

    Attributes:
        planned: What there is to say about it before it has begun.
        plan: What will be read and written.
        reads: The files of the source that are read.
        wanted: What is to be made.
        settled: What is in place already.
    """

    planned: ConversionReport
    plan: Plan
    reads: tuple[str, ...]
    wanted: Wanted
    settled: Settled


@collector_paused()
def _prepare(
    origin: Path,
    hub: HubSource | None,
    root: Path,
    options: ImportOptions,
    names: _Names,
    exists: IfExists,
    snapshot: Snapshot,
) -> _Job:
    """Plan an import and look at its destination; nothing is written.

    Raises:
        ShardwayError: Everything that stands in the way on either side, together.
    """
    problems = Problems()
    folder = root / iteration_folder(options.iteration)
    with unchanged((snapshot, None)):
        prepared = _plan(origin, folder, options, names, problems)
    reads: tuple[str, ...] = ()
    wanted = None
    if prepared is not None:
        checkpoint, mapping, plan = prepared
        reads = (*checkpoint.files, *(file.name for file in checkpoint.small_files))
        source = snapshot.fingerprint(reads) if hub is None else hub.fingerprint
        record = _record(source, checkpoint, mapping, plan, options)
        wanted = Wanted(
            root=root,
            folder=folder,
            iteration=options.iteration,
            record=record,
            key=work_key(plan, record.source),
            exists=exists,
        )
    settled = Settled.NOTHING
    try:
        check_apart(origin, root)
        if origin.resolve().is_relative_to(folder.resolve()):
            raise in_the_way(folder, "the source lies inside of it", "choose another destination")
        if wanted is not None:
            settled = wanted.settled_before()
        elif holds_checkpoint(root, folder) and exists is IfExists.ERROR:
            raise holds_one(folder)
        if settled is Settled.NOTHING:
            needed = snapshot.num_bytes(".safetensors")
            if wanted is not None:
                needed = bytes_needed(plan, origin, problems) + (hub.bytes_held(plan) if hub is not None else 0)
            check_room(folder, needed)
    except ShardwayError as error:
        problems.extend(error.problems)
    problems.raise_if_any()
    if prepared is None or wanted is None:
        raise RuntimeError(f"{origin} can't be planned, and no problem was found")
    return _Job(_planned(checkpoint, mapping, plan, wanted), plan, reads, wanted, settled)


def _planned(checkpoint: HuggingFaceCheckpoint, mapping: ModelMapping, plan: Plan, wanted: Wanted) -> ConversionReport:
    dtypes: dict[str, int] = {}
    for name in mapping.hf:
        source_of = checkpoint.quantised.get(name)
        kind = (source_of.codes if source_of else checkpoint.catalog.tensors[name]).dtype.name
        dtypes[kind] = dtypes.get(kind, 0) + 1
    return ConversionReport(
        source=str(checkpoint.catalog.root),
        destination=str(wanted.root),
        architecture=mapping.architecture,
        family=mapping.family,
        layout=mapping.layout.value,
        iteration=wanted.folder.name,
        num_tensors=len(mapping.hf),
        num_parameters=plan.mcore.num_elements,
        num_bytes=plan.mcore.num_bytes,
        dtypes=dtypes,
        num_files=len(plan.targets),
        seconds=0.0,
        reused=False,
        resumed=0,
        verified=False,
        notes=plan.notes,
        dequantised=count_schemes(checkpoint.quantised),
    )


def _plan(
    origin: Path, folder: Path, options: ImportOptions, names: _Names, problems: Problems
) -> tuple[HuggingFaceCheckpoint, ModelMapping, Plan] | None:
    """Open and plan; None with problems where that can't be done."""
    checkpoint = None
    try:
        checkpoint = survey_huggingface(origin, problems)
        if not checkpoint.config:
            return None
        checkpoint = present(checkpoint, options.dtype)
        config = HFConfig(checkpoint.config, str(origin / CONFIG_FILE))
        variants = variants_in(config, hf=checkpoint.catalog.tensors) | {"te": names.spec is Spec.TE}
        mapping = map_model(config, names.layout, variants=variants, known=checkpoint.catalog.tensors)
        return checkpoint, mapping, plan_import(checkpoint, mapping, folder, options)
    except ShardwayError as error:
        if not problems or checkpoint is None:
            problems.extend(error.problems)
            return None
        # A tensor of a file that can't be read is not missing, as far as anyone knows.
        unread = checkpoint.unread
        problems.extend(
            problem
            for problem in error.problems
            if problem.code is not Code.TENSOR_MISSING or (unread is not None and problem.tensor not in unread)
        )
        return None


def _record(
    source: str, checkpoint: HuggingFaceCheckpoint, mapping: ModelMapping, plan: Plan, options: ImportOptions
) -> Record:
    return Record(
        written_by=f"shardway {__version__}",
        family=mapping.family,
        architecture=mapping.architecture,
        source=source,
        options={
            "layout": mapping.layout.value,
            "dtype": options.dtype.name if options.dtype else "auto",
            "max_file_bytes": options.max_file_bytes,
            **({"chunk_for": described(options.parallel)} if options.parallel else {}),
            "for": f"megatron-bridge {options.bridge}" if options.bridge else "megatron-lm",
        },
        copies=plan.copies,
        variants=mapping.variants,
        dtypes=widened(checkpoint, mapping),
        megatron_config=mapping.megatron_config,
        quantised=names_by_scheme(checkpoint.quantised),
    )
