"""What is open while a plan is executed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.tiny import Tiny

import shardway
from shardway.run import files, mover

if TYPE_CHECKING:
    from shardway import Progress


class Watch:
    """The most files below a directory that this process has open at once, looked at with every progress."""

    def __init__(self, root: Path) -> None:
        self.most = 0
        self.root = root

    def __call__(self, _: Progress) -> None:
        opened = []
        for name in os.listdir("/proc/self/fd"):
            try:
                opened.append(Path(os.readlink(f"/proc/self/fd/{name}")))
            except FileNotFoundError:  # the directory that was listed
                continue
        found = [path for path in opened if path.suffix in {".distcp", ".safetensors"}]
        self.most = max(self.most, sum(path.is_relative_to(self.root) for path in found))


@pytest.mark.parametrize("direction", ["import", "export"])
def test_finished_files_are_closed_while_others_are_written(direction: str, tmp_path: Path) -> None:
    hf, mcore = Tiny(layers=2).write(tmp_path / "hf"), tmp_path / "mcore"
    watch = Watch(tmp_path / "out")
    if direction == "import":
        shardway.import_hf(hf, tmp_path / "out/m", fsync=False, workers=1, max_file_size=4000, progress=watch)
    else:
        shardway.import_hf(hf, mcore, fsync=False)
        shardway.export_hf(mcore, tmp_path / "out/hf", fsync=False, workers=1, max_shard_size=400, progress=watch)
    assert len([*watch.root.rglob("*.distcp"), *watch.root.rglob("*.safetensors")]) > 4
    assert 1 <= watch.most <= 2  # a stream may be written to two


def test_few_files_of_the_source_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ranks have written a checkpoint, and however small its tensors are."""
    monkeypatch.setattr(files, "_MOST_OPEN", 1)
    monkeypatch.setattr(mover, "_FILES_AHEAD", 4)
    hf, mcore = Tiny(layers=4).write(tmp_path / "hf"), tmp_path / "mcore"
    shardway.import_hf(hf, mcore, fsync=False, max_file_size=1)
    assert len([*mcore.rglob("*.distcp")]) > 20
    watch = Watch(mcore)
    shardway.export_hf(mcore, tmp_path / "out", fsync=False, workers=1, progress=watch)
    assert 2 <= watch.most <= 4
