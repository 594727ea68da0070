"""Ranks that never come to a save, that come late, or that mean another one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from tests.ranks.fleet import listing, same_error, same_report

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.ranks.conftest import Known
    from tests.ranks.fleet import Fleet

SOON = 6.0
SHORT = {"distributed_timeout_minutes": 0.02}


@pytest.mark.parametrize("absent", [3, 0, 1], ids=["replica", "store host", "main replica"])
def test_a_world_of_four_saves_without_one(
    absent: int, fleet: Fleet, known: Callable[[str], Known], tmp_path: Path
) -> None:
    """Rank 0 hosts the job's store and, with rank 1, holds all the main replicas; TP=2, DP=2."""
    model = known("llama")
    variants = [(parallel, validate) for parallel in (True, False) for validate in (True, False)]
    tasks = [
        {
            "do": "save",
            "path": tmp_path / f"{parallel}{validate}",
            "hf": model.hf,
            "absent": [absent],
            "fully_parallel_save": parallel,
            "validate_access_integrity": validate,
        }
        for parallel, validate in variants
    ]
    (ran,) = fleet.run(model.world(4, tasks, tp=2))
    came = [rank for rank in range(4) if rank != absent]
    for task, (parallel, _) in enumerate(variants):
        outcomes = ran.of(task)
        report = same_report(outcomes)
        assert report["arrived"] == came
        assert report["lost"] == []
        assert len(outcomes) == 3
        assert max(outcome.seconds for outcome in outcomes) < SOON
        wrote = {
            rank: outcome.report["wrote_bytes"] for rank, outcome in zip(came, outcomes, strict=True) if outcome.report
        }
        assert sum(wrote.values()) == report["num_bytes"]
        pair = [rank for rank in came if rank % 2 != absent % 2]  # the two that hold the same half of the matrices
        if parallel:
            assert min(wrote.values()) > 0.2 * report["num_bytes"]
        else:
            assert wrote[pair[1]] == 0
    model.check(fleet, {tmp_path / f"{parallel}{validate}" / "iter_0000000": 1 for parallel, validate in variants})


def test_what_nobody_holds_is_named(fleet: Fleet, known: Callable[[str], Known], tmp_path: Path) -> None:
    fc2 = "decoder.layers.mlp.linear_fc2.weight"
    cases: list[tuple[str, dict[str, int], list[int], str]] = [
        ("llama", {"tp": 2}, [1], f"{fc2} [3, 64, 96]: [1, 64, 48] from [0, 0, 48] is missing"),
        ("llama", {"tp": 2}, [0], f"{fc2} [3, 64, 96]: [1, 64, 48] from [0, 0, 0] is missing"),
        ("qwen2_tied", {"pp": 2}, [1], "decoder.final_layernorm.weight [64]"),
        ("qwen2_tied", {"pp": 2}, [0], f"{fc2} [4, 64, 96]: [2, 64, 96] from [0, 0, 0] is missing"),
        ("qwen2_tied", {"tp": 2, "pp": 2}, [2, 3], "decoder.final_layernorm.weight [64]"),
    ]
    roots = [tmp_path / str(number) for number in range(len(cases))]
    complete, incomplete = [], []
    for root, (name, grid, absent, _) in zip(roots, cases, strict=True):
        model = known(name)
        ranks = math.prod(grid.values())
        task = {"do": "save", "hf": model.hf}
        complete.append(model.world(ranks, [task | {"path": root, "iteration": 1}], **grid))
        task |= {"absent": absent, "iteration": 2, **SHORT}
        tasks = [task | {"path": root}, task | {"path": root / "new/deep"}]
        incomplete.append(model.world(ranks, tasks, **grid))
    fleet.run(*complete)
    before = listing(tmp_path)
    for world, ran, (_, _, absent, missing) in zip(incomplete, fleet.run(*incomplete), cases, strict=True):
        came = [rank for rank in range(world.ranks) if rank not in absent]
        for task_number in (0, 1):
            outcomes = ran.of(task_number)
            assert len(outcomes) == len(came)
            error = same_error(outcomes)
            assert (error.error, error.code) == ("SaveIncomplete", "save-incomplete")
            assert missing in error.text
            assert f"Arrived: {'rank' if len(came) == 1 else 'ranks'} {'-'.join(map(str, came))}." in error.text
            assert f"Never arrived: {'-'.join(map(str, absent))}." in error.text
            assert max(outcome.seconds for outcome in outcomes) < SOON
    assert listing(tmp_path) == before


def test_a_family_that_is_not_known_needs_its_participants(
    fleet: Fleet, known: Callable[[str], Known], tmp_path: Path
) -> None:
    model = known("llama")
    task = {"do": "save", "absent": [3], **SHORT}
    tasks = [task | {"path": tmp_path / "all"}, task | {"path": tmp_path / "three", "participants": [0, 1, 2]}]
    (ran,) = fleet.run(model.world(4, tasks, tp=2))
    error = same_error(ran.of(0))
    assert error.error == "SaveIncomplete"
    assert "Never arrived: 3." in error.text
    assert same_report(ran.of(1))["arrived"] == [0, 1, 2]
    assert not (tmp_path / "all").exists()
    fleet.run(model.world(1, [{"do": "load", "checkpoint": tmp_path / "three/iter_0000000"}]))


def test_who_comes_late_returns_the_same(fleet: Fleet, known: Callable[[str], Known], tmp_path: Path) -> None:
    """While the others write, and when they have all returned."""
    model = known("llama")
    slow = {"rank": [0, 1, 2, 3], "at": "os.pwritev", "do": "sleep", "seconds": 0.05}
    task = {"do": "save", "hf": model.hf}
    tasks = [
        task | {"path": tmp_path / "writing", "late": {"3": "written"}, "faults": [slow]},
        task | {"path": tmp_path / "published", "late": {"2": "published"}},
        task | {"path": tmp_path / "host", "late": {"0": "published", "3": "written"}, "faults": [slow]},
    ]
    (ran,) = fleet.run(model.world(4, tasks, tp=2))
    for number in range(3):
        report = same_report(ran.of(number))
        assert len(ran.of(number)) == 4
        assert report["arrived"] == [[0, 1, 2], [0, 1, 3], [1, 2]][number]
    late = [ran.outcomes[0][3], ran.outcomes[1][2], ran.outcomes[2][0]]
    assert [outcome.report["wrote_bytes"] for outcome in late if outcome and outcome.report] == [0, 0, 0]
    model.check(fleet, {tmp_path / name / "iter_0000000": 1 for name in ("writing", "published", "host")})


def test_ranks_that_disagree_are_told_both_sides(fleet: Fleet, known: Callable[[str], Known], tmp_path: Path) -> None:
    model = known("llama")
    task = {"do": "save", "hf": model.hf, "path": tmp_path / "one", **SHORT}
    norm = "decoder.final_layernorm.weight"
    # Paths of their own: a rank that was not at a save which has ended is told how it ended when it comes to it.
    tasks = [
        task | {"only": {"1": {"path": str(tmp_path / "other")}}},
        task | {"path": tmp_path / "two", "only": {"1": {"iteration": 5}}},
        task | {"path": tmp_path / "three", "only": {"1": {"fully_parallel_save": False, "writers_per_rank": 2}}},
        task | {"hf": None, "path": tmp_path / "four", "tensor": [norm, 48, 1]},
        task | {"path": tmp_path / "five", "tensor": [norm, 48, 1]},
        task | {"path": tmp_path / "six", "tensor": [norm, 48, 1], "validate_access_integrity": False},
    ]
    ran, replicas = fleet.run(model.world(2, tasks[:3], tp=2), model.world(2, tasks[3:]))
    for number, said in enumerate((str(tmp_path / "other"), "(iteration 5)")):
        for rank, outcome in enumerate(ran.of(number)):
            assert outcome.error == "SaveIncomplete"
            assert f"rank {rank} saving" in outcome.text
            assert f"rank {1 - rank} saving" in outcome.text
            assert said in outcome.text
            assert f"{tmp_path / ('one', 'two')[number]} (iteration 0)" in outcome.text
    error = same_error(ran.of(2))
    assert (error.error, error.code) == ("SaveFailed", "save-disagrees")
    for fact in ("fully_parallel_save", "rank 0: True", "rank 1: False", "writers_per_rank", "rank 0: 1", "rank 1: 2"):
        assert fact in error.text
    error = same_error(replicas.of(0))
    assert f"ranks disagree about {norm}" in error.text
    assert "rank 0: bfloat16 of shape [64]" in error.text
    assert "rank 1: bfloat16 of shape [48]" in error.text
    error = same_error(replicas.of(1))
    assert error.code == "save-disagrees"
    for fact in (norm, "shape [64]", "rank 1: bfloat16 of shape [48]"):
        assert fact in error.text
    # Who doesn't want to be told gets what the configuration says, from those who hold it.
    same_report(replicas.of(2))
    assert [path.name for path in tmp_path.iterdir()] == ["six"]
    model.check(fleet, {tmp_path / "six/iter_0000000": 1})
