"""Llama-Nemotron Super and Ultra (DeciLM): Llama whose layers were searched for, each with widths of its own.

A layer may lack its attention or its MLP, or have one linear layer in place of either. The sizes are in the config's
``block_configs``.

Source: megatron/core/transformer/heterogeneous (0.16.1); Megatron Bridge 0.7.0 (models/llama_nemotron); the modelling
code of nvidia/Llama-3_3-Nemotron-Super-49B-v1.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from shardway.families import gqa
from shardway.families.family import Family, Layer, Provider
from shardway.families.rules import Rule, same

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardway.families.config import HFConfig

_AT = "decoder.layers.{i}"
_HF = "model.layers.{i}"

_RULES = (
    gqa.EMBEDDINGS[0],
    *(rule._replace(when=f"attention {rule.when}".strip()) for rule in gqa.ATTENTION),
    Rule(
        f"{_AT}.self_attention.layer_norm_weight", same(f"{_HF}.input_layernorm.weight", "H"), when="linear_attention"
    ),
    Rule(
        f"{_AT}.self_attention.weight",
        same(f"{_HF}.self_attn.linear_attn.weight", "H", "H"),
        when="linear_attention",
    ),
    *(rule._replace(when=f"mlp {rule.when}".strip()) for rule in gqa.GATED_MLP),
    Rule(f"{_AT}.mlp.layer_norm_weight", same(f"{_HF}.post_attention_layernorm.weight", "H"), when="linear_mlp"),
    Rule(f"{_AT}.mlp.weight", same(f"{_HF}.mlp.linear_mlp.weight", "H", "H"), when="linear_mlp"),
    *gqa.EMBEDDINGS[1:],
)


def _dims(config: HFConfig) -> dict[str, int]:
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    return {
        "L": config.count("num_hidden_layers"),
        "H": hidden,
        "V": config.count("vocab_size"),
        "nq": heads,
        "d": config.count("head_dim", hidden // heads),
    }


def _stacks(config: HFConfig, dims: Mapping[str, int]) -> dict[str, Sequence[Layer]]:
    blocks = config.get("block_configs")
    if not isinstance(blocks, list) or len(blocks) != dims["L"]:
        raise config.invalid("block_configs", blocks, f"a list of {dims['L']} blocks")
    return {"i": tuple(_layer(config, block, dims) for block in blocks)}


def _layer(config: HFConfig, block: object, dims: Mapping[str, int]) -> Layer:
    attention = block.get("attention") if isinstance(block, dict) else None
    ffn = block.get("ffn", block.get("mlp")) if isinstance(block, dict) else None
    if not isinstance(attention, dict) or not isinstance(ffn, dict):
        raise config.invalid("block_configs", block, "blocks of the form {attention: {...}, ffn: {...}}")
    kinds = set()
    sizes: dict[str, int] = {}
    if attention.get("replace_with_linear"):
        kinds.add("linear_attention")
    elif not attention.get("no_op"):
        kinds.add("attention")
        per_group = attention.get("n_heads_in_group")
        if not isinstance(per_group, int) or per_group < 1 or dims["nq"] % per_group:
            raise config.invalid("n_heads_in_group", per_group, f"a divisor of {dims['nq']} attention heads")
        sizes |= {"r": per_group, "G": dims["nq"] // per_group}
    if ffn.get("replace_with_linear"):
        kinds.add("linear_mlp")
    elif not ffn.get("no_op"):
        kinds.add("mlp")
        sizes["F"] = _ffn(config, ffn, dims["H"])
    return Layer(kinds=frozenset(kinds), dims=sizes)


def _ffn(config: HFConfig, ffn: Mapping[str, object], hidden: int) -> int:
    """Width of an MLP: said outright, or two thirds of a multiple of the hidden size, rounded up to 256."""
    for key in ("intermediate_size", "ffn_hidden_size"):
        value = ffn.get(key)
        if isinstance(value, int) and value > 0:
            return value
    factor = ffn.get("ffn_mult")
    if not isinstance(factor, int | float) or not 0 < factor < 1000:
        raise config.invalid("ffn_mult", factor, "a positive number")
    return -(-int(2 * factor * hidden / 3) // 256) * 256


def _derived(config: HFConfig) -> dict[str, object]:
    layers = _stacks(config, _dims(config))["i"]
    said = {key: value for key, value in config.values.items() if key != "_name_or_path"}  # that is a place
    groups = next((layer.dims["G"] for layer in layers if "G" in layer.dims), config.count("num_attention_heads"))
    return gqa.rope(config) | {
        "num_query_groups": groups,
        "heterogeneous_layers_config_encoded_json": json.dumps(said, sort_keys=True),
    }


def _restore(fields: Mapping[str, object]) -> dict[str, object]:
    """The config.json that the Megatron config of such a model has in it; the shapes show whether it is the model's."""
    encoded = fields.get("heterogeneous_layers_config_encoded_json")
    try:
        said = json.loads(encoded) if isinstance(encoded, str) else None
    except (ValueError, RecursionError):
        said = None
    return {**said, "architectures": ["DeciLMForCausalLM"]} if isinstance(said, dict) else {}


DECILM = Family(
    name="decilm",
    architectures=("DeciLMForCausalLM",),
    rules=_RULES,
    dims=_dims,
    flags={"qkv_bias": "attention_bias", "proj_bias": "attention_bias", "mlp_bias": "mlp_bias", "qk_norm": False},
    stacks=_stacks,
    kinds=("attention", "linear_attention", "mlp", "linear_mlp"),
    per_layer=True,
    aliases=(gqa.TIED_HEAD,),
    provider=Provider(
        target="megatron.bridge.models.llama_nemotron.llama_nemotron_provider.LlamaNemotronHeterogeneousProvider"
    ),
    restore=_restore,
    fields=gqa.FIELDS,
    constants=gqa.CONSTANTS | {"add_bias_linear": False},
    derived=_derived,
    caveats=gqa.caveats,
    ignored=gqa.IGNORED,
)
