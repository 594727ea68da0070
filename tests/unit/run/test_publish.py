"""Staging directories that take their place whole, and small files that do."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shardway.core.errors import ShardwayError
from shardway.run.lease import Lease
from shardway.run.publish import Staging, is_leftover
from shardway.run.staged_file import StagedFile

if TYPE_CHECKING:
    from collections.abc import Iterator


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


@contextlib.contextmanager
def staged(destination: Path, *, replace: bool = False, sync: bool = False) -> Iterator[Staging]:
    lease = Lease.create(destination, key="key", doing="test")
    assert lease is not None
    with lease:
        yield Staging(lease, replace=replace, sync=sync)


@pytest.mark.parametrize("sync", [False, True])
def test_it_appears_when_it_is_published(sync: bool, tmp_path: Path) -> None:
    with staged(tmp_path / "a/b/c", sync=sync) as staging:
        staging.create("x", 10)
        staging.write("deep/y", b"yes")
        staging.copy(Path(__file__), "z")
        assert not (tmp_path / "a/b/c").exists()
        assert all(is_leftover(name) for name in names(tmp_path / "a/b"))
        inode = staging.seal()
        staging.publish()
        staging.validate()
        assert inode == (tmp_path / "a/b/c").stat().st_ino
    assert (tmp_path / "a/b/c/x").read_bytes() == bytes(10)
    assert (tmp_path / "a/b/c/deep/y").read_bytes() == b"yes"
    assert (tmp_path / "a/b/c/z").read_bytes() == Path(__file__).read_bytes()
    assert names(tmp_path / "a/b") == ["c"]


def test_the_steps_have_an_order(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as staging:
        with pytest.raises(RuntimeError, match="sealed"):
            staging.publish()
        staging.seal()
        with pytest.raises(RuntimeError, match="sealed"):
            staging.write("x", b"")
        with pytest.raises(RuntimeError, match="sealed"):
            staging.create("x", 1)
        with pytest.raises(RuntimeError, match="sealed"):
            staging.copy(Path(__file__), "x")
    assert names(tmp_path) == []


def test_it_goes_when_it_is_not_published(tmp_path: Path) -> None:
    with staged(tmp_path / "a/b/c") as staging:
        staging.create("x", 10)
    assert names(tmp_path) == []
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "a/b/c"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_parents_that_somebody_else_uses_stay(tmp_path: Path) -> None:
    with staged(tmp_path / "a/b/c"):
        (tmp_path / "a/theirs").touch()
    assert names(tmp_path / "a") == ["theirs"]


@pytest.mark.parametrize("exchange", ["kernel", "renames"])
def test_what_is_replaced_stays_whole_and_can_be_put_back(
    exchange: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exchange != "kernel":

        class Library:
            def __init__(self, *_: object, **__: object) -> None:
                pass

        monkeypatch.setattr(ctypes, "CDLL", Library)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").touch()
    with staged(tmp_path / "out", replace=True) as staging:
        staging.write("new", b"new")
        staging.seal()
        staging.publish()
        assert names(tmp_path / "out") == ["new"]
        assert names(staging.path) == ["old"]
        staging.retract()
        assert names(tmp_path / "out") == ["old"]
        staging.publish()
    assert names(tmp_path / "out") == ["new"]
    assert names(tmp_path) == ["out"]


def test_what_is_published_is_taken_back_when_the_next_step_fails(tmp_path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), staged(tmp_path / "a/out") as staging:
        staging.write("x", b"")
        staging.seal()
        with staging.published():
            assert (tmp_path / "a/out/x").exists()
            raise ZeroDivisionError
    assert names(tmp_path) == []


def test_what_is_there_gives_way_only_where_that_was_asked_for(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as staging:
        staging.seal()
        (tmp_path / "out").mkdir()
        (tmp_path / "out/theirs").touch()
        with pytest.raises(ShardwayError, match="something has come to lie there"):
            staging.publish()
    assert names(tmp_path / "out") == ["theirs"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("change", ["cut", "removed", "added"])
def test_what_is_published_is_looked_at(change: str, tmp_path: Path) -> None:
    with staged(tmp_path / "out") as staging:
        staging.write("deep/x", b"123")
        staging.write("y", b"")
        staging.seal()
        staging.publish()
        if change == "cut":
            os.truncate(tmp_path / "out/deep/x", 1)
        elif change == "removed":
            (tmp_path / "out/y").unlink()
        else:
            (tmp_path / "out/z").touch()
        with pytest.raises(ShardwayError) as caught:
            staging.validate()
    assert caught.value.codes == {"verify-failed"}


def test_a_file_is_created_once(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as staging:
        staging.create("x", 1)
        with pytest.raises(ShardwayError, match="EEXIST"):
            staging.create("x", 1)


@pytest.mark.parametrize(
    "name",
    [
        ".iter_0000000.shardway-staging",
        ".iter_0000000.shardway-0123456789abcdef",
        ".tracker.txt.shardway-12-0123abcd",
        ".a.shardway-live-0123-old",
    ],
)
def test_leftovers(name: str) -> None:
    assert is_leftover(name)
    assert not is_leftover(name[1:])
    assert not is_leftover("iter_0000000")


@pytest.mark.parametrize("sync", [False, True])
def test_a_small_file_is_replaced_in_one_step(sync: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new/tracker.txt"
    for contents in (b"1", b"22"):
        with StagedFile(path, contents, sync=sync) as file:
            file.publish()
    assert path.read_bytes() == b"22"

    def write_bytes(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(ShardwayError) as caught, StagedFile(path, b"333", sync=sync) as file:
        file.publish()
    assert caught.value.codes == {"no-space"}
    assert path.read_bytes() == b"22"
    assert names(path.parent) == ["tracker.txt"]
