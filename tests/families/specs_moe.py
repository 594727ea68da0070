"""Tiny models of the mixtures of experts with grouped-query attention."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.families.spec import FamilySpec, as_released, read_config, rewrite
from tests.families.specs_first import QWEN3_MOE

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    Weights = dict[str, torch.Tensor]

_EXPERTS = {"num_experts_per_tok": 2}
_ROPE_OF_HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}

MIXTRAL = _EXPERTS | {"num_local_experts": 4, "head_dim": 8}
OLMOE = _EXPERTS | {"num_experts": 4, "norm_topk_prob": False}
MINIMAX_M2 = _EXPERTS | {"num_local_experts": 4, "head_dim": 32, "rope_parameters": _ROPE_OF_HALF}
GLM4_MOE = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "head_dim": 32,
    "routed_scaling_factor": 2.5,
    "attention_bias": True,
    "use_qk_norm": True,
    "rope_parameters": _ROPE_OF_HALF,
    "num_nextn_predict_layers": 0,
}
GPT_OSS = _EXPERTS | {
    "num_local_experts": 4,
    "head_dim": 32,
    "sliding_window": 20,
    "num_hidden_layers": 4,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150_000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "max_position_embeddings": 131_072,
    "swiglu_limit": 0.5,
}
ERNIE4_5_MOE = {
    "num_hidden_layers": 3,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 24,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "tie_word_embeddings": True,
}


def _mixtral_as_released(path: Path) -> None:
    config = read_config(path)
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    del config["head_dim"]
    (path / "config.json").write_text(json.dumps(config))


def _minimax_as_released(path: Path) -> None:
    """A float32 bias of the router, and the part of a head that is rotated as a number of its dimensions."""
    config = read_config(path)
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rotary_dim": 16, "use_mtp": True}
    (path / "config.json").write_text(json.dumps(config | {"num_mtp_modules": 3}))
    rewrite(path, lambda weights: {name: _wide(name, weight) for name, weight in weights.items()})


def _wide(name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight.float() if name.endswith(("e_score_correction_bias", "expert_bias")) else weight


def _random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _predicting(weights: Weights, *, of: int, at: int, norm: str) -> Weights:
    """A layer of multi-token prediction, shaped like another layer and with what joins it to the one before."""
    hidden = weights["model.norm.weight"].shape[0]
    shapes = {
        name.replace(f"model.layers.{of}.", f"model.layers.{at}."): tuple(weight.shape)
        for name, weight in weights.items()
        if name.startswith(f"model.layers.{of}.")
    }
    shapes |= {f"model.layers.{at}.{name}.weight": (hidden,) for name in ("enorm", "hnorm", norm)}
    shapes[f"model.layers.{at}.eh_proj.weight"] = (hidden, 2 * hidden)
    return {name: _wide(name, _random(shape, seed)) for seed, (name, shape) in enumerate(shapes.items())}


def _glm_as_released(path: Path) -> None:
    """A layer of multi-token prediction with its copies of embedding and head, as in the index of zai-org/GLM-4.5."""

    def change(weights: Weights) -> Weights:
        more = _predicting(weights, of=2, at=3, norm="shared_head.norm")
        more["model.layers.3.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
        more["model.layers.3.shared_head.head.weight"] = weights["lm_head.weight"].clone()
        return {name: _wide(name, weight) for name, weight in weights.items()} | more

    rewrite(path, change)
    config = read_config(path) | {"num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(config))


_BAILING_NAMES = {
    "model.embed_tokens": "model.word_embeddings",
    "self_attn.o_proj": "attention.dense",
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
    "gate.e_score_correction_bias": "gate.expert_bias",
}


def _bailing(path: Path) -> None:
    """GLM-4.5's layers under the names of inclusionAI/Ling-mini-2.0, and a layer of multi-token prediction.

    By modeling_bailing_moe_v2.py they compute the same.
    """
    import torch

    def change(weights: Weights) -> Weights:
        found: Weights = {}
        for name, weight in weights.items():
            other = name
            for theirs, ours in _BAILING_NAMES.items():
                other = other.replace(theirs, ours)
            if ".self_attn.q_proj." in name:
                qkv = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                found[name.replace("self_attn.q_proj", "attention.query_key_value")] = torch.cat(qkv)
            elif "_proj." not in name or "self_attn" not in other:
                found[other] = _wide(other, weight)
        return found | _predicting(found, of=2, at=3, norm="final_layernorm")

    rewrite(path, change)
    config = read_config(path)
    config |= {
        "use_qkv_bias": config.pop("attention_bias"),
        "num_experts": config.pop("n_routed_experts"),
        "num_shared_experts": config.pop("n_shared_experts"),
        "rope_theta": config.pop("rope_parameters")["rope_theta"],
        "partial_rotary_factor": 0.5,
        "num_nextn_predict_layers": 1,
    }
    (path / "config.json").write_text(json.dumps(config))
    as_released(path, "BailingMoeV2ForCausalLM", "bailing_moe_v2", {})


def _ernie_as_released(path: Path) -> None:
    """A float32 gate and bias, and a block of multi-token prediction, as in the index of baidu/ERNIE-4.5-21B-A3B-PT."""

    def change(weights: Weights) -> Weights:
        hidden = weights["model.norm.weight"].shape[0]
        at = "model.mtp_block.0"
        shapes = {
            name.replace("model.layers.0", at): tuple(weight.shape)
            for name, weight in weights.items()
            if name.startswith("model.layers.0.")
        }
        shapes |= {f"model.mtp_{name}_norm.0.weight": (hidden,) for name in ("emb", "hidden")}
        shapes["model.mtp_linear_proj.0.weight"] = (hidden, 2 * hidden)
        more = {name: _random(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
        wide = {
            name: weight.float() if ".mlp.gate." in name else _wide(name, weight) for name, weight in weights.items()
        }
        return wide | more

    rewrite(path, change)
    config = read_config(path) | {"num_nextn_predict_layers": 1, "moe_layer_end_index": -1}
    (path / "config.json").write_text(json.dumps(config))


def _without_bias(path: Path) -> None:
    """Expert biases of zero, with which routing by softmax is what megatron-core does without such biases."""
    rewrite(
        path,
        lambda weights: {
            name: weight.zero_() if "e_score_correction_bias" in name else weight for name, weight in weights.items()
        },
    )


_BY_SOFTMAX = {"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False}

SPECS = (
    FamilySpec(
        name="qwen3_moe_packed",
        architecture="Qwen3MoeForCausalLM",
        config="Qwen3MoeConfig",
        values=QWEN3_MOE,
        packed=True,
    ),
    FamilySpec(name="mixtral", architecture="MixtralForCausalLM", config="MixtralConfig", values=MIXTRAL),
    FamilySpec(
        name="mixtral_released",
        architecture="MixtralForCausalLM",
        config="MixtralConfig",
        values=MIXTRAL | {"head_dim": 16, "sliding_window": 20},
        edit=_mixtral_as_released,
    ),
    FamilySpec(
        name="mixtral_packed", architecture="MixtralForCausalLM", config="MixtralConfig", values=MIXTRAL, packed=True
    ),
    FamilySpec(name="olmoe", architecture="OlmoeForCausalLM", config="OlmoeConfig", values=OLMOE, wide_norms=True),
    FamilySpec(
        name="olmoe_packed",
        architecture="OlmoeForCausalLM",
        config="OlmoeConfig",
        values=OLMOE | {"norm_topk_prob": True},
        packed=True,
        wide_norms=True,
    ),
    FamilySpec(
        name="minimax_m2",
        architecture="MiniMaxM2ForCausalLM",
        config="MiniMaxM2Config",
        values=MINIMAX_M2,
        edit=_minimax_as_released,
        wide_norms=True,
    ),
    FamilySpec(
        name="minimax_m2_packed",
        architecture="MiniMaxM2ForCausalLM",
        config="MiniMaxM2Config",
        values=MINIMAX_M2,
        packed=True,
        wide_norms=True,
    ),
    FamilySpec(
        name="glm4_moe",
        architecture="Glm4MoeForCausalLM",
        config="Glm4MoeConfig",
        values=GLM4_MOE,
        edit=_glm_as_released,
        layout="per-layer",
        stackable=False,
    ),
    FamilySpec(
        name="glm4_moe_packed",
        architecture="Glm4MoeForCausalLM",
        config="Glm4MoeConfig",
        # As in GLM-4.5-Air; transformers leaves out the layer of multi-token prediction that its config promises.
        values=GLM4_MOE | {"use_qk_norm": False, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 1},
        packed=True,
        layout="per-layer",
        stackable=False,
    ),
    FamilySpec(name="gpt_oss", architecture="GptOssForCausalLM", config="GptOssConfig", values=GPT_OSS),
    FamilySpec(
        name="gpt_oss_square",
        architecture="GptOssForCausalLM",
        config="GptOssConfig",
        # As in the released models, so that no shape gives a transposed matrix away.
        values=GPT_OSS | {"intermediate_size": 64, "num_hidden_layers": 2},
    ),
    FamilySpec(
        name="bailing_moe_v2",
        architecture="Glm4MoeForCausalLM",
        config="Glm4MoeConfig",
        values=GLM4_MOE | {"attention_bias": False},
        edit=_bailing,
        twin=True,
        released="BailingMoeV2ForCausalLM",
        layout="per-layer",
        stackable=False,
    ),
    FamilySpec(
        name="ernie4_5_moe",
        architecture="Ernie4_5_MoeForCausalLM",
        config="Ernie4_5_MoeConfig",
        values=ERNIE4_5_MOE,
        edit=_ernie_as_released,
        layout="per-layer",
        stackable=False,
        megatron="megatron-core adds expert biases to sigmoid scores only; this model routes by softmax",
    ),
    FamilySpec(
        name="ernie4_5_moe_packed",
        architecture="Ernie4_5_MoeForCausalLM",
        config="Ernie4_5_MoeConfig",
        values=ERNIE4_5_MOE | {"tie_word_embeddings": False, "moe_num_shared_experts": 0},
        packed=True,
        edit=_without_bias,
        layout="per-layer",
        stackable=False,
        megatron_fields=_BY_SOFTMAX,
        unasked=("router.expert_bias",),
    ),
)
