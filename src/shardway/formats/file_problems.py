"""Names and values out of files that nobody has to trust, as they can be shown, and files that can't be read."""

from __future__ import annotations

import os
import reprlib
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem

if TYPE_CHECKING:
    from pathlib import Path

_REPR = reprlib.Repr()
_REPR.maxstring = 120
_REPR.maxlong = 60
brief = _REPR.repr  # a value on one line, shortened


def printable(name: str) -> str:
    """The name as it can be shown: unchanged if harmless, else quoted, escaped and shortened.

    Args:
        name: A tensor or file name out of an untrusted file.

    Returns:
        At most 200 printable characters.
    """
    return name if len(name) <= 200 and name.isprintable() else brief(name)


def missing_file(path: Path) -> Problem:
    """The problem of a file that isn't there; tells a link to nowhere from a name that doesn't exist.

    Args:
        path: The file.

    Returns:
        A `file-missing` problem.
    """
    name = printable(path.name)
    try:
        target = os.readlink(path)
    except (OSError, ValueError):
        return Problem(code=Code.FILE_MISSING, what=f"{name} does not exist", file=path)
    return Problem(
        code=Code.FILE_MISSING,
        what=f"{name} is a symbolic link to {printable(target)}, which does not exist",
        file=path,
        cure="the download cache is incomplete; fetch the checkpoint again",
    )


def unreadable_file(path: Path, reason: OSError | ValueError | str) -> Problem:
    """The problem of a file that is there but can't be read.

    Args:
        path: The file.
        reason: What the system said.

    Returns:
        A `file-unreadable` problem.
    """
    said = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
    return Problem(code=Code.FILE_UNREADABLE, what=f"cannot read {printable(path.name)}: {said}", file=path)
