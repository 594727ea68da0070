"""Reads and writes that are complete or an error."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from shardway.core.errors import ShardwayError
from shardway.run import files as module
from shardway.run.files import Files

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_what_a_filesystem_tells_only_when_a_file_is_closed_is_an_error(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.close

    def close(descriptor: int) -> None:
        real(descriptor)
        raise OSError(number, os.strerror(number))

    for writable in (True, False):
        (tmp_path / "f").write_bytes(bytes(20))
        files = Files(tmp_path, writable=writable)
        with files.opened("f"):
            pass
        with monkeypatch.context() as patch:
            patch.setattr(os, "close", close)
            if writable:
                with pytest.raises(ShardwayError) as caught:
                    files.close()
                assert caught.value.codes == {"io-failed" if number == errno.EIO else "no-space"}
                assert "close f" in str(caught.value)
            else:
                files.close()
        files.close()


def test_a_file_is_closed_unless_it_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(bytes(4))
    before = len(os.listdir("/proc/self/fd"))
    with Files(tmp_path, writable=True) as files:
        files.close_unused("f")  # not open
        with files.opened("f") as file:
            files.close_unused("f")
            assert os.pread(file.descriptor, 4, 0) == bytes(4)
        files.close_unused("f")
        assert len(os.listdir("/proc/self/fd")) == before
        files.write_from("f", b"late", 0)

        real = os.close

        def close(descriptor: int) -> None:
            real(descriptor)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "close", close)
            with pytest.raises(ShardwayError) as caught:
                files.close_unused("f")
    assert caught.value.codes == {"no-space"}
    assert (tmp_path / "f").read_bytes() == b"late"


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


def test_no_more_are_open_than_a_process_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_OPEN", 4)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(10):
        (tmp_path / str(number)).write_bytes(bytes([number] * 8))
    with Files(tmp_path) as files:
        with files.opened("0") as kept:
            for number in [*range(1, 10), 3, 0, 3]:
                read = bytearray(8)
                files.read_into(str(number), memoryview(read), 0)
                assert set(read) == {number}
                assert len(os.listdir("/proc/self/fd")) <= before + 4
            assert os.pread(kept.descriptor, 8, 0) == bytes(8)
        with files.all_opened(map(str, range(8))) as several:  # what is in use is not closed, however many there are
            for number in range(8):
                assert os.pread(several[str(number)].descriptor, 1, 0) == bytes([number])
        with pytest.raises(ShardwayError), files.all_opened(["1", "missing"]):
            pass
        files.close_unused("1")  # it was given back
        files.close()
        assert len(os.listdir("/proc/self/fd")) == before
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_share_what_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_OPEN", 2)
    for number in range(6):
        (tmp_path / str(number)).write_bytes(bytes([number] * 8))
    wrong: list[int] = []

    def work(files: Files, seed: int) -> None:
        for step in range(400):
            number = (seed * 7 + step * step) % 6
            read = bytearray(8)
            files.read_into(str(number), memoryview(read), 0)
            if set(read) != {number}:
                wrong.append(number)

    with Files(tmp_path) as files:
        threads = [threading.Thread(target=work, args=(files, seed)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_files_are_opened_once_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    before = len(os.listdir("/proc/self/fd"))
    with Files(tmp_path) as files:
        with files.opened("f") as first:
            assert os.get_inheritable(first.descriptor) is False
        with files.opened("f") as again:
            assert again is first
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
