"""Mistral 7B and its successors of the same shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import gqa
from shardway.families.family import Family

if TYPE_CHECKING:
    from shardway.families.config import HFConfig


def _derived(config: HFConfig) -> dict[str, object]:
    fields = gqa.rope(config)
    if config.get("sliding_window") is not None:
        # transformers lets a token see `sliding_window` keys, itself included; Megatron counts those to its left.
        fields["window_size"] = [config.count("sliding_window") - 1, 0]
    return fields


MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    rules=gqa.RULES,
    flags={"qkv_bias": False, "proj_bias": False, "mlp_bias": False, "qk_norm": False},
    fields=gqa.FIELDS,
    constants=gqa.CONSTANTS | {"add_bias_linear": False, "add_qkv_bias": False},
    derived=_derived,
    ignored=gqa.IGNORED,
)
