"""From a Megatron checkpoint's own config back to a Hugging Face config.

A Megatron config says what a model computes, not what it is called. So every family that could have made such a config
proposes a config.json, and one is taken only if it leads to exactly the tensors that the checkpoint holds and to the
same Megatron config: what can't be told apart, or expressed, is refused.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from shardway.core.errors import ShardwayError
from shardway.families.config import HFConfig
from shardway.families.layout import VOCABULARY, layout_of
from shardway.families.mapping import map_model
from shardway.families.registry import families

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.core.tensors import Shape
    from shardway.families.family import Family
    from shardway.families.mapping import ModelMapping

# Where a config.json has the dimensions that rules refer to, unless the family says otherwise.
DIMENSIONS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "num_moe_experts": "num_experts",
    "moe_ffn_hidden_size": "moe_intermediate_size",
}
# What Megatron configs say that no config.json decides, that a padded vocabulary changes, or that the names and shapes
# of the tensors have said already (the pattern of a hybrid model may also say where pipeline stages begin).
_NOT_COMPARED = frozenset(
    {
        "heterogeneous_layers_config_encoded_json",
        "hybrid_layer_pattern",
        "vocab_size",
        "init_method_std",
        "seq_length",
        "kv_channels",
        "attention_dropout",
        "hidden_dropout",
        "moe_aux_loss_coeff",
        "moe_grouped_gemm",
        "moe_permute_fusion",
        "moe_router_bias_update_rate",
        "moe_router_dtype",
        "moe_router_load_balancing_type",
        "moe_shared_expert_overlap",
        "moe_token_dispatcher_type",
        "mtp_loss_scaling_factor",
    }
)
# Fields that make no difference where another has a certain value.
_IDLE: Mapping[str, tuple[str, object]] = {
    "mscale_all_dim": ("rotary_scaling_factor", 1.0),
    "moe_router_pre_softmax": ("moe_router_score_function", "sigmoid"),
}


class Restored:
    """What became of the attempt to find a config.json.

    Attributes:
        config: The config, where exactly one kind of model fits; else None.
        tried: For each family that came near, what speaks against it.
    """

    def __init__(self, config: dict[str, object] | None, tried: Mapping[str, str]) -> None:
        self.config = config
        self.tried = tried


def restore_config(
    fields: Mapping[str, object], shapes: Mapping[str, Shape], provider: str | None, dtype: str | None
) -> Restored:
    """Find the config.json of the model that a Megatron checkpoint holds.

    Args:
        fields: Fields of megatron-core's config, as the checkpoint gives them.
        shapes: Key and shape of every tensor of the model in the checkpoint.
        provider: Class that Megatron Bridge builds the model with, where the checkpoint says so.
        dtype: What most weights are, by torch's name.

    Returns:
        A config that leads to exactly these tensors and fields. Where several families do, they are one architecture
        under several names: then that of the family that agrees with most of what is left, and the first of those.
    """
    tried: dict[str, str] = {}
    if fields.get("experimental_attention_variant") == "gdn":  # since megatron-core 0.19
        fields = {**fields, "experimental_attention_variant": "gated_delta_net"}
    found: list[tuple[int, dict[str, object]]] = []
    for family in families():
        if family.restore is None or (provider is not None and provider != family.provider.target):
            continue
        config = _proposal(family, family.restore, fields, dtype)
        try:
            variants = family.variants_in(mcore=shapes)
            mapping = map_model(
                HFConfig(config, "the config that the checkpoint gives"), layout_of(shapes), variants=variants
            )
        except ShardwayError as error:
            tried[family.name] = error.problems[0].what
            continue
        against = _against(mapping, fields, shapes)
        if against is None:
            found.append((_agreeing(mapping, fields), config))
        else:
            tried[family.name] = against
    return Restored(max(found, key=lambda pair: pair[0])[1] if found else None, tried)


def _proposal(family: Family, restore: Any, fields: Mapping[str, object], dtype: str | None) -> dict[str, object]:
    config: dict[str, object] = {"architectures": [family.architectures[0]], "model_type": family.name}
    for name, key in DIMENSIONS.items():
        if fields.get(name) is not None:
            config[family.hf_keys.get(name, key)] = fields[name]
    for field in family.fields:
        if fields.get(field.mcore) is not None:
            config[field.hf] = fields[field.mcore]
    if "share_embeddings_and_output_weights" in fields:
        config["tie_word_embeddings"] = bool(fields["share_embeddings_and_output_weights"])
    if dtype is not None:
        config["dtype"] = dtype
    config |= restore(fields)
    return config


def _against(mapping: ModelMapping, fields: Mapping[str, object], shapes: Mapping[str, Shape]) -> str | None:
    missing = sorted(mapping.mcore.keys() - shapes.keys())
    if missing:
        return f"{len(missing)} tensors are missing, such as {missing[0]}"
    surplus = sorted(shapes.keys() - mapping.mcore.keys())
    if surplus:
        return f"{len(surplus)} tensors are unknown, such as {surplus[0]}"
    for key, shape in mapping.mcore.items():
        if not _fits(key, shapes[key], shape):
            return f"{key} is {list(shapes[key])}, not {list(shape)}"
    ours = mapping.megatron_config
    for name, value in ours.items():
        found = fields.get(name)
        if found is None or name in _NOT_COMPARED or _same(value, found):
            continue
        other, idle = _IDLE.get(name, ("", None))
        if not other or not _same(ours.get(other), idle):
            return f"{name} is {found!r}, not {value!r}"
    return None


def _agreeing(mapping: ModelMapping, fields: Mapping[str, object]) -> int:
    """In how many of the fields that decide nothing a model agrees."""
    ours = {**mapping.megatron_config, **mapping.provider.fields}
    return sum(name in fields and _same(value, fields[name]) for name, value in ours.items())


def _fits(key: str, found: Shape, wanted: Shape) -> bool:
    """Whether a tensor has its shape; Megatron may have padded the vocabulary."""
    padded = key in VOCABULARY and found[0] > wanted[0]
    return found == wanted or (padded and found[1:] == wanted[1:])


def _same(left: object, right: object) -> bool:
    if isinstance(left, int | float) and isinstance(right, int | float):
        return math.isclose(left, right, rel_tol=1e-9)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right
