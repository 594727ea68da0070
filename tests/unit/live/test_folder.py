"""The folder of a live save: whoever finishes it, however often and up to whatever point, it is there whole or not."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import itertools
import os
import random
import shutil
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.oracle import read_torch_dist

from shardway.core.dtypes import FLOAT32
from shardway.core.errors import Code, ShardwayError
from shardway.formats.torch_dist import extra_state
from shardway.live import assemble
from shardway.live import folder as module
from shardway.live.folder import IterationFolder
from shardway.live.records import ObjectShard, Shard
from shardway.live.saving import Assignment
from shardway.live.state import LiveState
from shardway.run import places
from shardway.run.cleaning import clean
from shardway.run.pulse import Pulse, read_sign

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STAGING, TAG = "5ca1ab1e", "t0"
OBJECT = extra_state()
ROOT = ["iter_0000003", "latest_checkpointed_iteration.txt", "latest_train_state.pt"]
FILES = [".metadata", "__0_0.distcp", "common.pt", "hf", "metadata.json", "train_state.pt"]


class Killed(BaseException):
    """The end of a process."""


def folder_of(root: Path, value: float, *, replace: bool = False, sync: bool = False, **more: Any) -> IterationFolder:
    tensor = torch.full((2, 3), value)
    shard = Shard("weight", FLOAT32, (2, 3), (0, 0), (2, 3), 0)
    made = tuple(directory for directory in (root, *root.parents) if not directory.exists())
    options: dict[str, Any] = {
        "root": root,
        "iteration": 3,
        "rank": 0,
        "state": LiveState.of([(shard, tensor)], [(ObjectShard("state", 0, len(OBJECT)), OBJECT)]),
        "tensors": None,
        "record": None,
        "companions": {"config.json": b"{}", "deep/er/file.txt": b"text"},
        "replace": replace,
        "writers": 1,
        "sync": sync,
        "made": made,
    }
    return IterationFolder(**options | more)


def stage(folder: IterationFolder, staging: str = STAGING, tag: str = TAG) -> None:
    """Everything before the decision."""
    state = folder.state
    assignment = Assignment(
        staging=staging, first_file=0, shards=state.shards, objects=state.objects, num_bytes=state.num_bytes
    )
    folder.prepare(staging)
    result = folder.write(assignment, lambda _: None)
    folder.publish(staging, tag, [result], lambda _: None)


def finish(folder: IterationFolder) -> None:
    folder.finish(STAGING, TAG, lambda _: None)


def check(root: Path, value: float) -> None:
    """The checkpoint is in place and whole, and nothing else is there."""
    assert sorted(path.name for path in root.iterdir()) == ROOT
    assert sorted(path.name for path in (root / ROOT[0]).iterdir()) == FILES
    assert (root / ROOT[0] / "hf/deep/er/file.txt").read_text() == "text"
    assert (root / ROOT[1]).read_text() == "3"
    assert struct.pack("<6f", *[value] * 6) in (root / ROOT[0] / "__0_0.distcp").read_bytes()


@contextlib.contextmanager
def hooked(hook: Callable[[], None]) -> Iterator[None]:
    """Call the hook before everything that changes the tree, and after an exchange."""
    inside = False

    def calling(real: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if not inside:
                inside = True
                try:
                    hook()
                finally:
                    inside = False
            result = real(*args, **kwargs)
            if after and not inside:
                inside = True
                try:
                    hook()
                finally:
                    inside = False
            return result

        return instead

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "unlink", "rmdir", "replace"):
            patch.setattr(os, name, calling(getattr(os, name)))
        patch.setattr(places, "exchange", calling(places.exchange, after=True))
        yield


def at_step(number: int, do: Callable[[], None]) -> tuple[Callable[[], None], list[int]]:
    """A hook that does something at the `number`-th step, and the steps that it has seen."""
    seen: list[int] = []

    def hook() -> None:
        seen.append(len(seen))
        if len(seen) == number + 1:
            do()

    return hook, seen


def kill() -> None:
    raise Killed


@pytest.fixture(autouse=True)
def pulses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Pulse]]:
    """The signs of life that a test has begun; they end with it, also where a folder is never finished."""
    begun: list[Pulse] = []
    real = Pulse.start

    def start(self: Pulse) -> None:
        begun.append(self)
        real(self)

    monkeypatch.setattr(Pulse, "start", start)
    yield begun
    for pulse in begun:
        pulse.stop()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """For ranks that take turns; those that really run at once need the pauses that they make."""
    pause = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: pause(seconds / 1000))


@pytest.fixture(params=["new", "replace", "replace without exchange"])
def attempt(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], IterationFolder]:
    """Gives folders that are staged up to the decision, each in a root of its own."""
    if request.param.endswith("exchange"):

        class Library:
            def __init__(self, *_: object, **__: object) -> None:
                pass

        monkeypatch.setattr(ctypes, "CDLL", Library)
    template = tmp_path / "template"
    replace = request.param != "new"
    if replace:
        old = folder_of(template, -1.0)
        stage(old, "old")
        old.finish("old", TAG, lambda _: None)
    stage(folder_of(template, 1.0, replace=replace))
    staged = template / f".{ROOT[0]}.shardway-live-{STAGING}"
    (staged / "__7_0.distcp").touch()  # of a writer that was lost
    (staged / f".publish-{STAGING}-t1").mkdir()  # of a coordinator that was taken for dead
    numbers = itertools.count()

    def make() -> IterationFolder:
        root = tmp_path / str(next(numbers))
        shutil.copytree(template, root, copy_function=os.link)
        return folder_of(root, 1.0, replace=replace)

    return make


@pytest.mark.usefixtures("short_pauses")
def test_finishing_twice_is_finishing_once(attempt: Callable[[], IterationFolder]) -> None:
    folder = attempt()
    finish(folder)
    check(folder.root, 1.0)
    tensors, _ = read_torch_dist(folder.folder)
    assert torch.equal(tensors["weight"], torch.ones(2, 3))
    finish(folder)
    (folder.root / f".{ROOT[0]}.shardway-live-{STAGING}").mkdir()  # by a coordinator that is late
    folder.abandon(STAGING)
    check(folder.root, 1.0)


@pytest.mark.usefixtures("short_pauses")
def test_killed_at_any_step_another_rank_finishes(attempt: Callable[[], IterationFolder]) -> None:
    for number in itertools.count():
        folder = attempt()
        hook, _ = at_step(number, kill)
        with contextlib.suppress(Killed), hooked(hook):
            finish(folder)
            break
        if folder.replace and "old" not in "".join(os.listdir(folder.root)):
            assert (folder.folder / ".metadata").exists(), "an exchange leaves no moment without a checkpoint"
        finish(folder)
        check(folder.root, 1.0)
    assert number > 10


@pytest.mark.usefixtures("short_pauses")
def test_overtaken_at_any_step_it_is_finished_once(attempt: Callable[[], IterationFolder]) -> None:
    """A second rank does all of it between any two steps of the first, or is killed on its way, and a third does."""
    for number in itertools.count():
        total = 10**6
        for killed_at in itertools.count(-1):
            folder = attempt()
            done: list[bool] = []

            def overtake(folder: IterationFolder = folder, killed_at: int = killed_at, done: list[bool] = done) -> None:
                hook, _ = at_step(killed_at, kill)
                try:
                    with hooked(hook):
                        finish(folder)
                    done.append(True)
                except Killed:
                    done.append(False)

            hook, seen = at_step(number, overtake)
            with hooked(hook):
                finish(folder)
            total = len(seen)
            if not done:
                break
            finish(folder)
            check(folder.root, 1.0)
            if done == [True] and killed_at >= 0:
                break
        if number >= total:
            break
    assert number > 10


@pytest.mark.usefixtures("short_pauses")
def test_overtaken_twice(attempt: Callable[[], IterationFolder]) -> None:
    """By two ranks one after the other; the last may find nothing, as long as the first pauses in between."""
    for first in itertools.count():
        total = 10**6
        for second in itertools.count(first + 1):
            folder = attempt()

            def overtake(folder: IterationFolder = folder) -> None:
                with contextlib.suppress(ShardwayError):
                    finish(folder)

            hook, seen = at_step(first, overtake)
            again, _ = at_step(second, overtake)
            with hooked(functools.partial(_each, hook, again)):
                finish(folder)
            check(folder.root, 1.0)
            total = len(seen)
            if second >= total:
                break
        if first >= total:
            break


def _each(*hooks: Callable[[], None]) -> None:
    for hook in hooks:
        hook()


def finish_at_once(folder: IterationFolder) -> None:
    """Finish it by four ranks, all of which succeed."""
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def run() -> None:
        start.wait()
        try:
            finish(folder)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    check(folder.root, 1.0)


def test_many_finish_at_once(attempt: Callable[[], IterationFolder]) -> None:
    for _ in range(20):
        finish_at_once(attempt())


def test_on_a_slow_filesystem_ranks_let_each_other_finish(
    attempt: Callable[[], IterationFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that took the folder from each other as soon as they see it would never end, where all of them are slow."""
    folder = attempt()
    taken: list[str] = []

    def slow(real: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            time.sleep(random.uniform(0.02, 0.04))
            result = real(*args, **kwargs)
            if os.path.basename(args[-1]).startswith(f".{ROOT[0]}.shardway-live-{STAGING}-"):
                taken.append(args[-1])
            return result

        return instead

    monkeypatch.setattr(os, "rename", slow(os.rename))
    monkeypatch.setattr(os, "listdir", slow(os.listdir))
    finish_at_once(folder)
    assert len(taken) < 20  # 6 to 11 are usual; 25 to 42 where nobody waits


def test_a_rank_shows_in_the_staging_folder_that_it_is_alive(tmp_path: Path, pulses: list[Pulse]) -> None:
    folder = folder_of(tmp_path / "root", 1.0)
    stage(folder)
    (pulse,) = pulses
    assert read_sign(pulse.path).pid == os.getpid()
    (kept,) = clean(folder.root, wait_seconds=30).kept  # until the next beat, two seconds at most
    assert f"process {os.getpid()} on" in kept.why
    assert "live save" in kept.why
    finish(folder)
    check(folder.root, 1.0)
    with pytest.raises(FileNotFoundError):
        pulse.beat()
    assert pulse.lost
    other = folder_of(tmp_path / "other", 1.0)
    stage(other)
    other.abandon(STAGING)
    assert not pulses[-1]._thread.is_alive()
    assert list(tmp_path.iterdir()) == [folder.root]


def test_a_failure_leaves_everything_as_it_was(tmp_path: Path) -> None:
    root = tmp_path / "not/yet/there"
    folder = folder_of(root, 1.0)
    folder.prepare(STAGING)
    assert root.exists()
    folder.abandon(STAGING)
    assert list(tmp_path.iterdir()) == []
    root.mkdir(parents=True)
    folder = folder_of(root, 1.0)
    stage(folder)
    folder.abandon(STAGING)
    assert list(root.iterdir()) == []


def test_what_is_in_the_way_stays(tmp_path: Path) -> None:
    root = tmp_path / "root"
    folder = folder_of(root, 1.0)
    stage(folder)
    finish(folder)
    with pytest.raises(ShardwayError) as refused:
        folder_of(root, 2.0).prepare("again")
    assert refused.value.code is Code.DESTINATION_EXISTS
    assert "if_exists" in str(refused.value)
    with pytest.raises(ShardwayError) as older:
        folder_of(root, 2.0, iteration=2).prepare("older")
    assert older.value.code is Code.DESTINATION_EXISTS
    check(root, 1.0)
    # Something else comes to lie there between the decision and the rename.
    late = folder_of(tmp_path / "late", 1.0)
    stage(late)
    late.folder.mkdir()
    (late.folder / "notes").touch()
    with pytest.raises(ShardwayError) as taken:
        finish(late)
    assert taken.value.code is Code.DESTINATION_EXISTS
    assert (late.folder / "notes").exists()
    (late.folder / "notes").unlink()
    finish(late)
    check(late.root, 1.0)


def test_what_vanishes_is_an_error_and_not_made_anew(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "root", 1.0)
    state = folder.state
    assignment = Assignment(staging=STAGING, first_file=0, shards=state.shards, objects=(), num_bytes=24)
    folder.prepare(STAGING)
    result = folder.write(assignment, lambda _: None)
    shutil.rmtree(folder.root)
    for action in (
        lambda: folder.write(assignment, lambda _: None),
        lambda: folder.publish(STAGING, TAG, [result], lambda _: None),
        lambda: finish(folder),
    ):
        with pytest.raises(ShardwayError) as gone:
            action()
        assert gone.value.code is Code.IO_FAILED
        assert str(folder.root) in str(gone.value)
        assert not folder.root.exists()
    folder.abandon(STAGING)


def test_only_the_shards_vanish_between_looking_and_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when others, who took this coordinator for dead, rename the staging folder while it writes its metadata."""
    folder = folder_of(tmp_path / "root", 1.0)
    stage(folder)
    staging = folder.root / f".{ROOT[0]}.shardway-live-{STAGING}"
    real = assemble.assemble

    def late(results: Any, **options: Any) -> Any:
        assembly = real(results, **options)
        return type(assembly)(
            **{name: getattr(assembly, name) for name in type(assembly).__dataclass_fields__} | {"files": {}}
        )

    monkeypatch.setattr(module, "assemble", late)
    staging.rename(folder.root / "elsewhere")
    result_of_nobody: list[Any] = []
    with pytest.raises(ShardwayError) as gone:
        folder.publish(STAGING, "t9", result_of_nobody, lambda _: None)
    assert gone.value.code is Code.IO_FAILED
    assert not staging.exists()


def test_a_file_that_is_not_as_its_rank_said_is_not_published(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "root", 1.0)
    state = folder.state
    folder.prepare(STAGING)
    assignment = Assignment(staging=STAGING, first_file=0, shards=state.shards, objects=(), num_bytes=24)
    result = folder.write(assignment, lambda _: None)
    path = next(folder.root.glob(".iter*/*.distcp"))
    os.truncate(path, 10)
    with pytest.raises(ShardwayError) as short:
        folder.publish(STAGING, TAG, [result], lambda _: None)
    assert short.value.code is Code.DISTCP_TRUNCATED
    assert f"{result.num_bytes} bytes written, 10 found" in str(short.value)


def test_a_full_disk_while_the_metadata_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = folder_of(tmp_path / "root", 1.0, sync=False)
    stage(folder)
    broken = folder_of(tmp_path / "root", 1.0, sync=True)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ShardwayError) as full:
        broken.publish(STAGING, "t2", [], lambda _: None)
    assert full.value.code is Code.NO_SPACE
    assert ".metadata" in str(full.value)
    monkeypatch.undo()
    finish(folder)
    check(folder.root, 1.0)
