"""GLM-4.7-Flash and GLM-5: latent attention with GLM's mixture of experts; GLM-5 attends to the keys an indexer picks.

Source: transformers `modeling_glm4_moe_lite.py`, `modeling_glm_moe_dsa.py` (5.24); Megatron Bridge
`glm47_flash_bridge.py`, `glm5_bridge.py` (0.7.0); megatron/core/transformer/experimental_attention_variant/dsa.py
(0.16.1, 0.20).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.families import deepseek, gqa, mla, moe
from shardway.families.bridge import MLA
from shardway.families.family import Field, Layer, Provider, Variant
from shardway.families.rules import Rule, same

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardway.families.config import HFConfig
    from shardway.families.family import Dims

_INDEXER = "decoder.layers.{i}.self_attention.core_attention.indexer"
_HF = "model.layers.{i}.self_attn.indexer"


def _stacks(config: HFConfig, dims: Dims) -> dict[str, Sequence[Layer]]:
    return mla.dense_then_moe(config, dims, dense=1)


def _derived(config: HFConfig) -> dict[str, object]:
    return mla.derived(config) | moe.layer_freq(_stacks(config, {"L": config.count("num_hidden_layers")})["i"])


def _restore(fields: Mapping[str, object]) -> dict[str, object]:
    frequency = fields.get("moe_layer_freq")
    listed = frequency if isinstance(frequency, list) else []
    return deepseek.restore(fields) | {"mlp_layer_types": ["sparse" if moe else "dense" for moe in listed] or None}


GLM4_MOE_LITE = deepseek.DEEPSEEK_V3._replace(
    name="glm4_moe_lite",
    architectures=("Glm4MoeLiteForCausalLM",),
    stacks=_stacks,
    provider=mla.PROVIDER._replace(fields=mla.FUSIONS, vocabulary_multiple=None),
    restore=_restore,
    fields=(*deepseek.FIELDS, *moe.GROUP_FIELDS),
    constants={
        **deepseek.DEEPSEEK_V3.constants,
        "moe_aux_loss_coeff": 0.001,
        "moe_router_bias_update_rate": 0.0,
        "mtp_loss_scaling_factor": 0.3,
    },
    derived=_derived,
)


def _dims_of_dsa(config: HFConfig) -> dict[str, int]:
    heads, size = config.count("index_n_heads"), config.count("index_head_dim")
    return deepseek.dims(config) | {"ni": heads, "di": size}


def _stacks_of_dsa(config: HFConfig, dims: Dims) -> dict[str, Sequence[Layer]]:
    stacks = mla.dense_then_moe(config, dims, dense=3)
    indexed = [
        layer._replace(kinds=layer.kinds | {"indexer"}) if full else layer
        for layer, full in zip(stacks["i"], _with_indexer(config, dims["L"]), strict=True)
    ]
    return {"i": indexed, "k": [layer._replace(kinds=layer.kinds | {"indexer"}) for layer in stacks["k"]]}


def _with_indexer(config: HFConfig, num_layers: int) -> list[bool]:
    """Which layers have an indexer of their own; the others take what the last one before them has picked."""
    listed = config.get("indexer_types")
    if listed is None:
        frequency, offset = config.count("index_topk_freq", 1), config.whole("index_skip_topk_offset", 2)
        return [max(layer - offset + 1, 0) % frequency == 0 for layer in range(num_layers)]
    if not isinstance(listed, list) or len(listed) != num_layers or not set(listed) <= {"full", "shared"}:
        raise config.invalid("indexer_types", listed, f'"full" or "shared" for each of {num_layers} layers')
    return [kind == "full" for kind in listed]


def _schedule(full: Sequence[bool]) -> tuple[int, int] | None:
    """How often and after which layer Megatron's indexers repeat, where they are as regular as that."""
    if all(full):
        return 1, 0
    first = full.index(False)
    again = next((layer for layer in range(first, len(full)) if full[layer]), len(full))
    frequency = again + 1 - first
    regular = all(has is (max(layer + 1 - first, 0) % frequency == 0) for layer, has in enumerate(full))
    return (frequency, first) if first and regular else None


def _derived_of_dsa(config: HFConfig) -> dict[str, object]:
    num_layers = config.count("num_hidden_layers")
    layers = _stacks_of_dsa(config, {"L": num_layers})["i"]
    fields = mla.derived(config) | moe.layer_freq(layers)
    schedule = _schedule(_with_indexer(config, num_layers))
    if schedule is not None and schedule[0] > 1:
        fields |= {"dsa_indexer_topk_freq": schedule[0], "dsa_indexer_skip_topk_offset": schedule[1]}
    return fields


def _restore_of_dsa(fields: Mapping[str, object]) -> dict[str, object]:
    frequency, offset = fields.get("dsa_indexer_topk_freq"), fields.get("dsa_indexer_skip_topk_offset")
    shared = isinstance(frequency, int) and frequency > 1
    return _restore(fields) | {"index_topk_freq": frequency if shared else 1, "index_skip_topk_offset": offset or 1}


def _caveats_of_dsa(config: HFConfig) -> list[str]:
    found = deepseek.caveats(config)
    if _schedule(_with_indexer(config, config.count("num_hidden_layers"))) is None:
        found.append("megatron-core's indexers repeat after a fixed number of layers; those of this model do not")
    return found


_LAYER = (
    *mla.attention("fused_norms"),
    Rule(f"{_INDEXER}.linear_wq_b.weight", same(f"{_HF}.wq_b.weight", "ni*di", "Q"), when="indexer"),
    Rule(f"{_INDEXER}.linear_wk.weight", same(f"{_HF}.wk.weight", "di", "H"), when="indexer"),
    Rule(f"{_INDEXER}.k_norm.weight", same(f"{_HF}.k_norm.weight", "di"), when="indexer"),
    Rule(f"{_INDEXER}.k_norm.bias", same(f"{_HF}.k_norm.bias", "di"), when="indexer"),
    Rule(f"{_INDEXER}.linear_weights_proj.weight", same(f"{_HF}.weights_proj.weight", "ni", "H"), when="indexer"),
    *deepseek.MLP,
)

# The indexer needs the query's latent vector with its norm, which is therefore kept apart; megatron-core 0.16 to 0.18
# had it in the projection after it all the same.
_FUSED_NORMS = Variant(flag="fused_norms", mcore=r"decoder\..+\.self_attention\.linear_kv_up_proj\.layer_norm_weight$")

GLM_MOE_DSA = deepseek.DEEPSEEK_V3._replace(
    name="glm_moe_dsa",
    architectures=("GlmMoeDsaForCausalLM",),
    rules=(gqa.EMBEDDINGS[0], *_LAYER, *mla.mtp(_LAYER), *gqa.EMBEDDINGS[1:]),
    dims=_dims_of_dsa,
    stacks=_stacks_of_dsa,
    kinds=("moe", "dense", "indexer"),
    variants=(moe.PACKED, moe.TE, _FUSED_NORMS, mla.MTP),
    provider=Provider(
        target=MLA,
        fields={
            "attention_softmax_in_fp32": False,
            "cp_comm_type": "allgather",
            "dsa_indexer_k_norm_epsilon": 1e-6,
            "dsa_indexer_rope_interleaved": True,
            "dsa_indexer_rotate_activation": False,
            "moe_flex_dispatcher_backend": "hybridep",
            "moe_flex_dispatcher_num_sms": 16,
            "moe_token_dispatcher_type": "flex",
        },
        vocabulary_multiple=1280,
        layer_spec="megatron.core.models.gpt.experimental_attention_variant_module_specs."
        "get_transformer_block_with_experimental_attention_variant_spec",
        layer_options={},
    ),
    restore=_restore_of_dsa,
    fields=(
        *deepseek.FIELDS,
        *moe.GROUP_FIELDS,
        Field("index_n_heads", "dsa_indexer_n_heads"),
        Field("index_head_dim", "dsa_indexer_head_dim"),
        Field("index_topk", "dsa_indexer_topk"),
        Field("aux_loss_alpha", "moe_aux_loss_coeff"),
    ),
    constants={
        **deepseek.DEEPSEEK_V3.constants,
        "experimental_attention_variant": "dsa",
        "dsa_indexer_loss_coeff": 0.001,
        "dsa_indexer_use_sparse_loss": True,
    },
    derived=_derived_of_dsa,
    caveats=_caveats_of_dsa,
)
