"""A live model's tensors as parts of Hugging Face tensors: what this rank holds, without any communication."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.boxes import Box
from shardway.live.cuts import TileIndex, tiles_by_tensor
from shardway.live.memory import grid_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from shardway.core.tensors import Shape
    from shardway.core.tiles import Tile
    from shardway.families.mapping import ModelMapping
    from shardway.live.records import Shard
    from shardway.live.state import LiveState


class HFPiece(NamedTuple):
    """A part of a Hugging Face tensor: `full[piece.slices] = piece.tensor` puts it in its place.

    Attributes:
        name: Name of the tensor.
        shape: Its global shape.
        slices: For each axis the indices that the part has; the step is more than 1 where parts are interleaved.
        tensor: The values, of the shape that `slices` select; possibly a view of the model's memory.
    """

    name: str
    shape: Shape
    slices: tuple[slice, ...]
    tensor: torch.Tensor


class Part(NamedTuple):
    """A part of a tile that lies in one shard.

    Attributes:
        tile: The part.
        shard: Where its Megatron side is.
    """

    tile: Tile
    shard: Shard


class Mosaic:
    """Finds the Hugging Face tensors that shards are parts of.

    Args:
        mapping: The model's mapping; shards have the global shapes that it says.
    """

    def __init__(self, mapping: ModelMapping) -> None:
        self.mapping = mapping
        self._on = tiles_by_tensor(mapping.tiles, mcore=True)
        self._indexes: dict[str, TileIndex] = {}

    def parts_of(self, shards: Sequence[Shard]) -> dict[str, list[Part]]:
        """The parts that lie in some shards, by the Hugging Face tensor, in no particular order."""
        found: dict[str, list[Part]] = {}
        for shard in shards:
            for tile in self.inside(shard):
                found.setdefault(tile.hf.tensor, []).append(Part(tile, shard))
        return found

    def inside(self, shard: Shard) -> list[Tile]:
        """The parts of tiles that lie in a shard."""
        index = self._indexes.get(shard.key)
        if index is None:
            index = TileIndex(self.mapping.mcore[shard.key], self._on[shard.key], mcore=True)
            self._indexes[shard.key] = index
        return index.inside(Box(shard.start, shard.size))


class Values:
    """The values of parts, as Hugging Face has them; the tensor that was asked for last is kept.

    Args:
        state: What this rank holds.
        shifts: What Megatron's values of a tensor are more than Hugging Face's, by its key.
    """

    def __init__(self, state: LiveState, shifts: Mapping[str, float]) -> None:
        self._state = state
        self._shifts = shifts
        self._last: tuple[Shard, torch.Tensor] | None = None

    def of(self, part: Part) -> torch.Tensor:
        """The values of a part in the shape of its grid: a view of the model's memory where it has them so."""
        if self._last is None or self._last[0] is not part.shard:
            self._last = (part.shard, self._state.tensor_of(part.shard))
        grid = grid_of(self._last[1], part.tile.sizes, part.tile.mcore, part.shard.start)
        shift = self._shifts.get(part.shard.key, 0.0)
        return (grid.float() - shift).to(grid.dtype) if shift else grid


def own_pieces(state: LiveState, mapping: ModelMapping) -> Iterator[HFPiece]:
    """What this rank holds of each Hugging Face tensor, in the order of an export, then by position.

    *Ranks*: local; nothing communicates.
    """
    parts = Mosaic(mapping).parts_of(state.shards)
    values = Values(state, mapping.shifts)
    for name, shape in mapping.hf.items():
        for part in sorted(parts.get(name, ()), key=_position):
            for index, tensor in indexed(part.tile, values.of(part), len(shape)):
                yield HFPiece(name, shape, index, tensor)


def indexed(tile: Tile, grid: torch.Tensor, rank: int) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """A grid as parts of a Hugging Face tensor of `rank` axes that slices can name; one wherever it can be."""
    walks: list[list[tuple[int, int, int]]] = [[] for _ in range(rank)]
    for place, (count, (axis, step)) in enumerate(zip(tile.sizes, tile.hf.steps, strict=True)):
        if count > 1:
            walks[axis].append((step, count, place))
    apart: list[tuple[int, int, int, int]] = []  # axis, step, count, place: what no slice can say
    inner: list[list[tuple[int, int, int]]] = []
    for axis, walk in enumerate(walks):
        walk.sort()
        kept: list[tuple[int, int, int]] = []
        for step, count, place in walk:
            if not kept or step == kept[0][0] * math.prod(each[1] for each in kept):
                kept.append((step, count, place))
            else:
                apart.append((axis, step, count, place))
        inner.append(kept[::-1])
    order = [place for kept in inner for _, _, place in kept]
    for choice in itertools.product(*(range(count) for _, _, count, _ in apart)):
        start = list(tile.hf.base)
        fixed: dict[int, int] = {}
        for at, (axis, step, _, place) in zip(choice, apart, strict=True):
            start[axis] += at * step
            fixed[place] = at
        strides = grid.stride()
        offset = grid.storage_offset() + sum(at * strides[place] for place, at in fixed.items())
        view = grid.as_strided([tile.sizes[place] for place in order], [strides[place] for place in order], offset)
        counts = [math.prod(count for _, count, _ in kept) for kept in inner]
        steps = [kept[-1][0] if kept else 1 for kept in inner]
        slices = tuple(
            slice(low, low + (count - 1) * step + 1, step)
            for low, count, step in zip(start, counts, steps, strict=True)
        )
        yield slices, view.reshape(counts)


def _position(part: Part) -> Shape:
    return part.tile.hf.base
