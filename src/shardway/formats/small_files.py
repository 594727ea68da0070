"""Small files read whole, wherever they come from, and copied only from where they should be."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats.file_problems import missing_file, printable, unreadable_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def read_small_file(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file; devices and pipes are never waited for, large files never read.

    Args:
        path: The file.
        most_bytes: The largest size accepted.

    Returns:
        Its bytes.

    Raises:
        ShardwayError: `file-missing` or `file-unreadable`.
    """
    try:
        # O_NONBLOCK: to open a pipe would wait until someone writes to it.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ShardwayError(unreadable_file(path, "it is not a regular file"))
            if status.st_size > most_bytes:
                what = f"it has {status.st_size:,} bytes; at most {most_bytes:,} are accepted"
                raise ShardwayError(unreadable_file(path, what))
            data = file.read(status.st_size)
    except FileNotFoundError:
        raise ShardwayError(missing_file(path)) from None
    except OSError as error:
        raise ShardwayError(unreadable_file(path, error)) from None
    if len(data) != status.st_size:
        what = f"{path.name} became shorter while it was read"
        raise ShardwayError(Problem(code=Code.SOURCE_CHANGED, what=what, file=path, cure="try again"))
    return data


def links_out(root: Path, names: Iterable[str]) -> list[Problem]:
    """The files below a directory that are links out of it, whose contents could be anything that the user may read.

    Links inside of the directory are fine, and those of a snapshot in the Hub's cache to its blobs.

    Args:
        root: The directory.
        names: Files to be copied as they are, by their paths in it.

    Returns:
        A `path-escapes` problem for each.
    """
    real = os.path.realpath(root)
    model, _, folder = os.path.dirname(real).rpartition("/")
    homes = (os.path.join(real, ""), *([f"{model}/blobs/"] if folder == "snapshots" else []))
    return [
        Problem(
            code=Code.PATH_ESCAPES,
            what=f"{printable(name)} is a link to {printable(target)}",
            file=root / name,
            facts=("files beside the weights are copied as they are, so links out of the directory are not followed",),
            cure="if you trust it, put a copy of the file in the place of the link",
        )
        for name in names
        if not (target := os.path.realpath(root / name)).startswith(homes)
    ]
