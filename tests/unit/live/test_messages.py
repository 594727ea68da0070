"""What ranks tell each other survives the store."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from shardway.core.dtypes import BFLOAT16, all_dtypes
from shardway.core.errors import Code, Problem
from shardway.live import messages
from shardway.live.messages import Arrival, Decision, Entry, Lead, Result, Work
from shardway.live.records import ObjectShard, Shard
from shardway.live.saving import SaveIdentity, SaveOutcome
from shardway.live.verdicts import ranks_text

shapes = st.lists(st.integers(0, 2**40), max_size=4).map(tuple)
shards = st.builds(Shard, st.text(), st.sampled_from(all_dtypes()), shapes, shapes, shapes, st.integers(0, 9))
objects = st.builds(ObjectShard, st.text(), st.integers(0, 9), st.integers(0, 2**40))
problems = st.builds(
    Problem,
    code=st.sampled_from(Code),
    what=st.text(),
    tensor=st.none() | st.text(),
    file=st.none() | st.text(),
    facts=st.lists(st.text()).map(tuple),
    cure=st.none() | st.text(),
)
numbers = st.integers(0, 2**40)
ascending = st.sets(st.integers(0, 50)).map(lambda found: tuple(sorted(found)))


@given(st.lists(shards), st.lists(objects))
def test_tables(some: list[Shard], more: list[ObjectShard]) -> None:
    digest, data = messages.encode_table(some, more)
    table = messages.decode_table(data)
    assert table.shards == tuple(each._replace(replica=0) for each in some)
    assert table.objects == tuple(each._replace(replica=0) for each in more)
    replicas = [each._replace(replica=each.replica + 1) for each in some]
    assert messages.encode_table(replicas, more) == (digest, data)


def test_a_table_is_small() -> None:
    some = [
        Shard(f"decoder.layers.{k // 7}.mlp.linear_fc{k % 7}.weight", BFLOAT16, (8192, 1024), (k, 0), (1024, 1024), 0)
        for k in range(700)
    ]
    assert len(messages.encode_table(some, [])[1]) < 15 * len(some)


@given(st.integers(0, 9999), st.text(), st.lists(st.integers(0, 9)), st.dictionaries(st.text(), st.text()))
def test_arrivals(rank: int, process: str, replicas: list[int], agreement: dict[str, str]) -> None:
    one = Arrival(
        rank=rank, process=process, table="0a", replicas=tuple(replicas), agreement=agreement, validate=bool(rank % 2)
    )
    assert Arrival.decode(one.encode()) == one


@given(st.builds(Lead, numbers, st.integers(-1, 99), numbers, st.text(), numbers, numbers, st.just("open")))
def test_leads(lead: Lead) -> None:
    assert Lead.decode(lead.encode()) == lead


@given(ascending, st.lists(st.tuples(numbers, numbers)).map(tuple), st.booleans())
def test_entries_and_work(holders: tuple[int, ...], dropped: tuple[tuple[int, int], ...], fully_parallel: bool) -> None:
    entry = Entry(holders, dropped, fully_parallel)
    assert Entry.decode(entry.encode()) == entry
    work = Work(holders, holders[:2])
    assert Work.decode(work.encode()) == work


def test_holders_are_ranges() -> None:
    assert len(Entry(tuple(range(10_000)), (), True).encode()) < 40


@given(numbers, numbers, st.lists(problems).map(tuple), st.binary())
def test_results(entry: int, number: int, some: tuple[Problem, ...], written: bytes) -> None:
    result = Result(entry, number, some, written)
    assert Result.decode(result.encode()) == result


@given(st.lists(problems).map(tuple), ascending, ascending, numbers)
def test_decisions(some: tuple[Problem, ...], arrived: tuple[int, ...], lost: tuple[int, ...], number: int) -> None:
    outcome = SaveOutcome(
        staging="x", arrived=arrived, lost=lost, coordinator=1, num_files=2, num_bytes=number, wrote_bytes=0
    )
    for decision in (Decision(problems=some), Decision(tag="t1", outcome=outcome, decided_at=1.5)):
        assert Decision.decode(decision.encode()) == decision
    assert messages.decode_end(messages.encode_end(some)) == some


def test_a_save_is_known_by_all_that_tells_it_apart() -> None:
    one = SaveIdentity(destination="/a", iteration=1)
    others = [
        SaveIdentity(destination="/b", iteration=1),
        SaveIdentity(destination="/a", iteration=2),
        SaveIdentity(destination="/a", iteration=1, token="job 7"),
    ]
    keys = {messages.attempt_key(each) for each in (one, *others)}
    assert len(keys) == 4
    assert messages.attempt_key(SaveIdentity(destination="/a", iteration=1)) in keys


def test_registers_are_text() -> None:
    """Some stores take values for text on their way through compare-and-set."""
    json.loads(Lead(0, 0, 0, "\u00e9", 0, 0, "open").encode().decode("ascii"))


def test_ranks_are_written_as_people_do() -> None:
    assert ranks_text([7, 0, 1, 2, 4, 4]) == "0-2, 4, 7"
