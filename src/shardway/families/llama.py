"""Llama 1, 2 and 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import gqa
from shardway.families.family import Family, Field, Provider

if TYPE_CHECKING:
    from shardway.families.config import HFConfig


def _caveats(config: HFConfig) -> list[str]:
    found = gqa.caveats(config)
    attention, mlp = (config.flag(key, default=False) for key in ("attention_bias", "mlp_bias"))
    if attention and not mlp:
        found.append(gqa.NO_PROJ_BIAS)
    if mlp and not attention:
        found.append(
            "megatron-core's add_bias_linear adds biases to attention too, which this model lacks; its load will fail"
        )
    return found


# What Megatron Bridge switches on for these models.
FUSED = {
    "apply_rope_fusion": True,
    "bias_activation_fusion": True,
    "bias_dropout_fusion": True,
    "persist_layer_norm": True,
}

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    rules=gqa.RULES,
    dims=gqa.dims,
    aliases=(gqa.TIED_HEAD,),
    flags={"qkv_bias": "attention_bias", "proj_bias": "attention_bias", "mlp_bias": "mlp_bias", "qk_norm": False},
    provider=Provider(fields=FUSED),
    restore=gqa.restore,
    fields=(
        *gqa.FIELDS,
        Field("attention_bias", "add_qkv_bias", default=False),
        Field("mlp_bias", "add_bias_linear", default=False),
    ),
    constants=gqa.CONSTANTS,
    derived=gqa.derived,
    caveats=_caveats,
    ignored=gqa.IGNORED,
)
