"""MiniMax-M2, M2.5 and M2.7: sigmoid routing, norms that span all query or key heads, positions on a part of a head.

Source: transformers `modeling_minimax_m2.py` (5.23), the index of MiniMaxAI/MiniMax-M2; Megatron Bridge
`minimax_m2_bridge.py` (0.7.0). The config speaks of layers of multi-token prediction, but no file holds any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import gqa, moe
from shardway.families.family import Family, Provider

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.families.config import HFConfig


def _dims(config: HFConfig) -> dict[str, int]:
    found = gqa.dims(config, head_dim=128)
    return found | {"E": moe.num_experts(config), "Fe": config.count("intermediate_size")}


def _derived(config: HFConfig) -> dict[str, object]:
    head_dim = config.count("head_dim", 128)
    return gqa.rope(config, partial=config.count("rotary_dim", head_dim) / head_dim)


def _restore(fields: Mapping[str, object]) -> dict[str, object]:
    return {"hidden_act": fields.get("activation_func", "silu")} | gqa.restore_rope(fields)


def _caveats(config: HFConfig) -> list[str]:
    return [*gqa.caveats(config), gqa.NO_WIDE_NORMS]


MINIMAX_M2 = Family(
    name="minimax_m2",
    architectures=("MiniMaxM2ForCausalLM",),
    rules=(
        gqa.EMBEDDINGS[0],
        *gqa.ATTENTION,
        *gqa.WIDE_NORMS,
        *moe.norm("model.layers.{i}.post_attention_layernorm.weight"),
        *moe.block_sparse(expert_bias="e_score_correction_bias"),
        *gqa.EMBEDDINGS[1:],
    ),
    dims=_dims,
    flags={"moe": True, "qkv_bias": False, "proj_bias": False, "qk_norm": False, "expert_bias": True},
    variants=(moe.PACKED, moe.TE),
    aliases=(gqa.TIED_HEAD,),
    provider=Provider(
        fields={
            "transformer_layer_spec": {
                "_target_": "megatron.bridge.models.minimax_m2.minimax_m2_provider.minimax_m2_layer_spec",
                "_call_": False,
            },
        }
    ),
    hf_keys={"num_moe_experts": "num_local_experts", "moe_ffn_hidden_size": "intermediate_size"},
    restore=_restore,
    fields=(*gqa.FIELDS, *moe.FIELDS),
    constants=gqa.CONSTANTS
    | dict(moe.CONSTANTS)
    | dict(moe.SIGMOID)
    | {
        "add_bias_linear": False,
        "qk_layernorm": True,
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "aux_loss",
    },
    derived=_derived,
    caveats=_caveats,
    ignored=gqa.IGNORED,
)
