"""Tiny models of Qwen3-MoE."""

from __future__ import annotations

from tests.families.spec import FamilySpec

QWEN3_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "norm_topk_prob": True,
}

SPECS = (
    FamilySpec(name="qwen3_moe", architecture="Qwen3MoeForCausalLM", config="Qwen3MoeConfig", values=QWEN3_MOE),
    FamilySpec(
        name="qwen3_moe_mixed",
        architecture="Qwen3MoeForCausalLM",
        config="Qwen3MoeConfig",
        values=QWEN3_MOE | {"num_hidden_layers": 3, "mlp_only_layers": [1]},
        layout="per-layer",
        stackable=False,
    ),
)
