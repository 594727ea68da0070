"""Tiny models with latent attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.families.spec import FamilySpec, as_released, read_config, rewrite
from tests.families.specs_moe import _predicting, _wide

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    Weights = dict[str, torch.Tensor]

LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
EXPERTS = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 2.5,
}
DEEPSEEK_V3 = LATENT | EXPERTS | {"num_nextn_predict_layers": 0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
MOONLIGHT = DEEPSEEK_V3 | {
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
}
DEEPSEEK_V2 = LATENT | EXPERTS | {"topk_method": "greedy", "n_group": 1, "topk_group": 1}

GLM4_MOE_LITE = {key: value for key, value in (LATENT | EXPERTS).items() if key != "first_k_dense_replace"}
GLM_MOE_DSA = LATENT | EXPERTS | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 32}
NO_INDEXER = "megatron-core builds indexers of Transformer Engine's layers alone, and its sparse attention needs a GPU"


def _predicting_one(path: Path) -> None:
    """A layer of multi-token prediction with its copies of embedding and head, as DeepSeek-V3 is released."""

    def change(weights: Weights) -> Weights:
        more = _predicting(weights, of=2, at=3, norm="shared_head.norm")
        more["model.layers.3.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
        more["model.layers.3.shared_head.head.weight"] = weights["lm_head.weight"].clone()
        return {name: _wide(name, weight) for name, weight in weights.items()} | more

    rewrite(path, change)
    as_released(
        path, read_config(path)["architectures"][0], read_config(path)["model_type"], {"num_nextn_predict_layers": 1}
    )


def _kimi(path: Path) -> None:
    """Kimi-K2 under the architecture that Megatron Bridge knows it by."""
    as_released(path, "KimiK2ForCausalLM", "kimi_k2", {})


def _spec(name: str, family: str, values: Mapping[str, Any], **options: Any) -> FamilySpec:
    return FamilySpec(
        name=name,
        architecture=f"{family}ForCausalLM",
        config=f"{family}Config",
        values=values,
        layout="per-layer",
        stackable=False,
        **options,
    )


SPECS = (
    _spec("deepseek_v3", "DeepseekV3", DEEPSEEK_V3),
    _spec(
        "deepseek_v3_released",
        "DeepseekV3",
        DEEPSEEK_V3 | {"rope_parameters": YARN},
        edit=_predicting_one,
    ),
    # Its config promises a layer of multi-token prediction, which transformers leaves out.
    _spec("moonlight", "DeepseekV3", MOONLIGHT | {"num_nextn_predict_layers": 1}, packed=True),
    _spec(
        "kimi_k2", "DeepseekV3", MOONLIGHT | {"q_lora_rank": 24}, edit=_kimi, twin=True, released="KimiK2ForCausalLM"
    ),
    _spec(
        "deepseek_v2",
        "DeepseekV2",
        DEEPSEEK_V2 | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    _spec("deepseek_v2_lite", "DeepseekV2", DEEPSEEK_V2 | {"q_lora_rank": None}, packed=True),
    _spec(
        "deepseek_v2_groups",
        "DeepseekV2",
        DEEPSEEK_V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2},
    ),
    _spec("glm4_moe_lite", "Glm4MoeLite", GLM4_MOE_LITE | {"rms_norm_eps": 1e-6}, edit=_predicting_one),
    _spec(
        "glm4_moe_lite_packed",
        "Glm4MoeLite",
        GLM4_MOE_LITE | {"q_lora_rank": None, "mlp_layer_types": ["dense", "dense", "sparse"]},
        packed=True,
        tolerance=5e-4,  # transformers adds another epsilon in the norms of latent vectors
    ),
    _spec("glm_moe_dsa", "GlmMoeDsa", GLM_MOE_DSA, edit=_predicting_one, megatron=NO_INDEXER),
    # As in GLM-5.2: some layers attend to what an earlier one has picked.
    _spec(
        "glm_moe_dsa_shared",
        "GlmMoeDsa",
        GLM_MOE_DSA | {"num_hidden_layers": 5, "indexer_types": ["full", "full", "shared", "shared", "full"]},
        packed=True,
        megatron=NO_INDEXER,
    ),
)
