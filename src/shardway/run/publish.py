"""Publishing: create, write, seal, publish, validate. A checkpoint is seen whole or not at all.

`Staging` is for one process, which holds the lease of the destination; `SharedStaging` for the ranks of a live save,
any of which may have to publish what all have written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.run.files import failing, sync_directory
from shardway.run.lease import Lease, remove_tree
from shardway.run.places import ALIVE, ASIDE, MARK, TAKEN, exchange, is_unsettled, live_staging_name, put
from shardway.run.pulse import Pulse, Sign
from shardway.run.staged_file import sync_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping


_MANIFEST = "manifest.json"
_PAUSES_S = (0.05, 0.5)
_TURNS_S = (0, *(0.01 * 2**turn for turn in range(11)))  # between 10 and 20 s in all, while another rank is at it


class Staging:
    """A directory that grows under a lease and takes the place of its destination in one rename.

    Its steps are `create`, `write` and `copy`; `seal`; `publish`; `validate`. Between `publish` and the end of the
    lease, `retract` takes it back.

    Args:
        lease: The lease of the destination; what is not published goes when it is released.
        replace: Whether a directory that is there already gives way.
        sync: Force files and directories to the device before they are renamed.
    """

    def __init__(self, lease: Lease, *, replace: bool, sync: bool) -> None:
        self.path = lease.files
        self.sync = sync
        self._lease = lease
        self._replace = replace
        self._sealed: dict[str, int] | None = None
        self._published = self._replaced = False
        with failing("create directory", self.path):
            self.path.mkdir(exist_ok=True)

    def keep(self, names: Iterable[str]) -> None:
        """Remove every file but these; what is removed may have been begun by a process that is only asleep.

        Raises:
            ShardwayError: `io-failed`.
        """
        kept = {self.path / name for name in names}
        with failing("remove what was not finished", self.path):
            for folder, _, found in os.walk(self.path, topdown=False):
                for name in found:
                    path = self.path / folder / name
                    if path not in kept:
                        path.unlink()
                if self.path / folder != self.path:
                    with contextlib.suppress(OSError):
                        os.rmdir(folder)  # succeeds only when it is empty

    @contextlib.contextmanager
    def published(self) -> Iterator[None]:
        """Publish; take it back if anything goes wrong while the context lasts.

        Raises:
            ShardwayError: What `publish` raises. What the context raises passes; where taking back fails, the new
                directory stays in place, whole, and the error says so.
        """
        try:
            self.publish()
            yield
        except BaseException as error:
            try:
                self.retract()
            except ShardwayError as left:
                if isinstance(error, ShardwayError):
                    raise ShardwayError((*error.problems, *left.problems)) from error
            raise

    def check(self) -> None:
        """Raise if another process is known to have taken over; costs nothing otherwise.

        Raises:
            ShardwayError: `lease-lost`.
        """
        if self._lease.lost:
            self._lease.check()

    def create(self, name: str, num_bytes: int) -> None:
        """Create a file of zeros of `num_bytes` bytes, without taking space for them yet."""
        path = self._path_of(name)
        with failing(f"create a file of {num_bytes} bytes", path):
            self._make_parents(name)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                os.ftruncate(descriptor, num_bytes)
            finally:
                os.close(descriptor)

    def write(self, name: str, contents: bytes | Iterable[bytes]) -> None:
        """Write a whole small file, at once or part by part, and, where asked for, force it to the device."""
        path = self._path_of(name)
        with failing(f"write {len(contents)} bytes" if isinstance(contents, bytes) else "write", path):
            self._make_parents(name)
            with path.open("wb") as file:
                file.writelines((contents,) if isinstance(contents, bytes) else contents)
            if self.sync:
                sync_file(path)

    def copy(self, source: Path, name: str) -> None:
        """Copy a file's contents (not its links, owner or times)."""
        path = self._path_of(name)
        with failing(f"copy {source}", path):
            self._make_parents(name)
            shutil.copyfile(source, path)
            if self.sync:
                sync_file(path)

    def seal(self) -> int:
        """End writing: directories are forced to the device where asked for, and what is there is noted.

        Returns:
            Inode of the directory, by which it is known wherever it is renamed to.

        Raises:
            ShardwayError: `io-failed`; `lease-lost`.
        """
        if self.sync:
            for directory, _, _ in os.walk(self.path):
                sync_directory(self.path / directory)
        self._lease.check()
        with failing("seal", self.path):
            self._sealed = _sizes(self.path)
            return self.path.stat().st_ino

    def publish(self) -> None:
        """Put the directory in its place; what was there before stays whole until the lease is released.

        Raises:
            ShardwayError: `io-failed`, `lease-lost`, or `destination-exists` when something has come to lie there; the
                destination is then as it was.
        """
        if self._sealed is None:
            raise RuntimeError("it has to be sealed first")
        destination = self._lease.destination
        with failing("publish", destination):
            try:
                self._replaced = put(self.path, destination, replace=self._replace)
            except FileNotFoundError:
                self._lease.check()
                raise
            self._published = True
        if self.sync:
            sync_directory(destination.parent)
            for path in self._lease.made:
                sync_directory(path.parent)

    def validate(self) -> None:
        """Look at what is published as a reader does: every file that was sealed is there, with its size, and no other.

        Raises:
            ShardwayError: `verify-failed`, `io-failed`.
        """
        destination = self._lease.destination
        with failing("look at what was published", destination):
            found = _sizes(destination)
        _check_sizes(destination, self._sealed or {}, found)

    def retract(self) -> None:
        """Take back what was published, so that the destination is what it was before.

        Raises:
            ShardwayError: `io-failed`, `lease-lost`; the new directory is then still in place.
        """
        if not self._published:
            return
        self._lease.check()
        with failing("take back", self._lease.destination):
            if self._replaced:
                exchange(self.path, self._lease.destination)
            else:
                self._lease.destination.rename(self.path)
            self._published = False

    def _path_of(self, name: str) -> Path:
        if self._sealed is not None:
            raise RuntimeError(f"{name}: what is sealed can't be written to")
        return self.path / name

    def _make_parents(self, name: str) -> None:
        """Make the directories of a file, and never the staging directory: others may have taken it over."""
        for directory in [*reversed(Path(name).parents)][1:]:
            (self.path / directory).mkdir(exist_ok=True)


class SharedStaging:
    """The staging directory of the ranks of a live save; any of them may publish it, also while another one does.

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

    def create(self) -> None:
        """Create the directory, which may be there already.

        Raises:
            ShardwayError: `destination-unwritable`, `no-space`.

        *Ranks*: coordinator.
        """
        with failing("create directory", self.path, Code.DESTINATION_UNWRITABLE):
            self.path.mkdir(parents=True, exist_ok=True)

    def show_life(self) -> Pulse | None:
        """Show in the directory, as long as it has its name, that this process is alive; None where that can't be done.

        *Ranks*: those that write.
        """
        nonce = os.urandom(8).hex()
        sign = Sign.of_this_process("live save", self._attempt, nonce)
        pulse = Pulse(self.path / f"{ALIVE}{nonce}", sign)
        try:
            with pulse.path.open("xb") as file:
                file.write(sign.to_bytes())
        except OSError:
            return None
        pulse.start()
        return pulse

    def write(self, tag: str, name: str, contents: bytes) -> None:
        """Write a small file of an attempt; never creates what is above it, which others may have moved.

        Raises:
            ShardwayError: `io-failed`, `no-space`.

        *Ranks*: coordinator.
        """
        target = self._marked(self.path, tag)
        path = target / name
        directories = [*reversed(path.relative_to(self.path).parents)][1:]
        with failing(f"write {len(contents):,} bytes", path):
            for directory in directories:
                (self.path / directory).mkdir(exist_ok=True)
            with path.open("wb") as file:
                file.write(contents)
                file.flush()
                if self.sync:
                    os.fsync(file.fileno())

    def seal(self, tag: str, shards: Mapping[str, int]) -> None:
        """Note which files belong to the checkpoint, and with which sizes: the attempt's own, and `shards`.

        Raises:
            ShardwayError: `io-failed`, `no-space`.

        *Ranks*: coordinator.
        """
        target = self._marked(self.path, tag)
        with failing("seal", target):
            belong = {**shards, **_sizes(target)}
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
        that it replaced by the directory of its attempt, which stays until `settle`.

        Raises:
            ShardwayError: `io-failed`; `verify-failed`; `destination-exists` when something else has come to lie there.

        *Ranks*: any.
        """
        with failing("publish", self.destination):
            persistently(lambda: self._publish(tag, replace=replace))
        report(1)

    def settle(self, tag: str) -> None:
        """Remove what tells that something was still to be done after `publish`; never raises.

        *Ranks*: any.
        """
        remove_tree(self._marked(self.destination, tag))

    def validate(self, sealed: Mapping[str, int]) -> None:
        """Look at what is published as a reader does: every file that was sealed is there, with its size.

        Raises:
            ShardwayError: `verify-failed`, `io-failed`.
        """
        found = {}
        with failing("look at what was published", self.destination):
            for name in sealed:
                with contextlib.suppress(FileNotFoundError):
                    found[name] = (self.destination / name).lstat().st_size
        _check_sizes(self.destination, sealed, found)

    def remove(self) -> None:
        """Remove the directory if it is there; never raises."""
        remove_tree(self.path)

    def _publish(self, tag: str, *, replace: bool) -> None:
        self._take_place(tag, replace=replace)
        staged = self._staged()
        in_place = self._marked(self.destination, tag).is_dir()
        for path in staged:
            # Without an exchange, a rank that was overtaken may be about to put back what it has put aside.
            if in_place or not path.name.endswith(ASIDE):
                remove_tree(path)

    def _marked(self, folder: Path, tag: str) -> Path:
        return folder / f"{MARK}{self._attempt}-{tag}"

    def _staged(self) -> list[Path]:
        """The directory under whatever name it has now, and those that it has replaced."""
        name = self.path.name
        names = sorted(os.listdir(self.path.parent))
        return [self.path.parent / each for each in names if each == name or each.startswith(f"{name}-")]

    def _take_place(self, tag: str, *, replace: bool) -> None:
        """Return when the new directory is in its place, whoever has put it there.

        What another rank has taken over is taken from it only if it still has it after a pause. Pauses double and are
        of no fixed length, so that ranks don't go on overtaking each other, however slow the filesystem is.
        """
        seen = self.path
        for pause in _TURNS_S:
            time.sleep(pause * (0.5 + os.urandom(1)[0] / 512))
            staged = self._staged()
            new = next((each for each in staged if self._marked(each, tag).is_dir()), None)
            if new is None:
                if staged == self._staged() and self.destination.is_dir():
                    return
                continue
            if new not in (self.path, seen):
                seen = new
                continue
            own = self.path.with_name(f"{self.path.name}-{os.urandom(4).hex()}")
            with contextlib.suppress(FileNotFoundError):  # taken over by another rank
                new.rename(own)
                sealed = self._tidy(own, tag)
                if self.sync:
                    sync_directory(own)
                self._put(own, replace=replace)
                self.validate(sealed)
                remove_tree(own)  # what was replaced, if anything was
                return
        raise FileNotFoundError(errno.ENOENT, "what was staged has vanished", os.fspath(self.destination))

    def _put(self, new: Path, *, replace: bool) -> None:
        try:
            put(new, self.destination, replace=replace or is_unsettled(self.destination))
        except OSError as overtaken:
            if overtaken.errno not in TAKEN:
                raise
            # While this rank had put the old folder aside, another one has put the new one in its place.
            raise FileNotFoundError(errno.ENOENT, "taken over by another rank", os.fspath(new)) from overtaken

    def _tidy(self, path: Path, tag: str) -> dict[str, int]:
        """Leave in the directory the files of the attempt's manifest alone, under their names; return it."""
        mark = self._marked(path, tag)
        sealed: dict[str, int] = json.loads((mark / _MANIFEST).read_bytes())
        belong = {name.partition("/")[0] for name in sealed} | {mark.name}
        for name in os.listdir(path):
            if name not in belong:
                _remove(path / name)
        for name in os.listdir(mark):
            if name != _MANIFEST:
                (mark / name).rename(path / name)
        return sealed


def persistently(action: Callable[[], object]) -> None:
    """Do what has been decided and is safe to do twice; once more, and again, where a file operation fails.

    What has vanished is not looked for again.

    Raises:
        OSError: As the last time.
        ShardwayError: Likewise.
    """
    for pause in (*_PAUSES_S, None):
        try:
            action()
        except (OSError, ShardwayError) as error:
            cause = error.__cause__ if isinstance(error, ShardwayError) else error
            if pause is None or not isinstance(cause, OSError) or isinstance(cause, FileNotFoundError):
                raise
            time.sleep(pause)
        else:
            return


def _sizes(directory: Path) -> dict[str, int]:
    """Size of every file below a directory, by its path relative to it."""
    found = {}
    for folder, _, names in os.walk(directory, onerror=_raise):
        for name in names:
            path = os.path.join(folder, name)
            found[os.path.relpath(path, directory)] = os.lstat(path).st_size
    return found


def _raise(error: OSError) -> None:
    raise error


def _check_sizes(directory: Path, sealed: Mapping[str, int], found: Mapping[str, int]) -> None:
    differing = sorted(name for name in sealed.keys() | found.keys() if sealed.get(name) != found.get(name))
    if differing:
        raise ShardwayError(
            Problem(
                code=Code.VERIFY_FAILED,
                what="what was published is not what was sealed",
                file=directory / differing[0],
                facts=tuple(
                    f"{name}: {sealed.get(name, 'no')} bytes sealed, {found.get(name, 'no')} found"
                    for name in differing[:8]
                ),
                cure="something else writes there; stop it, and run again",
            )
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)
