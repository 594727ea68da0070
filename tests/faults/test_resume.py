"""The same command after a kill goes on where the first was, and believes nothing that it has not read."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from tests.faults.syscalls import KILL, Call, require_notification, run
from tests.tiny import Tiny, bits, read_distcp, read_safetensors, same

import shardway
from shardway.run.publish import Staging

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MODEL = Tiny(layers=12)
WORKERS = 2
LARGEST_STREAM = 512  # bytes: query, key and value of a layer


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return MODEL.write(tmp_path / "hf")


@pytest.fixture
def mcore(hf: Path, tmp_path: Path) -> Path:
    shardway.import_hf(hf, tmp_path / "mcore", fsync=False)
    return tmp_path / "mcore"


class Conversion:
    """An import or export to many files, that can be killed when so many of them are finished."""

    def __init__(self, direction: str, hf: Path, mcore: Path, stages: Path) -> None:
        self.direction = direction
        self.out = stages / "out"
        self.source = hf if direction == "import" else mcore

    def run(self, **options: Any) -> shardway.ConversionReport:
        if self.direction == "import":
            return shardway.import_hf(self.source, self.out, max_file_size=4600, workers=WORKERS, **options)
        return shardway.export_hf(self.source, self.out, max_shard_size=1500, workers=WORKERS, **options)

    def kill(self, finished: int) -> list[Call]:
        """Kill it when the journal is about to get its line for the next file; return what it did."""
        lines = 0

        def decide(number: int, call: Call) -> str | None:
            nonlocal lines
            if call.name == "write" and "/journal" in call.path:
                lines += 1
                if lines == finished + 2:  # the first line says whose journal it is
                    return KILL
            return None

        ended = run(lambda: self.run(fsync=False), self.out.parent, decide)
        assert ended.killed
        return ended.calls

    @property
    def staged(self) -> Path:
        (found,) = self.out.parent.glob("**/.*.shardway-staging/files-*")
        return found

    @property
    def journal(self) -> Path:
        return self.staged.parent / "journal"

    def check(self) -> None:
        if self.direction == "import":
            assert same(read_distcp(self.out), MODEL.megatron(MODEL.weights()))
            record = json.loads((self.out / "iter_0000000/shardway.json").read_text())
            assert record["digests"]["chunks"].keys() == read_distcp(self.out).keys()
            assert shardway.verify(self.source, self.out).num_digests > 0
        else:
            assert same(bits(read_safetensors(self.out).items()), MODEL.weights())
        assert not list(self.out.parent.rglob("*shardway-*"))


@pytest.fixture(params=["import", "export"])
def conversion(request: pytest.FixtureRequest, hf: Path, mcore: Path, stages: Path) -> Conversion:
    require_notification()
    return Conversion(request.param, hf, mcore, stages)


class Migrating(Conversion):
    """A migration to other keys and to chunks that are interleaved, in many files."""

    def run(self, **options: Any) -> Any:
        cut: dict[str, Any] = {"layout": "per-layer", "to": "mcore-0.20", "chunk_for": "tp=2", "max_file_size": 4600}
        return shardway.migrate(self.source, self.out, workers=WORKERS, **cut, **options)

    def check(self) -> None:
        assert same(read_distcp(self.out), MODEL.megatron(MODEL.weights(), per_layer=True))
        assert shardway.verify(self.out).num_digests > 0
        assert not list(self.out.parent.rglob("*shardway-*"))


def created(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The large files that are begun from now on."""
    names: list[str] = []
    real = Staging.create

    def create(self: Staging, name: str, num_bytes: int) -> None:
        names.append(name)
        real(self, name, num_bytes)

    monkeypatch.setattr(Staging, "create", create)
    return names


@pytest.mark.parametrize("finished", [1, 2, 4])
def test_less_than_one_file_for_each_worker_is_done_again(
    finished: int, conversion: Conversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[str, list[int]] = {}
    for call in conversion.kill(finished):
        if call.name == "pwrite64":
            written.setdefault(os.path.basename(call.path), []).append(call.arguments[2])
    names = created(monkeypatch)
    seen: list[shardway.Progress] = []
    report = conversion.run(progress=seen.append)
    assert report.resumed >= finished
    assert not report.reused
    assert len(names) + report.resumed == report.num_files
    headers = 1 if conversion.direction == "export" else 0  # they are written to every file before anything else
    again = sum(sum(written.get(name, [])[headers:]) for name in names)
    sizes = [path.stat().st_size for path in conversion.out.rglob("*") if path.name in {*names, *written}]
    if conversion.direction == "import":
        assert len(written.keys() & set(names)) <= WORKERS
    # What belongs to the next file of a tensor's parts, where a file ends within these, is written with them.
    assert again < WORKERS * (max(sizes) + LARGEST_STREAM)
    checked = [at.done_bytes for at in seen if at.phase == "resume"]
    copied = [at.done_bytes for at in seen if at.phase == "copy"]
    assert checked[-1] > 0
    assert copied[1] > 0, "what was kept counts as done from the beginning"
    assert copied[-1] == seen[-1].total_bytes
    conversion.check()


def damages() -> dict[str, Callable[[Path], None]]:
    """What can happen to a file that is said to be finished."""

    def flip(path: Path, place: int) -> None:
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)

    return {
        "a bit at the beginning": lambda path: flip(path, 9),
        "a bit in the middle": lambda path: flip(path, path.stat().st_size // 2),
        "the last bit": lambda path: flip(path, -1),
        "shorter": lambda path: os.truncate(path, path.stat().st_size - 1),
        "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
        "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)) and None,
        "gone": lambda path: path.unlink(),
    }


@pytest.mark.parametrize("damage", damages())
def test_what_is_said_to_be_finished_is_read_first(damage: str, conversion: Conversion) -> None:
    conversion.kill(3)
    names = [json.loads(line)["file"] for line in conversion.journal.read_text().splitlines()[1:]]
    assert len(names) >= 3
    damages()[damage](conversion.staged / names[0])
    report = conversion.run()
    assert report.resumed == len(names) - 1
    conversion.check()


@pytest.mark.parametrize("journal", ["gone", "empty", "rubbish", "of other work", "of files that are not there"])
def test_a_journal_is_believed_in_nothing_else(journal: str, conversion: Conversion) -> None:
    conversion.kill(3)
    lines = conversion.journal.read_text().splitlines()
    contents = {
        "empty": "",
        "rubbish": "\0\1{]",
        "of other work": "\n".join([lines[0].replace('"key":"', '"key":"x'), *lines[1:]]),
        "of files that are not there": "\n".join([lines[0], '{"file":"../../../hf/config.json","digests":[]}']),
    }
    if journal == "gone":
        conversion.journal.unlink()
    else:
        conversion.journal.write_text(contents[journal])
    assert conversion.run().resumed == 0
    conversion.check()


@pytest.mark.parametrize("damage", ["", "a bit in the middle", "gone"])
def test_a_migration_goes_on_as_well(damage: str, hf: Path, mcore: Path, stages: Path) -> None:
    require_notification()
    migration = Migrating("migration", hf, mcore, stages)
    migration.kill(4)
    names = [json.loads(line)["file"] for line in migration.journal.read_text().splitlines()[1:]]
    if damage:
        damages()[damage](migration.staged / names[0])
    report = migration.run()
    assert report.resumed == len(names) - (damage != "")
    assert 0 < report.resumed < report.num_files
    migration.check()


def test_a_source_that_has_changed_since_is_read_from_the_beginning(
    hf: Path, mcore: Path, stages: Path, conversion: Conversion
) -> None:
    conversion.kill(3)
    source = hf / "model.safetensors" if conversion.direction == "import" else mcore / "iter_0000000/.metadata"
    os.utime(source, ns=(1, 1))
    assert conversion.run().resumed == 0
    conversion.check()


def test_other_options_begin_anew(hf: Path, mcore: Path, stages: Path) -> None:
    require_notification()
    conversion = Conversion("import", hf, mcore, stages)
    conversion.kill(3)
    report = shardway.import_hf(hf, conversion.out, layout="per-layer")
    assert (report.resumed, report.layout) == (0, "per-layer")
    assert not list(stages.rglob("*shardway-*"))


def test_what_was_left_by_a_kill_counts_as_free_space(conversion: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    conversion.kill(4)
    needed = shardway.plan(conversion.source, max_file_size=4600, max_shard_size=1500).disk_bytes
    free = needed - 5000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(free))
    conversion.run()
    conversion.check()


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_the_command_line_says_so(
    hf: Path, mcore: Path, stages: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardway.cli.main import main

    require_notification()
    conversion = Conversion("import", hf, mcore, stages)
    conversion.kill(3)
    assert main(["import", str(hf), str(conversion.out), "--max-file-size", "4600"]) == 0
    assert "files of an earlier run that was killed were found whole and kept" in capsys.readouterr().out
    conversion.check()
