"""Many processes at once: one conversion for all of them, one winner, and readers that never see a mixture."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import threading
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from tests.tiny import Tiny, bits, read_distcp, read_safetensors, same

import shardway
from shardway.cli.progress import progress_display
from shardway.convert.turns import take_turn
from shardway.run import cleaning, pulse
from shardway.run.lease import Lease
from shardway.run.mover import Mover

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from shardway.plans.model import Stream
    from shardway.run.progress import Progress

MODEL = Tiny(layers=2)
LIMIT_S = 60.0


class Flags:
    """Flags that processes raise for each other to see."""

    def __init__(self, number: int) -> None:
        self._shared = mmap.mmap(-1, number)

    def up(self, which: int) -> None:
        self._shared[which] = 1

    def count(self) -> int:
        return sum(self._shared[:])

    def wait_for(self, number: int) -> None:
        """Wait until so many are up."""
        until = time.monotonic() + LIMIT_S
        while self.count() < number:
            if time.monotonic() > until:
                raise TimeoutError(f"{self.count()} of {number} flags are up")
            time.sleep(0.002)


class Processes:
    """Functions that run in forked processes; what they return, or the codes that they raise, comes back."""

    def __init__(self) -> None:
        self._running: list[tuple[int, int]] = []

    def start(self, action: Callable[[], Any]) -> int:
        ours, theirs = os.pipe()
        pid = os.fork()
        if not pid:
            answer: dict[str, Any] = {}
            try:
                answer["returned"] = action()
            except shardway.ShardwayError as error:
                answer |= {"codes": sorted(error.codes), "text": str(error)}
            except BaseException:
                answer["crashed"] = traceback.format_exc()
            finally:
                os.write(theirs, json.dumps(answer).encode())
                os._exit(0)
        os.close(theirs)
        self._running.append((pid, ours))
        return pid

    def ends(self) -> list[dict[str, Any]]:
        """How they ended, in the order in which they were started."""
        found = []
        for pid, pipe in self._running:
            with open(pipe, "rb") as file:
                data = file.read()
            os.waitpid(pid, 0)
            found.append(json.loads(data) if data else {"killed": True})
            assert "crashed" not in found[-1], found[-1]["crashed"]
        self._running.clear()
        return found

    def kill(self) -> None:
        for pid, pipe in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(pipe)


@pytest.fixture
def processes() -> Iterator[Processes]:
    made = Processes()
    yield made
    made.kill()


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return MODEL.write(tmp_path / "hf")


def held_up(monkeypatch: pytest.MonkeyPatch, until: Callable[[], None]) -> None:
    """Have whoever converts wait for something before it moves its first bytes."""
    real = Mover.move

    def move(self: Mover, stream: Stream) -> None:
        until()
        real(self, stream)

    monkeypatch.setattr(Mover, "move", move)


@pytest.mark.parametrize("if_exists", ["reuse", "replace"])
def test_twenty_imports_are_one(
    if_exists: str, hf: Path, tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nineteen say that they wait, and for whom; one converts."""
    if if_exists == "replace":
        shardway.import_hf(Tiny(layers=1).write(tmp_path / "older"), tmp_path / "m", fsync=False)
    waiting = Flags(20)
    held_up(monkeypatch, lambda: waiting.wait_for(19))

    def convert(which: int) -> dict[str, Any]:
        said: list[str] = []

        def progress(at: Progress) -> None:
            if at.phase == "wait":
                said.append(at.waiting_for)
                waiting.up(which)

        report = shardway.import_hf(hf, tmp_path / "m", if_exists=if_exists, progress=progress, workers=1)
        return {"reused": report.reused, "said": said[-1:]}

    for which in range(20):
        processes.start(lambda which=which: convert(which))  # type: ignore[misc]
    found = processes.ends()
    assert all("returned" in end for end in found), found
    ends = [end["returned"] for end in found]
    assert [end["reused"] for end in ends].count(False) == 1
    (winner,) = [end for end in ends if not end["reused"]]
    assert winner["said"] == []
    said = {end["said"][0].split(",")[0] for end in ends if end["reused"]}
    assert len(said) == 1
    assert f"on {os.uname().nodename} (import)" in said.pop()
    assert same(read_distcp(tmp_path / "m"), MODEL.megatron(MODEL.weights()))
    assert "m" in os.listdir(tmp_path)
    assert not [name for name in os.listdir(tmp_path / "m") if "shardway" in name]


def test_twenty_exports_are_one(
    hf: Path, tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    shardway.import_hf(hf, tmp_path / "m", fsync=False)
    waiting = Flags(20)
    held_up(monkeypatch, lambda: waiting.wait_for(19))

    def convert(which: int) -> bool:
        def progress(at: Progress) -> None:
            if at.phase == "wait":
                waiting.up(which)

        return shardway.export_hf(tmp_path / "m", tmp_path / "out", if_exists="reuse", progress=progress).reused

    for which in range(20):
        processes.start(lambda which=which: convert(which))  # type: ignore[misc]
    assert [end["returned"] for end in processes.ends()].count(False) == 1
    assert same(bits(read_safetensors(tmp_path / "out").items()), MODEL.weights())
    assert sorted(os.listdir(tmp_path)) == ["hf", "m", "out"]


@pytest.mark.parametrize(
    ("if_exists", "same_source"), [("error", True), ("error", False), ("reuse", False), ("replace", False)]
)
def test_whoever_does_not_wait_gets_a_clear_error(
    if_exists: str,
    same_source: bool,
    hf: Path,
    tmp_path: Path,
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = hf if same_source else MODEL.write(tmp_path / "other", seed=7)
    at_work, refused = Flags(1), Flags(1)

    def until() -> None:
        at_work.up(0)
        refused.wait_for(1)

    held_up(monkeypatch, until)
    processes.start(lambda: shardway.import_hf(hf, tmp_path / "m", if_exists=if_exists, workers=1).reused)
    at_work.wait_for(1)
    with pytest.raises(shardway.ShardwayError) as caught:
        shardway.import_hf(other, tmp_path / "m", if_exists=if_exists)
    assert caught.value.codes == {"destination-busy"}
    assert f"on {os.uname().nodename}" in str(caught.value)
    assert ("reuse" in str(caught.value)) is same_source
    refused.up(0)
    assert processes.ends() == [{"returned": False}]
    assert same(read_distcp(tmp_path / "m"), MODEL.megatron(MODEL.weights()))
    assert os.listdir(tmp_path / "m").count(".iter_0000000.shardway-staging") == 0


@pytest.mark.parametrize(("wait", "done"), [(True, True), (True, False), (False, True)])
def test_what_is_wanted_and_there_is_used_whoever_is_at_work(wait: bool, done: bool, tmp_path: Path) -> None:
    """One that can't use it may have the lease just then, to find that out."""
    other = Lease.create(tmp_path / "m", key="other", doing="test")
    assert other is not None
    with other:
        ask = partial(take_turn, tmp_path / "m", key="mine", doing="test", wait=wait, done=lambda: done, progress=None)
        if wait and done:
            assert ask() is None
            return
        with pytest.raises(shardway.ShardwayError) as caught:
            ask()
        assert caught.value.codes == {"destination-busy"}


def test_many_of_two_sources_at_once(hf: Path, tmp_path: Path, processes: Processes) -> None:
    """Whoever wins, the others of its kind reuse, and those of the other kind are refused."""
    other = MODEL.write(tmp_path / "other", seed=7)
    for turn in range(5):
        root = tmp_path / f"m{turn}"
        for which in range(8):
            source = hf if which % 2 else other
            processes.start(lambda of=source, to=root: shardway.import_hf(of, to, if_exists="reuse").reused)  # type: ignore[misc]
        ends = processes.ends()
        assert [end.get("returned") for end in ends].count(False) == 1
        winner = next(which for which, end in enumerate(ends) if end.get("returned") is False) % 2
        for which, end in enumerate(ends):
            if which % 2 == winner:
                assert "returned" in end, end
            else:
                assert end["codes"] in (["destination-busy"], ["destination-exists"]), end
        wanted = MODEL.weights(0 if winner else 7)
        assert same(read_distcp(root), MODEL.megatron(wanted))
        assert not [name for name in os.listdir(root) if "shardway" in name]


def test_readers_never_see_a_mixture_during_replacements(hf: Path, tmp_path: Path, processes: Processes) -> None:
    """One process replaces one model by the other again and again; others look, export, and compare."""
    other = MODEL.write(tmp_path / "other", seed=7)
    wanted = [MODEL.weights(seed) for seed in (0, 7)]
    root = tmp_path / "m"
    shardway.import_hf(hf, root, fsync=False)
    stop, seen = Flags(1), Flags(3)

    def look() -> int:
        looks = 0
        while not stop.count():
            assert shardway.is_complete(root)
            looks += 1
            seen.up(0)
        return looks

    def export(which: int) -> list[int]:
        found = [0, 0, 0]
        out = tmp_path / f"out{which}"
        while not stop.count():
            try:
                shardway.export_hf(root, out, if_exists="replace", fsync=False)
            except shardway.ShardwayError as error:
                if error.codes != {"source-changed"}:
                    raise
                found[2] += 1  # torn between two checkpoints: noticed, and nothing was published
                continue
            tensors = bits(read_safetensors(out).items())
            (kind,) = [k for k, weights in enumerate(wanted) if same(tensors, weights)]
            found[kind] += 1
            seen.up(which)
        return found

    processes.start(look)
    processes.start(lambda: export(1))
    processes.start(lambda: export(2))
    seen.wait_for(3)
    for turn in range(30):
        shardway.import_hf(hf if turn % 2 else other, root, if_exists="replace", fsync=False)
    stop.up(0)
    looks, *exports = processes.ends()
    assert looks["returned"] > 0
    assert all(sum(end["returned"][:2]) > 0 for end in exports), exports
    assert not [name for name in os.listdir(tmp_path) if "shardway" in name]


class TestHoldersThatVanish:
    def stopped(self, processes: Processes, hf: Path, root: Path, number: int) -> int:
        """An import that has stopped, or was killed, while it was at work."""
        at_work = Flags(1)
        real = Mover.move

        def move(self: Mover, stream: Stream) -> None:
            real(self, stream)
            if not at_work.count():
                at_work.up(0)
                os.kill(os.getpid(), number)

        def convert() -> bool:
            Mover.move = move  # type: ignore[method-assign] # in the child alone
            return shardway.import_hf(hf, root, workers=1, max_file_size=4000).reused

        pid = processes.start(convert)
        at_work.wait_for(1)
        if number == signal.SIGSTOP:
            os.waitpid(pid, os.WUNTRACED)
        return pid

    def test_a_killed_one_is_not_waited_for(self, hf: Path, tmp_path: Path, processes: Processes) -> None:
        self.stopped(processes, hf, tmp_path / "m", signal.SIGKILL)
        assert processes.ends() == [{"killed": True}]
        report = shardway.import_hf(hf, tmp_path / "m", max_file_size=4000)
        assert not report.reused
        assert same(read_distcp(tmp_path / "m"), MODEL.megatron(MODEL.weights()))
        assert not [name for name in os.listdir(tmp_path / "m") if "shardway" in name]

    def test_one_that_shows_no_sign_of_life_loses_its_lease_and_does_no_harm(
        self, hf: Path, tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Stopped, taken for dead, and continued when another one has done its work."""
        monkeypatch.setattr(pulse, "EXPIRY_S", 0.3)
        pid = self.stopped(processes, hf, tmp_path / "m", signal.SIGSTOP)
        said: list[str] = []
        report = shardway.import_hf(
            hf, tmp_path / "m", max_file_size=4000, if_exists="reuse", progress=lambda at: said.append(at.waiting_for)
        )
        assert not report.reused
        assert any(f"process {pid} on" in each for each in said)
        os.kill(pid, signal.SIGCONT)
        (end,) = processes.ends()
        assert end["codes"] == ["lease-lost"], end
        assert same(read_distcp(tmp_path / "m"), MODEL.megatron(MODEL.weights()))
        assert shardway.verify(hf, tmp_path / "m").equal
        assert not [name for name in os.listdir(tmp_path / "m") if "shardway" in name]

    def test_clean_leaves_what_is_alive_alone(
        self, hf: Path, tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        at_work, cleaned = Flags(1), Flags(1)

        def until() -> None:
            at_work.up(0)
            cleaned.wait_for(1)

        held_up(monkeypatch, until)
        pid = processes.start(lambda: shardway.import_hf(hf, tmp_path / "m", workers=1).reused)
        at_work.wait_for(1)
        report = cleaning.clean(tmp_path / "m")
        assert not report.removed
        (kept,) = report.kept
        assert f"process {pid}" in kept.why
        cleaned.up(0)
        assert processes.ends() == [{"returned": False}]
        assert cleaning.clean(tmp_path / "m").kept == ()


def test_the_command_line_says_who_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    from shardway.run.progress import Progress

    with progress_display(quiet=False) as show:
        assert show is not None
        for second in range(3):
            show(Progress("wait", 0, 0, f"process 12 on node7 (import), {second} s"))
    assert capsys.readouterr().err == "waiting for process 12 on node7 (import), 0 s\n"


@pytest.fixture(autouse=True)
def _nothing_is_left_over() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("shardway-") and thread not in before
    ]
