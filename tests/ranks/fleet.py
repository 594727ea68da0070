"""Worlds of real ranks, forked from a process that has imported torch and megatron-core: each costs a second, not ten.

What they do is in save_worker.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("save_worker.py")
STOP = 100.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Ranks that do the same tasks one after the other.

    Attributes:
        ranks: How many.
        tasks: What to do; ``do`` names a function of save_worker, whose arguments the rest are.
        model: Name in ``live_worker.MODELS``, or megatron fields; None for no Megatron model.
        source: Checkpoint that the model's values come from; None for a function of key and index.
        dtype: Of the model.
        grid: ``tp``, ``pp``, ``ep``, ``vpp``.
        store: What the job's store is: ``tcp`` (hosted by rank 0), ``file``, or ``none`` for no process group.
        killed: Ranks that won't reach the end.
        seconds: After which all of them are killed.
    """

    ranks: int
    tasks: Sequence[Mapping[str, Any]]
    model: Any = "untied"
    source: Path | None = None
    dtype: str = "float32"
    grid: Mapping[str, int] = dataclasses.field(default_factory=dict)
    store: str = "tcp"
    killed: Sequence[int] = ()
    seconds: float = 60.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a task went on one rank."""

    report: Mapping[str, Any] | None = None
    error: str | None = None
    code: str | None = None
    text: str = ""
    tensors: Sequence[str] = ()
    files: Sequence[str] = ()
    seconds: float = 0.0
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """What a world did: ``outcomes[task][rank]``, None for a rank that was killed or absent."""

    outcomes: Sequence[Sequence[Outcome | None]]
    codes: Sequence[int]
    log: str

    def of(self, task: int) -> list[Outcome]:
        """The outcomes of the ranks that have one."""
        return [outcome for outcome in self.outcomes[task] if outcome is not None]


class Fleet:
    """Starts worlds; close it, and none of its processes is left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, *worlds: World) -> list[Ran]:
        """Run worlds, a few at a time.

        Raises:
            AssertionError: With the output of every rank, when one ends otherwise than `World.killed` says, or late.
        """
        folders = []
        for _ in worlds:
            self._number += 1
            folders.append(self._folder / f"world{self._number}")
            folders[-1].mkdir(parents=True)
        asked = [
            dataclasses.asdict(world) | {"folder": str(folder)} for world, folder in zip(worlds, folders, strict=True)
        ]
        codes = self._ask(asked)
        ran = [_gather(world, folder, code) for world, folder, code in zip(worlds, folders, codes, strict=True)]
        for world, one in zip(worlds, ran, strict=True):
            expected = [-signal.SIGKILL if rank in world.killed else 0 for rank in range(world.ranks)]
            assert list(one.codes) == expected, one.log
        return ran

    def _ask(self, asked: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        if self._process is None:
            environment = os.environ | {
                "CUDA_VISIBLE_DEVICES": "",
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
                "PYTHONWARNINGS": "ignore",
                "TORCHDYNAMO_DISABLE": "1",
            }
            with (self._folder / "fleet.log").open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", str(WORKER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(asked, default=str).encode() + b"\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], STOP)[0]:
            self.close()
        answer = process.stdout.readline()
        assert answer, (self._folder / "fleet.log").read_text()
        codes: list[list[int]] = json.loads(answer)
        return codes

    def close(self) -> None:
        """Kill what is left."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None


def _gather(world: World, folder: Path, codes: Sequence[int]) -> Ran:
    def outcome(task: int, rank: int) -> Outcome | None:
        file = folder / f"{task}.{rank}.json"
        return Outcome(**json.loads(file.read_text())) if file.exists() else None

    logs = [f"--- rank {rank}: {code}\n{(folder / f'rank{rank}.log').read_text()}" for rank, code in enumerate(codes)]
    return Ran(
        outcomes=[[outcome(task, rank) for rank in range(world.ranks)] for task in range(len(world.tasks))],
        codes=codes,
        log="\n".join([str(folder), *logs]),
    )


def same_report(outcomes: list[Outcome]) -> dict[str, Any]:
    """What all ranks have reported alike."""
    reports = []
    for outcome in outcomes:
        assert outcome.report is not None, outcome.text
        reports.append({key: value for key, value in outcome.report.items() if key not in ("wrote_bytes", "seconds")})
    assert all(report == reports[0] for report in reports)
    return reports[0]


def same_error(outcomes: list[Outcome]) -> Outcome:
    """What all ranks have raised alike."""
    assert len({(outcome.error, outcome.code, outcome.text) for outcome in outcomes}) == 1, outcomes
    assert outcomes[0].error is not None
    return outcomes[0]


def listing(root: Path) -> list[tuple[str, int]]:
    """Every path below a root; for files also the time of the last change."""
    return sorted((str(path), path.stat().st_mtime_ns if path.is_file() else 0) for path in root.rglob("*"))
