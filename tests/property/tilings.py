"""Random tilings, and their meaning in plain numpy."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from shardway.core.boxes import Box
from shardway.core.tiles import Side, Tile

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardway.core.tensors import Shape

Indices = npt.NDArray[np.int64]


def indices(tile: Tile, *, mcore: bool) -> Indices:
    """The index in one tensor of every element of a tile, in the order of the tile's grid: (elements, axes)."""
    side = tile.mcore if mcore else tile.hf
    grid = np.array(list(itertools.product(*map(range, tile.sizes))), dtype=np.int64).reshape(-1, len(tile.sizes))
    found = np.tile(np.array(side.base, dtype=np.int64), (len(grid), 1))
    for k, (axis, step) in enumerate(side.steps):
        found[:, axis] += grid[:, k] * step
    return found


def pairs(*tiles: Tile) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every (index in the Hugging Face, index in the Megatron tensor) that tiles relate; sorted, with repeats."""
    return sorted(
        (tuple(h), tuple(m))
        for tile in tiles
        for h, m in zip(indices(tile, mcore=False).tolist(), indices(tile, mcore=True).tolist(), strict=True)
    )


class Mosaic(NamedTuple):
    """Tiles between Hugging Face tensors and one Megatron tensor, and the function that makes it of them."""

    tiles: list[Tile]
    hf: dict[str, Shape]
    mcore: Shape
    make: Callable[[dict[str, npt.NDArray[Any]]], npt.NDArray[Any]]


@st.composite
def boxes(draw: st.DrawFn, shape: Shape) -> Box:
    """A box inside a shape; it may be empty."""
    start = tuple(draw(st.integers(0, extent)) for extent in shape)
    size = tuple(draw(st.integers(0, extent - first)) for first, extent in zip(start, shape, strict=True))
    return Box(start, size)


@st.composite
def affine_tiles(draw: st.DrawFn) -> tuple[Tile, Shape, Shape]:
    """A tile with split, permuted and strided axes on both sides, and shapes of tensors that hold it."""
    rank = draw(st.integers(1, 4))
    sizes = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    hf, hf_shape = draw(_sides("hf", sizes))
    mcore, mcore_shape = draw(_sides("mcore", sizes))
    return Tile(sizes, hf, mcore), hf_shape, mcore_shape


@st.composite
def _sides(draw: st.DrawFn, name: str, sizes: Shape) -> tuple[Side, Shape]:
    """A way to lay the grid into a tensor so that no two elements meet: nested walks with gaps along each axis."""
    rank = draw(st.integers(1, len(sizes)))
    order = draw(st.permutations(range(len(sizes))))
    on = [draw(st.integers(0, rank - 1)) for _ in sizes]
    steps: list[tuple[int, int]] = [(0, 1)] * len(sizes)
    reach = [0] * rank  # of what has been laid along each axis, from inner to outer
    for k in order:
        axis = on[k]
        step = reach[axis] + 1 + draw(st.integers(0, 2))
        if sizes[k] == 1:
            step = draw(st.integers(1, 5))
        steps[k] = (axis, step)
        reach[axis] += step * (sizes[k] - 1)
    base = tuple(draw(st.integers(0, 3)) for _ in range(rank))
    shape = tuple(first + far + 1 + draw(st.integers(0, 3)) for first, far in zip(base, reach, strict=True))
    return Side(name, base, tuple(steps)), shape


def _side(name: str, base: Shape, *steps: tuple[int, int]) -> Side:
    return Side(name, base, steps)


@st.composite
def mosaics(draw: st.DrawFn) -> Mosaic:
    """One of the transforms that model families need, at random sizes."""
    kinds = [interleaved_groups, stacked_rows, transposed, interleaved_columns, split_columns, permuted]
    kind: Callable[..., Mosaic] = draw(st.sampled_from(kinds))
    return kind(*(draw(st.integers(1, 4)) for _ in range(4)))


def interleaved_groups(groups: int, per_group: int, head: int, hidden: int) -> Mosaic:
    """Query, key and value of each group one above the other."""
    rows = {"q": per_group * head, "k": head, "v": head}
    period = sum(rows.values())
    tiles, at = [], 0
    for name, size in rows.items():
        tiles.append(
            Tile(
                (groups, size, hidden),
                _side(name, (0, 0), (0, size), (0, 1), (1, 1)),
                _side("m", (at, 0), (0, period), (0, 1), (1, 1)),
            )
        )
        at += size

    def make(hf: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        return np.concatenate([hf[name].reshape(groups, -1, hidden) for name in rows], axis=1).reshape(-1, hidden)

    return Mosaic(
        tiles, {name: (groups * size, hidden) for name, size in rows.items()}, (groups * period, hidden), make
    )


def stacked_rows(layers: int, gate: int, up: int, hidden: int) -> Mosaic:
    """Gate above up, layers on a leading axis."""
    tiles: list[Tile] = []
    shapes: dict[str, Shape] = {}
    for layer in range(layers):
        for name, first, size in (("gate", 0, gate), ("up", gate, up)):
            tiles.append(
                Tile(
                    (size, hidden),
                    _side(f"{name}{layer}", (0, 0), (0, 1), (1, 1)),
                    _side("m", (layer, first, 0), (1, 1), (2, 1)),
                )
            )
            shapes[f"{name}{layer}"] = (size, hidden)

    def make(hf: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        return np.stack([np.concatenate([hf[f"gate{k}"], hf[f"up{k}"]]) for k in range(layers)])

    return Mosaic(tiles, shapes, (layers, gate + up, hidden), make)


def transposed(experts: int, rows: int, columns: int, _: int) -> Mosaic:
    """Experts whose matrices are transposed."""
    tile = Tile(
        (experts, rows, columns),
        _side("w", (0, 0, 0), (0, 1), (1, 1), (2, 1)),
        _side("m", (0, 0, 0), (0, 1), (2, 1), (1, 1)),
    )
    return Mosaic(
        [tile], {"w": (experts, rows, columns)}, (experts, columns, rows), lambda hf: hf["w"].transpose(0, 2, 1)
    )


def interleaved_columns(experts: int, hidden: int, ffn: int, _: int) -> Mosaic:
    """Gate in the even and up in the odd columns, transposed: gate rows above up rows."""
    tiles = [
        Tile(
            (experts, hidden, ffn),
            _side("w", (0, 0, odd), (0, 1), (1, 1), (2, 2)),
            _side("m", (0, odd * ffn, 0), (0, 1), (2, 1), (1, 1)),
        )
        for odd in (0, 1)
    ]

    def make(hf: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        turned = hf["w"].transpose(0, 2, 1)
        return np.concatenate([turned[:, 0::2], turned[:, 1::2]], axis=1)

    return Mosaic(tiles, {"w": (experts, hidden, 2 * ffn)}, (experts, 2 * ffn, hidden), make)


def split_columns(rows: int, left: int, right: int, _: int) -> Mosaic:
    """The columns of one tensor come from two, swapped."""
    tiles = [
        Tile((rows, right), _side("w", (0, left), (0, 1), (1, 1)), _side("m", (0, 0), (0, 1), (1, 1))),
        Tile((rows, left), _side("w", (0, 0), (0, 1), (1, 1)), _side("m", (0, right), (0, 1), (1, 1))),
    ]

    def make(hf: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        return np.concatenate([hf["w"][:, left:], hf["w"][:, :left]], axis=1)

    return Mosaic(tiles, {"w": (rows, left + right)}, (rows, left + right), make)


def permuted(a: int, b: int, c: int, d: int) -> Mosaic:
    """Rows regrouped: (a, b, c) rows become (b, a, c) rows."""
    tile = Tile(
        (a, b, c, d),
        _side("w", (0, 0), (0, b * c), (0, c), (0, 1), (1, 1)),
        _side("m", (0, 0), (0, c), (0, a * c), (0, 1), (1, 1)),
    )

    def make(hf: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        return hf["w"].reshape(a, b, c, d).transpose(1, 0, 2, 3).reshape(-1, d)

    return Mosaic([tile], {"w": (a * b * c, d)}, (a * b * c, d), make)


@st.composite
def chunkings(draw: st.DrawFn, shape: Shape) -> list[Box]:
    """Boxes that cover a shape exactly once: bricks made by cutting boxes in two at random, in any order."""
    found = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5))):
        place = draw(st.integers(0, len(found) - 1))
        box = found[place]
        axes = [axis for axis, size in enumerate(box.size) if size > 1]
        if not axes:
            continue
        axis = draw(st.sampled_from(axes))
        cut = draw(st.integers(1, box.size[axis] - 1))
        found[place] = Box(box.start, (*box.size[:axis], cut, *box.size[axis + 1 :]))
        start = (*box.start[:axis], box.start[axis] + cut, *box.start[axis + 1 :])
        found.append(Box(start, (*box.size[:axis], box.size[axis] - cut, *box.size[axis + 1 :])))
    return draw(st.permutations(found))


def count(shape: Shape, found: list[Box]) -> npt.NDArray[np.int64]:
    """How many boxes each index of a shape lies in."""
    times = np.zeros(shape, np.int64)
    for box in found:
        times[tuple(slice(first, first + size) for first, size in zip(box.start, box.size, strict=True))] += 1
    return times


def numbered(shape: Shape, first: int) -> npt.NDArray[np.uint16]:
    """Different numbers in every place."""
    return (np.arange(math.prod(shape), dtype=np.uint16) + np.uint16(first)).reshape(shape)
