"""Telling the name of a repository on the Hub from a path."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError

if TYPE_CHECKING:
    from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


def is_repository(source: str | Path) -> bool:
    """Whether a source is the name of a repository, ``org/name``: nothing lies there, and it is not a `Path`."""
    return isinstance(source, str) and _NAME.fullmatch(source) is not None and not os.path.lexists(source)


def refuse_revision(source: str | Path, revision: str | None) -> None:
    """Check that nobody asks for a revision of what is no repository.

    Raises:
        ShardwayError: `option-invalid`.
    """
    if revision is not None:
        what = f"{source} is not the name of a repository on the Hub, so it has no revisions"
        raise ShardwayError(Problem(code=Code.OPTION_INVALID, what=what))


def check_repository(name: str) -> None:
    """Check that something can be the name of a repository.

    Raises:
        ShardwayError: `option-invalid`.
    """
    if _NAME.fullmatch(name) is None or ".." in name or "--" in name:
        what = f"{name!r} can't be the name of a repository on the Hub; expected org/name"
        raise ShardwayError(Problem(code=Code.OPTION_INVALID, what=what))
