"""Telling a checkpoint that is published and whole from everything else that may lie at a path."""

from __future__ import annotations

from pathlib import Path

from shardway.core.errors import ShardwayError
from shardway.formats.iterations import find_iteration
from shardway.run.publish import MARK, is_leftover
from shardway.verification.opening import is_megatron, open_checkpoint

_TRIES = 5


def is_complete(path: str | Path) -> bool:
    """Whether a path is a checkpoint that has been published and is whole: all of its files, as long as they should be.

    False for everything else: nothing, a run's staging directory, a checkpoint that is being copied or downloaded or
    lacks a file, the root of a Megatron checkpoint whose tracker names an iteration that is not there. Headers and
    metadata are read, tensors are not: `verify` does that.

    Args:
        path: A Hugging Face directory, or the root or an iteration folder of a Megatron checkpoint.
    """
    path = Path(path)
    try:
        if any(is_leftover(part) or part.startswith(MARK) for part in path.resolve().parts):
            return False
        for _ in range(_TRIES):
            before = _identity(path)
            try:
                open_checkpoint(path)
            except ShardwayError:
                if _identity(path) == before:
                    return False
                continue  # replaced by another one while it was being read
            return True
    except (ShardwayError, OSError):
        return False
    return False


def _identity(path: Path) -> int:
    """Which directory it is that would be read."""
    return (find_iteration(path) if is_megatron(path) else path).stat().st_ino
