"""Real processes save together over real stores, with ranks that are absent, late, stopped, killed or disagree."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.ranks.savers import Ending, RankPlan, Savers, WorldPlan

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("torch")

DEADLINE_S = 3.0
REPLICATED = tuple(RankPlan(rank=rank, part=rank % 2, replica=rank // 2) for rank in range(4))
"""Two halves of the model, each on two ranks."""


@pytest.fixture(scope="module")
def savers() -> Iterator[Savers]:
    with Savers() as server:
        yield server


def change(plan: tuple[RankPlan, ...], rank: int, **fields: object) -> tuple[RankPlan, ...]:
    return tuple(dataclasses.replace(each, **fields) if each.rank == rank else each for each in plan)  # type: ignore[arg-type]


def without(plan: tuple[RankPlan, ...], *ranks: int) -> tuple[RankPlan, ...]:
    return tuple(each for each in plan if each.rank not in ranks)


def published(root: Path, endings: dict[int, list[Ending]], ranks: set[int], name: str = "ckpt") -> list[Ending]:
    """Assert that these ranks returned the same outcome, and that the checkpoint is whole and alone."""
    last = [endings[rank][-1] for rank in sorted(ranks)]
    assert {rank for rank, each in endings.items() if each[-1].kind == "returned"} == ranks, endings
    assert len({(ending.staging, ending.lost) for ending in last}) == 1, last
    assert {path.name for path in root.iterdir()} == {name}
    metadata = json.loads((root / name / "metadata").read_text())
    rows: Counter[tuple[str, int]] = Counter()
    for key, shape, start, size, file, offset, length in metadata["shards"]:
        data = (root / name / file).read_bytes()[offset : offset + length]
        assert json.loads(data) == [key, shape, start, size]
        rows.update((key, row) for row in range(start[0], start[0] + size[0]))
    assert rows == Counter({(f"layers.{number}.w", row): 1 for number in range(6) for row in range(4)})
    return last


def refused(root: Path, endings: dict[int, list[Ending]], ranks: set[int], code: str) -> str:
    """Assert that these ranks raised the same error, and that nothing was published or left behind."""
    last = [endings[rank][-1] for rank in sorted(ranks)]
    assert set(endings) == ranks, endings
    assert {ending.codes[:1] for ending in last} == {(code,)}, last
    assert len({ending.text for ending in last}) == 1, last
    assert list(root.iterdir()) == []
    return last[0].text


@pytest.mark.parametrize("store", ["file", "tcp"])
def test_everybody_comes(savers: Savers, tmp_path: Path, store: str) -> None:
    endings = savers.run(WorldPlan(root=str(tmp_path), ranks=REPLICATED, store=store, participants=(0, 1, 2, 3)))
    ended = published(tmp_path, dict(endings), {0, 1, 2, 3})
    assert all(ending.wrote_bytes > 0 for ending in ended)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("fully_parallel", [True, False])
@pytest.mark.parametrize("absent", [0, 3])
def test_an_absent_rank_is_not_waited_for(
    savers: Savers, tmp_path: Path, absent: int, fully_parallel: bool, validate: bool
) -> None:
    endings = savers.run(
        WorldPlan(
            root=str(tmp_path),
            ranks=without(REPLICATED, absent),
            participants=(0, 1, 2, 3),
            fully_parallel=fully_parallel,
            validate=validate,
            deadline_s=60,
            silence_s=5,
        )
    )
    ended = published(tmp_path, dict(endings), {0, 1, 2, 3} - {absent})
    assert max(ending.took_s for ending in ended) < 5
    wrote = {ending.rank for ending in ended if ending.wrote_bytes}
    lowest = {0, 1} if absent == 3 else {1, 2}
    assert wrote == ({0, 1, 2, 3} - {absent} if fully_parallel else lowest)


@pytest.mark.parametrize("expected", [True, False])
def test_what_nobody_holds_is_named(savers: Savers, tmp_path: Path, expected: bool) -> None:
    endings = savers.run(
        WorldPlan(root=str(tmp_path), ranks=without(REPLICATED, 1, 3), participants=(0, 1, 2, 3), expected=expected)
    )
    text = refused(tmp_path, dict(endings), {0, 2}, "save-incomplete")
    assert "6 of 7 tensors have no holder (layers.0.w, layers.1.w, …)" in text
    assert "layers.0.w [4, 4]: [2, 4] from [2, 0] is missing" in text
    assert "Arrived: ranks 0, 2. Never arrived: 1, 3. Waited 3 s." in text
    assert all(DEADLINE_S <= each[-1].took_s < 2 * DEADLINE_S for each in endings.values())


@pytest.mark.parametrize("after_s", [0.9, 2.5], ids=["after assembly", "after publishing"])
def test_a_late_rank_is_excused(savers: Savers, tmp_path: Path, after_s: float) -> None:
    ranks = change(REPLICATED, 2, after_s=after_s)
    endings = savers.run(WorldPlan(root=str(tmp_path), ranks=ranks, write_s=1.0))
    ended = published(tmp_path, dict(endings), {0, 1, 2, 3})
    assert ended[2].wrote_bytes == 0
    assert ended[2].took_s < 2


def test_a_late_rank_raises_what_the_others_raised(savers: Savers, tmp_path: Path) -> None:
    ranks = change(without(REPLICATED, 1), 3, after_s=1.5 * DEADLINE_S)
    endings = savers.run(WorldPlan(root=str(tmp_path), ranks=ranks))
    refused(tmp_path, dict(endings), {0, 2, 3}, "save-incomplete")
    assert endings[3][-1].took_s < 1


def test_a_second_call_is_a_second_attempt(savers: Savers, tmp_path: Path) -> None:
    """Rank 1 is too late for the first attempt, and in time for the second, which is its first."""
    ranks = tuple(dataclasses.replace(each, tries=2) for each in change(without(REPLICATED, 3), 1, after_s=4.0))
    endings = savers.run(WorldPlan(root=str(tmp_path), ranks=ranks))
    assert [len(endings[rank]) for rank in range(3)] == [2, 1, 2]
    assert endings[0][0].codes == endings[2][0].codes == ("save-incomplete",)
    published(tmp_path, dict(endings), {0, 1, 2})


def test_another_config_is_shown(savers: Savers, tmp_path: Path) -> None:
    endings = savers.run(
        WorldPlan(root=str(tmp_path), ranks=change(REPLICATED, 2, config="b"), participants=(0, 1, 2, 3))
    )
    text = refused(tmp_path, dict(endings), {0, 1, 2, 3}, "save-disagrees")
    assert "ranks disagree about config" in text
    assert "ranks 0-1, 3: a" in text or "rank 2: b" in text
    assert max(each[-1].took_s for each in endings.values()) < DEADLINE_S


def test_another_shape_is_shown(savers: Savers, tmp_path: Path) -> None:
    ranks = change(REPLICATED, 1, columns=5)
    endings = savers.run(WorldPlan(root=str(tmp_path), ranks=ranks, participants=(0, 1, 2, 3), expected=False))
    text = refused(tmp_path, dict(endings), {0, 1, 2, 3}, "save-disagrees")
    assert "bfloat16 of shape [4, 4]" in text
    assert "rank 1: bfloat16 of shape [4, 5]" in text


def test_without_validation_coverage_is_proved_all_the_same(savers: Savers, tmp_path: Path) -> None:
    """The rank of another mind holds nothing that counts; the others hold everything."""
    ranks = change(change(REPLICATED, 1, columns=5), 2, config="b")
    endings = savers.run(WorldPlan(root=str(tmp_path), ranks=ranks, participants=(0, 1, 2, 3), validate=False))
    assert published(tmp_path, dict(endings), {0, 1, 2, 3})[1].wrote_bytes == 0


def test_another_path_is_named(savers: Savers, tmp_path: Path) -> None:
    ranks = change(without(REPLICATED, 2, 3), 1, path="other")
    endings = savers.run(WorldPlan(root=str(tmp_path), ranks=ranks, participants=(0, 1)))
    for rank in (0, 1):
        (ending,) = endings[rank]
        assert ending.codes == ("save-incomplete", "save-disagrees")
        assert f"{tmp_path}/ckpt (iteration 7)" in ending.text
        assert f"{tmp_path}/other (iteration 7)" in ending.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("store", ["file", "tcp"])
def test_a_killed_writer_is_replaced(savers: Savers, tmp_path: Path, store: str) -> None:
    ranks = change(REPLICATED, 3, dies_in="write")
    endings = savers.run(WorldPlan(root=str(tmp_path), ranks=ranks, participants=(0, 1, 2, 3), store=store))
    ended = published(tmp_path, dict(endings), {0, 1, 2})
    assert ended[0].lost == (3,)
    assert max(ending.took_s for ending in ended) < DEADLINE_S  # its process is known to be dead


def test_a_killed_writer_without_a_replica_is_named(savers: Savers, tmp_path: Path) -> None:
    ranks = change(without(REPLICATED, 2, 3), 1, dies_in="write")
    endings = savers.run(WorldPlan(root=str(tmp_path), ranks=ranks, participants=(0, 1)))
    text = refused(tmp_path, dict(endings), {0}, "save-rank-lost")
    assert "rank 1 died or made no progress for 3 s while writing" in text


@pytest.mark.parametrize("action", ["prepare", "write", "publish", "finish", "finished"])
def test_a_killed_coordinator_is_succeeded(savers: Savers, tmp_path: Path, action: str) -> None:
    """Rank 0 comes first, so that it coordinates."""
    ranks = tuple(dataclasses.replace(each, after_s=0.5) for each in without(REPLICATED, 0))
    ranks = (dataclasses.replace(REPLICATED[0], dies_in=action), *ranks)
    endings = savers.run(WorldPlan(root=str(tmp_path), ranks=ranks, participants=(0, 1, 2, 3)))
    ended = published(tmp_path, dict(endings), {1, 2, 3})
    assert max(ending.took_s for ending in ended) < 3 * DEADLINE_S


def test_a_stopped_writer_comes_back_to_the_same_outcome(savers: Savers, tmp_path: Path) -> None:
    """Nobody can see that it is not just slow; what it writes afterwards counts for nothing."""
    ranks = change(REPLICATED, 3, stops_in="write", stop_s=2.5 * DEADLINE_S)
    endings = savers.run(WorldPlan(root=str(tmp_path), ranks=ranks, participants=(0, 1, 2, 3)))
    ended = published(tmp_path, dict(endings), {0, 1, 2, 3})
    assert ended[0].lost == (3,)
    assert max(ending.took_s for ending in ended[:3]) < 2 * DEADLINE_S


@pytest.mark.parametrize("action", ["publish", "finish"])
def test_a_stopped_coordinator_publishes_no_second_time(savers: Savers, tmp_path: Path, action: str) -> None:
    ranks = tuple(dataclasses.replace(each, after_s=0.5) for each in without(REPLICATED, 0))
    ranks = (dataclasses.replace(REPLICATED[0], stops_in=action, stop_s=6.0), *ranks)
    endings = savers.run(WorldPlan(root=str(tmp_path), ranks=ranks, participants=(0, 1, 2, 3)))
    published(tmp_path, dict(endings), {0, 1, 2, 3})


@pytest.mark.parametrize(("rank", "action"), [(2, "write"), (0, "prepare"), (0, "publish")])
def test_a_full_disk_on_one_rank_is_everybodys_error(savers: Savers, tmp_path: Path, rank: int, action: str) -> None:
    late = 0.3 if action != "write" else 0.0
    ranks = tuple(dataclasses.replace(each, after_s=0 if each.rank == rank else late) for each in REPLICATED)
    ranks = change(ranks, rank, fails_in=action)
    endings = savers.run(WorldPlan(root=str(tmp_path), ranks=ranks, participants=(0, 1, 2, 3)))
    text = refused(tmp_path, dict(endings), {0, 1, 2, 3}, "save-rank-failed")
    assert f"rank {rank} failed to" in text
    assert "No space left on device" in text
    assert f"{tmp_path}/ckpt/disk" in text


def test_a_store_that_dies_is_named(savers: Savers, tmp_path: Path) -> None:
    endings = savers.run(
        WorldPlan(
            root=str(tmp_path),
            ranks=without(REPLICATED, 1, 3),
            store="tcp",
            store_dies_after_s=2.0,
        )
    )
    for rank in (0, 2):
        (ending,) = endings[rank]
        assert ending.codes == ("store-failed",)
        assert "TCPStore at 127.0.0.1:" in ending.text
        assert ending.took_s < 2 * DEADLINE_S


def test_no_collective_is_called(savers: Savers, tmp_path: Path) -> None:
    """In a gloo world of two, over the job's own store, with every collective of torch.distributed raising."""
    ranks = (RankPlan(rank=0, part=0), RankPlan(rank=1, part=1))
    world = WorldPlan(root=str(tmp_path), ranks=ranks, participants=(0, 1), forbid_collectives=True)
    published(tmp_path, dict(savers.run(world)), {0, 1})


ALONE = """
import sys
from tests.ranks.savers import RankPlan, WorldPlan, _rank
root = sys.argv[1]
(ending,) = _rank(RankPlan(rank=0), WorldPlan(root=root, ranks=()), None)
assert ending.kind == "returned", ending
assert "torch" not in sys.modules
"""


def test_a_process_saves_alone_without_torch(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], timeout=60, cwd=Path(__file__).parents[2])
    assert done.returncode == 0
    assert (tmp_path / "ckpt" / "metadata").exists()
