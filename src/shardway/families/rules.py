"""The rule language: one declarative line says how a Megatron tensor is made of Hugging Face tensors.

Names are templates: ``{i}`` runs over the layers. Extents are products of dimension names, such as ``"r*d"``, that
the family computes from the config. A rule is data for both directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.tiles import Side, Tile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.core.tensors import Shape
    from shardway.core.tiles import Steps


@dataclass(frozen=True, slots=True)
class Part:
    """A Hugging Face tensor that supplies `rows` consecutive rows of every group of a Megatron tensor."""

    hf: str
    rows: str


@dataclass(frozen=True, slots=True)
class Mosaic:
    """The first axis is `groups` groups; each holds the parts' rows one above the other; then the trailing axes.

    A part's own tensor holds its rows of all groups one above the other.
    """

    parts: tuple[Part, ...]
    trailing: tuple[str, ...] = ()
    groups: str = "1"


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors that it is made of.

    Attributes:
        mcore: Logical Megatron name; ``{i}`` in it makes it one tensor per layer.
        source: How it is made.
        when: Name of a flag that has to be set for the rule to apply; a leading ``!`` negates; empty: always.
    """

    mcore: str
    source: Mosaic
    when: str = ""

    @property
    def per_layer(self) -> bool:
        """Whether the rule stands for one tensor in every layer."""
        return "{i}" in self.mcore

    def applies(self, flags: Mapping[str, bool]) -> bool:
        """Whether the rule holds for a model with these flags."""
        return not self.when or flags[self.when.removeprefix("!")] is not self.when.startswith("!")


def same(hf: str, *extents: str) -> Mosaic:
    """The Megatron tensor is the Hugging Face tensor, whose shape is `extents`."""
    return Mosaic((Part(hf, extents[0]),), extents[1:])


def rows(*parts: tuple[str, str], trailing: tuple[str, ...] = ()) -> Mosaic:
    """The parts' rows one above the other: gate above up."""
    return Mosaic(tuple(Part(*part) for part in parts), trailing)


def qkv(*, q: str, k: str, v: str, trailing: tuple[str, ...] = ()) -> Mosaic:
    """Query, key and value rows interleaved by query group, as megatron-core's `linear_qkv` holds them.

    Source: megatron/core/transformer/attention.py, `SelfAttention.get_query_key_value_tensors`.
    """
    return Mosaic((Part(q, "r*d"), Part(k, "d"), Part(v, "d")), trailing, groups="G")


def extent(expression: str, dims: Mapping[str, int]) -> int:
    """Evaluate a product of dimension names and integers, such as ``"G*d"`` or ``"1"``."""
    return math.prod(dims[factor] if factor in dims else int(factor) for factor in expression.split("*"))


class Grid(NamedTuple):
    """Where a part of a mosaic lies: the name and shape of its own tensor, and the tile to be, without its names."""

    hf: str
    hf_shape: Shape
    sizes: Shape
    hf_base: Shape
    hf_steps: Steps
    mcore_base: Shape
    mcore_steps: Steps


@dataclass(frozen=True, slots=True)
class Expanded:
    """A mosaic with its extents known: shapes of the tensors on both sides and where each part lies.

    Attributes:
        mcore_shape: Shape of the Megatron tensor.
        grids: One for each part.
        stacked: Whether the Megatron tensor has a leading axis of layers.
    """

    mcore_shape: Shape
    grids: tuple[Grid, ...]
    stacked: bool = False

    def stack(self, num_layers: int) -> Expanded:
        """The same with a leading axis of layers on the Megatron side."""
        grids = tuple(
            grid._replace(mcore_steps=tuple((axis + 1, step) for axis, step in grid.mcore_steps)) for grid in self.grids
        )
        return Expanded((num_layers, *self.mcore_shape), grids, stacked=True)

    def tiles(self, mcore: str, layer: int | None) -> list[tuple[Shape, Tile]]:
        """The tiles of one layer, each with the shape of its Hugging Face tensor.

        Args:
            mcore: Key of the Megatron tensor on disk.
            layer: What ``{i}`` stands for in the parts' names, or None.
        """
        found = []
        for template, shape, sizes, hf_base, hf_steps, base, steps in self.grids:
            name = template if layer is None else template.replace("{i}", str(layer))
            if self.stacked and layer is not None:
                base = (layer, *base)
            found.append((shape, Tile(sizes, Side(name, hf_base, hf_steps), Side(mcore, base, steps))))
        return found


def expand(mosaic: Mosaic, dims: Mapping[str, int]) -> Expanded:
    """Work out the extents of a mosaic for a model with these dimensions."""
    groups = extent(mosaic.groups, dims)
    trailing = tuple(extent(expression, dims) for expression in mosaic.trailing)
    sizes = [extent(part.rows, dims) for part in mosaic.parts]
    period = sum(sizes)
    along = tuple((axis, 1) for axis in range(1, len(trailing) + 1))
    origin = (0,) * (len(trailing) + 1)
    grids = []
    at = 0
    for part, size in zip(mosaic.parts, sizes, strict=True):
        if groups == 1:
            grid: Shape = (size, *trailing)
            hf_steps: Steps = ((0, 1), *along)
            mcore_steps = hf_steps
        else:
            grid = (groups, size, *trailing)
            hf_steps = ((0, size), (0, 1), *along)
            mcore_steps = ((0, period), (0, 1), *along)
        shape = (groups * size, *trailing)
        grids.append(Grid(part.hf, shape, grid, origin, hf_steps, (at, *origin[1:]), mcore_steps))
        at += size
    return Expanded((groups * period, *trailing), tuple(grids))
