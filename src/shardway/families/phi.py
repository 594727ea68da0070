"""Phi-3 and Phi-4: one tensor for queries, keys and values, and one for gate and up.

Source: transformers (phi3). Megatron Bridge does not know these models; their Megatron side is that of Llama.
"""

from __future__ import annotations

from shardway.families import gqa
from shardway.families.family import Family
from shardway.families.rules import Rule, fused_qkv, same

_RULES = (
    gqa.EMBEDDINGS[0],
    gqa.ATTENTION[0],
    Rule(
        "decoder.layers.{i}.self_attention.linear_qkv.weight",
        fused_qkv("model.layers.{i}.self_attn.qkv_proj.weight", trailing=("H",)),
    ),
    Rule(
        "decoder.layers.{i}.self_attention.linear_proj.weight",
        same("model.layers.{i}.self_attn.o_proj.weight", "H", "nq*d"),
    ),
    gqa.GATED_MLP[0],
    Rule("decoder.layers.{i}.mlp.linear_fc1.weight", same("model.layers.{i}.mlp.gate_up_proj.weight", "2*F", "H")),
    Rule("decoder.layers.{i}.mlp.linear_fc2.weight", same("model.layers.{i}.mlp.down_proj.weight", "H", "F")),
    *gqa.EMBEDDINGS[1:],
)

PHI3 = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    rules=_RULES,
    dims=gqa.dims,
    flags={},
    aliases=(gqa.TIED_HEAD,),
    fields=gqa.FIELDS,
    constants=gqa.CONSTANTS | {"add_bias_linear": False, "add_qkv_bias": False},
    derived=gqa.derived,
    caveats=gqa.caveats,
    ignored=gqa.IGNORED,
)
