"""Which parts of which stored tensors belong in a box: tiles are found without looking at all of them, and cut."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.boxes import Box, row_major_strides, span
from shardway.core.tiles import reach, restrict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shardway.core.tensors import Chunk, Shape, StoredTensor
    from shardway.core.tiles import Tile
    from shardway.live.records import Shard


class Cut(NamedTuple):
    """The part of a tile that lies in one box of the model's side and in one chunk of the stored side.

    Attributes:
        tile: That part; its `hf` side is the stored tensor, its `mcore` side the model's.
        chunk: Where the stored side lies.
        target: Number of the box.
    """

    tile: Tile
    chunk: Chunk
    target: int


class TileIndex:
    """The tiles of one tensor, found by where they lie in it.

    Args:
        shape: Global shape of the tensor.
        tiles: All tiles on it.
        mcore: Which side of the tiles the tensor is.
    """

    def __init__(self, shape: Shape, tiles: Iterable[Tile], *, mcore: bool) -> None:
        self._strides = row_major_strides(shape)
        self._mcore = mcore
        spans = []
        for number, tile in enumerate(tiles):
            side = tile.mcore if mcore else tile.hf
            box = Box(side.base, reach(tile.sizes, side.steps, len(shape)))
            spans.append((*span(box, self._strides), number, tile))
        spans.sort()
        self._tiles = [tile for _, _, _, tile in spans]
        self._firsts = [first for first, _, _, _ in spans]
        self._reached = list(accumulate((last for _, last, _, _ in spans), max))

    def inside(self, box: Box) -> list[Tile]:
        """The parts of the tiles that lie in a box of the tensor."""
        first, last = span(box, self._strides)
        begin, end = bisect_left(self._reached, first), bisect_right(self._firsts, last)
        return [part for tile in self._tiles[begin:end] for part in restrict(tile, box, mcore=self._mcore)]


def tiles_by_tensor(tiles: Iterable[Tile], *, mcore: bool) -> dict[str, list[Tile]]:
    """Tiles by the name of the tensor on one side."""
    found: dict[str, list[Tile]] = {}
    for tile in tiles:
        found.setdefault((tile.mcore if mcore else tile.hf).tensor, []).append(tile)
    return found


def cuts_of(shards: Sequence[Shard], tiles: Iterable[Tile], stored: Mapping[str, StoredTensor]) -> list[Cut]:
    """What has to be read for some boxes of a model's tensors.

    Args:
        shards: The boxes; one may reach past the tiles, where its tensor is padded.
        tiles: How the model's tensors (`mcore` side) are made of the stored ones (`hf` side).
        stored: Where the stored tensors lie.

    Returns:
        The parts, in the order of the stored bytes.
    """
    wanted = {shard.key for shard in shards}
    on = tiles_by_tensor((tile for tile in tiles if tile.mcore.tensor in wanted), mcore=True)
    indexes: dict[str, TileIndex] = {}
    finders: dict[str, ChunkIndex] = {}
    found: list[Cut] = []
    for number, shard in enumerate(shards):
        if shard.key not in indexes:
            indexes[shard.key] = TileIndex(shard.global_shape, on.get(shard.key, ()), mcore=True)
        for part in indexes[shard.key].inside(Box(shard.start, shard.size)):
            tensor = stored[part.hf.tensor]
            if len(tensor.chunks) == 1:
                found.append(Cut(part, tensor.chunks[0], number))
                continue
            if tensor.name not in finders:
                finders[tensor.name] = ChunkIndex(tensor)
            found += [Cut(piece, chunk, number) for piece, chunk in finders[tensor.name].cut(part)]
    found.sort(key=_place)
    return found


class ChunkIndex:
    """The chunks of a stored tensor, found by where they lie in it."""

    def __init__(self, tensor: StoredTensor) -> None:
        self._strides = row_major_strides(tensor.shape)
        spans = sorted((*span(Box(chunk.start, chunk.size), self._strides), chunk) for chunk in tensor.chunks)
        self._chunks = [chunk for _, _, chunk in spans]
        self._firsts = [first for first, _, _ in spans]
        self._reached = list(accumulate((last for _, last, _ in spans), max))

    def cut(self, tile: Tile) -> list[tuple[Tile, Chunk]]:
        """A tile cut at the edges of the chunks."""
        first, last = span(Box(tile.hf.base, reach(tile.sizes, tile.hf.steps, len(self._strides))), self._strides)
        begin, end = bisect_left(self._reached, first), bisect_right(self._firsts, last)
        return [
            (part, chunk)
            for chunk in self._chunks[begin:end]
            for part in restrict(tile, Box(chunk.start, chunk.size), mcore=False)
        ]


def _place(cut: Cut) -> tuple[str, int, Shape]:
    return cut.chunk.file, cut.chunk.offset, cut.tile.hf.base
