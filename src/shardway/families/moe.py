"""The block that mixture-of-experts models share: a router, experts that may be kept in several forms, shared experts.

megatron-core keeps the experts of a layer on one axis, each matrix as [out, in], gate above up. Hugging Face has a
tensor for each expert, or one for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families.family import Field, Variant
from shardway.families.rules import Part, Rule, rows, same

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.families.config import HFConfig

_MLP = "decoder.layers.{i}.mlp"

# One tensor for all experts, as transformers 5 keeps them in memory: [E, 2 * Fe, H] and [E, H, Fe].
PACKED = Variant(flag="packed_experts", hf=r"model\.layers\.\d+\.mlp\.experts\.gate_up_proj$")

# Layers of Transformer Engine, as opposed to megatron-core's own: those name the norm before an MLP after its first
# linear layer, dense or not.
TE = Variant(flag="te", mcore=r"decoder\..+\.pre_mlp_layernorm\.weight$", default=True)


def norm(hf: str) -> tuple[Rule, ...]:
    """The norm before a mixture of experts, in a model with grouped-query attention.

    Args:
        hf: Template of its Hugging Face name.
    """
    return (
        Rule("decoder.layers.{i}.pre_mlp_layernorm.weight", same(hf, "H"), when="moe te"),
        Rule(f"{_MLP}.linear_fc1.layer_norm_weight", same(hf, "H"), when="moe !te"),
    )


def router(hf: str, *, expert_bias: str = "") -> tuple[Rule, ...]:
    """The router, and the bias that keeps the load even, which Megatron holds in float32.

    Args:
        hf: Template of the weight's Hugging Face name.
        expert_bias: The same of the bias; empty where there is none.
    """
    rules = (Rule(f"{_MLP}.router.weight", same(hf, "E", "H"), when="moe"),)
    if not expert_bias:
        return rules
    bias = Rule(f"{_MLP}.router.expert_bias", same(expert_bias, "E"), when="moe expert_bias", dtype="float32")
    return (*rules, bias)


def experts(hf: str, *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Rule, ...]:
    """Gated experts, with a tensor for each matrix of each expert, or (`packed_experts`) one for all of them.

    Args:
        hf: Template of the module that holds them, such as ``model.layers.{i}.mlp.experts``.
        gate: Name of an expert's gate.
        up: Name of its up-projection.
        down: Name of its down-projection.
    """
    at = f"{_MLP}.experts.experts"
    return (
        Rule(
            f"{at}.linear_fc1.weight",
            (
                Part(f"{hf}.{{e}}.{gate}.weight", "Fe H", "[e] Fe@0/2*Fe H"),
                Part(f"{hf}.{{e}}.{up}.weight", "Fe H", "[e] Fe@Fe/2*Fe H"),
            ),
            when="moe !packed_experts",
        ),
        Rule(
            f"{at}.linear_fc2.weight",
            (Part(f"{hf}.{{e}}.{down}.weight", "H Fe", "[e] H Fe"),),
            when="moe !packed_experts",
        ),
        Rule(
            f"{at}.linear_fc1.weight",
            (
                Part(f"{hf}.gate_up_proj", "[e] Fe@0/2*Fe H", "[e] Fe@0/2*Fe H"),
                Part(f"{hf}.gate_up_proj", "[e] Fe@Fe/2*Fe H", "[e] Fe@Fe/2*Fe H"),
            ),
            when="moe packed_experts",
        ),
        Rule(f"{at}.linear_fc2.weight", (Part(f"{hf}.down_proj", "[e] H Fe", "[e] H Fe"),), when="moe packed_experts"),
    )


def shared_experts(hf: str, *, gate: str = "") -> tuple[Rule, ...]:
    """Experts that see every token, as one gated MLP of width Fs.

    Args:
        hf: Template of its module.
        gate: Template of the weight that scales what it gives; empty where there is none.
    """
    at = f"{_MLP}.shared_experts"
    rules = (
        Rule(
            f"{at}.linear_fc1.weight",
            rows((f"{hf}.gate_proj.weight", "Fs"), (f"{hf}.up_proj.weight", "Fs"), trailing=("H",)),
            when="moe shared_experts",
        ),
        Rule(f"{at}.linear_fc2.weight", same(f"{hf}.down_proj.weight", "H", "Fs"), when="moe shared_experts"),
    )
    if not gate:
        return rules
    return (*rules, Rule(f"{at}.gate_weight", same(gate, "1", "H"), when="moe shared_experts"))


FIELDS = (
    Field("num_experts_per_tok", "moe_router_topk"),
    Field("router_aux_loss_coef", "moe_aux_loss_coeff"),
)

# megatron-core's grouped GEMM and its all-to-all dispatcher, as Megatron Bridge chooses them for these models.
CONSTANTS: Mapping[str, object] = {
    "moe_grouped_gemm": True,
    "moe_token_dispatcher_type": "alltoall",
    "moe_permute_fusion": True,
}


def num_experts(config: HFConfig) -> int:
    """The number of routed experts, under whichever of its names a config has it.

    Raises:
        ShardwayError: `config-invalid` when there is none.
    """
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    return config.count(next((key for key in keys if config.get(key) is not None), keys[0]))
