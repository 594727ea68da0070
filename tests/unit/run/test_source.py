"""Snapshots of what is read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.run.source import Snapshot, unchanged

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ["a.safetensors", "config.json", "deep/er/tokenizer.json", "trainer.log"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def failed() -> ShardwayError:
    return ShardwayError(Problem(code=Code.TENSOR_MISSING, what="something else"))


def test_what_stays_is_unchanged(root: Path) -> None:
    snapshot = Snapshot(root)
    with unchanged((snapshot, NAMES), (snapshot, None)):
        pass
    with pytest.raises(ShardwayError, match="something else"), unchanged((snapshot, NAMES), (snapshot, None)):
        raise failed()


@pytest.mark.parametrize("name", NAMES)
def test_what_changes_is_told_by_name_and_instead_of_what_came_of_it(name: str, root: Path) -> None:
    snapshot = Snapshot(root)

    def change(error: ShardwayError | None) -> None:
        (root / name).write_text(f"{name} is longer now")
        if error:
            raise error

    for error in (None, failed()):
        with pytest.raises(ShardwayError) as caught, unchanged((snapshot, NAMES)):
            change(error)
        assert caught.value.codes == {"source-changed"}
        assert len(caught.value.problems) == 1
        assert name in str(caught.value)
        assert f"bytes: {len(name)} before, {len(name) + 14} now" in str(caught.value)


def test_before_it_is_known_what_is_read_only_an_error_makes_look_at_the_files_of_a_checkpoint(root: Path) -> None:
    snapshot = Snapshot(root)
    (root / "trainer.log").write_text("more")
    with pytest.raises(ShardwayError, match="something else"), unchanged((snapshot, None)):
        raise failed()
    os.utime(root / "config.json", ns=(1, 1))
    with unchanged((snapshot, None)):
        pass
    with pytest.raises(ShardwayError, match=r"config\.json"), unchanged((snapshot, None)):
        raise failed()


def test_a_copy_that_keeps_the_times_has_the_same_fingerprint(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import shutil

    copy = tmp_path_factory.mktemp("copy") / "of"
    shutil.copytree(root, copy)
    assert Snapshot(copy).fingerprint(NAMES) == Snapshot(root).fingerprint(NAMES)
    os.utime(copy / NAMES[0], ns=(1, 1))
    assert Snapshot(copy).fingerprint(NAMES) != Snapshot(root).fingerprint(NAMES)
    assert Snapshot(root).num_bytes(".json") == len("config.json") + len("deep/er/tokenizer.json")
