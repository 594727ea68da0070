"""Qwen3-Next and Qwen3.5: gated delta nets with gated attention between, dense or of experts.

The layer of multi-token prediction is a decoder layer with attention. Qwen3-Next's config doesn't say whether it is
there, so the names of the tensors do.

Source: Megatron Bridge 0.7.0 (models/qwen); the modelling code of transformers 5.24 (qwen3_next, qwen3_5, qwen3_5_moe).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import gdn, gqa, moe
from shardway.families.bridge import GDN_SPEC
from shardway.families.config import HFConfig
from shardway.families.family import Family, Field, Layer, Provider, Variant
from shardway.families.qwen import moe_layers
from shardway.families.rules import Rule, only_when, renamed, same

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shardway.families.family import Flags

_KINDS = {"linear_attention": "delta", "full_attention": "attention"}
_PARTIAL = 0.25  # of a head, what is rotated unless the config says otherwise


def _layer(delta: Iterable[Rule]) -> tuple[Rule, ...]:
    return (
        *only_when(delta, "delta"),
        *only_when(gdn.ATTENTION, "attention"),
        *gqa.dense(gqa.GATED_MLP),
        *moe.norm("model.layers.{i}.post_attention_layernorm.weight"),
        *moe.router("model.layers.{i}.mlp.gate.weight"),
        *moe.experts("model.layers.{i}.mlp.experts"),
        *moe.shared_experts(
            "model.layers.{i}.mlp.shared_expert", gate="model.layers.{i}.mlp.shared_expert_gate.weight"
        ),
    )


def _mtp(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The layer that predicts one token more, whose experts may be packed where the decoder's are not."""
    layer = renamed(
        rules,
        mcore=("decoder.layers.{i}", "mtp.layers.{k}.transformer_layer"),
        hf=("model.layers.{i}", "mtp.layers.{k}"),
    )
    return only_when(
        (
            Rule("mtp.layers.{k}.enorm.weight", same("mtp.pre_fc_norm_embedding.weight", "H")),
            Rule("mtp.layers.{k}.hnorm.weight", same("mtp.pre_fc_norm_hidden.weight", "H")),
            Rule("mtp.layers.{k}.eh_proj.weight", same("mtp.fc.weight", "H", "2*H")),
            *(rule._replace(when=rule.when.replace("packed_experts", "packed_mtp")) for rule in layer),
            Rule("mtp.layers.{k}.final_layernorm.weight", same("mtp.norm.weight", "H")),
        ),
        "mtp",
    )


def _rules(delta: Iterable[Rule]) -> tuple[Rule, ...]:
    layer = _layer(delta)
    return (gqa.EMBEDDINGS[0], *layer, *_mtp(layer), *gqa.EMBEDDINGS[1:])


def _is_moe(config: HFConfig) -> bool:
    return config.architecture != "Qwen3_5ForCausalLM"


def _dims(config: HFConfig) -> dict[str, int]:
    values = dict(config.values)
    if _is_moe(config) and values.get("intermediate_size") is None:  # no layer is dense; megatron-core's own default
        values["intermediate_size"] = 4 * config.count("hidden_size")
    found = gqa.dims(HFConfig(values, config.file), 256) | gdn.dims(config)
    if not _is_moe(config):
        return found
    found |= {"E": moe.num_experts(config), "Fe": config.count("moe_intermediate_size")}
    return found | {"Fs": config.count("shared_expert_intermediate_size")}


def _attention(config: HFConfig) -> list[str]:
    """For each layer of the decoder, what stands in the place of attention, in transformers' words.

    Raises:
        ShardwayError: `config-invalid`.
    """
    number, listed = config.count("num_hidden_layers"), config.get("layer_types")
    if listed is None:
        interval = config.count("full_attention_interval", 4)
        return [("linear" if layer % interval else "full") + "_attention" for layer in range(1, number + 1)]
    if not isinstance(listed, list) or len(listed) != number or not all(kind in _KINDS for kind in listed):
        raise config.invalid("layer_types", listed, f"a list of {number} of {', '.join(_KINDS)}")
    return listed


def _stacks(config: HFConfig, dims: Mapping[str, int]) -> dict[str, Sequence[Layer]]:
    if _is_moe(config):
        mlps = [layer.kinds for layer in moe_layers(config, dims)["i"]]
    else:
        mlps = [frozenset({"dense"})] * dims["L"]
    number = config.whole("mtp_num_hidden_layers", 1)
    if number > 1:
        raise config.invalid("mtp_num_hidden_layers", number, "0 or 1: there is one projection into such a layer")
    last = frozenset({"moe" if _is_moe(config) else "dense", "attention"})
    return {
        "i": tuple(Layer(kinds=mlp | {_KINDS[kind]}) for mlp, kind in zip(mlps, _attention(config), strict=True)),
        "k": (Layer(kinds=last),) * number,
    }


def _derived(config: HFConfig) -> dict[str, object]:
    fields = gqa.rope(config, partial=_PARTIAL)
    fields["linear_attention_freq"] = [int(kind == "linear_attention") for kind in _attention(config)]
    fields["mtp_num_layers"] = config.whole("mtp_num_hidden_layers", 1)
    if not _is_moe(config):
        return fields
    fields |= {**moe.CONSTANTS, "moe_shared_expert_gate": True, "moe_router_load_balancing_type": "global_aux_loss"}
    fields["moe_router_pre_softmax"] = not config.flag("norm_topk_prob", default=True)
    sparse = [int("moe" in layer.kinds) for layer in _stacks(config, {"L": config.count("num_hidden_layers")})["i"]]
    return fields if all(sparse) else fields | {"moe_layer_freq": sparse}


def _restore(fields: Mapping[str, object]) -> dict[str, object]:
    config = gqa.restore_rope(fields) | {"hidden_act": fields.get("activation_func", "silu")}
    config["partial_rotary_factor"] = fields.get("rotary_percent", 1.0)
    frequency, number = fields.get("linear_attention_freq"), fields.get("num_layers")
    if isinstance(frequency, int) and isinstance(number, int) and frequency > 0:
        frequency = [int(layer % frequency != 0) for layer in range(1, number + 1)]
    if isinstance(frequency, list):
        config["layer_types"] = ["linear_attention" if linear else "full_attention" for linear in frequency]
    if fields.get("num_moe_experts") is None:
        return config
    sparse = fields.get("moe_layer_freq", 1)
    return config | {
        "shared_expert_intermediate_size": fields.get("moe_shared_expert_intermediate_size"),
        "norm_topk_prob": not fields.get("moe_router_pre_softmax", False),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [at for at, one in enumerate(sparse) if not one] if isinstance(sparse, list) else [],
    }


def _restore_promising(fields: Mapping[str, object]) -> dict[str, object]:
    return _restore(fields) | {"mtp_num_hidden_layers": fields.get("mtp_num_layers") or 0}


def _caveats(config: HFConfig) -> list[str]:
    found = gqa.caveats(config)
    if config.flag("attention_bias", default=False):
        found.append(gqa.NO_PROJ_BIAS)
    return found


_FLAGS: Flags = {
    "qkv_bias": "attention_bias",
    "proj_bias": "attention_bias",
    "mlp_bias": False,
    "qk_norm": True,
    "shared_experts": True,
}
_MOE_VARIANTS = (
    moe.PACKED,
    Variant(flag="packed_mtp", hf=r"mtp\.layers\.\d+\.mlp\.experts\.gate_up_proj$"),
    moe.TE,
)
# Whether weights are there that Qwen3-Next's config says nothing of, and Qwen3.5's may.
_FOUND = Variant(flag="mtp", hf=r"mtp\.", mcore=r"mtp\.layers\.")
_KINDS_OF_LAYERS = ("delta", "attention", "moe", "dense")
_FIELDS = (
    *gqa.FIELDS,
    Field("attention_bias", "add_qkv_bias", default=False),
    Field("linear_conv_kernel_dim", "linear_conv_kernel_dim", 4),
    Field("linear_key_head_dim", "linear_key_head_dim"),
    Field("linear_value_head_dim", "linear_value_head_dim"),
    Field("linear_num_key_heads", "linear_num_key_heads"),
    Field("linear_num_value_heads", "linear_num_value_heads"),
)
_CONSTANTS = gqa.CONSTANTS | {
    "add_bias_linear": False,
    "qk_layernorm": True,
    "layernorm_zero_centered_gamma": True,
    "attention_output_gate": True,
    "experimental_attention_variant": "gated_delta_net",
    "hetereogenous_dist_checkpoint": True,  # sic
}
_PROVIDER = Provider(layer_spec=GDN_SPEC, layer_options={})

QWEN3_NEXT = Family(
    name="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    rules=_rules(gdn.INTERLEAVED),
    dims=_dims,
    flags=_FLAGS,
    stacks=_stacks,
    kinds=_KINDS_OF_LAYERS,
    per_layer=True,
    variants=(*_MOE_VARIANTS, _FOUND),
    aliases=(gqa.TIED_HEAD,),
    provider=_PROVIDER,
    restore=_restore,
    fields=(*_FIELDS, *moe.FIELDS),
    constants=_CONSTANTS | {"moe_router_dtype": "fp32"},
    derived=_derived,
    caveats=_caveats,
)

QWEN3_5 = Family(
    name="qwen3_5_text",
    architectures=("Qwen3_5ForCausalLM",),
    rules=_rules(gdn.SEPARATE),
    dims=_dims,
    flags=_FLAGS,
    stacks=_stacks,
    kinds=_KINDS_OF_LAYERS,
    per_layer=True,
    variants=(*_MOE_VARIANTS, _FOUND),
    aliases=(gqa.TIED_HEAD,),
    provider=_PROVIDER,
    restore=_restore_promising,
    fields=_FIELDS,
    constants=_CONSTANTS,
    derived=_derived,
    caveats=_caveats,
)

QWEN3_5_MOE = QWEN3_5._replace(
    name="qwen3_5_moe_text",
    architectures=("Qwen3_5MoeForCausalLM",),
    fields=(*_FIELDS, *moe.FIELDS),
)
