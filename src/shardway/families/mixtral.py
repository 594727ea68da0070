"""Mixtral: the block of Mistral with a mixture of experts in every layer.

Source: transformers `modeling_mixtral.py` (5.23) and the index of mistralai/Mixtral-8x7B-v0.1. Megatron Bridge (0.7.0)
has no such family; the Megatron side is that of its other mixtures of experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import gqa, moe
from shardway.families.family import Family

if TYPE_CHECKING:
    from shardway.families.config import HFConfig


def _dims(config: HFConfig) -> dict[str, int]:
    return gqa.dims(config) | {"E": moe.num_experts(config), "Fe": config.count("intermediate_size")}


MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    rules=(
        gqa.EMBEDDINGS[0],
        *gqa.ATTENTION,
        *moe.norm("model.layers.{i}.post_attention_layernorm.weight"),
        *moe.block_sparse(),
        *gqa.EMBEDDINGS[1:],
    ),
    dims=_dims,
    flags={"moe": True, "qkv_bias": False, "proj_bias": False, "qk_norm": False},
    variants=(moe.PACKED, moe.TE),
    aliases=(gqa.TIED_HEAD,),
    hf_keys={"num_moe_experts": "num_local_experts", "moe_ffn_hidden_size": "intermediate_size"},
    restore=gqa.restore,
    fields=(*gqa.FIELDS, *moe.FIELDS),
    constants=gqa.CONSTANTS | dict(moe.CONSTANTS) | {"add_bias_linear": False, "moe_router_pre_softmax": False},
    derived=gqa.derived,
    caveats=gqa.caveats,
    ignored=gqa.IGNORED,
)
