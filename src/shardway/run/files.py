"""Positioned reads and writes on the files of a checkpoint, complete or an error that names file and bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from typing import TYPE_CHECKING, Self

from shardway.core.errors import Code, Problem, ShardwayError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT}


class Files:
    """The open files below one directory; any thread may use it.

    Args:
        root: Directory that file names are relative to.
        writable: Open for writing existing files; otherwise for reading.
    """

    def __init__(self, root: Path, *, writable: bool = False) -> None:
        self.root = root
        self._flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file; afterwards they may be opened anew."""
        with self._lock:
            descriptors, self._descriptors = list(self._descriptors.values()), {}
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def descriptor(self, name: str) -> int:
        """The descriptor of a file, opened on first use.

        Raises:
            ShardwayError: `io-failed` when it can't be opened.
        """
        found = self._descriptors.get(name)
        if found is None:
            with self._lock:
                found = self._descriptors.get(name)
                if found is None:
                    with failing(f"open {name}", self.root / name):
                        found = self._descriptors[name] = os.open(self.root / name, self._flags)
        return found

    def read_into(self, name: str, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes at `offset` of a file.

        Raises:
            ShardwayError: `io-failed`, or `source-changed` when the file ends first.
        """
        descriptor = self.descriptor(name)
        done = 0
        while done < len(view):
            try:
                got = os.preadv(descriptor, [view[done:] if done else view], offset + done)
            except OSError as error:
                raise _failure(f"read {len(view)} bytes at {offset}", self.root / name, error) from error
            if not got:
                raise ShardwayError(
                    Problem(
                        code=Code.SOURCE_CHANGED,
                        what=f"{name} ended while it was being read",
                        file=self.root / name,
                        facts=(f"wanted {len(view)} bytes at offset {offset}, got {done}",),
                        cure="it was truncated after the run began; run the command again",
                    )
                )
            done += got

    def write_from(self, name: str, view: memoryview | bytes, offset: int) -> None:
        """Write all of `view` at `offset` of a file.

        Raises:
            ShardwayError: `io-failed`, or `no-space`.
        """
        descriptor = self.descriptor(name)
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(descriptor, memoryview(view)[done:] if done else view, offset + done)
            except OSError as error:
                raise _failure(f"write {len(view)} bytes at {offset}", self.root / name, error) from error

    def sync(self, name: str) -> None:
        """Force a file's bytes to the device.

        Raises:
            ShardwayError: `io-failed`, or `no-space`.
        """
        with failing("fsync", self.root / name):
            os.fsync(self.descriptor(name))


@contextlib.contextmanager
def failing(doing: str, file: Path, code: Code = Code.IO_FAILED) -> Iterator[None]:
    """Turn an OSError into the project's error, saying what was done to which file (`no-space`: of itself)."""
    try:
        yield
    except OSError as error:
        raise _failure(doing, file, error, code) from error


def _failure(doing: str, file: Path, error: OSError, code: Code = Code.IO_FAILED) -> ShardwayError:
    full = error.errno in _FULL
    return ShardwayError(
        Problem(
            code=Code.NO_SPACE if full else code,
            what=f"could not {doing}: {error.strerror or error}",
            file=file,
            facts=(f"errno {errno.errorcode.get(error.errno or 0, error.errno)}",),
            cure="free space there, or choose another destination" if full else None,
        )
    )


def sync_directory(path: Path) -> None:
    """Force a directory's entries to the device.

    Raises:
        ShardwayError: `io-failed`.
    """
    with failing("fsync directory", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
