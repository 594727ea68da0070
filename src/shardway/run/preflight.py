"""What can be known before a byte is written: is there room, can it be written, can everything be read."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats.file_problems import unreadable_file
from shardway.run.files import failing
from shardway.run.lease import disk_bytes, staging_directory

if TYPE_CHECKING:
    from pathlib import Path

    from shardway.core.errors import Problems
    from shardway.plans.model import Plan


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


def bytes_needed(plan: Plan, companions: Path, problems: Problems) -> int:
    """Bytes that a plan writes; every small file that it would copy and that can't be read is a problem.

    Args:
        plan: What is about to be executed.
        companions: What the sources of `plan.copied_files` are relative to.
        problems: Gets `file-unreadable`.
    """
    needed = plan.disk_bytes
    for _, name in plan.copied_files:
        path = companions / name
        try:
            with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0) as file:
                needed += os.fstat(file.fileno()).st_size
        except OSError as error:
            problems.extend([unreadable_file(path, error)])
    return needed


def check_room(destination: Path, needed_bytes: int) -> None:
    """Check that the destination can be made and has room.

    What an earlier run left in its staging directory counts as room: it is used again or removed.

    Args:
        destination: Directory that is to appear, or to be replaced.
        needed_bytes: What will be written there.

    Raises:
        ShardwayError: `destination-unwritable`, `no-space`.
    """
    parent = destination.resolve().parent
    with failing("look for the destination", destination, Code.DESTINATION_UNWRITABLE):
        existing = next(path for path in (parent, *parent.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ShardwayError(
            Problem(
                code=Code.DESTINATION_UNWRITABLE,
                what=f"nothing can be created in {existing}",
                file=destination,
                facts=("it is not a directory",) if not existing.is_dir() else ("no permission to write",),
                cure="choose another destination",
            )
        )
    with failing("find the free space", existing, Code.DESTINATION_UNWRITABLE):
        free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        free += disk_bytes(staging_directory(destination))
    if needed_bytes > free:
        raise ShardwayError(
            Problem(
                code=Code.NO_SPACE,
                what="the destination has too little free space",
                file=destination,
                facts=(f"needed {needed_bytes:,} bytes, free {free:,} bytes",),
                cure="free space there, or choose another destination",
            )
        )
