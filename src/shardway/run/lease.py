"""The right to write one destination: one process of any host has it, and loses it when it shows no sign of life.

A directory beside the destination, `.NAME.shardway-staging`, is the lease and holds all that is being made:

    lease-<nonce>     who holds it; its contents change as long as that process lives
    files-<nonce>/    what will be published, by one rename
    source-<nonce>/   files of the source that are there only while they are read
    files-<nonce>-old what is being replaced, for a moment, where the kernel can't exchange two directories
    journal           which files are finished

It appears whole, by renaming a directory that was made under another name: of several who try, one succeeds. To take
over from a holder that has died is to rename its `lease-` file: again, one succeeds. Then `files-` is renamed too, so
that a holder that was only asleep finds nothing under the names that it goes on to use. Everything rests on `rename`,
which is atomic on local and on network filesystems; no lock of the kernel's is used, and no clock is compared with
another one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from typing import TYPE_CHECKING, NamedTuple, Self

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.run.files import failing
from shardway.run.pulse import Pulse, Sign, read_sign

if TYPE_CHECKING:
    from pathlib import Path

JOURNAL = "journal"
_SUFFIX = ".shardway-staging"
_LEASE, _FILES, _SOURCE, _OLD = "lease-", "files-", "source-", "-old"
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY}
_TRIES = 5


class Seen(NamedTuple):
    """What is in the place of a lease.

    Attributes:
        nonce: Of its holder; empty where there is none, as when it is just being removed.
        sign: What its holder says of itself.
    """

    nonce: str
    sign: Sign


def staging_directory(destination: Path) -> Path:
    """Where the lease of a destination lies. A link to a directory counts as what it points to."""
    destination = destination.resolve()
    return destination.with_name(f".{destination.name}{_SUFFIX}")


def look(destination: Path) -> Seen | None:
    """Who holds the lease of a destination; None where there is no lease.

    Raises:
        ShardwayError: `io-failed`.
    """
    directory = staging_directory(destination)
    with failing("look for another run", directory):
        try:
            names = sorted(os.listdir(directory))
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not names:
            return None
        nonce = next((name.removeprefix(_LEASE) for name in names if name.startswith(_LEASE)), "")
        try:
            sign = read_sign(directory / f"{_LEASE}{nonce}") if nonce else Sign()
        except FileNotFoundError:  # taken over, or released, since
            return Seen("", Sign())
    # Who takes over renames the file first; until its own sign is in it, the sign is that of the dead one.
    return Seen(nonce, sign if sign.nonce == nonce else Sign())


def disk_bytes(directory: Path) -> int:
    """Bytes of disk that the files below a directory take; 0 where it is not there."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total


class Lease:
    """The lease of a destination, held; leaving the context releases it and removes all that was not published.

    Attributes:
        destination: What it is for, links resolved.
        key: What tells this work from other work on the same destination.
        directory: Where everything is kept.
        files: The directory that will be published.
        source: A directory for files of the source that can't stay; made by who needs it.
        journal: The file that says which files are finished.
        made: The directories above `destination` that were made for it, outermost first.
        restored: Whether a checkpoint that a dead holder had put aside was put back.
    """

    def __init__(self, destination: Path, *, key: str, doing: str) -> None:
        self.destination = destination.resolve()
        self.key = key
        self.directory = staging_directory(destination)
        self._nonce = os.urandom(8).hex()
        self._sign = Sign.of_this_process(doing, key, self._nonce)
        self._pulse = Pulse(self.directory / f"{_LEASE}{self._nonce}", self._sign)
        self.files = self.directory / f"{_FILES}{self._nonce}"
        self.source = self.directory / f"{_SOURCE}{self._nonce}"
        self._left = False
        self.journal = self.directory / JOURNAL
        self.made: list[Path] = []
        self.restored = False

    @classmethod
    def create(cls, destination: Path, *, key: str, doing: str) -> Self | None:
        """Take the lease of a destination that has none; None when another process was faster.

        Raises:
            ShardwayError: `destination-unwritable`, `no-space`.
        """
        lease = cls(destination, key=key, doing=doing)
        new = lease.directory.with_name(f".{lease.destination.name}.shardway-{lease._nonce}")
        try:
            with failing("create directory", lease.directory, Code.DESTINATION_UNWRITABLE):
                lease._make(new)
                try:
                    new.rename(lease.directory)
                except OSError as error:
                    # The reply to a rename that was carried out can get lost on a network filesystem.
                    if not lease._pulse.path.exists():
                        if error.errno in _TAKEN:
                            lease._discard(new)
                            return None
                        raise
        except BaseException:
            lease._discard(new)
            raise
        lease._pulse.start()
        return lease

    @classmethod
    def take_over(cls, destination: Path, seen: Seen, *, key: str, doing: str) -> Self | None:
        """Take the lease from a holder that has died; None when another process was faster, or the holder has ended.

        What the holder had staged is in `files` then. A checkpoint that it was replacing and had put aside is put back.

        Raises:
            ShardwayError: `destination-unwritable`.
        """
        lease = cls(destination, key=key, doing=doing)
        with failing("take over", lease.directory, Code.DESTINATION_UNWRITABLE):
            if not seen.nonce:
                lease._sweep()
                return None
            try:
                (lease.directory / f"{_LEASE}{seen.nonce}").rename(lease._pulse.path)
            except FileNotFoundError:
                if not lease._pulse.path.exists():
                    return None
            try:
                lease._pulse.beat()
                lease._fence()
            except BaseException as error:
                if isinstance(error, FileNotFoundError) and not lease._pulse.path.exists():
                    return None
                with contextlib.suppress(OSError):
                    lease._pulse.end()
                raise
        lease._pulse.start()
        return lease

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            if isinstance(error, ShardwayError):
                self.check()  # whatever went wrong, it went wrong because of that
        finally:
            self.release()

    def leave(self) -> None:
        """Keep what is staged when the lease is released, as if this process had been killed then."""
        self._left = True

    def check(self) -> None:
        """Raise if another process has taken the lease over, because this one showed no sign of life.

        Raises:
            ShardwayError: `lease-lost`.
        """
        if self._pulse.lost or not self._pulse.path.exists():
            raise ShardwayError(
                Problem(
                    code=Code.LEASE_LOST,
                    what="another process has taken over: this one showed no sign of life for too long",
                    file=self.destination,
                    cure="the other one goes on with the work; start the command again to wait for it",
                )
            )

    @property
    def lost(self) -> bool:
        """Whether another process is known to have taken over; costs nothing."""
        return self._pulse.lost

    def release(self) -> None:
        """Remove all that was not published, and give the lease back; never raises.

        Whoever has taken over meanwhile is left alone.
        """
        if self._left:
            with contextlib.suppress(OSError):
                self._pulse.end()
            return
        remove_tree(self.source)
        remove_tree(self.files)
        remove_tree(self.files.with_name(f"{self.files.name}{_OLD}"))
        self._pulse.stop()
        if self._pulse.path.exists() and not self._give_back():
            with contextlib.suppress(OSError):
                self._pulse.end()  # nobody has to wait for what can't be removed
        for directory in reversed(self.made):
            with contextlib.suppress(OSError):
                directory.rmdir()  # succeeds only when it is empty

    def _give_back(self) -> bool:
        """Remove the directory of the lease, unless another process has it by now; False where that fails."""
        for _ in range(_TRIES):
            try:
                for name in os.listdir(self.directory):
                    if not name.startswith(_LEASE):
                        (self.directory / name).unlink(missing_ok=True)
                self._pulse.path.unlink()  # last: as long as it is there, others wait
            except FileNotFoundError:
                break
            except OSError:
                continue
            break
        else:
            return False
        for _ in range(_TRIES):
            try:
                self.directory.rmdir()
            except OSError as error:
                if error.errno not in {errno.ENOENT, *_TAKEN}:  # else another run has made a lease of it by now
                    continue
            break
        return True

    def _make(self, new: Path) -> None:
        """Make the directory of the lease under another name, and the directories above it."""
        parents = [self.destination.parent, *self.destination.parent.parents]
        for turn in range(_TRIES):
            missing = parents[: next(k for k, path in enumerate(parents) if path.exists())]
            try:
                for path in reversed(missing):
                    path.mkdir(exist_ok=True)
                    if path not in self.made:
                        self.made.append(path)
                new.mkdir()
                break
            except FileNotFoundError:  # made by another run as well, which has failed and removed them
                if turn == _TRIES - 1:
                    raise
        (new / self.files.name).mkdir()
        (new / self._pulse.path.name).write_bytes(self._sign.to_bytes())

    def _discard(self, new: Path) -> None:
        remove_tree(new)
        for directory in reversed(self.made):
            with contextlib.suppress(OSError):
                directory.rmdir()

    def _fence(self) -> None:
        """Take what the last holder had staged from under its names; put back what it had put aside."""
        names = sorted(os.listdir(self.directory))
        for name in names:
            for prefix, ours in ((_FILES, self.files), (_SOURCE, self.source)):
                if name.startswith(prefix) and not name.endswith(_OLD):
                    if ours.exists():
                        remove_tree(self.directory / name)
                    else:
                        (self.directory / name).rename(ours)
        for name in names:
            if name.startswith(_FILES) and name.endswith(_OLD):
                if os.path.lexists(self.destination):
                    remove_tree(self.directory / name)
                else:
                    (self.directory / name).rename(self.destination)
                    self.restored = True

    def _sweep(self) -> None:
        """Remove a directory that nobody holds and that is not empty, as no run of shardway leaves it."""
        aside = self.directory.with_name(f".{self.destination.name}.shardway-{self._nonce}")
        with contextlib.suppress(FileNotFoundError):
            self.directory.rename(aside)
            if any(name.startswith(_LEASE) for name in os.listdir(aside)):
                aside.rename(self.directory)  # somebody has taken the lease since
        remove_tree(aside)


def remove_tree(path: Path) -> None:
    """Remove a directory and what is in it; once more where something failed."""
    for _ in range(_TRIES):
        shutil.rmtree(path, ignore_errors=True)
        if not os.path.lexists(path):
            return
