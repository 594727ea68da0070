"""Falcon-H1: the keys of a layer, which Megatron Bridge's own layers name, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from shardway.core.errors import ShardwayError
from shardway.families.config import HFConfig
from shardway.families.mapping import map_model

CONFIG: dict[str, Any] = {
    "architectures": ["FalconH1ForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "mamba_d_ssm": 12,
    "mamba_n_heads": 4,
    "mamba_n_groups": 1,
    "mamba_d_state": 5,
    "mamba_rms_norm": True,
}
# Source: an import by Megatron Bridge 0.7.0 of a tiny model; models/falcon_h1/modeling_falconh1 there.
LAYER = {
    "norm.weight": (8,),
    "mamba_mixer.A_log": (4,),
    "mamba_mixer.D": (4,),
    "mamba_mixer.dt_bias": (4,),
    "mamba_mixer.in_proj.weight.z": (12, 8),
    "mamba_mixer.in_proj.weight.x": (12, 8),
    "mamba_mixer.in_proj.weight.B": (5, 8),
    "mamba_mixer.in_proj.weight.C": (5, 8),
    "mamba_mixer.in_proj.weight.dt": (4, 8),
    "mamba_mixer.conv1d.weight.x": (12, 1, 4),
    "mamba_mixer.conv1d.weight.B": (5, 1, 4),
    "mamba_mixer.conv1d.weight.C": (5, 1, 4),
    "mamba_mixer.conv1d.bias.x": (12,),
    "mamba_mixer.conv1d.bias.B": (5,),
    "mamba_mixer.conv1d.bias.C": (5,),
    "mamba_mixer.norm.weight": (12,),
    "mamba_mixer.out_proj.weight": (8, 12),
    "self_attention.linear_qkv.weight": (16, 8),
    "self_attention.linear_proj.weight": (8, 8),
    "mlp.linear_fc1.layer_norm_weight": (8,),
    "mlp.linear_fc1.weight": (12, 8),
    "mlp.linear_fc2.weight": (8, 6),
}
STATES = {
    "norm",
    "mamba_mixer.in_proj",
    "mamba_mixer.out_proj",
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
}


def mapped(**changed: object) -> Any:
    return map_model(HFConfig({**CONFIG, **changed}))


def test_the_keys_of_a_layer() -> None:
    found = mapped()
    assert {key: shape for key, shape in found.mcore.items() if ".layers." not in key} == {
        "embedding.word_embeddings.weight": (16, 8),
        "decoder.final_norm.weight": (8,),
        "output_layer.weight": (16, 8),
    }
    for layer in (0, 1):
        at = f"decoder.layers.{layer}."
        assert {key.removeprefix(at): each for key, each in found.mcore.items() if key.startswith(at)} == LAYER
        states = {key for key in found.extra_state if key.startswith(at)}
        assert states == {f"{at}{module}._extra_state/shard_0_1" for module in STATES}
    assert {"decoder.final_norm._extra_state/shard_0_1", "output_layer._extra_state/shard_0_1"} <= set(
        found.extra_state
    )


def test_the_norm_inside_a_mixer_is_there_where_the_config_says_so() -> None:
    assert not [key for key in mapped(mamba_rms_norm=False).mcore if "mamba_mixer.norm" in key]


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"mamba_d_head": 4}, "mamba_d_head is 4; expected what 4 heads"),
        ({"mamba_d_ssm": 13}, "4 heads \\(mamba_n_heads\\) share 13 evenly"),
        ({"projectors_bias": True}, "projectors_bias is true"),
        ({"mamba_conv_bias": False}, "mamba_conv_bias is false"),
        ({"mamba_d_state": None}, "mamba_d_state is missing"),
    ],
)
def test_a_config_that_megatron_can_not_hold_is_refused(changed: dict[str, Any], what: str) -> None:
    with pytest.raises(ShardwayError, match=what) as caught:
        mapped(**changed)
    assert caught.value.codes == {"config-invalid"}


def test_multipliers_stay_in_the_config() -> None:
    found = mapped(key_multiplier=0.39, ssm_multipliers=[1.0, 0.5, 1.0, 1.0, 0.25], rope_theta=1e11).megatron_config
    assert (found["key_multiplier"], found["ssm_multipliers"]) == (0.39, [1.0, 0.5, 1.0, 1.0, 0.25])
    assert (found["mlp_multipliers"], found["rotary_base"]) == ([1.0, 1.0], 10**11)
