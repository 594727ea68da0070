"""Who writes what: a ledger of steps from which every coordinator derives the same assignments."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from shardway.live.messages import Work

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardway.live.coverage import Holdings, Unit
    from shardway.live.messages import Arrival, Entry, Table


class Share(NamedTuple):
    """An assignment: the units that one who arrived writes on behalf of one entry."""

    entry: int
    number: int
    units: tuple[int, ...]


class Holder(NamedTuple):
    """One who may be given work: its arrival number, its rank, its units and their replica numbers."""

    number: int
    rank: int
    units: Sequence[int]
    replicas: Sequence[int]


def share(
    wanted: Sequence[int],
    units: Sequence[Unit],
    holders: Sequence[Holder],
    *,
    fully_parallel: bool,
    loads: Mapping[int, int],
) -> tuple[dict[int, list[int]], list[int]]:
    """Give each unit to exactly one of those who hold it, whatever numbers the units have.

    Args:
        wanted: Which units are to be written.
        units: All units.
        holders: Who may write.
        fully_parallel: Even out the bytes over the holders, largest unit first; otherwise the lowest replica writes,
            the lowest rank among equals.
        loads: Bytes that holders have been given before, by arrival number.

    Returns:
        Units by arrival number, ascending; and the units that nobody holds.
    """
    held: dict[int, list[tuple[int, int, int]]] = {unit: [] for unit in wanted}
    for holder in holders:
        for unit, replica in zip(holder.units, holder.replicas, strict=True):
            if unit in held:
                held[unit].append((replica, holder.rank, holder.number))
    given: dict[int, list[int]] = {}
    if fully_parallel:
        filled = {holder.number: loads.get(holder.number, 0) for holder in holders}
        # What only one holds comes first: it decides how much room there is for the rest.

        def order(unit: int) -> tuple[bool, int, str, tuple[tuple[int, ...], ...]]:
            key, box, num_bytes = units[unit]
            return len(held[unit]) > 1, -num_bytes, key, box or ()

        for unit in sorted(held, key=order):
            candidates = held[unit]
            if candidates:
                number = (
                    candidates[0]
                    if len(candidates) == 1
                    else min(candidates, key=lambda each: (filled[each[2]], each[1]))
                )[2]
                filled[number] += units[unit].num_bytes
                given.setdefault(number, []).append(unit)
    else:
        for unit, candidates in held.items():
            if candidates:
                given.setdefault(min(candidates)[2], []).append(unit)
    orphans = sorted(unit for unit, candidates in held.items() if not candidates)
    return {number: sorted(given[number]) for number in sorted(given)}, orphans


class Ledger:
    """The assignments after a sequence of entries; equal entries and arrivals make equal ledgers.

    Args:
        holdings: What the holders of the first entry hold, or some of them.
    """

    def __init__(self, holdings: Holdings) -> None:
        self.holdings = holdings
        self.entries: list[Entry] = []
        self._units: dict[str, tuple[int, ...]] = {}
        self.shares: dict[tuple[int, int], Share] = {}
        self.everyone: set[int] = set()
        self.lost: set[int] = set()

    def apply(self, entry: Entry, arrivals: Mapping[int, Arrival], tables: Mapping[str, Table]) -> None:
        """Take the step that `entry` says; every one of its holders must be among `arrivals`."""
        number = len(self.entries)
        todo, orphans = self.plan(entry, arrivals, tables)
        if orphans:
            message = f"entry {number} leaves {len(orphans)} units without a holder"
            raise AssertionError(message)
        for key in entry.dropped:
            self.shares.pop(key, None)
            self.lost.add(key[1])
        for holder, units in todo.items():
            self.shares[number, holder] = Share(number, holder, tuple(units))
        self.everyone.update(entry.holders)
        self.entries.append(entry)

    def plan(
        self, entry: Entry, arrivals: Mapping[int, Arrival], tables: Mapping[str, Table]
    ) -> tuple[dict[int, list[int]], list[int]]:
        """What `entry` would give to whom, and what it would leave to nobody. Changes no assignment."""
        for number in entry.holders:
            digest = arrivals[number].table
            if not self.entries:
                self.holdings.add(digest, tables[digest])
            if digest not in self._units:
                self._units[digest] = self.holdings.tables.get(digest) or self.holdings.match(tables[digest])
        if self.entries:
            units = [unit for key in entry.dropped if key in self.shares for unit in self.shares[key].units]
        else:
            units = self.holdings.chosen()
        known = self.holdings.units
        loads: dict[int, int] = {}
        for each in self.shares.values():
            loads[each.number] = loads.get(each.number, 0) + sum(known[unit].num_bytes for unit in each.units)
        holders = [
            Holder(number, arrival.rank, self._units[arrival.table], arrival.replicas)
            for number in entry.holders
            for arrival in (arrivals[number],)
        ]
        return share(units, known, holders, fully_parallel=entry.fully_parallel, loads=loads)

    def work(self, each: Share, arrival: Arrival, table: Table) -> Work:
        """An assignment in the writer's own terms."""
        units = set(each.units)
        places: list[int] = []
        for place, unit in enumerate(self._units[arrival.table]):
            if unit in units:
                units.discard(unit)  # a rank that lists a box twice writes it once
                places.append(place)
        num_shards = len(table.shards)
        return Work(
            tuple(place for place in places if place < num_shards),
            tuple(place - num_shards for place in places if place >= num_shards),
        )
