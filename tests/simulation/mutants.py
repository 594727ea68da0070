"""Ways to break the protocol, each of which the simulation must notice."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from shardway.live import protocol
from shardway.live.coordinator import Coordinator
from shardway.live.coverage import Holdings
from shardway.live.ledger import Ledger
from shardway.live.requests import Put, Steps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pytest

    from shardway.live.coverage import Gap
    from shardway.live.messages import Arrival, Decision, Entry, Table


def decide_by_set(patch: pytest.MonkeyPatch) -> None:
    """The decision is written, not compared and set: two coordinators may decide."""

    def decide(self: Coordinator, verdict: Decision) -> Steps[None]:
        mine = replace(verdict, decided_at=self._seat.wall())
        yield Put(((self._keys.decision, mine.encode()),))
        self._decision = mine
        self._action = None

    patch.setattr(Coordinator, "_decide", decide)


def skip_coverage(patch: pytest.MonkeyPatch) -> None:
    """Whatever is here is enough."""

    def gaps(self: Holdings) -> list[Gap]:
        return []

    patch.setattr(Holdings, "gaps", gaps)
    patch.setattr(Holdings, "complete", lambda self: True)


def forget_fencing(patch: pytest.MonkeyPatch) -> None:
    """A rank that writes a second time uses the same file names."""
    patch.setattr(protocol, "FILES_PER_ASSIGNMENT", 0)


def keep_dropped_work(patch: pytest.MonkeyPatch) -> None:
    """What a lost writer wrote counts, though another one has been given its work."""
    original = Ledger.apply

    def apply(self: Ledger, entry: Entry, arrivals: Mapping[int, Arrival], tables: Mapping[str, Table]) -> None:
        before = dict(self.shares)
        original(self, entry, arrivals, tables)
        self.shares = {**before, **self.shares}

    patch.setattr(Ledger, "apply", apply)


def never_take_over(patch: pytest.MonkeyPatch) -> None:
    """The first coordinator is the only one."""
    original = protocol.Participant._take_over

    def take_over(self: protocol.Participant) -> Steps[None]:
        if self._lead is None:
            yield from original(self)

    patch.setattr(protocol.Participant, "_take_over", take_over)


def never_lose(patch: pytest.MonkeyPatch) -> None:
    """A writer is waited for as long as it takes."""

    def look_after(self: Coordinator, *_: object) -> Steps[None]:
        yield from ()

    patch.setattr(Coordinator, "_look_after", look_after)


def publish_at_once(patch: pytest.MonkeyPatch) -> None:
    """The save is declared published before the directory is in its place."""

    def close(self: Coordinator, decision: Decision) -> Steps[bool]:
        return (yield from self._renew(self._lead._replace(stage="ended")))

    patch.setattr(Coordinator, "_close", close)


def hurry_the_new(patch: pytest.MonkeyPatch) -> None:
    """A rank that is given work is lost if it had none before for too long (once a bug)."""
    original = Coordinator.__init__

    class Long(dict[tuple[int, int], float]):
        def setdefault(self, key: tuple[int, int], default: float = 0.0) -> float:
            return -1e9

    def init(self: Coordinator, *args: object) -> None:
        original(self, *args)  # type: ignore[arg-type]
        self._given_at = Long()

    patch.setattr(Coordinator, "__init__", init)


def confuse_actions(patch: pytest.MonkeyPatch) -> None:
    """A coordinator takes the end of its earlier action for the end of the one that it wants done (once a bug)."""
    patch.setattr(Coordinator, "_runs", lambda self, kind: self._action is not None)


MUTANTS: tuple[Callable[[pytest.MonkeyPatch], None], ...] = (
    decide_by_set,
    skip_coverage,
    forget_fencing,
    keep_dropped_work,
    never_take_over,
    never_lose,
    publish_at_once,
    hurry_the_new,
    confuse_actions,
)
