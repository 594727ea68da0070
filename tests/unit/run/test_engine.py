"""Threads that work through batches."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import pytest

from shardway.core.boxes import Box
from shardway.core.dtypes import UINT8
from shardway.core.errors import Code, Problem, ShardwayError
from shardway.core.tensors import Chunk
from shardway.plans.model import Stream
from shardway.run import engine
from shardway.run.engine import Batch, Engine, Worker, batches, parse_workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def stream(file: str, number: int, num_bytes: int = 1) -> Stream:
    box = Box((0,), (num_bytes,))
    return Stream(f"{file}.{number}", UINT8, box, (Chunk((0,), (num_bytes,), file, number),), tuple)


class Doing(Worker):
    def __init__(self, work: Callable[[Stream], None]) -> None:
        self._work = work

    def move(self, stream: Stream) -> None:
        self._work(stream)


def test_batches_keep_the_order_within_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_BATCH_BYTES", 10)
    streams = [stream(file, number, 4) for number in range(7) for file in ("a", "b")]
    found = batches(streams)
    for file in ("a", "b"):
        mine = [batch for batch in found if batch.file == file]
        assert [[s.tensor for s in batch.streams] for batch in mine] == [
            [f"{file}.0", f"{file}.1", f"{file}.2"],
            [f"{file}.3", f"{file}.4", f"{file}.5"],
            [f"{file}.6"],
        ]


def test_what_is_written_to_several_files_precedes_the_others_of_the_first() -> None:
    both = {"a.2": ("a", "b"), "b.1": ("b", "c", "d")}
    streams = [stream(file, number) for file in "abc" for number in range(3)]
    found = batches(streams, lambda one: both.get(one.tensor, (one.chunks[0].file,)))
    assert [(batch.file, [s.tensor for s in batch.streams], sorted(batch.files)) for batch in found] == [
        ("a", ["a.2"], ["a", "b"]),
        ("a", ["a.0", "a.1"], ["a"]),
        ("b", ["b.1"], ["b", "c", "d"]),
        ("b", ["b.0", "b.2"], ["b"]),
        ("c", ["c.0", "c.1", "c.2"], ["c"]),
    ]


@pytest.mark.parametrize("num_workers", [1, 3, 50])
def test_everything_is_done_once_and_every_batch_is_told_of_when_it_is_done(num_workers: int) -> None:
    work = [Batch(file, (stream(file, k), stream(file, k + 100))) for k in range(20) for file in "abc"]
    done: list[str] = []
    told: list[tuple[str, int]] = []
    lock = threading.Lock()

    def move(found: Stream) -> None:
        with lock:
            done.append(found.tensor)

    def written(batch: Batch) -> None:
        with lock:
            told.append((batch.file, sum(name.startswith(batch.file) for name in done)))

    Engine(work, lambda: Doing(move), num_workers, written).run()
    assert sorted(done) == sorted(s.tensor for batch in work for s in batch.streams)
    assert sorted(file for file, _ in told) == sorted("abc" * 20)
    for file in "abc":  # when a file is told of for the n-th time, at least n of its batches are done
        seen = [count for name, count in told if name == file]
        assert all(count >= 2 * number for number, count in enumerate(seen, start=1))
        assert seen[-1] == 40


def test_nothing_to_do() -> None:
    Engine([], lambda: Doing(lambda _: None), 4).run()


def test_threads_prefer_files_of_their_own() -> None:
    """Two threads that write one file wait for each other in the kernel."""
    work = [Batch(file, (stream(file, k),)) for file in "ab" for k in range(10)]
    together = threading.Barrier(2, timeout=30)
    pairs: list[set[str]] = []
    current: set[str] = set()
    lock = threading.Lock()

    def move(found: Stream) -> None:
        together.wait()
        with lock:
            current.add(found.chunks[0].file)
        if together.wait() == 0:
            pairs.append(set(current))
            current.clear()
        together.wait()

    Engine(work, lambda: Doing(move), 2).run()
    assert pairs == [{"a", "b"}] * 10


def test_the_last_files_are_worked_on_in_turns() -> None:
    """Of three files of the same size, no thread may be left with the third alone."""
    work = [Batch(file, (stream(file, k),)) for file in "abc" for k in range(8)]
    together = threading.Barrier(2, timeout=30)
    pairs: list[list[str]] = []
    lock = threading.Lock()

    def move(found: Stream) -> None:
        if together.wait() == 0:
            pairs.append([])
        together.wait()
        with lock:
            pairs[-1].append(found.chunks[0].file)

    Engine(work, lambda: Doing(move), 2).run()
    assert len(pairs) == 12
    assert all(len(set(pair)) == 2 for pair in pairs)


def test_one_thread_finishes_a_file_before_it_begins_another() -> None:
    work = [Batch(file, (stream(file, k),)) for file in "abc" for k in range(3)]
    order: list[str] = []
    Engine(work, lambda: Doing(lambda found: order.append(found.chunks[0].file)), 1).run()
    assert order == sorted(order)


def test_an_error_stops_the_others() -> None:
    work = [Batch("a", tuple(stream("a", k) for k in range(1000))), Batch("b", (stream("b", 0),))]
    failed = threading.Event()
    moved: list[str] = []

    def move(found: Stream) -> None:
        if found.chunks[0].file == "b":
            failed.set()
            raise ShardwayError(Problem(code=Code.IO_FAILED, what="broken"))
        assert failed.wait(30)
        moved.append(found.tensor)

    with pytest.raises(ShardwayError, match="broken"):
        Engine(work, lambda: Doing(move), 2).run()
    assert len(moved) < 1000


def test_the_same_problem_is_told_once_and_others_beside_it() -> None:
    together = threading.Barrier(3, timeout=30)

    def move(found: Stream) -> None:
        together.wait()
        raise ShardwayError(Problem(code=Code.IO_FAILED, what="one" if found.chunks[0].file == "a" else "other"))

    work = [Batch(file, (stream(file, 0),)) for file in "abc"]
    with pytest.raises(ShardwayError) as caught:
        Engine(work, lambda: Doing(move), 3).run()
    assert sorted(problem.what for problem in caught.value.problems) == ["one", "other"]


def test_small_streams_are_prepared_together_and_a_large_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_PORTION", 3)
    monkeypatch.setattr(engine, "_PORTION_BYTES", 10)
    events: list[object] = []

    class Preparing(Worker):
        @contextlib.contextmanager
        def prepared(self, streams: Sequence[Stream]) -> Iterator[None]:
            events.append([found.chunks[0].offset for found in streams])
            yield
            events.append("done")

        def move(self, stream: Stream) -> None:
            events.append(stream.chunks[0].offset)

    sizes = [1, 1, 1, 1, 4, 9, 50, 10, 0]
    streams = [stream("a", number, size) for number, size in enumerate(sizes)]
    Engine([Batch("a", streams[:6]), Batch("a", streams[6:])], Preparing, 1).run()
    portions = [[0, 1, 2], [3, 4], [5], [6], [7, 8]]
    assert events == [event for portion in portions for event in (portion, *portion, "done")]


def test_a_defect_is_not_hidden_by_a_problem() -> None:
    together = threading.Barrier(2, timeout=30)

    def move(found: Stream) -> None:
        together.wait()
        if found.chunks[0].file == "a":
            raise ZeroDivisionError
        raise ShardwayError(Problem(code=Code.IO_FAILED, what="other"))

    with pytest.raises(ZeroDivisionError):
        Engine([Batch(file, (stream(file, 0),)) for file in "ab"], lambda: Doing(move), 2).run()


def test_a_worker_that_can_not_be_made() -> None:
    def make() -> Worker:
        raise ShardwayError(Problem(code=Code.IO_FAILED, what="no buffer"))

    with pytest.raises(ShardwayError, match="no buffer"):
        Engine([Batch("a", (stream("a", 0),))], make, 2).run()


def test_number_of_workers() -> None:
    assert 1 <= parse_workers(None) <= 16
    assert parse_workers(256) == 256
    for wrong in (0, -1, 257, True):
        with pytest.raises(ShardwayError, match="from 1 to 256"):
            parse_workers(wrong)
