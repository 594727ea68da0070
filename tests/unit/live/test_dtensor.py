"""Where a DTensor's local part lies, against what torch itself cuts off; and what is refused."""

from __future__ import annotations

import io
import math
from itertools import product
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

from shardway.core.boxes import Box, exact_cover
from shardway.core.errors import Code, ShardwayError
from shardway.live.dtensor import dtensor_state, local_spans

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement


def cut(
    indices: torch.Tensor, mesh: list[int], coordinate: tuple[int, ...], placements: list[Placement]
) -> torch.Tensor:
    """What torch gives to one place of the mesh."""
    for parts, place, placement in zip(mesh, coordinate, placements, strict=True):
        if isinstance(placement, Shard | _StridedShard):
            pieces, _ = placement._split_tensor(indices, parts, with_padding=False, contiguous=True)
            indices = pieces[place]
    return indices


@st.composite
def meshes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[int], list[Placement]]:
    """Any shape split by plain shards, or an even shape split by strided ones too."""
    mesh = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    strided = draw(st.booleans())
    factors = draw(st.lists(st.integers(1, 4), min_size=len(mesh), max_size=len(mesh)))
    unit = math.prod(mesh) * math.prod(factors) if strided else 1
    shape = tuple(
        unit * extent for extent in draw(st.lists(st.integers(0, 2 if strided else 9), min_size=1, max_size=2))
    )
    dims = st.integers(0, len(shape) - 1)
    placements: list[Placement] = []
    for factor in factors:
        kinds: list[Placement] = [Replicate(), Shard(draw(dims))]
        if strided:
            kinds.append(_StridedShard(draw(dims), split_factor=factor))
        placements.append(draw(st.sampled_from(kinds)))
    return shape, mesh, placements


@settings(deadline=None)
@given(meshes())
def test_spans_are_the_indices_that_torch_cuts_off(case: tuple[tuple[int, ...], list[int], list[Placement]]) -> None:
    shape, mesh, placements = case
    for coordinate in product(*map(range, mesh)):
        spans = local_spans(shape, mesh, coordinate, placements)
        for dim, axis in enumerate(spans):
            found = [index for span in axis for index in range(span.start, span.start + span.size)]
            # One dim at a time, as each placement concerns one alone.
            own = [
                Shard(0)
                if isinstance(p, Shard)
                else _StridedShard(0, split_factor=p.split_factor)
                if isinstance(p, _StridedShard)
                else p
                for p in placements
            ]
            own = [p if getattr(placements[k], "dim", None) == dim else Replicate() for k, p in enumerate(own)]
            assert found == cut(torch.arange(shape[dim]), mesh, coordinate, own).tolist()


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 8, 13, 167])
@pytest.mark.parametrize(("dp", "tp"), [(2, 2), (3, 2), (2, 4), (4, 3), (5, 8)])
def test_fully_shard_splits_what_tensor_parallelism_has_split(rows: int, dp: int, tp: int) -> None:
    placements = [_StridedShard(0, split_factor=tp), Shard(0)]
    boxes = []
    for coordinate in product(range(dp), range(tp)):
        (axis,) = local_spans((rows,), (dp, tp), coordinate, placements)
        (span,) = axis
        part = cut(torch.arange(rows), [tp, dp], (coordinate[1], coordinate[0]), [Shard(0), Shard(0)])
        assert list(range(span.start, span.start + span.size)) == part.tolist()
        boxes.append(Box((span.start,), (span.size,)))
    assert exact_cover((rows,), boxes) is None


def test_plain_tensors_are_held_by_every_rank() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(2, 2)
    second.bias = first.bias
    model = nn.Sequential(first, second)
    model.register_buffer("scale", torch.tensor(2.0))
    state = dtensor_state(model, rank=3, content_metadata={"a": 1})
    assert [shard.key for shard in state.shards] == ["scale", "0.weight", "0.bias", "1.weight", "1.bias"]
    assert {shard.replica for shard in state.shards} == {3}
    scale, weight, *_ = state.shards
    assert (scale.global_shape, scale.start, scale.size) == ((), (), ())
    assert (weight.global_shape, weight.start, weight.size) == ((2, 3), (0, 0), (2, 3))
    assert state.tensor_of(weight).data_ptr() == first.weight.data_ptr()
    assert state.content_metadata == {"a": 1}


def test_other_state_is_an_object() -> None:
    class Counting(nn.Module):
        def get_extra_state(self) -> dict[str, int]:
            return {"count": 3}

        def set_extra_state(self, state: object) -> None:
            raise NotImplementedError

    state = dtensor_state(nn.Sequential(Counting()), rank=0)
    (record,) = state.objects
    data = state.object_bytes("0._extra_state")
    assert (record.key, record.num_bytes) == ("0._extra_state", len(data))
    assert torch.load(io.BytesIO(data), weights_only=True) == {"count": 3}


def test_a_dtype_that_no_checkpoint_knows_is_refused() -> None:
    model = nn.Module()
    model.register_buffer("odd", torch.empty(2, dtype=torch.bits8))
    with pytest.raises(ShardwayError) as caught:
        dtensor_state(model, rank=0)
    assert caught.value.code is Code.DTYPE_UNKNOWN
    assert "odd" in str(caught.value)
