"""Save together: the protocol's thin shell over a real store, a real clock and real threads; no collective."""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
import time
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.live.memory_store import MemoryStore
from shardway.live.messages import attempt_key
from shardway.live.protocol import Part, Participant
from shardway.live.requests import (
    Abandon,
    Action,
    Add,
    AskDead,
    Cancel,
    Delete,
    Done,
    Finish,
    Get,
    News,
    Prepare,
    Publish,
    Put,
    Request,
    Sleep,
    Start,
    Steps,
    Swap,
    Write,
)
from shardway.live.saving import Superseded
from shardway.run.processes import began_at, is_dead, this_process

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from shardway.live.records import ObjectShard, Shard
    from shardway.live.saving import Needed, SaveActions, SaveIdentity, SaveOptions, SaveOutcome
    from shardway.live.written import WriterResult

_T = TypeVar("_T")
_ABSENT = b"(absent)"
_STOP_S = 5.0
_TAKEN_KEPT = 4096
_taken: dict[tuple[str, int], str] = {}


class StoreLike(Protocol):
    """The part of `torch.distributed.Store` that a save uses (and `delete_key` and `clone` where they exist)."""

    def set(self, key: str, value: str, /) -> None:
        """Store a value."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a counter, which begins at 0; return the sum."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Replace `expected` (empty: absent) by `desired`; return what is there afterwards."""


def save_together(
    *,
    store: StoreLike | None,
    rank: int,
    identity: SaveIdentity,
    shards: Sequence[Shard],
    objects: Sequence[ObjectShard],
    needed: Needed,
    agreement: Mapping[str, str],
    options: SaveOptions,
    actions: SaveActions,
) -> SaveOutcome:
    """Save with whoever comes; return when the checkpoint is in place, or raise the error that all of them raise.

    It runs no collective and takes part in no process group. Every wait is bounded: this returns or raises within
    (4 + twice the number of ranks that die or stall) times `options.deadline_s` after the last progress of any rank.
    Any thread may call it; the actions run in threads of their own (where the current CUDA device and stream are not
    the caller's), and one that never returns doesn't keep this from returning.

    Args:
        store: Where the ranks meet, the same for all of them; None: this process saves alone.
        rank: Number of this rank in the job.
        identity: What is saved where. A second call with the same identity is another attempt; a rank that was not
            in the newest attempt joins it, or learns its outcome if it has one.
        shards: What this rank holds, as often as it likes to say it.
        objects: Pickled objects that this rank holds.
        needed: What makes the checkpoint whole.
        agreement: Texts that must be equal on all ranks, by what they are about (``"config"``); skipped without
            `options.validate`.
        options: How long to wait and how to share the work.
        actions: What moves the bytes.

    Returns:
        How it went.

    Raises:
        SaveIncomplete: A part of the model was not held by anyone who came.
        SaveFailed: A rank failed, was lost, or disagreed with another one.
        ShardwayError: `store-failed`: the store doesn't answer, so that this rank can't know how the save went.

    *Ranks*: every one that holds a part of the model that no other rank holds; others may call it, late or not at all.
    """
    memory = (attempt_key(identity), rank)
    part = Part(
        rank=rank,
        process=this_process(),
        born=began_at(),
        nonce=secrets.token_hex(8),
        taken=_taken.get(memory),
        identity=identity,
        shards=shards,
        objects=objects,
        needed=needed,
        agreement=agreement,
        options=options,
    )
    participant = Participant(part, time.monotonic, time.time)
    world = _World(MemoryStore() if store is None else store, actions, options.deadline_s)
    try:
        return world.drive(participant.run())
    except ShardwayError:
        raise
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        what = f"rank {rank} was interrupted" if interrupted else f"rank {rank} failed: {type(error).__name__}: {error}"
        problem = Problem(code=Code.INTERRUPTED if interrupted else Code.SAVE_RANK_FAILED, what=what)
        with contextlib.suppress(ShardwayError):
            world.drive(participant.give_up(problem))
        raise
    finally:
        _remember(memory, participant.staging)
        world.close()


def _remember(memory: tuple[str, int], staging: str) -> None:
    """Note that this rank has taken part in an attempt."""
    if staging:
        _taken.pop(memory, None)
        _taken[memory] = staging
        while len(_taken) > _TAKEN_KEPT:
            del _taken[next(iter(_taken))]


class _World:
    """Answers the requests of a participant.

    Args:
        store: Where the ranks meet.
        actions: What moves the bytes.
        patience_s: Seconds that one call to the store may take.
    """

    def __init__(self, store: StoreLike, actions: SaveActions, patience_s: float) -> None:
        self._line = _StoreLine(store, patience_s)
        self._actions = actions
        self._changed = threading.Condition()
        self._progress: dict[int, int] = {}
        self._done: list[Done] = []
        self._cancelled: set[int] = set()
        self._threads: dict[int, threading.Thread] = {}

    def drive(self, steps: Steps[_T]) -> _T:
        """Run a computation to its end."""
        answer: object = None
        while True:
            try:
                request = steps.send(answer)
            except StopIteration as end:
                return cast("_T", end.value)
            answer = self._answer(request)

    def close(self) -> None:
        """Stop what still runs; what doesn't stop in time is left alone."""
        self._cancel()
        until = time.monotonic() + _STOP_S
        for thread in self._threads.values():
            thread.join(max(0.0, until - time.monotonic()))
        self._line.close()

    def _answer(self, request: Request) -> object:
        match request:
            case Sleep(until):
                return self._sleep(until)
            case Start(number, action):
                self._start(number, action)
            case Cancel():
                self._cancel()
            case AskDead(processes):
                return frozenset(process for process in processes if is_dead(process))
            case _:
                return self._line.answer(request)
        return None

    def _sleep(self, until: float) -> News:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._done), max(0.0, until - time.monotonic()))
            done, self._done = tuple(self._done), []
            return News(dict(self._progress), done)

    def _start(self, number: int, action: Action) -> None:
        earlier = tuple(self._threads.values()) if isinstance(action, Abandon) else ()
        thread = threading.Thread(
            target=self._run, args=(number, action, earlier), name=f"shardway-{type(action).__name__}", daemon=True
        )
        self._threads[number] = thread
        thread.start()

    def _cancel(self) -> None:
        with self._changed:
            self._cancelled.update(self._threads)

    def _run(self, number: int, action: Action, earlier: Sequence[threading.Thread]) -> None:
        result: WriterResult | None = None
        failure: BaseException | None = None
        try:
            result = self._act(number, action, earlier)
        except BaseException as error:  # noqa: BLE001 - told to all ranks
            failure = error
        with self._changed:
            self._done.append(Done(number, result, failure))
            self._changed.notify_all()

    def _act(self, number: int, action: Action, earlier: Sequence[threading.Thread]) -> WriterResult | None:
        report = self._reporter(number)
        match action:
            case Prepare(staging):
                self._actions.prepare(staging)
            case Write(assignment):
                return self._actions.write(assignment, report)
            case Publish(staging, tag, results):
                self._actions.publish(staging, tag, results, report)
            case Finish(staging, tag):
                self._actions.finish(staging, tag, report)
            case Abandon(staging):
                until = time.monotonic() + _STOP_S
                for thread in earlier:
                    thread.join(max(0.0, until - time.monotonic()))
                self._actions.abandon(staging)
        return None

    def _reporter(self, number: int) -> Callable[[int], None]:
        def report(num_bytes: int) -> None:
            with self._changed:
                self._progress[number] = self._progress.get(number, 0) + num_bytes
                if number in self._cancelled:
                    raise Superseded

        return report


class _StoreLine:
    """Calls a store in a thread, so that a store that never answers is an error after a while, not a hang."""

    def __init__(self, store: StoreLike, patience_s: float) -> None:
        self._name = _name_of(store)
        self._given = store
        self._store: StoreLike | None = None
        self._patience_s = patience_s
        self._calls: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[object, BaseException | None]] = queue.SimpleQueue()
        self._broken = False
        threading.Thread(target=self._serve, name="shardway-store", daemon=True).start()

    def answer(self, request: Request) -> object:
        """The store's answer.

        Raises:
            ShardwayError: `store-failed`, also for every call after the first that failed.
        """
        why = "it failed before"
        if not self._broken:
            self._calls.put(request)
            try:
                answer, error = self._answers.get(timeout=self._patience_s)
                if error is None:
                    return answer
                why = f"{type(error).__name__}: {error}"
            except queue.Empty:
                why = f"no answer for {self._patience_s:.3g} s"
            except BaseException:
                self._broken = True  # interrupted: the answer to come is nobody's
                raise
        self._broken = True
        raise ShardwayError(
            Problem(
                code=Code.STORE_FAILED,
                what=f"the store that the ranks meet through failed: {self._name}",
                facts=(why, "this rank can't know whether the others have published the checkpoint"),
                cure="see whether the process or filesystem behind the store is alive, and whether there is a "
                "checkpoint, before saving again",
            )
        )

    def close(self) -> None:
        """Let the thread end."""
        self._calls.put(None)

    def _serve(self) -> None:
        while (request := self._calls.get()) is not None:
            try:
                if self._store is None:
                    self._store = _own_connection(self._given)
                answer = _call(self._store, request)
            except BaseException as error:  # noqa: BLE001 - raised by answer()
                self._answers.put((None, error))
            else:
                self._answers.put((answer, None))


def _call(store: StoreLike, request: Request) -> object:
    """Ask the store, never so that it waits."""
    match request:
        case Get(keys):
            return tuple(_read(store, key) for key in keys)
        case Put(items):
            for key, value in items:
                store.set(key, cast("str", value))
        case Swap(key, expected, value):
            return store.compare_set(key, cast("str", expected), cast("str", value))
        case Add(key, amount):
            return store.add(key, amount)
        case Delete(keys):
            with contextlib.suppress(AttributeError, RuntimeError, NotImplementedError):  # some stores can't
                for key in keys:
                    store.delete_key(key)  # type: ignore[attr-defined]
        case _:
            raise TypeError(type(request).__name__)
    return None


def _read(store: StoreLike, key: str) -> bytes | None:
    """The value of a key, or None; unlike `get`, a comparison with what can't be there never waits."""
    value = store.compare_set(key, cast("str", _ABSENT), cast("str", _ABSENT))
    return None if value in (_ABSENT, b"") else value


def _own_connection(store: StoreLike) -> StoreLike:
    """A connection of one's own to a TCPStore, whose calls wait for each other within a process; else the store."""
    base: object = store
    while hasattr(base, "underlying_store"):
        base = base.underlying_store
    if type(base).__name__ == "TCPStore" and hasattr(store, "clone"):
        return cast("StoreLike", store.clone())
    return store


def _name_of(store: object) -> str:
    """How to call a store in an error."""
    base = store
    while hasattr(base, "underlying_store"):
        base = base.underlying_store
    kind = type(base).__name__
    if hasattr(base, "host"):
        return f"{kind} at {base.host}:{getattr(base, 'port', '?')}"
    if hasattr(base, "path"):
        return f"{kind} in {base.path}"
    return kind
