"""The block that models with multi-head latent attention share, and the layers of multi-token prediction they have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families.family import Alias, Field, Layer, Variant
from shardway.families.rules import Rule, renamed, same

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shardway.families.config import HFConfig

_AT = "decoder.layers.{i}.self_attention"
_HF = "model.layers.{i}.self_attn"

# Extents: Q rank of the query, R rank of keys and values, qk what a head compares without positions, rope what it
# compares with them, dv what it gives.
ATTENTION = (
    Rule("decoder.layers.{i}.input_layernorm.weight", same("model.layers.{i}.input_layernorm.weight", "H")),
    Rule(f"{_AT}.linear_q_proj.weight", same(f"{_HF}.q_proj.weight", "nq*qk+nq*rope", "H"), when="!q_lora"),
    Rule(f"{_AT}.linear_q_down_proj.weight", same(f"{_HF}.q_a_proj.weight", "Q", "H"), when="q_lora"),
    Rule(f"{_AT}.linear_q_down_proj.bias", same(f"{_HF}.q_a_proj.bias", "Q"), when="q_lora bias"),
    Rule(f"{_AT}.linear_q_up_proj.layer_norm_weight", same(f"{_HF}.q_a_layernorm.weight", "Q"), when="q_lora te"),
    Rule(f"{_AT}.q_layernorm.weight", same(f"{_HF}.q_a_layernorm.weight", "Q"), when="q_lora !te"),
    Rule(f"{_AT}.linear_q_up_proj.weight", same(f"{_HF}.q_b_proj.weight", "nq*qk+nq*rope", "Q"), when="q_lora"),
    Rule(f"{_AT}.linear_kv_down_proj.weight", same(f"{_HF}.kv_a_proj_with_mqa.weight", "R+rope", "H")),
    Rule(f"{_AT}.linear_kv_down_proj.bias", same(f"{_HF}.kv_a_proj_with_mqa.bias", "R+rope"), when="bias"),
    Rule(f"{_AT}.linear_kv_up_proj.layer_norm_weight", same(f"{_HF}.kv_a_layernorm.weight", "R"), when="te"),
    Rule(f"{_AT}.kv_layernorm.weight", same(f"{_HF}.kv_a_layernorm.weight", "R"), when="!te"),
    Rule(f"{_AT}.linear_kv_up_proj.weight", same(f"{_HF}.kv_b_proj.weight", "nq*qk+nq*dv", "R")),
    Rule(f"{_AT}.linear_proj.weight", same(f"{_HF}.o_proj.weight", "H", "nq*dv")),
    Rule(f"{_AT}.linear_proj.bias", same(f"{_HF}.o_proj.bias", "H"), when="bias"),
)

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
    """The dimensions of latent attention beside those that every model has.

    Raises:
        ShardwayError: `config-invalid`.
    """
    found = {
        "L": config.count("num_hidden_layers"),
        "H": config.count("hidden_size"),
        "F": config.count("intermediate_size"),
        "V": config.count("vocab_size"),
        "nq": config.count("num_attention_heads"),
        "R": config.count("kv_lora_rank"),
        "qk": config.count("qk_nope_head_dim"),
        "rope": config.count("qk_rope_head_dim"),
        "dv": config.count("v_head_dim"),
    }
    if config.get("q_lora_rank") is not None:
        found["Q"] = config.count("q_lora_rank")
    return found


def dense_then_moe(config: HFConfig, dims: Mapping[str, int]) -> dict[str, Sequence[Layer]]:
    """Some dense layers, then mixtures of experts; layers of multi-token prediction are mixtures too."""
    first = config.get("first_k_dense_replace")
    num_dense = min(first if isinstance(first, int) else 0, dims["L"])
    step = config.count("moe_layer_freq", 1)
    moe = [layer >= num_dense and layer % step == 0 for layer in range(dims["L"])]
    kinds = {True: frozenset({"moe"}), False: frozenset({"dense"})}
    num_predicting = config.whole("num_nextn_predict_layers", 0)
    return {
        "i": tuple(Layer(kinds=kinds[is_moe]) for is_moe in moe),
        "k": tuple(Layer(kinds=kinds[True], names={"n": dims["L"] + k}) for k in range(num_predicting)),
    }


FIELDS = (
    Field("kv_lora_rank", "kv_lora_rank"),
    Field("q_lora_rank", "q_lora_rank"),
    Field("qk_nope_head_dim", "qk_head_dim"),
    Field("qk_rope_head_dim", "qk_pos_emb_head_dim"),
    Field("v_head_dim", "v_head_dim"),
)
