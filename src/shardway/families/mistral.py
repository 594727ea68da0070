"""Mistral 7B and its successors of the same shape."""

from __future__ import annotations

from shardway.families import gqa
from shardway.families.family import Family, Provider

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    rules=gqa.RULES,
    dims=gqa.dims,
    aliases=(gqa.TIED_HEAD,),
    flags={"qkv_bias": False, "proj_bias": False, "mlp_bias": False, "qk_norm": False},
    provider=Provider(target="megatron.bridge.models.mistral.mistral_provider.MistralModelProvider"),
    restore=gqa.restore,
    fields=gqa.FIELDS,
    constants=gqa.CONSTANTS | {"add_bias_linear": False, "add_qkv_bias": False},
    derived=gqa.derived,
    caveats=gqa.caveats,
    ignored=gqa.IGNORED,
)
