"""gpt-oss in its two orientations, which shapes alone don't tell apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from tests.property.tilings import indices

from shardway.families.config import HFConfig
from shardway.families.mapping import map_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.tiny import Array

    from shardway.families.mapping import ModelMapping

EXPERTS, WIDTH = 3, 6
VALUES: dict[str, object] = {
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 5,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 131072,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"],
    "swiglu_limit": 7.0,
}
# As transformers 4 and the released models have it.
CONFIG = HFConfig(
    VALUES
    | {
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    }
)


def carried(mapping: ModelMapping, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """What becomes of some Hugging Face tensors on the Megatron side; -1 where others go."""
    made: dict[str, Array] = {}
    for tile in mapping.tiles:
        if tile.hf.tensor in arrays:
            assert arrays[tile.hf.tensor].shape == mapping.hf[tile.hf.tensor]
            array = made.setdefault(tile.mcore.tensor, np.full(mapping.mcore[tile.mcore.tensor], -1))
            theirs, ours = indices(tile, mcore=False), indices(tile, mcore=True)
            array[tuple(ours.T)] = arrays[tile.hf.tensor][tuple(theirs.T)]
    return made


def test_columns_of_gate_and_up_take_turns_and_experts_are_turned_round() -> None:
    at = "model.layers.1.mlp.experts"
    numbers = iter(range(0, 10**6, 1000))

    def numbered(*shape: int) -> Array:
        return np.arange(math.prod(shape)).reshape(shape) + next(numbers)

    first, second = numbered(EXPERTS, WIDTH, 2 * WIDTH), numbered(EXPERTS, WIDTH, WIDTH)
    bias = numbered(EXPERTS, 2 * WIDTH)
    tensors = {
        f"{at}.gate_up_proj": first,
        f"{at}.down_proj": second,
        f"{at}.gate_up_proj_bias": bias,
        f"{at}.down_proj_bias": numbered(EXPERTS, WIDTH),
    }
    found = carried(map_model(CONFIG), tensors)
    key = "decoder.layers.mlp.experts.experts"
    turned = first.transpose(0, 2, 1)
    fc1 = np.concatenate([turned[:, 0::2], turned[:, 1::2]], axis=1)
    assert (found[f"{key}.linear_fc1.weight"][1] == fc1).all()
    assert (found[f"{key}.linear_fc2.weight"][1] == second.transpose(0, 2, 1)).all()
    assert (found[f"{key}.linear_fc1.bias"][1] == np.concatenate([bias[:, 0::2], bias[:, 1::2]], axis=1)).all()


def test_both_spellings_of_the_config_say_the_same() -> None:
    rope = dict(CONFIG.values["rope_scaling"]) | {"rope_theta": 150000}  # type: ignore[call-overload]
    fields = map_model(HFConfig(VALUES | {"rope_parameters": rope})).megatron_config
    assert fields == map_model(CONFIG).megatron_config
    expected = {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": 32.0,
        "yarn_correction_range_round_to_int": False,
        "window_size": [127, 0],
        "window_attn_skip_freq": 2,
        "add_qkv_bias": True,
        "add_bias_linear": True,
        "softmax_type": "learnable",
        "activation_func_clamp_value": 7.0,
        "moe_ffn_hidden_size": WIDTH,
    }
    assert {name: fields[name] for name in expected} == expected
