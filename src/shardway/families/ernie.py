"""ERNIE 4.5 of experts: rotary positions in pairs, a mixture of experts after some dense layers.

Released models carry a block of multi-token prediction without a final norm, which megatron-core's own layers of that
kind all have. A Megatron model has no use for it; checkpoints keep it, so that an export gives it back.

Source: transformers `modeling_ernie4_5_moe.py` (5.23), the index of baidu/ERNIE-4.5-21B-A3B-PT, SGLang
`ernie4_eagle.py`; Megatron Bridge `ernie_45_bridge.py` (0.7.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import gqa, moe
from shardway.families.bridge import BLOCK_SPEC
from shardway.families.family import Family, Field, Layer, Provider, Variant
from shardway.families.rules import Rule, renamed, same

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardway.families.config import HFConfig

_MLP = "model.layers.{i}.mlp"

_ROUTER = moe.router(f"{_MLP}.gate.weight", expert_bias=f"{_MLP}.moe_statics.e_score_correction_bias", bias_axes="1 E")

_MTP = Variant(flag="mtp", hf=r"model\.mtp_block\.\d+\.", mcore=r"mtp\.layers\.", default=True)

_ROUTING = (
    "megatron-core adds an expert bias to sigmoid scores only; this model routes by softmax, so a Megatron model will "
    "choose and weigh experts otherwise"
)
_NO_MTP = (
    "megatron-core's layers of multi-token prediction end in a norm, this model's don't; a Megatron model leaves them "
    "in the checkpoint"
)


def _dims(config: HFConfig) -> dict[str, int]:
    width = config.count("moe_intermediate_size")
    found = gqa.dims(config) | {"E": moe.num_experts(config), "Fe": width}
    if num_shared := config.whole("moe_num_shared_experts", 2):
        found["Fs"] = width * num_shared
    return found


def _layers(config: HFConfig, dims: Mapping[str, int]) -> dict[str, Sequence[Layer]]:
    """Every `moe_layer_interval`-th layer from the first to the last that may be a mixture of experts."""
    first, step = config.whole("moe_layer_start_index", 1), config.count("moe_layer_interval", 1)
    end = config.get("moe_layer_end_index")
    last = end if isinstance(end, int) and end >= 0 else dims["L"] - 1
    kinds = ["moe" if first <= at <= last and (at + 1) % step == 0 else "dense" for at in range(dims["L"])]
    num_predicting = config.few("num_nextn_predict_layers", 0)
    return {
        "i": tuple(Layer(kinds=frozenset({kind})) for kind in kinds),
        "k": (Layer(kinds=frozenset({"dense"})),) * num_predicting,
    }


def _derived(config: HFConfig) -> dict[str, object]:
    layers = _layers(config, {"L": config.count("num_hidden_layers")})["i"]
    return gqa.rope(config) | moe.layer_freq(layers)


def _restore(fields: Mapping[str, object]) -> dict[str, object]:
    config = {"hidden_act": fields.get("activation_func", "silu")} | gqa.restore_rope(fields)
    frequency = fields.get("moe_layer_freq")
    mixtures = [layer for layer, sparse in enumerate(frequency) if sparse] if isinstance(frequency, list) else []
    if mixtures:
        config |= {
            "moe_layer_start_index": mixtures[0],
            "moe_layer_end_index": mixtures[-1],
            "moe_layer_interval": mixtures[1] - mixtures[0] if len(mixtures) > 1 else 1,
        }
    return config | {"moe_num_shared_experts": moe.num_shared_experts(fields)}


def _caveats(config: HFConfig) -> list[str]:
    found = [*gqa.caveats(config), _ROUTING]
    if config.few("num_nextn_predict_layers", 0):
        found.append(_NO_MTP)
    return found


def _mtp_block() -> tuple[Rule, ...]:
    at = "mtp.layers.{k}"
    return (
        Rule(f"{at}.enorm.weight", same("model.mtp_emb_norm.{k}.weight", "H"), when="mtp"),
        Rule(f"{at}.hnorm.weight", same("model.mtp_hidden_norm.{k}.weight", "H"), when="mtp"),
        Rule(f"{at}.eh_proj.weight", same("model.mtp_linear_proj.{k}.weight", "H", "2*H"), when="mtp"),
        *renamed(
            (*gqa.ATTENTION, *gqa.dense(gqa.GATED_MLP)),
            mcore=("decoder.layers.{i}", f"{at}.transformer_layer"),
            hf=("model.layers.{i}", "model.mtp_block.{k}"),
            when="mtp",
        ),
    )


ERNIE4_5_MOE = Family(
    name="ernie4_5_moe",
    architectures=("Ernie4_5_MoeForCausalLM",),
    rules=(
        gqa.EMBEDDINGS[0],
        *gqa.ATTENTION,
        *gqa.dense(gqa.GATED_MLP),
        *moe.norm("model.layers.{i}.post_attention_layernorm.weight"),
        *moe.otherwise_when_packed(_ROUTER, "mlp.moe_statics", "mlp.gate.moe_statics"),
        *moe.experts(f"{_MLP}.experts"),
        *moe.shared_experts(f"{_MLP}.shared_experts"),
        *_mtp_block(),
        *gqa.EMBEDDINGS[1:],
    ),
    dims=_dims,
    flags={
        "qkv_bias": "use_bias",
        "proj_bias": "use_bias",
        "mlp_bias": "use_bias",
        "qk_norm": False,
        "expert_bias": True,
        "shared_experts": lambda config: config.whole("moe_num_shared_experts", 2) > 0,
    },
    stacks=_layers,
    kinds=("moe", "dense"),
    per_layer=True,
    variants=(moe.PACKED, moe.TE, _MTP),
    aliases=(gqa.TIED_HEAD,),
    provider=Provider(layer_spec=BLOCK_SPEC),
    hf_keys={"num_moe_experts": "moe_num_experts"},
    restore=_restore,
    tied_by_default=True,
    fields=(
        *gqa.FIELDS,
        Field("moe_k", "moe_router_topk", 6),
        Field("router_aux_loss_coef", "moe_aux_loss_coeff", 0.001),
        Field("use_bias", "add_bias_linear", default=False),
        Field("use_bias", "add_qkv_bias", default=False),
    ),
    constants=gqa.CONSTANTS
    | dict(moe.CONSTANTS)
    | dict(moe.SIGMOID)
    | {
        "rotary_interleaved": True,
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "aux_loss",
    },
    derived=_derived,
    caveats=_caveats,
)
