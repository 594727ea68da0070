"""Nemotron-H (Nemotron Nano and Super, 2 and 3): layers that are a Mamba 2 mixer, attention, an MLP or experts, alone.

In Super the experts work in a smaller latent space, and layers of multi-token prediction follow, each of which is a
short stack of such layers; Hugging Face numbers these through.

Source: Megatron Bridge 0.7.0 (models/nemotronh, models/hybrid); megatron/core/models/mamba (0.16.1), which newer
versions call hybrid; the configs of nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 and -Super-120B-A12B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.families import gqa, mamba, moe
from shardway.families.config import HFConfig
from shardway.families.family import Alias, Family, Field, Layer, Provider, Variant
from shardway.families.rules import Part, Rule, only_when, qkv, renamed, same

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


_AT = "decoder.layers.{i}"
_HF = "backbone.layers.{i}"

_KINDS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
# What transformers calls them: before 5.20, and since.
_SYMBOLS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
}

_NORM = (
    Rule(f"{_AT}.mixer.in_proj.layer_norm_weight", same(f"{_HF}.norm.weight", "H"), when="mamba te"),
    Rule(f"{_AT}.norm.weight", same(f"{_HF}.norm.weight", "H"), when="mamba !te"),
    Rule(f"{_AT}.self_attention.linear_qkv.layer_norm_weight", same(f"{_HF}.norm.weight", "H"), when="attention te"),
    Rule(f"{_AT}.input_layernorm.weight", same(f"{_HF}.norm.weight", "H"), when="attention !te"),
    Rule(f"{_AT}.mlp.linear_fc1.layer_norm_weight", same(f"{_HF}.norm.weight", "H"), when="mlp te"),
    Rule(f"{_AT}.pre_mlp_layernorm.weight", same(f"{_HF}.norm.weight", "H"), when="mlp !te"),
    Rule(f"{_AT}.pre_mlp_layernorm.weight", same(f"{_HF}.norm.weight", "H"), when="moe"),
)

_ATTENTION = (
    Rule(
        f"{_AT}.self_attention.linear_qkv.weight",
        qkv(
            q=f"{_HF}.mixer.q_proj.weight",
            k=f"{_HF}.mixer.k_proj.weight",
            v=f"{_HF}.mixer.v_proj.weight",
            trailing=("H",),
        ),
    ),
    Rule(f"{_AT}.self_attention.linear_proj.weight", same(f"{_HF}.mixer.o_proj.weight", "H", "nq*d")),
)

_MLP = (
    Rule(f"{_AT}.mlp.linear_fc1.weight", same(f"{_HF}.mixer.up_proj.weight", "F", "H")),
    Rule(f"{_AT}.mlp.linear_fc2.weight", same(f"{_HF}.mixer.down_proj.weight", "H", "F")),
)

_EXPERTS = f"{_AT}.mlp.experts.experts"
# X is what an expert sees of a token.
_MOE = (
    Rule(f"{_AT}.mlp.fc1_latent_proj.weight", same(f"{_HF}.mixer.fc1_latent_proj.weight", "X", "H"), when="latent"),
    *moe.router(f"{_HF}.mixer.gate.weight", expert_bias=f"{_HF}.mixer.gate.e_score_correction_bias"),
    Rule(
        f"{_EXPERTS}.linear_fc1.weight",
        (Part(f"{_HF}.mixer.experts.{{e}}.up_proj.weight", "Fe X", "[e] Fe X"),),
        when="!packed_experts",
    ),
    Rule(
        f"{_EXPERTS}.linear_fc2.weight",
        (Part(f"{_HF}.mixer.experts.{{e}}.down_proj.weight", "X Fe", "[e] X Fe"),),
        when="!packed_experts",
    ),
    Rule(
        f"{_EXPERTS}.linear_fc1.weight",
        (Part(f"{_HF}.mixer.experts.up_proj", "[e] Fe X", "[e] Fe X"),),
        when="packed_experts",
    ),
    Rule(
        f"{_EXPERTS}.linear_fc2.weight",
        (Part(f"{_HF}.mixer.experts.down_proj", "[e] X Fe", "[e] X Fe"),),
        when="packed_experts",
    ),
    Rule(f"{_AT}.mlp.fc2_latent_proj.weight", same(f"{_HF}.mixer.fc2_latent_proj.weight", "H", "X"), when="latent"),
    Rule(f"{_AT}.mlp.shared_experts.linear_fc1.weight", same(f"{_HF}.mixer.shared_experts.up_proj.weight", "Fs", "H")),
    Rule(
        f"{_AT}.mlp.shared_experts.linear_fc2.weight", same(f"{_HF}.mixer.shared_experts.down_proj.weight", "H", "Fs")
    ),
)

_LAYER = (
    *_NORM,
    *mamba.mixer(f"{_AT}.mixer", f"{_HF}.mixer", when="mamba"),
    *only_when(_ATTENTION, "attention"),
    *only_when(_MLP, "mlp"),
    *only_when(_MOE, "moe"),
)

_MTP = (
    Rule("mtp.layers.{k}.enorm.weight", same("mtp.layers.{first}.enorm.weight", "H")),
    Rule("mtp.layers.{k}.hnorm.weight", same("mtp.layers.{first}.hnorm.weight", "H")),
    Rule("mtp.layers.{k}.eh_proj.weight", same("mtp.layers.{first}.eh_proj.weight", "H", "2*H")),
    *renamed(_LAYER, mcore=(_AT, "mtp.layers.{k}.mtp_model_layer.layers.{j}"), hf=(_HF, "mtp.layers.{n}")),
    Rule("mtp.layers.{k}.final_layernorm.weight", same("mtp.layers.{last}.final_layernorm.weight", "H")),
)

_EMBEDDING = "embedding.word_embeddings.weight"
_RELEASED = (
    Rule(_EMBEDDING, same("backbone.embeddings.weight", "V", "H"), when="!singular"),
    Rule(_EMBEDDING, same("backbone.embedding.weight", "V", "H"), when="singular"),
    *_LAYER,
    *only_when(_MTP, "mtp"),
    Rule("decoder.final_norm.weight", same("backbone.norm_f.weight", "H")),
)

_VARIANTS = (
    # As transformers has the model in memory.
    Variant(flag="in_memory", hf=r"model\.layers\."),
    Variant(flag="packed_experts", hf=r"(?:backbone|model)\.layers\.\d+\.mixer\.experts\.up_proj$"),
    # What transformers called the embedding for a while.
    Variant(flag="singular", hf=r"(?:backbone|model)\.embedding\.weight$"),
    # Layers that keep the norm before a linear layer with it, as those of Transformer Engine do.
    Variant(
        flag="te",
        mcore=r"decoder\.layers\.\d+\.(?:mixer\.in_proj|self_attention\.linear_qkv|mlp\.linear_fc1)\.layer_norm_weight$",
        default=True,
    ),
    Variant(flag="mtp", hf=r"mtp\.layers\.", mcore=r"mtp\.layers\.", default=True),
)


def _symbols(config: HFConfig, pattern_key: str, list_key: str) -> str:
    """One letter for each layer of a stack: M mamba, * attention, - mlp, E experts; empty where it isn't given."""
    listed, pattern = config.get(list_key), config.get(pattern_key)
    spelled = None
    if listed is not None:
        if not isinstance(listed, list) or not all(isinstance(word, str) and word in _SYMBOLS for word in listed):
            raise config.invalid(list_key, listed, f"a list of {', '.join(_SYMBOLS)}")
        spelled = "".join(_SYMBOLS[word] for word in listed)
    if pattern is not None and (not isinstance(pattern, str) or not set(pattern) <= set(_KINDS)):
        raise config.invalid(pattern_key, pattern, f"letters of {''.join(_KINDS)}")
    if spelled is not None and pattern is not None and spelled != pattern:
        raise config.invalid(pattern_key, pattern, f"{spelled}, as {list_key} says")
    return spelled or pattern or ""


def _decoder(config: HFConfig) -> str:
    pattern = _symbols(config, "hybrid_override_pattern", "layers_block_type")
    if not pattern or config.count("num_hidden_layers", len(pattern)) != len(pattern):
        number = config.get("num_hidden_layers")
        raise ShardwayError(
            Problem(
                code=Code.CONFIG_INVALID,
                what=f"hybrid_override_pattern or layers_block_type gives {len(pattern)} layers, "
                f"num_hidden_layers {number}",
                file=config.file,
            )
        )
    return pattern


def _predicting(config: HFConfig) -> tuple[int, str]:
    """How many tokens are predicted beyond the next, and the layers that do it for each."""
    number = config.few("num_nextn_predict_layers", 0)
    if not number:
        return 0, ""
    pattern = _symbols(config, "mtp_hybrid_override_pattern", "mtp_layers_block_type")
    if not pattern:
        raise config.invalid("mtp_hybrid_override_pattern", None, "the layers that predict further tokens")
    return number, pattern


def _repeats(config: HFConfig) -> bool:
    """Whether the same layers predict each of the further tokens."""
    return config.flag("mtp_use_repeated_layer", default=True)


def _has_experts(config: HFConfig) -> bool:
    return "E" in _decoder(config) + _predicting(config)[1]


def _dims(config: HFConfig) -> dict[str, int]:
    mamba.require(
        config, absent=("use_bias", "mamba_proj_bias", "attention_bias", "mlp_bias"), conv_bias="use_conv_bias"
    )
    pattern = _decoder(config)
    values = {**config.values, "num_hidden_layers": len(pattern)}
    if "-" not in pattern + _predicting(config)[1]:  # no layer is an MLP; megatron-core's own default
        values["intermediate_size"] = config.count("intermediate_size", 4 * config.count("hidden_size"))
    found = gqa.dims(HFConfig(values, config.file), config.count("attention_head_dim", 128)) | mamba.dims(
        heads=config.count("mamba_num_heads"),
        head_dim=config.count("mamba_head_dim"),
        groups=config.count("n_groups"),
        state=config.count("ssm_state_size"),
        width=config.count("conv_kernel", 4),
    )
    if not _has_experts(config):
        return found
    return found | {
        "E": moe.num_experts(config),
        "Fe": config.count("moe_intermediate_size"),
        "Fs": config.count("moe_shared_expert_intermediate_size"),
        "X": config.count("moe_latent_size", found["H"]),
    }


def _stacks(config: HFConfig, _: Mapping[str, int]) -> dict[str, Sequence[Layer]]:
    number, pattern = _predicting(config)
    blocks = min(number, 1) if _repeats(config) else number
    firsts = [block * len(pattern) for block in range(blocks)]
    return {
        "i": tuple(Layer(kinds=frozenset({_KINDS[symbol]})) for symbol in _decoder(config)),
        "k": tuple(Layer(names={"first": first, "last": first + len(pattern) - 1}) for first in firsts),
        "j": tuple(
            Layer(kinds=frozenset({_KINDS[symbol]}), names={"k": block, "j": place, "n": first + place})
            for block, first in enumerate(firsts)
            for place, symbol in enumerate(pattern)
        ),
    }


def _derived(config: HFConfig) -> dict[str, object]:
    number, pattern = _predicting(config)
    fields: dict[str, object] = {"hybrid_layer_pattern": "/".join((_decoder(config), *[pattern] * number))}
    if _has_experts(config):
        fields |= {**moe.CONSTANTS, **moe.SIGMOID, "moe_router_load_balancing_type": "seq_aux_loss"}
        fields["moe_aux_loss_coeff"] = config.number("router_aux_loss_coef", 1e-4)
        fields["moe_shared_expert_overlap"] = config.flag("moe_shared_expert_overlap", default=True)
        fields |= {field.mcore: config.get(field.hf) or 1 for field in moe.GROUP_FIELDS}
        fields["moe_router_topk"] = config.count("num_experts_per_tok")
        if config.get("moe_latent_size") is not None:
            fields["moe_latent_size"] = config.count("moe_latent_size")
    if number:
        fields |= {
            "mtp_num_layers": number,
            "mtp_hybrid_override_pattern": pattern,
            "mtp_use_repeated_layer": _repeats(config),
            "mtp_loss_scaling_factor": config.number("mtp_loss_scaling_factor", 0.3),
            "keep_mtp_spec_in_bf16": config.flag("keep_mtp_spec_in_bf16", default=True),
        }
    return fields


def _restore(fields: Mapping[str, object]) -> dict[str, object]:
    given = fields.get("hybrid_layer_pattern") or fields.get("hybrid_override_pattern")
    main, *predicting = str(given or "").split("/")
    config: dict[str, object] = {
        "hybrid_override_pattern": main.replace("|", ""),
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "conv_kernel": 4,
        "use_conv_bias": True,
        **dict.fromkeys(("use_bias", "mamba_proj_bias", "attention_bias", "mlp_bias"), False),
        "num_nextn_predict_layers": fields.get("mtp_num_layers") or 0,
    }
    if "E" in str(given):
        config |= {field.hf: fields[field.mcore] for field in (*moe.FIELDS, *moe.GROUP_FIELDS) if field.mcore in fields}
        config |= {"n_shared_experts": 1, "norm_topk_prob": True, "moe_latent_size": fields.get("moe_latent_size")}
        config["moe_shared_expert_overlap"] = fields.get("moe_shared_expert_overlap", True)
        config["moe_shared_expert_intermediate_size"] = fields.get("moe_shared_expert_intermediate_size")
    if config["num_nextn_predict_layers"]:
        config["mtp_hybrid_override_pattern"] = fields.get("mtp_hybrid_override_pattern") or "".join(predicting[:1])
        for key in ("mtp_use_repeated_layer", "mtp_loss_scaling_factor", "keep_mtp_spec_in_bf16"):
            if key in fields:
                config[key] = fields[key]
    return config


def _caveats(config: HFConfig) -> list[str]:
    found = moe.group_caveats(config) if _has_experts(config) else []
    for key, usual, name in (("mlp_hidden_act", "relu2", "squared_relu"), ("mamba_hidden_act", "silu", "silu")):
        if config.get(key) not in (None, usual):
            found.append(f"a Megatron model computes {name}, but {key} is {config.get(key)!r}")
    if config.count("conv_kernel", 4) != 4:
        found.append(f"megatron-core's Mamba mixers convolve 4 tokens; this model's, {config.count('conv_kernel')}")
    return found


NEMOTRON_H = Family(
    name="nemotron_h",
    architectures=("NemotronHForCausalLM",),
    rules=(
        *only_when(_RELEASED, "!in_memory"),
        *renamed(_RELEASED, hf=("backbone.", "model."), when="in_memory"),
        Rule("output_layer.weight", same("lm_head.weight", "V", "H"), when="!tied"),
    ),
    dims=_dims,
    flags={"expert_bias": True, "latent": lambda config: config.get("moe_latent_size") is not None},
    stacks=_stacks,
    kinds=tuple(_KINDS.values()),
    per_layer=True,
    variants=_VARIANTS,
    aliases=tuple(
        Alias(hf="lm_head.weight", of=f"{module}.weight", when=f"tied {form}")
        for module, form in (
            ("backbone.embeddings", "!in_memory !singular"),
            ("backbone.embedding", "!in_memory singular"),
            ("model.embeddings", "in_memory !singular"),
            ("model.embedding", "in_memory singular"),
        )
    ),
    extra_state=("output_layer",),
    provider=Provider(
        target="megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider",
        fields={"first_last_layers_bf16": True, "masked_softmax_fusion": True, "persist_layer_norm": True}
        | {"attention_softmax_in_fp32": False, "apply_rope_fusion": True},
    ),
    hf_keys={"num_moe_experts": "n_routed_experts"},
    restore=_restore,
    fields=(
        Field("max_position_embeddings", "seq_length"),
        Field("layer_norm_epsilon", "layernorm_epsilon", 1e-5),
        Field("initializer_range", "init_method_std", 0.02),
        Field("attention_dropout", "attention_dropout", 0.0),
        Field("residual_in_fp32", "fp32_residual_connection", default=False),
        Field("mamba_head_dim", "mamba_head_dim"),
        Field("mamba_num_heads", "mamba_num_heads"),
        Field("n_groups", "mamba_num_groups"),
        Field("ssm_state_size", "mamba_state_dim"),
        Field("chunk_size", "mamba_chunk_size", 128),
    ),
    constants={
        "normalization": "RMSNorm",
        "activation_func": "squared_relu",
        "gated_linear_unit": False,
        "add_bias_linear": False,
        "position_embedding_type": "none",
        "hidden_dropout": 0.0,
        "is_hybrid_model": True,
    },
    derived=_derived,
    caveats=_caveats,
)
