"""The order in which an import takes the files of its source."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from shardway.core.boxes import whole
from shardway.core.dtypes import BFLOAT16
from shardway.core.tensors import Catalog, Chunk
from shardway.core.tiles import identity
from shardway.plans.model import Direction, Piece, Plan, Stream
from shardway.run.waves import Wave, arrivals, bytes_at_once, in_waves, most_at_once

PLAN = Plan(
    direction=Direction.IMPORT,
    hf=Catalog(root=Path(), tensors={}),
    mcore=Catalog(root=Path(), tensors={}),
    streams=(),
)


def stream(number: int, *files: str) -> Stream:
    """A stream that reads from some files."""
    tile = identity(f"hf{number}", f"m{number}", (4,))
    pieces = tuple(Piece(tile, Chunk((0,), (4,), file, 0)) for file in files)
    return Stream(f"m{number}", BFLOAT16, whole((4,)), (Chunk((0,), (4,), "out", 8 * number),), lambda: pieces)


def check(streams: list[Stream], waves: list[Wave]) -> None:
    """Every stream once, with its files there, each of which comes once and goes once."""
    assert sorted(each.tensor for wave in waves for each in wave.streams) == sorted(each.tensor for each in streams)
    here: set[str] = set()
    gone: set[str] = set()
    for wave in waves:
        assert not gone & set(wave.needs)
        here |= set(wave.needs)
        assert {piece.hf.file for each in wave.streams for piece in each.pieces} <= set(wave.needs)
        assert set(wave.frees) <= here
        here -= set(wave.frees)
        gone |= set(wave.frees)
    assert not here


def test_layers_in_order_need_two_files_at_a_time() -> None:
    names = [f"{number:02}" for number in range(20)]
    streams = [stream(k, name) for k, name in enumerate(names)]
    streams += [stream(100 + k, *pair) for k, pair in enumerate(itertools.pairwise(names))]
    random.Random(1).shuffle(streams)
    waves = in_waves(PLAN, streams)
    check(streams, waves)
    assert arrivals(waves) == names
    assert most_at_once(waves) == 2
    assert len(waves) == 39
    sizes = dict.fromkeys(names, 10) | {"07": 30, "08": 25}
    assert bytes_at_once(waves, sizes, 2) == 55
    assert bytes_at_once(waves, {}, 2) == 0


def test_a_pair_far_apart_takes_one_more() -> None:
    """As an output layer that is stored beside the embedding."""
    names = [f"{number:02}" for number in range(20)]
    streams = [stream(k, *pair) for k, pair in enumerate(itertools.pairwise(names))]
    streams.append(stream(99, "00", "19"))
    waves = in_waves(PLAN, streams)
    check(streams, waves)
    assert most_at_once(waves) <= 4


@pytest.mark.parametrize("seed", range(20))
def test_any_streams(seed: int) -> None:
    rng = random.Random(seed)
    names = [str(number) for number in range(rng.randint(1, 12))]
    streams = [stream(k, *rng.sample(names, rng.randint(1, min(4, len(names))))) for k in range(rng.randint(1, 60))]
    others = rng.sample(names, rng.randint(0, len(names)))
    waves = in_waves(PLAN, streams, others)
    check(streams, waves)
    assert set(others) <= set(arrivals(waves))


def test_nothing_to_do() -> None:
    assert in_waves(PLAN, []) == []
    assert most_at_once([]) == 0
