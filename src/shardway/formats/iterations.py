"""Iteration folders of a Megatron checkpoint, and the tracker file that names the one in force."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats.file_problems import printable
from shardway.formats.small_files import read_small_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TRAIN_STATE = "train_state.pt"
LATEST_TRAIN_STATE = "latest_train_state.pt"
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
_SHOWN = 8


def find_iteration(path: Path) -> Path:
    """The folder of the iteration that `path` means: itself, or the one that its tracker file names.

    Raises:
        ShardwayError: `tracker-invalid`, `file-missing` or `not-a-checkpoint`.
    """
    if not path.is_dir():
        what = f"{path} is a file, not a checkpoint folder" if path.exists() else f"{path} does not exist"
        raise ShardwayError(Problem(code=Code.FILE_MISSING, what=what, file=path, cure="check the path"))
    if (path / ".metadata").exists() or is_iteration_name(path.absolute().name):
        return path
    tracker = path / TRACKER
    folders = sorted(entry.name for entry in path.iterdir() if is_iteration_name(entry.name) and entry.is_dir())
    if not tracker.exists():
        if not folders:
            raise _not_a_checkpoint(path)
        raise _tracker_invalid(f"{path} has no {TRACKER}", path, folders)
    text = read_small_file(tracker, 4096).decode("utf-8", "replace").strip()
    if text == RELEASE:
        name = RELEASE
    elif re.fullmatch(r"[0-9]{1,18}", text):
        name = iteration_folder(int(text))
    else:
        raise _tracker_invalid(f"the tracker says {text[:80]!r}, neither a number nor 'release'", tracker, folders)
    if name not in folders:
        raise _tracker_invalid(f"the tracker names {name}, which is not there", tracker, folders)
    return path / name


def iteration_folder(iteration: int | None) -> str:
    """Name of the folder of an iteration; None is a release."""
    return RELEASE if iteration is None else f"iter_{iteration:07d}"


def tracker_text(iteration: int | None) -> bytes:
    """Content of ``latest_checkpointed_iteration.txt``."""
    return (RELEASE if iteration is None else str(iteration)).encode()


def is_iteration_name(name: str) -> bool:
    """Whether a folder of this name is an iteration's."""
    return name == RELEASE or re.fullmatch(r"iter_[0-9]{7,18}", name) is not None


def _not_a_checkpoint(path: Path) -> ShardwayError:
    found = shorten(sorted(entry.name for entry in path.iterdir())) or "nothing"
    return ShardwayError(
        Problem(
            code=Code.NOT_A_CHECKPOINT,
            what=f"{path} is no Megatron checkpoint: it has no {TRACKER} and no iter_* folder",
            file=path,
            facts=(f"found: {found}",),
            cure="pass the folder given to --save, or one of its iter_* folders",
        )
    )


def _tracker_invalid(what: str, path: Path, folders: list[str]) -> ShardwayError:
    return ShardwayError(
        Problem(
            code=Code.TRACKER_INVALID,
            what=what,
            file=path,
            facts=(f"iterations there: {shorten(folders) or 'none'}",),
            cure="pass the folder of the iteration that you want" if folders else "check the path",
        )
    )


def shorten(names: Sequence[str]) -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(map(printable, names[:_SHOWN])) + more
