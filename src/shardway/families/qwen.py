"""Qwen2, Qwen2.5 (biases on query, key and value) and Qwen3 (norms on query and key)."""

from __future__ import annotations

from shardway.families import gqa
from shardway.families.family import Family, Field

QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    rules=gqa.RULES,
    flags={"qkv_bias": True, "proj_bias": False, "mlp_bias": False, "qk_norm": False},
    fields=gqa.FIELDS,
    constants=gqa.CONSTANTS | {"add_bias_linear": False, "add_qkv_bias": True},
    derived=gqa.rope,
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
    derived=gqa.rope,
    ignored=gqa.IGNORED,
)
