"""Which keys of a Megatron checkpoint belong to the model, and which to the training run."""

from __future__ import annotations

import pytest
from tests.tiny import ARCHITECTURES, Tiny

from shardway.families.config import HFConfig
from shardway.families.layout import Layout
from shardway.families.mapping import map_model
from shardway.plans.matching import is_training_state


@pytest.mark.parametrize(
    "key",
    [
        "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight",
        "optimizer.state.fp32_param.output_layer.weight",
        "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.bfloat16).bucket_idx_0.exp_avg",
        "optimizer.param_groups",
        "chained_0.optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight",
        "rng_state/shard_0_1",
        "rng_state/shard_0.0_1.4",
        "rerun_state_machine_state",
        "rerun_state_machine_state/shard_0_1",
        "opt_param_scheduler",
    ],
)
def test_training_state(key: str) -> None:
    assert is_training_state(key)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout", list(Layout))
def test_model_state(architecture: str, layout: Layout) -> None:
    mapping = map_model(HFConfig(Tiny(architecture=architecture, attention_bias=True, mlp_bias=True).config), layout)
    assert not [key for key in (*mapping.mcore, *mapping.extra_state) if is_training_state(key)]
