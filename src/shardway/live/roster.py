"""Who came to a save, who of them is still here, and what they hold together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.core.boxes import whole
from shardway.live import verdicts
from shardway.live.coverage import Gap, Holdings
from shardway.live.messages import Arrival, decode_table, table_key
from shardway.live.requests import Steps, add, ask_dead, get

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from shardway.core.errors import Problem
    from shardway.core.tensors import Shape
    from shardway.live.messages import Keys, Table
    from shardway.live.saving import Needed


class Roster:
    """The arrivals, read once each.

    Args:
        keys: The attempt's keys.
        needed: What makes the checkpoint whole.
    """

    def __init__(self, keys: Keys, needed: Needed) -> None:
        self.arrivals: dict[int, Arrival] = {}
        self.tables: dict[str, Table] = {}
        self.dead: set[int] = set()
        self._keys = keys
        self._needed = needed
        self._awaited: set[int] = set()
        self._count = 0
        self._brought: dict[str, Shape | None] = {}
        self._present: Holdings | None = None
        self._counted: list[int] = []

    def read(self) -> Steps[bool]:
        """Read who arrived since the last time; True when somebody did."""
        count = yield from add(self._keys.arrivals, 0)
        self._awaited.update(range(self._count, count))  # one may have counted itself and died before it said who it is
        self._count = count
        return (yield from self.load(self._awaited))

    def load(self, numbers: Iterable[int]) -> Steps[bool]:
        """Make sure that these arrivals and their tables are known, where they can be; True when one is new."""
        wanted = sorted(number for number in numbers if number not in self.arrivals)
        found = yield from get(*(self._keys.arrival(number) for number in wanted))
        fresh = {number: Arrival.decode(data) for number, data in zip(wanted, found, strict=True) if data is not None}
        digests = sorted({arrival.table for arrival in fresh.values()} - self.tables.keys())
        tables = yield from get(*(table_key(digest) for digest in digests))
        for digest, data in zip(digests, tables, strict=True):
            if data is not None:
                table = self.tables[digest] = decode_table(data)
                self._brought.update((shard.key, shard.global_shape) for shard in table.shards)
                self._brought.update((record.key, None) for record in table.objects)
        fresh = {number: arrival for number, arrival in fresh.items() if arrival.table in self.tables}
        self.arrivals.update(fresh)
        self._awaited.difference_update(fresh)
        return bool(fresh)

    def bury(self) -> Steps[bool]:
        """Find out who is known to have died since; True when somebody has."""
        living = [number for number in self.arrivals if number not in self.dead]
        gone = yield from ask_dead([self.arrivals[number].process for number in living])
        fresh = {number for number in living if self.arrivals[number].process in gone}
        self.dead |= fresh
        return bool(fresh)

    def here(self, excluded: Collection[int] = ()) -> list[int]:
        """Arrival numbers of those who may be given work: alive for all that is known, and the last of their rank."""
        latest = {self.arrivals[number].rank: number for number in sorted(self.arrivals)}
        return sorted(number for number in latest.values() if number not in self.dead and number not in excluded)

    def ranks(self, numbers: Iterable[int]) -> list[int]:
        """The ranks of some who arrived, ascending."""
        return sorted({self.arrivals[number].rank for number in numbers})

    def holdings(self) -> Holdings:
        """What those who are here hold: exactly what a ledger derives that has them as its first holders."""
        here = self.here()
        if self._present is None or here[: len(self._counted)] != self._counted:
            self._present, self._counted = Holdings(self._needed), []
        for number in here[len(self._counted) :]:
            digest = self.arrivals[number].table
            self._present.add(digest, self.tables[digest])
        self._counted = here
        return self._present

    def holdings_of(self, numbers: Sequence[int]) -> Holdings:
        """What some of them hold."""
        present = self.holdings()
        return present if self._counted == list(numbers) else Holdings(self._needed)

    def known(self) -> dict[str, Shape | None]:
        """Every tensor and object that is needed, or that anyone has brought, the dead too."""
        return {**self._brought, **self.holdings().known()}

    def complete(self) -> bool:
        """Whether those who are here hold all of that."""
        present = self.holdings()
        return present.complete() and self._brought.keys() <= present.known().keys()

    def gaps(self) -> list[Gap]:
        """What of it they don't hold."""
        present = self.holdings()
        there = present.known()
        absent = {key: shape for key, shape in sorted(self._brought.items()) if key not in there}
        return present.gaps() + [
            Gap(key, shape, None if shape is None else whole(shape), 0) for key, shape in absent.items()
        ]

    def disagreements(self) -> list[Problem]:
        """What those who are here say differently; empty when none of them asks for that to be checked."""
        arrivals = [self.arrivals[number] for number in self.here()]
        if not any(arrival.validate for arrival in arrivals):
            return []
        first = arrivals[0].agreement
        problems = []
        if any(arrival.agreement != first for arrival in arrivals):
            problems += verdicts.disagreements(arrivals)
        holdings = self.holdings()
        if holdings.conflicts:
            ranks_of = [[each.rank for each in arrivals if each.table == digest] for digest in holdings.tables]
            problems += verdicts.conflicts(holdings.conflicts, ranks_of)
        return problems
