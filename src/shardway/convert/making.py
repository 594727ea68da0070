"""Making a Megatron checkpoint: by one process at a time, whole or not at all, with a record of its digests."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

from shardway.convert.existing import Awaited, Settled
from shardway.convert.options import IfExists
from shardway.convert.turns import inode, resume, resumed_bytes, take_turn
from shardway.formats.record import RECORD_FILE
from shardway.run.destination import Tracker, publish_tracker
from shardway.run.execute import execute
from shardway.run.losses import Losses, rounding_notes
from shardway.run.progress import Meter
from shardway.run.publish import Staging
from shardway.run.source import unchanged
from shardway.verification.compare import check_readable, compare_plan
from shardway.verification.recording import digest_frames, digest_small_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shardway.convert.existing import Wanted
    from shardway.formats.record import ChunkDigests
    from shardway.hub.supply import HubSupply
    from shardway.plans.model import Plan
    from shardway.run.lease import Lease
    from shardway.run.progress import Progress
    from shardway.run.source import Snapshot


class Running(NamedTuple):
    """How a conversion goes about it.

    Attributes:
        exists: What to do with what is in place.
        num_workers: Threads.
        fsync: Force everything to the device before it is published.
        verify: Read the result back and compare it with the source before it is published.
        progress: Called from the worker threads, one call at a time.
    """

    exists: IfExists
    num_workers: int
    fsync: bool
    verify: bool
    progress: Callable[[Progress], None] | None


class Work(NamedTuple):
    """A checkpoint that is to be made.

    Attributes:
        doing: What others who want the same place are told about it.
        wanted: What is to be made, and where.
        settled: What was in place when that was last looked at.
        snapshot: The source's files as they were when the plan was made.
        reads: Those that are read.
        companions: Directory of the files that are copied as they are.
        train_state: Contents of the tracker of Megatron Bridge; None for none.
        begin: Called under the lease, before anything is written: the plan, and what brings the source's files if they
            are not there yet.
        check: Called with the digests of all chunks before anything is published; raises where they are wrong.
    """

    doing: str
    wanted: Wanted
    settled: Settled
    snapshot: Snapshot
    reads: tuple[str, ...]
    companions: Path
    train_state: bytes | None
    begin: Callable[[Lease], tuple[Plan, HubSupply | None]]
    check: Callable[[ChunkDigests], None]


class Made(NamedTuple):
    """How a checkpoint came to be.

    Attributes:
        reused: Whether it was there, or another process made it.
        resumed: Large files that an earlier run had finished.
        notes: What a user should know about it.
    """

    reused: bool
    resumed: int = 0
    notes: tuple[str, ...] = ()


def make(work: Work, running: Running) -> Made:
    """Make a checkpoint and publish it, unless it is there or another process makes it.

    Raises:
        ShardwayError: Whatever went wrong; nothing is published then, and nothing is left behind but what the same call
            can go on with.
    """
    wanted, num_workers, progress = work.wanted, running.num_workers, running.progress
    replace = running.exists is IfExists.REPLACE
    if work.settled is Settled.WHOLE:
        return Made(reused=True)
    lease = take_turn(
        wanted.folder,
        key=wanted.key,
        doing=work.doing,
        wait=running.exists is not IfExists.ERROR,
        done=Awaited(wanted, inode(wanted.folder) if replace else None),
        progress=progress,
    )
    if lease is None:
        return Made(reused=True)
    with lease:
        settled = wanted.settled()
        if settled is Settled.WHOLE:
            return Made(reused=True)
        if settled is Settled.UNNAMED:
            notes = publish_tracker(wanted.root, wanted.folder, wanted.iteration, sync=running.fsync)
            return Made(reused=True, notes=notes)
        plan, supply = work.begin(lease)
        staging = Staging(lease, replace=replace, sync=running.fsync)
        finished, journal = resume(plan, lease, staging, num_workers, progress)
        losses = Losses()
        files = digest_frames(plan)  # takes memory that the digests of chunks will need
        with contextlib.closing(journal):
            meter = Meter("copy", plan.mcore.num_bytes, progress)
            meter.advance(resumed_bytes(plan, finished))
            with unchanged((work.snapshot, work.reads)), _supplying(supply, lease):
                digests = execute(
                    plan,
                    staging,
                    work.companions,
                    num_workers,
                    meter.advance,
                    {},
                    journal,
                    finished,
                    losses,
                    supply,
                )
                work.check(digests)
                files |= digest_small_files(plan, staging.path)
                staging.write(RECORD_FILE, wanted.record.with_digests(digests, files).parts())
                if running.verify:
                    check_readable(plan, staging.path)
                    compare_plan(plan, staging.path, num_workers, progress, digests)
            named = wanted.root, wanted.iteration, work.train_state
            with Tracker(*named, sync=running.fsync, staged_in=lease.directory) as tracker:
                journal.publishing(staging.seal())
                with staging.published():
                    notes = (*rounding_notes(losses), *tracker.publish())
                    staging.validate()
    return Made(reused=False, resumed=len(finished.files), notes=notes)


@contextlib.contextmanager
def _supplying(supply: HubSupply | None, lease: Lease) -> Iterator[None]:
    """Let files come while the context lasts; where they stop coming, leave what is staged for another run."""
    if supply is None:
        yield
        return
    from shardway.hub.source import is_passing

    try:
        with supply:
            yield
    except BaseException as error:
        if is_passing(error) and not supply.keep:
            lease.leave()
        raise
    supply.check_copies()
