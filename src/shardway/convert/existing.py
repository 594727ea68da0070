"""What an import finds in place of its destination already, and whether that is what was asked for."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

from shardway.convert.options import IfExists
from shardway.convert.turns import inode, was_published
from shardway.core.errors import ShardwayError
from shardway.formats.record import read_record
from shardway.formats.torch_dist import TRACKER, open_torch_dist, tracker_text
from shardway.run.destination import holds_checkpoint, in_the_way, refuse_older, tracked_iteration
from shardway.run.lease import look

if TYPE_CHECKING:
    from pathlib import Path

    from shardway.formats.record import Record

_REPLACE = "choose --if-exists replace to replace it"


def holds_one(path: Path) -> ShardwayError:
    """The error of a destination where a checkpoint is, without leave to do anything about it."""
    return in_the_way(path, "it holds a checkpoint", "choose another destination, or --if-exists reuse or replace")


class Settled(enum.Enum):
    """What is in place."""

    NOTHING = "nothing, or what gives way"
    UNNAMED = "what was asked for, but the tracker does not name it yet"
    WHOLE = "what was asked for"


class Wanted(NamedTuple):
    """What an import is to make.

    Attributes:
        root: Root of the checkpoint.
        folder: The iteration folder in it.
        iteration: Its number; None for a release.
        record: What the folder would record, but for the digests.
        key: What tells the import from others to the same place.
        exists: What to do with what is there.
    """

    root: Path
    folder: Path
    iteration: int | None
    record: Record
    key: str
    exists: IfExists

    def settled_before(self) -> Settled:
        """What is in place, before the lease is taken.

        Where another run of this very import is at work, or was killed, that is left to be found out under the lease.

        Raises:
            ShardwayError: `destination-exists`.
        """
        seen = look(self.folder)
        if seen is None or seen.sign.key != self.key:
            return self.settled()
        reusable = self.exists is IfExists.REUSE and self.why_not_reusable() is None
        return Settled.WHOLE if reusable else Settled.NOTHING

    def settled(self) -> Settled:
        """What is in place, while nobody else is at work there.

        Raises:
            ShardwayError: `destination-exists`, with the reason why it can't be reused where that was asked for.
        """
        if not holds_checkpoint(self.root, self.folder):
            refuse_older(self.root, self.folder, self.iteration)
            return Settled.NOTHING
        if was_published(self.folder, self.key) or (self._is_unnamed() and self._differs() is None):
            return Settled.UNNAMED
        if self.exists is IfExists.ERROR:
            raise holds_one(self.folder)
        if self.exists is IfExists.REPLACE:
            return Settled.NOTHING
        why = self.why_not_reusable()
        if why:
            raise in_the_way(self.folder, f"it can't be reused: {why}", _REPLACE)
        return Settled.WHOLE

    def why_not_reusable(self) -> str | None:
        """Why what is in place is not what was asked for; None where it is."""
        why = self._differs()
        if why is not None:
            return why
        try:
            tracker = (self.root / TRACKER).read_bytes().strip()
        except OSError as error:
            return f"it is not complete: {error}"
        if tracker != tracker_text(self.iteration).strip():
            return f"the tracker names {tracker.decode(errors='replace')!r}, not this iteration"
        return None

    def _differs(self) -> str | None:
        """Why the folder is not what was asked for."""
        try:
            found = read_record(self.folder)
            if found is None:
                return "it was not written by shardway, so its source is unknown"
            if found.source != self.record.source:
                return "it was made from other files, or they have changed since"
            if dict(found.options) != dict(self.record.options):
                return f"it was made with other options: {dict(found.options)}"
            open_torch_dist(self.folder)
        except (ShardwayError, OSError) as error:
            return f"it is not complete: {error}"
        return None

    def _is_unnamed(self) -> bool:
        """Whether the tracker is missing, or names an earlier iteration: an import ends with it."""
        if not (self.root / TRACKER).exists():
            return True
        latest = tracked_iteration(self.root)
        return latest is not None and self.iteration is not None and latest < self.iteration


class Awaited:
    """Whether another process has by now made what is wanted; looks inside only when something has changed.

    Args:
        wanted: What it is.
        old: Inode of what was there before and is to be replaced; None for nothing.
    """

    def __init__(self, wanted: Wanted, old: int | None) -> None:
        self.wanted = wanted
        self.old = old
        self._looked_at: tuple[int | None, bytes] = (None, b"")

    def __call__(self) -> bool:
        """Look."""
        try:
            tracker = (self.wanted.root / TRACKER).read_bytes()
        except OSError:
            return False
        there = inode(self.wanted.folder), tracker
        if there[0] in (None, self.old) or there == self._looked_at:
            return False
        self._looked_at = there
        return self.wanted.why_not_reusable() is None
