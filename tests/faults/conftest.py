"""Where runs that fail or are killed write."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def stages(tmp_path: Path) -> Iterator[Path]:
    """An empty directory in memory, where there is such a place: thousands of fsyncs are free there."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="shardway-tests-", dir=memory))
    try:
        yield path
    finally:
        shutil.rmtree(path)
