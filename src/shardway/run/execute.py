"""Executing a plan into a staging directory."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, Problems, ShardwayError
from shardway.plans.model import Direction, Plan
from shardway.run.clone import Cloner
from shardway.run.engine import Engine, batches
from shardway.run.files import Files, failing
from shardway.run.flusher import Flusher
from shardway.run.losses import Losses
from shardway.run.mover import Mover

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shardway.formats.record import ChunkDigests
    from shardway.plans.model import Stream
    from shardway.run.publish import Staging


def check_apart(source: Path, destination: Path) -> None:
    """Check that a conversion would not write into what it reads.

    Raises:
        ShardwayError: `destination-inside-source`.
    """
    if destination.resolve().is_relative_to(source.resolve()):
        raise ShardwayError(
            Problem(
                code=Code.DESTINATION_INSIDE_SOURCE,
                what=f"the destination lies inside the source {source}",
                file=destination,
                cure="choose a destination outside of it",
            )
        )


def preflight(plan: Plan, destination: Path, companions: Path) -> None:
    """Check what can be checked before a byte is written: that the destination can be made and has room.

    Args:
        plan: What is about to be executed.
        destination: Directory that is to appear, or to be replaced.
        companions: What the sources of `plan.copied_files` are relative to.

    Raises:
        ShardwayError: `destination-unwritable` or `no-space`.
    """
    problems = Problems()
    parent = destination.resolve().parent
    with failing("look for the destination", destination, Code.DESTINATION_UNWRITABLE):
        existing = next(path for path in (parent, *parent.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        problems.add(
            Code.DESTINATION_UNWRITABLE,
            f"nothing can be created in {existing}",
            file=destination,
            facts=("it is not a directory",) if not existing.is_dir() else ("no permission to write",),
            cure="choose another destination",
        )
    else:
        with failing("find the size of the files to be copied", companions):
            needed = plan.disk_bytes + sum((companions / name).stat().st_size for _, name in plan.copied_files)
        with failing("find the free space", existing, Code.DESTINATION_UNWRITABLE):
            free = shutil.disk_usage(existing).free
        if needed > free:
            problems.add(
                Code.NO_SPACE,
                "the destination has too little free space",
                file=destination,
                facts=(f"needed {needed:,} bytes, free {free:,} bytes",),
                cure="free space there, or choose another destination",
            )
    problems.raise_if_any()


def execute(
    plan: Plan,
    staging: Staging,
    companions: Path,
    num_workers: int,
    advance: Callable[[int], None],
    expected: ChunkDigests,
    losses: Losses | None = None,
) -> ChunkDigests:
    """Write everything that a plan describes into a staging directory.

    Args:
        plan: An import or export.
        staging: Receives the files.
        companions: What the sources of `plan.copied_files` are relative to.
        num_workers: Threads.
        advance: Called from the threads with the bytes of the Megatron side that have passed.
        expected: Digests that chunks which are read must have.
        losses: Receives what conversions of values lost.

    Returns:
        The digest of every chunk of the Megatron side.

    Raises:
        ShardwayError: Whatever went wrong, all threads' problems together; `cast-overflow` when a cast made finite
            values infinite.
    """
    importing = plan.direction is Direction.IMPORT
    hf = Files(staging.path if not importing else plan.hf.root, writable=not importing)
    mcore = Files(staging.path if importing else plan.mcore.root, writable=importing)
    written = mcore if importing else hf
    for target in plan.targets:
        staging.create(target.name, target.num_bytes)
    cloner = Cloner(hf, mcore)
    movers: list[Mover] = []

    def make_mover() -> Mover:
        mover = Mover(plan, hf, mcore, advance, expected, cloner)
        movers.append(mover)
        return mover

    with hf, mcore:
        for target in plan.targets:
            for offset, literal in target.literals:
                written.write_from(target.name, literal, offset)
        work = batches(plan.streams, _import_file if importing else _export_file)
        if staging.sync:
            with Flusher(written) as flusher:
                Engine(work, make_mover, num_workers, flusher.flush).run()
                flusher.finish(target.name for target in plan.targets)
        else:
            Engine(work, make_mover, num_workers).run()
    losses = losses or Losses()
    for mover in movers:
        losses.add(mover.losses)
    _check_overflows(losses, plan)
    for name, contents in plan.small_files.items():
        staging.write(name, contents)
    for name, source in plan.copied_files:
        staging.copy(companions / source, name)
    return {key: digest for mover in movers for key, digest in mover.digests.items()}


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


def _import_file(stream: Stream) -> str:
    return stream.chunks[0].file


def _export_file(stream: Stream) -> str:
    return stream.pieces[0].hf.file
