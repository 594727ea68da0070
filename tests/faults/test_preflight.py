"""Everything that stands in the way is told at once, with the numbers, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from tests.tiny import Tiny, listing, write_model, write_safetensors

import shardway

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MODEL = Tiny(layers=2)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def problems(root: Path, convert: Callable[[], object]) -> dict[str, list[str]]:
    """What a conversion is refused for, by code; nothing may have changed."""
    before = listing(root)
    with pytest.raises(shardway.ShardwayError) as caught:
        convert()
    assert listing(root) == before
    found: dict[str, list[str]] = {}
    for problem in caught.value.problems:
        found.setdefault(problem.code, []).append(str(problem))
    return found


def test_of_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that are missing and that nobody claims, a truncated file, no space: one error."""
    weights = MODEL.weights()
    hf = MODEL.write(tmp_path / "hf", num_files=3)
    first = hf / "model-00001-of-00003.safetensors"
    extra = {"model.layers.0.self_attn.strange.weight": ("BF16", np.zeros((2, 2), np.uint16))}
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    mine = [name for name, file in index["weight_map"].items() if file == first.name]
    gone = mine.pop()
    write_safetensors(first, {name: ("BF16", weights[name]) for name in mine} | extra)
    del index["weight_map"][gone]
    index["weight_map"] |= dict.fromkeys(extra, first.name)
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    os.truncate(hf / "model-00003-of-00003.safetensors", 40)
    size = sum(path.stat().st_size for path in hf.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10))
    found = problems(tmp_path, lambda: shardway.import_hf(hf, tmp_path / "out"))
    assert any("model-00003-of-00003.safetensors" in text for texts in found.values() for text in texts)
    assert [text for text in found["tensor-unexpected"] if "strange" in text]
    (missing,) = found["tensor-missing"]
    assert gone in missing, "what a broken file may hold is not called missing"
    (space,) = found["no-space"]
    assert f"needed {size:,} bytes, free 10 bytes" in space


def test_small_files_and_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = MODEL.write(tmp_path / "hf")
    real = os.open

    def refuse(path: Any, flags: int, *rest: int, **options: Any) -> int:
        if str(path).endswith("tokenizer.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = problems(tmp_path, lambda: shardway.import_hf(hf, tmp_path / "new/out"))
    assert found.keys() == {"file-unreadable", "destination-unwritable"}
    assert "tokenizer.json" in found["file-unreadable"][0]


def test_tensors_and_a_destination_that_is_taken(tmp_path: Path) -> None:
    weights = MODEL.weights()
    hf = write_model(tmp_path / "hf", MODEL.config, {name: a for name, a in weights.items() if "mlp.up" not in name})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    found = problems(tmp_path, lambda: shardway.import_hf(hf, tmp_path / "out"))
    assert len(found["tensor-missing"]) == MODEL.layers
    assert "thesis.tex" in found["destination-exists"][0]


def test_of_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = MODEL.write(tmp_path / "hf")
    shardway.import_hf(hf, tmp_path / "mcore", fsync=False, max_file_size=4000)
    (tmp_path / "mcore/iter_0000000/__0_1.distcp").unlink()
    os.truncate(tmp_path / "mcore/iter_0000000/__0_0.distcp", 100)
    size = sum(path.stat().st_size for path in (tmp_path / "mcore/iter_0000000").glob("*.distcp"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10))
    found = problems(tmp_path, lambda: shardway.export_hf(tmp_path / "mcore", tmp_path / "out"))
    assert found.keys() == {"file-missing", "distcp-truncated", "no-space"}
    assert f"needed {size:,} bytes, free 10 bytes" in found["no-space"][0]
