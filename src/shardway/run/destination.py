"""The root of a Megatron checkpoint as a destination: what may be written there, and which iteration it names."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Self

from shardway.formats.iterations import LATEST_TRAIN_STATE, TRACKER, TRAIN_STATE, tracker_text
from shardway.run.files import failing
from shardway.run.places import in_the_way, is_leftover
from shardway.run.staged_file import StagedFile

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "Tracker",
    "holds_checkpoint",
    "in_the_way",
    "publish_tracker",
    "refuse_older",
    "tracked_iteration",
]


def holds_checkpoint(root: Path, folder: Path) -> bool:
    """Whether the folder of an iteration is there already, in a root where a checkpoint may be.

    Args:
        root: Root of a Megatron checkpoint; it need not exist.
        folder: The iteration's folder in it.

    Raises:
        ShardwayError: `destination-exists` when the root is a file, or a directory that holds something else.
    """
    with failing("look at what is there", root):
        if not root.exists():
            return False
        if not root.is_dir():
            raise in_the_way(root, "it is not a directory", "choose another destination")
        present = sorted(path.name for path in root.iterdir() if not is_leftover(path.name))
    if present and not any(name in (TRACKER, "release") or name.startswith("iter_") for name in present):
        listed = ", ".join(present[:4]) + (", ..." if len(present) > 4 else "")
        raise in_the_way(root, f"it is not empty and no Megatron checkpoint: {listed}", "choose another destination")
    with failing("look at what is there", folder):
        return folder.exists() and any(folder.iterdir())


def refuse_older(root: Path, folder: Path, iteration: int | None) -> None:
    """Refuse to add an iteration below the one that the root is at.

    Raises:
        ShardwayError: `destination-exists`.
    """
    latest = tracked_iteration(root)
    if latest is not None and (iteration is None or iteration < latest):
        raise in_the_way(
            root,
            f"it is at iteration {latest}; writing {folder.name} there would turn the tracker back",
            "choose another destination, or an iteration above that",
        )


def tracked_iteration(root: Path) -> int | None:
    """The iteration that a root's tracker file names; None without one, or for a release."""
    try:
        text = (root / TRACKER).read_bytes().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and len(text) < 10 else None


class Tracker:
    """The files by which a root names its latest iteration, replaced last of all.

    They are written beside their places when the context is entered, so that a full disk shows before anything is
    published; `publish` renames them. Leaving the context without that removes them.

    Args:
        root: Root of the checkpoint; it exists.
        iteration: Number of the iteration that is about to be published; None for a release.
        train_state: Contents of its train_state.pt; None where it has none.
        sync: Force the files to the device.
        staged_in: Directory for what is not published yet; None: the root.
    """

    def __init__(
        self,
        root: Path,
        iteration: int | None,
        train_state: bytes | None,
        *,
        sync: bool,
        staged_in: Path | None = None,
    ) -> None:
        self._files = [StagedFile(root / TRACKER, tracker_text(iteration), sync=sync, staged_in=staged_in)]
        if train_state is not None:
            latest = StagedFile(root / LATEST_TRAIN_STATE, train_state, sync=sync, staged_in=staged_in)
            self._files.insert(0, latest)
        self._root = root
        self._iteration = iteration

    def __enter__(self) -> Self:
        self._staged = contextlib.ExitStack()
        with contextlib.ExitStack() as staged:
            for file in self._files:
                staged.enter_context(file)
            self._staged = staged.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._staged.close()

    def publish(self) -> tuple[str, ...]:
        """Let the root name the iteration, which is in place; a later iteration keeps its place.

        Returns:
            What a user should know about it, one sentence each.

        Raises:
            ShardwayError: `io-failed`.
        """
        latest = tracked_iteration(self._root)
        if latest is not None and (self._iteration is None or self._iteration < latest):
            return (f"the tracker still names iteration {latest}",)
        for file in self._files:
            file.publish()
        return ()


def publish_tracker(root: Path, folder: Path, iteration: int | None, *, sync: bool) -> tuple[str, ...]:
    """Let the root name an iteration whose folder is in place already; see `Tracker`."""
    with failing("read", folder / TRAIN_STATE):
        train_state = (folder / TRAIN_STATE).read_bytes() if (folder / TRAIN_STATE).exists() else None
    with Tracker(root, iteration, train_state, sync=sync) as tracker:
        return tracker.publish()
