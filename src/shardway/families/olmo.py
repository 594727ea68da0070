"""OLMo 2 and EXAONE 4: no norm before a block, one after it.

Megatron Bridge knows EXAONE 4 alone (models/exaone, 0.7.0); OLMo 2 gets the same names, and the full-width norms of
queries and keys that OLMoE has there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import gqa
from shardway.families.family import Family, Field, Provider
from shardway.families.rules import Rule, same

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.families.config import HFConfig

_AT = "decoder.layers.{i}"
_POST_NORMS = (
    Rule(
        f"{_AT}.self_attention.linear_proj.post_layernorm.weight",
        same("model.layers.{i}.post_attention_layernorm.weight", "H"),
    ),
    Rule(
        f"{_AT}.mlp.linear_fc2.post_layernorm.weight", same("model.layers.{i}.post_feedforward_layernorm.weight", "H")
    ),
)
_LAYER = tuple(rule for rule in (*gqa.ATTENTION, *gqa.GATED_MLP) if not rule.mcore.endswith(".layer_norm_weight"))


def _olmo2_caveats(config: HFConfig) -> list[str]:
    return [*gqa.caveats(config), "megatron-core has no layers with norms only after attention and MLP, as OLMo 2 has"]


def _exaone4_derived(config: HFConfig) -> dict[str, object]:
    parameters = config.rope
    fields = gqa.rope(config) | gqa.window(config)
    if parameters["rope_type"] == "llama3":
        fields |= {
            "rope_scaling_low_freq_factor": parameters.get("low_freq_factor", 1.0),
            "rope_scaling_high_freq_factor": parameters.get("high_freq_factor", 4.0),
            "rope_scaling_original_max_position_embeddings": parameters.get("original_max_position_embeddings", 8192),
        }
    return fields


def _exaone4_caveats(config: HFConfig) -> list[str]:
    return [
        *gqa.caveats(config),
        "megatron-core alone has no layers with norms only after attention and MLP; Megatron Bridge's provider has",
    ]


def _restore_exaone4(fields: Mapping[str, object]) -> dict[str, object]:
    config = gqa.restore(fields)
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict) and scaling["rope_type"] == "llama3":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        said = {name: fields.get(f"rope_scaling_{name}") for name in names}
        config["rope_scaling"] = scaling | {name: value for name, value in said.items() if value is not None}
    return config


OLMO2 = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    rules=(gqa.EMBEDDINGS[0], *_LAYER, *gqa.WIDE_NORMS, *_POST_NORMS, *gqa.EMBEDDINGS[1:]),
    dims=gqa.dims,
    flags={"qkv_bias": "attention_bias", "proj_bias": "attention_bias", "mlp_bias": False, "qk_norm": False},
    aliases=(gqa.TIED_HEAD,),
    restore=gqa.restore,
    fields=(*gqa.FIELDS, Field("attention_bias", "add_qkv_bias", default=False)),
    constants=gqa.CONSTANTS | {"add_bias_linear": False, "qk_layernorm": True},
    derived=gqa.derived,
    caveats=_olmo2_caveats,
    ignored=gqa.IGNORED,
)

EXAONE4 = Family(
    name="exaone4",
    architectures=("Exaone4ForCausalLM",),
    rules=(gqa.EMBEDDINGS[0], *_LAYER, *_POST_NORMS, *gqa.EMBEDDINGS[1:]),
    dims=gqa.dims,
    flags={"qkv_bias": False, "proj_bias": False, "mlp_bias": False, "qk_norm": True},
    aliases=(gqa.TIED_HEAD,),
    provider=Provider(
        layer_spec="megatron.bridge.models.exaone.exaone4.exaone4_provider.exaone4_layer_spec", layer_options={}
    ),
    restore=_restore_exaone4,
    fields=gqa.FIELDS,
    constants=gqa.CONSTANTS | {"add_bias_linear": False, "add_qkv_bias": False, "qk_layernorm": True},
    derived=_exaone4_derived,
    caveats=_exaone4_caveats,
    ignored=gqa.IGNORED,
)
