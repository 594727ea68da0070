"""Llama 1, 2 and 3."""

from __future__ import annotations

from shardway.families import gqa
from shardway.families.family import Family, Field

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    rules=gqa.RULES,
    flags={"qkv_bias": "attention_bias", "proj_bias": "attention_bias", "mlp_bias": "mlp_bias", "qk_norm": False},
    fields=(
        *gqa.FIELDS,
        Field("attention_bias", "add_qkv_bias", default=False),
        Field("mlp_bias", "add_bias_linear", default=False),
    ),
    constants=gqa.CONSTANTS,
    derived=gqa.rope,
    ignored=gqa.IGNORED,
)
