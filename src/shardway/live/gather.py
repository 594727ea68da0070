"""A live model's weights as whole Hugging Face tensors, one after the other: for refitting an inference engine.

A tensor whose parts sit on several ranks is put together within the smallest model-parallel group that holds all of
them; nothing wider communicates, and every wait has a deadline.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import time
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from shardway.core.errors import Code, Problem, Problems, ShardwayError
from shardway.core.tiles import cover_fault
from shardway.live.memory import grid_of
from shardway.live.messages import decode_table, encode_table
from shardway.live.pieces import Mosaic, Values, indexed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from shardway.core.tensors import Shape
    from shardway.families.mapping import ModelMapping
    from shardway.live.pieces import Part
    from shardway.live.state import LiveState


class HFWeight(NamedTuple):
    """A whole Hugging Face tensor."""

    param_name: str
    weight: torch.Tensor


class Gathering(NamedTuple):
    """How a tensor is put together: what each rank of a group contributes, by rank in the group; none without one."""

    group: dist.ProcessGroup | None
    parts: tuple[tuple[Part, ...], ...]


def export_weights(
    state: LiveState,
    mapping: ModelMapping,
    groups: Sequence[dist.ProcessGroup],
    *,
    cpu: bool,
    timeout_s: float,
) -> Iterator[HFWeight]:
    """Yield every Hugging Face tensor of which this rank holds a part, whole, in the order of an export.

    At any time there is one whole tensor and one rank's part of it beside the model.

    Args:
        state: What this rank holds, its vocabulary without padding.
        mapping: The model's mapping.
        groups: Groups that parts of a tensor may be spread over, this rank in each; the smallest that holds a whole
            tensor is used.
        cpu: Yield tensors in host memory; otherwise where the parameters are.
        timeout_s: The most that any one wait may take.

    Raises:
        ShardwayError: `tensor-missing` for tensors that no group holds a whole of, all of them before the first is
            yielded; `gather-failed` when a rank does not take part in time.

    *Ranks*: all of a group have to go through to the end; those of different groups need not wait for each other.
    """
    mosaic = Mosaic(mapping)
    planned = _plan(state, mosaic, groups, timeout_s)
    values = Values(state, mapping.shifts)
    for name, shape in mapping.hf.items():
        gathering = planned.get(name)
        if gathering is None:
            continue
        if gathering.group is None:
            weight = _alone(shape, gathering.parts[0], values)
        else:
            weight = _together(name, shape, gathering, values, _device(state), timeout_s, cpu=cpu)
        yield HFWeight(name, weight.cpu() if cpu else weight)


def _plan(
    state: LiveState, mosaic: Mosaic, groups: Sequence[dist.ProcessGroup], timeout_s: float
) -> dict[str, Gathering]:
    """How each tensor is put together of which this rank holds a part, or its group does."""
    shapes = mosaic.mapping.hf
    mine = mosaic.parts_of(state.shards)
    found = {name: Gathering(None, (tuple(parts),)) for name, parts in mine.items() if _is_whole(shapes[name], parts)}
    waiting = set(mine) - set(found)
    ranks = [dist.get_process_group_ranks(group) for group in groups]
    message = json.dumps(ranks).encode() + b"\n" + encode_table(state.shards, ())[1]
    for group in groups:
        said = [each.partition(b"\n") for each in _exchange(group, message, state, timeout_s)]
        circle = _Circle(
            members=dist.get_process_group_ranks(group),
            groups=[json.loads(each) for each, _, _ in said],
            held=[mosaic.parts_of(decode_table(each).shards) for _, _, each in said],
        )
        for name in sorted({name for each in circle.held for name in each}):
            if not circle.is_settled(name, shapes[name]):
                chosen = _contributions([each.get(name, []) for each in circle.held])
                if _is_whole(shapes[name], [part for parts in chosen for part in parts]):
                    found[name] = Gathering(group, chosen)
                    waiting.discard(name)
    problems = Problems()
    for name in sorted(waiting):
        problems.add(
            Code.TENSOR_MISSING,
            f"no model-parallel group of this rank holds all of {name}",
            tensor=name,
            facts=(f"shape {list(shapes[name])}, {len(mine[name])} parts here",),
            cure="use export_hf_pieces, which needs no group, for models that are split otherwise",
        )
    problems.raise_if_any()
    return found


def _is_whole(shape: Shape, parts: Sequence[Part]) -> bool:
    if sum(part.tile.num_elements for part in parts) != math.prod(shape):
        return False
    return cover_fault(shape, [part.tile for part in parts], mcore=False) is None


class _Circle(NamedTuple):
    """What the ranks of a group know of each other.

    Attributes:
        members: Their ranks in the job.
        groups: For each of them the groups that it is in, by rank in the job, smallest first.
        held: For each of them the parts that it holds, by tensor.
    """

    members: list[int]
    groups: list[list[list[int]]]
    held: list[dict[str, list[Part]]]

    def is_settled(self, name: str, shape: Shape) -> bool:
        """Whether each of those who hold a part has all of the tensor, or gets it in a smaller group.

        The answer is the same on every rank of the group, so that all of them come to gather it or none.
        """
        holders = [place for place, held in enumerate(self.held) if name in held]
        return all(_is_whole(shape, self.held[place][name]) for place in holders) or all(
            any(self._is_whole_in(group, name, shape) for group in self.groups[place]) for place in holders
        )

    def _is_whole_in(self, group: list[int], name: str, shape: Shape) -> bool:
        """Whether a smaller group holds all of a tensor."""
        if len(group) >= len(self.members) or not set(group) <= set(self.members):
            return False
        inside = [self.held[self.members.index(rank)].get(name, []) for rank in group]
        return _is_whole(shape, [part for parts in _contributions(inside) for part in parts])


def _contributions(held: Sequence[Sequence[Part]]) -> tuple[tuple[Part, ...], ...]:
    """Give each part to the first rank that holds it."""
    taken: set[tuple[str, Shape, Shape]] = set()
    chosen = []
    for parts in held:
        own = [part for part in parts if (part.tile.mcore.tensor, part.tile.mcore.base, part.tile.sizes) not in taken]
        taken |= {(part.tile.mcore.tensor, part.tile.mcore.base, part.tile.sizes) for part in own}
        chosen.append(tuple(own))
    return tuple(chosen)


def _device(state: LiveState) -> torch.device:
    return next(iter(sorted(state.devices, key=str, reverse=True)), torch.device("cpu"))


def _alone(shape: Shape, parts: Sequence[Part], values: Values) -> torch.Tensor:
    """A tensor that this rank holds all of: the model's own memory where it lies there as a whole."""
    first = values.of(parts[0])
    if len(parts) == 1:
        found = list(indexed(parts[0].tile, first, len(shape)))
        if len(found) == 1:
            return found[0][1]
    whole = torch.empty(shape, dtype=first.dtype, device=first.device)
    for part in parts:
        _place(whole, part).copy_(values.of(part))
    return whole


def _together(
    name: str, shape: Shape, gathering: Gathering, values: Values, device: torch.device, timeout_s: float, *, cpu: bool
) -> torch.Tensor:
    """A tensor of which each rank of a group sends its part to the others, one after the other."""
    group = gathering.group
    if group is None:
        raise RuntimeError("a tensor that nobody is needed for")
    dtype: torch.dtype = next(getattr(torch, part.shard.dtype.name) for parts in gathering.parts for part in parts)
    whole = torch.empty(shape, dtype=dtype, device="cpu" if cpu else device)
    me = dist.get_rank(group)
    for sender, parts in enumerate(gathering.parts):
        if not parts:
            continue
        flat = torch.empty(sum(part.tile.num_elements for part in parts), dtype=dtype, device=device)
        grids = [
            chunk.view(part.tile.sizes)
            for part, chunk in zip(parts, torch.split(flat, [part.tile.num_elements for part in parts]), strict=True)
        ]
        if sender == me:
            for part, grid in zip(parts, grids, strict=True):
                grid.copy_(values.of(part))
        _broadcast(flat.view(torch.uint8), sender, group, timeout_s, f"{name} ")
        for part, grid in zip(parts, grids, strict=True):
            _place(whole, part).copy_(grid)
    return whole


def _place(whole: torch.Tensor, part: Part) -> torch.Tensor:
    return grid_of(whole, part.tile.sizes, part.tile.hf, (0,) * whole.dim())


def _exchange(group: dist.ProcessGroup, data: bytes, state: LiveState, timeout_s: float) -> list[bytes]:
    """What every rank of a group has to say, by rank in the group."""
    me, device = dist.get_rank(group), _device(state)
    said = []
    for sender in range(dist.get_world_size(group)):
        size = torch.tensor([len(data)], dtype=torch.int64, device=device)
        _broadcast(size, sender, group, timeout_s, "the size of a table ")
        if sender == me:
            text = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
        else:
            text = torch.empty(int(size), dtype=torch.uint8, device=device)
        _broadcast(text, sender, group, timeout_s, "a table ")
        said.append(text.cpu().numpy().tobytes())
    return said


def _broadcast(tensor: torch.Tensor, sender: int, group: dist.ProcessGroup, timeout_s: float, what: str) -> None:
    """Send from one rank of a group to the others, or raise when it takes too long."""
    rank = dist.get_global_rank(group, sender)
    began = time.monotonic()
    try:
        work = dist.broadcast(tensor, rank, group, async_op=True)
        if work is not None:
            work.wait(dt.timedelta(seconds=timeout_s))
    except RuntimeError as error:
        members = dist.get_process_group_ranks(group)
        raise ShardwayError(
            Problem(
                code=Code.GATHER_FAILED,
                what=f"rank {dist.get_rank()} did not get {what}from rank {rank}",
                facts=(
                    f"{type(error).__name__}: {str(error).splitlines()[0]}",
                    f"waited {time.monotonic() - began:.1f} s of {timeout_s:.3g} s, in the group of ranks {members}",
                ),
                cure="every rank of a model-parallel group has to go through the export to its end",
            )
        ) from error
