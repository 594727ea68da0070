"""DeepSeek-V2 and V3, and Kimi-K2: latent attention, a mixture of experts after some dense layers.

Moonlight and, by its own config.json, Kimi-K2 are DeepSeek-V3 by name too.

Source: transformers `modeling_deepseek_v2.py`, `modeling_deepseek_v3.py` (5.24); Megatron Bridge
`deepseek_v2_bridge.py`, `deepseek_v3_bridge.py`, `kimi_bridge.py` (0.7.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import gqa, mla, moe
from shardway.families.family import Family, Field

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.families.config import HFConfig


def dims(config: HFConfig) -> dict[str, int]:
    """The dimensions of such a model, its experts' included."""
    key = "n_routed_experts"
    found = mla.dims(config) | {
        "E": config.count(key) if config.get(key) is not None else moe.num_experts(config),
        "Fe": config.count("moe_intermediate_size"),
    }
    shared = config.whole("n_shared_experts", 0)
    return found | {"Fs": found["Fe"] * shared} if shared else found


def derived(config: HFConfig) -> dict[str, object]:
    """Megatron config fields that take more than another name."""
    layers = mla.dense_then_moe(config, {"L": config.count("num_hidden_layers")})["i"]
    return mla.derived(config) | moe.layer_freq(layers)


def _derived_v2(config: HFConfig) -> dict[str, object]:
    fields = derived(config)
    if _by_groups(config):
        fields["moe_router_num_groups"] = config.count("n_group")
        fields["moe_router_group_topk"] = config.count("topk_group")
    return fields


def restore(fields: Mapping[str, object]) -> dict[str, object]:
    """What config.json has beside dimensions and fields; the way back from `derived`."""
    return mla.restore(fields) | {
        "first_k_dense_replace": moe.first_mixture(fields),
        "n_shared_experts": moe.num_shared_experts(fields) or None,
        "norm_topk_prob": True,
    }


def _restore_v2(fields: Mapping[str, object]) -> dict[str, object]:
    groups, chosen = fields.get("moe_router_num_groups"), fields.get("moe_router_group_topk")
    by_groups = isinstance(groups, int) and groups > 1
    return restore(fields) | {
        "norm_topk_prob": False,
        "topk_method": "group_limited_greedy" if by_groups else "greedy",
        "n_group": groups if by_groups else 1,
        "topk_group": chosen if by_groups else 1,
    }


def caveats(config: HFConfig) -> list[str]:
    """What a Megatron model would do otherwise than transformers, one sentence each."""
    return [*mla.caveats(config), *moe.group_caveats(config)]


def _caveats_v2(config: HFConfig) -> list[str]:
    """The caveats of choosing experts by softmax.

    Source: megatron/core/transformer/moe/moe_utils.py, `group_limited_topk` (0.16.1).
    """
    found = mla.caveats(config)
    if _by_groups(config) and config.count("n_group") > config.count("topk_group"):
        scored = config.count("num_experts_per_tok") // config.count("topk_group")
        if scored != 1:
            found.append(f"megatron-core ranks groups of experts by their best {scored}; transformers, by their best")
    if config.flag("norm_topk_prob", default=False):
        found.append("megatron-core leaves the weights of the chosen experts as they are; this model adds them up to 1")
    return found


def _by_groups(config: HFConfig) -> bool:
    return config.get("topk_method") == "group_limited_greedy"


MLP = (
    *mla.NORM,
    *gqa.dense(gqa.GATED_MLP[1:]),
    *moe.router("model.layers.{i}.mlp.gate.weight", expert_bias="model.layers.{i}.mlp.gate.e_score_correction_bias"),
    *moe.experts("model.layers.{i}.mlp.experts"),
    *moe.shared_experts("model.layers.{i}.mlp.shared_experts"),
)

_LAYER = (*mla.attention(), *MLP)

FIELDS = (*mla.FIELDS, Field("num_experts_per_tok", "moe_router_topk"))

_CONSTANTS = (
    dict(mla.CONSTANTS)
    | dict(moe.CONSTANTS)
    | {
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_router_pre_softmax": True,
        "moe_shared_expert_overlap": True,
    }
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    rules=(gqa.EMBEDDINGS[0], *_LAYER, *mla.mtp(_LAYER), *gqa.EMBEDDINGS[1:]),
    dims=dims,
    flags={
        "q_lora": mla.has_q_lora,
        "bias": "attention_bias",
        "mlp_bias": False,
        "expert_bias": True,
        "shared_experts": lambda config: bool(config.get("n_shared_experts")),
    },
    stacks=mla.dense_then_moe,
    kinds=("moe", "dense"),
    per_layer=True,
    variants=(moe.PACKED, mla.TE, mla.MTP),
    aliases=(gqa.TIED_HEAD, *mla.ALIASES),
    provider=mla.PROVIDER,
    hf_keys={"num_moe_experts": "n_routed_experts"},
    restore=restore,
    fields=(*FIELDS, *moe.GROUP_FIELDS, Field("aux_loss_alpha", "moe_aux_loss_coeff", 1e-4)),
    constants=_CONSTANTS | dict(moe.SIGMOID),
    derived=derived,
    caveats=caveats,
    ignored=gqa.IGNORED,
)

# What a Megatron config says of such a model, DeepSeek-V3 says too, so that is what a checkpoint alone becomes.
KIMI_K2 = DEEPSEEK_V3._replace(
    name="kimi_k2",
    architectures=("KimiK2ForCausalLM",),
    restore=None,
    fields=(*FIELDS, *moe.GROUP_FIELDS),
    constants={**DEEPSEEK_V3.constants, "moe_aux_loss_coeff": 1e-3},
)

DEEPSEEK_V2 = DEEPSEEK_V3._replace(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    rules=(gqa.EMBEDDINGS[0], *_LAYER, *gqa.EMBEDDINGS[1:]),
    flags={**DEEPSEEK_V3.flags, "expert_bias": False},
    variants=(moe.PACKED, mla.TE),
    aliases=(gqa.TIED_HEAD,),
    provider=mla.PROVIDER._replace(vocabulary_multiple=3200),
    restore=_restore_v2,
    fields=(
        *FIELDS,
        Field("routed_scaling_factor", "moe_router_topk_scaling_factor"),
        Field("aux_loss_alpha", "moe_aux_loss_coeff"),
    ),
    constants=_CONSTANTS | {"moe_router_score_function": "softmax"},
    derived=_derived_v2,
    caveats=_caveats_v2,
)
