"""Gemma, Gemma 2 and the text models of Gemma 3: zero-centred norms, scaled embeddings, norms after each block.

Source: Megatron Bridge 0.7.0 (models/gemma); transformers (gemma, gemma2, gemma3).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from shardway.families import gqa
from shardway.families.family import Family, Field, Flags, Provider
from shardway.families.rules import Rule, same

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.families.config import HFConfig

# The norms around each block; Megatron names those after a block by its last linear layer.
_SANDWICH = (
    *gqa.ATTENTION,
    *gqa.GATED_MLP[1:],
    Rule(
        "decoder.layers.{i}.self_attention.linear_proj.post_layernorm.weight",
        same("model.layers.{i}.post_attention_layernorm.weight", "H"),
    ),
    Rule(
        "decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight",
        same("model.layers.{i}.pre_feedforward_layernorm.weight", "H"),
    ),
    Rule(
        "decoder.layers.{i}.mlp.linear_fc2.post_layernorm.weight",
        same("model.layers.{i}.post_feedforward_layernorm.weight", "H"),
    ),
)
_SANDWICH_RULES = (gqa.EMBEDDINGS[0], *_SANDWICH, *gqa.EMBEDDINGS[1:])
_CONSTANTS = gqa.CONSTANTS | {
    "activation_func": "fast_gelu",
    "add_bias_linear": False,
    "layernorm_zero_centered_gamma": True,
}
_FLAGS: Flags = {"qkv_bias": "attention_bias", "proj_bias": "attention_bias", "mlp_bias": False}
_BRIDGE = (
    "Gemma multiplies embeddings by the square root of the hidden size; a model of megatron-core alone "
    "does not, that of Megatron Bridge's provider does"
)


def _caveats(config: HFConfig) -> list[str]:
    return [*gqa.rope_caveats(config), _BRIDGE]


def _gemma2(config: HFConfig) -> dict[str, object]:
    return gqa.rope(config) | {"window_size": [config.count("sliding_window", 4096) - 1, 0]}


def _gemma3(config: HFConfig) -> dict[str, object]:
    """Rotary bases of the local and the global layers, and how many of each follow one another.

    transformers 5 has the parameters of each kind of layer under its name, transformers 4 in fields of their own.
    """
    kinds = config.get("rope_parameters")
    if isinstance(kinds, dict) and isinstance(kinds.get("full_attention"), dict):
        far, near = kinds["full_attention"], kinds.get("sliding_attention") or {}
        bases = [near.get("rope_theta", 1e4), far.get("rope_theta", 1e6)]
        factor = far.get("factor", 1.0)
    else:
        scaling = config.get("rope_scaling")
        bases = [config.number("rope_local_base_freq", 1e4), config.number("rope_theta", 1e6)]
        factor = scaling.get("factor", 1.0) if isinstance(scaling, dict) else 1.0
    pattern = config.count("sliding_window_pattern", config.count("_sliding_window_pattern", 6))
    return {
        "rotary_base": bases,
        "rope_scaling_factor": factor,
        "window_size": config.count("sliding_window", 4096),
        "interleaved_attn_pattern": [pattern - 1, 1],
        "softmax_scale": 1.0 / math.sqrt(config.number("query_pre_attn_scalar", 256)),
    }


def _gemma3_caveats(_: HFConfig) -> list[str]:
    return [_BRIDGE, "megatron-core alone has one rotary base for all layers; Megatron Bridge's provider has both"]


_ACTIVATION = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _restore(fields: Mapping[str, object]) -> dict[str, object]:
    return _ACTIVATION | gqa.restore_rope(fields)


def _restore_gemma2(fields: Mapping[str, object]) -> dict[str, object]:
    return _restore(fields) | gqa.restore_window(fields)


def _restore_gemma3(fields: Mapping[str, object]) -> dict[str, object]:
    bases, pattern = fields.get("rotary_base"), fields.get("interleaved_attn_pattern")
    scale, factor = fields.get("softmax_scale"), fields.get("rope_scaling_factor", 1.0)
    config: dict[str, object] = {**_ACTIVATION, "model_type": "gemma3_text", "rope_scaling": None}
    config["sliding_window"] = fields.get("window_size")
    if isinstance(bases, list | tuple) and len(bases) == 2:
        config |= {"rope_local_base_freq": bases[0], "rope_theta": bases[1]}
    if isinstance(pattern, list | tuple) and len(pattern) == 2 and isinstance(pattern[0], int):
        config["sliding_window_pattern"] = pattern[0] + 1
    if isinstance(scale, float) and 1e-6 < scale <= 1:
        config["query_pre_attn_scalar"] = round(scale**-2)
    if factor != 1.0:
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return config


GEMMA = Family(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    rules=gqa.RULES,
    dims=gqa.dims_with(head_dim=256),
    flags={**_FLAGS, "qk_norm": False},
    aliases=(gqa.TIED_HEAD,),
    tied_by_default=True,
    provider=Provider(target="megatron.bridge.models.gemma.gemma_provider.GemmaModelProvider"),
    restore=_restore,
    fields=gqa.FIELDS,
    constants=_CONSTANTS,
    derived=gqa.rope,
    caveats=_caveats,
    ignored=gqa.IGNORED,
)

GEMMA2 = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    rules=_SANDWICH_RULES,
    dims=gqa.dims_with(head_dim=256),
    flags={**_FLAGS, "qk_norm": False},
    aliases=(gqa.TIED_HEAD,),
    tied_by_default=True,
    provider=Provider(target="megatron.bridge.models.gemma.gemma2_provider.Gemma2ModelProvider"),
    restore=_restore_gemma2,
    fields=(
        *gqa.FIELDS,
        Field("query_pre_attn_scalar", "query_pre_attn_scalar", 256),
        Field("attn_logit_softcapping", "attn_logit_softcapping"),
        Field("final_logit_softcapping", "final_logit_softcapping"),
    ),
    constants=_CONSTANTS,
    derived=_gemma2,
    caveats=_caveats,
    ignored=gqa.IGNORED,
)

GEMMA3 = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    rules=_SANDWICH_RULES,
    dims=gqa.dims_with(head_dim=256),
    flags={**_FLAGS, "qk_norm": True},
    aliases=(gqa.TIED_HEAD,),
    tied_by_default=True,
    provider=Provider(target="megatron.bridge.models.gemma.gemma3_provider.Gemma3ModelProvider"),
    restore=_restore_gemma3,
    fields=gqa.FIELDS,
    constants=_CONSTANTS | {"qk_layernorm": True},
    derived=_gemma3,
    caveats=_gemma3_caveats,
    ignored=gqa.IGNORED,
)
