"""Names of what is staged beside a checkpoint, and renaming it into its place."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError

if TYPE_CHECKING:
    from pathlib import Path

TAKEN = {errno.EEXIST, errno.ENOTEMPTY}
ASIDE = "-old"  # `exchange` calls so what it puts aside on filesystems that can't exchange
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_TEMPORARY = re.compile(r"\..+\.shardway-(staging|[0-9a-f]{16}|\d+-[0-9a-f]{8}(-old)?|live-.+)", re.DOTALL)
ALIVE = ".alive-"  # begins the names of the signs of life in the directory of a live save
MARK = ".publish-"  # begins the names of the directories of its attempts to publish


def is_leftover(name: str) -> bool:
    """Whether a name is one that a run which was killed may have left beside its destination."""
    return _TEMPORARY.fullmatch(name) is not None


def is_unsettled(folder: Path) -> bool:
    """Whether a folder was published by a live save that was killed before it had done all that follows."""
    try:
        return any(name.startswith(MARK) for name in os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return False


def live_staging_name(name: str, save: str) -> str:
    """Name of the directory in which the ranks of a live save stage what will be called `name`."""
    return f".{name}.shardway-live-{save}"


def in_the_way(path: Path, why: str, cure: str) -> ShardwayError:
    """The error of a destination that is taken."""
    return ShardwayError(
        Problem(code=Code.DESTINATION_EXISTS, what=f"{path} can't be written: {why}", file=path, cure=cure)
    )


def put(staged: Path, destination: Path, *, replace: bool) -> bool:
    """Rename a directory into its place, or exchange it for what is there.

    Args:
        staged: The directory.
        destination: Its place.
        replace: Whether a directory that is there, and not empty, gives way.

    Returns:
        Whether something gave way; it is at `staged` then.

    Raises:
        ShardwayError: `destination-exists` when something is there and may not be replaced.
        OSError: Both are as they were.
    """
    try:
        staged.rename(destination)  # also over an empty directory
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        if not replace:
            raise in_the_way(destination, "something has come to lie there", "move it away, and run again") from error
        exchange(staged, destination)
        return True
    return False


def exchange(staged: Path, destination: Path) -> None:
    """Swap two directories in one step where the kernel and filesystem can, else in three renames.

    Between those, what was at the destination is called as `staged` with ``-old`` after it.

    Raises:
        OSError: Both are then as they were.
    """
    import ctypes  # start-up is faster without it, and few runs replace anything

    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is not None:
        done = renameat2(_AT_FDCWD, os.fsencode(staged), _AT_FDCWD, os.fsencode(destination), _RENAME_EXCHANGE)
        if done == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise OSError(code, os.strerror(code))
    aside = staged.with_name(f"{staged.name}{ASIDE}")
    destination.rename(aside)
    try:
        staged.rename(destination)
    except OSError:
        with contextlib.suppress(FileNotFoundError):  # who took over has put it back already
            aside.rename(destination)
        raise
    aside.rename(staged)
