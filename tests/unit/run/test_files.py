"""Reads and writes that are complete or an error."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from shardway.core.errors import ShardwayError
from shardway.run.files import Files

if TYPE_CHECKING:
    from pathlib import Path


def test_short_reads_and_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may move fewer bytes than it was asked for."""
    (tmp_path / "f").write_bytes(bytes(20))
    pwrite, preadv = os.pwrite, os.preadv

    def short_write(descriptor: int, data: Any, offset: int) -> int:
        return pwrite(descriptor, memoryview(data)[:3], offset)

    def short_read(descriptor: int, views: list[memoryview], offset: int) -> int:
        return preadv(descriptor, [views[0][:2]], offset)

    monkeypatch.setattr(os, "pwrite", short_write)
    monkeypatch.setattr(os, "preadv", short_read)
    data = bytes(range(1, 12))
    with Files(tmp_path, writable=True) as files:
        files.write_from("f", data, 5)
        files.write_from("f", memoryview(b""), 0)
        read = bytearray(11)
        files.read_into("f", memoryview(read), 5)
    assert read == data
    assert (tmp_path / "f").read_bytes() == bytes(5) + data + bytes(4)


def test_a_file_that_ends_too_soon(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    with Files(tmp_path) as files, pytest.raises(ShardwayError) as caught:
        files.read_into("f", memoryview(bytearray(4)), 3)
    assert caught.value.codes == {"source-changed"}
    assert "wanted 4 bytes at offset 3, got 2" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with Files(tmp_path) as files, pytest.raises(ShardwayError) as caught:
        files.read_into("missing", memoryview(bytearray(4)), 3)
    assert caught.value.codes == {"io-failed"}
    assert "ENOENT" in str(caught.value)
    assert str(tmp_path / "missing") in str(caught.value)


def test_files_are_opened_once_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    before = len(os.listdir("/proc/self/fd"))
    with Files(tmp_path) as files:
        first = files.descriptor("f")
        assert files.descriptor("f") == first
        assert os.get_inheritable(first) is False
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "no-space"), (errno.EDQUOT, "no-space"), (5, "io-failed")])
def test_what_an_errno_means(number: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(bytes(20))

    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with Files(tmp_path, writable=True) as files, pytest.raises(ShardwayError) as caught:
        files.sync("f")
    assert caught.value.codes == {code}
