"""The staging directory of the ranks of a live save: any of them may publish it, also while another one does."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import time
from typing import TYPE_CHECKING

from shardway.core.errors import Code
from shardway.run.destination import in_the_way
from shardway.run.files import failing, sync_directory
from shardway.run.publish import exchange, live_staging_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

_MANIFEST = "manifest.json"
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY}
_ASIDE = "-old"  # `exchange` calls so what it puts aside on filesystems that can't exchange
_TURNS = 40  # with the pauses between them about eight seconds, while another rank is at it


class SharedStaging:
    """A directory that many ranks fill, and that takes the place of its destination in one rename.

    Every file but the shards' is first put into a directory of the publishing attempt, its `tag`, so that two
    coordinators, of which one was taken for dead, can't mix theirs; `publish` moves those of the attempt that was
    decided on.

    Args:
        destination: What it will be.
        attempt: Name of the attempt to save, the same on all ranks and unlike all others.
        sync: Force files and directories to the device before they are renamed.
    """

    def __init__(self, destination: Path, attempt: str, *, sync: bool) -> None:
        self.destination = destination
        self.path = destination.with_name(live_staging_name(destination.name, attempt))
        self.sync = sync
        self._attempt = attempt
        self._replace = False

    def create(self) -> None:
        """Create the directory, which may be there already.

        Raises:
            ShardwayError: `destination-unwritable`, `no-space`.

        *Ranks*: coordinator.
        """
        with failing("create directory", self.path, Code.DESTINATION_UNWRITABLE):
            self.path.mkdir(parents=True, exist_ok=True)

    def write(self, tag: str, name: str, contents: bytes) -> None:
        """Write a small file of an attempt; never creates what is above it, which others may have moved.

        Raises:
            ShardwayError: `io-failed`, `no-space`.

        *Ranks*: coordinator.
        """
        path = self.path / self._mark(tag) / name
        with failing(f"write {len(contents):,} bytes", path):
            for directory in [*reversed(path.relative_to(self.path).parents)][1:]:
                (self.path / directory).mkdir(exist_ok=True)
            with path.open("wb") as file:
                file.write(contents)
                file.flush()
                if self.sync:
                    os.fsync(file.fileno())

    def seal(self, tag: str, shards: Iterable[str]) -> None:
        """Note which files belong to the checkpoint: the attempt's own, and `shards`.

        Raises:
            ShardwayError: `io-failed`, `no-space`.

        *Ranks*: coordinator.
        """
        target = self.path / self._mark(tag)
        with failing("seal", target):
            belong = [*shards, *os.listdir(target)]
        self.write(tag, _MANIFEST, json.dumps(belong).encode())
        if self.sync:
            for directory, _, _ in os.walk(target, topdown=False):
                sync_directory(target / directory)
            sync_directory(self.path)

    def publish(self, tag: str, *, replace: bool, report: Callable[[int], None]) -> None:
        """Rename the directory into place; done already is success.

        Several ranks may do this at once, and any of them may be killed at any point of it. What makes that safe is
        that each takes the staging folder over by renaming it to a name of its own: of two, one succeeds, and who
        was overtaken has nothing left under the name that it goes on to use. The new folder is told from an old one
        that it replaced by the directory of its attempt, which is removed last.

        Raises:
            ShardwayError: `io-failed`; `destination-exists` when something else has come to lie there meanwhile.

        *Ranks*: any.
        """
        self._replace = replace
        mark = self._mark(tag)
        with failing("publish", self.destination):
            self._take_place(mark)
            report(1)
            staged = self._staged()
            in_place = (self.destination / mark).is_dir()
            for path in staged:
                # Without an exchange, a rank that was overtaken may be about to put back what it has put aside.
                if in_place or not path.name.endswith(_ASIDE):
                    shutil.rmtree(path, ignore_errors=True)
            shutil.rmtree(self.destination / mark, ignore_errors=True)

    def remove(self) -> None:
        """Remove the directory if it is there; never raises."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _mark(self, tag: str) -> str:
        return f".publish-{self._attempt}-{tag}"

    def _staged(self) -> list[Path]:
        """The directory under whatever name it has now, and those that it has replaced."""
        name = self.path.name
        names = sorted(os.listdir(self.path.parent))
        return [self.path.parent / each for each in names if each == name or each.startswith(f"{name}-")]

    def _take_place(self, mark: str) -> None:
        """Return when the new folder is in its place, whoever has put it there."""
        for turn in range(_TURNS):
            time.sleep(0.01 * turn)  # another rank is at it: let it
            staged = self._staged()
            new = next((each for each in staged if (each / mark).is_dir()), None)
            if new is None:
                if staged == self._staged() and self.destination.is_dir():
                    return
                continue
            own = self.path.with_name(f"{self.path.name}-{secrets.token_hex(4)}")
            with contextlib.suppress(FileNotFoundError):  # taken over by another rank
                new.rename(own)
                _tidy(own, mark)
                if self.sync:
                    sync_directory(own)
                self._put(own)
                shutil.rmtree(own, ignore_errors=True)  # what was replaced, if anything was
                return
        raise FileNotFoundError(errno.ENOENT, "what was staged has vanished", os.fspath(self.destination))

    def _put(self, new: Path) -> None:
        """Rename the new folder into place, or exchange it for what is there."""
        try:
            new.rename(self.destination)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            if not self._replace:
                raise in_the_way(
                    self.destination, "something has come to lie there", "move it away, and save again"
                ) from error
            try:
                exchange(new, self.destination)
            except OSError as overtaken:
                if overtaken.errno not in _TAKEN:
                    raise
                # While this rank had put the old folder aside, another one has put the new one in its place.
                raise FileNotFoundError(errno.ENOENT, "taken over by another rank", os.fspath(new)) from overtaken


def _tidy(path: Path, mark: str) -> None:
    """Leave in the staging folder the files of the attempt's manifest alone, under their names."""
    belong = {*json.loads((path / mark / _MANIFEST).read_bytes()), mark}
    for name in os.listdir(path):
        if name not in belong:
            _remove(path / name)
    for name in os.listdir(path / mark):
        if name != _MANIFEST:
            (path / mark / name).rename(path / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
