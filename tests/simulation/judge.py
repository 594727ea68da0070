"""The invariants: what may be published, and what must hold when everything has happened."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from shardway.core.errors import Code, ShardwayError

if TYPE_CHECKING:
    from tests.simulation.scenario import Scenario
    from tests.simulation.world import Directory, World

    from shardway.core.tensors import Shape
    from shardway.live.records import Shard
    from shardway.live.written import WriterResult


def check_published(world: World, directory: Directory, results: tuple[WriterResult, ...]) -> None:
    """Count every element of every tensor, one by one."""
    scenario = world.scenario
    counts: dict[str, Counter[Shape]] = {key: Counter() for key in scenario.tensors}
    objects: Counter[str] = Counter()
    for result in results:
        held = {(shard.key, shard.start, shard.size) for shard in scenario.ranks[result.rank].shards}
        for file in result.files:
            assignment = directory.files.get(file.name)
            if assignment is None:
                world.broken.append(f"{file.name} was published, but is not complete")
                return
            if tuple(each.shard for each in result.shards) != assignment.shards:
                world.broken.append(f"{file.name} holds something else than the metadata says")
        for each in result.shards:
            shard = each.shard
            if (shard.key, shard.start, shard.size) not in held:
                world.broken.append(f"rank {result.rank} wrote {shard}, which it doesn't hold")
            if shard.key in counts and (shard.dtype, shard.global_shape) == scenario.tensors[shard.key]:
                counts[shard.key].update(_indices(shard))
        objects.update(each.key for each in result.objects)
    if _odd_alone(world.scenario, results):
        return
    wanted = scenario.tensors
    if scenario.needed.tensors is None:  # then only the participants know
        keys = {
            shard.key
            for rank in scenario.ranks
            if rank.rank in (scenario.needed.participants or ())
            for shard in rank.shards
        }
        wanted = {key: wanted[key] for key in wanted if key in keys}
    for key, (_, shape) in wanted.items():
        if len(counts[key]) != math.prod(shape) or any(times != 1 for times in counts[key].values()):
            world.broken.append(f"{key} {shape} was published with {dict(counts[key])}")
    if any(times != 1 for times in objects.values()) or scenario.needed.objects - objects.keys():
        world.broken.append(f"objects were published {dict(objects)}")


def _odd_alone(scenario: Scenario, results: tuple[WriterResult, ...]) -> bool:
    """Whether only one rank of another opinion took part: then its opinion is the truth."""
    return len({result.rank for result in results}) == 1 and scenario.needed.tensors is None


def judge(world: World) -> None:
    """Check what must hold when everything has happened."""
    by_attempt: dict[str, set[str]] = {}
    for process in world.processes:
        if process.alive and (not process.outcomes or process.saves_left):
            world.broken.append(f"rank {process.rank.rank} never ended")
        for staging, how in process.outcomes:
            if isinstance(how, ShardwayError):
                if how.code is Code.STORE_FAILED:
                    continue
                text = f"error {how.code}: {how}"
                if staging in world.published and "could not be put in place" not in text:
                    world.broken.append(f"published, but rank {process.rank.rank} raised {text}")
            else:
                text = f"outcome {how.staging} {how.arrived} {how.lost} {how.coordinator} {how.num_bytes}"
                if staging not in world.published:
                    world.broken.append(f"not published, but rank {process.rank.rank} returned {text}")
            by_attempt.setdefault(staging, set()).add(text)
    for staging, hows in by_attempt.items():
        if len(hows) > 1:
            world.broken.append(f"ranks disagree about the outcome of {staging}: {sorted(hows)}")
    if world.scenario.must_succeed() and not world.published:
        world.broken.append(f"every shard had a live holder, but the save ended with {by_attempt}")
    everybody_fine = all(rank.trouble is None for rank in world.scenario.ranks)
    if everybody_fine and world.scenario.store_dies_at is None and world.staged:
        world.broken.append(f"left behind: {list(world.staged)}")


def _indices(shard: Shard) -> list[Shape]:
    found: list[Shape] = [()]
    for start, size in zip(shard.start, shard.size, strict=True):
        found = [(*index, at) for index in found for at in range(start, start + size)]
    return found
