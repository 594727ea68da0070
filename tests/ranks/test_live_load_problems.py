"""What goes wrong with live loads: everything is said at once, and the model is as it was, or the error says not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.megatron import require
from tests.ranks.fleet import World
from tests.tiny import read_safetensors, write_safetensors

import shardway
from shardway.formats.torch_dist import open_torch_dist

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.ranks.fleet import Fleet

pytestmark = pytest.mark.timeout(200)

LLAMA = Path(__file__).resolve().parents[1] / "fixtures/hf/llama"
FC2 = "decoder.layers.mlp.linear_fc2.weight"
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


def variant(root: Path, change: Callable[[dict[str, Any]], None], **config: Any) -> Path:
    """The fixture with other weights or another config."""
    shutil.copytree(LLAMA, root)
    tensors = read_safetensors(root)
    change(tensors)
    write_safetensors(root / "model.safetensors", tensors)
    values = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(values | config))
    return root


def missing(tensors: dict[str, Any]) -> None:
    del tensors[UP]


def extra(tensors: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.side_proj.weight"] = tensors[UP]


def misshapen(tensors: dict[str, Any]) -> None:
    tag, values = tensors[DOWN]
    tensors[DOWN] = tag, values.reshape(values.shape[::-1])


def integers(tensors: dict[str, Any]) -> None:
    tensors[UP] = "I8", np.zeros(tensors[UP][1].shape, np.uint8)


def all_of_it(tensors: dict[str, Any]) -> None:
    for change in (extra, missing, misshapen):
        change(tensors)


def unchanged(tensors: dict[str, Any]) -> None:
    del tensors["lm_head.weight"]


def flip(root: Path) -> None:
    """Change one bit of a weight in a Megatron checkpoint."""
    checkpoint = open_torch_dist(root)
    chunk = checkpoint.catalog.tensors[FC2].chunks[-1]
    with (checkpoint.root / chunk.file).open("r+b") as file:
        file.seek(chunk.offset + 10)
        (byte,) = file.read(1)
        file.seek(chunk.offset + 10)
        file.write(bytes([byte ^ 4]))


@pytest.fixture(scope="module")
def found(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was said of each case, by its name."""
    require("safetensors")
    root = tmp_path_factory.mktemp("problems")
    changes: dict[str, Any] = {
        "missing": missing,
        "extra": extra,
        "misshapen": misshapen,
        "integers": integers,
        "all of it": all_of_it,
    }
    cases: dict[str, dict[str, Any]] = {
        name: {"hf": str(variant(root / name.replace(" ", "-"), change))} for name, change in changes.items()
    }
    cases["tied"] = {"hf": str(variant(root / "tied", unchanged, tie_word_embeddings=True))}
    cases["unreadable"] = {"hf": str(LLAMA), "failing": 3}
    cases["unreadable at once"] = {"hf": str(LLAMA), "failing": 0}
    cases["good"] = {"hf": str(LLAMA)}
    shardway.import_hf(LLAMA, root / "megatron", fsync=False)
    cases["good checkpoint"] = {"megatron": str(root / "megatron")}
    shutil.copytree(root / "megatron", root / "flipped")
    flip(root / "flipped")
    cases["flipped"] = {"megatron": str(root / "flipped")}
    (root / "empty").mkdir()
    cases["no checkpoint"] = {"megatron": str(root / "empty")}
    other = {"add_qkv_bias": True, "num_layers": 3, "ffn_hidden_size": 96}
    another = {name: cases[name] for name in ("good", "good checkpoint")}
    worlds = [
        World(ranks=1, model=None, tasks=[{"do": "refused", "hf": str(LLAMA), "cases": cases, "fields": {}}]),
        World(ranks=1, model=None, tasks=[{"do": "refused", "hf": str(LLAMA), "cases": another, "fields": other}]),
    ]
    first, second = fleet.run(*worlds)
    return {**first.of(0)[0].notes, **{f"other model, {name}": said for name, said in second.of(0)[0].notes.items()}}


@pytest.mark.parametrize(
    ("case", "codes", "tensors"),
    [
        ("missing", ["tensor-missing"], [UP]),
        ("extra", ["tensor-unexpected"], ["model.layers.0.mlp.side_proj.weight"]),
        ("misshapen", ["shape-mismatch"], [DOWN]),
        ("integers", ["dtype-unsupported"], [UP]),
        (
            "all of it",
            ["tensor-missing", "shape-mismatch", "tensor-unexpected"],
            [UP, DOWN, "model.layers.0.mlp.side_proj.weight"],
        ),
        ("tied", ["tensor-missing"], ["lm_head.weight"]),
        ("no checkpoint", ["not-a-checkpoint"], [None]),
        ("flipped", ["digest-mismatch"], [FC2]),
    ],
)
def test_everything_is_said_before_anything_is_changed(
    case: str, codes: list[str], tensors: list[str | None], found: dict[str, Any]
) -> None:
    said = found[case]
    assert said is not None
    assert said["untouched"]
    assert (said["codes"], said["tensors"]) == (codes, tensors), said["text"]


@pytest.mark.parametrize("case", ["other model, good", "other model, good checkpoint"])
def test_a_model_of_another_config_is_refused(case: str, found: dict[str, Any]) -> None:
    said = found[case]
    assert said is not None
    assert said["untouched"]
    assert set(said["codes"]) == {"config-invalid", "shape-mismatch", "tensor-unexpected"}
    assert "the model has 3 layers, and the config describes 4" in said["text"]
    assert "decoder.layers.self_attention.linear_qkv.bias" in said["tensors"]
    assert "decoder.layers.mlp.linear_fc2.weight" in said["tensors"]


@pytest.mark.parametrize("case", ["unreadable", "unreadable at once"])
def test_an_error_while_reading_says_that_the_model_was_changed(case: str, found: dict[str, Any]) -> None:
    said = found[case]
    assert said is not None
    assert set(said["codes"]) == {"io-failed"}
    threads_that_failed = len(said["codes"])
    assert said["text"].count("have been written in part") == threads_that_failed
    assert said["text"].count("model.safetensors") >= threads_that_failed


def test_what_is_good_is_loaded(found: dict[str, Any]) -> None:
    assert found["good"] is None
    assert found["good checkpoint"] is None


def test_nobody_waits_for_a_rank_that_does_not_load(fleet: Fleet) -> None:
    """Rank 1 has half of every matrix, and begins when rank 0 is done; in an export rank 0 gives up in bounded time."""
    loads = {"do": "alone", "hf": str(LLAMA), "grid": {"tp": 2}, "call": "load"}
    loaded, exported = fleet.run(
        World(ranks=2, model=None, tasks=[loads]),
        World(ranks=2, model=None, tasks=[loads | {"call": "export"}]),
    )
    assert [outcome.text for outcome in loaded.of(0)] == ["", ""]
    first, second = exported.of(0)
    assert first.text.startswith("gather-failed: rank 0 did not get")
    assert "in the group of ranks [0, 1]" in first.text
    assert first.notes["seconds"] < 30
    assert second.text == ""


def test_memory_and_bytes(fleet: Fleet, tmp_path: Path) -> None:
    """A model of 0.2 GB, saved at TP=2 into TP=1 and PP=2: extra memory below 64 MB, no byte too many."""
    from benchmarks.models import Llama, make

    hf = tmp_path / "hf"
    model = Llama(
        num_layers=4,
        hidden=1024,
        heads=8,
        kv_heads=2,
        head_dim=128,
        ffn=4096,
        vocabulary=16384,
        tied=False,
        max_shard_bytes=60_000_000,
    )
    make(model, hf)
    saved = str(tmp_path / "saved")
    task = {"do": "measured", "hf": str(hf), "grid": {"tp": 2}, "sources": [], "save": saved}
    (two,) = fleet.run(World(ranks=2, model=None, tasks=[task]))
    one, stages = fleet.run(
        World(ranks=1, model=None, tasks=[task | {"grid": {}, "sources": [saved], "save": None}]),
        World(ranks=2, model=None, tasks=[task | {"grid": {"pp": 2}, "sources": [saved], "save": None}]),
    )
    for ran, least in ((two, 90), (one, 180), (stages, 90)):
        for outcome in ran.of(0):
            totals = []
            for extra_bytes, read_bytes, num_bytes, total in outcome.notes["found"]:
                assert num_bytes > least * 10**6
                assert read_bytes <= 1.05 * num_bytes
                assert extra_bytes < 64 * 10**6
                totals.append(total)
            assert all(total == totals[0] for total in totals)
