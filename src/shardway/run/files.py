"""Positioned reads and writes on the files of a checkpoint, complete or an error that names file and bytes."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from typing import TYPE_CHECKING, Self

from shardway.core.errors import Code, Problem, ShardwayError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP}  # some network filesystems have no fsync of a directory
WRITE_BYTES = 2**19 - 2**12  # of a call: for more the kernel wants memory in larger pieces, which are slow to come by
_MOST_OPEN = 400  # on either side; a process may often open 1,024


def page_buffer(num_bytes: int) -> memoryview:
    """At least one byte of memory that begins with a page, to read files into from an offset where a page begins.

    Into memory that begins a few bytes later, as a bytearray does, some processors copy at a quarter of the speed
    (docs/design/0003-moving-bytes.md).
    """
    return memoryview(mmap.mmap(-1, num_bytes))


class OpenFile:
    """A file that stays open as long as it has users.

    Attributes:
        path: Where it is.
        descriptor: What it is open as.
        num_users: Threads that are using it.
    """

    __slots__ = ("descriptor", "num_users", "path")

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self.num_users = 0

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes at `offset`.

        Raises:
            ShardwayError: `io-failed`, or `source-changed` when the file ends first.
        """
        done = 0
        try:
            while done < len(view):
                got = os.preadv(self.descriptor, [view[done:] if done else view], offset + done)
                if not got:
                    raise ShardwayError(
                        Problem(
                            code=Code.SOURCE_CHANGED,
                            what=f"{self.path.name} ended while it was being read",
                            file=self.path,
                            facts=(f"wanted {len(view)} bytes at offset {offset}, got {done}",),
                            cure="it was truncated after the run began; run the command again",
                        )
                    )
                done += got
        except OSError as error:
            raise _failure(f"read {len(view)} bytes at {offset}", self.path, error) from error

    def write_from(self, view: memoryview | bytes, offset: int) -> None:
        """Write all of `view` at `offset`.

        Raises:
            ShardwayError: `io-failed`, or `no-space`.
        """
        done = 0
        try:
            while done < len(view):
                part = view if len(view) <= WRITE_BYTES and not done else memoryview(view)[done : done + WRITE_BYTES]
                done += os.pwrite(self.descriptor, part, offset + done)
        except OSError as error:
            raise _failure(f"write {len(view)} bytes at {offset}", self.path, error) from error


class Files:
    """The open files below one directory; any thread may use it.

    Args:
        root: Directory that file names are relative to.
        writable: Open for writing existing files; otherwise for reading.
    """

    def __init__(self, root: Path, *, writable: bool = False) -> None:
        self.root = root
        self._flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        self._opened: dict[str, OpenFile] = {}  # by rising time of last use
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except ShardwayError:
            if kind is None:  # else there is an error already
                raise

    def close(self) -> None:
        """Close every file; afterwards they may be opened anew.

        Raises:
            ShardwayError: `io-failed`, or `no-space`, of a file that was written: some filesystems tell only now.
        """
        with self._lock:
            opened, self._opened = dict(self._opened), {}
        failed: ShardwayError | None = None
        for name, file in opened.items():
            try:
                self._close(name, file)
            except ShardwayError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def close_unused(self, name: str) -> None:
        """Close a file, unless it is in use; afterwards it may be opened anew.

        When it was written, a network filesystem sends what is left of it now, while others are being written.

        Raises:
            ShardwayError: As `close`.
        """
        with self._lock:
            file = self._opened.get(name)
            if file is None or file.num_users:
                return
            del self._opened[name]
        self._close(name, file)

    def _close(self, name: str, file: OpenFile) -> None:
        try:
            os.close(file.descriptor)
        except OSError as error:
            if self._flags & os.O_RDWR:
                raise _failure(f"close {name}", self.root / name, error) from error

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[OpenFile]:
        """A file, open; it stays so afterwards, until too many others are.

        Raises:
            ShardwayError: `io-failed` when it can't be opened.
        """
        file = self._take(name)
        try:
            yield file
        finally:
            self._give_back(file)

    @contextlib.contextmanager
    def all_opened(self, names: Iterable[str]) -> Iterator[dict[str, OpenFile]]:
        """Several files by name, as `opened`."""
        files: dict[str, OpenFile] = {}
        try:
            for name in names:
                files[name] = self._take(name)
            yield files
        finally:
            for file in files.values():
                self._give_back(file)

    def _take(self, name: str) -> OpenFile:
        with self._lock:
            file = self._opened.pop(name, None)
            if file is None:
                self._close_idle()
                with failing(f"open {name}", self.root / name):
                    file = OpenFile(self.root / name, os.open(self.root / name, self._flags))
            self._opened[name] = file
            file.num_users += 1
        return file

    def _give_back(self, file: OpenFile) -> None:
        with self._lock:
            file.num_users -= 1

    def _close_idle(self) -> None:
        """Make room for one more: a job of thousands of ranks leaves more files than a process may hold open."""
        if len(self._opened) >= _MOST_OPEN:
            idle = next((name for name, file in self._opened.items() if not file.num_users), None)
            if idle is not None:
                self._close(idle, self._opened.pop(idle))

    def read_into(self, name: str, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes at `offset` of a file; as `OpenFile.read_into`."""
        with self.opened(name) as file:
            file.read_into(view, offset)

    def write_from(self, name: str, view: memoryview | bytes, offset: int) -> None:
        """Write all of `view` at `offset` of a file; as `OpenFile.write_from`."""
        with self.opened(name) as file:
            file.write_from(view, offset)

    def sync(self, name: str) -> None:
        """Force a file's bytes to the device.

        Raises:
            ShardwayError: `io-failed`, or `no-space`.
        """
        with self.opened(name) as file, failing("fsync", file.path):
            os.fsync(file.descriptor)


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
    """Force a directory's entries to the device, where the filesystem knows how to.

    Raises:
        ShardwayError: `io-failed`.
    """
    with failing("fsync directory", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise
        finally:
            os.close(descriptor)
