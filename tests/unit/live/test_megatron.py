"""What a sharded state dict becomes, item by item; tests/ranks has real models."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
import torch

from shardway.core.dtypes import BFLOAT16, FLOAT32
from shardway.core.errors import Code, ShardwayError
from shardway.formats.torch_dist import extra_state
from shardway.live.records import ObjectShard, Shard

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing import mapping

    from shardway.live import megatron
    from shardway.live.megatron import megatron_state
else:  # importorskip passes over what megatron-core warns of when it is imported
    mapping = pytest.importorskip("megatron.core.dist_checkpointing.mapping")
    megatron = pytest.importorskip("shardway.live.megatron")
    megatron_state = megatron.megatron_state


class Model(torch.nn.Module):
    """Answers with a given state dict, and remembers the metadata that it was asked with."""

    def __init__(self, described: dict[str, Any], config: object = None) -> None:
        super().__init__()
        self.described = described
        self.config = config
        self.asked: dict[str, Any] = {}

    def sharded_state_dict(self, *, metadata: dict[str, Any]) -> dict[str, Any]:
        self.asked = dict(metadata)
        metadata["dp_cp_group"] = object()
        return self.described


class Wrapper(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


class Config:
    def __init__(self, **fields: object) -> None:
        vars(self).update(fields)


def test_a_tensor_with_axes_in_front() -> None:
    weight = torch.nn.Parameter(torch.arange(6, dtype=torch.bfloat16).reshape(3, 2).t())
    described = mapping.ShardedTensor.from_rank_offsets(
        "w", weight, (0, 1, 4), (2, 1, 2), replica_id=(0, 1, 2), prepend_axis_num=1, allow_shape_mismatch=True
    )
    state = megatron_state(Wrapper(Wrapper(Model({"x": described}))))
    (shard,) = state.shards
    assert shard == Shard("w", BFLOAT16, (4, 2, 6), (1, 0, 3), (1, 2, 3), (1 << 20) + 2)
    tensor = state.tensor_of(shard)
    assert tensor.data_ptr() == weight.data_ptr()
    assert torch.equal(tensor[0], weight)
    assert state.resizable == {"w"}


def test_main_replicas_and_their_order() -> None:
    ids: list[Any] = [0, (0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 2, 3)]
    tensors = {
        str(k): mapping.ShardedTensor.from_rank_offsets(f"w{k}", torch.zeros(1), replica_id=one)
        for k, one in enumerate(ids)
    }
    replicas = [shard.replica for shard in megatron_state(Model(tensors)).shards]
    assert replicas[:2] == [0, 0]
    assert 0 < replicas[2] < replicas[3] < replicas[4] < replicas[5] < 2**63


def test_factories_become_what_they_build() -> None:
    weight = torch.arange(8.0).reshape(4, 2)

    def build(key: str, data: torch.Tensor, replica_id: Any, flattened_range: Any) -> dict[str, Any]:
        gate, up = data.chunk(2)
        return {
            "gate": mapping.ShardedTensor.from_rank_offsets(key, gate, (0, 0, 2), replica_id=replica_id),
            "nested": [
                mapping.ShardedTensorFactory(
                    key,
                    up,
                    lambda key, data, replica_id, _: mapping.ShardedTensor.from_rank_offsets(
                        key, data, (0, 1, 2), replica_id=replica_id
                    ),
                    lambda x: x,
                    replica_id,
                )
            ],
        }

    factory = mapping.ShardedTensorFactory("w", weight, build, lambda x: x, (0, 0, 0))
    state = megatron_state(Model({"fc1": factory}))
    assert state.shards == (
        Shard("w", FLOAT32, (4, 2), (0, 0), (2, 2), 0),
        Shard("w", FLOAT32, (4, 2), (2, 0), (2, 2), 0),
    )
    assert state.tensor_of(state.shards[1]).tolist() == weight[2:].tolist()


def test_objects_are_serialised_as_megatron_does() -> None:
    described = {
        "none": mapping.ShardedObject("a._extra_state", None, (32,), (3,), (0, 0, 1)),
        "some": mapping.ShardedObject("b._extra_state", torch.tensor([1, 2]), (2, 3), (1, 0)),
    }
    state = megatron_state(Model(described))
    assert state.object_bytes("a._extra_state/shard_3_32") == extra_state()
    data = state.object_bytes("b._extra_state/shard_1.0_2.3")
    (loaded,) = torch.load(io.BytesIO(data), weights_only=True)
    assert loaded.tolist() == [1, 2]
    assert state.objects == (
        ObjectShard("a._extra_state/shard_3_32", 1, len(extra_state())),
        ObjectShard("b._extra_state/shard_1.0_2.3", 0, len(data)),
    )


def test_what_is_no_shard_is_dropped_reported_or_refused() -> None:
    state = megatron_state(Model({"local": mapping.LocalNonpersistentObject(3), "count": 3, "list": [None, "x"]}))
    assert (state.shards, state.objects) == ((), ())
    assert state.left_out == ("model.count", "model.list.0", "model.list.1")
    with pytest.raises(ShardwayError) as caught:
        megatron_state([Model({}), Model({"a": torch.zeros(1), "b": {"c": torch.zeros(1)}})])
    assert [problem.tensor for problem in caught.value.problems] == ["model1.a", "model1.b.c"]
    assert caught.value.codes == {Code.TENSOR_UNEXPECTED}


def test_flattened_and_absent_tensors_are_refused() -> None:
    flat = mapping.ShardedTensor.from_rank_offsets("flat", torch.zeros(4))
    flat.flattened_range = slice(0, 2)
    absent = mapping.ShardedTensor.from_rank_offsets("absent", torch.zeros(4)).without_data()
    with pytest.raises(ShardwayError) as caught:
        megatron_state(Model({"a": flat, "b": absent}))
    assert [problem.tensor for problem in caught.value.problems] == ["flat", "absent"]


@pytest.mark.parametrize(
    ("config", "per_layer"),
    [
        (Config(moe_layer_freq=1, linear_attention_freq=None), False),
        (Config(moe_layer_freq=2), True),
        (Config(moe_layer_freq=[1, 1]), True),
        (Config(linear_attention_freq=4), True),
        (Config(linear_attention_freq=[0]), True),
        (Config(hetereogenous_dist_checkpoint=True), True),
        (Config(heterogeneous_block_specs=True), True),
        (None, False),
    ],
)
def test_content_metadata(config: object, per_layer: bool) -> None:
    model = Model({}, config)
    state = megatron_state(model, metadata={"mine": [1, "x"], "dp_cp_group": None})
    expected: dict[str, object] = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "mine": [1, "x"],
    }
    if per_layer:
        expected["non_homogeneous_layers"] = True
    assert state.content_metadata == expected
    assert model.asked == expected | {"dp_cp_group": None}


def test_metadata_that_cannot_be_stored_is_refused() -> None:
    with pytest.raises(ShardwayError) as caught:
        megatron_state(Model({}), metadata={"group": object()})
    assert caught.value.code is Code.OPTION_INVALID
    assert "group" in str(caught.value)


def test_a_module_that_megatron_did_not_make_is_refused() -> None:
    with pytest.raises(ShardwayError) as caught:
        megatron_state(Wrapper(torch.nn.Linear(1, 1)))
    assert "Linear" in str(caught.value)


def test_quantised_parameters_are_dequantised_when_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(2, 3)
    monkeypatch.setattr(megatron, "is_float8tensor", lambda tensor: tensor is weight)
    monkeypatch.setattr(megatron, "dequantize_fp8_tensor", lambda tensor: tensor + 5)
    described = mapping.ShardedTensor.from_rank_offsets("w", weight, (0, 1, 2), prepend_axis_num=1)
    state = megatron_state(Model({"w": described}))
    weight.fill_(1)
    assert state.tensor_of(state.shards[0]).tolist() == [[[6.0] * 3] * 2]


class Sharded(torch.Tensor):
    """As much of a DTensor as is looked at."""

    placements: tuple[Any, ...]
    device_mesh: Any


def test_dtensors_that_megatron_would_gather_are_refused() -> None:
    class Mesh:
        def size(self, _: int) -> int:
            return 4

    class Rows:
        dim = 0

    model = Model({})
    weight = torch.zeros(6, 2).as_subclass(Sharded)
    weight.placements, weight.device_mesh = (Rows(),), Mesh()
    model.register_buffer("odd", weight)
    with pytest.raises(ShardwayError) as caught:
        megatron_state(model)
    assert [problem.tensor for problem in caught.value.problems] == ["odd"]
    assert not model.asked


def test_memory_of_what_is_described_as_it_is() -> None:
    """Views of the model's own memory, and tied tensors twice: both have to be filled."""
    weight = torch.nn.Parameter(torch.zeros(4, 2))
    tied = torch.nn.Parameter(torch.zeros(4, 2))
    described = {
        "w": mapping.ShardedTensor.from_rank_offsets("w", weight, replica_id=0, allow_shape_mismatch=True),
        "tied": mapping.ShardedTensor.from_rank_offsets("w", tied, replica_id=(1, 0, 0), allow_shape_mismatch=True),
        "state": mapping.ShardedObject("m._extra_state", None, (1,), (0,)),
    }
    memory = megatron.megatron_memory(Model(described, Config(num_layers=7)))
    assert [target.shard.key for target in memory.targets] == ["w", "w"]
    assert [target.tensor.data_ptr() for target in memory.targets if target.tensor is not None] == [
        weight.data_ptr(),
        tied.data_ptr(),
    ]
    assert memory.resizable == {"w"}
    assert memory.num_layers == 7
    assert memory.num_bytes == 64


def test_a_factory_that_copies_is_written_back() -> None:
    """As megatron-core's grouped experts do it, whose matrices lie transposed."""
    weight = torch.nn.Parameter(torch.zeros(3, 4))

    def build(key: str, tensor: torch.Tensor, replica_id: Any, _: Any) -> Any:
        turned = tensor.t().contiguous()
        return [
            mapping.ShardedTensor.from_rank_offsets(key, part.contiguous(), (0, place, 2), replica_id=replica_id)
            for place, part in enumerate(torch.chunk(turned, 2))
        ]

    def merge(parts: Any) -> torch.Tensor:
        return torch.cat(parts).t()

    factory = mapping.ShardedTensorFactory("w", weight, build, merge, replica_id=0)
    memory = megatron.megatron_memory(Model({"w": factory}))
    assert [target.tensor for target in memory.targets] == [None, None]
    assert [target.part for target in memory.targets] == [0, 1]
    first, second = memory.targets
    assert first.deferred is second.deferred
    assert first.deferred is not None
    values = torch.arange(12.0).reshape(4, 3)
    first.deferred.store([values[:2], values[2:]])
    assert torch.equal(weight.detach(), values.t())


def test_extra_states_by_their_keys() -> None:
    class Module(torch.nn.Module):
        def set_extra_state(self, state: object) -> None:
            self.state = state

    model = Model({"deep.inner._extra_state": mapping.ShardedObject("decoder.inner._extra_state", None, (2,), (1,))})
    inner = Module()
    model.deep = torch.nn.Module()
    model.deep.inner = inner
    (key,) = (setters := megatron.extra_states(model))
    assert key == "decoder.inner._extra_state/shard_1_2"
    setters[key]("state")
    assert inner.state == "state"
