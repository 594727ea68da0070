"""GLM-4.5, 4.6 and 4.7: grouped-query attention, a mixture of experts after some dense layers, multi-token prediction.

Source: transformers `modeling_glm4_moe.py` (5.23), the index of zai-org/GLM-4.5; Megatron Bridge `glm45_bridge.py`
(0.7.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import gqa, mla, moe
from shardway.families.bridge import BLOCK_SPEC
from shardway.families.family import Family, Field, Provider

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.families.config import HFConfig


def _dims(config: HFConfig) -> dict[str, int]:
    width = config.count("moe_intermediate_size")
    shared = width * config.count("n_shared_experts", 1)
    return gqa.dims(config) | {"E": moe.num_experts(config), "Fe": width, "Fs": shared}


def _derived(config: HFConfig) -> dict[str, object]:
    layers = mla.dense_then_moe(config, {"L": config.count("num_hidden_layers")})["i"]
    return gqa.rope(config, partial=0.5) | moe.layer_freq(layers)


def _restore(fields: Mapping[str, object]) -> dict[str, object]:
    config = {"hidden_act": fields.get("activation_func", "silu")} | gqa.restore_rope(fields)
    return config | {
        "first_k_dense_replace": moe.first_mixture(fields),
        "n_shared_experts": moe.num_shared_experts(fields),
        "norm_topk_prob": True,
        "num_nextn_predict_layers": fields.get("mtp_num_layers") or 0,
        "partial_rotary_factor": fields.get("rotary_percent", 1.0),
    }


def _caveats(config: HFConfig) -> list[str]:
    return [*gqa.caveats(config), *moe.group_caveats(config)]


_LAYER = (
    *gqa.ATTENTION,
    *gqa.dense(gqa.GATED_MLP),
    *moe.norm("model.layers.{i}.post_attention_layernorm.weight"),
    *moe.router("model.layers.{i}.mlp.gate.weight", expert_bias="model.layers.{i}.mlp.gate.e_score_correction_bias"),
    *moe.experts("model.layers.{i}.mlp.experts"),
    *moe.shared_experts("model.layers.{i}.mlp.shared_experts"),
)

GLM4_MOE = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    rules=(gqa.EMBEDDINGS[0], *_LAYER, *mla.mtp(_LAYER), *gqa.EMBEDDINGS[1:]),
    dims=_dims,
    flags={
        "qkv_bias": "attention_bias",
        "proj_bias": False,
        "mlp_bias": False,
        "qk_norm": "use_qk_norm",
        "expert_bias": True,
        "shared_experts": True,
    },
    stacks=mla.dense_then_moe,
    kinds=("moe", "dense"),
    per_layer=True,
    variants=(moe.PACKED, moe.TE, mla.MTP),
    aliases=(gqa.TIED_HEAD, *mla.ALIASES),
    provider=Provider(
        fields={"bias_activation_fusion": True, "bias_dropout_fusion": True, "persist_layer_norm": True},
        layer_spec=BLOCK_SPEC,
    ),
    hf_keys={"num_moe_experts": "n_routed_experts"},
    restore=_restore,
    fields=(
        *gqa.FIELDS,
        *moe.FIELDS,
        *moe.GROUP_FIELDS,
        Field("num_nextn_predict_layers", "mtp_num_layers"),
        Field("attention_bias", "add_qkv_bias", default=False),
        Field("use_qk_norm", "qk_layernorm", default=False),
    ),
    constants=gqa.CONSTANTS
    | dict(moe.CONSTANTS)
    | dict(moe.SIGMOID)
    | {
        "add_bias_linear": False,
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_router_bias_update_rate": 0.0,
        "moe_aux_loss_coeff": 0.001,
        "moe_shared_expert_overlap": True,
        "mtp_loss_scaling_factor": 0.3,
    },
    derived=_derived,
    caveats=_caveats,
    ignored=gqa.IGNORED,
)
