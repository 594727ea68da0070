"""One rank's part in a save, as a computation that touches nothing: a driver answers its requests.

The same code runs over a real store in `shardway.live.rendezvous` and in the simulation of the tests.
docs/design/0006-save-protocol.md says why it can't hang and can't publish twice.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shardway.live.coordinator import Coordinator
from shardway.live.messages import (
    Arrival,
    Decision,
    Keys,
    Lead,
    Result,
    Work,
    attempt_key,
    decode_end,
    encode_table,
    place_key,
    table_key,
)
from shardway.live.requests import Abandon, Cancel, Prepare, Put, Start, Steps, Write, add, ask_dead, get, sleep, swap
from shardway.live.roster import Roster
from shardway.live.saving import FILES_PER_ASSIGNMENT, Assignment, SaveOutcome, Superseded, error_of
from shardway.live.verdicts import rank_failed, unfinished

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from shardway.core.errors import Problem
    from shardway.live.records import ObjectShard, Shard
    from shardway.live.requests import Action, Done, News
    from shardway.live.saving import Needed, SaveIdentity, SaveOptions

_QUICK_S = 0.002
_SLOW_S = 0.5
_GROWTH = 1.6
_STOP_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one rank brings to a save.

    Attributes:
        rank: Its number in the job.
        process: Identifies its process on its machine.
        born: When the process began, in seconds since 1970: what was decided earlier is another job's.
        nonce: Never used before by anyone; names the attempt if this rank is the one to open it.
        taken: The attempt at this save that this process has taken part in before; it opens or joins another one.
        identity: What is saved where.
        shards: Its shards.
        objects: Its objects.
        needed: What makes the checkpoint whole.
        agreement: What has to be the same on all ranks.
        options: How long to wait and how to share.
    """

    rank: int
    process: str
    born: float
    nonce: str
    taken: str | None
    identity: SaveIdentity
    shards: Sequence[Shard]
    objects: Sequence[ObjectShard]
    needed: Needed
    agreement: Mapping[str, str]
    options: SaveOptions


class Participant:
    """A rank in a save.

    Args:
        part: What it brings.
        clock: Seconds, steady.
        wall: Seconds since 1970.
    """

    def __init__(self, part: Part, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        self.part = part
        self.clock = clock
        self.wall = wall
        self.silence_s = part.options.silence
        self.number = -1
        self.staging = ""
        self.keys = Keys("")
        self.roster = Roster(self.keys, part.needed)  # kept when the lead is lost, so that its work is done only once
        self.began_at = clock()
        self.progress: dict[int, int] = {}
        self._coordinator: Coordinator | None = None
        self._lead: Lead | None = None
        self._seen = b""
        self._seen_at = self.began_at
        self._read = 0
        self._assigned: set[int] = set()
        self._queue: list[tuple[int, Work]] = []
        self._writing: tuple[int, int] | None = None
        self._writes: list[int] = []
        self._prepared = False
        self._actions = 0
        self._pulsed_at = -1e9
        self._beat = 0
        self._pause_s = _QUICK_S

    def run(self) -> Steps[SaveOutcome]:
        """Take part until the end.

        Returns:
            How the save went.

        Raises:
            ShardwayError: What every participant raises; nothing was published.
        """
        late = yield from self._join()
        if not late:
            yield from self._arrive()
        while True:
            yield from self._show_life()
            if self._coordinator is not None:
                over = yield from self._coordinator.tick()
            else:
                over = yield from self._follow()
            if over:
                return (yield from self._conclude())
            yield from self._begin_write()
            self._pause_s = min(self._pause_s * _GROWTH, _SLOW_S, self.silence_s / 4)
            news = yield from sleep(self.clock() + self._pause_s)
            yield from self._take(news)

    def give_up(self, problem: Problem) -> Steps[None]:
        """End the save for everyone, unless it is decided already: this rank is leaving."""
        if self.staging:
            verdict = Decision(problems=(problem,), decided_at=self.wall())
            yield from swap(self.keys.decision, b"", verdict.encode())

    # What the coordinator needs of its rank

    def start(self, action: Action) -> Steps[int]:
        """Begin an action; returns the number that its news carry."""
        self._actions += 1
        self._prepared |= isinstance(action, Prepare)
        self.progress[self._actions] = 0
        yield Start(self._actions, action)
        return self._actions

    def hurry(self) -> None:
        """Something has changed: look again soon."""
        self._pause_s = _QUICK_S

    def step_down(self, current: bytes) -> None:
        """Somebody else coordinates: follow."""
        self._coordinator = None
        self._notice(current)

    # The steps of a participant

    def _join(self) -> Steps[bool]:
        """Find or open the attempt; True when it has ended already, so that only its outcome is left to learn."""
        part = self.part
        register = attempt_key(part.identity)
        (found,) = yield from get(register)
        over: bytes | None = None
        staging, opened_at = _opened(found)
        # One that was opened before this process began is another job's, which may have been killed on its way: what
        # its ranks have written must not become a part of this job's checkpoint.
        if found is None or staging == part.taken or opened_at < part.born:
            mine = f"{part.nonce} {self.wall():.3f}".encode()
            staging, _ = _opened((yield from swap(register, found or b"", mine)))
        else:
            (over,) = yield from get(Keys(staging).decision)
        self.staging = staging
        self.keys = Keys(self.staging)
        self.roster = Roster(self.keys, part.needed)
        return over is not None

    def _arrive(self) -> Steps[None]:
        """Publish what this rank holds, then that it is here."""
        part = self.part
        digest, data = encode_table(part.shards, part.objects)
        (there,) = yield from get(table_key(digest))
        where = part.identity
        place = json.dumps([self.staging, where.destination, where.iteration, self.wall()]).encode()
        items = ((place_key(part.rank), place),)
        yield Put(items if there is not None else ((table_key(digest), data), *items))
        replicas = (*(shard.replica for shard in part.shards), *(record.replica for record in part.objects))
        arrival = Arrival(
            rank=part.rank,
            process=part.process,
            table=digest,
            replicas=replicas,
            agreement=part.agreement,
            validate=part.options.validate,
        )
        number = (yield from add(self.keys.arrivals, 1)) - 1
        yield Put(((self.keys.arrival(number), arrival.encode()),))
        self.number = number

    def _follow(self) -> Steps[bool]:
        """See what the coordinator says; stand in when it says nothing for too long. True when the save is over."""
        (value,) = yield from get(self.keys.lead)
        if value is None:
            yield from self._take_over()
            return False
        if value != self._seen:
            lead = self._notice(value)
            yield from self.catch_up(lead.announced)
            return lead.stage == "ended"
        silent_s = self.clock() - self._seen_at
        if silent_s > self.silence_s:
            yield from self._take_over()
        elif self._lead is not None and silent_s > self.silence_s / 4:
            yield from self._take_over_from_the_dead(self._lead)
        return False

    def _take_over_from_the_dead(self, lead: Lead) -> Steps[None]:
        if (yield from ask_dead([lead.process])):
            yield from self._take_over()

    def _notice(self, value: bytes) -> Lead:
        lead = Lead.decode(value)
        if self._lead is None or lead[:1] + lead[5:] != self._lead[:1] + self._lead[5:]:
            self.hurry()
        self._seen, self._seen_at, self._lead = value, self.clock(), lead
        return lead

    def _take_over(self) -> Steps[None]:
        """Try to become the coordinator; the register lets only one succeed."""
        known = self._lead
        mine = Lead(
            term=0 if known is None else known.term + 1,
            number=self.number,
            rank=self.part.rank,
            process=self.part.process,
            beat=0,
            announced=0 if known is None else known.announced,
            stage="open" if known is None else known.stage,
        )
        current = yield from swap(self.keys.lead, self._seen, mine.encode())
        if current == mine.encode():
            self._coordinator = Coordinator(self, mine)
        if current:
            self._notice(current)

    def catch_up(self, announced: int) -> Steps[None]:
        """Read the work that has been announced since the last time."""
        wanted = range(self._read, announced) if self.number >= 0 else ()
        found = yield from get(*(self.keys.work(entry, self.number) for entry in wanted))
        for entry, data in zip(wanted, found, strict=True):
            if data is not None:
                self.assign(entry, Work.decode(data))
        self._read = max(self._read, announced)

    def assign(self, entry: int, work: Work) -> None:
        """Queue work for this rank."""
        if entry not in self._assigned:
            self._assigned.add(entry)
            self._queue.append((entry, work))

    def _begin_write(self) -> Steps[None]:
        if self._writing is not None or not self._queue:
            return
        entry, work = self._queue.pop(0)
        shards = tuple(self.part.shards[place] for place in work.shards)
        objects = tuple(self.part.objects[place] for place in work.objects)
        num_bytes = sum(record.num_bytes for record in objects)
        for shard in shards:
            num_elements = 1
            for extent in shard.size:
                num_elements *= extent
            num_bytes += shard.dtype.num_bytes(num_elements)
        assignment = Assignment(
            staging=self.staging,
            first_file=entry * FILES_PER_ASSIGNMENT,
            shards=shards,
            objects=objects,
            num_bytes=num_bytes,
        )
        number = yield from self.start(Write(assignment))
        self._writes.append(number)
        self._writing = number, entry

    def _take(self, news: News) -> Steps[None]:
        """Deal with what happened in this process."""
        self.progress.update(news.progress)
        for done in news.done:
            self.hurry()
            if self._writing is not None and done.number == self._writing[0]:
                yield from self._tell(self._writing[1], done)
                self._writing = None
                yield from self._begin_write()
            elif self._coordinator is not None:
                self._coordinator.finished[done.number] = done

    def _tell(self, entry: int, done: Done) -> Steps[None]:
        """Publish how an assignment went."""
        problems: tuple[Problem, ...] = ()
        written = b""
        if done.result is not None:
            written = done.result.to_bytes()
        elif isinstance(done.error, Superseded):
            return
        elif done.error is not None:
            problems = rank_failed(self.part.rank, done.error, "write its shards")
        number = (yield from add(self.keys.results, 1)) - 1
        yield Put(((self.keys.result(number), Result(entry, self.number, problems, written).encode()),))

    def _show_life(self) -> Steps[None]:
        now = self.clock()
        if self.number < 0 or now - self._pulsed_at < self.silence_s / 4:
            return
        self._beat += 1
        self._pulsed_at = now
        yield Put(((self.keys.pulse(self.number), f"{self._beat}:{sum(self.progress.values())}".encode()),))

    def _conclude(self) -> Steps[SaveOutcome]:
        """Return or raise what was decided."""
        data, end = yield from get(self.keys.decision, self.keys.end)
        yield Cancel()
        decision = Decision.decode(data or b"")
        if decision.outcome is None:
            yield from self._abandon()
            raise error_of(decision.problems)
        problems = () if end is None else decode_end(end)
        if problems:
            raise error_of(unfinished(self.staging, problems))
        yield Put(((place_key(self.part.rank), b""),))  # after an error it stays, for those who missed this rank
        if self._prepared:  # perhaps so late that it made the directory anew after it was renamed
            yield from self._abandon()
        return replace(decision.outcome, wrote_bytes=sum(self.progress[each] for each in self._writes))

    def _abandon(self) -> Steps[None]:
        number = yield from self.start(Abandon(self.staging))
        until = self.clock() + min(_STOP_S, self.silence_s)
        while self.clock() < until:
            news = yield from sleep(until)
            if any(done.number == number for done in news.done):
                return


def _opened(register: bytes | None) -> tuple[str, float]:
    """The newest attempt, and when it was opened, in seconds since 1970."""
    staging, _, when = (register or b"").decode().partition(" ")
    return staging, float(when or 0.0)
