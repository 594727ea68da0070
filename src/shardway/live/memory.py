"""Where in this rank's memory the elements of a model's tensors belong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.boxes import Box
from shardway.families.layout import layout_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from shardway.core.tensors import Shape
    from shardway.core.tiles import Side
    from shardway.families.layout import Layout
    from shardway.live.records import Shard


@dataclass(frozen=True, slots=True, eq=False)
class Deferred:
    """A parameter whose memory has another form than its shards: it is written when all of them are there.

    Attributes:
        num_parts: How many shards it has.
        device: Where the parameter is.
        store: Takes the shards' tensors, in order, and writes the parameter.
    """

    num_parts: int
    device: torch.device
    store: Callable[[Sequence[torch.Tensor]], None]


class Target(NamedTuple):
    """A box of a global tensor, and the memory that its elements belong in.

    Attributes:
        shard: The box.
        tensor: The model's own memory, of shape `shard.size`; None where the parameter is written later.
        deferred: That parameter.
        part: Which of its shards this is.
    """

    shard: Shard
    tensor: torch.Tensor | None
    deferred: Deferred | None
    part: int

    @property
    def box(self) -> Box:
        """The box of the global tensor."""
        return Box(self.shard.start, self.shard.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMemory:
    """All of a model's tensors on this rank.

    Attributes:
        targets: In the order of the state dict; a box may be there several times.
        resizable: Keys of tensors that megatron-core pads on their first axis (`LiveState.resizable`).
        variants: In which of the forms that model families know the model is (`LiveState.variants`).
        num_layers: Layers of the whole model, where its config says so.
        is_whole: Whether this rank has all pipeline stages.
    """

    targets: tuple[Target, ...]
    resizable: frozenset[str]
    variants: Mapping[str, bool]
    num_layers: int | None
    is_whole: bool

    @property
    def layout(self) -> Layout | None:
        """How its keys tell the layers of its decoder apart; None where this rank has none of them."""
        keys = [target.shard.key for target in self.targets if target.shard.key.startswith("decoder.layers.")]
        return layout_of(keys) if keys else None

    @property
    def num_bytes(self) -> int:
        """Bytes of all targets."""
        return sum(target.shard.dtype.num_bytes(target.box.num_elements) for target in self.targets)


def grid_of(tensor: torch.Tensor, sizes: Shape, side: Side, start: Shape) -> torch.Tensor:
    """The elements of a tile's grid, as a view of a tensor's memory, of any strides and device.

    Args:
        tensor: Holds a box of the tensor that `side` speaks of.
        sizes: Extents of the grid.
        side: Where the grid lies in the global tensor; wholly in the box.
        start: First index of the box.
    """
    strides = tensor.stride()
    offset = sum((first - low) * stride for first, low, stride in zip(side.base, start, strides, strict=True))
    steps = [step * strides[axis] for axis, step in side.steps]
    return tensor.as_strided(sizes, steps, tensor.storage_offset() + offset)
