"""Tiny models of Qwen3-MoE and DeepSeek-V3."""

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
    FamilySpec(
        name="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        config="DeepseekV3Config",
        values={
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
        },
        layout="per-layer",
        stackable=False,
        megatron="its config is translated in part only",
    ),
)
