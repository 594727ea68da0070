"""Qwen2, Qwen2.5 (biases on query, key and value) and Qwen3 (norms on query and key), dense or of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import gqa, moe
from shardway.families.family import Family, Field, Layer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardway.families.config import HFConfig


def _derived(config: HFConfig) -> dict[str, object]:
    windowed = config.flag("use_sliding_window", default=False)
    return gqa.rope(config) | (gqa.window(config) if windowed else {})


def _restore(fields: Mapping[str, object]) -> dict[str, object]:
    config = gqa.restore(fields)
    return config | {"use_sliding_window": config["sliding_window"] is not None}


def _bias_caveats(config: HFConfig) -> list[str]:
    found = gqa.caveats(config)
    if config.flag("attention_bias", default=False):
        found.append(gqa.NO_PROJ_BIAS)
    return found


QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    rules=gqa.RULES,
    dims=gqa.dims,
    aliases=(gqa.TIED_HEAD,),
    flags={"qkv_bias": True, "proj_bias": False, "mlp_bias": False, "qk_norm": False},
    restore=_restore,
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
    dims=gqa.dims_with(head_dim=128),
    aliases=(gqa.TIED_HEAD,),
    flags={"qkv_bias": "attention_bias", "proj_bias": "attention_bias", "mlp_bias": False, "qk_norm": True},
    restore=_restore,
    fields=(*gqa.FIELDS, Field("attention_bias", "add_qkv_bias", default=False)),
    constants=gqa.CONSTANTS | {"add_bias_linear": False, "qk_layernorm": True},
    derived=_derived,
    caveats=_bias_caveats,
    ignored=gqa.IGNORED,
)


def _moe_dims(config: HFConfig) -> dict[str, int]:
    return gqa.dims(config) | {"E": moe.num_experts(config), "Fe": config.count("moe_intermediate_size")}


def moe_layers(config: HFConfig, dims: Mapping[str, int]) -> dict[str, Sequence[Layer]]:
    """Which layers are mixtures of experts: every `decoder_sparse_step`-th, but for those listed as dense."""
    step = config.count("decoder_sparse_step", 1)
    listed = config.get("mlp_only_layers")
    dense = set(listed) if isinstance(listed, list) else set()
    kinds = [
        frozenset({"moe"}) if layer not in dense and (layer + 1) % step == 0 else frozenset({"dense"})
        for layer in range(dims["L"])
    ]
    return {"i": tuple(Layer(kinds=kind) for kind in kinds)}


def _moe_derived(config: HFConfig) -> dict[str, object]:
    fields = _derived(config) | {"moe_router_pre_softmax": not config.flag("norm_topk_prob", default=False)}
    layers = moe_layers(config, {"L": config.count("num_hidden_layers")})["i"]
    sparse = [int("moe" in layer.kinds) for layer in layers]
    return fields if all(sparse) else fields | {"moe_layer_freq": sparse}


def _restore_moe(fields: Mapping[str, object]) -> dict[str, object]:
    frequency = fields.get("moe_layer_freq", 1)
    dense = [layer for layer, sparse in enumerate(frequency) if not sparse] if isinstance(frequency, list) else []
    return _restore(fields) | {
        "norm_topk_prob": not fields.get("moe_router_pre_softmax", False),
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }


QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    rules=(
        gqa.EMBEDDINGS[0],
        *gqa.ATTENTION,
        *gqa.dense(gqa.GATED_MLP),
        *moe.norm("model.layers.{i}.post_attention_layernorm.weight"),
        *moe.router("model.layers.{i}.mlp.gate.weight"),
        *moe.experts("model.layers.{i}.mlp.experts"),
        *gqa.EMBEDDINGS[1:],
    ),
    dims=_moe_dims,
    flags={"qkv_bias": "attention_bias", "proj_bias": "attention_bias", "mlp_bias": False, "qk_norm": True},
    stacks=moe_layers,
    kinds=("moe", "dense"),
    variants=(moe.PACKED, moe.TE),
    aliases=(gqa.TIED_HEAD,),
    restore=_restore_moe,
    fields=(*gqa.FIELDS, *moe.FIELDS, Field("attention_bias", "add_qkv_bias", default=False)),
    constants=gqa.CONSTANTS | dict(moe.CONSTANTS) | {"add_bias_linear": False, "qk_layernorm": True},
    derived=_moe_derived,
    caveats=_bias_caveats,
)
