"""Ling and Ring 2.0 (BailingMoeV2): query, key and value in one tensor, experts chosen by groups.

Source: `modeling_bailing_moe_v2.py` of inclusionAI/Ling-mini-2.0, as Megatron Bridge carries it, and its
`bailing_moe2_bridge.py` (0.7.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import gqa, mla, moe
from shardway.families.bridge import BLOCK_SPEC
from shardway.families.family import Family, Field, Provider
from shardway.families.rules import Rule, fused_qkv, same

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.families.config import HFConfig

_AT = "decoder.layers.{i}.self_attention"
_HF = "model.layers.{i}.attention"


def _dims(config: HFConfig) -> dict[str, int]:
    width = config.count("moe_intermediate_size")
    found = gqa.dims(config) | {"E": moe.num_experts(config), "Fe": width}
    if config.get("num_shared_experts"):
        each = config.count("moe_shared_expert_intermediate_size", width)
        found["Fs"] = each * config.count("num_shared_experts")
    return found


def _derived(config: HFConfig) -> dict[str, object]:
    layers = mla.dense_then_moe(config, {"L": config.count("num_hidden_layers")})["i"]
    return gqa.rope(config) | moe.layer_freq(layers)


def _restore(fields: Mapping[str, object]) -> dict[str, object]:
    config = {"hidden_act": fields.get("activation_func", "silu")} | gqa.restore_rope(fields)
    return config | {
        "first_k_dense_replace": moe.first_mixture(fields),
        "num_shared_experts": moe.num_shared_experts(fields) or None,
        "num_nextn_predict_layers": fields.get("mtp_num_layers") or 0,
        "use_bias": False,
    }


def _caveats(config: HFConfig) -> list[str]:
    found = [*gqa.caveats(config), *moe.group_caveats(config)]
    if config.flag("use_bias", default=False):
        found.append(gqa.NO_PROJ_BIAS)
    return found


_ATTENTION = (
    Rule(f"{_AT}.linear_qkv.layer_norm_weight", same("model.layers.{i}.input_layernorm.weight", "H")),
    Rule(f"{_AT}.linear_qkv.weight", fused_qkv(f"{_HF}.query_key_value.weight", trailing=("H",))),
    Rule(f"{_AT}.linear_qkv.bias", fused_qkv(f"{_HF}.query_key_value.bias"), when="qkv_bias"),
    Rule(f"{_AT}.q_layernorm.weight", same(f"{_HF}.query_layernorm.weight", "d"), when="qk_norm"),
    Rule(f"{_AT}.k_layernorm.weight", same(f"{_HF}.key_layernorm.weight", "d"), when="qk_norm"),
    Rule(f"{_AT}.linear_proj.weight", same(f"{_HF}.dense.weight", "H", "nq*d")),
    Rule(f"{_AT}.linear_proj.bias", same(f"{_HF}.dense.bias", "H"), when="proj_bias"),
)

_LAYER = (
    *_ATTENTION,
    *gqa.dense(gqa.GATED_MLP),
    *moe.norm("model.layers.{i}.post_attention_layernorm.weight"),
    *moe.router("model.layers.{i}.mlp.gate.weight", expert_bias="model.layers.{i}.mlp.gate.expert_bias"),
    *moe.experts("model.layers.{i}.mlp.experts"),
    *moe.shared_experts("model.layers.{i}.mlp.shared_experts"),
)

BAILING_MOE_V2 = Family(
    name="bailing_moe_v2",
    architectures=("BailingMoeV2ForCausalLM",),
    rules=(
        Rule("embedding.word_embeddings.weight", same("model.word_embeddings.weight", "V", "H")),
        *_LAYER,
        *mla.mtp(_LAYER, final_norm="final_layernorm"),
        *gqa.EMBEDDINGS[1:],
    ),
    dims=_dims,
    flags={
        "qkv_bias": "use_qkv_bias",
        "proj_bias": "use_bias",
        "mlp_bias": False,
        "qk_norm": lambda config: config.flag("use_qk_norm", default=True),
        "expert_bias": True,
        "shared_experts": lambda config: bool(config.get("num_shared_experts")),
    },
    stacks=mla.dense_then_moe,
    kinds=("moe", "dense"),
    per_layer=True,
    variants=(moe.PACKED, moe.TE, mla.MTP),
    provider=Provider(layer_spec=BLOCK_SPEC),
    restore=_restore,
    fields=(
        *gqa.FIELDS,
        *moe.FIELDS,
        *moe.GROUP_FIELDS,
        Field("num_nextn_predict_layers", "mtp_num_layers"),
        Field("use_qkv_bias", "add_qkv_bias", default=False),
        Field("use_qk_norm", "qk_layernorm", default=True),
    ),
    constants=gqa.CONSTANTS
    | dict(moe.CONSTANTS)
    | dict(moe.SIGMOID)
    | {"add_bias_linear": False, "moe_router_pre_softmax": True, "moe_router_load_balancing_type": "none"},
    derived=_derived,
    caveats=_caveats,
)
