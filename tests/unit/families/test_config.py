"""Reading config.json, and what it becomes on the Megatron side."""

from __future__ import annotations

from typing import Any

import pytest
from tests.tiny import ARCHITECTURES, Tiny

from shardway.core.errors import ShardwayError
from shardway.families.config import HFConfig
from shardway.families.mapping import map_model
from shardway.families.registry import _FAMILIES, families, family_of


def translated(tiny: Tiny, **values: object) -> dict[str, Any]:
    config = HFConfig(tiny.config | values)
    return dict(map_model(config).megatron_config)


def test_dimensions() -> None:
    fields = translated(Tiny(layers=3, hidden=8, heads=6, groups=2, head_dim=5, ffn=7, vocab=11))
    assert fields == fields | {
        "num_layers": 3,
        "hidden_size": 8,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 5,
        "ffn_hidden_size": 7,
        "vocab_size": 11,
        "share_embeddings_and_output_weights": False,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "position_embedding_type": "rope",
        "hidden_dropout": 0.0,
        "rotary_base": 10000.0,
        "rotary_percent": 1.0,
    }


@pytest.mark.parametrize(
    ("architecture", "values", "expected"),
    [
        ("LlamaForCausalLM", {}, {"add_qkv_bias": False, "add_bias_linear": False}),
        ("LlamaForCausalLM", {"attention_bias": True}, {"add_qkv_bias": True}),
        ("LlamaForCausalLM", {"mlp_bias": True}, {"add_bias_linear": True}),
        ("MistralForCausalLM", {"sliding_window": 4096}, {"window_size": [4095, 0], "add_qkv_bias": False}),
        ("Qwen2ForCausalLM", {}, {"add_qkv_bias": True, "add_bias_linear": False}),
        ("Qwen3ForCausalLM", {}, {"qk_layernorm": True, "add_qkv_bias": False}),
    ],
)
def test_what_families_differ_in(architecture: str, values: dict[str, object], expected: dict[str, object]) -> None:
    fields = translated(Tiny(architecture=architecture), **values)
    assert fields == fields | expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rope_theta": 5e5}, {"rotary_base": 5e5}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"rotary_base": 1e6}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 32.0}},
            {"rotary_base": 5e5, "rope_scaling": True, "rope_scaling_factor": 32.0},
        ),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, {"seq_len_interpolation_factor": 4.0}),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            {
                "position_embedding_type": "yarn",
                "yarn_rotary_scaling_factor": 4.0,
                "yarn_original_max_position_embeddings": 32768,
            },
        ),
    ],
)
def test_rotary_positions(values: dict[str, object], expected: dict[str, object]) -> None:
    fields = translated(Tiny(), **({"max_position_embeddings": 131072} | values))
    assert fields == fields | expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_absent_values(architecture: str) -> None:
    """What an old config leaves out: every head is its own group, head size is hidden size over heads."""
    values = {
        key: value
        for key, value in Tiny(architecture=architecture, hidden=24, heads=3, groups=3).config.items()
        if key not in {"head_dim", "num_key_value_heads", "tie_word_embeddings", "attention_bias", "mlp_bias"}
    }
    mapping = map_model(HFConfig(values))
    assert mapping.megatron_config["num_query_groups"] == 3
    assert mapping.megatron_config["kv_channels"] == (128 if architecture == "Qwen3ForCausalLM" else 8)
    assert "lm_head.weight" in mapping.hf


def test_a_null_counts_as_absent() -> None:
    values = Tiny(hidden=12, heads=4).config | {"head_dim": None, "attention_bias": None, "rope_scaling": None}
    assert map_model(HFConfig(values)).megatron_config["kv_channels"] == 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"head_dim": None, "hidden_size": 9, "num_attention_heads": 4}, ["hidden_size 9", "4 attention heads"]),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, ["4 % num_key_value_heads 3 = 1"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers"]),
        ({"intermediate_size": [1]}, ["intermediate_size", "[1]", "positive integer"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "true or false"]),
        ({"partial_rotary_factor": "half"}, ["partial_rotary_factor", "number"]),
        ({"rope_parameters": 3}, ["rope_parameters", "object"]),
        ({"architectures": [3]}, ["architectures"]),
    ],
)
def test_values_that_make_no_sense(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ShardwayError) as caught:
        map_model(HFConfig(Tiny().config | values, "some/config.json"))
    assert caught.value.codes == {"config-invalid"}
    for word in [*words, "some/config.json"]:
        assert word in str(caught.value)


def test_every_architecture_is_served_by_the_family_that_names_it() -> None:
    named = [architecture for family in families() for architecture in family.architectures]
    assert sorted(named) == sorted(_FAMILIES)
    for architecture in named:
        config = HFConfig({"architectures": [architecture]}, "config.json")
        assert architecture in family_of(config).architectures


@pytest.mark.parametrize("name", ["torch.bfloat16", "bfloat16"])
def test_declared_dtype(name: str) -> None:
    assert HFConfig({"torch_dtype": name}).dtype == "bfloat16"
    assert HFConfig({"dtype": name}).dtype == "bfloat16"
    assert HFConfig({}).dtype is None
