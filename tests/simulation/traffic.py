"""What a save of many ranks asks of the store and of its coordinator, counted in a simulated world."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from tests.simulation.scenario import Rank, Scenario
from tests.simulation.store import Store
from tests.simulation.world import Directory, Process, World

from shardway.core.dtypes import BFLOAT16
from shardway.live.records import ObjectShard, Shard
from shardway.live.saving import Needed, SaveOptions

if TYPE_CHECKING:
    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape
    from shardway.live.written import WriterResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Counts of one save.

    Attributes:
        num_ranks: Ranks that saved.
        num_tables: Distinct tables among them.
        num_shards: Shards in all tables, replicas counted once each.
        calls: Calls to the store, by kind.
        store_bytes: Bytes of values that passed through the store.
        most_calls: Calls of the rank that made most of them.
        median_calls: Calls of the rank in the middle.
        assembly_s: Processor seconds that the coordinator needed from its arrival until the work was shared.
        publishing_s: Processor seconds that it needed after that.
        waited_s: Simulated seconds from the first arrival until the last rank returned.
    """

    num_ranks: int
    num_tables: int
    num_shards: int
    calls: dict[str, int]
    store_bytes: int
    most_calls: int
    median_calls: int
    assembly_s: float
    publishing_s: float
    waited_s: float


class _Store(Store):
    """A store that sees when work is shared out."""

    work_is_shared = False

    def store(self, key: str, value: bytes) -> None:
        self.work_is_shared |= "/work/" in key
        super().store(key, value)


class _Counting(World):
    """A world that counts by rank, and takes the time that each rank computes."""

    def __init__(self, scenario: Scenario) -> None:
        self.sharing = _Store()
        super().__init__(scenario, self.sharing)
        self.seconds: defaultdict[int, float] = defaultdict(float)
        self.calls: Counter[int] = Counter()
        self.before_work: dict[int, float] = {}

    def _resume(self, process: Process, answer: object) -> None:
        calls = self.store.calls.total()
        began = time.perf_counter()
        super()._resume(process, answer)
        self.seconds[process.number] += time.perf_counter() - began
        self.calls[process.number] += self.store.calls.total() - calls
        if self.sharing.work_is_shared and not self.before_work:
            self.before_work = dict(self.seconds)

    def examine(self, directory: Directory, results: tuple[WriterResult, ...]) -> None:
        """Counting every element of a real model would take for ever."""


def simulate_assembly(
    num_ranks: int = 1024,
    *,
    tensor_parallel: int = 8,
    pipeline_parallel: int = 16,
    shards_per_rank: int = 300,
    write_s: float = 20.0,
    delay_s: float = 0.001,
    deadline_s: float = 600.0,
) -> Traffic:
    """Save a model of one table per (tensor, pipeline) position, replicated over the rest of the ranks.

    Args:
        num_ranks: A multiple of `tensor_parallel` times `pipeline_parallel`.
        tensor_parallel: Ranks that split each tensor.
        pipeline_parallel: Stages, each with tensors of its own.
        shards_per_rank: Tensors of a stage.
        write_s: Seconds that each rank writes.
        delay_s: At most how long the store takes for an answer.
        deadline_s: The deadline of the save.
    """
    group = tensor_parallel * pipeline_parallel
    tensors: dict[str, tuple[DType, Shape]] = {}
    ranks = []
    for rank in range(num_ranks):
        stage, part, replica = rank % group // tensor_parallel, rank % tensor_parallel, rank // group
        shards = []
        for number in range(shards_per_rank):
            key = f"decoder.layers.{stage * shards_per_rank // 7 + number // 7}.mlp.experts.{number % 7}.weight"
            shape = (1024 * tensor_parallel, 8192)
            tensors[key] = (BFLOAT16, shape)
            shards.append(Shard(key, BFLOAT16, shape, (1024 * part, 0), (1024, 8192), replica))
        objects = (ObjectShard(f"decoder.layers.{stage}._extra_state", replica * tensor_parallel + part, 100),)
        ranks.append(
            Rank(rank=rank, shards=tuple(shards), objects=objects, arrives_at=rank / num_ranks, write_s=write_s)
        )
    scenario = Scenario(
        seed=0,
        ranks=ranks,
        tensors=tensors,
        objects=frozenset(),
        needed=Needed(tensors=dict(tensors), participants=tuple(range(num_ranks))),
        options=SaveOptions(deadline_s=deadline_s),
        delay_s=delay_s,
    )
    world = _Counting(scenario)
    broken = world.run()
    if broken or len(world.published) != 1:
        raise AssertionError(broken)
    coordinator = max(world.seconds, key=world.seconds.__getitem__)
    assembly_s = world.before_work[coordinator]
    return Traffic(
        num_ranks=num_ranks,
        num_tables=group,
        num_shards=group * shards_per_rank,
        calls=dict(world.store.calls),
        store_bytes=world.store.num_bytes,
        most_calls=max(world.calls.values()),
        median_calls=sorted(world.calls.values())[num_ranks // 2],
        assembly_s=assembly_s,
        publishing_s=world.seconds[coordinator] - assembly_s,
        waited_s=world.now,
    )


if __name__ == "__main__":  # python -m tests.simulation.traffic, from the repository's root
    print(simulate_assembly())
