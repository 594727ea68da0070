"""The block that most dense models share: RMS norms, grouped-query attention, a gated MLP, rotary positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families.family import Field
from shardway.families.rules import Rule, qkv, rows, same

if TYPE_CHECKING:
    from shardway.families.config import HFConfig

EMBEDDINGS = (
    Rule("embedding.word_embeddings.weight", same("model.embed_tokens.weight", "V", "H")),
    Rule("decoder.final_layernorm.weight", same("model.norm.weight", "H")),
    Rule("output_layer.weight", same("lm_head.weight", "V", "H"), when="!tied"),
)

ATTENTION = (
    Rule(
        "decoder.layers.{i}.self_attention.linear_qkv.layer_norm_weight",
        same("model.layers.{i}.input_layernorm.weight", "H"),
    ),
    Rule(
        "decoder.layers.{i}.self_attention.linear_qkv.weight",
        qkv(
            q="model.layers.{i}.self_attn.q_proj.weight",
            k="model.layers.{i}.self_attn.k_proj.weight",
            v="model.layers.{i}.self_attn.v_proj.weight",
            trailing=("H",),
        ),
    ),
    Rule(
        "decoder.layers.{i}.self_attention.linear_qkv.bias",
        qkv(
            q="model.layers.{i}.self_attn.q_proj.bias",
            k="model.layers.{i}.self_attn.k_proj.bias",
            v="model.layers.{i}.self_attn.v_proj.bias",
        ),
        when="qkv_bias",
    ),
    Rule(
        "decoder.layers.{i}.self_attention.q_layernorm.weight",
        same("model.layers.{i}.self_attn.q_norm.weight", "d"),
        when="qk_norm",
    ),
    Rule(
        "decoder.layers.{i}.self_attention.k_layernorm.weight",
        same("model.layers.{i}.self_attn.k_norm.weight", "d"),
        when="qk_norm",
    ),
    Rule(
        "decoder.layers.{i}.self_attention.linear_proj.weight",
        same("model.layers.{i}.self_attn.o_proj.weight", "H", "nq*d"),
    ),
    Rule(
        "decoder.layers.{i}.self_attention.linear_proj.bias",
        same("model.layers.{i}.self_attn.o_proj.bias", "H"),
        when="proj_bias",
    ),
)

GATED_MLP = (
    Rule(
        "decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight",
        same("model.layers.{i}.post_attention_layernorm.weight", "H"),
    ),
    Rule(
        "decoder.layers.{i}.mlp.linear_fc1.weight",
        rows(
            ("model.layers.{i}.mlp.gate_proj.weight", "F"),
            ("model.layers.{i}.mlp.up_proj.weight", "F"),
            trailing=("H",),
        ),
    ),
    Rule(
        "decoder.layers.{i}.mlp.linear_fc1.bias",
        rows(("model.layers.{i}.mlp.gate_proj.bias", "F"), ("model.layers.{i}.mlp.up_proj.bias", "F")),
        when="mlp_bias",
    ),
    Rule("decoder.layers.{i}.mlp.linear_fc2.weight", same("model.layers.{i}.mlp.down_proj.weight", "H", "F")),
    Rule("decoder.layers.{i}.mlp.linear_fc2.bias", same("model.layers.{i}.mlp.down_proj.bias", "H"), when="mlp_bias"),
)

RULES = (EMBEDDINGS[0], *ATTENTION, *GATED_MLP, *EMBEDDINGS[1:])

FIELDS = (
    Field("max_position_embeddings", "seq_length"),
    Field("rms_norm_eps", "layernorm_epsilon", 1e-6),
    Field("initializer_range", "init_method_std", 0.02),
    Field("attention_dropout", "attention_dropout", 0.0),
)

CONSTANTS = {
    "normalization": "RMSNorm",
    "activation_func": "silu",
    "gated_linear_unit": True,
    "position_embedding_type": "rope",
    "hidden_dropout": 0.0,
}

# Buffers that transformers before 4.32 saved with every layer; the config determines them.
IGNORED = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)


def rope(config: HFConfig) -> dict[str, object]:
    """Rotary position fields of Megatron's config.

    Source: Megatron Bridge `model_bridge.py` (0.7.0), megatron/core/models/common/embeddings/rotary_pos_embedding.py.
    """
    parameters = config.rope
    fields: dict[str, object] = {
        "rotary_base": parameters.get("rope_theta", 10000.0),
        "rotary_percent": config.number("partial_rotary_factor", 1.0),
    }
    match parameters["rope_type"]:
        case "llama3":
            fields |= {"rope_scaling": True, "rope_scaling_factor": parameters.get("factor", 8.0)}
        case "linear":
            fields["seq_len_interpolation_factor"] = parameters.get("factor", 1.0)
        case "yarn":
            fields["position_embedding_type"] = "yarn"
            names = {
                "factor": "yarn_rotary_scaling_factor",
                "original_max_position_embeddings": "yarn_original_max_position_embeddings",
                "beta_fast": "yarn_beta_fast",
                "beta_slow": "yarn_beta_slow",
                "mscale": "yarn_mscale",
                "mscale_all_dim": "yarn_mscale_all_dim",
            }
            fields |= {mcore: parameters[hf] for hf, mcore in names.items() if hf in parameters}
    return fields
