"""Small files that are replaced in one rename: a reader sees the old contents or the new."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Self

from shardway.run.files import failing, sync_directory

if TYPE_CHECKING:
    from pathlib import Path


class StagedFile:
    """A small file that is written elsewhere when the context is entered, and takes its place in one rename.

    Leaving the context without `publish` removes what was written.

    Args:
        path: The file.
        contents: All of its bytes.
        sync: Force it to the device before the rename, and the directory after it.
        staged_in: Directory on the same filesystem for what is not published yet; None: beside the file.
    """

    def __init__(self, path: Path, contents: bytes, *, sync: bool, staged_in: Path | None = None) -> None:
        self._path = path
        self._contents = contents
        self._sync = sync
        name = f".{path.name}.shardway-{os.getpid()}-{os.urandom(4).hex()}"
        self._temporary = (path.parent if staged_in is None else staged_in) / name

    def __enter__(self) -> Self:
        with failing(f"write {len(self._contents)} bytes", self._path):
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._temporary.write_bytes(self._contents)
                if self._sync:
                    sync_file(self._temporary)
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


def sync_file(path: Path) -> None:
    """Force a file's bytes to the device.

    Raises:
        OSError: The device failed.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
