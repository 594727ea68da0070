"""Pickles that want something to be executed are refused by name wherever a pickle is read, and nothing is executed."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

import pytest
from tests.conformance.malformed.attacks import ATTACKS, BOMBS, text
from tests.conformance.malformed.megatron import NORM, PROTOCOL, SCALE, norm, torch_file
from tests.tiny import Tiny

import shardway
from shardway.formats.dcp import DcpLocation, read_metadata, write_metadata
from shardway.formats.saved_objects import read_torch_bytes
from shardway.formats.torch_dist import COMMON_STATE, open_torch_dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_RUNS = {
    "exec",
    "compile",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "pickle.find_class",
    "webbrowser.open",
}


class Watch:
    """What the interpreter was asked to execute while `on`; a hook can't be removed again."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.on and (event in _RUNS or (event == "import" and arguments[0] == "antigravity")):
            self.seen.append(event)


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound")
    Tiny().write(path / "hf")
    shardway.import_hf(path / "hf", path / "m", fsync=False)
    (path / "m/iter_0000000/shardway.json").unlink()
    shardway.inspect(path / "m")  # imports what it needs
    return path / "m/iter_0000000"


@pytest.fixture
def folder(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Watch) -> Iterator[Path]:
    """A checkpoint to be spoiled; afterwards nothing has been executed."""
    monkeypatch.chdir(tmp_path)  # where what an attack executes would leave a file
    shutil.copytree(sound, tmp_path / "iter_0000000")
    watch.seen.clear()
    watch.on = True
    yield tmp_path / "iter_0000000"
    watch.on = False
    assert not watch.seen
    assert not (tmp_path / "executed").exists()


def metadata(folder: Path, code: bytes) -> None:
    (folder / ".metadata").write_bytes(PROTOCOL + code + b".")


def planner_data(folder: Path, code: bytes) -> None:
    """In an attribute of Metadata that nobody looks at."""
    state = b"}" + text("planner_data") + code + b"s"
    saved = b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81" + state + b"b"
    (folder / ".metadata").write_bytes(PROTOCOL + saved + b".")


def common_pt(folder: Path, code: bytes) -> None:
    (folder / "common.pt").write_bytes(torch_file(PROTOCOL + code + b"."))


def nested_common_pt(folder: Path, code: bytes) -> None:
    """Deep inside of what common.pt should hold."""
    pickle = PROTOCOL + b"}" + text("args") + b"]" + text("x") + code + b"\x86as."
    (folder / "common.pt").write_bytes(torch_file(pickle))


def common_state(folder: Path, code: bytes) -> None:
    (folder / "common.pt").unlink()
    content = torch_file(PROTOCOL + b"]" + code + b"a.")
    found = read_metadata((folder / ".metadata").read_bytes(), "sound")
    (folder / "__1_0.distcp").write_bytes(content)
    place = DcpLocation("__1_0.distcp", 0, len(content))
    (folder / ".metadata").write_bytes(write_metadata(found.tensors, {**found.objects, COMMON_STATE: place}))


def chunk(folder: Path, code: bytes) -> None:
    norm(PROTOCOL + code + b".")(folder)


def chunk_attribute(folder: Path, code: bytes) -> None:
    """In the place of the hooks of a sound tensor's pickle."""
    sound = b"\x89ccollections\nOrderedDict\nq\x05)R"
    assert sound in SCALE
    norm(SCALE.replace(sound, b"\x89" + code))(folder)


PLACES: tuple[Callable[[Path, bytes], None], ...] = (
    metadata,
    planner_data,
    common_pt,
    nested_common_pt,
    common_state,
    chunk,
    chunk_attribute,
)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("attack", ATTACKS)
def test_refused_by_name(attack: str, place: Callable[[Path, bytes], None], folder: Path) -> None:
    name, code = ATTACKS[attack]
    place(folder, code)
    with pytest.raises(shardway.ShardwayError) as caught:
        shardway.inspect(folder)
    (problem,) = caught.value.problems
    assert problem.code == "pickle-forbidden", problem
    if place in {chunk, chunk_attribute} and "getattr" in attack:
        name = "getattr"  # a tensor has no enums, so there is no getattr
    assert name in problem.what
    assert "nothing was executed" in str(problem)
    assert str(folder) in str(problem.file)
    if place in {chunk, chunk_attribute}:
        assert problem.tensor == NORM


@pytest.mark.parametrize("attack", ATTACKS)
def test_objects_that_are_asked_for(attack: str, folder: Path) -> None:
    """Extra state and the like is only read by key."""
    name, code = ATTACKS[attack]
    content = torch_file(PROTOCOL + b"]" + code + b"a.")
    (folder / "__1_0.distcp").write_bytes(content)
    found = read_metadata((folder / ".metadata").read_bytes(), "sound")
    key = next(iter(found.objects))
    place = DcpLocation("__1_0.distcp", 0, len(content))
    (folder / ".metadata").write_bytes(write_metadata(found.tensors, {**found.objects, key: place}))
    checkpoint = open_torch_dist(folder)
    with pytest.raises(shardway.ShardwayError, match=f"pickle-forbidden: .*{name}"):
        checkpoint.read_object(key)


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_in_a_file_of_torch(bomb: str) -> None:
    code, content = BOMBS[bomb]
    with pytest.raises(shardway.ShardwayError) as caught:
        read_torch_bytes(torch_file(PROTOCOL + content + b"."), file="f.pt")
    assert caught.value.codes == {code}


def test_the_watch_watches(watch: Watch) -> None:
    watch.on = True
    exec("1")
    watch.on = False
    assert watch.seen[-2:] == ["compile", "exec"]
    watch.seen.clear()
