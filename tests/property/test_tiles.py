"""Boxes and tiles against numpy, which enumerates every index."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.property.tilings import (
    Mosaic,
    affine_tiles,
    boxes,
    chunkings,
    count,
    indices,
    mosaics,
    numbered,
    pairs,
)

from shardway.core.boxes import Box, exact_cover, row_major_strides, whole
from shardway.core.tiles import Side, Tile, cover_fault, identity, linearise, restrict, runs

if TYPE_CHECKING:
    from shardway.core.tensors import Shape

EXAMPLES = settings(max_examples=150, deadline=None)
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@EXAMPLES
@given(case=affine_tiles(), data=st.data(), mcore=st.booleans())
def test_restrict_gives_exactly_the_elements_in_the_box(
    case: tuple[Tile, Shape, Shape], data: st.DataObject, mcore: bool
) -> None:
    tile, hf_shape, mcore_shape = case
    box = data.draw(boxes(mcore_shape if mcore else hf_shape))
    parts = restrict(tile, box, mcore=mcore)
    low, high = np.array(box.start), np.array(box.start) + np.array(box.size)
    inside = [pair for pair in pairs(tile) if ((np.array(pair[mcore]) >= low) & (np.array(pair[mcore]) < high)).all()]
    assert pairs(*parts) == inside


@EXAMPLES
@given(case=affine_tiles(), data=st.data(), mcore=st.booleans())
def test_restrictions_to_a_chunking_partition_a_tile(
    case: tuple[Tile, Shape, Shape], data: st.DataObject, mcore: bool
) -> None:
    tile, hf_shape, mcore_shape = case
    bricks = data.draw(chunkings(mcore_shape if mcore else hf_shape))
    parts = [part for box in bricks for part in restrict(tile, box, mcore=mcore)]
    assert pairs(*parts) == pairs(tile)
    assert sum(part.num_elements for part in parts) == tile.num_elements


@EXAMPLES
@given(case=affine_tiles(), data=st.data())
def test_linearise_and_runs_address_the_same_pairs(case: tuple[Tile, Shape, Shape], data: st.DataObject) -> None:
    tile, hf_shape, mcore_shape = case
    parts = [tile]
    hf_box, mcore_box = whole(hf_shape), whole(mcore_shape)
    if data.draw(st.booleans()):
        mcore_box = data.draw(boxes(mcore_shape))
        parts = restrict(tile, mcore_box, mcore=True)
    for part in parts:
        grid = linearise(part, hf_box, mcore_box)
        found = []
        starts = list(runs(grid))
        for hf, mcore in starts:
            found += [(hf + k, mcore + k) for k in range(grid.run_elements)]
        expected = [
            (_position(h, hf_box), _position(m, mcore_box))
            for h, m in zip(indices(part, mcore=False), indices(part, mcore=True), strict=True)
        ]
        assert sorted(found) == sorted(expected)
        assert grid.num_elements == part.num_elements == len(found)
        assert [mcore for _, mcore in starts] == sorted(mcore for _, mcore in starts)


def _position(index: np.ndarray[tuple[int], np.dtype[np.int64]], box: Box) -> int:
    return int(np.ravel_multi_index(tuple(index - np.array(box.start)), box.size))


@EXAMPLES
@given(mosaic=mosaics())
def test_the_transforms_of_the_families_mean_what_numpy_says(mosaic: Mosaic) -> None:
    hf = {name: numbered(shape, 1000 * k) for k, (name, shape) in enumerate(mosaic.hf.items())}
    made = np.zeros(mosaic.mcore, np.uint16)
    back = {name: np.zeros_like(array) for name, array in hf.items()}
    for tile in mosaic.tiles:
        made[tuple(indices(tile, mcore=True).T)] = hf[tile.hf.tensor][tuple(indices(tile, mcore=False).T)]
    assert np.array_equal(made, mosaic.make(hf))
    for tile in mosaic.tiles:
        back[tile.hf.tensor][tuple(indices(tile, mcore=False).T)] = made[tuple(indices(tile, mcore=True).T)]
    assert all(np.array_equal(back[name], hf[name]) for name in hf)
    assert cover_fault(mosaic.mcore, mosaic.tiles, mcore=True) is None
    for name, shape in mosaic.hf.items():
        assert cover_fault(shape, [tile for tile in mosaic.tiles if tile.hf.tensor == name], mcore=False) is None


@EXAMPLES
@given(shape=SHAPES, data=st.data())
def test_exact_cover_accepts_every_chunking(shape: Shape, data: st.DataObject) -> None:
    assert exact_cover(shape, data.draw(chunkings(shape))) is None


@EXAMPLES
@given(shape=SHAPES, data=st.data())
def test_exact_cover_agrees_with_counting(shape: Shape, data: st.DataObject) -> None:
    found = list(data.draw(chunkings(shape)))
    for _ in range(data.draw(st.integers(0, 2))):
        if data.draw(st.booleans()):
            found.insert(data.draw(st.integers(0, len(found))), data.draw(boxes(shape)))
        else:
            found.pop(data.draw(st.integers(0, len(found) - 1))) if found else None
    times = count(shape, found)
    fault = exact_cover(shape, found)
    if fault is None:
        assert (times == 1).all()
    else:
        assert fault.box.num_elements
        inside = times[tuple(slice(a, a + n) for a, n in zip(fault.box.start, fault.box.size, strict=True))]
        assert (inside == fault.times).all()
        assert fault.times != 1


@EXAMPLES
@given(shape=SHAPES, data=st.data())
def test_exact_cover_refuses_boxes_outside(shape: Shape, data: st.DataObject) -> None:
    found = list(data.draw(chunkings(shape)))
    axis = data.draw(st.integers(0, len(shape) - 1))
    start, size = [0] * len(shape), list(shape)
    start[axis], size[axis] = data.draw(st.sampled_from([(-1, 1), (shape[axis], 1), (0, shape[axis] + 1), (1, -1)]))
    outside = Box(tuple(start), tuple(size))
    fault = exact_cover(shape, [*found, outside])
    assert fault is not None
    assert fault == (outside, -1)


@EXAMPLES
@given(data=st.data(), mcore=st.booleans())
def test_cover_fault_agrees_with_counting(data: st.DataObject, mcore: bool) -> None:
    mosaic = data.draw(mosaics())
    name = "m" if mcore else data.draw(st.sampled_from(sorted(mosaic.hf)))
    shape = mosaic.mcore if mcore else mosaic.hf[name]
    tiles = [tile for tile in mosaic.tiles if mcore or tile.hf.tensor == name]
    match data.draw(st.sampled_from(["as it is", "dropped", "doubled", "shrunk", "moved", "one more"])):
        case "dropped":
            tiles.pop(data.draw(st.integers(0, len(tiles) - 1)))
        case "doubled":
            tiles.append(data.draw(st.sampled_from(tiles)))
        case "shrunk":
            place = data.draw(st.integers(0, len(tiles) - 1))
            tiles[place] = _shrunk(tiles[place], data.draw(st.integers(0, len(tiles[place].sizes) - 1)))
        case "moved":
            place = data.draw(st.integers(0, len(tiles) - 1))
            tiles[place] = _moved(tiles[place], shape, mcore=mcore)
        case "one more":
            box = data.draw(boxes(shape))
            tiles += restrict(identity(name, name, shape), box, mcore=mcore) if box.num_elements else []
    times = np.zeros(shape, np.int64)
    for tile in tiles:
        np.add.at(times, tuple(indices(tile, mcore=mcore).T), 1)
    fault = cover_fault(shape, tiles, mcore=mcore)
    assert (fault is None) == bool((times == 1).all())
    if fault is not None:
        assert fault.times != 1
        inside = times[tuple(slice(a, a + n) for a, n in zip(fault.box.start, fault.box.size, strict=True))]
        assert (inside == fault.times).any()


def _shrunk(tile: Tile, axis: int) -> Tile:
    sizes = list(tile.sizes)
    sizes[axis] = max(1, sizes[axis] - 1)
    return tile._replace(sizes=tuple(sizes))


def _moved(tile: Tile, shape: Shape, *, mcore: bool) -> Tile:
    """The tile one step along the first axis, if it still fits there."""
    side = tile.mcore if mcore else tile.hf
    moved = Side(side.tensor, (side.base[0] + 1, *side.base[1:]), side.steps)
    candidate = tile._replace(mcore=moved) if mcore else tile._replace(hf=moved)
    return candidate if indices(candidate, mcore=mcore)[:, 0].max() < shape[0] else tile


@EXAMPLES
@given(shape=SHAPES)
def test_identity_is_one_run(shape: Shape) -> None:
    grid = linearise(identity("a", "b", shape), whole(shape), whole(shape))
    assert grid.run_elements == math.prod(shape)
    assert list(runs(grid)) == [(0, 0)]
    assert row_major_strides(shape)[-1] == 1


@EXAMPLES
@given(case=affine_tiles(), data=st.data())
def test_a_cut_on_one_side_and_then_on_the_other_is_a_cut_on_both(
    case: tuple[Tile, Shape, Shape], data: st.DataObject
) -> None:
    tile, hf_shape, mcore_shape = case
    hf_box, mcore_box = data.draw(boxes(hf_shape)), data.draw(boxes(mcore_shape))
    one = [p for cut in restrict(tile, hf_box, mcore=False) for p in restrict(cut, mcore_box, mcore=True)]
    other = [p for cut in restrict(tile, mcore_box, mcore=True) for p in restrict(cut, hf_box, mcore=False)]
    assert pairs(*one) == pairs(*other)
