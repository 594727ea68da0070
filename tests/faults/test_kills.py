"""Runs that are killed at any moment: the old checkpoint is there, the new one, or nothing; the next run works."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.faults.scenes import MODEL, NEW_SEED, OLD_SEED, Scene, litter, make_scenes
from tests.faults.syscalls import KILL, kill_after, require_notification, run
from tests.megatron import require

import shardway
from shardway.run import cleaning, pulse

AT_CALLS = int(os.environ.get("SHARDWAY_KILLS", "300")) // 6
AT_TIMES = 12
NAMES = ["import", "import, replacing", "export", "export, replacing", "live save", "live save, replacing"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scene]:
    require_notification()
    require("torch")
    return make_scenes(tmp_path_factory.mktemp("scenes"), live=True)


@pytest.fixture(scope="module")
def survivors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints as they were found after kills, for Megatron's own reader."""
    return tmp_path_factory.mktemp("survivors")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_killed_anywhere(
    name: str, scenes: dict[str, Scene], stages: Path, survivors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At calls spread over the whole run, the seed's choice, and at random times. 300 kills over all scenes."""
    # One that is killed before it has said who it is would keep the next one waiting for a minute.
    monkeypatch.setattr(pulse, "EXPIRY_S", 1.0)
    scene = scenes[name]
    seed = int(os.environ.get("SHARDWAY_SEED", "0"))
    rng = random.Random(f"{name} {seed}")
    destination = scene.begin(stages / "whole")
    began = time.monotonic()
    whole = run(lambda: scene.act(destination), stages / "whole", lambda number, call: None)
    duration = time.monotonic() - began
    assert whole.error is None, whole.error
    kills = 0
    found: list[str] = []
    numbers = itertools.count()
    step = len(whole.calls) / AT_CALLS
    places = [min(int(step * (k + rng.random())), len(whole.calls) - 1) for k in range(AT_CALLS)]
    for place in places:
        stage = stages / str(next(numbers))
        out = scene.begin(stage)
        ended = run(lambda to=out: scene.act(to), stage, lambda number, call, at=place: KILL if number == at else None)  # type: ignore[misc]
        kills += ended.killed
        found.append(recover(scene, stage, out, rng, survivors, f"{name}: killed at {ended.calls[-1:]}, seed {seed}"))
    for _ in range(AT_TIMES):
        stage = stages / str(next(numbers))
        out = scene.begin(stage)
        after = rng.uniform(0, duration)
        ended = kill_after(lambda to=out: scene.act(to), after)  # type: ignore[misc]
        kills += ended.killed
        found.append(recover(scene, stage, out, rng, survivors, f"{name}: killed after {after:.4f} s, seed {seed}"))
    assert kills >= AT_CALLS
    assert "new" in found
    assert ("old" if scene.old else "nothing") in found


def recover(scene: Scene, stage: Path, destination: Path, rng: random.Random, survivors: Path, what: str) -> str:
    """Judge what a killed run has left, then clean up and run again, or the other way round."""
    try:
        found = scene.found(destination)
        if found != "nothing" and "export" not in scene.name and rng.random() < 0.15:
            shutil.copytree(destination, survivors / f"{len(list(survivors.iterdir()))} {found} {scene.name[:4]}")
        if rng.random() < 0.5:
            clean(destination)
            assert not litter(stage), f"left after clean: {litter(stage)}"
            assert scene.found(destination) in (found, "new")
        again = kill_free(scene, destination)
        assert again is None or finished(scene, destination, again), again
        assert scene.found(destination) == "new"
        clean(destination)
        assert not litter(stage), f"left at the end: {litter(stage)}"
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error
    shutil.rmtree(stage)
    return found


def clean(destination: Path) -> None:
    """Clean, without a minute's wait for what does not say which process it belongs to."""
    report = cleaning.clean(destination, wait_seconds=0.3) if destination.parent.exists() else None
    assert report is None or not report.kept, report


def kill_free(scene: Scene, destination: Path) -> BaseException | None:
    """Run the scene again in a process of its own; return what it raised."""
    return run(lambda: scene.act(destination), destination.parent, lambda number, call: None).error


def finished(scene: Scene, destination: Path, error: BaseException) -> bool:
    """Whether a run was refused because the killed one had done everything and only its exit was missing."""
    assert isinstance(error, shardway.ShardwayError), error
    assert error.codes == {"destination-exists"}, error
    return not scene.old and scene.found(destination) == "new"


def test_megatron_reads_what_is_left(scenes: dict[str, Scene], survivors: Path, tmp_path: Path) -> None:
    """Megatron-Core's and torch's own readers, on a sample of the checkpoints that were there after a kill."""
    require("torch", "megatron.core")
    roots = {root: root.name.split()[1:] for root in sorted(survivors.iterdir())}
    if len(roots) < 4:
        pytest.skip("needs the kills of this module")
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("megatron_reader.py"), tmp_path / "store"],
        input="\n".join(f"{root}/iter_0000000" for root in roots),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    read = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(read) == len(roots)
    wanted = {
        kind: {name: array.tobytes().hex()[:64] for name, array in tensors.items()}
        for scene in ("import", "live save, replacing")
        for kind, tensors in (
            (f"new {scene[:4]}", scenes[scene].new),
            (f"old {scene[:4]}", scenes["import, replacing"].old if scene == "import" else scenes[scene].old),
        )
    }
    for (root, (found, kind)), tensors in zip(roots.items(), read, strict=True):
        assert tensors == wanted[f"{found} {kind}"], root
    assert {found for found, _ in roots.values()} == {"old", "new"}
    assert MODEL.weights(OLD_SEED).keys() == MODEL.weights(NEW_SEED).keys()
