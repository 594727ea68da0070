"""Coverage, and the sharing of work, as functions over tables."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardway.core.boxes import Box
from shardway.core.dtypes import BFLOAT16, FLOAT32
from shardway.live.coverage import Holdings, Unit
from shardway.live.ledger import Holder, Ledger, share
from shardway.live.messages import Arrival, Entry, Table
from shardway.live.records import ObjectShard, Shard
from shardway.live.saving import Needed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardway.core.tensors import Shape

NOTHING = Needed(tensors={})


def shard(key: str, shape: Shape, start: Shape, size: Shape) -> Shard:
    return Shard(key, BFLOAT16, shape, start, size, 0)


def holdings(needed: Needed, *tables: Sequence[Shard]) -> Holdings:
    found = Holdings(needed)
    for number, shards in enumerate(tables):
        found.add(f"t{number}", Table(tuple(shards), ()))
    return found


TOP, BOTTOM = shard("w", (4, 2), (0, 0), (2, 2)), shard("w", (4, 2), (2, 0), (2, 2))
WHOLE = shard("w", (4, 2), (0, 0), (4, 2))


def test_halves_of_two_ranks_are_the_whole() -> None:
    both = holdings(NOTHING, [TOP], [BOTTOM])
    assert both.complete()
    assert [both.units[unit].box for unit in both.chosen()] == [Box((0, 0), (2, 2)), Box((2, 0), (2, 2))]


def test_replicas_are_one_unit() -> None:
    both = holdings(NOTHING, [TOP, BOTTOM], [BOTTOM, TOP])
    assert both.tables == {"t0": (0, 1), "t1": (1, 0)}


def test_a_missing_half_is_shown() -> None:
    one = holdings(NOTHING, [TOP])
    assert not one.complete()
    assert [str(gap) for gap in one.gaps()] == ["w [4, 2]: [2, 2] from [2, 0] is missing"]
    with pytest.raises(ValueError, match=r"w \[4, 2\]"):
        one.chosen()


def test_a_tensor_of_which_nobody_holds_anything_is_shown() -> None:
    found = holdings(
        Needed(tensors={"w": (BFLOAT16, (4, 2)), "v": (None, (3,))}, objects=frozenset({"state"})), [WHOLE]
    )
    assert [str(gap) for gap in found.gaps()] == ["state", "v [3]"]


def test_objects_are_units() -> None:
    found = Holdings(NOTHING)
    found.add("t0", Table((WHOLE,), (ObjectShard("state", 0, 9),)))
    assert found.units == [Unit("w", Box((0, 0), (4, 2)), 16), Unit("state", None, 9)]
    assert found.chosen() == [0, 1]


def test_of_boxes_that_overlap_some_that_tile_are_chosen() -> None:
    found = holdings(NOTHING, [TOP], [WHOLE], [BOTTOM])
    assert found.complete()
    assert [found.units[unit].box for unit in found.chosen()] == [Box((0, 0), (4, 2))]


def test_boxes_that_overlap_and_do_not_tile_are_a_gap() -> None:
    found = holdings(NOTHING, [shard("w", (4,), (0,), (3,)), shard("w", (4,), (1,), (3,))])
    assert not found.complete()
    assert "2 ways that overlap" in str(found.gaps()[0])


def test_a_hole_is_shown_even_where_other_parts_overlap() -> None:
    found = holdings(NOTHING, [shard("w", (6,), (0,), (3,)), shard("w", (6,), (1,), (3,))])
    assert [str(gap) for gap in found.gaps()] == ["w [6]: [2] from [4] is missing"]


@pytest.mark.parametrize("shape", [(), (0, 3)])
def test_scalars_and_empty_tensors_are_held_too(shape: Shape) -> None:
    needed = Needed(tensors={"w": (BFLOAT16, shape)})
    assert [gap.key for gap in Holdings(needed).gaps()] == ["w"]
    found = holdings(needed, [shard("w", shape, (0,) * len(shape), shape)] * 2)
    assert found.complete()
    assert len(found.chosen()) == 1


def test_another_shape_than_needed_does_not_count() -> None:
    needed = Needed(tensors={"w": (None, (4, 3))})
    found = holdings(needed, [WHOLE])
    assert found.tables == {"t0": (-1,)}
    assert found.conflicts[0][:2] == ("w", -1)
    assert not found.complete()


def test_a_padded_vocabulary_may_be_longer() -> None:
    assert holdings(Needed(tensors={"w": (None, (3, 2))}, resizable=frozenset({"w"})), [WHOLE]).complete()
    assert not holdings(Needed(tensors={"w": (None, (4, 1))}, resizable=frozenset({"w"})), [WHOLE]).complete()


def test_ranks_that_describe_a_tensor_differently_are_a_conflict() -> None:
    found = holdings(NOTHING, [WHOLE], [WHOLE._replace(dtype=FLOAT32)])
    assert found.tables["t1"] == (-1,)
    (conflict,) = found.conflicts
    assert (conflict.first, conflict.said[0], conflict.second, conflict.says[0]) == (0, BFLOAT16, 1, FLOAT32)


def test_match_adds_nothing() -> None:
    found = holdings(NOTHING, [TOP])
    assert found.match(Table((BOTTOM, TOP), (ObjectShard("state", 0, 9),))) == (-1, 0, -1)
    assert len(found.units) == 1


@st.composite
def cut(draw: st.DrawFn) -> tuple[Shape, list[Box]]:
    """A shape, and a grid of boxes that tiles it."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    boxes = [Box((), ())]
    for extent in shape:
        edges = sorted({0, extent, *draw(st.lists(st.integers(0, extent), max_size=2))})
        intervals = [(low, high - low) for low, high in itertools.pairwise(edges)]
        boxes = [Box((*box.start, low), (*box.size, size)) for box in boxes for low, size in intervals]
    return shape, boxes


@given(cut(), st.data())
def test_coverage_is_found_if_and_only_if_it_is_there(grid: tuple[Shape, list[Box]], data: st.DataObject) -> None:
    shape, boxes = grid
    held = data.draw(st.lists(st.sampled_from(boxes), max_size=2 * len(boxes)))
    found = holdings(Needed(tensors={"w": (BFLOAT16, shape)}), *[[shard("w", shape, *box)] for box in held])
    assert found.complete() == (set(held) == set(boxes))


# Sharing


def units(*sizes: int) -> list[Unit]:
    return [Unit(f"w{number}", Box((0,), (size,)), size) for number, size in enumerate(sizes)]


def everyone(num_ranks: int, num_units: int) -> list[Holder]:
    return [Holder(rank, rank, range(num_units), [rank] * num_units) for rank in range(num_ranks)]


def test_bytes_are_spread_evenly() -> None:
    sizes = (6, 5, 4, 3, 2, 1)
    given_out, orphans = share(range(6), units(*sizes), everyone(3, 6), fully_parallel=True, loads={})
    assert not orphans
    assert [sum(sizes[unit] for unit in given_out[number]) for number in range(3)] == [7, 7, 7]


def test_what_only_one_holds_is_counted_first() -> None:
    holders = [Holder(0, 0, [0, 1], [0, 0]), Holder(1, 1, [1], [1])]
    given_out, _ = share([0, 1], units(1, 100), holders, fully_parallel=True, loads={})
    assert given_out == {0: [0], 1: [1]}


def test_earlier_work_counts() -> None:
    given_out, _ = share([0], units(5), everyone(2, 1), fully_parallel=True, loads={0: 10})
    assert given_out == {1: [0]}


def test_otherwise_the_lowest_replica_writes() -> None:
    holders = [Holder(0, 7, [0, 1], [1, 0]), Holder(1, 3, [0, 1], [0, 0])]
    given_out, _ = share([0, 1], units(1, 1), holders, fully_parallel=False, loads={})
    assert given_out == {1: [0, 1]}


@given(st.data(), st.booleans())
def test_every_unit_goes_to_one_of_its_holders(data: st.DataObject, fully_parallel: bool) -> None:
    sizes = data.draw(st.lists(st.integers(0, 100), min_size=1, max_size=12))
    num_ranks = data.draw(st.integers(1, 5))
    holders = []
    for rank in range(num_ranks):
        held = data.draw(st.lists(st.integers(0, len(sizes) - 1), unique=True))
        holders.append(Holder(rank, rank, held, [rank] * len(held)))
    given_out, orphans = share(range(len(sizes)), units(*sizes), holders, fully_parallel=fully_parallel, loads={})
    times = Counter(unit for each in given_out.values() for unit in each)
    times.update(orphans)
    assert times == Counter(range(len(sizes)))
    for number, each in given_out.items():
        assert set(each) <= set(holders[number].units)
    assert set(orphans) == set(range(len(sizes))) - {unit for holder in holders for unit in holder.units}


@given(st.data())
def test_no_rank_has_more_than_twice_its_part(data: st.DataObject) -> None:
    """Largest first to the emptiest is within 4/3 of the best; the best is at most the mean plus the largest."""
    sizes = data.draw(st.lists(st.integers(1, 100), min_size=1, max_size=30))
    num_ranks = data.draw(st.integers(1, 6))
    given_out, _ = share(
        range(len(sizes)), units(*sizes), everyone(num_ranks, len(sizes)), fully_parallel=True, loads={}
    )
    most = max(sum(sizes[unit] for unit in each) for each in given_out.values())
    assert most <= math.ceil(sum(sizes) / num_ranks) + max(sizes)


# The ledger


def arrival(rank: int, table: str, num_units: int) -> Arrival:
    return Arrival(rank=rank, process="", table=table, replicas=(rank,) * num_units, agreement={}, validate=True)


TABLES = {"both": Table((TOP, BOTTOM), ()), "top": Table((TOP,), ())}
ARRIVALS = {0: arrival(0, "both", 2), 1: arrival(1, "both", 2), 2: arrival(2, "top", 1)}


def test_a_ledger_gives_lost_work_to_others() -> None:
    ledger = Ledger(Holdings(NOTHING))
    ledger.apply(Entry((0, 1), (), True), ARRIVALS, TABLES)
    assert {key: len(each.units) for key, each in ledger.shares.items()} == {(0, 0): 1, (0, 1): 1}
    lost = ledger.shares[0, 1].units
    ledger.apply(Entry((0, 2), ((0, 1),), True), ARRIVALS, TABLES)
    assert (0, 1) not in ledger.shares
    assert [each.units for key, each in ledger.shares.items() if key[0] == 1] == [lost]
    assert ledger.lost == {1}


def test_a_ledger_is_the_same_for_everybody() -> None:
    """One has looked at another way of sharing before; the other has not."""
    one, other = Ledger(Holdings(NOTHING)), Ledger(Holdings(NOTHING))
    for ledger in (one, other):
        ledger.apply(Entry((0, 1), (), True), ARRIVALS, TABLES)
    one.plan(Entry((0, 2), ((0, 1),), True), ARRIVALS, TABLES)
    for ledger in (one, other):
        ledger.apply(Entry((0,), ((0, 1),), True), ARRIVALS, TABLES)
    assert one.shares == other.shares
    work = [ledger.work(ledger.shares[1, 0], ARRIVALS[0], TABLES["both"]) for ledger in (one, other)]
    assert work[0] == work[1]


def test_a_plan_says_what_nobody_else_holds() -> None:
    ledger = Ledger(Holdings(NOTHING))
    ledger.apply(Entry((0,), (), True), ARRIVALS, TABLES)
    _, orphans = ledger.plan(Entry((2,), ((0, 0),), True), ARRIVALS, TABLES)
    assert [ledger.holdings.units[unit].box for unit in orphans] == [Box((2, 0), (2, 2))]


def test_work_is_in_the_writers_terms() -> None:
    tables = {"odd": Table((BOTTOM, TOP, BOTTOM), (ObjectShard("state", 0, 1),))}
    arrivals = {0: replace(arrival(0, "odd", 4))}
    ledger = Ledger(Holdings(NOTHING))
    ledger.apply(Entry((0,), (), False), arrivals, tables)
    work = ledger.work(ledger.shares[0, 0], arrivals[0], tables["odd"])
    assert work == ((0, 1), (0,))
