"""Imports from the Hub: what is fetched, what is kept, and what happens when it does not come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.tiny import Tiny

import shardway

if TYPE_CHECKING:
    from tests.hub.server import FakeHub

NAME = "org/model"
MODEL = Tiny(layers=6, hidden=16, ffn=24, vocab=40)


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """The model, of five files, with code beside it and a tokenizer."""
    folder = MODEL.write(tmp_path / "origin", num_files=5)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "modeling_model.py").write_text("raise SystemExit\n")
    (folder / "README.md").write_text("# a model\n")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"weights of another kind")
    return folder


@pytest.fixture
def sha(hub: FakeHub, origin: Path, elsewhere: Path) -> str:
    """The commit of the model on the Hub."""
    return hub.add(NAME, origin)


def weights_of(origin: Path) -> set[str]:
    return {path.name for path in origin.glob("*.safetensors")}


@pytest.mark.parametrize("keep", [True, False])
def test_an_import_from_the_hub_is_that_of_the_directory(hub: FakeHub, origin: Path, sha: str, keep: bool) -> None:
    report = shardway.import_hf(NAME, "ckpt", keep_source=keep)
    assert shardway.verify(origin, "ckpt").equal
    assert shardway.verify("ckpt").equal
    assert report.source == NAME
    assert any(sha in note for note in report.notes)
    assert any("modeling_model.py" in note for note in report.notes)
    record = json.loads(Path("ckpt/iter_0000000/shardway.json").read_text())
    assert record["source"] == f"hub:{NAME}@{sha}"
    assert set(hub.fetched()) == weights_of(origin) | {
        "config.json", "model.safetensors.index.json", "tokenizer.json",
    }  # fmt: skip
    assert len(hub.fetched()) == len(set(hub.fetched()))
    assert not [name for name in hub.asked() if name.endswith((".py", ".md", ".pth"))]
    assert sorted(path.name for path in Path("ckpt/iter_0000000/hf").iterdir()) == ["config.json", "tokenizer.json"]
    assert sorted(path.name for path in Path().iterdir()) == ["ckpt"]
