"""Falcon-H1: in every layer a Mamba 2 mixer beside attention, both after one norm, then a gated MLP.

Multipliers that the config gives stay in the config; none is folded into weights.

Source: Megatron Bridge 0.7.0 (models/falcon_h1); the modelling code of transformers 5.24.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import gqa, mamba
from shardway.families.family import Family, Field, Provider
from shardway.families.rules import Rule, rows, same

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.families.config import HFConfig

_AT = "decoder.layers.{i}"
_HF = "model.layers.{i}"

_RULES = (
    gqa.EMBEDDINGS[0],
    Rule(f"{_AT}.norm.weight", same(f"{_HF}.input_layernorm.weight", "H")),
    *mamba.mixer(f"{_AT}.mamba_mixer", f"{_HF}.mamba", norm_when="mixer_norm"),
    *(rule for rule in gqa.ATTENTION if rule.mcore.endswith((".linear_qkv.weight", ".linear_proj.weight"))),
    Rule(f"{_AT}.mlp.linear_fc1.layer_norm_weight", same(f"{_HF}.pre_ff_layernorm.weight", "H")),
    Rule(
        f"{_AT}.mlp.linear_fc1.weight",
        rows(
            (f"{_HF}.feed_forward.gate_proj.weight", "F"), (f"{_HF}.feed_forward.up_proj.weight", "F"), trailing=("H",)
        ),
    ),
    Rule(f"{_AT}.mlp.linear_fc2.weight", same(f"{_HF}.feed_forward.down_proj.weight", "H", "F")),
    Rule("decoder.final_norm.weight", same("model.final_layernorm.weight", "H")),
    gqa.EMBEDDINGS[2],
)

# Numbers, or lists of them, that both sides have under one name; what an absent one means.
_MULTIPLIERS: Mapping[str, object] = {
    "embedding_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
    "key_multiplier": 1.0,
    "attention_in_multiplier": 1.0,
    "attention_out_multiplier": 1.0,
    "ssm_in_multiplier": 1.0,
    "ssm_out_multiplier": 1.0,
    "mlp_multipliers": [1.0] * 2,
    "ssm_multipliers": [1.0] * 5,
}


def _mixer_dims(config: HFConfig) -> dict[str, int]:
    heads, expanded = config.count("mamba_n_heads"), config.count("mamba_expand", 2) * config.count("hidden_size")
    inner, head_dim = config.count("mamba_d_ssm", expanded), config.get("mamba_d_head")
    if inner % heads or head_dim not in (None, "auto", inner // heads):
        raise config.invalid("mamba_d_head", head_dim, f"what {heads} heads (mamba_n_heads) share {inner} evenly by")
    return mamba.dims(
        heads=heads,
        head_dim=inner // heads,
        groups=config.count("mamba_n_groups", 1),
        state=config.count("mamba_d_state"),
        width=config.count("mamba_d_conv", 4),
    )


def _dims(config: HFConfig) -> dict[str, int]:
    mamba.require(
        config,
        absent=("mamba_proj_bias", "projectors_bias", "attention_bias", "mlp_bias"),
        conv_bias="mamba_conv_bias",
    )
    return gqa.dims(config) | _mixer_dims(config)


def _derived(config: HFConfig) -> dict[str, object]:
    sizes = _mixer_dims(config)
    fields = gqa.rope(config) | {
        "mamba_num_heads": sizes["mh"],
        "mamba_head_dim": sizes["mi"] // sizes["mh"],
        "mamba_num_groups": sizes["mg"],
        "mamba_state_dim": sizes["ms"],
        "d_conv": sizes["mc"],
    }
    base = fields["rotary_base"]
    if isinstance(base, float) and base.is_integer():
        fields["rotary_base"] = int(base)
    for name, usual in _MULTIPLIERS.items():
        fields[name] = usual if config.get(name) is None else config.get(name)
    return fields


def _restore(fields: Mapping[str, object]) -> dict[str, object]:
    heads, head_dim = fields.get("mamba_num_heads"), fields.get("mamba_head_dim")
    both = heads * head_dim if isinstance(heads, int) and isinstance(head_dim, int) else None
    biases = ("mamba_proj_bias", "projectors_bias", "attention_bias", "mlp_bias")
    return {
        "hidden_act": fields.get("activation_func", "silu"),
        "mamba_n_heads": heads,
        "mamba_d_head": head_dim,
        "mamba_d_ssm": both,
        "mamba_n_groups": fields.get("mamba_num_groups"),
        "mamba_d_state": fields.get("mamba_state_dim"),
        "mamba_d_conv": fields.get("d_conv", 4),
        "mamba_conv_bias": True,
        **dict.fromkeys(biases, False),
        **{name: fields.get(name, usual) for name, usual in _MULTIPLIERS.items()},
        **gqa.restore_rope(fields),
    }


def _caveats(config: HFConfig) -> list[str]:
    return [
        *gqa.caveats(config),
        "megatron-core has no layer with a mixer beside attention; a model there needs those that Megatron Bridge has",
    ]


FALCON_H1 = Family(
    name="falcon_h1",
    architectures=("FalconH1ForCausalLM",),
    rules=_RULES,
    dims=_dims,
    flags={"mixer_norm": "mamba_rms_norm"},
    per_layer=True,
    aliases=(gqa.TIED_HEAD,),
    extra_state=("output_layer",),
    provider=Provider(target="megatron.bridge.models.falcon_h1.falconh1_provider.FalconH1ModelProvider"),
    restore=_restore,
    fields=(
        *gqa.FIELDS[:1],
        Field("rms_norm_eps", "layernorm_epsilon", 1e-5),
        *gqa.FIELDS[2:],
        Field("mamba_expand", "expand", 2),
        Field("mamba_chunk_size", "chunk_size", 256),
        Field("mamba_rms_norm", "rmsnorm", default=False),
        Field("mamba_norm_before_gate", "norm_before_gate", default=True),
    ),
    constants=gqa.CONSTANTS
    | {"add_bias_linear": False, "conv_bias": True, "falconh1_ratio": 1.0}
    | {"use_mamba": True, "use_attention": True, "use_mlp": True},
    derived=_derived,
    caveats=_caveats,
)
