"""Cases of boxes and tiles that a reader can check by hand."""

from __future__ import annotations

import gc

import pytest

from shardway.core.boxes import UNPROVEN, Box, CoverFault, exact_cover, hull, row_major_strides, span, whole
from shardway.core.collector import collector_paused
from shardway.core.tiles import Side, Tile, cover_fault, identity, linearise, reach, restrict, runs


def test_one_interval_inside_another_is_no_tiling() -> None:
    assert exact_cover((2,), [Box((0,), (2,)), Box((1,), (1,))]) == CoverFault(Box((1,), (1,)), 2)
    assert exact_cover((3,), [Box((0,), (2,)), Box((2,), (1,)), Box((1,), (2,))]) is not None


def entangled(count: int) -> tuple[tuple[int, int, int], list[Box]]:
    """A cover in which boxes lie side by side on no axis but the last, so that every cut spans very many of them."""
    boxes = []
    for column in range(count):
        rows, planes = 1 + column, 1 + column * 7919 % count
        for x, width in ((0, rows), (rows, count + 2 - rows)):
            for y, height in ((0, planes), (planes, count + 2 - planes)):
                boxes.append(Box((x, y, column), (width, height, 1)))
    return (count + 2, count + 2, count), boxes


def test_the_proof_of_a_cover_is_given_up_in_time() -> None:
    shape, boxes = entangled(12)
    assert exact_cover(shape, boxes) is None
    assert exact_cover(shape, [*boxes[:-1], boxes[0]]) not in (None, CoverFault(whole(shape), UNPROVEN))
    shape, boxes = entangled(1000)  # would take 1000**3 looks
    assert exact_cover(shape, boxes) == CoverFault(whole(shape), UNPROVEN)


@pytest.mark.parametrize(
    ("shape", "boxes", "fault"),
    [
        ((), [Box((), ())], None),
        ((), [], CoverFault(Box((), ()), 0)),
        ((), [Box((), ()), Box((), ())], CoverFault(Box((), ()), 2)),
        ((0, 3), [], None),
        ((4,), [], CoverFault(Box((0,), (4,)), 0)),
        ((4,), [Box((1,), (3,))], CoverFault(Box((0,), (1,)), 0)),
        ((4,), [Box((0,), (4,)), Box((2,), (0,))], None),
        ((2, 2), [Box((0, 0), (2, 1)), Box((0, 1), (1, 1))], CoverFault(Box((1, 1), (1, 1)), 0)),
    ],
)
def test_exact_cover(shape: tuple[int, ...], boxes: list[Box], fault: CoverFault | None) -> None:
    assert exact_cover(shape, boxes) == fault


def test_spans_and_hulls() -> None:
    strides = row_major_strides((3, 4, 5))
    assert strides == (20, 5, 1)
    assert span(Box((1, 0, 2), (2, 2, 3)), strides) == (22, 49)
    assert span(Box((), ()), ()) == (0, 0)
    assert hull([Box((1, 5), (2, 1)), Box((0, 6), (1, 3))]) == Box((0, 5), (3, 4))


def test_a_whole_tile_is_cut_to_itself() -> None:
    tile = identity("a", "b", (3, 4))
    assert restrict(tile, Box((0, 0), (3, 4)), mcore=True) == [tile]
    assert restrict(tile, Box((0, 0), (3, 4)), mcore=True)[0] is tile
    assert restrict(tile, Box((3, 0), (0, 4)), mcore=False) == []
    assert reach((2, 3), ((0, 4), (0, 1)), 2) == (7, 1)


def test_a_query_group_is_one_run() -> None:
    """Two groups of 3 query rows, 1 key row and 1 value row, of 4 columns."""
    query = Tile((2, 3, 4), Side("q", (0, 0), ((0, 3), (0, 1), (1, 1))), Side("m", (0, 0), ((0, 5), (0, 1), (1, 1))))
    grid = linearise(query, Box((0, 0), (6, 4)), Box((0, 0), (10, 4)))
    assert grid.run_elements == 12
    assert list(runs(grid)) == [(0, 0), (12, 20)]


def test_stacked_layers_are_proven_one_by_one() -> None:
    def layer(index: int, rows: int = 3) -> Tile:
        steps = ((1, 1), (2, 1))
        return Tile((rows, 2), Side(f"w{index}", (0, 0), ((0, 1), (1, 1))), Side("m", (index, 0, 0), steps))

    whole = [layer(k) for k in range(4)]
    assert cover_fault((4, 3, 2), whole, mcore=True) is None
    assert cover_fault((4, 3, 2), [*whole, layer(2)], mcore=True) == CoverFault(Box((2, 0, 0), (1, 3, 2)), 2)
    assert cover_fault((4, 3, 2), whole[:3], mcore=True) == CoverFault(Box((3, 0, 0), (1, 3, 2)), 0)
    assert cover_fault((4, 3, 2), [*whole[:3], layer(3, 2)], mcore=True) == CoverFault(Box((3, 2, 0), (1, 1, 2)), 0)
    outside = cover_fault((4, 3, 2), [*whole, layer(4)], mcore=True)
    assert outside is not None
    assert outside.times == -1
    assert cover_fault((4, 3), whole, mcore=True) is not None


def test_the_collector_is_paused_and_comes_back() -> None:
    assert gc.isenabled()
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), collector_paused():
        raise ZeroDivisionError
    assert gc.isenabled()
