"""The block that most dense models share: RMS norms, grouped-query attention, a gated MLP, rotary positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.families.family import Alias, Field
from shardway.families.rules import Rule, only_when, qkv, rows, same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

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

# Norms that span all query or key heads, in place of those of `qk_norm`.
WIDE_NORMS = (
    Rule(
        "decoder.layers.{i}.self_attention.q_layernorm.weight",
        same("model.layers.{i}.self_attn.q_norm.weight", "nq*d"),
    ),
    Rule(
        "decoder.layers.{i}.self_attention.k_layernorm.weight",
        same("model.layers.{i}.self_attn.k_norm.weight", "G*d"),
    ),
)

NO_WIDE_NORMS = (
    "megatron-core's own query and key norms are of one head each; a model there needs a layer whose norms span all "
    "heads, as Megatron Bridge has for this family"
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


def dense(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules for the dense layers of a model that has others too."""
    return only_when(rules, "dense")


TIED_HEAD = Alias(hf="lm_head.weight", of="model.embed_tokens.weight", when="tied")

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


NO_PROJ_BIAS = (
    "megatron-core has one switch for the biases of linear_proj and the MLP; a model there has no linear_proj.bias and "
    "will ignore the one in the checkpoint"
)

# What megatron-core's rotary embedding holds fixed for Llama 3 scaling (rotary_pos_embedding.py, 0.16.1).
_LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_ROPE_TYPES = ("default", "llama3", "linear", "yarn")


def dims(config: HFConfig, head_dim: int | None = None) -> dict[str, int]:
    """The dimensions of a model with grouped-query attention: L, H, F, V, nq, G, r and d.

    Args:
        config: The model's config.json.
        head_dim: What an absent ``head_dim`` means; None for hidden size over heads.

    Raises:
        ShardwayError: `config-invalid` for values that are missing or contradict each other.
    """
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    groups = config.count("num_key_value_heads", heads)
    if heads % groups:
        raise ShardwayError(
            Problem(
                code=Code.CONFIG_INVALID,
                what=f"{heads} attention heads can't be shared evenly by {groups} key-value heads",
                facts=(f"num_attention_heads {heads} % num_key_value_heads {groups} = {heads % groups}",),
                file=config.file,
            )
        )
    if head_dim is None and config.get("head_dim") is None:
        if hidden % heads:
            raise ShardwayError(
                Problem(
                    code=Code.CONFIG_INVALID,
                    what=f"hidden_size {hidden} is no multiple of {heads} attention heads, and head_dim is missing",
                    file=config.file,
                )
            )
        head_dim = hidden // heads
    return {
        "L": config.count("num_hidden_layers"),
        "H": hidden,
        "F": config.count("intermediate_size"),
        "V": config.count("vocab_size"),
        "nq": heads,
        "G": groups,
        "r": heads // groups,
        "d": config.count("head_dim", head_dim),
    }


def dims_with(*, head_dim: int) -> Callable[[HFConfig], dict[str, int]]:
    """`dims` for a family in which an absent ``head_dim`` means this."""
    return lambda config: dims(config, head_dim)


def derived(config: HFConfig) -> dict[str, object]:
    """Megatron config fields that take more than another name: rotary positions and attention windows."""
    return rope(config) | window(config)


def rope(config: HFConfig, *, partial: float = 1.0) -> dict[str, object]:
    """Rotary position fields of Megatron's config.

    Args:
        config: The model's config.json.
        partial: What an absent ``partial_rotary_factor`` means.

    Source: Megatron Bridge `model_bridge.py` (0.7.0); megatron/core/models/gpt/gpt_model.py (0.16.1).
    """
    parameters = config.rope
    fields: dict[str, object] = {
        "rotary_base": parameters.get("rope_theta", 10000.0),
        "rotary_percent": parameters.get("partial_rotary_factor", config.number("partial_rotary_factor", partial)),
    }
    match parameters["rope_type"]:
        case "llama3":
            fields |= {"rope_scaling": True, "rope_scaling_factor": parameters.get("factor", 8.0)}
        case "linear":
            fields["seq_len_interpolation_factor"] = parameters.get("factor", 1.0)
        case "yarn":
            fields |= {
                "position_embedding_type": "yarn",
                "yarn_rotary_scaling_factor": parameters.get("factor", 1.0),
                "yarn_original_max_position_embeddings": parameters.get(
                    "original_max_position_embeddings", config.count("max_position_embeddings")
                ),
                "yarn_beta_fast": parameters.get("beta_fast") or 32.0,
                "yarn_beta_slow": parameters.get("beta_slow") or 1.0,
                "yarn_mscale": parameters.get("mscale"),
                "yarn_mscale_all_dim": parameters.get("mscale_all_dim"),
                "yarn_correction_range_round_to_int": parameters.get("truncate", True),
            }
    return fields


def window(config: HFConfig) -> dict[str, object]:
    """Sliding-window fields of Megatron's config.

    transformers lets a token see `sliding_window` keys, itself included; Megatron counts those to its left.
    """
    if config.get("sliding_window") is None:
        return {}
    fields: dict[str, object] = {"window_size": [config.count("sliding_window") - 1, 0]}
    num_layers = config.count("num_hidden_layers")
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        windowed = [int(kind == "sliding_attention") for kind in kinds]
    else:
        first = config.get("max_window_layers")
        windowed = [int(layer >= first) if isinstance(first, int) else 1 for layer in range(num_layers)]
    if not any(windowed):
        return {}
    return fields if all(windowed) else fields | {"window_attn_skip_freq": windowed}


def restore(fields: Mapping[str, object]) -> dict[str, object]:
    """What config.json has beside dimensions and `FIELDS`; the way back from `derived`."""
    return {"hidden_act": fields.get("activation_func", "silu")} | restore_rope(fields) | restore_window(fields)


def restore_rope(fields: Mapping[str, object]) -> dict[str, object]:
    """Rotary position parameters in the spelling of released models; the way back from `rope`."""
    config: dict[str, object] = {"rope_theta": fields.get("rotary_base", 10000.0), "rope_scaling": None}
    if fields.get("rotary_percent", 1.0) != 1.0:
        config["partial_rotary_factor"] = fields["rotary_percent"]
    if fields.get("rope_scaling"):
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": fields.get("rope_scaling_factor", 8.0),
            **_LLAMA3_FIXED,
        }
    elif fields.get("position_embedding_type") == "yarn":
        names = {
            "factor": "yarn_rotary_scaling_factor",
            "original_max_position_embeddings": "yarn_original_max_position_embeddings",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
            "mscale": "yarn_mscale",
            "mscale_all_dim": "yarn_mscale_all_dim",
            "truncate": "yarn_correction_range_round_to_int",
        }
        found = {key: fields[name] for key, name in names.items() if fields.get(name) is not None}
        config["rope_scaling"] = {"rope_type": "yarn", **found}
    elif fields.get("seq_len_interpolation_factor") is not None:
        config["rope_scaling"] = {"rope_type": "linear", "factor": fields["seq_len_interpolation_factor"]}
    return config


def restore_window(fields: Mapping[str, object]) -> dict[str, object]:
    """The attention window; the way back from `window`."""
    size = fields.get("window_size")
    if not isinstance(size, list | tuple) or not size or not isinstance(size[0], int):
        return {"sliding_window": None}
    config: dict[str, object] = {"sliding_window": size[0] + 1}
    skips = fields.get("window_attn_skip_freq")
    if isinstance(skips, list):
        config["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in skips]
    return config


def caveats(config: HFConfig) -> list[str]:
    """What a Megatron model built from the translated config would do otherwise than transformers, one sentence each.

    The weights are carried bit for bit all the same. Found by comparing logits with megatron-core 0.16.1.
    """
    activation = config.get("hidden_act")
    found = rope_caveats(config)
    if activation not in (None, "silu", "swish"):
        found.append(f"the translated config says silu, but the model's activation is {activation!r}")
    return found


def rope_caveats(config: HFConfig) -> list[str]:
    """The caveats of rotary positions alone."""
    found = []
    parameters = config.rope
    kind = parameters["rope_type"]
    if kind not in _ROPE_TYPES:
        found.append(f"megatron-core has no rotary embedding of type {kind!r}; a model there would use plain ones")
    if kind == "llama3":
        other = {key: parameters.get(key, fixed) for key, fixed in _LLAMA3_FIXED.items()}
        if other != _LLAMA3_FIXED:
            found.append(f"megatron-core holds {_LLAMA3_FIXED} fixed for llama3 rotary scaling; this model has {other}")
    return found
