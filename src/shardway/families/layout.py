"""Where a logical Megatron tensor lies on disk: layers stacked on a leading axis, or one key per layer.

Source: megatron/core/transformer/transformer_block.py `TransformerBlock.sharded_state_dict` (0.16.1) and
docs/formats/torch_dist.md.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class Layout(enum.StrEnum):
    """How the layers of a homogeneous decoder are stored."""

    STACKED = "stacked"
    PER_LAYER = "per-layer"

    @property
    def content_metadata(self) -> dict[str, object]:
        """What a loader reads to build the matching sharded state dict."""
        metadata: dict[str, object] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        if self is Layout.PER_LAYER:
            metadata["non_homogeneous_layers"] = True
        return metadata

    def key(self, logical: str, layer: int | None) -> str:
        """The key on disk of a logical name such as ``decoder.layers.{i}.mlp.linear_fc2.weight``."""
        if layer is None:
            return logical
        return logical.replace("{i}.", "") if self is Layout.STACKED else logical.replace("{i}", str(layer))

    def extra_state_key(self, logical: str, layer: int | None, num_layers: int) -> str:
        """The key on disk of the ``_extra_state`` of the module that holds the logical tensor."""
        module = self.key(logical, layer).rpartition(".")[0]
        place = f"{layer}_{num_layers}" if self is Layout.STACKED and layer is not None else "0_1"
        return f"{module}._extra_state/shard_{place}"


def has_extra_state(logical: str) -> bool:
    """Whether Transformer Engine keeps an ``_extra_state`` for the module whose weight this is.

    It does for every linear layer and every norm, not for embeddings, the router or the output layer.
    """
    module, _, leaf = logical.rpartition(".")
    kind = module.rpartition(".")[2]
    return leaf == "weight" and (kind.startswith("linear_") or kind.endswith(("layernorm", "norm")))


def layout_of(keys: Iterable[str]) -> Layout:
    """The layout that a checkpoint's tensor keys show."""
    per_layer = "decoder.layers."
    for key in keys:
        if key.startswith(per_layer) and key[len(per_layer) :].partition(".")[0].isdigit():
            return Layout.PER_LAYER
    return Layout.STACKED
