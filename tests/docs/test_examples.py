"""The examples run, say what they promise to show, and leave no process behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.megatron import require

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/non_colocated.py"
DEADLINE_S = 100


def run(path: Path, *arguments: str) -> str:
    """The output of the example, which has to succeed."""
    require("torch", "megatron.core", "psutil")
    done = subprocess.run(command(path, *arguments), env=environment(), capture_output=True, timeout=DEADLINE_S)
    output = done.stdout.decode()
    assert done.returncode == 0, output + done.stderr.decode()
    assert not done.stderr, done.stderr.decode()
    assert not processes_at(path)
    return output


def command(path: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-P", str(EXAMPLE), "--path", str(path), *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src")}


def processes_at(path: Path) -> list[str]:
    """The processes that were started for this path and are still there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(path) in line:
            found.append(f"{process.name}: {line!r}")
    return found


def check_saved(output: str, path: Path) -> None:
    seconds = [float(each) for each in re.findall(r"saved in ([\d.]+) s", output)]
    assert len(seconds) == 2
    assert max(seconds) < 20  # a second where nothing else runs; the example's timeout and the save's are longer
    assert output.count("came: ranks 0 and 1\n") == 2
    written = [float(each) for each in re.findall(r"wrote ([\d.]+) MB", output)]
    assert all(each > 1 for each in written)
    for rank in (2, 3):
        assert f"rank {rank}  inference  hears of new weights: {path}\n" in output
    assert "architecture   LlamaForCausalLM" in output
    assert "all 27 parameters, bit for bit" in output
    assert (path / "latest_checkpointed_iteration.txt").read_text() == "0"


def test_a_save_without_the_inference_workers_ends(tmp_path: Path) -> None:
    check_saved(run(tmp_path / "saved"), tmp_path / "saved")


def test_the_trainers_go_on_during_an_async_save(tmp_path: Path) -> None:
    output = run(tmp_path / "saved", "--async-save", "--no-fully-parallel-save")
    check_saved(output, tmp_path / "saved")
    assert len(re.findall(r"made [1-9]\d* steps meanwhile", output)) == 2


def test_the_incumbent_hangs_until_its_timeout(tmp_path: Path) -> None:
    output = run(tmp_path / "hung", "--incumbent", "--timeout", "4")
    assert "determine_global_metadata" in output
    waited = [float(each) for each in re.findall(r"gave up after ([\d.]+) s", output)]
    assert len(waited) == 2
    assert min(waited) > 2.8
    assert output.count("never got new weights") == 2
    assert not (tmp_path / "hung/.metadata").exists()


def test_nothing_is_left_when_the_example_is_killed(tmp_path: Path) -> None:
    require("torch", "megatron.core", "psutil")
    path = tmp_path / "killed"
    with subprocess.Popen(
        command(path, "--incumbent", "--timeout", "80"), env=environment(), stdout=subprocess.PIPE
    ) as example:
        assert example.stdout is not None
        while b"dist_checkpointing.save" not in (line := example.stdout.readline()):
            assert line, "it ended too early"
        assert len(processes_at(path)) == 5
        example.send_signal(signal.SIGKILL)
        example.wait()
        deadline = time.monotonic() + 20
        while processes_at(path):
            assert time.monotonic() < deadline, processes_at(path)
            time.sleep(0.02)
