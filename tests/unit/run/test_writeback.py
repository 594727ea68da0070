"""Tests of writing back early."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from shardway.run import writeback
from shardway.run.writeback import Writeback

if TYPE_CHECKING:
    from pathlib import Path

START, WAIT = 2, 7
MIB = 2**20


class Recorder:
    """Stands in for the system call."""

    def __init__(self, error: int = 0) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self._error = error

    def __call__(self, descriptor: int, offset: Any, num_bytes: Any, flags: Any) -> int:
        self.calls.append((offset.value, num_bytes.value, flags.value))
        ctypes.set_errno(self._error)
        return -1 if self._error else 0


def recorded(writes: Writeback, error: int = 0) -> Recorder:
    writes._call = recorder = Recorder(error)
    return recorder


def test_every_byte_is_begun_once_and_waited_for_once_in_order() -> None:
    writes = Writeback(-1)
    recorder = recorded(writes)
    ends = [*range(0, 1000 * MIB, 7 * MIB + 5)]
    for end in ends:
        writes.written(end)
    for flags, most_left in ((START, 40 * MIB), (WAIT, 256 * MIB + 40 * MIB)):
        at = 0
        for offset, num_bytes, how in recorder.calls:
            if how == flags:
                assert offset == at
                assert num_bytes > 0
                at += num_bytes
        assert 0 <= ends[-1] - at <= most_left


def test_nothing_is_asked_for_a_small_file() -> None:
    writes = Writeback(-1)
    recorder = recorded(writes)
    writes.written(31 * MIB)
    assert not recorder.calls


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EBADF])
def test_a_failing_device_is_an_error(number: int) -> None:
    writes = Writeback(-1)
    recorded(writes, number)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        writes.written(64 * MIB)
    assert caught.value.errno == number


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP])
def test_a_system_without_it_is_asked_once(number: int) -> None:
    writes = Writeback(-1)
    recorder = recorded(writes, number)
    for end in range(0, 900 * MIB, MIB):
        writes.written(end)
    assert len(recorder.calls) == 1


def test_the_real_call_takes_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writeback, "_START_BYTES", 1000)
    monkeypatch.setattr(writeback, "_BEHIND_BYTES", 4000)
    with (tmp_path / "file").open("wb") as file:
        writes = Writeback(file.fileno())
        for end in range(0, 100_000, 1000):
            file.write(bytes(1000))
            file.flush()
            writes.written(end)
    closed = Writeback(2**20)
    if closed._call is not None:
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            closed.written(1000)
