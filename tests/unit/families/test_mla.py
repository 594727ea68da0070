"""What is said of models with latent attention beside their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import shardway
from shardway.families.config import HFConfig
from shardway.families.mapping import map_model, variants_in
from shardway.families.restore import restore_config

if TYPE_CHECKING:
    from shardway.families.mapping import ModelMapping

DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "q_lora_rank": 6,
    "kv_lora_rank": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
DEEPSEEK_V2 = DEEPSEEK_V3 | {"architectures": ["DeepseekV2ForCausalLM"], "norm_topk_prob": False}
PLAIN = {"rope_scaling": None}
GLM_MOE_DSA = (
    DEEPSEEK_V3
    | PLAIN
    | {"architectures": ["GlmMoeDsaForCausalLM"], "index_n_heads": 2, "index_head_dim": 4, "index_topk": 8}
)


def mapped(values: dict[str, Any], **variants: bool) -> ModelMapping:
    return map_model(HFConfig(values), variants=variants)


def yarn(**values: object) -> dict[str, Any]:
    scaling = {key: value for key, value in {**DEEPSEEK_V3["rope_scaling"], **values}.items() if value is not None}
    return DEEPSEEK_V3 | {"rope_scaling": scaling}


def test_the_released_model_is_what_megatron_computes() -> None:
    mapping = mapped(DEEPSEEK_V3)
    assert mapping.caveats == ()
    fields = mapping.megatron_config
    assert (fields["rotary_scaling_factor"], fields["original_max_position_embeddings"]) == (40, 4096)
    assert (fields["mscale"], fields["mscale_all_dim"], fields["kv_channels"]) == (1.0, 1.0, 2)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (yarn(mscale=None), "scales what it rotates otherwise"),
        (yarn(attention_factor=1.5), "scales what it rotates otherwise"),
        (yarn(truncate=False), "rounds the range"),
        (
            DEEPSEEK_V3 | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "no rotary embedding of type 'linear'",
        ),
        (DEEPSEEK_V3 | {"rope_interleave": False}, "those half a head apart"),
        (DEEPSEEK_V3 | {"attention_bias": True}, "no biases"),
        (DEEPSEEK_V3 | {"rms_norm_eps": 1e-5}, "those of transformers, 1e-06"),
        (DEEPSEEK_V3 | {"hidden_act": "gelu"}, "'gelu'"),
        (DEEPSEEK_V3 | {"num_experts_per_tok": 2}, "by their best 1; transformers, by their best 2"),
        (DEEPSEEK_V2 | {"topk_method": "group_limited_greedy"}, "by their best 2; transformers, by their best"),
        (DEEPSEEK_V2 | {"norm_topk_prob": True}, "leaves the weights of the chosen experts"),
    ],
)
def test_what_megatron_would_do_otherwise_is_said(values: dict[str, Any], says: str) -> None:
    (caveat,) = mapped(values).caveats
    assert says in caveat


@pytest.mark.parametrize("scaling", [{"mscale": None, "mscale_all_dim": None}, {"mscale": 0.7, "mscale_all_dim": 0.7}])
def test_what_megatron_does_alike_is_not(scaling: dict[str, float | None]) -> None:
    assert mapped(yarn(**scaling)).caveats == ()


def test_a_factor_that_is_missing_is_how_much_longer_the_model_reads() -> None:
    assert mapped(yarn(factor=None)).megatron_config["rotary_scaling_factor"] == 40


def test_groups_of_experts_that_the_method_does_not_ask_for_are_not_said() -> None:
    assert "moe_router_num_groups" not in mapped(DEEPSEEK_V2 | {"topk_method": "greedy"}).megatron_config
    assert mapped(DEEPSEEK_V2 | {"topk_method": "group_limited_greedy"}).megatron_config["moe_router_num_groups"] == 4


@pytest.mark.parametrize(("promised", "held", "said"), [(0, True, None), (1, False, None), (1, True, 1)])
def test_layers_of_prediction_are_said_where_they_are(promised: int, held: bool, said: int | None) -> None:
    mapping = mapped(DEEPSEEK_V3 | {"num_nextn_predict_layers": promised}, mtp=held)
    assert mapping.megatron_config.get("mtp_num_layers") == said
    assert any(name.startswith("mtp_") for name in mapping.megatron_config) is (said is not None)


def test_kinds_of_layers_may_be_listed() -> None:
    mapping = mapped(DEEPSEEK_V3 | {"mlp_layer_types": ["sparse", "dense", "sparse"]})
    assert mapping.megatron_config["moe_layer_freq"] == [1, 0, 1]
    with pytest.raises(shardway.ShardwayError, match='"dense" or "sparse" for each of 3 layers'):
        mapped(DEEPSEEK_V3 | {"mlp_layer_types": ["sparse", "dense"]})


def test_kimi_k2_is_deepseek_v3_by_what_megatron_says_of_it() -> None:
    mapping = mapped(DEEPSEEK_V3 | {"architectures": ["KimiK2ForCausalLM"]})
    found = restore_config(mapping.megatron_config, mapping.mcore, mapping.provider.target, "bfloat16").config
    assert found is not None
    assert found["architectures"] == ["DeepseekV3ForCausalLM"]
    again = mapped(found)
    assert again.mcore == mapping.mcore
    assert again.megatron_config == mapping.megatron_config


@pytest.mark.parametrize("name", ["mscale_all_dim", "moe_router_pre_softmax"])
def test_fields_that_make_no_difference_are_not_compared(name: str) -> None:
    mapping = mapped(DEEPSEEK_V3 | PLAIN)
    other = {"mscale_all_dim": 0.0, "moe_router_pre_softmax": False}
    fields = {**mapping.megatron_config, name: other[name]}
    assert restore_config(fields, mapping.mcore, mapping.provider.target, "bfloat16").config is not None
    differing = {**mapped(DEEPSEEK_V2).megatron_config, "moe_router_pre_softmax": False}
    assert restore_config(differing, mapped(DEEPSEEK_V2).mcore, mapping.provider.target, "bfloat16").config is None


@pytest.mark.parametrize(
    ("types", "freq", "offset"),
    [("FFFF", None, None), ("FFFSSSF", 4, 3), ("FSFSFS", 2, 1), ("FFS", 2, 2), ("FSSF", 3, 1), ("FFSFF", None, None)],
)
def test_layers_that_share_what_an_indexer_picks(types: str, freq: int | None, offset: int | None) -> None:
    """As megatron-core counts: layer n, from 1, picks where max(n - offset, 0) is a multiple of the frequency."""
    names = {"F": "full", "S": "shared"}
    values = GLM_MOE_DSA | {"num_hidden_layers": len(types), "indexer_types": [names[letter] for letter in types]}
    mapping = mapped(values)
    fields = mapping.megatron_config
    assert (fields.get("dsa_indexer_topk_freq"), fields.get("dsa_indexer_skip_topk_offset")) == (freq, offset)
    assert bool(mapping.caveats) is (types == "FFSFF")
    held = [f"model.layers.{i}.self_attn.indexer.wk.weight" in mapping.hf for i in range(len(types))]
    assert held == [letter == "F" for letter in types]
    if freq is not None and offset is not None:
        assert held == [max(number - offset, 0) % freq == 0 for number in range(1, len(types) + 1)]
        scheduled = {**values, "indexer_types": None, "index_topk_freq": freq, "index_skip_topk_offset": offset}
        assert mapped(scheduled).hf == mapping.hf


def test_the_norms_of_glm_5_are_found_in_either_place() -> None:
    apart, fused = mapped(GLM_MOE_DSA), mapped(GLM_MOE_DSA, fused_norms=True)
    at = "decoder.layers.0.self_attention"
    assert f"{at}.kv_layernorm.weight" in apart.mcore
    assert f"{at}.linear_kv_up_proj.layer_norm_weight" in fused.mcore
    assert variants_in(HFConfig(GLM_MOE_DSA), mcore=fused.mcore)["fused_norms"]
    assert not variants_in(HFConfig(GLM_MOE_DSA), mcore=apart.mcore)["fused_norms"]


def test_glm_4_7_flash_is_told_from_deepseek_v3_by_what_decides_nothing() -> None:
    values = DEEPSEEK_V3 | PLAIN | {"architectures": ["Glm4MoeLiteForCausalLM"]}
    mapping = mapped(values)
    found = restore_config(mapping.megatron_config, mapping.mcore, mapping.provider.target, "bfloat16").config
    assert found is not None
    assert found["architectures"] == ["Glm4MoeLiteForCausalLM"]
    assert found["mlp_layer_types"] == ["dense", "sparse", "sparse"]
