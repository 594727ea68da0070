"""What a participant asks of the world: the store, the clock and its own threads. Pure data, answered by a driver."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardway.live.saving import Assignment
    from shardway.live.written import WriterResult


class Get(NamedTuple):
    """Read values without waiting; answered by a tuple with None for what is absent."""

    keys: tuple[str, ...]


class Put(NamedTuple):
    """Store values, in order."""

    items: tuple[tuple[str, bytes], ...]


class Swap(NamedTuple):
    """Replace `expected` (empty: absent) by `value`; answered by what is there afterwards."""

    key: str
    expected: bytes
    value: bytes


class Add(NamedTuple):
    """Add to a counter; answered by the sum."""

    key: str
    amount: int


class Delete(NamedTuple):
    """Forget values where the store can; no error where it can't."""

    keys: tuple[str, ...]


class AskDead(NamedTuple):
    """Which of these processes are known to be dead; answered by a frozenset, empty where nothing is known."""

    processes: tuple[str, ...]


class Prepare(NamedTuple):
    """`SaveActions.prepare`."""

    staging: str


class Write(NamedTuple):
    """`SaveActions.write`."""

    assignment: Assignment


class Publish(NamedTuple):
    """`SaveActions.publish`."""

    staging: str
    tag: str
    results: Sequence[WriterResult]


class Finish(NamedTuple):
    """`SaveActions.finish`."""

    staging: str
    tag: str


class Abandon(NamedTuple):
    """`SaveActions.abandon`, when a `write` that still runs has stopped."""

    staging: str


Action = Prepare | Write | Publish | Finish | Abandon


class Start(NamedTuple):
    """Begin an action in the background; its end and its progress come with the answer to a `Sleep`."""

    number: int
    action: Action


class Cancel(NamedTuple):
    """Let the `report` of every action that still runs raise `Superseded`."""


class Sleep(NamedTuple):
    """Wait until a time on the participant's clock, or until an action ends; answered by `News`."""

    until: float


class Done(NamedTuple):
    """An action has ended: with a result if it was a `Write`, or with an error."""

    number: int
    result: WriterResult | None
    error: BaseException | None


class News(NamedTuple):
    """What happened in this process during a `Sleep`.

    Attributes:
        progress: Bytes reported so far, by number of the action.
        done: Actions that have ended.
    """

    progress: Mapping[int, int]
    done: tuple[Done, ...]


Request = Get | Put | Swap | Add | Delete | AskDead | Start | Cancel | Sleep

_T = TypeVar("_T")
Steps = Generator[Request, object, _T]
"""A computation that asks for things on its way."""


def get(*keys: str) -> Steps[tuple[bytes | None, ...]]:
    """Read values without waiting."""
    return cast("tuple[bytes | None, ...]", (yield Get(keys))) if keys else ()


def swap(key: str, expected: bytes, value: bytes) -> Steps[bytes]:
    """Compare and set; returns what is there afterwards."""
    return cast("bytes", (yield Swap(key, expected, value)))


def add(key: str, amount: int) -> Steps[int]:
    """Add to a counter; returns the sum."""
    return cast("int", (yield Add(key, amount)))


def ask_dead(processes: Sequence[str]) -> Steps[frozenset[str]]:
    """Which of these processes are known to be dead."""
    return cast("frozenset[str]", (yield AskDead(tuple(processes)))) if processes else frozenset()


def sleep(until: float) -> Steps[News]:
    """Wait until a time, or until an action ends."""
    return cast("News", (yield Sleep(until)))
