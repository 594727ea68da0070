"""Small files read whole, wherever they come from."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats.safetensors import missing_file, unreadable_file

if TYPE_CHECKING:
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
