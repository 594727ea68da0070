"""Repositories that are not there, may not be read, or can't be asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.hub.test_import import MODEL, NAME, weights_of

import shardway
from shardway import Code, ShardwayError
from shardway.cli.main import main
from shardway.hub.names import is_repository

if TYPE_CHECKING:
    from tests.hub.server import FakeHub


SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """The model, of two files."""
    return MODEL.write(tmp_path / "origin", num_files=2)


def refused(source: str = NAME, **options: object) -> ShardwayError:
    """The error of an import, which leaves nothing behind."""
    with pytest.raises(ShardwayError) as error:
        shardway.import_hf(source, "ckpt", **options)  # type: ignore[arg-type]
    assert not list(Path().iterdir())
    return error.value


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/name", True),
        ("Qwen/Qwen3-30B-A3B", True),
        ("name", False),
        ("./org/name", False),
        ("/org/name", False),
        ("org/name/more", False),
        ("org/../name", False),
        ("~/name", False),
        ("org/", False),
        ("org/na me", False),
        ("org/name\n", False),
        (Path("org/name"), False),
    ],
)
def test_what_can_be_a_repository(elsewhere: Path, source: str | Path, expected: bool) -> None:
    assert is_repository(source) is expected


def test_what_is_here_is_no_repository(hub: FakeHub, elsewhere: Path, origin: Path) -> None:
    (elsewhere / "org").mkdir()
    origin.rename(elsewhere / "org" / "model")
    shardway.import_hf(NAME, "ckpt")
    assert not hub.requests


def test_a_repository_that_is_not_there(hub: FakeHub, elsewhere: Path) -> None:
    error = refused()
    assert error.codes == {Code.HUB_NOT_FOUND}
    assert f"{NAME} is neither here nor on the Hub" in str(error)


def test_a_revision_that_is_not_there(hub: FakeHub, elsewhere: Path, origin: Path) -> None:
    hub.add(NAME, origin)
    error = refused(revision="v9")
    assert error.codes == {Code.HUB_REVISION_MISSING}
    assert "'v9'" in str(error)


def test_a_gated_repository(hub: FakeHub, elsewhere: Path, origin: Path) -> None:
    hub.add(NAME, origin)
    hub.repos[NAME].gated = True
    error = refused()
    assert error.codes == {Code.HUB_GATED}
    assert "grant you access" in str(error)


@pytest.mark.parametrize(("status", "code"), [(503, Code.HUB_UNREACHABLE), (403, Code.HUB_REFUSED)])
def test_a_hub_that_answers_otherwise(hub: FakeHub, elsewhere: Path, origin: Path, status: int, code: Code) -> None:
    hub.add(NAME, origin)
    hub.refuse["/api/models/"] = status
    assert refused().codes == {code}


def test_a_hub_that_does_not_answer(hub: FakeHub, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert refused().codes == {Code.HUB_UNREACHABLE}


def test_a_server_that_names_files_outside(hub: FakeHub, elsewhere: Path, origin: Path) -> None:
    hub.add(NAME, origin, more={"../../evil.json": b"{}"})
    assert refused().codes == {Code.PATH_ESCAPES}
    assert not [path for path in hub.asked() if "evil" in path]


def test_what_is_wrong_is_said_before_a_weight_is_fetched(hub: FakeHub, elsewhere: Path, origin: Path) -> None:
    config = (origin / "config.json").read_text().replace("LlamaForCausalLM", "NoSuchForCausalLM")
    (origin / "config.json").write_text(config)
    sha = hub.add(NAME, origin)
    error = refused()
    assert error.codes == {Code.ARCHITECTURE_UNSUPPORTED}
    assert f"{NAME}@{sha[:12]}" in str(error)
    assert "/tmp" not in str(error)
    assert not set(hub.fetched()) & weights_of(origin)


def test_a_repository_without_safetensors(hub: FakeHub, elsewhere: Path, origin: Path) -> None:
    for path in origin.glob("*.safetensors*"):
        path.unlink()
    (origin / "pytorch_model.bin").write_bytes(b"weights")
    hub.add(NAME, origin)
    assert refused().codes == {Code.WEIGHTS_NOT_SAFETENSORS}
    assert "pytorch_model.bin" not in hub.asked()


def test_a_shard_that_is_not_on_the_hub(hub: FakeHub, elsewhere: Path, origin: Path) -> None:
    (origin / "model-00002-of-00002.safetensors").unlink()
    hub.add(NAME, origin)
    error = refused()
    assert error.codes == {Code.FILE_MISSING}
    assert "model-00002-of-00002.safetensors" in str(error)


@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # what huggingface_hub says of it
def test_no_room(hub: FakeHub, elsewhere: Path, origin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    hub.add(NAME, origin)
    real = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=1000))
    assert refused().codes == {Code.NO_SPACE}
    assert refused(keep_source=False).codes == {Code.NO_SPACE}
    assert not set(hub.fetched()) & weights_of(origin)


@pytest.mark.parametrize("options", [{"revision": "main"}, {"keep_source": False}], ids=["revision", "no-keep-source"])
def test_options_of_the_hub_do_not_go_with_a_directory(
    elsewhere: Path, origin: Path, options: dict[str, object]
) -> None:
    assert refused(str(origin), **options).codes == {Code.OPTION_INVALID}


def test_a_result_can_not_be_compared_with_what_is_not_kept(elsewhere: Path) -> None:
    assert refused(keep_source=False, verify=True).codes == {Code.OPTION_INVALID}


def test_without_the_extra(elsewhere: Path) -> None:
    """The message names the package, whichever command asks for it."""
    code = """
import sys
sys.modules["huggingface_hub"] = None
from shardway.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
    for command in (f"import {NAME} ckpt", f"plan {NAME}", f"inspect {NAME}", f"export ckpt hf --push {NAME}"):
        done = subprocess.run(
            [sys.executable, "-c", code, *command.split()],
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        assert done.stderr.startswith("extra-missing: ")
        assert "pip install shardway[hub]" in done.stderr


def test_offline_without_a_cache(hub: FakeHub, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused()
    assert error.codes == {Code.HUB_OFFLINE}
    assert "HF_HUB_OFFLINE" in str(error)
    assert not hub.requests


def test_offline_with_a_cache(hub: FakeHub, elsewhere: Path, origin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    sha = hub.add(NAME, origin)
    shardway.import_hf(NAME, "ckpt")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert shardway.import_hf(NAME, "ckpt", if_exists="reuse").reused
    shardway.import_hf(NAME, "other", revision=sha, keep_source=False)
    assert shardway.verify(NAME, "other").equal
    assert shardway.verify(origin, "other").equal
    assert not hub.requests
    first, second = (
        {path.name: path.read_bytes() for path in Path(root, "iter_0000000/hf").iterdir()} for root in ("ckpt", "other")
    )
    assert first == second


def test_offline_with_half_a_cache(
    hub: FakeHub, elsewhere: Path, origin: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.add(NAME, origin)
    shardway.import_hf(NAME, elsewhere.parent / "ckpt")
    (link,) = cache.rglob("model-00002-of-00002.safetensors")
    link.resolve().unlink()
    link.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused()
    assert error.codes == {Code.FILE_MISSING}
    assert "model-00002-of-00002.safetensors" in str(error)
    assert "unset HF_HUB_OFFLINE" in str(error)


def test_plan_inspect_and_verify_take_a_repository(
    hub: FakeHub, elsewhere: Path, origin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sha = hub.add(NAME, origin)
    planned, local = shardway.plan(NAME), shardway.plan(origin)
    assert planned.feasible
    assert planned.writes == local.writes
    assert planned.source == NAME
    seen = shardway.inspect(NAME, revision="main")
    assert seen.path == f"{NAME}@{sha[:12]}"
    assert seen.tensors == shardway.inspect(origin).tensors
    assert not set(hub.fetched()) & weights_of(origin)
    assert shardway.inspect(NAME, digest=True).tensors == shardway.inspect(origin, digest=True).tensors
    assert weights_of(origin) <= set(hub.fetched())
    assert shardway.verify(NAME, str(origin)).equal
    assert main(["plan", NAME, "--revision", "main", "--quiet"]) == 0
    assert main(["inspect", NAME]) == 0
    assert main(["import", NAME, "ckpt", "--revision", sha, "--no-keep-source", "--quiet"]) == 0
    assert main(["verify", NAME, "ckpt", "--revision", sha]) == 0
    assert main(["plan", str(origin), "--revision", "main"]) == 1
    assert "option-invalid" in capsys.readouterr().err


def test_a_plan_that_is_not_feasible_speaks_of_the_repository(hub: FakeHub, elsewhere: Path, origin: Path) -> None:
    sha = hub.add(NAME, origin, more={"config.json": b"{"})
    report = shardway.plan(NAME)
    assert not report.feasible
    assert str(report.problems[0].file) == f"{NAME}@{sha[:12]}/config.json"
