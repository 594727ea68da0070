"""The corpus of malformed files, each inside of a checkpoint, met by the commands that a user would run."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from tests.conformance.malformed import huggingface, megatron
from tests.tiny import Tiny

import shardway
from shardway.cli.main import main
from shardway.formats.dcp import read_metadata

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conformance.malformed.case import Case

MODEL = Tiny()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of either kind, to be copied and spoiled."""
    path = tmp_path_factory.mktemp("sound")
    MODEL.write(path / "hf", num_files=2)
    shardway.import_hf(path / "hf", path / "m", fsync=False)
    return path


def run(command: str, source: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Codes of the problems that a command reports, which must fail and write nothing."""
    arguments = [command, str(source), *([str(out)] if command in {"import", "export"} else []), "--json"]
    capsys.readouterr()
    status = main(arguments)
    printed, shown = capsys.readouterr()
    assert status == 1, (command, printed, shown)
    assert not out.exists()
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert len(shown) < 100_000
    answer = json.loads(printed)
    problems = answer["problems"] if command == "plan" else answer["error"]
    for problem in problems:
        assert problem["what"]
    return {problem["code"] for problem in problems}


def meet(case: Case, source: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case.spoil(folder)
    for command in case.commands:
        assert case.code in run(command, source, tmp_path / "out", capsys), command
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("case", huggingface.CASES, ids=lambda case: case.name)
def test_huggingface(case: Case, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(sound / "hf", tmp_path / "hf")
    meet(case, tmp_path / "hf", tmp_path / "hf", tmp_path, capsys)


@pytest.mark.parametrize("case", megatron.CASES, ids=lambda case: case.name)
def test_megatron(
    case: Case, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where what an attack executes would leave a file
    shutil.copytree(sound / "m", tmp_path / "m")
    meet(case, tmp_path / "m", tmp_path / "m/iter_0000000", tmp_path, capsys)


def test_the_corpus_is_large_and_its_parts_have_names() -> None:
    names = [case.name for case in (*huggingface.CASES, *megatron.CASES)]
    assert len(names) > 200
    assert len(names) == len(set(names))


def test_what_is_sound_passes(sound: Path, tmp_path: Path) -> None:
    """The generators leave alone what they do not mean to spoil."""
    assert main(["verify", str(sound / "hf"), str(sound / "m"), "--quiet"]) == 0
    assert main(["verify", str(sound / "m"), "--quiet"]) == 0
    shutil.copytree(sound / "m", tmp_path / "m")
    folder = tmp_path / "m/iter_0000000"
    before = read_metadata((folder / ".metadata").read_bytes(), "f")
    megatron.place()(folder)
    assert read_metadata((folder / ".metadata").read_bytes(), "f") == before
    (folder / "shardway.json").write_bytes((sound / "m/iter_0000000/shardway.json").read_bytes())
    megatron.record(lambda data: data, signed=True)(folder)
    assert (folder / "shardway.json").read_bytes() == (sound / "m/iter_0000000/shardway.json").read_bytes()
