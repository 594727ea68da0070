"""Live saves to a Hugging Face directory: replicas that are absent, killed or stuck, and what is there already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.megatron import require
from tests.models import logits_of
from tests.oracle import read_safetensors, same_bits
from tests.ranks.fleet import World, listing, same_error, same_report
from tests.ranks.load_tasks import tokens_of

if TYPE_CHECKING:
    from tests.ranks.fleet import Fleet

pytestmark = pytest.mark.timeout(200)

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures/hf"
LLAMA = FIXTURES / "llama"
BOUND = 25.0


def world(ranks: int, path: Path, *, grid: dict[str, int] | None = None, **task: Any) -> World:
    asked = {"do": "save_hf", "hf": str(LLAMA), "path": str(path), "grid": grid or {}, **task}
    fault = task.get("fault") or {}
    killed = [fault["rank"]] if fault.get("do", "").startswith("kill") else []
    return World(ranks=ranks, model=None, tasks=[asked], killed=killed, store="file")


def check(path: Path, sign: int = 1) -> None:
    """The original's tensors, times a sign, and its small files."""
    before, after = read_safetensors(LLAMA), read_safetensors(path)
    assert before.keys() == after.keys()
    assert [name for name in before if not same_bits(before[name] * sign, after[name])] == []
    assert sorted(each.name for each in path.iterdir()) == sorted(each.name for each in LLAMA.iterdir())
    assert json.loads((path / "config.json").read_text()) == json.loads((LLAMA / "config.json").read_text())


def test_whoever_comes_saves_the_model(fleet: Fleet, tmp_path: Path) -> None:
    """Absent, killed and failing ranks on TP=2, DP=2, and on three replicas."""
    short: dict[str, Any] = {"distributed_timeout_minutes": 0.1}
    worlds = {
        "absent": world(4, tmp_path / "absent", grid={"tp": 2}, absent=[3]),
        "written by one": world(2, tmp_path / "one"),
        "killed while writing": world(
            3, tmp_path / "write", fault={"rank": 0, "at": "pwrite", "do": "kill", "after": 6}, **short
        ),
        "killed with the metadata": world(
            3, tmp_path / "publish", fault={"rank": 0, "at": "publish", "do": "kill after"}, **short
        ),
        "killed before the rename": world(
            3, tmp_path / "finish", fault={"rank": 0, "at": "finish", "do": "kill"}, **short
        ),
        "killed after the rename": world(
            3, tmp_path / "finished", fault={"rank": 0, "at": "finish", "do": "kill after"}, **short
        ),
    }
    for name, (asked, ran) in zip(worlds, zip(worlds.values(), fleet.run(*worlds.values()), strict=True), strict=True):
        report = same_report(ran.of(0))
        path = Path(asked.tasks[0]["path"])
        assert report["path"] == str(path), name
        assert report["num_files"] == 1
        assert report["num_bytes"] == (LLAMA / "model.safetensors").stat().st_size
        assert max(outcome.seconds for outcome in ran.of(0)) < 40
        check(path)
        assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


def test_without_a_holder_nothing_is_published(fleet: Fleet, tmp_path: Path) -> None:
    """Half of each matrix is on rank 1 alone; a rank whose disk is full fails all."""
    absent, full = fleet.run(
        world(2, tmp_path / "deep/absent", grid={"tp": 2}, absent=[1], distributed_timeout_minutes=0.1),
        world(2, tmp_path / "full", grid={"tp": 2}, fault={"rank": 1, "at": "pwrite", "do": "ENOSPC", "after": 3}),
    )
    error = same_error(absent.of(0))
    assert (error.error, error.code) == ("SaveIncomplete", "save-incomplete")
    assert "decoder.layers.mlp.linear_fc2.weight" in error.text
    error = same_error(full.of(0))
    assert (error.error, error.code) == ("SaveFailed", "no-space")
    assert "rank 1" in error.text
    assert not (tmp_path / "deep/absent").exists()
    assert not (tmp_path / "full").exists()
    assert not list(tmp_path.rglob(".*"))


def test_what_is_there_stays_or_is_replaced_whole(fleet: Fleet, tmp_path: Path) -> None:
    good: dict[str, Any] = {"do": "save_hf", "hf": str(LLAMA), "path": str(tmp_path / "out"), "grid": {"pp": 2}}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    tasks: list[dict[str, Any]] = [
        good,
        good | {"sign": -1},
        good | {"sign": -1, "if_exists": "replace", "max_shard_size": "40KB", "dtype": "fp32"},
        good | {"path": str(tmp_path / "other")},
    ]
    (ran,) = fleet.run(World(ranks=2, model=None, tasks=tasks))
    same_report(ran.of(0))
    for task, why in ((1, "it holds a checkpoint"), (3, "it is not empty and no Hugging Face checkpoint: notes.txt")):
        error = same_error(ran.of(task))
        assert error.code == "destination-exists"
        assert why in error.text
    assert same_report(ran.of(2))["num_files"] > 3
    before, after = read_safetensors(LLAMA), read_safetensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert [name for name in before if not same_bits(-before[name].float(), after[name])] == []
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"
    assert [each.name for each in listing_of(tmp_path / "other")] == ["notes.txt"]
    assert len(listing(tmp_path / "out")) > 4
    require("transformers")
    import torch

    loaded = logits_of(tmp_path / "out", tokens_of(256))
    assert torch.isfinite(loaded).all()


def listing_of(path: Path) -> list[Path]:
    return sorted(path.iterdir())
