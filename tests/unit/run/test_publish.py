"""Staging directories and small files that appear whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from shardway.core.errors import ShardwayError
from shardway.run.publish import Staging, is_leftover, write_file


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


@pytest.mark.parametrize("sync", [False, True])
def test_it_appears_when_it_is_published(sync: bool, tmp_path: Path) -> None:
    with Staging(tmp_path / "a/b/c", sync=sync) as staging:
        staging.create("x", 10)
        staging.write("deep/y", b"yes")
        staging.copy(Path(__file__), "z")
        assert not (tmp_path / "a/b/c").exists()
        assert all(is_leftover(name) for name in names(tmp_path / "a/b"))
        staging.publish()
    assert (tmp_path / "a/b/c/x").read_bytes() == bytes(10)
    assert (tmp_path / "a/b/c/deep/y").read_bytes() == b"yes"
    assert (tmp_path / "a/b/c/z").read_bytes() == Path(__file__).read_bytes()
    assert names(tmp_path / "a/b") == ["c"]


def test_it_goes_when_it_is_not_published(tmp_path: Path) -> None:
    with Staging(tmp_path / "a/b/c", sync=False) as staging:
        staging.create("x", 10)
    assert names(tmp_path) == []
    with pytest.raises(ZeroDivisionError), Staging(tmp_path / "a/b/c", sync=False):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_parents_that_somebody_else_uses_stay(tmp_path: Path) -> None:
    with Staging(tmp_path / "a/b/c", sync=False):
        (tmp_path / "a/theirs").touch()
    assert names(tmp_path / "a") == ["theirs"]


def test_two_at_once(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", sync=False) as one, Staging(tmp_path / "out", sync=False) as other:
        one.write("x", b"1")
        other.write("x", b"2")
        one.publish()
        other.publish()
    assert (tmp_path / "out/x").read_bytes() == b"2"
    assert names(tmp_path) == ["out"]


def test_a_file_is_created_once(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", sync=False) as staging:
        staging.create("x", 1)
        with pytest.raises(ShardwayError, match="EEXIST"):
            staging.create("x", 1)


@pytest.mark.parametrize("name", [".iter_0000000.shardway-12-0123abcd", ".a.shardway-1-00000000-old"])
def test_leftovers(name: str) -> None:
    assert is_leftover(name)
    assert not is_leftover(name[1:])
    assert not is_leftover("iter_0000000")


@pytest.mark.parametrize("sync", [False, True])
def test_a_small_file_is_replaced_in_one_step(sync: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new/tracker.txt"
    write_file(path, b"1", sync=sync)
    write_file(path, b"22", sync=sync)
    assert path.read_bytes() == b"22"

    def write_bytes(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(ShardwayError) as caught:
        write_file(path, b"333", sync=sync)
    assert caught.value.codes == {"no-space"}
    assert path.read_bytes() == b"22"
    assert names(path.parent) == ["tracker.txt"]
