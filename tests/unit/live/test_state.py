"""Live states: nothing is held twice, nothing is copied before a snapshot, and a snapshot stays as it is."""

from __future__ import annotations

import pytest
import torch

from shardway.core.dtypes import dtype_of_torch
from shardway.core.errors import Code, ShardwayError
from shardway.live.records import ObjectShard, Shard
from shardway.live.state import LiveState


def shard_of(key: str, tensor: torch.Tensor, *, replica: int = 0, start: tuple[int, ...] | None = None) -> Shard:
    shape = tuple(tensor.shape)
    dtype = dtype_of_torch(str(tensor.dtype))
    return Shard(key, dtype, (100,) * len(shape), start or (0,) * len(shape), shape, replica)


def test_a_tensor_is_the_memory_of_the_model() -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
    shard = shard_of("w", weight)
    state = LiveState.of([(shard, weight)])
    tensor = state.tensor_of(shard)
    assert state.devices == {torch.device("cpu")}
    assert tensor.data_ptr() == weight.data_ptr()
    assert not tensor.requires_grad
    assert not tensor.is_contiguous()


def test_what_is_held_twice_is_kept_as_its_lowest_replica() -> None:
    one, two = torch.zeros(2), torch.ones(2)
    first, second = shard_of("w", one, replica=3), shard_of("w", two, replica=1)
    elsewhere = shard_of("w", one, replica=3, start=(4,))
    state = LiveState.of(
        [(first, one), (second, two), (elsewhere, one)],
        [(ObjectShard("o", 2, 1), b"2"), (ObjectShard("o", 1, 1), b"1"), (ObjectShard("o", 5, 1), b"5")],
    )
    assert state.shards == (second, elsewhere)
    assert torch.equal(state.tensor_of(second), two)
    assert state.objects == (ObjectShard("o", 1, 1),)
    assert state.object_bytes("o") == b"1"
    assert state.num_bytes == 16


def test_unknown_shards_and_objects_are_errors() -> None:
    weight = torch.zeros(2)
    state = LiveState.of([(shard_of("w", weight), weight)])
    with pytest.raises(ShardwayError) as caught:
        state.tensor_of(shard_of("w", weight, start=(1,)))
    assert caught.value.code is Code.TENSOR_MISSING
    with pytest.raises(ShardwayError) as caught:
        state.object_bytes("o")
    assert caught.value.code is Code.TENSOR_MISSING


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)])
def test_a_tensor_that_belies_its_record_is_an_error(tensor: torch.Tensor) -> None:
    shard = shard_of("w", torch.zeros(2))
    with pytest.raises(ShardwayError) as caught:
        LiveState.of([(shard, tensor)]).tensor_of(shard)
    assert caught.value.code is Code.SHAPE_MISMATCH
    assert "[2]" in str(caught.value)


def test_a_computed_tensor_is_computed_when_it_is_wanted() -> None:
    calls = []

    def compute() -> torch.Tensor:
        calls.append(1)
        return torch.full((2,), 7.0)

    shard = shard_of("w", torch.zeros(2))
    state = LiveState.of([(shard, compute)])
    assert not state.devices
    assert not calls
    assert state.tensor_of(shard).tolist() == [7, 7]
    copy = state.snapshot()
    assert len(calls) == 2
    copy.tensor_of(shard)
    assert len(calls) == 2


def test_a_snapshot_stays_as_it_is() -> None:
    weight = torch.arange(12.0, dtype=torch.bfloat16).reshape(3, 4).t()
    scalar = torch.tensor(5)
    shards = shard_of("w", weight), shard_of("s", scalar)
    state = LiveState.of(
        zip(shards, (weight, scalar), strict=True), [(ObjectShard("o", 0, 1), b"x")], content_metadata={"a": True}
    )
    expected = weight.clone()
    copy = state.snapshot()
    weight.zero_()
    scalar.zero_()
    assert torch.equal(copy.tensor_of(shards[0]), expected)
    assert copy.tensor_of(shards[0]).is_contiguous()
    assert copy.tensor_of(shards[1]).item() == 5
    assert copy.shards == state.shards
    assert copy.object_bytes("o") == b"x"
    assert copy.content_metadata == {"a": True}


def test_a_snapshot_can_use_the_memory_of_an_earlier_one() -> None:
    weight, other = torch.zeros(4), torch.zeros(2)
    shards = shard_of("w", weight), shard_of("o", other)
    first = LiveState.of([(shards[0], weight)]).snapshot()
    weight.fill_(3)
    second = LiveState.of([(shards[0], weight), (shards[1], other)]).snapshot(reuse=first)
    assert second.tensor_of(shards[0]).data_ptr() == first.tensor_of(shards[0]).data_ptr()
    assert second.tensor_of(shards[0]).tolist() == [3] * 4


def test_a_snapshot_never_writes_to_a_model() -> None:
    weight, model = torch.ones(4), torch.zeros(4)
    shard = shard_of("w", weight)
    LiveState.of([(shard, weight)]).snapshot(reuse=LiveState.of([(shard, model)]))
    assert model.tolist() == [0] * 4


def test_a_snapshot_of_another_dtype_gets_new_memory() -> None:
    weight = torch.ones(4)
    shard = shard_of("w", weight)
    old = LiveState.of([(shard, weight)]).snapshot()
    half = torch.full((4,), 2, dtype=torch.bfloat16)
    new = LiveState.of([(shard_of("w", half), half)]).snapshot(reuse=old)
    assert new.tensor_of(shard_of("w", half)).tolist() == [2] * 4
    assert old.tensor_of(shard).tolist() == [1] * 4


def test_padding_is_trimmed_on_every_rank() -> None:
    table = torch.arange(24.0).reshape(12, 2)
    wanted: list[float] = []
    for rank in range(4):
        part = table[3 * rank : 3 * rank + 3]
        shard = Shard("e", dtype_of_torch("float32"), (12, 2), (3 * rank, 0), (3, 2), 0)
        state = LiveState.of([(shard, part)], resizable=["e"]).trimmed({"e": (7, 2), "other": (1,)})
        for kept in state.shards:
            assert kept.global_shape == (7, 2)
            assert state.tensor_of(kept).data_ptr() == part.data_ptr()
            wanted += state.tensor_of(kept).flatten().tolist()
        assert len(state.shards) == (rank < 3)
    assert wanted == table[:7].flatten().tolist()


def test_only_padding_is_trimmed() -> None:
    tensor = torch.zeros(100, 100)
    shard = shard_of("e", tensor)
    fixed = LiveState.of([(shard, tensor)])
    assert fixed.trimmed({"e": (50, 100)}).shards == (shard,)
    padded = LiveState.of([(shard, tensor)], resizable=["e"])
    for shape in ((101, 100), (50, 99)):
        with pytest.raises(ShardwayError) as caught:
            padded.trimmed({"e": shape})
        assert caught.value.code is Code.SHAPE_MISMATCH
