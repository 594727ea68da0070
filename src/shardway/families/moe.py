"""The block that mixture-of-experts models share: a router, experts that may be kept in several forms, shared experts.

megatron-core keeps the experts of a layer on one axis, each matrix as [out, in], gate above up. Hugging Face has a
tensor for each expert, or one for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families.family import Field, Variant
from shardway.families.rules import Part, Rule, only_when, renamed, rows, same

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardway.families.config import HFConfig
    from shardway.families.family import Layer

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


def router(hf: str, *, expert_bias: str = "", bias_axes: str = "E") -> tuple[Rule, ...]:
    """The router, and the bias that keeps the load even, which Megatron holds in float32.

    Args:
        hf: Template of the weight's Hugging Face name.
        expert_bias: The same of the bias; empty where there is none.
        bias_axes: Axes of the bias.
    """
    rules = (Rule(f"{_MLP}.router.weight", same(hf, "E", "H"), when="moe"),)
    if not expert_bias:
        return rules
    bias = (Part(expert_bias, bias_axes, "E"),)
    return (*rules, Rule(f"{_MLP}.router.expert_bias", bias, when="moe expert_bias", dtype="float32"))


def experts(
    hf: str, *, packed: str = "", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Rule, ...]:
    """Gated experts, with a tensor for each matrix of each expert, or (`packed_experts`) one for all of them.

    Args:
        hf: Template of the module that holds them, such as ``model.layers.{i}.mlp.experts``.
        packed: The same where they are packed; empty for no other.
        gate: Name of an expert's gate.
        up: Name of its up-projection.
        down: Name of its down-projection.
    """
    at = f"{_MLP}.experts.experts"
    packed = packed or hf
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
                Part(f"{packed}.gate_up_proj", "[e] Fe@0/2*Fe H", "[e] Fe@0/2*Fe H"),
                Part(f"{packed}.gate_up_proj", "[e] Fe@Fe/2*Fe H", "[e] Fe@Fe/2*Fe H"),
            ),
            when="moe packed_experts",
        ),
        Rule(
            f"{at}.linear_fc2.weight",
            (Part(f"{packed}.down_proj", "[e] H Fe", "[e] H Fe"),),
            when="moe packed_experts",
        ),
    )


def otherwise_when_packed(rules: tuple[Rule, ...], text: str, packed: str) -> tuple[Rule, ...]:
    """The rules for models in both forms, where the names of one that is packed have `packed` in place of `text`."""
    return (
        *only_when(rules, "!packed_experts"),
        *renamed(rules, hf=(text, packed), when="packed_experts"),
    )


def block_sparse(*, expert_bias: str = "") -> tuple[Rule, ...]:
    """A mixture of experts as Mixtral names it: ``block_sparse_moe`` with w1, w3 and w2, but ``mlp`` where packed.

    Args:
        expert_bias: Name of the router's bias in that module; empty where there is none.
    """
    hf = "model.layers.{i}.block_sparse_moe"
    routing = router(f"{hf}.gate.weight", expert_bias=f"{hf}.{expert_bias}" if expert_bias else "")
    return (
        *otherwise_when_packed(routing, "block_sparse_moe", "mlp"),
        *experts(f"{hf}.experts", packed="model.layers.{i}.mlp.experts", gate="w1", up="w3", down="w2"),
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

# Scores by sigmoid with a bias that only the choice of experts sees, as DeepSeek-V3 introduced it.
SIGMOID: Mapping[str, object] = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_dtype": "fp32",
}

# The choice of experts by groups of them, and the factor of what they give.
GROUP_FIELDS = (
    Field("n_group", "moe_router_num_groups"),
    Field("topk_group", "moe_router_group_topk"),
    Field("routed_scaling_factor", "moe_router_topk_scaling_factor"),
)


def layer_freq(layers: Sequence[Layer]) -> dict[str, object]:
    """Megatron's list of which layers of the decoder are mixtures of experts."""
    return {"moe_layer_freq": [int("moe" in layer.kinds) for layer in layers]}


def first_mixture(fields: Mapping[str, object]) -> int:
    """How many dense layers precede the first mixture of experts, by fields of Megatron's config."""
    frequency = fields.get("moe_layer_freq")
    return frequency.index(1) if isinstance(frequency, list) and 1 in frequency else 0


def num_shared_experts(fields: Mapping[str, object]) -> int:
    """How many experts see every token, by fields of Megatron's config: their width over that of a routed one."""
    shared, routed = fields.get("moe_shared_expert_intermediate_size"), fields.get("moe_ffn_hidden_size")
    return shared // routed if isinstance(shared, int) and isinstance(routed, int) and routed else 0


def group_caveats(config: HFConfig) -> list[str]:
    """What megatron-core's sigmoid routing does otherwise than transformers, as `Family.caveats`.

    Source: megatron/core/transformer/moe/moe_utils.py, `group_limited_topk` and `topk_routing_with_score_function`
    (0.16.1).
    """
    found = []
    groups, chosen = config.count("n_group", 1), config.count("topk_group", 1)
    scored = config.count("num_experts_per_tok") // chosen
    if groups > chosen and scored != 2:
        found.append(f"megatron-core ranks groups of experts by their best {scored}; transformers, by their best 2")
    if not config.flag("norm_topk_prob", default=True) and config.count("num_experts_per_tok") > 1:
        found.append("megatron-core makes the weights of the chosen experts add up to 1; this model does not")
    return found


def num_experts(config: HFConfig) -> int:
    """The number of routed experts, under whichever of its names a config has it.

    Raises:
        ShardwayError: `config-invalid` when there is none.
    """
    keys = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return config.count(next((key for key in keys if config.get(key) is not None), keys[0]))
