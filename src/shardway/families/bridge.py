"""What Megatron Bridge needs to build a model again: its run_config.yaml, as plain data, and back.

Nothing is ever instantiated here: a ``_target_`` is a string that is written, or compared with those that are known.

Source: Megatron Bridge 0.7.0 and 0.3.1 (training/config.py, training/model_load_save.py, utils/instantiate_utils.py).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.families.mapping import ModelMapping

ACTIVATIONS = {
    "silu": "torch.nn.functional.silu",
    "gelu": "torch.nn.functional.gelu",
    "fast_gelu": "megatron.core.activations.fast_gelu",
    "quick_gelu": "megatron.core.activations.quick_gelu",
    "squared_relu": "megatron.core.activations.squared_relu",
}
BLOCK_SPEC = "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec"
GDN_SPEC = (
    "megatron.core.models.gpt.experimental_attention_variant_module_specs."
    "get_transformer_block_with_experimental_attention_variant_spec"
)
MLA = "megatron.bridge.models.mla_provider.MLAModelProvider"

# Types of parameters that Megatron trains in.
TRAINED_IN = ("bfloat16", "float16", "float32")

_CONFIG = "megatron.bridge.training.config"
# Fields that 0.3.1 has no place for.
_SINCE_0_3 = ("yarn_", "mtp_hybrid_override_pattern", "mtp_use_repeated_layer", "keep_mtp_", "mamba_chunk_size")
# What 0.3.1 builds hybrid models with; it knows none with multi-token prediction.
_HYBRID = "megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider"
_HYBRID_0_3 = "megatron.bridge.models.mamba.mamba_provider.MambaModelProvider"


class BridgeVersion(enum.StrEnum):
    """Which Megatron Bridge a run_config.yaml is written for."""

    V0_3 = "0.3.1"
    V0_7 = "0.7.0"


def run_config(
    mapping: ModelMapping, dtype: str | None, tokenizer: str, version: BridgeVersion = BridgeVersion.V0_7
) -> dict[str, object]:
    """The content of run_config.yaml for an imported model.

    Fields that Megatron Bridge's classes have a default for and that only matter at run time are left out.

    Args:
        mapping: The model's mapping.
        dtype: What most weights are, by torch's name; None where they are of no type that Megatron trains in.
        tokenizer: What Megatron Bridge is to load the tokenizer from.
        version: Which Megatron Bridge it is for.
    """
    return {
        "_target_": f"{_CONFIG}.ConfigContainer",
        "checkpoint": {
            "_target_": f"{_CONFIG}.CheckpointConfig",
            "ckpt_format": "torch_dist",
            "fully_parallel_save": True,
            "save_optim": False,
            "save_rng": False,
        },
        "model": _model(mapping, dtype, version),
        "tokenizer": {
            "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
            "tokenizer_model": tokenizer,
            "tokenizer_type": "HuggingFaceTokenizer",
        },
    }


def _model(mapping: ModelMapping, dtype: str | None, version: BridgeVersion) -> dict[str, object]:
    provider = mapping.provider
    fields: dict[str, object] = {**mapping.megatron_config, **provider.fields}
    activation = fields.get("activation_func")
    if isinstance(activation, str):
        fields["activation_func"] = _function(ACTIVATIONS[activation])
    fields |= {"bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
    if dtype is not None:
        fields |= {name: _function(f"torch.{dtype}") for name in ("params_dtype", "autocast_dtype")}
    fields["make_vocab_size_divisible_by"] = provider.vocabulary_multiple or _power_of_two(fields["vocab_size"])
    if provider.layer_spec:
        partial = {"_partial_": True, "_args_": [], **provider.layer_options}
        fields["transformer_layer_spec"] = (
            {"_target_": provider.layer_spec, **partial} if provider.layer_options else _function(provider.layer_spec)
        )
    target = provider.target
    if version is BridgeVersion.V0_7 and fields.get("experimental_attention_variant") == "gated_delta_net":
        fields["experimental_attention_variant"] = "gdn"
    if version is BridgeVersion.V0_3:
        fields = {name: value for name, value in fields.items() if not name.startswith(_SINCE_0_3)}
        if target == _HYBRID:
            target = _HYBRID_0_3
            fields.pop("mtp_num_layers", None)
            fields["hybrid_override_pattern"] = str(fields.pop("hybrid_layer_pattern")).partition("/")[0]
    return {"_target_": target, **fields}


def _function(name: str) -> dict[str, object]:
    return {"_target_": name, "_call_": False}


def _power_of_two(vocabulary: object) -> int:
    """The largest power of two up to 128 that divides the vocabulary."""
    return min(128, vocabulary & -vocabulary) if isinstance(vocabulary, int) and vocabulary > 0 else 1


def fields_of(document: Mapping[str, object]) -> dict[str, object]:
    """The fields of megatron-core's config that the ``model`` of a run_config.yaml gives, as a mapping has them.

    Args:
        document: The parsed file, of any origin.

    Returns:
        Numbers, strings, booleans and lists of them by name, ``activation_func`` by its short name; what is an object
        is left out.
    """
    model = document.get("model")
    if not isinstance(model, dict):
        return {}
    known = {target: name for name, target in ACTIVATIONS.items()}
    found: dict[str, object] = {}
    for name, value in model.items():
        if not isinstance(name, str) or name.startswith("_"):
            continue
        if name == "activation_func" and isinstance(value, dict):
            if value.get("_target_") in known:
                found[name] = known[str(value["_target_"])]
        elif isinstance(value, bool | int | float | str) or (
            isinstance(value, list) and all(isinstance(item, bool | int | float | str) for item in value)
        ):
            found[name] = value
    return found


def provider_of(document: Mapping[str, object]) -> str | None:
    """Dotted name of the class that a run_config.yaml builds its model with, as 0.7.0 has it; None without one."""
    model = document.get("model")
    target = model.get("_target_") if isinstance(model, dict) else None
    if target == _HYBRID_0_3:
        return _HYBRID
    return target if isinstance(target, str) else None
