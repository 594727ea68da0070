"""gpt-oss: attention with learnable sinks and alternating windows, experts with biases and a clamped activation.

Hugging Face keeps the experts of a layer as [E, in, out] with the columns of gate and up taking turns. The released
files hold MXFP4 blocks of [E, out, in] instead; `formats.quantised` presents them the other way round.

Source: transformers `modeling_gpt_oss.py` (5.23); Megatron Bridge `gpt_oss_bridge.py` (0.7.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import gqa, moe
from shardway.families.family import Family, Field, Provider
from shardway.families.rules import Part, Rule, same

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.families.config import HFConfig

_MLP = "decoder.layers.{i}.mlp"
_HF = "model.layers.{i}.mlp"
_ALPHA = 1.702  # of megatron-core's quick_gelu


def _experts() -> tuple[Rule, ...]:
    at, hf = f"{_MLP}.experts.experts", f"{_HF}.experts"
    gate, up = "(Fe 1@0/2)", "(Fe 1@1/2)"
    above, below = "Fe@0/2*Fe", "Fe@Fe/2*Fe"
    return (
        Rule(
            f"{at}.linear_fc1.weight",
            (
                Part(f"{hf}.gate_up_proj", f"[e] H {gate}", f"[e] {above} H"),
                Part(f"{hf}.gate_up_proj", f"[e] H {up}", f"[e] {below} H"),
            ),
        ),
        Rule(
            f"{at}.linear_fc1.bias",
            (
                Part(f"{hf}.gate_up_proj_bias", f"[e] {gate}", f"[e] {above}"),
                Part(f"{hf}.gate_up_proj_bias", f"[e] {up}", f"[e] {below}"),
            ),
        ),
        Rule(f"{at}.linear_fc2.weight", (Part(f"{hf}.down_proj", "[e] Fe H", "[e] H Fe"),)),
        Rule(f"{at}.linear_fc2.bias", (Part(f"{hf}.down_proj_bias", "[e] H", "[e] H"),)),
    )


def _dims(config: HFConfig) -> dict[str, int]:
    found = gqa.dims(config, head_dim=64)
    return found | {"E": moe.num_experts(config), "Fe": config.count("intermediate_size")}


def _derived(config: HFConfig) -> dict[str, object]:
    layers = range(config.count("num_hidden_layers"))
    every_other = [(layer + 1) % 2 for layer in layers]
    fields = gqa.rope(config) | gqa.window(config)
    if config.get("layer_types") is None or fields.get("window_attn_skip_freq") == every_other:
        fields["window_attn_skip_freq"] = 2
    return fields | {"activation_func_clamp_value": config.number("swiglu_limit", 7.0)}


def _restore(fields: Mapping[str, object]) -> dict[str, object]:
    config = gqa.restore_rope(fields) | gqa.restore_window(fields)
    num_layers, skips = fields.get("num_layers"), fields.get("window_attn_skip_freq")
    if isinstance(skips, int) and skips > 0 and isinstance(num_layers, int):
        kinds = ("full_attention", "sliding_attention")
        config["layer_types"] = [kinds[bool((layer + 1) % skips)] for layer in range(num_layers)]
    return config | {"hidden_act": "silu", "swiglu_limit": fields.get("activation_func_clamp_value", 7.0)}


def _caveats(config: HFConfig) -> list[str]:
    found = gqa.caveats(config)
    alpha = config.number("swiglu_alpha", _ALPHA)
    if alpha != _ALPHA:
        found.append(f"megatron-core's quick_gelu holds {_ALPHA} fixed; this model's config says swiglu_alpha {alpha}")
    return found


GPT_OSS = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    rules=(
        gqa.EMBEDDINGS[0],
        *gqa.ATTENTION,
        Rule(
            "decoder.layers.{i}.self_attention.core_attention.softmax_offset",
            same("model.layers.{i}.self_attn.sinks", "nq"),
        ),
        *moe.norm("model.layers.{i}.post_attention_layernorm.weight"),
        *moe.router(f"{_HF}.router.weight"),
        Rule(f"{_MLP}.router.bias", same(f"{_HF}.router.bias", "E")),
        *_experts(),
        *gqa.EMBEDDINGS[1:],
    ),
    dims=_dims,
    flags={
        "moe": True,
        "qkv_bias": lambda config: config.flag("attention_bias", default=True),
        "proj_bias": lambda config: config.flag("attention_bias", default=True),
        "qk_norm": False,
    },
    variants=(moe.TE,),
    aliases=(gqa.TIED_HEAD,),
    provider=Provider(fields={"bias_activation_fusion": True, "bias_dropout_fusion": False}),
    hf_keys={"num_moe_experts": "num_local_experts", "moe_ffn_hidden_size": "intermediate_size"},
    restore=_restore,
    fields=(*gqa.FIELDS, *moe.FIELDS, Field("attention_bias", "add_qkv_bias", default=True)),
    constants=gqa.CONSTANTS
    | dict(moe.CONSTANTS)
    | {
        "add_bias_linear": True,
        "activation_func": "quick_gelu",
        "glu_linear_offset": 1.0,
        "softmax_type": "learnable",
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "none",
    },
    derived=_derived,
    caveats=_caveats,
)
