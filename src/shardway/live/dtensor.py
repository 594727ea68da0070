"""A live model of plain torch modules as shard records: FSDP2 (`fully_shard`), DTensor parallelism, or replicated.

Where a local tensor lies in the global one is worked out from the mesh's shape and this rank's coordinate alone.

Source: torch/distributed/tensor/placement_types.py `Shard`, `_StridedShard` (torch 2.6 to 2.13).
"""

from __future__ import annotations

import io
import math
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from shardway.core.dtypes import dtype_of_torch
from shardway.core.errors import Code, Problems, ShardwayError
from shardway.live.records import ObjectShard, Shard
from shardway.live.state import LiveState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn
    from torch.distributed.tensor.placement_types import Placement

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape


class Span(NamedTuple):
    """Consecutive indices of a global axis."""

    start: int
    size: int


def dtensor_state(model: nn.Module, *, rank: int, content_metadata: Mapping[str, object] | None = None) -> LiveState:
    """Everything that this rank holds of a plain torch model: its state dict's DTensors and tensors.

    Keys are the names in `model.state_dict()`. Tied parameters have several names there and are saved under each, as
    torch.distributed.checkpoint does. Parameters must be resharded, as they are outside of forward and backward.

    Replica numbers: plain tensors are held alike by every rank, as replica number `rank`. The copies of a DTensor
    are numbered by this rank's coordinate on the replicated axes of its mesh, from the lowest rank of the mesh on;
    thus ranks of different meshes (one for each pipeline or data-parallel replica) have different numbers too.

    Args:
        model: The model; its parameters may be on any device.
        rank: This process's rank in the job, 0 where there is only one.
        content_metadata: What to store in ``common.pt``.

    Returns:
        Records and the tensors behind them. A rank outside of a tensor's mesh, or whose part is empty, has no record
        of it. A part that is not contiguous in the global tensor becomes several records.

    Raises:
        ShardwayError: All problems together: `dtype-unknown`, `option-invalid` for partial DTensors (a pending sum),
            `shape-mismatch` when a local tensor is not as large as its placements say.

    *Ranks*: local; no collective is called.
    """
    problems = Problems()
    tensors: list[tuple[Shard, torch.Tensor]] = []
    objects: list[tuple[ObjectShard, bytes]] = []
    for key, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            tensors += _held(key, value, rank, problems)
        else:
            file = io.BytesIO()
            torch.save(value, file)
            data = file.getvalue()
            objects.append((ObjectShard(key, rank, len(data)), data))
    problems.raise_if_any()
    return LiveState.of(tensors, objects, content_metadata=content_metadata)


def _held(key: str, tensor: torch.Tensor, rank: int, problems: Problems) -> Iterator[tuple[Shard, torch.Tensor]]:
    try:
        dtype = dtype_of_torch(str(tensor.dtype))
    except ShardwayError as error:
        problems.add(Code.DTYPE_UNKNOWN, f"{key} has a dtype that can't be stored", tensor=key, facts=[str(error)])
        return
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        yield Shard(key, dtype, shape, (0,) * len(shape), shape, rank), tensor.detach()
        return
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return
    if any(placement.is_partial() for placement in tensor.placements):
        what = f"{key} is a partial DTensor: its value is a sum over ranks that has not been formed"
        problems.add(Code.OPTION_INVALID, what, tensor=key, cure="redistribute it before saving")
        return
    spans = local_spans(shape, tuple(mesh.shape), coordinate, tensor.placements)
    local = tensor.to_local().detach()
    size = tuple(sum(span.size for span in axis) for axis in spans)
    if tuple(local.shape) != size:
        problems.add(
            Code.SHAPE_MISMATCH,
            f"the local part of {key} is not as large as its placements say",
            tensor=key,
            facts=(
                f"global shape {list(shape)}, placements {tensor.placements}, mesh {tuple(mesh.shape)} at {coordinate}",
                f"expected a local shape of {list(size)}, got {list(local.shape)}",
            ),
        )
        return
    if not local.numel() and tensor.numel():
        return
    replica = int(mesh.mesh.min()) + _replica(tuple(mesh.shape), coordinate, tensor.placements)
    yield from _records(key, dtype, shape, spans, replica, local)


def _replica(mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]) -> int:
    """Number of this copy among those that the replicated axes of the mesh make."""
    number = 0
    for extent, place, placement in zip(mesh_shape, coordinate, placements, strict=True):
        if placement.is_replicate():
            number = number * extent + place
    return number


def _records(
    key: str, dtype: DType, shape: Shape, spans: Sequence[Sequence[Span]], replica: int, local: torch.Tensor
) -> Iterator[tuple[Shard, torch.Tensor]]:
    """One record for each box of consecutive indices."""
    cuts = []
    for axis in spans:
        at = 0
        pieces = []
        for span in axis:
            pieces.append((span, slice(at, at + span.size)))
            at += span.size
        cuts.append(pieces)
    for box in product(*cuts):
        start = tuple(span.start for span, _ in box)
        size = tuple(span.size for span, _ in box)
        yield Shard(key, dtype, shape, start, size, replica), local[tuple(part for _, part in box)]


def local_spans(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> list[list[Span]]:
    """Which indices of each axis of a global tensor are at one place of the mesh, in the order of the local tensor.

    Args:
        shape: Global shape.
        mesh_shape: Ranks along each axis of the mesh.
        coordinate: The place on the mesh.
        placements: One for each axis of the mesh; partial ones count as replicated.

    Returns:
        For each axis of the tensor its spans; a single one in all but strided cases.
    """
    spans = [[Span(0, extent)] for extent in shape]
    for dim in range(len(shape)):
        axes = [axis for axis, placement in enumerate(placements) if getattr(placement, "dim", None) == dim]
        factors = {axis: int(getattr(placements[axis], "split_factor", 1)) for axis in axes}
        order = _order(axes, factors, mesh_shape)
        if order is not None:
            for axis in order:
                spans[dim] = _chunk(spans[dim], mesh_shape[axis], coordinate[axis])
        else:
            for axis in axes:
                parts = [_chunk(spans[dim], factors[axis], part) for part in range(factors[axis])]
                spans[dim] = [span for part in parts for span in _chunk(part, mesh_shape[axis], coordinate[axis])]
        spans[dim] = _merged(spans[dim])
    return spans


def _order(axes: Sequence[int], factors: Mapping[int, int], mesh_shape: Sequence[int]) -> list[int] | None:
    """The order in which the axes of the mesh split one dim: a split factor counts the parts that are there already.

    `fully_shard` on top of tensor parallelism splits each tensor-parallel part, and notes their number. Where parts
    are uneven this is not what torch's own compute_local_shape_and_global_offset assumes (2.13: 13 rows on a mesh of
    3 x 2 put row 11 nowhere).

    Returns:
        None for factors that no order explains.
    """
    order: list[int] = []
    for axis in reversed(axes):
        counts = [math.prod(mesh_shape[other] for other in order[:place]) for place in range(len(order) + 1)]
        if factors[axis] not in counts:
            return None
        order.insert(counts.index(factors[axis]), axis)
    return order


def _chunk(spans: Sequence[Span], num_chunks: int, number: int) -> list[Span]:
    """The part that `torch.chunk` of the listed indices gives to one of `num_chunks`."""
    total = sum(span.size for span in spans)
    most = -(-total // num_chunks)
    low, high = min(number * most, total), min((number + 1) * most, total)
    found = []
    at = 0
    for span in spans:
        first, last = max(low, at), min(high, at + span.size)
        if first < last:
            found.append(Span(span.start + first - at, last - first))
        at += span.size
    return found


def _merged(spans: Sequence[Span]) -> list[Span]:
    """The same indices in as few spans as possible; an empty list becomes one empty span."""
    merged: list[Span] = []
    for span in spans:
        if merged and merged[-1].start + merged[-1].size == span.start:
            merged[-1] = Span(merged[-1].start, merged[-1].size + span.size)
        else:
            merged.append(span)
    return merged or [Span(0, 0)]
