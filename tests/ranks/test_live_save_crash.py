"""Ranks that are killed, get stuck, or can't write while a live model is saved."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tests.ranks.fleet import Ran, listing, same_error, same_report

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.ranks.conftest import Known
    from tests.ranks.fleet import Fleet, World

DEADLINE = {"distributed_timeout_minutes": 0.1}
BOUND = 25.0
SLOW = {"rank": [0, 1, 2], "at": "os.pwritev", "do": "sleep", "seconds": 0.02}
PUBLISHED = ["iter_0000001", "iter_0000002", "latest_checkpointed_iteration.txt", "latest_train_state.pt"]

# Where the coordinator dies: in its calls to the store, and at each step that the protocol asks of a rank.
PHASES: dict[str, dict[str, Any]] = {
    "arrival": {"at": "store", "after": 2},
    "lead": {"at": "store", "after": 6},
    "assembly": {"at": "store", "after": 14},
    "assign": {"at": "store", "after": 24},
    "before the staging folder": {"at": "prepare"},
    "after the staging folder": {"at": "prepare", "do": "kill after"},
    "write": {"at": "os.pwritev", "after": 3},
    "written": {"at": "write", "do": "kill after"},
    "before the metadata": {"at": "publish"},
    "before the decision": {"at": "publish", "do": "kill after"},
    "before the rename": {"at": "finish"},
    "before the tracker": {"at": "tracker"},
    "before the end": {"at": "finish", "do": "kill after"},
}


def killed(phase: str, **task: Any) -> list[dict[str, Any]]:
    """One save that goes well, of iteration 1 and negated values; then that of iteration 2 where rank 0 dies."""
    fault = {"rank": 0, "do": "kill", **PHASES[phase]}
    before = {"do": "save", "iteration": 1, "sign": -1}
    return [before | task, {"do": "save", "iteration": 2, "first": 0, "faults": [SLOW, fault], **DEADLINE, **task}]


def survived(ran: Ran, num_ranks: int) -> None:
    assert ran.outcomes[1][0] is None
    assert len(ran.of(1)) == num_ranks - 1
    assert max(outcome.seconds for outcome in ran.of(1)) < BOUND


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_replicas_complete_the_save_of_a_coordinator_that_is_killed(
    fleet: Fleet, known: Callable[[str], Known], tmp_path: Path
) -> None:
    model = known("llama")
    worlds = {
        tmp_path / phase: model.world(3, killed(phase, path=tmp_path / phase, hf=model.hf), store="file", killed=[0])
        for phase in PHASES
    }
    folders: dict[Path, int] = {}
    for root, ran in zip(worlds, fleet.run(*worlds.values()), strict=True):
        survived(ran, 3)
        report = same_report(ran.of(1))
        assert report["coordinator"] in report["arrived"]
        assert names(root) == PUBLISHED, root
        assert (root / "latest_checkpointed_iteration.txt").read_text() == "2"
        assert not [path.name for path in (root / "iter_0000002").iterdir() if path.name.startswith(".p")]
        folders |= {root / "iter_0000001": -1, root / "iter_0000002": 1}
    model.check(fleet, folders)


def test_without_replicas_the_others_raise_or_the_checkpoint_is_whole(
    fleet: Fleet, known: Callable[[str], Known], tmp_path: Path
) -> None:
    """Half of each matrix is on rank 0 alone: TP=2, DP=1."""
    model = known("llama")
    worlds = {
        tmp_path / phase: model.world(
            2, killed(phase, path=tmp_path / phase, hf=model.hf), tp=2, store="file", killed=[0]
        )
        for phase in PHASES
    }
    folders: dict[Path, int] = {}
    ends = {}
    for root, ran in zip(worlds, fleet.run(*worlds.values()), strict=True):
        survived(ran, 2)
        (outcome,) = ran.of(1)
        folders[root / "iter_0000001"] = -1
        ends[root.name] = outcome.error
        if outcome.error is None:
            assert names(root) == PUBLISHED
            folders[root / "iter_0000002"] = 1
        else:
            assert outcome.code in ("save-incomplete", "save-rank-lost"), outcome.text
            assert names(root) == [name for name in PUBLISHED if name != "iter_0000002"]
            assert (root / "latest_checkpointed_iteration.txt").read_text() == "1"
    assert ends["write"] is not None
    assert ends["before the metadata"] is None
    assert ends["before the tracker"] is None
    model.check(fleet, folders)


def test_the_host_of_the_store_is_killed(fleet: Fleet, known: Callable[[str], Known], tmp_path: Path) -> None:
    """Nobody can know what was decided then: every rank says so, and what is published is whole."""
    model = known("llama")
    phases = ["arrival", "after the staging folder", "write", "before the decision", "before the rename"]
    worlds = {
        tmp_path / phase: model.world(3, killed(phase, path=tmp_path / phase, hf=model.hf), killed=[0])
        for phase in phases
    }
    for root, ran in zip(worlds, fleet.run(*worlds.values()), strict=True):
        survived(ran, 3)
        for outcome in ran.of(1):
            assert outcome.code == "store-failed"
            assert "TCPStore at 127.0.0.1" in outcome.text
        assert not (root / "iter_0000002").exists()
        assert (root / "latest_checkpointed_iteration.txt").read_text() == "1"
    # What was left behind is in nobody's way.
    again = [{"do": "save", "path": root, "hf": model.hf, "iteration": 2} for root in worlds]
    (ran,) = fleet.run(model.world(1, again))
    for number in range(len(phases)):
        same_report(ran.of(number))
    model.check(fleet, {root / f"iter_{k:07d}": sign for root in worlds for k, sign in ((1, -1), (2, 1))})


def test_a_replica_takes_over_from_a_writer(fleet: Fleet, known: Callable[[str], Known], tmp_path: Path) -> None:
    """From one that is killed half-way, and from one that gets stuck and returns with the others all the same."""
    model = known("llama")
    task: dict[str, Any] = {"do": "save", "hf": model.hf, "first": 0}
    kill = {"rank": 1, "at": "os.pwritev", "do": "kill", "after": 3}
    stall = {"rank": 1, "at": "os.pwritev", "do": "sleep", "after": 3, "seconds": 10.0}
    worlds: list[World] = []
    for parallel in (True, False):
        first = 0 if parallel else 1  # the lowest replica is the only one that writes
        task |= {"fully_parallel_save": parallel, "first": first, "faults": [SLOW, kill]}
        task |= {"path": tmp_path / f"kill {parallel}", **DEADLINE}
        only = {"fully_parallel_save": parallel} | ({} if parallel else {"absent": [0]})
        worlds.append(model.world(4, [task | only], tp=2 if parallel else 1, store="file", killed=[1]))
    stuck = {"do": "save", "hf": model.hf, "path": tmp_path / "stuck", "faults": [stall]}
    worlds.append(model.world(4, [stuck | {"distributed_timeout_minutes": 0.06}], tp=2))
    *ran, last = fleet.run(*worlds)
    for each in ran:
        report = same_report(each.of(0))
        assert report["lost"] == [1]
    report = same_report(last.of(0))
    assert report["lost"] == [1]
    assert len(last.of(0)) == 4
    assert max(outcome.seconds for outcome in last.of(0)) < BOUND
    folders = {tmp_path / name / "iter_0000000": 1 for name in ("kill True", "kill False", "stuck")}
    for folder in folders:
        files = {path.name for path in folder.iterdir()}
        assert not {name for name in files if name.startswith("__1_")}, "what a lost writer wrote is not left"
    model.check(fleet, folders)


def test_another_job_takes_up_nothing_of_a_killed_one(
    fleet: Fleet, known: Callable[[str], Known], tmp_path: Path
) -> None:
    """All of its ranks die while one of them has told that it has written its half; the store is a file that stays."""
    model = known("llama")
    task = {"do": "save", "path": tmp_path / "root", "hf": model.hf, "iteration": 2, "store": "file", **DEADLINE}
    dying = [
        {"rank": 0, "at": "os.pwritev", "do": "sleep", "seconds": 60.0},
        {"rank": [0, 1], "at": "time", "do": "kill", "seconds": 1.5},
    ]
    fleet.run(model.world(2, [task | {"sign": -1, "faults": dying}], tp=2, store="file", killed=[0, 1]))
    assert {path.name for path in tmp_path.rglob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    (ran,) = fleet.run(model.world(2, [task], tp=2, store="file"))
    report = same_report(ran.of(0))
    assert report["lost"] == []
    model.check(fleet, {tmp_path / "root/iter_0000002": 1})


def test_replacing_is_all_or_nothing(fleet: Fleet, known: Callable[[str], Known], tmp_path: Path) -> None:
    model = known("llama")
    phases = ["write", "before the decision", "before the rename", "before the tracker", "before the end"]
    worlds = {}
    for phase in phases:
        first, second = killed(phase, path=tmp_path / phase, hf=model.hf)
        second |= {"iteration": 1, "if_exists": "replace"}
        worlds[tmp_path / phase] = model.world(3, [first, second], store="file", killed=[0])
    for root, ran in zip(worlds, fleet.run(*worlds.values()), strict=True):
        survived(ran, 3)
        same_report(ran.of(1))
        assert names(root) == [name for name in PUBLISHED if name != "iter_0000002"]
    model.check(fleet, {root / "iter_0000001": 1 for root in worlds})


def test_what_a_rank_can_t_write_every_rank_raises(fleet: Fleet, known: Callable[[str], Known], tmp_path: Path) -> None:
    """No replica steps in: a full disk is full for all. TP=2, DP=2."""
    model = known("llama")
    cases: dict[str, tuple[dict[str, Any], str, list[str]]] = {
        "full": ({"at": "os.pwritev", "do": "ENOSPC", "after": 2}, "no-space", ["write ", " bytes at "]),
        "quota": ({"at": "os.pwritev", "do": "EDQUOT"}, "no-space", ["write ", " bytes at 0"]),
        "broken": ({"at": "os.fsync", "do": "EIO"}, "io-failed", [" bytes"]),
        "read-only": ({"at": "os.open", "do": "EROFS"}, "io-failed", ["create a file of ", " bytes"]),
        "vanished": ({"at": "os.open", "do": "ENOENT"}, "io-failed", ["create a file of ", " bytes"]),
        "removed": ({"at": "write", "do": "vanish"}, "io-failed", []),
        "removed later": ({"at": "publish", "do": "vanish"}, "io-failed", []),
        "no metadata": ({"at": "publish", "do": "ENOSPC"}, "save-rank-failed", []),
        "no folder": ({"at": "prepare", "do": "EROFS"}, "save-rank-failed", []),
    }
    tasks = []
    for name, (fault, _, _) in cases.items():
        coordinating = fault["at"] in ("publish", "prepare")
        # Nothing waits for this deadline; a disk that is slow to make a mark must not be taken for an absent rank.
        task = {"do": "save", "path": tmp_path / "root", "hf": model.hf, "iteration": 3}
        task |= {"distributed_timeout_minutes": 0.5}
        tasks.append(task | {"first": 0, "faults": [{"rank": 0 if coordinating else 1, **fault}]})
        tasks.append(tasks[-1] | {"path": tmp_path / name / "new"})
    before_task = {"do": "save", "path": tmp_path / "root", "hf": model.hf, "iteration": 1}
    fleet.run(model.world(1, [before_task]))
    before = listing(tmp_path)
    (ran,) = fleet.run(model.world(4, tasks, tp=2))
    for number, outcome in enumerate(map(ran.of, range(len(tasks)))):
        name = list(cases)[number // 2]
        fault, code, texts = cases[name]
        error = same_error(outcome)
        assert len(outcome) == 4
        assert (error.error, error.code) == ("SaveFailed", code), error.text
        who = "[0-3]" if name == "removed" else "0" if fault["at"] in ("publish", "prepare") else "1"
        assert re.search(rf"rank {who}\b", error.text), error.text  # what is removed any rank may be the first to miss
        for text in texts:
            assert text in error.text
        if code != "save-rank-failed":
            assert str(tmp_path / (name if number % 2 else "root")) in error.files[0]
    assert listing(tmp_path) == before
