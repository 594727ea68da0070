"""Executing a plan into a staging directory."""

from __future__ import annotations

import contextlib
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problems
from shardway.plans.model import Direction, Plan
from shardway.run.clone import Cloner
from shardway.run.engine import Engine, batches
from shardway.run.files import Files
from shardway.run.finished import FinishedFiles, files_of, unfinished
from shardway.run.losses import Losses
from shardway.run.mover import Mover
from shardway.run.waves import Wave, in_waves

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shardway.formats.record import ChunkDigests
    from shardway.run.engine import Batch
    from shardway.run.journal import Finished, Journal
    from shardway.run.publish import Staging
    from shardway.run.waves import Supply


def execute(
    plan: Plan,
    staging: Staging,
    companions: Path,
    num_workers: int,
    advance: Callable[[int], None],
    expected: ChunkDigests,
    journal: Journal,
    finished: Finished,
    losses: Losses | None = None,
    supply: Supply | None = None,
) -> ChunkDigests:
    """Write everything that a plan describes into a staging directory.

    Args:
        plan: An import or export.
        staging: Receives the files.
        companions: What the sources of `plan.copied_files` are relative to.
        num_workers: Threads.
        advance: Called from the threads with the bytes of the Megatron side that have passed.
        expected: Digests that chunks which are read must have.
        journal: Gets each file when it is finished.
        finished: Files that are in the staging directory already, whole.
        losses: Receives what conversions of values lost.
        supply: Brings the files of the source as they are needed; None where all of them are there.

    Returns:
        The digest of every chunk that was written: all of the Megatron side in an import, none in an export.

    Raises:
        ShardwayError: Whatever went wrong, all threads' problems together; `cast-overflow` when a cast made finite
            values infinite.
    """
    importing = plan.direction is Direction.IMPORT
    hf = Files(staging.path if not importing else plan.hf.root, writable=not importing)
    mcore = Files(staging.path if importing else plan.mcore.root, writable=importing)
    written = mcore if importing else hf
    targets = [target for target in plan.targets if target.name not in finished.files]
    for target in targets:
        staging.create(target.name, target.num_bytes)
    cloner = Cloner(hf, mcore)
    movers: list[Mover] = []
    idle: list[Mover] = []
    losses = losses or Losses()

    def make_mover() -> Mover:
        with contextlib.suppress(IndexError):
            return idle.pop()
        mover = Mover(plan, hf, mcore, advance, expected, cloner)
        movers.append(mover)
        return mover

    def put_down(name: str) -> None:
        """Close a file until it is needed again; what is synced stays open, so that the sync sees all that failed."""
        if not staging.sync:
            written.close_unused(name)

    with hf, mcore:
        for target in targets:
            for offset, literal in target.literals:
                written.write_from(target.name, literal, offset)
            put_down(target.name)
        streams = unfinished(plan, finished.files)
        waves = [Wave((), streams, ())] if supply is None else in_waves(plan, streams, supply.others)
        work = [batches(wave.streams, partial(files_of, plan)) for wave in waves]
        noted = FinishedFiles(chain.from_iterable(work), journal, lambda: [mover.digests for mover in movers])

        def tell(batch: Batch) -> None:
            staging.check()
            # A run that overflows fails, and must not be gone on from; what is quantised is in no batch.
            if plan.requantised is None and not any(mover.losses.overflowed for mover in movers):
                for name in noted.done(batch):
                    put_down(name)
            if staging.sync:
                flusher.flush(batch.file)

        def run() -> None:
            if supply is not None:
                supply.begin(waves)
            for wave, each in zip(waves, work, strict=True):
                if supply is not None:
                    supply.wait(wave.needs)
                idle[:] = movers
                Engine(each, make_mover, num_workers, tell).run()
                if supply is not None and wave.frees:
                    hf.close()
                    supply.release(wave.frees)
            if plan.requantised is not None:
                from shardway.run.requantise import Requantiser

                idle[:] = movers
                checks = batches(plan.requantised.checked)
                Engine(checks, make_mover, num_workers).run()
                requantiser = Requantiser(plan, mcore, hf, advance)
                requantiser.run(num_workers)
                losses.exactness = requantiser.exactness

        if staging.sync:
            from shardway.run.flusher import Flusher

            with Flusher(written) as flusher:
                run()
                flusher.finish(target.name for target in plan.targets)
        else:
            run()
    for mover in movers:
        losses.add(mover.losses)
    _check_overflows(losses, plan)
    for name, contents in plan.small_files.items():
        staging.write(name, contents)
    for name, source in plan.copied_files:
        staging.copy(companions / source, name)
    digests: dict[tuple[str, tuple[int, ...]], str] = {}
    for known in finished.files.values():
        digests |= known
    for mover in movers:
        while mover.digests:
            digests |= mover.digests.popitem()[1]
    return digests


def _check_overflows(losses: Losses, plan: Plan) -> None:
    problems = Problems()
    for tensor, count in sorted(losses.overflowed.items()):
        problems.add(
            Code.CAST_OVERFLOW,
            f"{count} finite values of {tensor} became infinite in the cast",
            tensor=tensor,
            file=plan.hf.tensors[tensor].chunks[0].file,
            cure="choose a dtype with a wider range, such as bf16",
        )
    problems.raise_if_any()
