"""Exports that go to the Hub."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.hub.test_import import MODEL, NAME

import shardway
from shardway import Code, ShardwayError
from shardway.cli.main import main

if TYPE_CHECKING:
    from tests.hub.server import FakeHub

PUSHED = "me/again"


@pytest.fixture
def ckpt(hub: FakeHub, tmp_path: Path, elsewhere: Path) -> str:
    """An import from the Hub."""
    hub.add(NAME, MODEL.write(tmp_path / "origin", num_files=2))
    shardway.import_hf(NAME, "ckpt")
    return "ckpt"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(hub: FakeHub, branch: str = "main") -> dict[str, bytes]:
    """What is on a branch, without what the Hub itself puts there."""
    repo = hub.repos[PUSHED]
    return {name: data for name, data in repo.commits[repo.branches[branch]].items() if name != ".gitattributes"}


def test_what_is_pushed_is_what_was_exported(
    hub: FakeHub, ckpt: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", ckpt, "again", "--push", PUSHED, "--private", "--max-shard-size", "5kB"]) == 0
    assert f"pushed to {hub.url}/{PUSHED}, branch main" in capsys.readouterr().out
    there, here = pushed(hub), files_of(Path("again"))
    card = there.pop("README.md").decode()
    assert there == here
    assert len([name for name in here if name.endswith(".safetensors")]) > 1
    assert hub.sent[f"created {PUSHED} private=True"] == 1
    assert "library_name: transformers" in card
    assert f"base_model: {NAME}" in card
    assert "LlamaForCausalLM" in card
    assert f"shardway {shardway.__version__}" in card
    assert shardway.import_hf(PUSHED, "back").architecture == "LlamaForCausalLM"
    assert shardway.verify(ckpt, "back").equal


def test_another_branch(hub: FakeHub, ckpt: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", ckpt, "again", "--push", PUSHED, "--revision", "v2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pushed"]["revision"] == "v2"
    assert report["pushed"]["commit"] == hub.repos[PUSHED].branches["v2"]
    assert set(pushed(hub, "v2")) == {*files_of(Path("again")), "README.md"}
    assert not pushed(hub)


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_card_that_is_there_stays(hub: FakeHub, ckpt: str, tmp_path: Path, where: str) -> None:
    shardway.export_hf(ckpt, "again")
    if where == "here":
        Path("again/README.md").write_bytes(b"# mine\n")
    else:
        (tmp_path / "first").mkdir()
        (tmp_path / "first" / "README.md").write_bytes(b"# mine\n")
        hub.add(PUSHED, tmp_path / "first")
    report = shardway.push_hf("again", PUSHED, source=ckpt)
    assert report.url == f"{hub.url}/{PUSHED}"
    assert pushed(hub)["README.md"] == b"# mine\n"
    assert set(pushed(hub)) == {*files_of(Path("again")), "README.md"}


def test_what_is_refused_leaves_the_export(hub: FakeHub, ckpt: str, capsys: pytest.CaptureFixture[str]) -> None:
    hub.refuse[f"/api/models/{PUSHED}/commit"] = 403
    command = ["export", ckpt, "again", "--push", PUSHED, "--quiet"]
    assert main(command) == 1
    told = capsys.readouterr().err
    assert told.startswith("hub-refused: ")
    assert "the export is whole, at again" in told
    assert shardway.verify(ckpt, "again").equal
    hub.refuse.clear()
    assert main([*command, "--if-exists", "reuse"]) == 0
    there = pushed(hub)
    assert there.pop("README.md")
    assert there == files_of(Path("again"))


def test_bars_of_the_library_are_drawn_unless_quiet(
    hub: FakeHub, ckpt: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("huggingface_hub.utils.tqdm"), "HF_HUB_DISABLE_PROGRESS_BARS", None)
    command = ["export", ckpt, "again", "--push", PUSHED]
    assert main([*command, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    hub.objects.clear()
    hub.repos.clear()
    assert main([*command, "--if-exists", "reuse"]) == 0
    assert "model.safetensors: 100%" in capsys.readouterr().err


def test_an_upload_that_is_refused(hub: FakeHub, ckpt: str) -> None:
    """The reason lies below an error that only says which file it was."""
    shardway.export_hf(ckpt, "again")
    hub.refuse["/objects/"] = 403
    with pytest.raises(ShardwayError) as error:
        shardway.push_hf("again", PUSHED)
    assert error.value.codes == {Code.HUB_REFUSED}


def test_a_token_that_may_not_make_repositories(hub: FakeHub, ckpt: str) -> None:
    shardway.export_hf(ckpt, "again")
    hub.refuse["/api/repos/create"] = 403
    with pytest.raises(ShardwayError) as error:
        shardway.push_hf("again", PUSHED)
    assert error.value.codes == {Code.HUB_REFUSED}


@pytest.mark.parametrize("options", [["--push", "no-org"], ["--push", "a--b/c"], ["--private"], ["--revision", "v2"]])
def test_wrong_options_are_refused_before_anything_is_done(ckpt: str, options: list[str]) -> None:
    assert main(["export", ckpt, "again", *options]) == 1
    assert not Path("again").exists()


def test_offline_is_told_before_anything_is_done(
    hub: FakeHub, ckpt: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["export", ckpt, "again", "--push", PUSHED]) == 1
    assert capsys.readouterr().err.startswith("hub-offline: ")
    assert not Path("again").exists()


def test_only_a_whole_checkpoint_is_pushed(hub: FakeHub, ckpt: str) -> None:
    shardway.export_hf(ckpt, "again")
    file = Path("again/model.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ShardwayError) as error:
        shardway.push_hf("again", PUSHED)
    assert error.value.codes == {Code.SAFETENSORS_TRUNCATED}
    assert PUSHED not in hub.repos
