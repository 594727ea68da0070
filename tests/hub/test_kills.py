"""A process that imports from the Hub is killed, or interrupted, and the same command is run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.hub.conftest import stored_bytes
from tests.hub.test_import import LARGER, NAME, weights_of, write_in_order

import shardway

if TYPE_CHECKING:
    from tests.hub.server import FakeHub

SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_ends_in_the_midst_is_gone_on_from(
    hub: FakeHub, tmp_path: Path, elsewhere: Path, kind: signal.Signals
) -> None:
    """The environment variables alone tell the process where the Hub is."""
    origin = write_in_order(tmp_path / "origin", LARGER, 10)
    hub.add(NAME, origin)
    names = sorted(weights_of(origin))
    reached, go_on = threading.Event(), threading.Event()

    def stop_here(name: str) -> None:
        if name == names[6]:
            reached.set()
            go_on.wait(60)

    hub.on_file = stop_here
    command = ["import", NAME, "ckpt", "--no-keep-source", "--max-file-size", "200kB"]
    environment = {
        **os.environ, "PYTHONPATH": str(SOURCE), "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "shardway", *command], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert reached.wait(10), process.communicate(timeout=5)
        process.send_signal(kind)
        if kind is signal.SIGINT:
            go_on.set()
        _, told = process.communicate(timeout=60)
    go_on.set()
    assert process.returncode == (130 if kind is signal.SIGINT else -signal.SIGKILL), told
    assert not Path("ckpt/iter_0000000").exists()
    assert stored_bytes(Path("ckpt")) > 0
    hub.on_file = lambda _: None
    hub.requests.clear()
    done = subprocess.run(
        [sys.executable, "-m", "shardway", *command], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "of an earlier run" in done.stdout
    assert not set(hub.fetched()) & set(names[:4])
    assert shardway.verify(origin, "ckpt").equal
    assert shardway.verify("ckpt").equal
    assert not [path for path in Path("ckpt").iterdir() if path.name.startswith(".")]
    assert not (tmp_path / "home" / "hub").exists()
