"""The coordinator's part in a save: it may be lost at any line, and any other rank continues from the store.

Nothing here is safe because there is one coordinator; there may be two for a while. Each step that matters is a
register that is set once (an entry of the ledger, the decision, the end), so that the second one to try adopts what
the first one did.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.errors import Code, Problem
from shardway.live import verdicts
from shardway.live.ledger import Ledger
from shardway.live.messages import Decision, Entry, Result, encode_end, place_key
from shardway.live.requests import Delete, Finish, Prepare, Publish, Put, Steps, add, get, swap
from shardway.live.saving import SaveOutcome
from shardway.live.written import WriterResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardway.live.ledger import Share
    from shardway.live.messages import Lead
    from shardway.live.protocol import Participant
    from shardway.live.requests import Action, Done

_ASKED_ELSEWHERE = 64


class _Pulse(NamedTuple):
    """What was last seen of a rank, and since when."""

    beat: str
    beat_at: float
    num_bytes: str
    num_bytes_at: float


class Coordinator:
    """A rank that moves the save on, as long as the register of the lead says that it is the one.

    Args:
        seat: The rank's own part.
        lead: What it has put into the register.
    """

    def __init__(self, seat: Participant, lead: Lead) -> None:
        self.finished: dict[int, Done] = {}
        self._seat = seat
        self._keys = seat.keys
        self._options = seat.part.options
        self._roster = seat.roster
        self._ledger: Ledger | None = None
        self._lead = lead
        self._pulse_s = seat.silence_s / 4
        self._renewed_at = seat.clock()
        self._looked_at = -1e9
        self._complete_at: float | None = None
        self._checked = False
        self._decision: Decision | None = None
        self._results: dict[tuple[int, int], Result] = {}
        self._awaited: set[int] = set()
        self._num_results = 0
        self._pulses: dict[int, _Pulse] = {}
        self._given_at: dict[tuple[int, int], float] = {}
        self._action: tuple[type[Action], int] | None = None
        self._moved = (-1, 0.0)
        self._totals = (0, 0)

    def tick(self) -> Steps[bool]:
        """Do what can be done now. True when the save is over and everybody can know."""
        seat = self._seat
        if not (yield from self._keep()):
            return False
        if self._decision is None:
            (data,) = yield from get(self._keys.decision)
            self._decision = None if data is None else Decision.decode(data)
        if self._decision is None:
            if self._ledger is None:
                yield from self._recover()
            changed = yield from self._roster.read()
            look = seat.clock() - self._looked_at >= self._pulse_s
            if look:
                self._looked_at = seat.clock()
                changed |= yield from self._roster.bury()
            self._checked &= not changed
            if not (yield from self._keep()):  # reading many tables takes a while
                return False
            if self._ledger is None:
                yield from self._assemble()
            elif (yield from self._collect(self._ledger, look=look)):
                yield from self._publish(self._ledger)
        return self._decision is not None and (yield from self._close(self._decision))

    def _keep(self) -> Steps[bool]:
        """Show life if it is time; False when somebody else has taken over."""
        due = self._seat.clock() - self._renewed_at >= self._pulse_s
        return not due or (yield from self._renew(self._lead))

    def _renew(self, lead: Lead) -> Steps[bool]:
        """Show life; False when somebody else has taken over."""
        lead = lead._replace(beat=self._lead.beat + 1)
        current = yield from swap(self._keys.lead, self._lead.encode(), lead.encode())
        if current != lead.encode():
            self._seat.step_down(current)
            return False
        self._lead = lead
        self._renewed_at = self._seat.clock()
        return True

    def _recover(self) -> Steps[None]:
        """Take up what earlier coordinators have decided."""
        while True:
            number = 0 if self._ledger is None else len(self._ledger.entries)
            (data,) = yield from get(self._keys.entry(number))
            if data is None or not (yield from self._apply(Entry.decode(data))):
                break
        if self._ledger is not None:
            yield from self._announce(self._ledger)

    def _apply(self, entry: Entry) -> Steps[bool]:
        """Take a step of the ledger; False when the save has ended and its arrivals are forgotten."""
        yield from self._roster.load(entry.holders)
        if not self._roster.arrivals.keys() >= set(entry.holders):
            return False
        if self._ledger is None:
            self._ledger = Ledger(self._roster.holdings_of(entry.holders))
        self._ledger.apply(entry, self._roster.arrivals, self._roster.tables)
        return True

    def _append(self, entry: Entry) -> Steps[None]:
        """Set the next entry of the ledger, or adopt the one that is there, and tell everybody."""
        number = 0 if self._ledger is None else len(self._ledger.entries)
        current = yield from swap(self._keys.entry(number), b"", entry.encode())
        if (yield from self._apply(Entry.decode(current))) and self._ledger is not None:
            yield from self._announce(self._ledger)

    def _announce(self, ledger: Ledger) -> Steps[None]:
        """Tell each rank its work, then everybody that there is work."""
        seat, roster = self._seat, self._roster
        yield from seat.catch_up(self._lead.announced)
        items = []
        for share in ledger.shares.values():
            if share.entry >= self._lead.announced:
                arrival = roster.arrivals[share.number]
                work = ledger.work(share, arrival, roster.tables[arrival.table])
                if share.number == seat.number:
                    seat.assign(share.entry, work)
                items.append((self._keys.work(share.entry, share.number), work.encode()))
        if items:
            yield Put(tuple(items))
        yield from self._renew(self._lead._replace(announced=len(ledger.entries)))
        seat.hurry()

    # Assembling

    def _assemble(self) -> Steps[None]:
        """Wait until the model is complete, then share the work."""
        seat, roster, part = self._seat, self._roster, self._seat.part
        now = seat.clock()
        here = roster.here()
        if not self._checked:
            self._checked = True
            disagreements = roster.disagreements()
            if disagreements:
                yield from self._decide(Decision(problems=tuple(disagreements)))
                return
            complete = self._everyone_needed(here) and roster.complete()
            self._complete_at = (self._complete_at or now) if complete else None
        if self._complete_at is None:
            if now - seat.began_at > self._options.deadline_s:
                yield from self._decide(Decision(problems=tuple((yield from self._incomplete(here)))))
            return
        expected = set(part.needed.participants or ())
        if not expected <= set(roster.ranks(here)) and now - self._complete_at < self._options.grace_s:
            return
        problems = yield from self._do(Prepare(seat.staging), "create the staging directory")
        if problems is None:
            return
        if problems:
            yield from self._decide(Decision(problems=problems))
        else:
            yield from self._append(Entry(tuple(here), (), self._options.fully_parallel))

    def _everyone_needed(self, here: Sequence[int]) -> bool:
        """Without a list of tensors, the participants have to come: only they know what there is."""
        needed = self._seat.part.needed
        if needed.tensors is not None:
            return bool(here)
        wanted = needed.participants if needed.participants is not None else (self._seat.part.rank,)
        return set(wanted) <= set(self._roster.ranks(self._roster.arrivals)) and bool(here)

    def _incomplete(self, here: Sequence[int]) -> Steps[list[Problem]]:
        part, roster = self._seat.part, self._roster
        arrived = roster.ranks(here)
        absent = sorted(set(part.needed.participants or ()) - set(roster.ranks(roster.arrivals)))
        asked = absent[:_ASKED_ELSEWHERE]
        found = yield from get(*(place_key(rank) for rank in asked))
        recent = self._seat.wall() - 2 * self._options.deadline_s
        elsewhere = {}
        for rank, data in zip(asked, found, strict=True):
            if data:
                staging, destination, iteration, since = json.loads(data)
                if staging != self._seat.staging and since > recent:
                    elsewhere[rank] = f"{destination} (iteration {iteration})"
        return verdicts.incomplete(
            roster.gaps(),
            len(roster.known()),
            arrived=arrived,
            absent=absent,
            died=sorted(set(roster.ranks(roster.arrivals)) - set(arrived)),
            places=part.needed.places,
            here=f"{part.identity.destination} (iteration {part.identity.iteration})",
            elsewhere=elsewhere,
            deadline_s=self._options.deadline_s,
        )

    # Writing

    def _collect(self, ledger: Ledger, *, look: bool) -> Steps[bool]:
        """Gather results; take work back from who is lost. True when everything is written."""
        count = yield from add(self._keys.results, 0)
        self._awaited.update(range(self._num_results, count))
        self._num_results = count
        wanted = sorted(self._awaited)
        found = yield from get(*(self._keys.result(number) for number in wanted))
        for number, data in zip(wanted, found, strict=True):
            if data is None:
                continue
            self._awaited.discard(number)
            result = Result.decode(data)
            if result.problems:
                yield from self._decide(Decision(problems=result.problems))
                return False
            self._results[result.entry, result.number] = result
        outstanding = [share for key, share in ledger.shares.items() if key not in self._results]
        if outstanding and look:
            yield from self._look_after(ledger, outstanding)
        return not outstanding and self._decision is None

    def _look_after(self, ledger: Ledger, outstanding: Sequence[Share]) -> Steps[None]:
        """Find writers that are lost, and give their work to others."""
        roster, now = self._roster, self._seat.clock()
        yield from self._feel_pulses(sorted({*roster.here(), *(share.number for share in outstanding)}))
        overdue = set()
        for share in outstanding:
            given_at = self._given_at.setdefault((share.entry, share.number), now)
            moved_at = max(given_at, self._pulses[share.number].num_bytes_at)
            if share.number in roster.dead or now - moved_at > self._options.deadline_s:
                overdue.add(share.number)
        if not overdue:
            return
        here = roster.here(ledger.lost | overdue)
        if self._options.validate and here:
            agreement = self._seat.part.agreement
            here = [number for number in here if roster.arrivals[number].agreement == agreement]
        awake = [number for number in here if now - self._pulses[number].beat_at <= self._seat.silence_s]
        dropped = tuple((share.entry, share.number) for share in outstanding if share.number in overdue)
        orphans: list[int] = []
        for holders in (awake, here):
            entry = Entry(tuple(holders), dropped, self._options.fully_parallel)
            _, orphans = ledger.plan(entry, roster.arrivals, roster.tables)
            if not orphans:
                yield from self._append(entry)
                return
        if now - self._seat.began_at > self._options.deadline_s:
            keys = sorted({ledger.holdings.units[unit].key for unit in orphans})
            problems = verdicts.rank_lost(roster.ranks(overdue), keys, self._options.deadline_s)
            yield from self._decide(Decision(problems=tuple(problems)))

    def _feel_pulses(self, numbers: Sequence[int]) -> Steps[None]:
        now = self._seat.clock()
        found = yield from get(*(self._keys.pulse(number) for number in numbers))
        for number, data in zip(numbers, found, strict=True):
            beat, _, num_bytes = (data or b":").decode().partition(":")
            last = self._pulses.get(number, _Pulse("?", now, "?", now))
            self._pulses[number] = _Pulse(
                beat,
                last.beat_at if beat == last.beat else now,
                num_bytes,
                last.num_bytes_at if num_bytes == last.num_bytes else now,
            )

    # Publishing

    def _publish(self, ledger: Ledger) -> Steps[None]:
        """Everything is written: let the rest be written, and decide."""
        seat, roster = self._seat, self._roster
        results: list[WriterResult] = []
        if not self._runs(Publish):
            for key, share in sorted(ledger.shares.items()):
                result = WriterResult.from_bytes(self._results[key].written)
                if not _as_assigned(ledger, share, result):
                    rank = roster.arrivals[share.number].rank
                    what = f"rank {rank} wrote something else than it was asked to"
                    yield from self._decide(Decision(problems=(Problem(code=Code.SAVE_RANK_FAILED, what=what),)))
                    return
                results.append(result)
            self._totals = sum(len(result.files) for result in results), sum(result.num_bytes for result in results)
        tag = f"t{self._lead.term}"
        problems = yield from self._do(Publish(seat.staging, tag, results), "write the checkpoint's metadata")
        if problems is None:
            return
        outcome = SaveOutcome(
            staging=seat.staging,
            arrived=tuple(roster.ranks(ledger.everyone)),
            lost=tuple(roster.ranks(ledger.lost)),
            coordinator=seat.part.rank,
            num_files=self._totals[0],
            num_bytes=self._totals[1],
            wrote_bytes=0,
        )
        yield from self._decide(Decision(problems=problems, tag=tag, outcome=None if problems else outcome))

    def _decide(self, verdict: Decision) -> Steps[None]:
        """Set the decision, or adopt the one that is there."""
        mine = replace(verdict, decided_at=self._seat.wall())
        current = yield from swap(self._keys.decision, b"", mine.encode())
        self._decision = Decision.decode(current)
        self._action = None

    def _close(self, decision: Decision) -> Steps[bool]:
        """Carry the decision out, and let everybody know."""
        if decision.outcome is not None:
            (data,) = yield from get(self._keys.end)
            if data is None:
                problems = yield from self._do(
                    Finish(self._seat.staging, decision.tag), "put the checkpoint in its place"
                )
                if problems is None:
                    return False
                yield from swap(self._keys.end, b"", encode_end(problems))
        if not (yield from self._renew(self._lead._replace(stage="ended"))):
            return False
        yield Delete(tuple(self._used_keys()))
        return True

    def _do(self, action: Action, doing: str) -> Steps[tuple[Problem, ...] | None]:
        """Have an action done once. None while it runs, then its problems; one that makes no progress has failed."""
        seat = self._seat
        if self._action is None or not self._runs(type(action)):
            self._action = type(action), (yield from seat.start(action))
            self._moved = (-1, seat.clock())
            return None
        number = self._action[1]
        done = self.finished.get(number)
        if done is not None:
            self._action = None
            seat.hurry()
            return () if done.error is None else verdicts.rank_failed(seat.part.rank, done.error, doing)
        moved = seat.progress[number]
        if moved != self._moved[0]:
            self._moved = moved, seat.clock()
        if seat.clock() - self._moved[1] > self._options.deadline_s:
            return tuple(verdicts.stuck(seat.part.rank, doing, self._options.deadline_s))
        return None

    def _runs(self, kind: type[Action]) -> bool:
        """Whether the action in progress is of this kind; one of an earlier stage is no longer looked at."""
        return self._action is not None and self._action[0] is kind

    def _used_keys(self) -> list[str]:
        keys = self._keys
        used = [keys.result(number) for number in range(self._num_results)]
        for number in self._roster.arrivals:
            used += (keys.arrival(number), keys.pulse(number))
        if self._ledger is not None:
            used += [keys.work(entry, number) for entry, number in self._ledger.shares]
            used += [keys.entry(number) for number in range(len(self._ledger.entries))]
        return used


def _as_assigned(ledger: Ledger, share: Share, result: WriterResult) -> bool:
    """Whether a result lists exactly the units of its assignment."""
    units = [ledger.holdings.units[unit] for unit in share.units]
    asked = sorted((unit.key, *unit.box) for unit in units if unit.box is not None)
    objects = sorted(unit.key for unit in units if unit.box is None)
    wrote = sorted((each.shard.key, each.shard.start, each.shard.size) for each in result.shards)
    return asked == wrote and objects == sorted(each.key for each in result.objects)
