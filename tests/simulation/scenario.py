"""Random schedules of a live save: who holds what, who comes when, and what goes wrong."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import TYPE_CHECKING, Literal

from shardway.core.dtypes import BFLOAT16, FLOAT32, DType
from shardway.live.records import ObjectShard, Shard
from shardway.live.saving import Needed, SaveIdentity, SaveOptions

if TYPE_CHECKING:
    from shardway.core.tensors import Shape

DEADLINE_S = 4.0
SILENCE_S = 1.6
IN_TIME_S = DEADLINE_S / 3

Fault = Literal["crash", "pause", "stall", "fail"]
Moment = Literal[
    "request", "after", "Prepare", "Write", "Publish", "Finish", "writing", "decision", "ledger", "end", "lead"
]


@dataclasses.dataclass(kw_only=True)
class Trouble:
    """What befalls a rank, when it does something for the `count`-th time."""

    fault: Fault
    moment: Moment
    count: int = 0
    pause_s: float = 0.0
    known: bool = False
    """Whether others on its machine can see that it is dead."""


@dataclasses.dataclass(kw_only=True)
class Rank:
    """One process: what it holds, when it comes, what goes wrong."""

    rank: int
    shards: tuple[Shard, ...]
    objects: tuple[ObjectShard, ...]
    arrives_at: float | None
    trouble: Trouble | None = None
    restarts_after_s: float | None = None
    agreement: dict[str, str] = dataclasses.field(default_factory=lambda: {"config": "a"})
    identity: SaveIdentity = dataclasses.field(default_factory=lambda: SaveIdentity(destination="/ckpt", iteration=7))
    saves: int = 1
    write_s: float = 1.0
    small_s: float = 0.0
    """How long preparing, publishing and finishing take."""

    @property
    def is_good(self) -> bool:
        """Comes in time and does its duty."""
        return self.arrives_at is not None and self.arrives_at <= IN_TIME_S and self.trouble is None


@dataclasses.dataclass(kw_only=True)
class Scenario:
    """A whole schedule; everything follows from its seed."""

    seed: int
    ranks: list[Rank]
    tensors: dict[str, tuple[DType, Shape]]
    objects: frozenset[str]
    needed: Needed
    options: SaveOptions
    delay_s: float
    store_dies_at: float | None = None

    @property
    def bound_s(self) -> float:
        """When every live rank must have ended, after it came."""
        faults = [rank.trouble for rank in self.ranks if rank.trouble is not None]
        pauses_s = sum(trouble.pause_s for trouble in faults if trouble.fault == "pause")
        work_s = max(rank.write_s for rank in self.ranks)
        return (4 + 2 * len(faults)) * DEADLINE_S + pauses_s + work_s + self.options.grace_s

    def must_succeed(self) -> bool:
        """Every shard keeps a live holder that arrives in time, and nothing but losses happens."""
        if self.store_dies_at is not None or self.delay_s > 0.02:
            return False
        if any(rank.trouble and rank.trouble.fault in ("fail", "stall") for rank in self.ranks):
            return False
        if len({rank.identity for rank in self.ranks}) > 1 or max(rank.saves for rank in self.ranks) > 1:
            return False
        if len({tuple(rank.agreement.items()) for rank in self.ranks}) > 1:
            return False
        if any(
            kind != self.tensors[each.key] for rank in self.ranks for each in rank.shards for kind in (_kind(each),)
        ):
            return False
        good = [rank for rank in self.ranks if rank.is_good]
        if self.needed.tensors is None and not set(self.needed.participants or ()) <= {rank.rank for rank in good}:
            return False
        boxes = {(shard.key, shard.start, shard.size) for rank in good for shard in rank.shards}
        elements: dict[str, int] = dict.fromkeys(self.tensors, 0)
        for key, _, size in boxes:
            elements[key] += math.prod(size)
        whole = all(elements[key] == math.prod(shape) for key, (_, shape) in self.tensors.items())
        objects = {record.key for rank in good for record in rank.objects}
        return whole and objects >= {record.key for rank in self.ranks for record in rank.objects}


def _kind(shard: Shard) -> tuple[DType, Shape]:
    return shard.dtype, shard.global_shape


def make(seed: int, num_ranks: int | None = None) -> Scenario:
    """The scenario of a seed."""
    rng = random.Random(seed)
    tensor_parallel = rng.choice((1, 1, 2, 2, 3))
    stages = rng.choice((1, 1, 1, 2))
    if num_ranks is None:
        num_ranks = rng.choice((2, 2, 3, 3, 4, 4, 5, 6, 8, 12))
    ranks, tensors = _model(rng, num_ranks, tensor_parallel, stages)
    objects = frozenset(record.key for rank in ranks for record in rank.objects)
    delay_s = rng.choice((0.001, 0.01, 0.02, 0.02, 0.2))
    _arrivals(rng, ranks)
    _troubles(rng, ranks)
    _disagreements(rng, ranks)
    if rng.random() < 0.08:
        for rank in ranks:
            rank.saves = 2
    world = tuple(range(num_ranks))
    how = rng.random()
    if how < 0.5:
        needed = Needed(tensors=dict(tensors), participants=rng.choice((None, world)))
    elif how < 0.7:
        needed = Needed(tensors=dict(tensors), objects=objects)
    else:
        chosen = tuple(rank.rank for rank in ranks if rank.arrives_at is not None)
        needed = Needed(participants=rng.choice((world, chosen, chosen)))
    return Scenario(
        seed=seed,
        ranks=ranks,
        tensors=tensors,
        objects=objects,
        needed=needed,
        options=SaveOptions(
            fully_parallel=rng.random() < 0.6,
            validate=rng.random() < 0.8,
            deadline_s=DEADLINE_S,
            grace_s=rng.choice((0.0, 0.2, 0.8)),
            silence_s=SILENCE_S,
        ),
        delay_s=delay_s,
        store_dies_at=rng.uniform(0, 3) if rng.random() < 0.02 else None,
    )


def _model(
    rng: random.Random, num_ranks: int, tensor_parallel: int, stages: int
) -> tuple[list[Rank], dict[str, tuple[DType, Shape]]]:
    """Ranks in a grid of tensor-parallel, pipeline and data-parallel positions; a few hold nothing."""
    tensors: dict[str, tuple[DType, Shape]] = {}
    for stage in range(stages):
        for number in range(rng.choice((1, 1, 2, 3))):
            rows = tensor_parallel * rng.randint(1, 3)
            tensors[f"layers.{stage}.w{number}"] = (rng.choice((BFLOAT16, FLOAT32)), (rows, rng.randint(1, 3)))
        if rng.random() < 0.4:
            tensors[f"layers.{stage}.norm"] = (BFLOAT16, (rng.randint(1, 4),))
    if rng.random() < 0.1:
        tensors["empty"] = (FLOAT32, (0, 3))
    group = tensor_parallel * stages
    idle = rng.random() < 0.3
    ranks = []
    for rank in range(num_ranks):
        place, replica = rank % group, rank // group
        stage, part = place // tensor_parallel, place % tensor_parallel
        shards, objects = [], []
        for key, (dtype, shape) in tensors.items():
            if key == "empty":
                shards.append(Shard(key, dtype, shape, (0, 0), shape, rank))
            elif key.startswith(f"layers.{stage}.w"):
                rows = shape[0] // tensor_parallel
                shards.append(Shard(key, dtype, shape, (part * rows, 0), (rows, shape[1]), replica))
            elif key.startswith(f"layers.{stage}."):
                shards.append(Shard(key, dtype, shape, (0,), shape, replica * tensor_parallel + part))
        objects.append(ObjectShard(f"layers.{stage}._extra_state", replica * tensor_parallel + part, 100))
        if idle and rank == num_ranks - 1 and rank >= group:
            shards, objects = [], []
        ranks.append(Rank(rank=rank, shards=tuple(shards), objects=tuple(objects), arrives_at=0.0))
    return ranks, tensors


def _arrivals(rng: random.Random, ranks: list[Rank]) -> None:
    spread = rng.choice((0.0, 0.01, 0.1, 1.0))
    for rank in ranks:
        rank.arrives_at = rng.uniform(0, spread)
        rank.write_s = rng.choice((0.0, 0.1, 0.5, 1.5)) * rng.random()
        if rng.random() < 0.05:
            rank.arrives_at = rng.uniform(0, 3 * DEADLINE_S)
        rank.small_s = rng.choice((0.0, 0.0, 0.3, 1.0)) * rng.random()
        if rng.random() < 0.05:
            rank.write_s = 2 * DEADLINE_S
    if rng.random() < 0.4:
        for rank in rng.sample(ranks, rng.randint(1, max(1, len(ranks) // 3))):
            rank.arrives_at = None
    if all(rank.arrives_at is None for rank in ranks):
        ranks[0].arrives_at = 0.0


def _troubles(rng: random.Random, ranks: list[Rank]) -> None:
    if rng.random() < 0.25:
        return
    moments: tuple[Moment, ...] = (
        *("request", "request", "after", "after", "Prepare", "Write", "Publish", "Finish", "writing", "writing"),
        *("decision", "ledger", "end", "lead"),
    )
    share = rng.choice((0.2, 0.5, 0.8))
    focus = rng.random() < 0.3  # one coordinator after the other is held up where it matters
    if focus:
        moments, share = ("decision", "decision", "ledger", "end", "lead", "Publish", "Finish", "Prepare"), 0.9
    for rank in ranks:
        if rng.random() > share:
            continue
        moment = rng.choice(moments)
        fault = rng.choice(("crash", "pause", "pause") if focus else ("crash", "crash", "pause"))
        chance = rng.random()
        if moment in ("Prepare", "Write", "Publish", "Finish", "writing") and chance < 0.15:
            fault = "fail" if chance < 0.1 else "stall"
        rank.trouble = Trouble(
            fault=fault,  # type: ignore[arg-type]
            moment=moment,
            count=rng.randint(1, rng.choice((4, 12, 40))) if moment in ("request", "after", "lead") else 1,
            pause_s=rng.choice((0.3, 1.0, 3.0)) * DEADLINE_S * rng.random() + (SILENCE_S if focus else 0.0),
            known=rng.random() < 0.3,
        )
        if fault == "crash" and rng.random() < 0.1:
            rank.restarts_after_s = rng.uniform(0, DEADLINE_S)


def _disagreements(rng: random.Random, ranks: list[Rank]) -> None:
    odd = rng.choice(ranks)
    chance = rng.random()
    if chance < 0.03:
        odd.agreement = {"config": "b"}
    elif chance < 0.06:
        odd.identity = SaveIdentity(destination="/elsewhere", iteration=7)
    elif chance < 0.09:
        odd.shards = tuple(
            shard._replace(global_shape=(*shard.global_shape[:-1], shard.global_shape[-1] + 1)) for shard in odd.shards
        )


def overlapping(seed: int) -> Scenario:
    """The first coordinator is held up just before it shares the work, and wakes up while the second one prepares."""
    rng = random.Random(seed)
    scenario = make(rng.randrange(1 << 30), num_ranks=rng.randint(3, 5))
    tensors: dict[str, tuple[DType, Shape]] = {"w": (BFLOAT16, (4, 2))}
    shards = (Shard("w", BFLOAT16, (4, 2), (0, 0), (4, 2), 0),)
    ranks = [
        Rank(rank=each.rank, shards=shards, objects=(), arrives_at=0.1 * (each.rank > 0), small_s=0.6, write_s=0.1)
        for each in scenario.ranks
    ]
    pause_s = SILENCE_S + rng.uniform(0.0, 1.0)
    ranks[0].trouble = Trouble(fault="pause", moment="ledger", count=1, pause_s=pause_s)
    return dataclasses.replace(
        scenario,
        ranks=ranks,
        tensors=tensors,
        objects=frozenset(),
        needed=Needed(tensors=dict(tensors)),
        delay_s=0.01,
        store_dies_at=None,
    )
