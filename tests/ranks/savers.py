"""Real processes that save together: a server that has imported torch once forks a world of ranks for each request.

As a script it reads one world a line and answers with how every rank ended; `Savers` is the side of the tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from shardway.core.dtypes import BFLOAT16
from shardway.core.errors import ShardwayError
from shardway.formats.dcp import DcpLocation
from shardway.live.records import ObjectShard, Shard
from shardway.live.rendezvous import StoreLike, save_together
from shardway.live.saving import Assignment, Needed, SaveIdentity, SaveOptions
from shardway.live.written import WriterResult, WrittenFile, WrittenObject, WrittenShard

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Report = Callable[[int], None]

LIMIT_S = 45.0
"""No world lasts longer; a rank that is left then has hung, and is killed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankPlan:
    """What one process does.

    Attributes:
        rank: Its number.
        part: Which half of every tensor it holds, or None for all of it.
        replica: Its replica number.
        after_s: When it calls save.
        path: Name of the checkpoint below the world's directory.
        config: Its configuration, for agreement.
        columns: Extent of the last axis.
        dies_in: The action in which it kills itself with SIGKILL.
        stops_in: The action in which it stops itself with SIGSTOP for `stop_s`.
        fails_in: The action in which the disk is full.
        tries: How often it calls save, if the first calls raise.
    """

    rank: int
    part: int | None = None
    replica: int = 0
    after_s: float = 0.0
    path: str = "ckpt"
    config: str = "a"
    columns: int = 4
    dies_in: str | None = None
    stops_in: str | None = None
    stop_s: float = 0.0
    fails_in: str | None = None
    tries: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldPlan:
    """A world: its ranks, how they meet, and the options of their save."""

    root: str
    ranks: tuple[RankPlan, ...]
    store: str = "file"
    store_dies_after_s: float | None = None
    write_s: float = 0.2
    expected: bool = True
    participants: tuple[int, ...] | None = None
    fully_parallel: bool = True
    validate: bool = True
    deadline_s: float = 3.0
    silence_s: float = 1.0
    grace_s: float = 0.3
    forbid_collectives: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """How a rank's call ended; `kind` is ``returned``, the error's class, or ``hung``."""

    rank: int
    kind: str
    took_s: float
    text: str = ""
    codes: tuple[str, ...] = ()
    staging: str = ""
    lost: tuple[int, ...] = ()
    wrote_bytes: int = 0


class DiskActions:
    """Small files in a directory that is renamed into place."""

    def __init__(self, plan: RankPlan, world: WorldPlan) -> None:
        self._plan = plan
        self._write_s = world.write_s
        self._destination = Path(world.root) / plan.path

    def _staged(self, staging: str) -> Path:
        return self._destination.parent / f".{self._destination.name}.{staging}"

    def _trouble(self, action: str) -> None:
        if self._plan.dies_in == action:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._plan.stops_in == action:
            waker = os.fork()
            if not waker:
                time.sleep(self._plan.stop_s)
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)
        if self._plan.fails_in == action:
            raise OSError(28, "No space left on device", str(self._destination / "disk"))

    def prepare(self, staging: str) -> None:
        self._trouble("prepare")
        self._staged(staging).mkdir(parents=True, exist_ok=True)

    def write(self, assignment: Assignment, report: Report) -> WriterResult:
        name = f"__{self._plan.rank}_{assignment.first_file}.distcp"
        shards, objects = [], []
        with (self._staged(assignment.staging) / name).open("xb") as file:
            for number, shard in enumerate(assignment.shards):
                if number == 1 or len(assignment.shards) == 1:
                    self._trouble("write")
                at = file.tell()
                data = json.dumps(shard[:1] + shard[2:5]).encode()
                file.write(data)
                file.flush()
                shards.append(WrittenShard(shard, DcpLocation(name, at, len(data)), ""))
                time.sleep(self._write_s / max(1, len(assignment.shards)))
                report(len(data))
            for record in assignment.objects:
                at = file.tell()
                file.write(b"object")
                objects.append(WrittenObject(record.key, DcpLocation(name, at, 6)))
            num_bytes = file.tell()
        return WriterResult(
            rank=self._plan.rank,
            files=(WrittenFile(name, num_bytes, ""),),
            shards=tuple(shards),
            objects=tuple(objects),
        )

    def publish(self, staging: str, tag: str, results: Sequence[WriterResult], report: Report) -> None:
        self._trouble("publish")
        listed = [[*shard.shard[:1], *shard.shard[2:5], *shard.location] for each in results for shard in each.shards]
        kept = [file.name for each in results for file in each.files]
        (self._staged(staging) / f"metadata.{tag}").write_text(json.dumps({"shards": listed, "files": kept}))
        report(1)

    def finish(self, staging: str, tag: str, report: Report) -> None:
        self._trouble("finish")
        staged = self._staged(staging)
        try:
            shutil.copyfile(staged / f"metadata.{tag}", staged / "metadata")
            staged.rename(self._destination)
        except FileNotFoundError:
            if not (self._destination / f"metadata.{tag}").exists():
                raise
        self._trouble("finished")

    def abandon(self, staging: str) -> None:
        shutil.rmtree(self._staged(staging), ignore_errors=True)


def shards_of(plan: RankPlan) -> tuple[Shard, ...]:
    """Six matrices of four rows, of which a rank holds all or a half."""
    shape = (4, plan.columns)
    start, rows = (0, 4) if plan.part is None else (plan.part * 2, 2)
    return tuple(
        Shard(f"layers.{number}.w", BFLOAT16, shape, (start, 0), (rows, plan.columns), plan.replica)
        for number in range(6)
    )


def _rank(plan: RankPlan, world: WorldPlan, store: StoreLike | None) -> list[Ending]:
    """Save, as often as the plan says."""
    tensors = {f"layers.{number}.w": (BFLOAT16, (4, 4)) for number in range(6)}
    endings = []
    for _ in range(plan.tries):
        began = time.monotonic()
        try:
            outcome = save_together(
                store=store,
                rank=plan.rank,
                identity=SaveIdentity(destination=str(Path(world.root) / plan.path), iteration=7),
                shards=shards_of(plan),
                objects=(ObjectShard("layers._extra_state/shard_0_1", plan.replica, 6),),
                needed=Needed(tensors=tensors if world.expected else None, participants=world.participants),
                agreement={"config": plan.config},
                options=SaveOptions(
                    fully_parallel=world.fully_parallel,
                    validate=world.validate,
                    deadline_s=world.deadline_s,
                    grace_s=world.grace_s,
                    silence_s=world.silence_s,
                ),
                actions=DiskActions(plan, world),
            )
            ending = Ending(
                rank=plan.rank,
                kind="returned",
                took_s=time.monotonic() - began,
                staging=outcome.staging,
                lost=outcome.lost,
                wrote_bytes=outcome.wrote_bytes,
            )
        except ShardwayError as error:
            ending = Ending(
                rank=plan.rank,
                kind=type(error).__name__,
                took_s=time.monotonic() - began,
                text=str(error),
                codes=tuple(problem.code for problem in error.problems),
            )
        endings.append(ending)
        if ending.kind == "returned":
            break
    return endings


# The server


def _serve() -> None:
    import torch.distributed as dist

    for line in sys.stdin:
        fields = json.loads(line)
        ranks = tuple(RankPlan(**each) for each in fields.pop("ranks"))
        fields["participants"] = fields["participants"] and tuple(fields["participants"])
        endings = _world(WorldPlan(**fields, ranks=ranks), dist)
        print(json.dumps([dataclasses.asdict(ending) for ending in endings]), flush=True)


def _world(world: WorldPlan, dist: Any) -> list[Ending]:
    """Fork the ranks, wait for them, and collect how they ended."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder)
        host = os.fork() if world.store == "tcp" else 0
        if world.store == "tcp" and not host:
            _as_child(lambda: _host(meeting, world, dist))
        children = {}
        for plan in world.ranks:
            child = os.fork()
            if not child:
                _as_child(lambda plan=plan: _child(plan, world, meeting, dist))  # type: ignore[misc]
            children[child] = plan
        endings = []
        for child, plan in children.items():
            while os.waitpid(child, os.WNOHANG)[0] == 0:
                if time.monotonic() - began > LIMIT_S:
                    endings.append(Ending(rank=plan.rank, kind="hung", took_s=LIMIT_S))
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    break
                time.sleep(0.01)
            result = meeting / f"ended-{plan.rank}"
            if result.exists():
                endings += [Ending(**each) for each in json.loads(result.read_text())]
        if host:
            with contextlib.suppress(ProcessLookupError):
                os.kill(host, signal.SIGKILL)
            os.waitpid(host, 0)
    return endings


def _as_child(run: Callable[[], None]) -> None:
    """Run in a forked process, which never comes back."""
    try:
        run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _host(meeting: Path, world: WorldPlan, dist: Any) -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, True)
    (meeting / "port.new").write_text(str(store.port))
    (meeting / "port.new").rename(meeting / "port")
    time.sleep(LIMIT_S if world.store_dies_after_s is None else world.store_dies_after_s)


def _child(plan: RankPlan, world: WorldPlan, meeting: Path, dist: Any) -> None:
    patience = dt.timedelta(seconds=LIMIT_S)
    if world.store == "tcp":
        while not (meeting / "port").exists():
            time.sleep(0.005)
        store = dist.TCPStore("127.0.0.1", int((meeting / "port").read_text()), None, False, patience)
    else:
        store = dist.FileStore(str(meeting / "store"), -1)
    if world.forbid_collectives:
        from tests.collectives import collectives_forbidden

        dist.init_process_group("gloo", store=store, rank=plan.rank, world_size=len(world.ranks))
        store = dist.distributed_c10d._get_default_store()
        with collectives_forbidden():
            endings = _rank(plan, world, store)
    else:
        time.sleep(plan.after_s)
        endings = _rank(plan, world, cast("StoreLike", dist.PrefixStore("job", store)))
    result = meeting / f"ended-{plan.rank}"
    result.with_suffix(".new").write_text(json.dumps([dataclasses.asdict(ending) for ending in endings]))
    result.with_suffix(".new").rename(result)


class Savers:
    """A server, to be used as a context."""

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.communicate()

    def run(self, world: WorldPlan) -> Mapping[int, list[Ending]]:
        """Let a world save; returns how each call of each rank ended, nothing for a rank that was killed."""
        if self._server.stdin is None or self._server.stdout is None:
            raise AssertionError
        self._server.stdin.write(json.dumps(dataclasses.asdict(world)) + "\n")
        self._server.stdin.flush()
        found: dict[int, list[Ending]] = {}
        for fields in json.loads(self._server.stdout.readline()):
            ending = Ending(**{**fields, "codes": tuple(fields["codes"]), "lost": tuple(fields["lost"])})
            found.setdefault(ending.rank, []).append(ending)
        return found


if __name__ == "__main__":
    _serve()
