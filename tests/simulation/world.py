"""A world without time: ranks, a store and a disk, on one heap of events, for the very code that real ranks run.

A schedule follows from its seed alone. `run` returns what broke; the invariants are in `tests.simulation.judge`.
"""

from __future__ import annotations

import heapq
import random
import sys
from typing import TYPE_CHECKING, NamedTuple, cast

from tests.simulation.judge import check_published, judge
from tests.simulation.scenario import DEADLINE_S, Rank, Scenario, make
from tests.simulation.store import Store

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats.dcp import DcpLocation
from shardway.live import requests as ask
from shardway.live.protocol import Part, Participant
from shardway.live.saving import Superseded
from shardway.live.written import WriterResult, WrittenFile, WrittenObject, WrittenShard

if TYPE_CHECKING:
    from shardway.live.saving import Assignment, SaveOutcome

EPOCH = 1_700_000_000.0


class Directory:
    """A directory: files by name (what they hold, when complete), and metadata by tag."""

    def __init__(self) -> None:
        self.files: dict[str, Assignment | None] = {}
        self.metadata: dict[str, tuple[WriterResult, ...]] = {}


class Process:
    """A participant with its clock, its actions in progress, and its fate."""

    def __init__(self, world: World, rank: Rank, start: float, number: int) -> None:
        self.world = world
        self.rank = rank
        self.number = number
        self.offset = world.rng.uniform(0, 1e6)
        self.alive = True
        self.paused_until = 0.0
        self.started_at = start
        self.ended_at: float | None = None
        self.trouble = rank.trouble
        self.requests = 0
        self.counts: dict[str, int] = {}
        self.struck = False
        self.sleep = 0
        self.asleep = False
        self.run_number = 0
        self.cancelled = False
        self.progress: dict[int, int] = {}
        self.busy: set[tuple[int, int]] = set()
        self.done: list[ask.Done] = []
        self.outcomes: list[tuple[str, SaveOutcome | ShardwayError]] = []
        self.saves_left = rank.saves
        self.begin(None)

    def begin(self, taken: str | None) -> None:
        """Begin a save, perhaps one more."""
        world, rank = self.world, self.rank
        self.saves_left -= 1
        world.nonces += 1
        part = Part(
            rank=rank.rank,
            process=f"p{self.number}",
            born=EPOCH,
            nonce=f"n{world.nonces}",
            taken=taken,
            identity=rank.identity,
            shards=rank.shards,
            objects=rank.objects,
            needed=world.scenario.needed,
            agreement=rank.agreement,
            options=world.scenario.options,
        )
        self.participant = Participant(part, lambda: world.now + self.offset, lambda: EPOCH + world.now)
        self.steps = self.participant.run()
        self.began_save_at = world.now

    def strikes(self, moment: str) -> bool:
        """Whether this is the moment of this process' trouble; a pause or a crash has then begun."""
        trouble = self.trouble
        if trouble is None or trouble.moment != moment:
            return False
        trouble_count = self.counts[moment] = self.counts.get(moment, 0) + 1
        if trouble_count != trouble.count:
            return False
        if trouble.fault == "crash":
            self.world.crash(self)
        elif trouble.fault == "pause":
            self.paused_until = self.world.now + trouble.pause_s
        self.struck = True
        return True


class World:
    """Everything that happens in one schedule.

    Args:
        scenario: Who does what.
    """

    def __init__(self, scenario: Scenario, store: Store | None = None) -> None:
        self.scenario = scenario
        self.rng = random.Random(scenario.seed ^ 0x5EED)
        self.now = 0.0
        self.store = store or Store()
        self.staged: dict[str, Directory] = {}
        self.published: dict[str, tuple[Directory, str]] = {}
        self.broken: list[str] = []
        self.processes: list[Process] = []
        self.dead: set[str] = set()
        self.nonces = 0
        self._events: list[tuple[float, int, Process | None, str, object]] = []
        self._sequence = 0
        self.num_events = 0

    def run(self) -> list[str]:
        """Let everything happen; returns the invariants that were broken."""
        for rank in self.scenario.ranks:
            if rank.arrives_at is not None:
                self._at(rank.arrives_at, None, "arrive", rank)
        limit = 4 * DEADLINE_S + 2 * self.scenario.bound_s  # nobody comes later than that
        while self._events and not self.broken:
            self.now, _, process, kind, what = heapq.heappop(self._events)
            if self.now > limit:
                break
            self.num_events += 1
            if process is None:
                self._arrive(cast("Rank", what))
            elif not process.alive:
                continue
            elif process.paused_until > self.now:
                self._at(process.paused_until, process, kind, what)
            elif kind == "answer":
                self._resume(process, what)
            elif kind == "wake":
                if process.asleep and what == process.sleep:
                    self._wake(process)
            elif kind == "ask":
                self._at(self.now + self._delay(), process, "answer", self.store.call(cast("ask.Request", what)))
            else:
                self._act(process, kind, cast("_Step", what))
        judge(self)
        return self.broken

    def examine(self, directory: Directory, results: tuple[WriterResult, ...]) -> None:
        """Look at what is being published."""
        check_published(self, directory, results)

    def crash(self, process: Process) -> None:
        """A process dies; perhaps its rank comes back as another one."""
        process.alive = False
        if process.trouble is not None and process.trouble.known:
            self.dead.add(f"p{process.number}")
        if process.rank.restarts_after_s is not None:
            again = Rank(**{**vars(process.rank), "trouble": None, "restarts_after_s": None})
            self._at(self.now + process.rank.restarts_after_s, None, "arrive", again)

    def _at(self, when: float, process: Process | None, kind: str, what: object) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (when, self._sequence, process, kind, what))

    def _arrive(self, rank: Rank) -> None:
        process = Process(self, rank, self.now, len(self.processes))
        self.processes.append(process)
        self._resume(process, None)

    # The participant

    def _resume(self, process: Process, answer: object) -> None:
        """Let a participant run to its next request."""
        try:
            request = process.steps.send(answer)
        except StopIteration as end:
            self._end(process, end.value)
            return
        except ShardwayError as error:
            self._end(process, error)
            return
        except Exception as error:  # a bug: the driver would tell everybody
            self.broken.append(f"rank {process.rank.rank} broke down: {type(error).__name__}: {error}")
            raise
        trouble = process.trouble
        if trouble is not None and not process.struck:
            moment = _moment(request, trouble.moment)
            if moment is not None and process.strikes(moment) and trouble.fault == "crash":
                return
        self._answer(process, request)
        if trouble is not None and not process.struck and trouble.moment == "after":
            process.strikes("after")

    def _answer(self, process: Process, request: ask.Request) -> None:
        match request:
            case ask.Sleep(until):
                process.sleep += 1
                process.asleep = True
                when = self.now if process.done else max(self.now, until - process.offset)
                self._at(when, process, "wake", process.sleep)
                return
            case ask.Start(number, action):
                process.progress[number] = 0
                process.busy.add((process.run_number, number))
                self._at(self.now + self._delay(), process, "begin", _Step(process.run_number, number, action))
                answer: object = None
            case ask.Cancel():
                process.cancelled = True
                answer = None
            case ask.AskDead(processes):
                answer = self.dead.intersection(processes)
            case _:
                if self.scenario.store_dies_at is not None and self.now > self.scenario.store_dies_at:
                    problem = Problem(code=Code.STORE_FAILED, what="the store died")
                    self._at(self.now + self._delay(), process, "answer", None)
                    process.steps = _raising(ShardwayError(problem))
                    next(process.steps)
                    return
                if process.paused_until > self.now and self.rng.random() < 0.5:  # asked only after the pause
                    self._at(process.paused_until, process, "ask", request)
                    return
                answer = self.store.call(request)
                if self.store.broken:
                    self.broken += self.store.broken
        self._at(self.now + self._delay(), process, "answer", answer)

    def _delay(self) -> float:
        return self.rng.random() * self.scenario.delay_s

    def _wake(self, process: Process) -> None:
        process.asleep = False
        done, process.done = tuple(process.done), []
        self._resume(process, ask.News(dict(process.progress), done))

    def _end(self, process: Process, how: SaveOutcome | ShardwayError) -> None:
        process.outcomes.append((process.participant.staging, how))
        process.ended_at = self.now
        took = self.now - process.began_save_at
        bound = self.scenario.bound_s
        if took > bound:
            self.broken.append(f"rank {process.rank.rank} ended after {took:.1f} s; the bound is {bound:.1f} s")
        if process.saves_left:
            process.done, process.cancelled, process.progress = [], False, {}
            process.begin(process.participant.staging)
            process.run_number += 1
            self._resume(process, None)

    # The disk

    def _act(self, process: Process, kind: str, step: _Step) -> None:
        """A step of an action of a process."""
        action = step.action
        trouble = process.trouble
        if kind == "begin" and trouble is not None and not process.struck and process.strikes(type(action).__name__):
            if self._obeys(process, step):
                return
            if process.paused_until > self.now:
                self._at(process.paused_until, process, kind, step)
                return
        if isinstance(action, ask.Write):
            self._write(process, kind, step, action.assignment)
        elif kind == "begin" and not isinstance(action, ask.Abandon):
            if step.run == process.run_number:
                process.progress[step.number] += 1
            self._at(self.now + self._delay() + 0.01 + process.rank.small_s, process, "go on", step)
        elif (
            isinstance(action, ask.Abandon) and len(process.busy) > 1 and step.share < 1
        ):  # when the others have stopped
            self._at(self.now + 0.1, process, "begin", step._replace(share=step.share + 0.02))
        else:
            self._done(process, step, None, self._small(action))

    def _obeys(self, process: Process, step: _Step) -> bool:
        """Whether trouble has settled the action."""
        fault = process.trouble.fault if process.trouble else "none"
        if fault == "fail":
            name = type(step.action).__name__
            self._done(process, step, None, OSError(28, "No space left on device", f"/ckpt/{name}"))
        return fault in ("crash", "stall", "fail")

    def _done(self, process: Process, step: _Step, result: WriterResult | None, error: BaseException | None) -> None:
        process.busy.discard((step.run, step.number))
        if step.run == process.run_number:
            process.done.append(ask.Done(step.number, result, error))
            if process.asleep:
                self._at(self.now, process, "wake", process.sleep)

    def _write(self, process: Process, kind: str, step: _Step, assignment: Assignment) -> None:
        name = f"__{process.rank.rank}_{assignment.first_file}.distcp"
        if kind == "begin":
            directory = self.staged.get(assignment.staging)
            if directory is None:
                self._done(process, step, None, FileNotFoundError(2, "No such file or directory", name))
                return
            if name in directory.files:
                self.broken.append(f"{name} is written by two")
            directory.files[name] = None
            self._at(self.now, process, "writing", step._replace(directory=directory))
            return
        if step.directory is None:
            raise AssertionError
        if (process.cancelled or step.run != process.run_number) and step.share < 1:
            self._done(process, step, None, Superseded())
            return
        if step.share > 0 and process.trouble is not None and not process.struck and process.strikes("writing"):
            if self._obeys(process, step):
                return
            if process.paused_until > self.now:
                self._at(process.paused_until, process, kind, step)
                return
        if step.run == process.run_number:
            process.progress[step.number] = int(step.share * (assignment.num_bytes + 1) * 1000)
        if step.share < 1:
            part = 0.25 if process.rank.write_s < DEADLINE_S else 0.05
            more = step._replace(share=min(1.0, step.share + part))
            self._at(self.now + process.rank.write_s * part, process, "writing", more)
            return
        step.directory.files[name] = assignment
        result = WriterResult(
            rank=process.rank.rank,
            files=(WrittenFile(name, assignment.num_bytes, ""),),
            shards=tuple(WrittenShard(shard, DcpLocation(name, 0, 1), "") for shard in assignment.shards),
            objects=tuple(WrittenObject(record.key, DcpLocation(name, 0, 1)) for record in assignment.objects),
        )
        self._done(process, step, result, None)

    def _small(self, action: ask.Action) -> BaseException | None:
        """The actions that only touch the directory."""
        match action:
            case ask.Prepare(staging):
                self.staged.setdefault(staging, Directory())
            case ask.Publish(staging, tag, results):
                if staging not in self.staged:
                    return FileNotFoundError(2, "No such file or directory", staging)
                self.staged[staging].metadata[tag] = tuple(results)
            case ask.Finish(staging, tag):
                directory = self.staged.get(staging)
                if directory is not None and tag in directory.metadata:
                    if staging in self.published:
                        self.broken.append(f"{staging} was published twice")
                    self.published[staging] = directory, tag
                    del self.staged[staging]
                    self.examine(directory, directory.metadata[tag])
                elif self.published.get(staging, (None, ""))[1] != tag:
                    return FileNotFoundError(2, "No such file or directory", staging)
            case ask.Abandon(staging):
                self.staged.pop(staging, None)
            case _:
                raise TypeError(action)
        return None


class _Step(NamedTuple):
    """Where an action has got to: by which of the process' saves it was begun, and what share of it is done."""

    run: int
    number: int
    action: ask.Action
    share: float = 0.0
    directory: Directory | None = None


def _moment(request: ask.Request, wanted: str) -> str | None:
    """The moment that a request is, for a trouble that waits for `wanted`."""
    if wanted == "request":
        return wanted
    if isinstance(request, ask.Swap | ask.Put):
        key = request.key if isinstance(request, ask.Swap) else request.items[0][0]
        part = {"decision": "/decision", "end": "/end", "ledger": "/ledger/", "lead": "/lead"}.get(wanted)
        if part is not None and part in key:
            return wanted
    return None


def _raising(error: ShardwayError) -> ask.Steps[SaveOutcome]:
    yield ask.Sleep(0.0)
    raise error


def run(seed: int, num_ranks: int | None = None) -> list[str]:
    """Run the schedule of a seed; returns the invariants that it broke."""
    return World(make(seed, num_ranks)).run()


def main(seed: int, num_ranks: int | None = None) -> None:
    """Run one schedule and say what happened."""
    scenario = make(seed, num_ranks)
    world = World(scenario)
    for rank in scenario.ranks:
        print(f"rank {rank.rank} comes at {rank.arrives_at}, writes for {rank.write_s:.2f} s, saves {rank.identity}")
        print(f"  {rank.trouble}, restarts after {rank.restarts_after_s}")
        print(f"  holds {[shard[:1] + shard[3:] for shard in rank.shards]}")
    print(f"{scenario.options}, participants {scenario.needed.participants}, delays up to {scenario.delay_s} s")
    print(f"must succeed: {scenario.must_succeed()}, bound {scenario.bound_s:.1f} s")
    print(f"the store dies at {scenario.store_dies_at}")
    broken = world.run()
    for process in world.processes:
        state = f"ended at {process.ended_at}" if process.alive else "crashed"
        print(f"rank {process.rank.rank} came at {process.started_at:.3f}, {state}")
        for staging, how in process.outcomes:
            print(f"  {staging}: {how}")
    print("broken:", *(broken or ["nothing"]), sep="\n  ")


if __name__ == "__main__":  # python -m tests.simulation.world SEED [RANKS], from the repository's root
    main(*map(int, sys.argv[1:]))
