"""Nemotron (Minitron, Nemotron-4): layer norms with biases, and MLPs without a gate.

Source: Megatron Bridge 0.7.0 (models/nemotron).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import gqa
from shardway.families.family import Family, Field, Provider
from shardway.families.rules import Rule, same

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.families.config import HFConfig

_AT = "decoder.layers.{i}"
_HF = "model.layers.{i}"

_RULES = (
    gqa.EMBEDDINGS[0],
    *gqa.ATTENTION,
    Rule(f"{_AT}.self_attention.linear_qkv.layer_norm_bias", same(f"{_HF}.input_layernorm.bias", "H")),
    gqa.GATED_MLP[0],
    Rule(f"{_AT}.mlp.linear_fc1.layer_norm_bias", same(f"{_HF}.post_attention_layernorm.bias", "H")),
    Rule(f"{_AT}.mlp.linear_fc1.weight", same(f"{_HF}.mlp.up_proj.weight", "F", "H")),
    Rule(f"{_AT}.mlp.linear_fc1.bias", same(f"{_HF}.mlp.up_proj.bias", "F"), when="mlp_bias"),
    *(rule for rule in gqa.GATED_MLP if ".linear_fc2." in rule.mcore),
    gqa.EMBEDDINGS[1],
    Rule("decoder.final_layernorm.bias", same("model.norm.bias", "H")),
    gqa.EMBEDDINGS[2],
)


def _caveats(config: HFConfig) -> list[str]:
    found = gqa.rope_caveats(config)
    activation = config.get("hidden_act")
    if activation not in (None, "relu2"):
        found.append(f"the translated config says squared_relu, but the model's activation is {activation!r}")
    return found


def _restore(fields: Mapping[str, object]) -> dict[str, object]:
    # transformers takes half of a head for rotated where nothing is said.
    return {"hidden_act": "relu2", "partial_rotary_factor": 1.0} | gqa.restore_rope(fields) | gqa.restore_window(fields)


NEMOTRON = Family(
    name="nemotron",
    architectures=("NemotronForCausalLM",),
    rules=_RULES,
    dims=gqa.dims,
    flags={"qkv_bias": "attention_bias", "proj_bias": "attention_bias", "mlp_bias": "mlp_bias", "qk_norm": False},
    aliases=(gqa.TIED_HEAD,),
    provider=Provider(fields={"apply_rope_fusion": True, "persist_layer_norm": True}),
    restore=_restore,
    fields=(
        *(field for field in gqa.FIELDS if field.mcore != "layernorm_epsilon"),
        Field("norm_eps", "layernorm_epsilon", 1e-5),
    ),
    constants=gqa.CONSTANTS
    | {
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": True,
        "activation_func": "squared_relu",
        "gated_linear_unit": False,
        "add_bias_linear": False,
    },
    derived=gqa.derived,
    caveats=_caveats,
    ignored=gqa.IGNORED,
)
