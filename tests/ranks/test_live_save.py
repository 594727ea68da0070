"""Saves of a live model that go well: alone, twice, in the background, through other stores, of plain torch models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.oracle import read_torch_dist, same_bits
from tests.ranks.fleet import World, listing, same_error, same_report
from tests.ranks.live_worker import _plain_model

import shardway

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.ranks.conftest import Known
    from tests.ranks.fleet import Fleet

SHORT = {"distributed_timeout_minutes": 0.1}


def test_the_root_is_that_of_an_import(fleet: Fleet, known: Callable[[str], Known], tmp_path: Path) -> None:
    """An iteration with its tracker, the record, and an hf folder that makes the export need nothing else."""
    model = known("llama")
    root = tmp_path / "deep/root"
    fleet.run(model.world(2, [{"do": "save", "path": root, "hf": model.hf, "iteration": 40}], tp=2))
    folder = root / "iter_0000040"
    assert sorted(path.name for path in root.iterdir()) == [
        folder.name,
        "latest_checkpointed_iteration.txt",
        "latest_train_state.pt",
    ]
    assert sorted(path.name for path in (folder / "hf").iterdir()) == sorted(
        path.name for path in model.hf.iterdir() if path.suffix != ".safetensors"
    )
    for path in (folder / "hf").iterdir():
        assert path.read_bytes() == (model.hf / path.name).read_bytes()
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "40"
    assert json.loads((folder / "shardway.json").read_text())["source"] == "live"
    assert shardway.verify(model.hf, root).equal
    shardway.export_hf(root, tmp_path / "out")
    assert shardway.verify(tmp_path / "out", model.hf).equal
    model.check(fleet, {folder: 1})


def test_the_same_and_other_iterations_again(fleet: Fleet, known: Callable[[str], Known], tmp_path: Path) -> None:
    model = known("llama")
    root = tmp_path / "root"
    task = {"do": "save", "path": root, "hf": model.hf, **SHORT}
    tasks = [
        task | {"iteration": 1},
        task | {"iteration": 2},
        task | {"iteration": 2, "sign": -1},
        task | {"iteration": 2, "sign": -1, "if_exists": "replace"},
        task | {"iteration": 1, "sign": -1, "if_exists": "replace"},
        task | {"iteration": 0},
        task | {"iteration": 2, "if_exists": "replace", "store": "file"},
    ]
    (ran,) = fleet.run(model.world(2, tasks[:-1], tp=2))
    for number in (0, 1, 3, 4):
        assert same_report(ran.of(number))["arrived"] == [0, 1]
    for number in (2, 5):
        error = same_error(ran.of(number))
        assert (error.error, error.code) == ("SaveFailed", "destination-exists")
        assert max(outcome.seconds for outcome in ran.of(number)) < 3
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert len(list(root.iterdir())) == 4
    model.check(fleet, {root / "iter_0000001": -1, root / "iter_0000002": -1})


def test_other_stores(fleet: Fleet, known: Callable[[str], Known], tmp_path: Path) -> None:
    model = known("llama")
    kinds = ["file", "filestore", "prefix"]
    tasks = [{"do": "save", "path": tmp_path / kind, "hf": model.hf, "store": kind, **SHORT} for kind in kinds]
    tasks.append(tasks[0] | {"iteration": 1, "absent": [2]})
    tasks.append(tasks[0] | {"iteration": 2, "absent": [0, 1]})
    alone = {"do": "save", "path": tmp_path / "hash", "hf": model.hf, "store": "hash"}
    ran, _ = fleet.run(model.world(4, tasks, tp=2), model.world(1, [alone]))
    for number, arrived in enumerate(([0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 3], [2, 3])):
        assert same_report(ran.of(number))["arrived"] == arrived
    folders = {tmp_path / kind / "iter_0000000": 1 for kind in (*kinds, "hash")}
    model.check(fleet, folders | {tmp_path / "file" / f"iter_000000{number}": 1 for number in (1, 2)})


def test_the_model_may_change_while_it_is_saved(fleet: Fleet, known: Callable[[str], Known], tmp_path: Path) -> None:
    """Three async saves of one job: the second begins while the first goes on, the third has the second's memory."""
    model = known("llama")
    root = tmp_path / "root"
    slow = {"rank": [0, 1], "at": "os.pwritev", "do": "sleep", "seconds": 0.05}
    task = {"do": "save", "path": root, "hf": model.hf, "async_save": True, "fully_parallel_save": False}
    tasks: list[dict[str, Any]] = [
        task | {"iteration": 1, "sign": -1, "wait": False, "slow": 0.05},
        task | {"iteration": 2, "wait": False, "slow": 0.01},
        {"do": "wait", "iteration": 1},
        {"do": "wait", "iteration": 2},
        task | {"iteration": 3, "change": True, "faults": [slow]},
    ]
    (ran,) = fleet.run(model.world(2, tasks, tp=2))
    for number in (2, 3, 4):
        same_report(ran.of(number))
    for rank in (0, 1):
        started = [ran.of(number)[rank] for number in (0, 1, 4)]
        assert [outcome.notes["returned"] for outcome in started] == ["AsyncSave"] * 3
        assert [outcome.notes["done"] for outcome in started] == [False] * 3
        first, second, third = (set(outcome.notes["memory"]) for outcome in started)
        assert not first & second
        assert third == second
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "3"
    model.check(fleet, {root / f"iter_000000{k}": sign for k, sign in ((1, -1), (2, 1), (3, 1))})


def test_an_error_in_the_background_is_raised_by_wait(
    fleet: Fleet, known: Callable[[str], Known], tmp_path: Path
) -> None:
    model = known("llama")
    full = {"rank": 1, "at": "os.pwritev", "do": "ENOSPC", "after": 2}
    task = {"do": "save", "hf": model.hf, "async_save": True}
    tasks: list[dict[str, Any]] = [
        task | {"path": tmp_path / "root", "faults": [full]},
        task | {"path": tmp_path / "absent", "absent": [0], "distributed_timeout_minutes": 0.02},
        task | {"path": tmp_path / "root"},
    ]
    (ran,) = fleet.run(model.world(2, tasks, tp=2))
    error = same_error(ran.of(0))
    assert (error.error, error.code) == ("SaveFailed", "no-space")
    assert "rank 1: could not write" in error.text
    assert same_error(ran.of(1)).error == "SaveIncomplete"
    same_report(ran.of(2))
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    model.check(fleet, {tmp_path / "root" / "iter_0000000": 1})


def test_plain_torch_models(fleet: Fleet, tmp_path: Path) -> None:
    """Without any process group; replicated; sharded by FSDP2, where every rank has to come."""
    worlds = [
        World(ranks=1, model=None, store="none", tasks=[{"do": "save", "plain": "whole", "path": tmp_path / "alone"}]),
        World(
            ranks=2,
            model=None,
            tasks=[
                {"do": "save", "plain": "fsdp", "path": tmp_path / "fsdp", **SHORT},
                {"do": "save", "plain": "whole", "path": tmp_path / "one", "participants": [1], "absent": [0]},
                {"do": "save", "plain": "fsdp", "path": tmp_path / "half", "only": {"1": {"path": str(tmp_path / "x")}}}
                | {"distributed_timeout_minutes": 0.02},
            ],
        ),
    ]
    alone, two = fleet.run(*worlds)
    assert same_report(alone.of(0))["arrived"] == [0]
    assert same_report(two.of(0))["arrived"] == [0, 1]
    assert same_report(two.of(1))["arrived"] == [1]
    assert {outcome.error for outcome in two.of(2)} == {"SaveIncomplete"}
    expected = _plain_model("whole", 1).state_dict()
    for name in ("alone", "fsdp", "one"):
        tensors, _ = read_torch_dist(tmp_path / name / "iter_0000000")
        assert tensors.keys() == expected.keys()
        assert [key for key in expected if not same_bits(tensors[key].reshape(-1), expected[key].reshape(-1))] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "fsdp", "one"]


def test_a_destination_that_is_taken_is_left_alone(fleet: Fleet, known: Callable[[str], Known], tmp_path: Path) -> None:
    model = known("llama")
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    (tmp_path / "empty").mkdir()
    task = {"do": "save", "hf": model.hf}
    roots = [tmp_path / "file", tmp_path / "other", tmp_path / "file/below"]
    tasks = [task | {"path": root} for root in roots]
    absent = task | {"path": tmp_path / "empty", "absent": [1], "distributed_timeout_minutes": 0.02}
    before = listing(tmp_path)
    (ran,) = fleet.run(model.world(2, [*tasks, absent], tp=2))
    for number, root in enumerate(roots):
        error = same_error(ran.of(number))
        assert error.error == "SaveFailed"
        assert str(root) in error.text
    assert listing(tmp_path) == before
