"""Migrating: a Megatron torch_dist checkpoint becomes another one of the same values, for other readers or ranks."""

from __future__ import annotations

import dataclasses
import enum
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from shardway import __version__
from shardway.convert.chunk_for import parse_chunk_for
from shardway.convert.existing import Settled, Wanted
from shardway.convert.making import Running, Work, make
from shardway.convert.options import IfExists, choice, parse_size
from shardway.convert.turns import work_key
from shardway.core.collector import collector_paused
from shardway.core.errors import Code, Problem, Problems, ShardwayError
from shardway.families.layout import Layout
from shardway.families.parallel import described
from shardway.formats.iterations import TRAIN_STATE, find_iteration
from shardway.formats.record import RECORD_FILE, Record, read_record
from shardway.formats.small_files import links_out
from shardway.formats.torch_dist import TorchDistCheckpoint, iteration_folder, open_torch_dist
from shardway.plans.migrations import Migration, MigrationOptions, plan_migration
from shardway.run.destination import in_the_way
from shardway.run.engine import parse_workers
from shardway.run.files import failing
from shardway.run.preflight import bytes_needed, check_apart, check_room
from shardway.run.source import Snapshot, unchanged
from shardway.verification.integrity import check_small_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardway.formats.record import ChunkDigests
    from shardway.run.progress import Progress


class Form(enum.StrEnum):
    """The forms of a torch_dist checkpoint, by a version of megatron-core that writes each."""

    MCORE_0_16 = "mcore-0.16"
    MCORE_0_20 = "mcore-0.20"


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationReport:
    """What a migration did.

    Attributes:
        source: What was read.
        destination: Root of the checkpoint that was written.
        form: ``mcore-0.16`` (common.pt, which every version reads) or ``mcore-0.20`` (common_state).
        layout: ``stacked`` or ``per-layer``.
        chunk_for: The job along whose shards chunks were cut; empty where those of the source were kept.
        iteration: Name of the iteration folder.
        num_tensors: Tensors that were written, those of an optimizer among them.
        num_objects: Keys of pickled objects that were carried, unread.
        num_bytes: Bytes of tensors that were moved.
        num_files: Large files that were written.
        num_digests: Recorded digests of the source that what was read was held against.
        seconds: Wall-clock time from the call to its return.
        reused: Whether the destination was found complete, or another process made it, and nothing was done.
        resumed: Large files that an earlier run, which was killed, had finished, and that were found whole.
        verified: Whether the result was read back and compared with the source.
        notes: What a user should know about the result, one sentence each.
    """

    source: str
    destination: str
    form: str
    layout: str
    chunk_for: str
    iteration: str
    num_tensors: int
    num_objects: int
    num_bytes: int
    num_files: int
    num_digests: int
    seconds: float
    reused: bool
    resumed: int
    verified: bool
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """The report as JSON-ready data."""
        return dataclasses.asdict(self)


def migrate(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = "mcore-0.16",
    layout: str = "auto",
    chunk_for: str = "",
    if_exists: str = "error",
    workers: int | None = None,
    max_file_size: str | int = "4GiB",
    fsync: bool = True,
    verify: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> MigrationReport:
    """Rewrite a Megatron ``torch_dist`` checkpoint in another form, layout or chunking, bit for bit.

    Everything is carried: weights, an optimizer's state, pickled objects without reading them, and all other files of
    the iteration folder. No family of models has to know the model. The source is only read; the destination appears
    whole or not at all, with a record of its digests.

    Args:
        source: Root of the checkpoint, where the tracker file names the iteration, or an iteration folder.
        destination: Root of the checkpoint to be; gets a folder for the same iteration, and the tracker file.
        to: ``"mcore-0.16"``: the form of megatron-core up to 0.18, which newer ones read as well; ``"mcore-0.20"``:
            that of 0.19 and later.
        layout: ``"stacked"`` (layers on a leading axis), ``"per-layer"``, or ``"auto"`` to leave it as it is.
        chunk_for: Text such as ``"tp=8,ep=8"``: chunks are cut along the shards of such a job; empty: as they are.
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
    form = choice("to", to, Form)
    options = MigrationOptions(
        common_pt=form is Form.MCORE_0_16,
        layout=None if layout == "auto" else choice("layout", layout, Layout),
        parallel=parse_chunk_for(chunk_for),
        max_file_bytes=parse_size("max_file_size", max_file_size),
    )
    job = _prepare(origin, root, options, form, exists)
    plan = job.migration.plan
    made = make(
        Work(
            doing="migration",
            wanted=job.wanted,
            settled=job.settled,
            snapshot=job.snapshot,
            reads=job.reads,
            companions=job.checkpoint.root,
            train_state=job.train_state,
            begin=lambda _: (plan, None),
            check=lambda digests: _check_digests(job.migration.expected, digests, job.checkpoint),
        ),
        Running(exists=exists, num_workers=num_workers, fsync=fsync, verify=verify, progress=progress),
    )
    return MigrationReport(
        source=str(source),
        destination=str(destination),
        form=form.value,
        layout=job.migration.layout.value,
        chunk_for=described(options.parallel) if options.parallel else "",
        iteration=job.wanted.folder.name,
        num_tensors=len(plan.mcore.tensors),
        num_objects=len(job.checkpoint.objects),
        num_bytes=plan.mcore.num_bytes,
        num_files=len(plan.targets),
        num_digests=0 if made.reused else len(job.migration.expected),
        seconds=time.perf_counter() - began,
        reused=made.reused,
        resumed=made.resumed,
        verified=verify and not made.reused,
        notes=plan.notes + made.notes,
    )


class _Job(NamedTuple):
    """A migration that is ready to be executed.

    Attributes:
        checkpoint: The source.
        migration: What will be read and written.
        snapshot: The source's files as they are.
        reads: Those that are read.
        train_state: Contents of its train_state.pt; None for none.
        wanted: What is to be made.
        settled: What is in place already.
    """

    checkpoint: TorchDistCheckpoint
    migration: Migration
    snapshot: Snapshot
    reads: tuple[str, ...]
    train_state: bytes | None
    wanted: Wanted
    settled: Settled


@collector_paused()
def _prepare(origin: Path, root: Path, options: MigrationOptions, form: Form, exists: IfExists) -> _Job:
    """Plan a migration and look at its destination; nothing is written.

    Raises:
        ShardwayError: Everything that stands in the way.
    """
    with failing("look for the checkpoint", origin, Code.FILE_UNREADABLE):
        found = find_iteration(origin)
    snapshot = Snapshot(found)
    with unchanged((snapshot, None)):
        checkpoint = open_torch_dist(found)
        record = read_record(found)
        iteration = None if checkpoint.release else checkpoint.iteration
        if iteration is None and not checkpoint.release:
            raise _unnumbered(found)
        folder = root / iteration_folder(iteration)
        migration = plan_migration(checkpoint, record.digests if record else {}, folder, options)
        copied = [name for _, name in migration.plan.copied_files]
        problems = Problems()
        problems.extend(links_out(found, copied))
        problems.raise_if_any()
        if record is not None:
            check_small_files(checkpoint, record, copied)
        train_state = _train_state(checkpoint)
    distcp = {chunk.file for tensor in checkpoint.catalog.tensors.values() for chunk in tensor.chunks}
    distcp |= {location.file for location in checkpoint.places.values()}
    others = {".metadata", "metadata.json", "common.pt", RECORD_FILE} & checkpoint.files.keys()
    reads = tuple(sorted(distcp | others | set(copied)))
    made = _record(snapshot.fingerprint(reads), record, migration, options, form)
    wanted = Wanted(
        root=root,
        folder=folder,
        iteration=iteration,
        record=made,
        key=work_key(migration.plan, f"migration {made.source}"),
        exists=exists,
    )
    check_apart(found, root)
    if found.resolve().is_relative_to(folder.resolve()):
        raise in_the_way(folder, "the source lies inside of it", "choose another destination")
    settled = wanted.settled_before()
    if settled is Settled.NOTHING:
        check_room(folder, bytes_needed(migration.plan, found, problems))
        problems.raise_if_any()
    return _Job(checkpoint, migration, snapshot, reads, train_state, wanted, settled)


def _record(source: str, record: Record | None, migration: Migration, options: MigrationOptions, form: Form) -> Record:
    chosen: dict[str, object] = {
        "to": form.value,
        "layout": migration.layout.value,
        "max_file_bytes": options.max_file_bytes,
        "chunk_for": described(options.parallel) if options.parallel else "",
    }
    if record is None:
        return Record(
            written_by=f"shardway {__version__}", family=None, architecture=None, source=source, options=chosen
        )
    return record._replace(written_by=f"shardway {__version__}", source=source, options=chosen, digests={}, files={})


def _check_digests(expected: ChunkDigests, found: ChunkDigests, checkpoint: TorchDistCheckpoint) -> None:
    """Hold what was read against what the source records of its chunks.

    Raises:
        ShardwayError: `digest-mismatch` for every chunk that is not as it was written.
    """
    problems = Problems()
    for (tensor, start), digest in expected.items():
        if found.get((tensor, start)) != digest:
            problems.add(
                Code.DIGEST_MISMATCH,
                f"{tensor} does not hold the bytes that were written",
                tensor=tensor,
                file=checkpoint.root,
                facts=(f"chunk from {list(start)}: recorded xxh3-128 {digest}, found {found.get((tensor, start))}",),
                cure="the file was changed or damaged after it was written; nothing was published",
            )
    problems.raise_if_any()


def _train_state(checkpoint: TorchDistCheckpoint) -> bytes | None:
    if TRAIN_STATE not in checkpoint.files:
        return None
    path = checkpoint.root / TRAIN_STATE
    with failing("read", path):
        return path.read_bytes()


def _unnumbered(folder: Path) -> ShardwayError:
    return ShardwayError(
        Problem(
            code=Code.TRACKER_INVALID,
            what=f"{folder} is not named as an iteration, and its common state does not say which it is",
            file=folder,
            cure="rename it to iter_ and seven digits",
        )
    )
