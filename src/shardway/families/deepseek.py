"""DeepSeek-V3 and what is built like it: latent attention, a mixture of experts after some dense layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import gqa, mla, moe
from shardway.families.family import Family

if TYPE_CHECKING:
    from shardway.families.config import HFConfig


def _dims(config: HFConfig) -> dict[str, int]:
    width = config.count("moe_intermediate_size")
    shared = {"Fs": width * config.whole("n_shared_experts", 0)} if config.get("n_shared_experts") else {}
    return mla.dims(config) | {"E": moe.num_experts(config), "Fe": width} | shared


_LAYER = (
    *mla.ATTENTION,
    *mla.NORM,
    *gqa.dense(gqa.GATED_MLP[1:]),
    *moe.router("model.layers.{i}.mlp.gate.weight", expert_bias="model.layers.{i}.mlp.gate.e_score_correction_bias"),
    *moe.experts("model.layers.{i}.mlp.experts"),
    *moe.shared_experts("model.layers.{i}.mlp.shared_experts"),
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    rules=(gqa.EMBEDDINGS[0], *_LAYER, *mla.mtp(_LAYER), *gqa.EMBEDDINGS[1:]),
    dims=_dims,
    flags={
        "q_lora": lambda config: config.get("q_lora_rank") is not None,
        "bias": "attention_bias",
        "mlp_bias": False,
        "expert_bias": True,
        "shared_experts": lambda config: bool(config.get("n_shared_experts")),
    },
    stacks=mla.dense_then_moe,
    kinds=("moe", "dense"),
    per_layer=True,
    variants=(moe.PACKED, mla.TE, mla.MTP),
    aliases=(gqa.TIED_HEAD, *mla.ALIASES),
    fields=(*gqa.FIELDS, *mla.FIELDS, *moe.FIELDS),
    constants=gqa.CONSTANTS,
    derived=gqa.rope,
    caveats=gqa.caveats,
    ignored=gqa.IGNORED,
)
