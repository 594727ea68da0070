"""Cutting mappings into streams: order, sizes, and effort that grows with the number of chunks, not with its square."""

from __future__ import annotations

from typing import TYPE_CHECKING
from unittest import mock

import pytest
from tests.tiny import Tiny

import shardway
from shardway.core.boxes import Box
from shardway.core.dtypes import BFLOAT16
from shardway.core.tensors import Chunk, StoredTensor
from shardway.core.tiles import identity, restrict
from shardway.families.config import HFConfig
from shardway.families.layout import Layout
from shardway.families.mapping import map_model
from shardway.formats.huggingface import open_huggingface
from shardway.plans import streams
from shardway.plans.imports import ImportOptions, plan_import
from shardway.plans.streams import build_streams, chunk_problems, frame, slabs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from shardway.core.tensors import Shape


def stored(name: str, shape: Shape, boxes: Sequence[tuple[Shape, Shape]]) -> StoredTensor:
    chunks = []
    at = 0
    for start, size in boxes:
        chunks.append(Chunk(start, size, f"{name}.bin", at))
        at += Box(start, size).num_elements * 2
    return StoredTensor(name, BFLOAT16, shape, tuple(chunks))


def rows(name: str, num_layers: int, columns: int) -> StoredTensor:
    """A stacked tensor in one chunk per layer and per column."""
    boxes = [((i, j), (1, 1)) for i in range(num_layers) for j in range(columns)]
    return stored(name, (num_layers, columns), boxes)


@pytest.mark.parametrize("columns", [1, 2])
def test_the_effort_grows_with_the_number_of_chunks(columns: int) -> None:
    calls = {}
    for num_layers in (500, 2000):
        a, b = rows("a", num_layers, columns), rows("b", num_layers, columns)
        with mock.patch.object(streams, "restrict", wraps=restrict) as counted:
            found = build_streams([identity("a", "b", a.shape)], {"a": a}, {"b": b})
            assert sum(len(stream.pieces) for stream in found) == num_layers * columns
        calls[num_layers] = counted.call_count
    assert calls[2000] <= 4.1 * calls[500]


def test_every_piece_lies_in_its_chunk() -> None:
    a = stored("a", (4, 6), [((0, 0), (4, 2)), ((0, 2), (4, 4))])
    b = stored("b", (4, 6), [((0, 0), (1, 6)), ((1, 0), (2, 3)), ((1, 3), (2, 3)), ((3, 0), (1, 6))])
    found = build_streams([identity("a", "b", (4, 6))], {"a": a}, {"b": b})
    assert [stream.box for stream in found] == [Box((0, 0), (1, 6)), Box((1, 0), (2, 6)), Box((3, 0), (1, 6))]
    assert [len(stream.chunks) for stream in found] == [1, 2, 1]
    assert [[piece.tile.sizes for piece in stream.pieces] for stream in found] == [
        [(1, 2), (1, 4)],
        [(2, 2), (2, 4)],
        [(1, 2), (1, 4)],
    ]


def test_slabs_of_bricks_are_one() -> None:
    bricks = [((0, 0), (1, 3)), ((0, 3), (2, 1)), ((1, 0), (2, 2)), ((1, 2), (1, 1)), ((2, 2), (1, 2))]
    tensor = stored("t", (3, 4), bricks)
    assert chunk_problems([tensor]) == []
    ((box, chunks),) = slabs(tensor)
    assert box == Box((0, 0), (3, 4))
    assert len(chunks) == 5


def test_tensors_without_elements_have_no_streams() -> None:
    empty = stored("e", (0, 4), [((0, 0), (0, 4))])
    assert slabs(empty) == []
    assert not build_streams([identity("e", "e", (0, 4))], {"e": empty}, {"e": empty})
    assert chunk_problems([empty, stored("none", (0,), [])]) == []


def test_streams_are_a_sequence() -> None:
    a, b = rows("a", 5, 2), rows("b", 5, 2)
    found = build_streams([identity("a", "b", a.shape)], {"a": a}, {"b": b})
    everything = [(stream.chunks, stream.pieces) for stream in found]
    assert len(found) == len(everything) == 10
    assert [(stream.chunks, stream.pieces) for stream in found[2:7:2]] == everything[2:7:2]
    assert (found[-1].chunks, found[-1].pieces) == everything[-1]
    with pytest.raises(IndexError):
        found[10]


def test_a_scalar_is_a_stream() -> None:
    scalar = stored("s", (), [((), ())])
    (stream,) = build_streams([identity("s", "s", ())], {"s": scalar}, {"s": scalar})
    assert stream.num_bytes == 2
    assert len(stream.pieces) == 1


@pytest.mark.parametrize(
    ("boxes", "code", "words"),
    [
        ([((0, 0), (2, 4))], "chunk-hole", "[2, 0]"),
        ([((0, 0), (3, 4)), ((0, 0), (3, 4))], "chunk-overlap", "2 chunks"),
        ([((0, 0), (3, 4)), ((1, 1), (1, 1))], "chunk-overlap", "[1, 1]"),
        ([((0, 0), (3, 4)), ((2, 0), (2, 4))], "chunk-out-of-bounds", "outside"),
        ([], "chunk-hole", "0 chunks"),
    ],
)
def test_chunks_that_are_no_cover(boxes: list[tuple[Shape, Shape]], code: str, words: str) -> None:
    (problem,) = chunk_problems([stored("t", (3, 4), boxes)])
    assert problem.code == code
    assert problem.tensor == "t"
    assert words in str(problem)
    assert problem.cure


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("most", [5_000, 200_000])
def test_streams_of_chunks_are_those_that_are_built(layout: Layout, most: int, tmp_path: Path) -> None:
    Tiny(hidden=200, ffn=200, layers=3).write(tmp_path / "hf")
    source = open_huggingface(tmp_path / "hf")
    mapping = map_model(HFConfig(source.config), layout)
    plan = plan_import(source, mapping, tmp_path / "out", ImportOptions(max_file_bytes=most))
    built = build_streams(mapping.tiles, source.catalog.tensors, plan.mcore.tensors, importing=True)
    assert len(plan.streams) == len(built) > (20 if most < 10_000 else 8)
    in_order = sorted(plan.streams, key=lambda stream: (stream.chunks[0].file, stream.chunks[0].offset))
    for ours, theirs in zip(in_order, built, strict=True):
        assert ours[:4] == theirs[:4]
        assert sorted(ours.pieces) == sorted(theirs.pieces)


@pytest.mark.parametrize("layout", list(Layout))
def test_the_plan_of_an_import(layout: Layout, tmp_path: Path) -> None:
    Tiny(hidden=200, ffn=200, layers=3).write(tmp_path / "hf")
    source = open_huggingface(tmp_path / "hf")
    mapping = map_model(HFConfig(source.config), layout)
    options = ImportOptions(max_file_bytes=200_000)
    plan = plan_import(source, mapping, tmp_path / "out", options)
    # What lies where: the literals, the frames and the streams fill every file without a gap.
    spans: dict[str, list[tuple[int, int]]] = {target.name: [] for target in plan.targets}
    for target in plan.targets:
        spans[target.name] += [(at, at + len(literal)) for at, literal in target.literals]
        assert target.num_bytes <= 200_000
    for stream in plan.streams:
        for chunk in stream.chunks:
            at, whole = frame(plan, stream.dtype, chunk)
            assert at + len(whole.head) == chunk.offset
            spans[chunk.file].append((at, at + whole.length))
            if whole.num_bytes >= 2**16:
                (piece, *_) = stream.pieces
                assert (chunk.offset - piece.hf.offset) % 4096 == 0
            else:
                assert chunk.offset % 64 == 0
    for target in plan.targets:
        edges = sorted(spans[target.name])
        assert [begin for begin, _ in edges] == [0, *(end for _, end in edges[:-1])]
        assert edges[-1][1] == target.num_bytes
    places = [(stream.chunks[0].file, stream.chunks[0].offset) for stream in plan.streams]
    assert places == sorted(places)
    assert plan.disk_bytes > plan.num_bytes
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"chunk_for": "tp=2"}], ids=["", "cut for a job"])
def test_a_plan_can_be_asked_for(options: dict[str, str], tmp_path: Path) -> None:
    Tiny().write(tmp_path / "hf")
    before = sorted(tmp_path.rglob("*"))
    report = shardway.plan(tmp_path / "hf", **options)
    assert report.feasible
    shardway.import_hf(tmp_path / "hf", tmp_path / "out", fsync=False, **options)  # type: ignore[arg-type]
    folder = tmp_path / "out/iter_0000000"
    for name, num_bytes in report.writes.items():
        assert (folder / name).stat().st_size == num_bytes
    assert sorted(tmp_path.glob("hf/**/*")) == [path for path in before if path != tmp_path / "hf"]
