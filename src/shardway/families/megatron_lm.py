"""The arguments that Megatron-LM keeps in a checkpoint and reads with ``--use-checkpoint-args``, and back.

Source: NVIDIA/Megatron-LM, `load_args_from_checkpoint` in megatron/training/checkpointing.py (main of 2026-08-22);
Megatron Bridge 0.7.0, training/mlm_compat/arguments.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# Fields of megatron-core's config that are arguments under another name.
_RENAMED = {
    "num_moe_experts": "num_experts",
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "mtp_hybrid_override_pattern": "mtp_hybrid_override_pattern",
}
# Where megatron-core has the layers of hybrid models, under the name that all its versions know.
_HYBRID_SPEC = ("megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec")
# What a namespace has to say although it makes no difference to the model.
_NEUTRAL: Mapping[str, object] = {
    "add_position_embedding": True,
    "apply_query_key_layer_scaling": False,
    "bias_gelu_fusion": True,
    "bias_swiglu_fusion": True,
    "ckpt_format": "torch_dist",
    "config_logger_dir": "",
    "cp_comm_type": ["p2p"],
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "expert_model_parallel_size": 1,
    "fp8_param_gather": False,
    "heterogeneous_layers_config_path": None,
    "init_method_xavier_uniform": False,
    "no_persist_layer_norm": False,
    "overlap_p2p_comm": False,
    "pipeline_model_parallel_size": 1,
    "rotary_interleaved": False,
    "tensor_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
}


def args_of(fields: Mapping[str, object], tokenizer: str) -> dict[str, object]:
    """The attributes of the ``args`` namespace for a model; the dtypes are the caller's to add.

    Args:
        fields: `ModelMapping.megatron_config`.
        tokenizer: What Megatron-LM is to load the tokenizer from.
    """
    args: dict[str, object] = dict(_NEUTRAL)
    for name, value in fields.items():
        if name not in ("activation_func", "gated_linear_unit", "share_embeddings_and_output_weights"):
            args[_RENAMED.get(name, name)] = value
    gated, activation = bool(fields.get("gated_linear_unit")), fields.get("activation_func")
    heads, groups = fields["num_attention_heads"], fields.get("num_query_groups")
    if "hybrid_layer_pattern" in fields:
        args["spec"] = list(_HYBRID_SPEC)
    return args | {
        "group_query_attention": groups is not None and groups != heads,
        "is_hybrid_model": "hybrid_layer_pattern" in fields,
        "max_position_embeddings": fields.get("seq_length"),
        "multi_latent_attention": bool(fields.get("multi_latent_attention")),
        "padded_vocab_size": fields["vocab_size"],
        "quick_geglu": gated and activation == "quick_gelu",
        "squared_relu": activation == "squared_relu",
        "swiglu": gated and activation == "silu",
        "tokenizer_model": tokenizer,
        "tokenizer_type": "HuggingFaceTokenizer",
        "untie_embeddings_and_output_weights": not fields.get("share_embeddings_and_output_weights"),
        "use_rotary_position_embeddings": fields.get("position_embedding_type") == "rope",
    }


def fields_of_args(args: Mapping[str, object]) -> dict[str, object]:
    """The fields of megatron-core's config that a namespace gives, as a mapping has them.

    Args:
        args: Attributes of a checkpoint's ``args``, of any origin. What is no number, string, boolean or list of them
            is left out.
    """
    names = {renamed: name for name, renamed in _RENAMED.items()}
    fields: dict[str, object] = {}
    for name, value in args.items():
        plain = isinstance(value, bool | int | float | str)
        if plain or (isinstance(value, list) and all(isinstance(item, bool | int | float | str) for item in value)):
            fields[names.get(name, name)] = value
    fields.pop("padded_vocab_size", None)
    if isinstance(args.get("padded_vocab_size"), int):
        fields.setdefault("vocab_size", args["padded_vocab_size"])
    if "untie_embeddings_and_output_weights" in args:
        fields["share_embeddings_and_output_weights"] = not args["untie_embeddings_and_output_weights"]
    if args.get("swiglu"):
        fields |= {"activation_func": "silu", "gated_linear_unit": True}
    elif args.get("quick_geglu"):
        fields |= {"activation_func": "quick_gelu", "gated_linear_unit": True}
    elif "swiglu" in args:
        fields |= {
            "activation_func": "squared_relu" if args.get("squared_relu") else "gelu",
            "gated_linear_unit": False,
        }
    if args.get("group_query_attention") is False and isinstance(args.get("num_attention_heads"), int):
        fields["num_query_groups"] = args["num_attention_heads"]
    return fields
