"""Cleaning up: all that is abandoned goes, all that is alive stays, and what was put aside comes back."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
from tests.tiny import Tiny, listing, read_distcp, same

import shardway
from shardway.cli.main import main
from shardway.run.lease import Lease, staging_directory
from shardway.run.pulse import Sign

if TYPE_CHECKING:
    from pathlib import Path

MODEL = Tiny(layers=1)


@pytest.fixture
def mcore(tmp_path: Path) -> Path:
    shardway.import_hf(MODEL.write(tmp_path / "hf"), tmp_path / "mcore", fsync=False)
    return tmp_path / "mcore"


def abandoned(destination: Path) -> Path:
    """What a process of this machine that has ended has left; the staging directory."""
    lease = Lease.create(destination, key="key", doing="import")
    assert lease is not None
    (lease.files / "x").write_bytes(bytes(10_000))
    lease._pulse.stop()
    lease._pulse.path.write_bytes(dead("import", lease._nonce).to_bytes())
    return lease.directory


def dead(doing: str, nonce: str) -> Sign:
    mine = Sign.of_this_process(doing, "key", nonce)
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    fields = {name: getattr(mine, name) for name in ("doing", "key", "host", "nonce")}
    return Sign(**fields, pid=pid, process=mine.process.replace(f":{mine.pid}:", f":{pid}:"))


def elsewhere(nonce: str) -> Sign:
    return Sign(doing="import", key="key", host="node7", pid=1, process="boot:pid:[1]:1:1", nonce=nonce)


def test_nothing_to_clean(mcore: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing(tmp_path)
    assert main(["clean", str(mcore)]) == 0
    assert capsys.readouterr().out == f"nothing was left of {mcore}\n"
    assert listing(tmp_path) == before
    assert main(["clean", str(tmp_path / "not/there")]) == 1
    assert capsys.readouterr().err.startswith("file-missing: ")


@pytest.mark.parametrize("place", ["root", "iteration", "directory"])
def test_an_abandoned_conversion(place: str, mcore: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found by the root, the iteration folder, or, for an export, the directory that never came to be."""
    destination = tmp_path / "out" if place == "directory" else mcore / "iter_0000005"
    before = listing(tmp_path)
    directory = abandoned(destination)
    assert main(["clean", str(mcore if place == "root" else destination)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"removed {directory} (")
    assert " kB): process " in out
    assert out.endswith("has ended\n")
    assert listing(tmp_path) == before


def test_as_json(mcore: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = abandoned(mcore / "iter_0000005")
    assert main(["clean", str(mcore), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [each["path"] for each in report["removed"]] == [str(directory)]
    assert report["kept"] == report["restored"] == []


def test_what_was_put_aside_comes_back(mcore: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed between two renames, on a filesystem that can't exchange directories: the only copy is in the staging."""
    before = listing(tmp_path)
    directory = abandoned(mcore / "iter_0000000")
    (files,) = directory.glob("files-*")
    (mcore / "iter_0000000").rename(f"{files}-old")
    assert not shardway.is_complete(mcore)
    assert main(["clean", str(mcore)]) == 0
    assert "put back" in capsys.readouterr().out
    assert listing(tmp_path) == before
    assert same(read_distcp(mcore), MODEL.megatron(MODEL.weights()))


def test_the_same_of_a_live_save(mcore: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    new = mcore / ".iter_0000000.shardway-live-0011223344556677-89abcdef"
    new.mkdir()
    (mcore / "iter_0000000").rename(f"{new}-old")
    report = shardway.clean(mcore, wait_seconds=0.05)
    assert report.restored == (str(mcore / "iter_0000000"),)
    assert listing(tmp_path) == before


def test_a_process_elsewhere_is_watched(mcore: Path, tmp_path: Path) -> None:
    """Of another machine: it may be alive, so that only time tells."""
    directory = abandoned(mcore / "iter_0000005")
    (lease,) = directory.glob("lease-*")
    lease.write_bytes(elsewhere(lease.name.removeprefix("lease-")).to_bytes())
    seen: list[str] = []

    def beat(at: shardway.Progress) -> None:
        seen.append(at.waiting_for)
        if len(seen) == 2:
            data = lease.read_bytes().replace(b'"beat": 0', b'"beat": 1')
            lease.write_bytes(data)

    report = shardway.clean(mcore, wait_seconds=60, progress=beat)
    assert [left.path for left in report.kept] == [str(directory)]
    assert "process 1 on node7 (import)" in report.kept[0].why
    assert not report.removed
    assert directory.name in seen[0]
    report = shardway.clean(mcore, wait_seconds=0.05)
    assert [left.path for left in report.removed] == [str(directory)]
    assert not directory.exists()


@pytest.mark.parametrize("sign", ["dead", "elsewhere", "none"])
def test_a_live_save(sign: str, mcore: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    staging = mcore / ".iter_0000009.shardway-live-0011223344556677"
    staging.mkdir()
    (staging / "__0_0.distcp").write_bytes(bytes(5000))
    if sign != "none":
        made = dead("live save", "ab") if sign == "dead" else elsewhere("ab")
        (staging / ".alive-ab").write_bytes(made.to_bytes())
    (mcore / ".save.shardway-live-store").touch()  # where ranks meet; it outlives saves
    report = shardway.clean(mcore, wait_seconds=None if sign == "dead" else 0.05)
    assert [left.path for left in report.removed] == [str(staging)]
    assert (mcore / ".save.shardway-live-store").exists()
    (mcore / ".save.shardway-live-store").unlink()
    assert listing(tmp_path) == before


def test_a_live_save_that_only_lacks_its_tracker_is_finished(mcore: Path) -> None:
    (mcore / "iter_0000000").rename(mcore / "iter_0000003")
    (mcore / "iter_0000003/.publish-0011-t0").mkdir()
    (mcore / "latest_checkpointed_iteration.txt").unlink()
    report = shardway.clean(mcore, wait_seconds=0.05)
    assert len(report.removed) == 1
    assert (mcore / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert shardway.is_complete(mcore)
    assert min(os.listdir(mcore / "iter_0000003")) == ".metadata"


def test_what_belongs_to_others_stays(mcore: Path, tmp_path: Path) -> None:
    for name in (".hidden", ".iter_0000000", "notes.shardway-staging", ".iter_0000001.shardway-mine"):
        (mcore / name).mkdir()
    other = abandoned(tmp_path / "another")
    before = listing(tmp_path)
    assert shardway.clean(mcore, wait_seconds=0.05).removed == ()
    assert listing(tmp_path) == before
    assert other.exists()


class TestIsComplete:
    def test_of_whole_checkpoints(self, mcore: Path, tmp_path: Path) -> None:
        shardway.export_hf(mcore, tmp_path / "out", fsync=False)
        for path in (mcore, mcore / "iter_0000000", tmp_path / "out", tmp_path / "hf", str(mcore)):
            assert shardway.is_complete(path)

    @pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json"])
    def test_of_one_that_lacks_a_file(self, name: str, mcore: Path) -> None:
        (mcore / "iter_0000000" / name).unlink()
        assert not shardway.is_complete(mcore)
        assert not shardway.is_complete(mcore / "iter_0000000")

    def test_of_one_that_is_cut_off(self, mcore: Path, tmp_path: Path) -> None:
        os.truncate(mcore / "iter_0000000/__0_0.distcp", 1000)
        os.truncate(tmp_path / "hf/model.safetensors", 1000)
        assert not shardway.is_complete(mcore)
        assert not shardway.is_complete(tmp_path / "hf")

    def test_of_what_is_not_published(self, mcore: Path, tmp_path: Path) -> None:
        staged = staging_directory(mcore / "iter_0000001") / "files-0123456789abcdef"
        staged.parent.mkdir()
        (mcore / "iter_0000000").rename(staged)
        assert not shardway.is_complete(staged)
        assert not shardway.is_complete(mcore)
        (mcore / "latest_checkpointed_iteration.txt").unlink()
        assert not shardway.is_complete(mcore)

    def test_of_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").touch()
        for name in ("empty", "file", "nowhere", "file/below"):
            assert not shardway.is_complete(tmp_path / name)
