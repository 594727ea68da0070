"""Configs worked out from Megatron's, where what Megatron says is damaged or someone else's: refused, never a crash."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shardway.families.config import HFConfig
from shardway.families.mapping import map_model
from shardway.families.restore import restore_config

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
}
BLOCKS = [
    {"attention": {"n_heads_in_group": 2}, "ffn": {"intermediate_size": 24}},
    {"attention": {"no_op": True}, "ffn": {"intermediate_size": 8}},
]
DECILM = SMALL | {"architectures": ["DeciLMForCausalLM"], "block_configs": BLOCKS}
GEMMA3 = SMALL | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": 256,
    "sliding_window": 8,
}
EXAONE4 = SMALL | {
    "architectures": ["Exaone4ForCausalLM"],
    "rope_theta": 1e6,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 8.0,
        "original_max_position_embeddings": 4096,
    },
}


def restored(values: dict[str, Any], **changed: object) -> dict[str, Any] | None:
    mapping = map_model(HFConfig(values))
    fields = {**mapping.megatron_config, **changed}
    return restore_config(fields, mapping.mcore, mapping.provider.target, "bfloat16").config


@pytest.mark.parametrize("values", [DECILM, GEMMA3, EXAONE4])
def test_what_is_whole_comes_back(values: dict[str, Any]) -> None:
    config = restored(values)
    assert config is not None
    assert map_model(HFConfig(config)).mcore == map_model(HFConfig(values)).mcore
    assert {key: config[key] for key in values if key != "rope_scaling"} == {
        key: value for key, value in values.items() if key != "rope_scaling"
    }
    assert config.get("rope_scaling") == values.get("rope_scaling")


@pytest.mark.parametrize(
    "encoded",
    [
        "{",
        "[]",
        "[" * 100_000,
        json.dumps(DECILM | {"block_configs": BLOCKS[::-1]}),
        json.dumps(DECILM | {"num_hidden_layers": 3}),
        json.dumps(DECILM | {"vocab_size": "many"}),
        json.dumps(GEMMA3),
        None,
    ],
)
def test_blocks_that_are_not_the_models_are_refused(encoded: str | None) -> None:
    assert restored(DECILM, heterogeneous_layers_config_encoded_json=encoded) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"rotary_base": 10_000.0},
        {"rotary_base": []},
        {"interleaved_attn_pattern": [5, 2]},
        {"interleaved_attn_pattern": "FSSF"},
        {"softmax_scale": 1e-300},
        {"softmax_scale": float("nan")},
        {"softmax_scale": 0.06},
        {"window_size": [7, 0]},
    ],
)
def test_what_gemma_3_can_not_say_is_refused(changed: dict[str, object]) -> None:
    assert restored(GEMMA3, **changed) is None
