"""Live models filled from quantised weights: what an import of the same directory holds, in every rank's shards."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from tests.megatron import require
from tests.models import BY_NAME, make_model
from tests.quantised import dequantised, fp8_block, int4_group, mxfp4
from tests.ranks.fleet import World
from tests.ranks.test_live_load import FIXTURES, GPT_OSS, IMPORTS, ranks_of
from tests.tiny import bits, read_safetensors, same, write_safetensors

import shardway

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.ranks.fleet import Fleet

pytestmark = pytest.mark.timeout(300)

BLOCK = (48, 24)  # no multiple of what a rank has
CASES: dict[str, tuple[str, dict[str, int], Callable[[Path], Path], str]] = {
    "fp8-block": ("qwen3", {"tp": 2}, lambda path: fp8_block(path, BLOCK), "fp8-block"),
    "experts": ("qwen3_moe", {"tp": 2, "ep": 2, "etp": 1}, int4_group, "int4-group"),
    "mxfp4": ("gpt_oss", {"pp": 2, "ep": 2}, mxfp4, "mxfp4"),
}


def test_ranks_get_what_an_import_holds(fleet: Fleet, tmp_path: Path) -> None:
    require("transformers", "safetensors")
    worlds = []
    for case, (name, grid, change, _) in CASES.items():
        root = tmp_path / case
        if (FIXTURES / name).exists():
            shutil.copytree(FIXTURES / name, root / "hf")
        else:
            make_model({**BY_NAME, "gpt_oss": GPT_OSS}[name], root / "hf")
        model = change(root / "hf")
        (root / "plain").mkdir()
        write_safetensors(root / "plain/model.safetensors", dequantised(model, BLOCK))
        shardway.import_hf(model, root / "ckpt", fsync=False, **IMPORTS[name][0])
        task: dict[str, Any] = {
            "do": "through_a_grid",
            "hf": str(model),
            "plain": str(root / "plain"),
            "imported": [str(root / "ckpt/iter_0000000")],
            "grid": grid,
            "save": str(root / "saved"),
        }
        worlds.append(World(ranks=ranks_of(grid), tasks=[task], model=None))
    for case, ran in zip(CASES, fleet.run(*worlds), strict=True):
        scheme, root = CASES[case][3], tmp_path / case
        for outcome in ran.of(0):
            assert any(f"tensors were dequantised from {scheme}" in note for note in outcome.notes["notes"][0])
            assert not any("cast" in note for note in outcome.notes["notes"][0])
        stored = {tag for tag, _ in read_safetensors(root / "saved").values()}
        assert stored == {"BF16"}
        saved, plain = read_safetensors(root / "saved"), read_safetensors(root / "plain")
        assert same(bits(saved.items()), bits(plain.items()))
        assert "quantization_config" not in json.loads((root / "saved/config.json").read_text())
