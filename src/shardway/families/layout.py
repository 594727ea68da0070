"""Where a logical Megatron tensor lies on disk: layers stacked on a leading axis, or one key per layer.

Source: megatron/core/transformer/transformer_block.py `TransformerBlock.sharded_state_dict` (0.16.1) and
docs/formats/torch_dist.md.
"""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# Keys of the tensors with a row for each token.
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")

# The module that a tensor belongs to, where the tensor is the one by which Transformer Engine's modules are told.
_WEIGHT = re.compile(r"(.+?)\.(?:weight(?:\..+)?|softmax_offset)")
# Attention with learnable sinks; attention or an MLP that is one linear layer.
_WHOLE = {"core_attention", "self_attention", "mlp"}
_EXPERTS = ".experts.experts."


class Layout(enum.StrEnum):
    """How the layers of a homogeneous decoder are stored."""

    STACKED = "stacked"
    PER_LAYER = "per-layer"

    def key(self, logical: str, layer: int | None) -> str:
        """The key on disk of a logical name such as ``decoder.layers.{i}.mlp.linear_fc2.weight``."""
        if layer is None:
            return logical
        return logical.replace("{i}.", "") if self is Layout.STACKED else logical.replace("{i}", str(layer))


def extra_state_module(key: str) -> str | None:
    """The module whose ``_extra_state`` goes with a tensor, by its key or logical name; None where there is none.

    Transformer Engine keeps one for every linear layer and every norm, and for attention with learnable sinks; not for
    embeddings, the router, the output layer and the norm inside a Mamba mixer.

    Source: checkpoints of Megatron Bridge 0.7.0; docs/formats/torch_dist.md.
    """
    match = _WEIGHT.fullmatch(key)
    if match is None:
        return None
    module = match[1]
    parent, _, kind = module.rpartition(".")
    if kind in _WHOLE or kind.startswith("linear_") or kind.endswith("_proj"):
        return module
    return module if kind.endswith("norm") and not parent.endswith("mixer") else None


def extra_state_keys(module: str, layer: int | None, num_layers: int, num_experts: int) -> list[str]:
    """The keys on disk of a module's ``_extra_state``.

    Args:
        module: Its key, without a layer where layers are stacked.
        layer: Its place on the leading axis of layers; None without such an axis.
        num_layers: Extent of that axis.
        num_experts: How many experts there are; each has a state of its own.
    """
    at, of = ("", "") if layer is None else (f"{layer}.", f"{num_layers}.")
    if _EXPERTS not in module:
        return [f"{module}._extra_state/shard_{at[:-1] or 0}_{of[:-1] or 1}"]
    return [f"{module}._extra_state/shard_{at}{expert}_{of}{num_experts}" for expert in range(num_experts)]


def layout_of(keys: Iterable[str]) -> Layout:
    """The layout that a checkpoint's tensor keys show."""
    per_layer = "decoder.layers."
    for key in keys:
        if key.startswith(per_layer) and key[len(per_layer) :].partition(".")[0].isdigit():
            return Layout.PER_LAYER
    return Layout.STACKED
