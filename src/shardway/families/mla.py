"""The block that models with multi-head latent attention share, and the layers of multi-token prediction they have."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from shardway.families import gqa
from shardway.families.bridge import BLOCK_SPEC, MLA
from shardway.families.family import Alias, Field, Layer, Provider, Variant
from shardway.families.rules import Rule, renamed, same

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shardway.families.config import HFConfig

_AT = "decoder.layers.{i}.self_attention"
_HF = "model.layers.{i}.self_attn"

# What Megatron Bridge sets for all of these models, and for most.
FUSIONS: Mapping[str, object] = {
    "bias_activation_fusion": True,
    "bias_dropout_fusion": True,
    "persist_layer_norm": True,
}
PROVIDER = Provider(
    target=MLA,
    fields={
        **FUSIONS,
        "attention_softmax_in_fp32": False,
        "cross_entropy_fusion_impl": "te",
        "cross_entropy_loss_fusion": True,
        "gradient_accumulation_fusion": True,
        "masked_softmax_fusion": True,
    },
    vocabulary_multiple=1280,
    layer_spec=BLOCK_SPEC,
)


def attention(fused: str = "te") -> tuple[Rule, ...]:
    """Latent attention and the norm before it.

    Extents: Q rank of the query, R rank of keys and values, qk what a head compares without positions, rope what it
    compares with them, dv what it gives.

    Args:
        fused: The flag that says whether the norms of the latent vectors belong to the projections after them.
    """
    return (
        Rule("decoder.layers.{i}.input_layernorm.weight", same("model.layers.{i}.input_layernorm.weight", "H")),
        Rule(f"{_AT}.linear_q_proj.weight", same(f"{_HF}.q_proj.weight", "nq*qk+nq*rope", "H"), when="!q_lora"),
        Rule(f"{_AT}.linear_q_down_proj.weight", same(f"{_HF}.q_a_proj.weight", "Q", "H"), when="q_lora"),
        Rule(f"{_AT}.linear_q_down_proj.bias", same(f"{_HF}.q_a_proj.bias", "Q"), when="q_lora bias"),
        Rule(
            f"{_AT}.linear_q_up_proj.layer_norm_weight",
            same(f"{_HF}.q_a_layernorm.weight", "Q"),
            when=f"q_lora {fused}",
        ),
        Rule(f"{_AT}.q_layernorm.weight", same(f"{_HF}.q_a_layernorm.weight", "Q"), when=f"q_lora !{fused}"),
        Rule(f"{_AT}.linear_q_up_proj.weight", same(f"{_HF}.q_b_proj.weight", "nq*qk+nq*rope", "Q"), when="q_lora"),
        Rule(f"{_AT}.linear_kv_down_proj.weight", same(f"{_HF}.kv_a_proj_with_mqa.weight", "R+rope", "H")),
        Rule(f"{_AT}.linear_kv_down_proj.bias", same(f"{_HF}.kv_a_proj_with_mqa.bias", "R+rope"), when="bias"),
        Rule(f"{_AT}.linear_kv_up_proj.layer_norm_weight", same(f"{_HF}.kv_a_layernorm.weight", "R"), when=fused),
        Rule(f"{_AT}.kv_layernorm.weight", same(f"{_HF}.kv_a_layernorm.weight", "R"), when=f"!{fused}"),
        Rule(f"{_AT}.linear_kv_up_proj.weight", same(f"{_HF}.kv_b_proj.weight", "nq*qk+nq*dv", "R")),
        Rule(f"{_AT}.linear_proj.weight", same(f"{_HF}.o_proj.weight", "H", "nq*dv")),
        Rule(f"{_AT}.linear_proj.bias", same(f"{_HF}.o_proj.bias", "H"), when="bias"),
    )


# What transformers' norms of latent vectors add to the mean of squares, whatever the config says.
_EPSILON = 1e-6

# The norm before an MLP. megatron-core's own layers keep it apart from the MLP in models with latent attention.
NORM = (
    Rule(
        "decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight",
        same("model.layers.{i}.post_attention_layernorm.weight", "H"),
        when="dense te",
    ),
    Rule(
        "decoder.layers.{i}.pre_mlp_layernorm.weight",
        same("model.layers.{i}.post_attention_layernorm.weight", "H"),
        when="dense !te",
    ),
    Rule(
        "decoder.layers.{i}.pre_mlp_layernorm.weight",
        same("model.layers.{i}.post_attention_layernorm.weight", "H"),
        when="moe",
    ),
)

# Layers of Transformer Engine, as opposed to megatron-core's own.
TE = Variant(flag="te", mcore=r"decoder\..+\.self_attention\.linear_kv_up_proj\.layer_norm_weight$", default=True)

# Whether the weights hold the layers that the config promises: transformers leaves them out when it saves a model.
MTP = Variant(flag="mtp", hf=r"model\.layers\.\d+\.eh_proj\.weight$", mcore=r"mtp\.layers\.", default=True)


def mtp(rules: Iterable[Rule], *, final_norm: str = "shared_head.norm") -> tuple[Rule, ...]:
    """The layers of multi-token prediction: each is a layer of the decoder and what joins it to the one before.

    Args:
        rules: Rules of a decoder layer.
        final_norm: What the norm after such a layer is called.

    Hugging Face numbers them on from the decoder's.

    Source: megatron/core/transformer/multi_token_prediction.py (0.16.1).
    """
    at, hf = "mtp.layers.{k}", "model.layers.{n}"
    return (
        Rule(f"{at}.enorm.weight", same(f"{hf}.enorm.weight", "H"), when="mtp"),
        Rule(f"{at}.hnorm.weight", same(f"{hf}.hnorm.weight", "H"), when="mtp"),
        Rule(f"{at}.eh_proj.weight", same(f"{hf}.eh_proj.weight", "H", "2*H"), when="mtp"),
        *renamed(
            rules,
            mcore=("decoder.layers.{i}", f"{at}.transformer_layer"),
            hf=("model.layers.{i}", hf),
            when="mtp",
        ),
        Rule(f"{at}.final_layernorm.weight", same(f"{hf}.{final_norm}.weight", "H"), when="mtp"),
    )


# Copies of the main embedding and head, which released models carry with each layer of multi-token prediction.
ALIASES = (
    Alias(hf="model.layers.{n}.embed_tokens.weight", of="model.embed_tokens.weight", when="mtp", restored=True),
    Alias(hf="model.layers.{n}.shared_head.head.weight", of="lm_head.weight", when="mtp !tied", restored=True),
    Alias(
        hf="model.layers.{n}.shared_head.head.weight", of="model.embed_tokens.weight", when="mtp tied", restored=True
    ),
)


def dims(config: HFConfig) -> dict[str, int]:
    """The dimensions of a model with latent attention, and Q, R, qk, rope and dv of its attention.

    The size of a head is that of its part with positions, as transformers has it for these models.

    Raises:
        ShardwayError: `config-invalid`.
    """
    heads, rope = config.count("num_attention_heads"), config.count("qk_rope_head_dim")
    found = {
        "L": config.count("num_hidden_layers"),
        "H": config.count("hidden_size"),
        "F": config.count("intermediate_size"),
        "V": config.count("vocab_size"),
        "nq": heads,
        "G": config.count("num_key_value_heads", heads),
        "d": rope,
        "R": config.count("kv_lora_rank"),
        "qk": config.count("qk_nope_head_dim"),
        "rope": rope,
        "dv": config.count("v_head_dim"),
    }
    if has_q_lora(config):
        found["Q"] = config.count("q_lora_rank")
    return found


def has_q_lora(config: HFConfig) -> bool:
    """Whether queries too go through a latent vector."""
    return config.get("q_lora_rank") is not None


def dense_then_moe(config: HFConfig, dims: Mapping[str, int], *, dense: int = 0) -> dict[str, Sequence[Layer]]:
    """Some dense layers, then mixtures of experts; layers of multi-token prediction are mixtures too.

    Args:
        config: The model's config.json: ``mlp_layer_types``, or else ``first_k_dense_replace`` and ``moe_layer_freq``.
        dims: What the family computed from it.
        dense: What an absent ``first_k_dense_replace`` means.

    Raises:
        ShardwayError: `config-invalid`.
    """
    kinds = {True: frozenset({"moe"}), False: frozenset({"dense"})}
    listed = config.get("mlp_layer_types")
    if listed is not None:
        if not isinstance(listed, list) or len(listed) != dims["L"] or not set(listed) <= {"dense", "sparse"}:
            raise config.invalid("mlp_layer_types", listed, f'"dense" or "sparse" for each of {dims["L"]} layers')
        moe = [kind == "sparse" for kind in listed]
    else:
        num_dense, step = config.whole("first_k_dense_replace", dense), config.count("moe_layer_freq", 1)
        moe = [layer >= num_dense and layer % step == 0 for layer in range(dims["L"])]
    num_predicting = config.few("num_nextn_predict_layers", 0)
    return {
        "i": tuple(Layer(kinds=kinds[is_moe]) for is_moe in moe),
        "k": tuple(Layer(kinds=kinds[True], names={"n": dims["L"] + k}) for k in range(num_predicting)),
    }


FIELDS = (
    *gqa.FIELDS,
    Field("kv_lora_rank", "kv_lora_rank"),
    Field("qk_nope_head_dim", "qk_head_dim"),
    Field("qk_rope_head_dim", "qk_pos_emb_head_dim"),
    Field("v_head_dim", "v_head_dim"),
    Field("num_nextn_predict_layers", "mtp_num_layers"),
)

CONSTANTS: Mapping[str, object] = gqa.CONSTANTS | {
    "add_bias_linear": False,
    "multi_latent_attention": True,
    "qk_layernorm": True,
}


def derived(config: HFConfig) -> dict[str, object]:
    """Megatron config fields that take more than another name: the query's rank, and rotary positions.

    megatron-core has YaRN alone here, which with a factor of 1 is the plain embedding. A rank that is absent has to be
    said, for absent means 512 there.

    Source: Megatron Bridge `model_bridge.py` (0.7.0); megatron/core/transformer/multi_latent_attention.py (0.16.1).
    """
    parameters = config.rope
    fields: dict[str, object] = {
        "q_lora_rank": config.count("q_lora_rank") if has_q_lora(config) else None,
        "rotary_base": parameters.get("rope_theta", 10000.0),
        "rotary_scaling_factor": 1.0,
        "mscale_all_dim": 1.0,
    }
    if parameters["rope_type"] != "yarn":
        return fields
    longest = config.count("max_position_embeddings")
    original = parameters.get("original_max_position_embeddings") or longest
    return fields | {
        "rotary_scaling_factor": _factor(config),
        "original_max_position_embeddings": original,
        "beta_fast": parameters.get("beta_fast") or 32.0,
        "beta_slow": parameters.get("beta_slow") or 1.0,
        "mscale": _number(parameters.get("mscale"), 1.0),
        "mscale_all_dim": _number(parameters.get("mscale_all_dim"), 0.0),
    }


def _number(value: object, default: float) -> float:
    return float(value) if isinstance(value, int | float) else default


def _factor(config: HFConfig) -> float:
    """The factor of YaRN; by default how much longer the longest sequence is than the original's."""
    longest = config.count("max_position_embeddings")
    original = _number(config.rope.get("original_max_position_embeddings"), longest)
    return _number(config.rope.get("factor"), longest / original if original else 1.0)


def restore(fields: Mapping[str, object]) -> dict[str, object]:
    """What config.json has beside dimensions and `FIELDS`; the way back from `derived`."""
    config: dict[str, object] = {
        "hidden_act": fields.get("activation_func", "silu"),
        "head_dim": fields.get("qk_pos_emb_head_dim"),
        "num_nextn_predict_layers": fields.get("mtp_num_layers") or 0,
        "q_lora_rank": fields.get("q_lora_rank"),
        "rope_theta": fields.get("rotary_base", 10000.0),
        "rope_scaling": None,
    }
    if fields.get("rotary_scaling_factor", 1.0) != 1.0:
        names = {"factor": "rotary_scaling_factor"}
        names |= {name: name for name in ("original_max_position_embeddings", "beta_fast", "beta_slow")}
        names |= {name: name for name in ("mscale", "mscale_all_dim")}
        found = {key: fields[name] for key, name in names.items() if fields.get(name) is not None}
        config["rope_scaling"] = {"type": "yarn", **found}
    return config


def caveats(config: HFConfig) -> list[str]:
    """What a Megatron model built from the translated config would do otherwise than transformers.

    Source: `yarn_apply_mscale` and `_compute_yarn_parameters` of transformers (5.24);
    megatron/core/transformer/multi_latent_attention.py (0.16.1).
    """
    parameters = config.rope
    kind, activation = parameters["rope_type"], config.get("hidden_act")
    found = []
    if kind not in ("default", "yarn"):
        found.append(f"megatron-core's latent attention has no rotary embedding of type {kind!r}, but plain ones")
    if kind == "yarn" and not _scales_alike(config):
        found.append("megatron-core scales what it rotates otherwise than this model's attention_factor and mscale say")
    if kind == "yarn" and parameters.get("truncate") is False:
        found.append("megatron-core rounds the range in which YaRN interpolates to whole dimensions")
    if config.number("rms_norm_eps", _EPSILON) != _EPSILON:
        found.append(f"megatron-core's norms of latent vectors add rms_norm_eps; those of transformers, {_EPSILON}")
    if not config.flag("rope_interleave", default=True):
        found.append("megatron-core rotates neighbouring dimensions; this model, those half a head apart")
    if config.flag("attention_bias", default=False):
        found.append("megatron-core's latent attention has no biases and will ignore those in the checkpoint")
    if activation not in (None, "silu", "swish"):
        found.append(f"the translated config says silu, but the model's activation is {activation!r}")
    return found


def _scales_alike(config: HFConfig) -> bool:
    parameters, factor = config.rope, _factor(config)

    def stretch(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = _number(parameters.get("mscale"), 0.0), _number(parameters.get("mscale_all_dim"), 0.0)
    theirs = stretch(mscale) / stretch(all_dim) if mscale and all_dim else stretch(1.0)
    theirs = _number(parameters.get("attention_factor"), theirs)
    ours = stretch(_number(parameters.get("mscale"), 1.0)) / stretch(all_dim)
    return math.isclose(ours, theirs, rel_tol=1e-6)
