"""Threads that work through streams: batches by file, the first error stops all, progress is reported as it happens."""

from __future__ import annotations

import os
import threading
from array import array
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple, overload

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.run.team import Team

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager

    from shardway.plans.model import Stream

_BATCH_BYTES = 64 * 2**20
_PORTION_BYTES = 32 * 2**20
_PORTION = 64  # streams


class Worker:
    """What a thread does with streams."""

    def prepared(self, streams: Sequence[Stream]) -> AbstractContextManager[None]:  # noqa: ARG002
        """The context in which these streams will be moved; a worker may save time by looking at several at once."""
        return nullcontext()

    def move(self, stream: Stream) -> None:
        """Work through one stream."""
        raise NotImplementedError


class Batch(NamedTuple):
    """Streams that one thread takes together.

    Attributes:
        file: The file that they are written to; the first one of each.
        streams: The streams.
        files: All files that they are written to; none where nothing is written.
    """

    file: str
    streams: Sequence[Stream]
    files: frozenset[str] = frozenset()


def parse_workers(value: int | None) -> int:
    """Number of threads to use; None for one per processor that this process may use, at most 16.

    Raises:
        ShardwayError: `option-invalid` for less than one or more than 256.
    """
    if value is None:
        return max(1, min(16, len(os.sched_getaffinity(0))))
    if isinstance(value, bool) or not 1 <= value <= 256:
        raise ShardwayError(
            Problem(code=Code.OPTION_INVALID, what=f"workers={value!r}; expected a number from 1 to 256")
        )
    return value


class Selection(Sequence["Stream"]):
    """Some of the streams of a plan, each made when it is asked for if those of the plan are.

    Args:
        streams: The streams to choose from.
        places: Which of them, in order.
    """

    def __init__(self, streams: Sequence[Stream], places: Sequence[int]) -> None:
        self._streams = streams
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Stream: ...
    @overload
    def __getitem__(self, place: slice) -> Selection: ...
    def __getitem__(self, place: int | slice) -> Stream | Selection:
        if isinstance(place, slice):
            return Selection(self._streams, self._places[place])
        return self._streams[self._places[place]]

    def __iter__(self) -> Iterator[Stream]:
        return map(self._streams.__getitem__, self._places)


def first_chunk(stream: Stream) -> tuple[str, ...]:
    """The file of a stream's first chunk."""
    return (stream.chunks[0].file,)


def batches(streams: Sequence[Stream], written_to: Callable[[Stream], tuple[str, ...]] = first_chunk) -> list[Batch]:
    """Group neighbouring streams that are written to the same file into batches of about 64 MiB.

    Streams that are written to several files make up a batch of their own, which precedes the others of their first
    file: then neither that file nor those that follow it have to wait for each other until they are finished.

    Args:
        streams: Of a plan.
        written_to: The files that a stream is written to, or read from, in order.
    """
    grouped: dict[str, list[array[int]]] = {}  # of each file those that are written to others too, then groups
    others: dict[str, set[str]] = {}
    sizes: dict[str, int] = {}
    for place, stream in enumerate(streams):
        file, *more = written_to(stream)
        groups = grouped.setdefault(file, [array("I"), array("I")])
        if more:
            groups[0].append(place)
            others.setdefault(file, {file}).update(more)
            continue
        if sizes.get(file, 0) >= _BATCH_BYTES:
            groups.append(array("I"))
            sizes[file] = 0
        groups[-1].append(place)
        sizes[file] = sizes.get(file, 0) + stream.num_bytes
    return [
        Batch(file, Selection(streams, group), frozenset((file,) if number else others[file]))
        for file, groups in grouped.items()
        for number, group in enumerate(groups)
        if group
    ]


def _portions(streams: Iterable[Stream]) -> Iterator[list[Stream]]:
    """Streams that one thread prepares at once: so many small ones, or a large one alone."""
    portion: list[Stream] = []
    num_bytes = 0
    for stream in streams:
        size = stream.num_bytes
        if portion and (num_bytes + size > _PORTION_BYTES or len(portion) == _PORTION):
            yield portion
            portion, num_bytes = [], 0
        portion.append(stream)
        num_bytes += size
    if portion:
        yield portion


class Engine:
    """Runs batches on threads, as far as possible on files that no other thread is working on.

    Files are worked through in order, so that few are unfinished at a time; when fewer than two for each thread are
    left, those come first of which most is left, so that in the end no thread is alone with one.

    Args:
        work: The batches.
        make_worker: Makes the worker of one thread.
        num_workers: Number of threads, at least 1.
        written: Called with each batch when it is done, on the thread that did it.
    """

    def __init__(
        self,
        work: Sequence[Batch],
        make_worker: Callable[[], Worker],
        num_workers: int,
        written: Callable[[Batch], None] = lambda _: None,
    ) -> None:
        self._waiting: dict[str, deque[Batch]] = {}
        for batch in work:
            self._waiting.setdefault(batch.file, deque()).append(batch)
        self._make_worker = make_worker
        self._num_workers = max(1, min(num_workers, len(work)))
        self._written = written
        self._active: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._team = Team()

    def run(self) -> None:
        """Work through all batches; returns when every thread has ended.

        Raises:
            ShardwayError: What any thread raised, all problems together; batches not yet begun are not done.
            KeyboardInterrupt: After the threads have stopped.
        """
        self._team.run([self._work] * self._num_workers, "shardway")

    def _work(self) -> None:
        worker = self._make_worker()
        while (batch := self._next()) is not None:
            for streams in _portions(batch.streams):
                with worker.prepared(streams):
                    for stream in streams:
                        if self._team.stopped.is_set():
                            return
                        worker.move(stream)
            self._done(batch)

    def _next(self) -> Batch | None:
        with self._lock:
            if not self._waiting or self._team.stopped.is_set():
                return None
            file = next((name for name in self._waiting if not self._active[name]), "")
            if not file or len(self._waiting) < 2 * self._num_workers:
                file = min(self._waiting, key=lambda name: (self._active[name], -len(self._waiting[name])))
            batch = self._waiting[file].popleft()
            if not self._waiting[file]:
                del self._waiting[file]
            self._active[file] += 1
            return batch

    def _done(self, batch: Batch) -> None:
        with self._lock:
            self._active[batch.file] -= 1
        self._written(batch)
