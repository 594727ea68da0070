"""Comparing the tensors of two checkpoints."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

from shardway.core.dtypes import dtype_of_torch
from shardway.core.tensors import Catalog, Chunk, StoredTensor
from shardway.core.tiles import identity
from shardway.plans.model import Direction, Plan
from shardway.plans.streams import build_streams
from shardway.verification.compare import compare_streams

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("dtype", "ours", "theirs", "largest"),
    [
        ("complex128", [1, 1e308 + 1e308j], [1, -1e308 - 1e308j], math.inf),
        ("complex64", [1, 3e38 + 3e38j], [1, 0], abs(complex(np.complex64(3e38 + 3e38j)))),
        ("float64", [1e308, 2], [-1e308, 2], math.inf),
        ("float32", [2, 3e38], [2, -3e38], 2 * float(np.float32(3e38))),
        ("float16", [2, math.inf], [2, 1], math.inf),
    ],
)
def test_differences_may_be_larger_than_the_type(
    dtype: str, ours: list[complex], theirs: list[complex], largest: float, tmp_path: Path
) -> None:
    catalogs = []
    for side, values in (("ours", ours), ("theirs", theirs)):
        (tmp_path / side).mkdir()
        np.array(values, dtype).tofile(tmp_path / side / "f")
        tensor = StoredTensor("w", dtype_of_torch(dtype), (2,), (Chunk((0,), (2,), "f", 0),))
        catalogs.append(Catalog(root=tmp_path / side, tensors={"w": tensor}))
    hf, mcore = catalogs
    streams = build_streams([identity("w", "w", (2,))], hf.tensors, mcore.tensors)
    differences, damaged = compare_streams(Plan(Direction.COMPARE, hf, mcore, streams), 1)
    assert damaged == []
    assert differences["w"].num_elements == 1
    assert differences["w"].max_abs == pytest.approx(largest)
