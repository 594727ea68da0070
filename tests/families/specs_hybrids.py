"""Tiny models whose layers are Mamba mixers or gated delta nets beside attention."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.families.spec import FamilySpec, read_config, rewrite

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    Weights = dict[str, torch.Tensor]

_NO_PREDICTION = (
    "the MambaModel of megatron-core 0.16.1 has no layers of multi-token prediction; tests/conformance holds their "
    "keys, shapes and extra state against those that Megatron Bridge 0.7.0 wrote"
)

_NEMOTRON_H = {
    "num_hidden_layers": None,
    "rope_parameters": None,
    "layers_block_type": ["mamba", "mlp", "attention", "moe", "mamba"],
    "head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 12,
    "n_groups": 2,
    "ssm_state_size": 10,
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
}

_NO_FALCON = (
    "megatron-core has no such layer, and the one of Megatron Bridge can't be built without mamba_ssm and Transformer "
    "Engine; tests/unit/families/test_falcon_h1.py holds keys and extra state against what it was seen to write"
)
_FALCON_H1 = {
    "head_dim": 16,
    "mamba_d_ssm": 48,
    "mamba_n_heads": 4,
    "mamba_d_head": 12,
    "mamba_n_groups": 2,
    "mamba_d_state": 10,
    "mamba_chunk_size": 32,
}
_SCALED = {
    "embedding_multiplier": 5.65,
    "lm_head_multiplier": 0.02,
    "key_multiplier": 0.39,
    "ssm_multipliers": [0.35, 0.25, 0.35, 0.5, 0.31],
    "mlp_multipliers": [0.88, 0.25],
}
_DELTA = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
_MATRICES = ("gate", "up", "down")
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}


def _fp32(path: Path, *endings: str) -> None:
    """Some tensors as float32 with values that bfloat16 can't hold, as released models have them."""

    def change(tensors: Weights) -> Weights:
        for name, tensor in tensors.items():
            if name.endswith(endings):
                tensors[name] = tensor.float() * 1.001
        return tensors

    rewrite(path, change)


def _nemotron_super(path: Path) -> None:
    """Super as released: layers by letters, float32 where it has them, two blocks of multi-token prediction."""
    import torch

    config = read_config(path)
    del config["layers_block_type"], config["mtp_layers_block_type"]
    config |= {"hybrid_override_pattern": "M-*EM", "num_hidden_layers": 5, "rope_theta": 10_000}
    config |= {"num_nextn_predict_layers": 2, "mtp_hybrid_override_pattern": "*E", "mtp_use_repeated_layer": False}
    config["time_step_limit"] = [0.0, float("inf")]
    (path / "config.json").write_text(json.dumps(config))

    def change(tensors: Weights) -> Weights:
        generator = torch.Generator().manual_seed(11)
        found = dict(tensors)
        for name, tensor in tensors.items():
            for source, inner in (("backbone.layers.2.", 0), ("backbone.layers.3.", 1)):
                if name.startswith(source):
                    for block in (0, 1):
                        copy = f"mtp.layers.{2 * block + inner}.{name.removeprefix(source)}"
                        found[copy] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        hidden = tensors["backbone.norm_f.weight"].numel()
        for block in (0, 1):
            for name, shape in (("enorm", (hidden,)), ("hnorm", (hidden,)), ("eh_proj", (hidden, 2 * hidden))):
                found[f"mtp.layers.{2 * block}.{name}.weight"] = torch.randn(shape, generator=generator).bfloat16()
            norm = torch.randn((hidden,), generator=generator).bfloat16()
            found[f"mtp.layers.{2 * block + 1}.final_layernorm.weight"] = norm
        return found

    rewrite(path, change)
    _fp32(path, ".A_log", ".D", ".dt_bias", ".e_score_correction_bias")


def _nemotron_singular(path: Path) -> None:
    """What transformers 5.12 called the embedding and the layers, and a promise of layers that it left out."""
    config = read_config(path)
    words = {"linear_attention": "mamba", "full_attention": "attention"}
    config["layers_block_type"] = [words.get(kind, kind) for kind in config["layers_block_type"]]
    (path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))

    def change(tensors: Weights) -> Weights:
        return {name.replace("backbone.embeddings.", "backbone.embedding."): each for name, each in tensors.items()}

    rewrite(path, change)


def _hybrid(name: str, architecture: str, config: str, values: Mapping[str, object], **others: object) -> FamilySpec:
    return FamilySpec(
        name=name,
        architecture=architecture,
        config=config,
        values=values,
        layout="per-layer",
        stackable=False,
        **others,  # type: ignore[arg-type]
    )


def _nemotron(name: str, changed: Mapping[str, object] | None = None, **others: object) -> FamilySpec:
    values = {**_NEMOTRON_H, **(changed or {})}
    return _hybrid(name, "NemotronHForCausalLM", "NemotronHConfig", values, **others)


def _predicting(path: Path, *, packed: bool = False) -> None:
    """A layer of multi-token prediction, which transformers has no place for, under the names of released models."""
    import torch

    def change(tensors: Weights) -> Weights:
        generator = torch.Generator().manual_seed(12)
        last = "model.layers.3."
        layer = {name.removeprefix(last): each for name, each in tensors.items() if name.startswith(last)}
        if packed:
            experts = range(sum(name.endswith(".up_proj.weight") and ".experts." in name for name in layer))
            of = {kind: [layer.pop(f"mlp.experts.{e}.{kind}_proj.weight") for e in experts] for kind in _MATRICES}
            halves = zip(of["gate"], of["up"], strict=True)
            layer["mlp.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in halves])
            layer["mlp.experts.down_proj"] = torch.stack(of["down"])
        names = {f"mtp.layers.0.{name}": tuple(each.shape) for name, each in layer.items()}
        norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        hidden = layer["input_layernorm.weight"].numel()
        names |= {f"mtp.{norm}.weight": (hidden,) for norm in norms} | {"mtp.fc.weight": (hidden, 2 * hidden)}
        return tensors | {name: torch.randn(each, generator=generator).bfloat16() for name, each in names.items()}

    rewrite(path, change)


def _qwen3_next_released(path: Path) -> None:
    """The config of Qwen3-Next-80B-A3B: an interval, transformers 4's words for rotary positions."""
    config = read_config(path)
    del config["layer_types"], config["rope_parameters"]
    config |= {"full_attention_interval": 4, "partial_rotary_factor": 0.25, "rope_theta": 10_000, "rope_scaling": None}
    (path / "config.json").write_text(json.dumps(config))
    _predicting(path)


def _qwen3_5_released(path: Path) -> None:
    """The text config of Qwen3.5: it says that a layer of multi-token prediction is there."""
    config = read_config(path)
    config |= {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
    packed = "Moe" in config["architectures"][0]
    if packed:
        del config["intermediate_size"]
    (path / "config.json").write_text(json.dumps(config))
    _predicting(path, packed=packed)


def _delta(name: str, model: str, config: str, changed: Mapping[str, object], **others: object) -> FamilySpec:
    # A gated norm divides by the size of what a delta net gives, which may be small: single tokens show the rounding.
    return _hybrid(name, f"{model}ForCausalLM", config, {**_DELTA, **changed}, tolerance=5e-3, **others)


def _falcon_released(path: Path) -> None:
    """The config as transformers 4 wrote it, with what it works out left out, and float32 state spaces."""
    config = read_config(path)
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "mamba_d_head": "auto"}
    (path / "config.json").write_text(json.dumps(config))
    _fp32(path, ".A_log", ".D", ".dt_bias")


def _falcon(name: str, changed: Mapping[str, object], **others: object) -> FamilySpec:
    return FamilySpec(
        name=name,
        architecture="FalconH1ForCausalLM",
        config="FalconH1Config",
        values={**_FALCON_H1, **changed},
        layout="per-layer",
        megatron=_NO_FALCON,
        **others,  # type: ignore[arg-type]
    )


SPECS = (
    _nemotron("nemotron_h"),
    _nemotron("nemotron_h_latent", {"moe_latent_size": 32}, packed=True),
    _nemotron("nemotron_h_dense", {"layers_block_type": ["mamba", "mlp", "attention", "mlp"]}),
    _nemotron("nemotron_h_super", {"moe_latent_size": 32}, edit=_nemotron_super, megatron=_NO_PREDICTION),
    _nemotron("nemotron_h_singular", edit=_nemotron_singular, twin=True),
    _delta("qwen3_next", "Qwen3Next", "Qwen3NextConfig", _EXPERTS),
    _delta("qwen3_next_released", "Qwen3Next", "Qwen3NextConfig", _EXPERTS, edit=_qwen3_next_released),
    _delta(
        "qwen3_next_mixed",
        "Qwen3Next",
        "Qwen3NextConfig",
        {**_EXPERTS, "mlp_only_layers": [1], "layer_types": ["full_attention", *["linear_attention"] * 3]},
        packed=True,
    ),
    _delta("qwen3_5", "Qwen3_5", "Qwen3_5TextConfig", {"tie_word_embeddings": True}),
    _delta("qwen3_5_released", "Qwen3_5", "Qwen3_5TextConfig", {}, edit=_qwen3_5_released),
    _delta("qwen3_5_moe", "Qwen3_5Moe", "Qwen3_5MoeTextConfig", _EXPERTS, packed=True),
    _delta("qwen3_5_moe_released", "Qwen3_5Moe", "Qwen3_5MoeTextConfig", _EXPERTS, edit=_qwen3_5_released),
    _falcon("falcon_h1", {"tie_word_embeddings": True}),
    _falcon("falcon_h1_scaled", {"mamba_rms_norm": True, **_SCALED}, edit=_falcon_released),
)
