"""MiMo-7B: Qwen2 with layers of multi-token prediction.

Source: Megatron Bridge 0.7.0 (models/mimo); the index of XiaomiMiMo/MiMo-7B-Base.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import gqa
from shardway.families.family import Family, Field, Layer, Variant
from shardway.families.rules import Part, Rule, renamed, same

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardway.families.config import HFConfig

_LAYER = (*gqa.ATTENTION, *gqa.GATED_MLP)
_AT = "mtp.layers.{k}"
_HF = "model.mtp_layers.{k}"

_MTP = (
    Rule(f"{_AT}.enorm.weight", same(f"{_HF}.token_layernorm.weight", "H"), when="mtp"),
    Rule(f"{_AT}.hnorm.weight", same(f"{_HF}.hidden_layernorm.weight", "H"), when="mtp"),
    # Hidden state and embedding are joined in the other order here: the halves of the columns change places.
    Rule(
        f"{_AT}.eh_proj.weight",
        (
            Part(f"{_HF}.input_proj.weight", "H H'@0/2*H", "H H'@H/2*H"),
            Part(f"{_HF}.input_proj.weight", "H H'@H/2*H", "H H'@0/2*H"),
        ),
        when="mtp",
    ),
    *renamed(
        _LAYER,
        mcore=("decoder.layers.{i}", f"{_AT}.transformer_layer"),
        hf=("model.layers.{i}", _HF),
        when="mtp",
    ),
    Rule(f"{_AT}.final_layernorm.weight", same(f"{_HF}.final_layernorm.weight", "H"), when="mtp"),
)


def _stacks(config: HFConfig, _: Mapping[str, int]) -> dict[str, Sequence[Layer]]:
    return {"k": (Layer(),) * config.few("num_nextn_predict_layers", 0)}


def _derived(config: HFConfig) -> dict[str, object]:
    windowed = config.flag("use_sliding_window", default=False)
    return gqa.rope(config) | (gqa.window(config) if windowed else {})


MIMO = Family(
    name="mimo",
    architectures=("MiMoForCausalLM",),
    rules=(gqa.EMBEDDINGS[0], *_LAYER, *_MTP, *gqa.EMBEDDINGS[1:]),
    dims=gqa.dims,
    flags={"qkv_bias": True, "proj_bias": False, "mlp_bias": False, "qk_norm": False},
    stacks=_stacks,
    variants=(Variant(flag="mtp", hf=r"model\.mtp_layers\.", mcore=r"mtp\.layers\.", default=True),),
    aliases=(gqa.TIED_HEAD,),
    fields=(*gqa.FIELDS, Field("num_nextn_predict_layers", "mtp_num_layers")),
    constants=gqa.CONSTANTS | {"add_bias_linear": False, "add_qkv_bias": True},
    derived=_derived,
    caveats=gqa.caveats,
    ignored=gqa.IGNORED,
)
