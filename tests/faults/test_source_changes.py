"""A source that changes while it is read: noticed whenever it happens, and nothing is published."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from tests.tiny import Tiny, listing

import shardway
from shardway.convert import importing
from shardway.formats import huggingface
from shardway.run.mover import Mover
from shardway.run.publish import Staging
from shardway.verification import compare, pair

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shardway.plans.model import Stream

MODEL = Tiny(layers=2)


def touch(path: Path) -> None:
    """Other bytes, of the same number, with a time of change that is told by the filesystem."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read()
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path)


def replace(path: Path) -> None:
    """Another file of the same size and time, as rsync and downloads put it in place."""
    before = path.stat()
    shutil.copyfile(path, path.with_name("new"))
    touch(path.with_name("new"))
    os.utime(path.with_name("new"), ns=(before.st_atime_ns, before.st_mtime_ns))
    path.with_name("new").rename(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    path.unlink()


CHANGES: dict[str, Callable[[Path], None]] = {"touch": touch, "replace": replace, "cut": cut, "remove": remove}
MOMENTS = ["opened", "first bytes", "half-way", "last bytes", "written"]


class When:
    """Does something once, at a moment of a conversion."""

    def __init__(self, moment: str, change: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
        self.done = 0
        self._change = change
        move, create, write = Mover.move, Staging.create, Staging.write
        moves = iter(range(10**6))

        def at(this: str) -> None:
            if this == moment and not self.done:
                self.done += 1
                change()

        def moved(mover: Mover, stream: Stream) -> None:
            number = next(moves)
            if number == 0:
                at("first bytes")
            if number == 5:
                at("half-way")
            move(mover, stream)

        def created(staging: Staging, name: str, num_bytes: int) -> None:
            at("opened")
            create(staging, name, num_bytes)

        def written(staging: Staging, name: str, contents: bytes) -> None:
            at("last bytes")
            write(staging, name, contents)
            at("written")

        monkeypatch.setattr(Mover, "move", moved)
        monkeypatch.setattr(Staging, "create", created)
        monkeypatch.setattr(Staging, "write", written)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("direction", ["import", "export"])
def test_it_is_noticed(
    direction: str, moment: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = MODEL.write(tmp_path / "hf", num_files=2)
    if direction == "import":
        file = hf / "model-00002-of-00002.safetensors"
    else:
        shardway.import_hf(hf, tmp_path / "mcore", fsync=False, max_file_size=4000)
        file = tmp_path / "mcore/iter_0000000/__0_1.distcp"
    when = When(moment, lambda: CHANGES[change](file), monkeypatch)
    (tmp_path / "out").mkdir()
    before = listing(tmp_path / "out")
    convert = {
        "import": lambda: shardway.import_hf(hf, tmp_path / "out", workers=1),
        "export": lambda: shardway.export_hf(tmp_path / "mcore", tmp_path / "out", max_shard_size=500, workers=1),
    }
    with pytest.raises(shardway.ShardwayError) as caught:
        convert[direction]()
    assert when.done == 1
    assert caught.value.codes == {"source-changed"}, str(caught.value)
    assert file.name in str(caught.value)
    assert listing(tmp_path / "out") == before
    assert not [name for name in os.listdir(tmp_path) if "shardway" in name]


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_small_files_count(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = MODEL.write(tmp_path / "hf")
    When("half-way", lambda: touch(hf / file), monkeypatch)
    with pytest.raises(shardway.ShardwayError) as caught:
        shardway.import_hf(hf, tmp_path / "out", workers=1)
    assert caught.value.codes == {"source-changed"}
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_other_files_beside_them_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training job goes on writing to the root while one of its iterations is exported."""
    hf = MODEL.write(tmp_path / "hf")
    shardway.import_hf(hf, tmp_path / "mcore", fsync=False)
    (tmp_path / "mcore/iter_0000000/__1_0.distcp").write_bytes(b"of the optimizer")

    def change() -> None:
        touch(tmp_path / "mcore/iter_0000000/__1_0.distcp")
        (tmp_path / "mcore/latest_checkpointed_iteration.txt").write_text("9")

    When("half-way", change, monkeypatch)
    shardway.export_hf(tmp_path / "mcore", tmp_path / "out", workers=1)
    assert shardway.verify(hf, tmp_path / "out").equal


def test_between_the_headers_and_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced while headers are read: the new file must not be read by the old one's header."""
    hf = MODEL.write(tmp_path / "hf")
    other = MODEL.write(tmp_path / "other", seed=7)
    real = huggingface.survey_huggingface

    def survey(*arguments: Any) -> Any:
        found = real(*arguments)
        shutil.copy(other / "model.safetensors", hf / "new")
        (hf / "new").rename(hf / "model.safetensors")
        return found

    monkeypatch.setattr(importing, "survey_huggingface", survey)
    with pytest.raises(shardway.ShardwayError) as caught:
        shardway.import_hf(hf, tmp_path / "out")
    assert caught.value.codes == {"source-changed"}


def test_a_comparison_is_not_made_of_two_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error, not a difference and no equality."""
    hf = MODEL.write(tmp_path / "hf")
    shardway.import_hf(hf, tmp_path / "mcore", fsync=False)
    real = compare.compare_streams

    def slowly(*arguments: Any) -> Any:
        found = real(*arguments)
        shardway.import_hf(hf, tmp_path / "mcore", if_exists="replace", fsync=False)
        return found

    monkeypatch.setattr(pair, "compare_streams", slowly)
    with pytest.raises(shardway.ShardwayError) as caught:
        shardway.verify(hf, tmp_path / "mcore")
    assert caught.value.codes == {"source-changed"}
