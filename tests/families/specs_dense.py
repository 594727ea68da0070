"""Tiny models of the dense families."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.families.spec import FamilySpec, as_released, rewrite

if TYPE_CHECKING:
    from pathlib import Path

_ZERO_CENTRED = "megatron-core's own norms can't be zero-centred"
_POST_NORMS = "megatron-core's own layers have no norm after attention and MLP"


def _mimo(path: Path) -> None:
    """Qwen2 with a layer of multi-token prediction, as in the index of XiaomiMiMo/MiMo-7B-Base."""
    import torch

    generator = torch.Generator().manual_seed(5)

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        hidden = weights["model.norm.weight"].shape[0]
        at = "model.mtp_layers.0"
        more = {
            name.replace("model.layers.0", at): torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            for name, tensor in weights.items()
            if name.startswith("model.layers.0.")
        }
        for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
            more[f"{at}.{norm}.weight"] = torch.randn(hidden, generator=generator).bfloat16()
        more[f"{at}.input_proj.weight"] = torch.randn(hidden, 2 * hidden, generator=generator).bfloat16()
        return weights | more

    rewrite(path, change)
    as_released(path, "MiMoForCausalLM", "mimo", {"num_nextn_predict_layers": 1})


def _mimo_without(path: Path) -> None:
    """The same as transformers saves it: without the layer that its config promises."""
    as_released(path, "MiMoForCausalLM", "mimo", {"num_nextn_predict_layers": 1})


_BLOCKS = [
    {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
    {"attention": {"no_op": True, "n_heads_in_group": None}, "ffn": {"intermediate_size": 40}},
    {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
    {"attention": {"n_heads_in_group": 4}, "ffn": {"replace_with_linear": True}},
]


def _decilm(path: Path) -> None:
    """Llama with the block configs of a searched model; names as in nvidia/Llama-3_3-Nemotron-Super-49B-v1."""
    import torch

    generator = torch.Generator().manual_seed(6)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {name: tensor for name, tensor in weights.items() if ".layers." not in name}
        for number, (groups, ffn) in enumerate([(2, 256), (None, 40), (None, None), (1, None)]):
            at = f"model.layers.{number}"
            if groups:
                rows = {"q": 64, "k": 16 * groups, "v": 16 * groups}
                kept |= {f"{at}.self_attn.{name}_proj.weight": made(size, 64) for name, size in rows.items()}
                kept[f"{at}.self_attn.o_proj.weight"] = made(64, 64)
            if ffn:
                kept |= {f"{at}.mlp.{name}_proj.weight": made(ffn, 64) for name in ("gate", "up")}
                kept[f"{at}.mlp.down_proj.weight"] = made(64, ffn)
            if number != 1:
                kept[f"{at}.input_layernorm.weight"] = made(64)
            if number != 2:
                kept[f"{at}.post_attention_layernorm.weight"] = made(64)
        kept["model.layers.2.self_attn.linear_attn.weight"] = made(64, 64)
        kept["model.layers.3.mlp.linear_mlp.weight"] = made(64, 64)
        return kept

    rewrite(path, change)
    values = {"num_hidden_layers": 4, "num_key_value_heads": None, "intermediate_size": None, "block_configs": _BLOCKS}
    as_released(path, "DeciLMForCausalLM", "nemotron-nas", values)


SPECS = (
    FamilySpec(
        name="gemma",
        architecture="GemmaForCausalLM",
        config="GemmaConfig",
        values={"head_dim": 32, "tie_word_embeddings": True},
        megatron=_ZERO_CENTRED,
    ),
    FamilySpec(
        name="gemma2",
        architecture="Gemma2ForCausalLM",
        config="Gemma2Config",
        values={"head_dim": 32, "tie_word_embeddings": True},
        megatron=_ZERO_CENTRED,
    ),
    FamilySpec(
        name="gemma3",
        architecture="Gemma3ForCausalLM",
        config="Gemma3TextConfig",
        values={"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": None},
        megatron=_ZERO_CENTRED,
    ),
    FamilySpec(
        name="nemotron",
        architecture="NemotronForCausalLM",
        config="NemotronConfig",
        values={"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        megatron=_ZERO_CENTRED,
    ),
    FamilySpec(name="phi3", architecture="Phi3ForCausalLM", config="Phi3Config"),
    FamilySpec(
        name="phi3_partial_rotary",
        architecture="Phi3ForCausalLM",
        config="Phi3Config",
        values={
            "sliding_window": 20,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    FamilySpec(name="olmo2", architecture="Olmo2ForCausalLM", config="Olmo2Config", megatron=_POST_NORMS),
    FamilySpec(
        name="exaone4",
        architecture="Exaone4ForCausalLM",
        config="Exaone4Config",
        values={"num_hidden_layers": 4, "sliding_window": 16},
        megatron=_POST_NORMS,
    ),
    FamilySpec(
        name="mimo",
        architecture="Qwen2ForCausalLM",
        config="Qwen2Config",
        edit=_mimo,
        released="MiMoForCausalLM",
        twin=True,
    ),
    FamilySpec(
        name="mimo_without_mtp",
        architecture="Qwen2ForCausalLM",
        config="Qwen2Config",
        edit=_mimo_without,
        released="MiMoForCausalLM",
        twin=True,
    ),
    FamilySpec(
        name="decilm",
        architecture="LlamaForCausalLM",
        config="LlamaConfig",
        edit=_decilm,
        released="DeciLMForCausalLM",
        layout="per-layer",
        stackable=False,
        megatron="transformers has no such model",
    ),
)
