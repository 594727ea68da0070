"""What fills a comb stays together: an export of interleaved experts is a few writes, not one per element."""

from __future__ import annotations

from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import Array, bits, read_safetensors, same, write_model

import shardway
from shardway.core.boxes import Box, hull
from shardway.core.tiles import Side, Tile
from shardway.families.config import HFConfig
from shardway.families.mapping import map_model
from shardway.plans.combs import Grid, complete, keep_whole
from shardway.run import blocks
from shardway.run.files import OpenFile

if TYPE_CHECKING:
    from pathlib import Path

EXPERTS, WIDTH = 3, 32


def teeth(pitch: int, rows: int, columns: int, offset: int = 0) -> list[Grid]:
    """Grids that take turns along the rows of a matrix."""
    return [Grid(offset + k, (columns, rows), (pitch, pitch * columns)) for k in range(pitch)]


@given(pitch=st.integers(2, 4), rows=st.integers(2, 4), columns=st.integers(2, 4), data=st.data())
@settings(max_examples=40, deadline=None)
def test_only_combs_without_a_gap_are_complete(pitch: int, rows: int, columns: int, data: st.DataObject) -> None:
    first, second = teeth(pitch, rows, columns), teeth(pitch, rows, columns, offset=pitch * rows * columns)
    grids = data.draw(st.permutations([*first, *second, Grid(10**6, (rows, columns), (columns, 1))]))
    found = [sorted(grids[k].offset for k in group) for group in complete(grids)]
    assert found == [[grid.offset for grid in first], [grid.offset for grid in second]]
    gap = data.draw(st.integers(0, pitch - 1))
    left = [grid for grid in grids if grid.offset != gap]
    assert [sorted(left[k].offset for k in group) for group in complete(left)] == [[grid.offset for grid in second]]


def test_boxes_are_joined_where_they_would_cut_a_comb() -> None:
    def comb(row: int, column: int) -> tuple[Tile, Box]:
        hf = Side("h", (0, column), ((1, 2), (0, 1)))
        return Tile((2, 3), hf, Side("m", (row, 0), ((0, 1), (1, 1)))), Box((0, 0), (3, 4))

    rows = [Box((row, 0), (1, 3)) for row in range(6)]
    both = [comb(1, 0), comb(3, 1)]
    assert keep_whole(rows, both, (6, 3)) == [(0, 1), (1, 5), (5, 6)]
    assert keep_whole(rows, both[:1], (6, 3)) == [(k, k + 1) for k in range(6)]
    halves = [Box((row, column), (1, size)) for row in range(6) for column, size in ((0, 1), (1, 2))]
    joined = keep_whole(halves, both, (6, 3))
    assert [hull(halves[begin:end]) for begin, end in joined if end - begin > 1] == [Box((1, 0), (4, 3))]


def write_gpt_oss(path: Path) -> tuple[Path, dict[str, Array]]:
    values: dict[str, object] = {
        "architectures": ["GptOssForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "vocab_size": 5,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "sliding_window": 8,
        "torch_dtype": "bfloat16",
    }
    rng = np.random.default_rng(0)
    shapes = map_model(HFConfig(values)).hf
    weights: dict[str, Array] = {name: rng.integers(0, 2**16, shape, np.uint16) for name, shape in shapes.items()}
    return write_model(path, values, weights), weights


def test_interleaved_experts_take_few_reads_and_writes(tmp_path: Path) -> None:
    """Whatever the size of a block, and with gate and up in chunks of their own as Megatron Bridge has them."""
    model, weights = write_gpt_oss(tmp_path / "hf")
    writes: list[int] = []
    reads: list[int] = []
    write, read = OpenFile.write_from, OpenFile.read_into

    def write_from(self: OpenFile, view: memoryview | bytes, offset: int) -> None:
        writes.append(len(view))
        write(self, view, offset)

    def read_into(self: OpenFile, view: memoryview, offset: int) -> None:
        reads.append(len(view))
        read(self, view, offset)

    with (
        mock.patch.object(OpenFile, "write_from", write_from),
        mock.patch.object(OpenFile, "read_into", read_into),
        mock.patch.object(blocks, "BLOCK_BYTES", 1024),
    ):
        shardway.import_hf(model, tmp_path / "megatron", fsync=False)
        num_imported = len(reads)
        writes.clear()
        shardway.export_hf(tmp_path / "megatron", tmp_path / "back", fsync=False)
    found = read_safetensors(tmp_path / "back")
    assert same(bits(found.items()), weights)
    # Element by element it would take 24,576 of each for the gates and as many for what goes up.
    assert num_imported < 2000
    assert writes.count(2 * 2 * WIDTH * WIDTH) == 2 * EXPERTS
    assert len(writes) < 2000
