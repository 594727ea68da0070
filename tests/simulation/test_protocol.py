"""Thousands of random schedules: nothing half is published, nobody hangs, and all agree.

``SHARDWAY_SEED=n`` replays one schedule, ``SHARDWAY_SCHEDULES=n`` runs another number of them.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from tests.simulation.mutants import MUTANTS
from tests.simulation.scenario import Scenario, make, overlapping
from tests.simulation.world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NUM_SCHEDULES = int(os.environ.get("SHARDWAY_SCHEDULES", "10000"))
NUM_CHUNKS = 10
REPLAYED = os.environ.get("SHARDWAY_SEED")
LARGE = {64: 8, 128: 4, 512: 2}


@pytest.fixture(autouse=True)
def _no_garbage_collection() -> Iterator[None]:
    """Worlds are freed by reference counts; looking for cycles takes a third of the time."""
    gc.disable()
    yield
    gc.enable()
    gc.collect()


def check(seeds: Iterator[int] | range, num_ranks: int | None = None) -> Counter[str]:
    """Run schedules; fail with the seed of the first that breaks an invariant. Returns how the ranks fared."""
    how: Counter[str] = Counter()
    for seed in seeds:
        scenario = make(seed, num_ranks)
        world = World(scenario)
        broken = world.run()
        replay = f"python -m tests.simulation.world {seed}{'' if num_ranks is None else f' {num_ranks}'}"
        assert not broken, f"seed {seed}: {broken[0]}\nreplay: {replay}"
        how["must succeed"] += scenario.must_succeed()
        how["published"] += bool(world.published)
        how["decided after a takeover"] += any(tag != "t0" for _, tag in world.published.values())
        how["reassigned"] += any("/ledger/1" in key for key in world.store.ever)
        how["two tags"] += any(len(directory.metadata) > 1 for directory, _ in world.published.values())
        how["litter of the dead"] += bool(world.staged)
        how.update(str(getattr(end, "code", "returned")) for each in world.processes for _, end in each.outcomes)
    return how


@pytest.mark.skipif(REPLAYED is not None, reason="replaying one schedule")
@pytest.mark.parametrize("chunk", range(NUM_CHUNKS))
def test_random_schedules(chunk: int) -> None:
    each = NUM_SCHEDULES // NUM_CHUNKS
    how = check(range(chunk * each, (chunk + 1) * each))
    if each >= 1000:  # otherwise the schedules show less than they say
        for what in ("must succeed", "published", "decided after a takeover", "reassigned", "two tags"):
            assert how[what] >= 5, (what, how)
        for what in (
            "returned",
            "save-incomplete",
            "save-rank-lost",
            "save-rank-failed",
            "save-disagrees",
            "store-failed",
        ):
            assert how[what] >= 5, (what, how)


@pytest.mark.skipif(REPLAYED is not None, reason="replaying one schedule")
@pytest.mark.parametrize("num_ranks", LARGE)
def test_many_ranks(num_ranks: int) -> None:
    check(range(LARGE[num_ranks]), num_ranks)


@pytest.mark.skipif(REPLAYED is None, reason="set SHARDWAY_SEED to replay a schedule")
def test_replay() -> None:
    check(range(int(REPLAYED or 0), int(REPLAYED or 0) + 1))


@pytest.mark.parametrize("seed", range(100))
def test_coordinators_that_overlap(seed: int) -> None:
    assert not World(overlapping(seed)).run()


def test_a_seed_is_the_whole_schedule() -> None:
    one, other = World(make(17)), World(make(17))
    assert one.run() == other.run()
    assert one.store.values == other.store.values
    assert one.num_events == other.num_events


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_simulation_notices(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A protocol that is broken in this way breaks an invariant."""
    mutant(monkeypatch)
    directed = (overlapping(seed) for seed in range(100))
    assert any(_breaks(scenario) for scenario in (*directed, *map(make, range(200_000, 202_000))))


def _breaks(scenario: Scenario) -> bool:
    try:
        return bool(World(scenario).run())
    except (AssertionError, KeyError, ValueError):
        return True
