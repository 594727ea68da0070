"""Conversions on a machine that has neither torch nor transformers, megatron, safetensors or huggingface_hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.tiny import Tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Run = Callable[[str], list[str]]

SOURCE = Path(__file__).resolve().parents[2] / "src"
ABSENT = ("torch", "transformers", "megatron", "safetensors", "huggingface_hub")

# Modules that are asked for and blocked count, also where the question was wrapped in `except ImportError`.
PRELUDE = f"""
import json, sys
asked = []
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            asked.append(name)
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""
EPILOGUE = """
assert not asked, asked
print("modules: " + json.dumps(sorted(sys.modules)))
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs code where those packages can't be imported, in a new folder; returns the modules that it imported."""

    def run_code(code: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + code + EPILOGUE],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        modules = json.loads(done.stdout.rpartition("modules: ")[2])
        assert packages(modules).isdisjoint(ABSENT)
        return list(modules)

    return run_code


def packages(modules: Iterable[str]) -> set[str]:
    """The top-level packages of modules."""
    return {module.partition(".")[0] for module in modules}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of two files, in the folder where the code runs."""
    return Tiny().write(tmp_path / "hf", num_files=2)


def test_the_blocker_blocks(run: Run) -> None:
    with pytest.raises(AssertionError, match=r"AssertionError: \['torch'"):
        run("try:\n    import torch.nn\nexcept ImportError:\n    pass\n")


def test_importing_shardway_imports_nothing_else(run: Run) -> None:
    assert [name for name in run("import shardway") if name.startswith("shardway")] == ["shardway"]


def test_every_public_name_can_be_imported(run: Run) -> None:
    modules = run("import shardway\nfor name in shardway.__all__:\n    getattr(shardway, name)")
    assert "shardway.convert.importing" in modules
    assert "rich" not in packages(modules)


def test_the_api_works(run: Run, model: Path) -> None:
    run("""
import shardway
assert shardway.plan("hf").feasible
assert shardway.import_hf("hf", "megatron", verify=True).num_tensors == 21
assert shardway.plan("megatron").feasible
assert shardway.inspect("megatron", digest=True).tensors
assert shardway.export_hf("megatron", "again", verify=True).num_tensors == 21
assert shardway.verify("hf", "megatron").equal
assert shardway.verify("hf", "again").equal
""")


def test_casts_work(run: Run, model: Path) -> None:
    run("""
import shardway
shardway.import_hf("hf", "wide", dtype="fp32")
shardway.export_hf("wide", "narrow", dtype="bf16")
""")


def test_the_command_line_works(run: Run, model: Path) -> None:
    run("""
from shardway.cli.main import main
for line in (
    "plan hf", "import hf megatron --verify", "inspect megatron --tensors --digest", "plan megatron",
    "export megatron again", "verify hf again", "verify hf megatron --json", "families",
):
    status = main(line.split())
    assert status == 0, (line, status)
""")


@pytest.mark.parametrize("command", ["import hf megatron --quiet", "plan hf"])
def test_moving_bytes_needs_no_numpy(run: Run, model: Path, command: str) -> None:
    """Start-up is a tenth of the time of a conversion; importing numpy would double it."""
    modules = run(f"from shardway.cli.main import main\nassert main({command.split()}) == 0")
    assert packages(modules).isdisjoint({"numpy", "ml_dtypes", "rich"})


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_imports_the_parser_alone(run: Run, argument: str) -> None:
    modules = run(f"""
from shardway.cli.main import main
try:
    main(["{argument}"])
except SystemExit as stop:
    assert stop.code == 0
""")
    assert packages(modules).isdisjoint({"numpy", "ml_dtypes", "rich", "xxhash", "dataclasses", "typing"})
    assert not [name for name in modules if name.startswith("shardway.") and not name.startswith("shardway.cli")]
