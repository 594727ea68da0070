"""Qwen2, Qwen2.5 (biases on query, key and value) and Qwen3 (norms on query and key)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import gqa
from shardway.families.family import Family, Field

if TYPE_CHECKING:
    from shardway.families.config import HFConfig


def _derived(config: HFConfig) -> dict[str, object]:
    windowed = config.flag("use_sliding_window", default=False)
    return gqa.rope(config) | (gqa.window(config) if windowed else {})


def _bias_caveats(config: HFConfig) -> list[str]:
    found = gqa.caveats(config)
    if config.flag("attention_bias", default=False):
        found.append(gqa.NO_PROJ_BIAS)
    return found


QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    rules=gqa.RULES,
    flags={"qkv_bias": True, "proj_bias": False, "mlp_bias": False, "qk_norm": False},
    fields=gqa.FIELDS,
    constants=gqa.CONSTANTS | {"add_bias_linear": False, "add_qkv_bias": True},
    derived=_derived,
    caveats=gqa.caveats,
    ignored=gqa.IGNORED,
)

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    rules=gqa.RULES,
    flags={"qkv_bias": "attention_bias", "proj_bias": "attention_bias", "mlp_bias": False, "qk_norm": True},
    head_dim=128,
    fields=(*gqa.FIELDS, Field("attention_bias", "add_qkv_bias", default=False)),
    constants=gqa.CONSTANTS | {"add_bias_linear": False, "qk_layernorm": True},
    derived=_derived,
    caveats=_bias_caveats,
    ignored=gqa.IGNORED,
)
