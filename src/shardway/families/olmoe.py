"""OLMoE: a mixture of experts in every layer, and norms that span all query or key heads.

Source: transformers `modeling_olmoe.py` (5.23); Megatron Bridge `olmoe_bridge.py` (0.7.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import gqa, moe
from shardway.families.family import Family, Field, Provider

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.families.config import HFConfig


def _dims(config: HFConfig) -> dict[str, int]:
    return gqa.dims(config) | {"E": moe.num_experts(config), "Fe": config.count("intermediate_size")}


def _derived(config: HFConfig) -> dict[str, object]:
    return gqa.rope(config) | {"moe_router_pre_softmax": not config.flag("norm_topk_prob", default=False)}


def _restore(fields: Mapping[str, object]) -> dict[str, object]:
    config = {"hidden_act": fields.get("activation_func", "silu")} | gqa.restore_rope(fields)
    return config | {"norm_topk_prob": not fields.get("moe_router_pre_softmax", False)}


def _caveats(config: HFConfig) -> list[str]:
    found = [*gqa.caveats(config), gqa.NO_WIDE_NORMS]
    if config.get("clip_qkv") is not None:
        found.append("megatron-core does not clip queries, keys and values; this model's config says clip_qkv")
    if config.flag("attention_bias", default=False):
        found.append(gqa.NO_PROJ_BIAS)
    return found


OLMOE = Family(
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    rules=(
        gqa.EMBEDDINGS[0],
        *gqa.ATTENTION,
        *gqa.WIDE_NORMS,
        *moe.norm("model.layers.{i}.post_attention_layernorm.weight"),
        *moe.router("model.layers.{i}.mlp.gate.weight"),
        *moe.experts("model.layers.{i}.mlp.experts"),
        *gqa.EMBEDDINGS[1:],
    ),
    dims=_dims,
    flags={"moe": True, "qkv_bias": "attention_bias", "proj_bias": "attention_bias", "qk_norm": False},
    variants=(moe.PACKED, moe.TE),
    aliases=(gqa.TIED_HEAD,),
    provider=Provider(
        fields={
            "persist_layer_norm": True,
            "transformer_layer_spec": {
                "_target_": "megatron.bridge.models.olmoe.olmoe_provider.olmoe_layer_spec",
                "_call_": False,
            },
        }
    ),
    hf_keys={"moe_ffn_hidden_size": "intermediate_size"},
    restore=_restore,
    fields=(*gqa.FIELDS, *moe.FIELDS, Field("attention_bias", "add_qkv_bias", default=False)),
    constants=gqa.CONSTANTS
    | dict(moe.CONSTANTS)
    | {
        "add_bias_linear": False,
        "qk_layernorm": True,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_router_score_function": "softmax",
        "moe_router_dtype": "fp32",
    },
    derived=_derived,
    caveats=_caveats,
    ignored=gqa.IGNORED,
)
