"""The commands and code of the README and the guides, run as a user would, and the list of errors."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from tests.hub.conftest import cache, hub  # noqa: F401 - fixtures
from tests.megatron import require

from shardway import Code
from shardway.cli.main import main

ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "tests" / "fixtures" / "hf" / "llama"


PAGES = [
    "README.md",
    "docs/guide/convert.md",
    "docs/guide/megatron-bridge.md",
    "docs/guide/megatron-lm.md",
    "docs/guide/training.md",
    "docs/guide/migrate.md",
    "docs/guide/hub.md",
    "docs/guide/nemo-rl.md",
]


def blocks(page: str) -> list[str]:
    """The indented blocks of a page."""
    return re.findall(r"(?:^    .*\n|^\n)+", (ROOT / page).read_text() + "\n", re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The shardway commands of a page, in order."""
    lines = [line.strip() for block in blocks(page) for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("shardway ")]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_works(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """In an empty directory with the model that they name, or beside a Hub that has it, in their order."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    found = commands(page)
    remote = {word for command in found for word in command if re.fullmatch(r"(meta-llama|Qwen)/[\w.-]+", word)}
    for repository in remote:
        request.getfixturevalue("hub").add(repository, LLAMA)
    if page != "docs/guide/hub.md":
        shutil.copytree(LLAMA, "Llama-3.1-8B")
    if page in ("README.md", "docs/guide/convert.md"):
        assert {command[0] for command in found} >= {"import", "export", "verify", "inspect", "plan"}
    assert found
    for command in found:
        assert main(command) == 0, command


def test_the_python_of_the_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(LLAMA, "Llama-3.1-8B")
    (code,) = [block for block in blocks("docs/guide/convert.md") if "import shardway" in block]
    exec(compile("\n".join(line[4:] for line in code.splitlines()), "convert.md", "exec"), {})
    assert Path("again/model.safetensors").exists()


def test_the_worked_example_of_a_family_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the shapes that transformers gives such a model."""
    require("torch", "transformers")
    import torch
    import transformers

    from shardway.families import registry

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTERED", {})
    Path("scratch").mkdir()
    config = transformers.Starcoder2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with torch.device("meta"):
        model = transformers.Starcoder2ForCausalLM(config)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    Path("starcoder2").mkdir()
    Path("starcoder2/shapes.json").write_text(json.dumps(shapes))
    values = {**config.to_dict(), "architectures": ["Starcoder2ForCausalLM"]}
    Path("starcoder2/config.json").write_text(json.dumps(values))
    code = "\n".join(line[4:] for block in blocks("docs/guide/families.md") for line in block.splitlines())
    exec(compile(code, "families.md", "exec"), {})


def test_every_error_is_explained() -> None:
    explained = re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert sorted(explained) == sorted(code.value for code in Code)
