"""Publishing: everything is written beside the destination and renamed into place, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from pathlib import Path
from typing import Self

from shardway.core.errors import Code
from shardway.run.files import failing, sync_directory

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_TEMPORARY = re.compile(r"\..+\.shardway-(\d+-[0-9a-f]{8}(-old)?|live-.+)", re.DOTALL)


class Staging:
    """A directory that grows beside its destination and takes its place in one rename.

    Its name starts with a dot, so that no reader takes it for a checkpoint (Megatron looks for ``iter_*``). Leaving
    the context without `publish` removes it, and the parents that it had to create.

    Args:
        destination: Where the directory will be.
        sync: Force files and directories to the device before they are renamed.
    """

    def __init__(self, destination: Path, *, sync: bool) -> None:
        # A link to a directory stays; what it points to is replaced, and the staging directory is on that filesystem.
        self.destination = destination = destination.resolve()
        self.sync = sync
        self.path = destination.parent / f".{destination.name}.shardway-{os.getpid()}-{os.urandom(4).hex()}"
        self._created: list[Path] = []
        self._published = False

    def __enter__(self) -> Self:
        missing = [self.destination.parent, *self.destination.parent.parents]
        missing = missing[: next(k for k, path in enumerate(missing) if path.exists())]
        try:
            for path in reversed(missing):
                with failing("create directory", path, Code.DESTINATION_UNWRITABLE):
                    path.mkdir(exist_ok=True)
                self._created.append(path)
            with failing("create directory", self.path, Code.DESTINATION_UNWRITABLE):
                self.path.mkdir()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self._published:
            self._remove()

    def create(self, name: str, num_bytes: int) -> None:
        """Create a file of zeros of `num_bytes` bytes, without taking space for them yet."""
        path = self.path / name
        with failing(f"create a file of {num_bytes} bytes", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                os.ftruncate(descriptor, num_bytes)
            finally:
                os.close(descriptor)

    def write(self, name: str, contents: bytes) -> None:
        """Write a whole small file and, where asked for, force it to the device."""
        write_file(self.path / name, contents, sync=self.sync)

    def copy(self, source: Path, name: str) -> None:
        """Copy a file's contents (not its links, owner or times)."""
        path = self.path / name
        with failing(f"copy {source}", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)
            if self.sync:
                _sync_file(path)

    def publish(self) -> None:
        """Put the directory in its place; what was there before is removed only after that.

        Raises:
            ShardwayError: `io-failed`; the destination is then as it was.
        """
        if self.sync:
            for directory, _, _ in os.walk(self.path):
                sync_directory(Path(directory))
        with failing("publish", self.destination):
            if _is_filled(self.destination):
                exchange(self.path, self.destination)
                self._published = True
                shutil.rmtree(self.path, ignore_errors=True)
            else:
                self.path.rename(self.destination)
                self._published = True
        if self.sync:
            sync_directory(self.destination.parent)
            for path in self._created:
                sync_directory(path.parent)

    def _remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        for path in reversed(self._created):
            with contextlib.suppress(OSError):
                path.rmdir()


def is_leftover(name: str) -> bool:
    """Whether a name is one that a run which was killed may have left beside its destination."""
    return _TEMPORARY.fullmatch(name) is not None


def live_staging_name(name: str, save: str) -> str:
    """Name of the directory in which the ranks of a live save stage what will be called `name`."""
    return f".{name}.shardway-live-{save}"


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
    aside = staged.with_name(f"{staged.name}-old")
    destination.rename(aside)
    try:
        staged.rename(destination)
    except OSError:
        aside.rename(destination)
        raise
    aside.rename(staged)


class StagedFile:
    """A small file that is written beside its place when the context is entered, and takes it in one rename.

    A reader sees the old contents or the new. Leaving the context without `publish` removes what was written.

    Args:
        path: The file.
        contents: All of its bytes.
        sync: Force it to the device before the rename, and the directory after it.
    """

    def __init__(self, path: Path, contents: bytes, *, sync: bool) -> None:
        self._path = path
        self._contents = contents
        self._sync = sync
        self._temporary = path.with_name(f".{path.name}.shardway-{os.getpid()}-{os.urandom(4).hex()}")

    def __enter__(self) -> Self:
        with failing(f"write {len(self._contents)} bytes", self._path):
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._temporary.write_bytes(self._contents)
                if self._sync:
                    _sync_file(self._temporary)
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def publish(self) -> None:
        """Rename the file into its place.

        Raises:
            ShardwayError: `io-failed`; the old contents are still there then.
        """
        with failing("publish", self._path):
            self._temporary.replace(self._path)
        if self._sync:
            sync_directory(self._path.parent)


def write_file(path: Path, contents: bytes, *, sync: bool) -> None:
    """Replace a small file in one rename; the arguments are those of `StagedFile`.

    Raises:
        ShardwayError: `io-failed`, or `no-space`.
    """
    with StagedFile(path, contents, sync=sync) as file:
        file.publish()


def _is_filled(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
