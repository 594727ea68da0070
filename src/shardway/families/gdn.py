"""The gated delta net, as hybrid models have it in place of attention, and the gated attention that goes with it.

megatron-core keeps what the projection and the convolution give apart: queries, keys, values, gate (z), beta and alpha.

Source: megatron/core/ssm/gated_delta_net.py, megatron/core/transformer/attention.py (0.16.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.families import gqa
from shardway.families.rules import Part, Rule, same, split

if TYPE_CHECKING:
    from shardway.families.config import HFConfig

_AT = "decoder.layers.{i}.self_attention"
_HF = "model.layers.{i}.linear_attn"

# Extents: gk key heads of size gd; gr value heads for each, of size gv; gc the width of the convolution.
_WIDTHS = {"query": "gk*gd", "key": "gk*gd", "value": "gk*gr*gv"}

_COMMON = (
    Rule(f"{_AT}.in_proj.layer_norm_weight", same("model.layers.{i}.input_layernorm.weight", "H")),
    *(
        Rule(f"{_AT}.conv1d.weight.{name}", parts)
        for name, parts in split(f"{_HF}.conv1d.weight", *_WIDTHS.items(), trailing=("1", "gc"))
    ),
    Rule(f"{_AT}.dt_bias", same(f"{_HF}.dt_bias", "gk*gr")),
    Rule(f"{_AT}.A_log", same(f"{_HF}.A_log", "gk*gr")),
    # megatron-core's norm multiplies by 1 more than its weight, as all norms of these models do but this one.
    Rule(f"{_AT}.out_norm.weight", same(f"{_HF}.norm.weight", "gv"), dtype="float32", plus=-1.0),
    Rule(f"{_AT}.out_proj.weight", same(f"{_HF}.out_proj.weight", "H", "gk*gr*gv")),
)

# Qwen3-Next: for each key head its query, key, values and gates; then beta and alpha for each.
_QKVZ = "2*gd+2*gr*gv"
INTERLEAVED = (
    *(
        Rule(
            f"{_AT}.in_proj.weight.{name}",
            (Part(f"{_HF}.in_proj_qkvz.weight", f"(gk {width}@{at}/{_QKVZ}) H", f"(gk {width}) H"),),
        )
        for name, width, at in (
            ("query", "gd", "0"),
            ("key", "gd", "gd"),
            ("value", "gr*gv", "2*gd"),
            ("z", "gr*gv", "2*gd+gr*gv"),
        )
    ),
    *(
        Rule(
            f"{_AT}.in_proj.weight.{name}",
            (Part(f"{_HF}.in_proj_ba.weight", f"(gk gr@{at}/2*gr) H", "(gk gr) H"),),
        )
        for name, at in (("beta", "0"), ("alpha", "gr"))
    ),
    *_COMMON,
)

# Qwen3.5: all queries, then all keys, then all values; the others in tensors of their own.
SEPARATE = (
    *(
        Rule(f"{_AT}.in_proj.weight.{name}", parts)
        for name, parts in split(f"{_HF}.in_proj_qkv.weight", *_WIDTHS.items(), trailing=("H",))
    ),
    Rule(f"{_AT}.in_proj.weight.z", same(f"{_HF}.in_proj_z.weight", "gk*gr*gv", "H")),
    Rule(f"{_AT}.in_proj.weight.beta", same(f"{_HF}.in_proj_b.weight", "gk*gr", "H")),
    Rule(f"{_AT}.in_proj.weight.alpha", same(f"{_HF}.in_proj_a.weight", "gk*gr", "H")),
    *_COMMON,
)


def _gated_qkv(ending: str, rest: str) -> tuple[Part, ...]:
    """Queries, gates, keys and values by query group; Hugging Face has the gate of a head below its query."""
    hf, group = "model.layers.{i}.self_attn", "2*r+2"
    return (
        Part(f"{hf}.q_proj.{ending}", f"(G r d@0/2*d){rest}", f"(G r@0/{group} d){rest}"),
        Part(f"{hf}.q_proj.{ending}", f"(G r d@d/2*d){rest}", f"(G r@r/{group} d){rest}"),
        Part(f"{hf}.k_proj.{ending}", f"(G d){rest}", f"(G 1@2*r/{group} d){rest}"),
        Part(f"{hf}.v_proj.{ending}", f"(G d){rest}", f"(G 1@2*r+1/{group} d){rest}"),
    )


_QKV = f"{_AT}.linear_qkv"
# Attention whose output is gated by a second half of the query projection.
ATTENTION = (
    *(rule for rule in gqa.ATTENTION if rule.mcore not in (f"{_QKV}.weight", f"{_QKV}.bias")),
    Rule(f"{_QKV}.weight", _gated_qkv("weight", " H")),
    Rule(f"{_QKV}.bias", _gated_qkv("bias", ""), when="qkv_bias"),
)


def dims(config: HFConfig) -> dict[str, int]:
    """The extents that the rules refer to.

    Raises:
        ShardwayError: `config-invalid` for values that are missing or contradict each other.
    """
    keys, values = config.count("linear_num_key_heads"), config.count("linear_num_value_heads")
    if values % keys:
        raise ShardwayError(
            Problem(
                code=Code.CONFIG_INVALID,
                what=f"{values} value heads can't be shared evenly by {keys} key heads of a gated delta net",
                facts=(f"linear_num_value_heads {values} % linear_num_key_heads {keys} = {values % keys}",),
                file=config.file,
            )
        )
    return {
        "gk": keys,
        "gr": values // keys,
        "gd": config.count("linear_key_head_dim"),
        "gv": config.count("linear_value_head_dim"),
        "gc": config.count("linear_conv_kernel_dim", 4),
    }
