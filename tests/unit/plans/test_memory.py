"""Memory that planning takes, by the number of tensors: what counts for a model of 50,000 of them."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

import pytest
from benchmarks.models import Llama, make

import shardway

if TYPE_CHECKING:
    from pathlib import Path

MODEL = Llama(
    num_layers=300,
    hidden=8,
    heads=2,
    kv_heads=1,
    head_dim=4,
    ffn=8,
    vocabulary=8,
    tied=False,
    max_shard_bytes=400_000,
)


def peak_bytes(source: Path, layout: str) -> float:
    """The most memory that planning a conversion takes at any time, for each tensor."""
    shardway.plan(source, layout=layout)  # what is imported and remembered once for all counts for nothing
    tracemalloc.start()
    try:
        assert shardway.plan(source, layout=layout).feasible
        return tracemalloc.get_traced_memory()[1] / len(MODEL.shapes())
    finally:
        tracemalloc.stop()


# An eighth more than it takes: 1,124 and 1,374 bytes in an import, 1,402 and 1,609 in an export.
@pytest.mark.parametrize(
    ("layout", "most_importing", "most_exporting"), [("stacked", 1265, 1580), ("per-layer", 1545, 1810)]
)
def test_planning_takes_little_memory_for_each_tensor(
    tmp_path: Path, layout: str, most_importing: int, most_exporting: int
) -> None:
    make(MODEL, tmp_path / "hf", weights=False)
    shardway.import_hf(tmp_path / "hf", tmp_path / "megatron", layout=layout, fsync=False)

    importing, exporting = peak_bytes(tmp_path / "hf", layout), peak_bytes(tmp_path / "megatron", "auto")

    assert importing < most_importing
    assert exporting < most_exporting
