"""Journals: what is finished, believed line by line."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

import pytest

from shardway.run.journal import Finished, Journal, read_journal

if TYPE_CHECKING:
    from pathlib import Path

DIGESTS = {("a.weight", (0, 3)): "12ab", ("b", ()): "ff"}


def written(path: Path) -> Path:
    with contextlib.closing(Journal(path, "key", Finished(files={"first": DIGESTS}))) as journal:
        journal.add("second", {})
        journal.publishing(77)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = read_journal(written(tmp_path / "journal"), "key")
    assert found == Finished(files={"first": DIGESTS, "second": {}}, published=77)
    assert os.listdir(tmp_path) == ["journal"]


def test_a_journal_of_other_work_says_nothing(tmp_path: Path) -> None:
    assert read_journal(written(tmp_path / "journal"), "another key") == Finished()
    assert read_journal(tmp_path / "nowhere", "key") == Finished()


def test_a_journal_that_is_cut_off_is_believed_up_to_there(tmp_path: Path) -> None:
    whole = written(tmp_path / "journal").read_bytes()
    seen = set()
    for length in range(len(whole)):
        (tmp_path / "journal").write_bytes(whole[:length])
        found = read_journal(tmp_path / "journal", "key")
        assert set(found.files) <= {"first", "second"}
        assert all(found.files[name] == {"first": DIGESTS, "second": {}}[name] for name in found.files)
        seen.add(len(found.files))
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    "line", [b"[]", b"1", b"{}", b'{"file": 1}', b'{"file": "x", "digests": [1]}', b"\xff\xfe", b"[" * 10**5]
)
def test_a_line_that_can_not_be_understood_ends_it(line: bytes, tmp_path: Path) -> None:
    lines = written(tmp_path / "journal").read_bytes().splitlines()
    (tmp_path / "journal").write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]))
    assert read_journal(tmp_path / "journal", "key").files == {"first": DIGESTS}


def test_a_journal_that_can_not_be_written_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "journal", "key", Finished())

    def write(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        journal.add("first", {})
    journal.add("second", {})
    journal.close()
    journal.close()
    assert read_journal(tmp_path / "journal", "key") == Finished()
