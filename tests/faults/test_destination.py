"""Destinations that are taken, unwritable or full; runs that fail half-way; replacing and reusing what is there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from tests.tiny import Tiny, bits, listing, read_distcp, read_safetensors, same

import shardway
from shardway.convert import exporting, making
from shardway.plans.model import Direction
from shardway.run import places
from shardway.run.mover import Mover
from shardway.run.publish import Staging
from shardway.verification.compare import check_readable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shardway.plans.model import Plan, Stream
    from shardway.run.progress import Progress

MODEL = Tiny(layers=2)
OTHER = Tiny(layers=2, ffn=7)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return MODEL.write(tmp_path / "hf")


@pytest.fixture
def mcore(hf: Path, tmp_path: Path) -> Path:
    shardway.import_hf(hf, tmp_path / "mcore", fsync=False)
    return tmp_path / "mcore"


def refused(root: Path, code: str, convert: Callable[[], object]) -> shardway.ShardwayError:
    """Run a conversion that has to fail with one kind of problem and change nothing below `root`."""
    before = listing(root)
    with pytest.raises(shardway.ShardwayError) as caught:
        convert()
    assert caught.value.codes == {code}, str(caught.value)
    assert listing(root) == before
    return caught.value


class TestTaken:
    @pytest.mark.parametrize("direction", ["import", "export"])
    def test_a_file_is_there(self, direction: str, hf: Path, mcore: Path, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        convert = {
            "import": lambda: shardway.import_hf(hf, tmp_path / "out"),
            "export": lambda: shardway.export_hf(mcore, tmp_path / "out"),
        }
        assert "not a directory" in str(refused(tmp_path, "destination-exists", convert[direction]))

    @pytest.mark.parametrize("direction", ["import", "export"])
    @pytest.mark.parametrize("if_exists", ["error", "reuse", "replace"])
    def test_something_else_is_there(
        self, direction: str, if_exists: str, hf: Path, mcore: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.tex").write_text("mine")
        convert = {
            "import": lambda: shardway.import_hf(hf, tmp_path / "out", if_exists=if_exists),
            "export": lambda: shardway.export_hf(mcore, tmp_path / "out", if_exists=if_exists),
        }
        assert "thesis.tex" in str(refused(tmp_path, "destination-exists", convert[direction]))

    @pytest.mark.parametrize("direction", ["import", "export"])
    def test_an_empty_directory_is_there(self, direction: str, hf: Path, mcore: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        if direction == "import":
            shardway.import_hf(hf, tmp_path / "out")
            assert same(read_distcp(tmp_path / "out"), MODEL.megatron(MODEL.weights()))
        else:
            shardway.export_hf(mcore, tmp_path / "out")
            assert same(bits(read_safetensors(tmp_path / "out").items()), MODEL.weights())

    def test_a_checkpoint_is_there(self, hf: Path, mcore: Path, tmp_path: Path) -> None:
        error = refused(tmp_path, "destination-exists", lambda: shardway.import_hf(hf, mcore))
        assert "--if-exists" in str(error)
        shardway.export_hf(mcore, tmp_path / "back")
        error = refused(tmp_path, "destination-exists", lambda: shardway.export_hf(mcore, tmp_path / "back"))
        assert "--if-exists" in str(error)

    def test_inside_the_source(self, hf: Path, mcore: Path, tmp_path: Path) -> None:
        for inside in (hf / "megatron", hf, tmp_path / "link/deep/er"):
            if inside.parts[-3] == "link":
                (tmp_path / "link").symlink_to(hf)
            refused(tmp_path, "destination-inside-source", lambda to=inside: shardway.import_hf(hf, to))  # type: ignore[misc]
        for inside in (mcore / "iter_0000000/hf2", mcore / "iter_0000000"):
            refused(tmp_path, "destination-inside-source", lambda to=inside: shardway.export_hf(mcore, to))  # type: ignore[misc]

    def test_the_source_inside(self, hf: Path, tmp_path: Path) -> None:
        (tmp_path / "m/iter_0000000").mkdir(parents=True)
        inner = MODEL.write(tmp_path / "m/iter_0000000/model")
        refused(tmp_path, "destination-exists", lambda: shardway.import_hf(inner, tmp_path / "m", if_exists="replace"))
        shardway.import_hf(hf, tmp_path / "big/checkpoint")
        (tmp_path / "big/config.json").write_text("{}")
        error = refused(
            tmp_path,
            "destination-exists",
            lambda: shardway.export_hf(tmp_path / "big/checkpoint", tmp_path / "big", if_exists="replace"),
        )
        assert "source lies inside" in str(error)


class TestUnwritable:
    def test_a_file_among_the_parents(self, hf: Path, mcore: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        for convert in (
            lambda: shardway.import_hf(hf, tmp_path / "file/deep/out"),
            lambda: shardway.export_hf(mcore, tmp_path / "file/deep/out"),
        ):
            error = refused(tmp_path, "destination-unwritable", convert)
            assert "not a directory" in str(error)

    def test_a_filesystem_that_takes_nothing(self, hf: Path, tmp_path: Path) -> None:
        with pytest.raises(shardway.ShardwayError) as caught:
            shardway.import_hf(hf, "/proc/out")
        assert caught.value.code in {"no-space", "destination-unwritable"}

    def test_no_permission(self, hf: Path, mcore: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        error = refused(tmp_path, "destination-unwritable", lambda: shardway.import_hf(hf, tmp_path / "new/out"))
        assert "permission" in str(error)
        refused(tmp_path, "destination-unwritable", lambda: shardway.export_hf(mcore, tmp_path / "new/out"))

    def test_what_is_there_is_reused_where_nothing_can_be_written(
        self, hf: Path, mcore: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shardway.export_hf(mcore, tmp_path / "back", fsync=False)
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: os.terminal_size((0, 0)))
        assert shardway.import_hf(hf, mcore, if_exists="reuse").reused
        assert shardway.export_hf(mcore, tmp_path / "back", if_exists="reuse").reused

    def test_the_root_is_writable_and_its_parent_is_not(
        self, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = tmp_path / "given"
        root.mkdir()
        real = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and real(path, mode))
        shardway.import_hf(hf, root, fsync=False)
        assert same(read_distcp(root), MODEL.megatron(MODEL.weights()))

    def test_a_directory_that_can_not_be_made(self, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def mkdir(path: Path, *_: object, **__: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

        monkeypatch.setattr(Path, "mkdir", mkdir)
        error = refused(tmp_path, "destination-unwritable", lambda: shardway.import_hf(hf, tmp_path / "a/b/c"))
        assert "EROFS" in str(error)

    @pytest.mark.parametrize("short", [False, True])
    def test_too_little_space(
        self, short: bool, hf: Path, mcore: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Usage(NamedTuple):
            total: int
            used: int
            free: int

        report = shardway.plan(hf)
        free = report.disk_bytes + (-1 if short else 10_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free, 0, free))
        if not short:
            shardway.import_hf(hf, tmp_path / "out", fsync=False)
            return
        error = refused(tmp_path, "no-space", lambda: shardway.import_hf(hf, tmp_path / "out"))
        assert f"free {free:,} bytes" in str(error)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 0, 100))
        refused(tmp_path, "no-space", lambda: shardway.export_hf(mcore, tmp_path / "out"))


class TestLinksAndPaths:
    @pytest.mark.parametrize("fsync", [False, True])
    def test_relative_paths(self, fsync: bool, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        shardway.import_hf("hf", "new/m", fsync=fsync)
        shardway.export_hf("new/m", "new/back", fsync=fsync, verify=True)
        shardway.export_hf("new/m", "new/../back2", fsync=fsync)
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
        shardway.export_hf("../new/m", ".", fsync=fsync)
        for name in ("new/back", "back2", "empty"):
            assert same(bits(read_safetensors(tmp_path / name).items()), MODEL.weights())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["back2", "empty", "hf", "new"]

    def test_a_link_to_the_destination_stays_a_link(self, mcore: Path, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "out").symlink_to("real")
        shardway.export_hf(mcore, tmp_path / "out")
        shardway.export_hf(mcore, tmp_path / "out", if_exists="replace")
        assert (tmp_path / "out").is_symlink()
        assert same(bits(read_safetensors(tmp_path / "real").items()), MODEL.weights())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore", "out", "real"]

    def test_a_source_of_links_as_in_the_hub_cache(self, hf: Path, tmp_path: Path) -> None:
        cache = tmp_path / "models--some--model"
        shutil.copytree(hf, cache / "blobs")
        (cache / "snapshots/0123abc").mkdir(parents=True)
        for path in hf.iterdir():
            (cache / "snapshots/0123abc" / path.name).symlink_to(f"../../blobs/{path.name}")
        shardway.import_hf(cache / "snapshots/0123abc", tmp_path / "m", fsync=False)
        assert not any(path.is_symlink() for path in (tmp_path / "m").rglob("*"))
        assert same(read_distcp(tmp_path / "m"), MODEL.megatron(MODEL.weights()))


class TestReuseAndReplace:
    def test_import_reuses_only_what_it_would_make(self, hf: Path, mcore: Path, tmp_path: Path) -> None:
        before = listing(tmp_path)
        report = shardway.import_hf(hf, mcore, if_exists="reuse")
        assert report.reused
        assert not report.verified
        assert listing(tmp_path) == before
        for options in ({"layout": "per-layer"}, {"dtype": "fp32"}, {"max_file_size": 5000}):
            error = refused(
                tmp_path,
                "destination-exists",
                lambda chosen=options: shardway.import_hf(hf, mcore, if_exists="reuse", **chosen),  # type: ignore[misc]
            )
            assert "other options" in str(error)
        os.utime(hf / "model.safetensors", ns=(1, 1))
        error = refused(tmp_path, "destination-exists", lambda: shardway.import_hf(hf, mcore, if_exists="reuse"))
        assert "changed since" in str(error)

    @pytest.mark.parametrize("damage", ["__0_0.distcp", ".metadata", "shardway.json"])
    def test_import_reuses_nothing_that_is_damaged(self, damage: str, hf: Path, mcore: Path, tmp_path: Path) -> None:
        (mcore / "iter_0000000" / damage).unlink()
        refused(tmp_path, "destination-exists", lambda: shardway.import_hf(hf, mcore, if_exists="reuse"))
        shardway.import_hf(hf, mcore, if_exists="replace")
        assert same(read_distcp(mcore), MODEL.megatron(MODEL.weights()))

    @pytest.mark.parametrize("if_exists", ["error", "reuse", "replace"])
    def test_an_import_that_lacks_its_last_step_alone_is_finished(
        self, if_exists: str, hf: Path, mcore: Path, tmp_path: Path
    ) -> None:
        (mcore / "latest_checkpointed_iteration.txt").unlink()
        inode = (mcore / "iter_0000000").stat().st_ino
        assert shardway.import_hf(hf, mcore, if_exists=if_exists).reused
        assert (mcore / "latest_checkpointed_iteration.txt").read_text() == "0"
        assert (mcore / "iter_0000000").stat().st_ino == inode
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore"]
        # Not so if it is of another model, or has other options.
        (mcore / "latest_checkpointed_iteration.txt").unlink()
        if if_exists != "replace":
            refused(
                tmp_path,
                "destination-exists",
                lambda: shardway.import_hf(hf, mcore, if_exists=if_exists, layout="per-layer"),
            )

    def test_export_reuses_any_chunking_of_the_same_tensors(self, hf: Path, mcore: Path, tmp_path: Path) -> None:
        shardway.export_hf(mcore, tmp_path / "back", max_shard_size=300)
        before = listing(tmp_path)
        assert shardway.export_hf(mcore, tmp_path / "back", if_exists="reuse").reused
        assert shardway.export_hf(mcore, hf, if_exists="reuse").reused
        assert listing(tmp_path) == before
        file = min((tmp_path / "back").glob("*.safetensors"))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        error = refused(
            tmp_path, "destination-exists", lambda: shardway.export_hf(mcore, tmp_path / "back", if_exists="reuse")
        )
        assert "1 of its tensors hold other values" in str(error)

    def test_replace_leaves_nothing_of_the_old_one(self, hf: Path, mcore: Path, tmp_path: Path) -> None:
        OTHER.write(tmp_path / "other", num_files=2)
        shardway.import_hf(tmp_path / "other", mcore, if_exists="replace", max_file_size=5000)
        assert same(read_distcp(mcore), OTHER.megatron(OTHER.weights()))
        shardway.import_hf(hf, mcore, if_exists="replace")
        assert same(read_distcp(mcore), MODEL.megatron(MODEL.weights()))
        shardway.export_hf(mcore, tmp_path / "other", if_exists="replace")
        assert same(bits(read_safetensors(tmp_path / "other").items()), MODEL.weights())
        assert sorted(path.name for path in (tmp_path / "other").iterdir()) == [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
        ]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore", "other"]

    @pytest.mark.parametrize("exchange", ["kernel", "two renames"])
    def test_replace_without_an_exchange(
        self, exchange: str, hf: Path, mcore: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if exchange != "kernel":

            class Library:
                def __init__(self, *_: object, **__: object) -> None:
                    pass

            monkeypatch.setattr(ctypes, "CDLL", Library)
        marker = mcore / "iter_0000000/marker"
        marker.touch()
        shardway.import_hf(hf, mcore, if_exists="replace")
        assert not marker.exists()
        assert sorted(path.name for path in mcore.iterdir()) == [
            "iter_0000000",
            "latest_checkpointed_iteration.txt",
            "latest_train_state.pt",
        ]

    @pytest.mark.parametrize("direction", ["import", "export"])
    def test_the_old_one_survives_a_failed_replacement(
        self, direction: str, hf: Path, mcore: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shardway.export_hf(mcore, tmp_path / "back")
        calls = iter(range(10**6))
        real = os.pwrite

        def pwrite(descriptor: int, data: Any, offset: int) -> int:
            if next(calls) == 5:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)
        convert = {
            "import": lambda: shardway.import_hf(hf, mcore, if_exists="replace", max_file_size=4000),
            "export": lambda: shardway.export_hf(mcore, tmp_path / "back", if_exists="replace", max_shard_size=100),
        }
        error = refused(tmp_path, "io-failed", convert[direction])
        assert "EIO" in str(error)

    def test_the_old_one_survives_a_failed_publication(
        self, hf: Path, mcore: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def exchange(*_: object) -> None:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

        monkeypatch.setattr(places, "exchange", exchange)
        refused(tmp_path, "io-failed", lambda: shardway.import_hf(hf, mcore, if_exists="replace"))


class TestIterations:
    def tracker(self, root: Path) -> str:
        return (root / "latest_checkpointed_iteration.txt").read_text()

    def test_a_later_iteration_moves_the_tracker(self, hf: Path, mcore: Path) -> None:
        report = shardway.import_hf(hf, mcore, iteration=7, fsync=False)
        assert report.iteration == "iter_0000007"
        assert self.tracker(mcore) == "7"
        for path in (mcore / "latest_train_state.pt", mcore / "iter_0000007/train_state.pt"):
            assert path.read_bytes() == (mcore / "iter_0000007/train_state.pt").read_bytes()
        assert (mcore / "iter_0000000/.metadata").exists()
        assert shardway.inspect(mcore).iteration == 7

    def test_an_earlier_iteration_is_refused(self, hf: Path, mcore: Path, tmp_path: Path) -> None:
        shardway.import_hf(hf, mcore, iteration=500, fsync=False)
        for options in ({"iteration": 3}, {"release": True}):
            error = refused(
                tmp_path,
                "destination-exists",
                lambda chosen=options: shardway.import_hf(hf, mcore, **chosen),  # type: ignore[misc]
            )
            assert "at iteration 500" in str(error)

    def test_an_earlier_iteration_that_is_there_is_replaced_and_the_tracker_stays(self, hf: Path, mcore: Path) -> None:
        shardway.import_hf(hf, mcore, iteration=500, fsync=False)
        before = (mcore / "latest_train_state.pt").read_bytes()
        report = shardway.import_hf(hf, mcore, iteration=0, if_exists="replace", fsync=False)
        assert self.tracker(mcore) == "500"
        assert any("still names iteration 500" in note for note in report.notes)
        assert (mcore / "latest_train_state.pt").read_bytes() == before

    def test_a_release(self, hf: Path, tmp_path: Path) -> None:
        report = shardway.import_hf(hf, tmp_path / "m", release=True)
        assert report.iteration == "release"
        assert self.tracker(tmp_path / "m") == "release"
        assert "release" in [path.name for path in (tmp_path / "m").iterdir()]
        assert shardway.export_hf(tmp_path / "m", tmp_path / "back").iteration == "release"
        assert shardway.import_hf(hf, tmp_path / "m", release=True, if_exists="reuse").reused

    @pytest.mark.parametrize("iteration", [-1, 10**7])
    def test_numbers_that_are_no_iteration(self, iteration: int, hf: Path, tmp_path: Path) -> None:
        refused(tmp_path, "option-invalid", lambda: shardway.import_hf(hf, tmp_path / "m", iteration=iteration))

    def test_leftovers_of_a_killed_run_are_in_nobodys_way(self, hf: Path, tmp_path: Path) -> None:
        left = tmp_path / "m/.iter_0000007.shardway-staging/files-0123456789abcdef"
        left.mkdir(parents=True)
        shardway.import_hf(hf, tmp_path / "m", fsync=False)
        assert left.exists()
        assert shardway.export_hf(tmp_path / "m", tmp_path / "back").iteration == "iter_0000000"


class TestFailuresWhileRunning:
    @pytest.fixture(params=["import", "export"])
    def convert(self, request: pytest.FixtureRequest, hf: Path, mcore: Path, tmp_path: Path) -> Callable[..., object]:
        if request.param == "import":
            return lambda **options: shardway.import_hf(
                hf, tmp_path / "new/er/out", workers=3, max_file_size=4000, **options
            )
        return lambda **options: shardway.export_hf(
            mcore, tmp_path / "new/er/out", workers=3, max_shard_size=100, **options
        )

    @pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
    @pytest.mark.parametrize("call", [0, 3, 12])
    def test_a_write_fails(
        self, kind: int, call: int, convert: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failing(monkeypatch, "pwrite", call, kind)
        error = refused(tmp_path, "io-failed" if kind == errno.EIO else "no-space", convert)
        assert errno.errorcode[kind] in str(error)
        assert "out/" in str(error) or ".out.shardway-" in str(error) or "iter_0000000" in str(error)

    @pytest.mark.parametrize("call", [0, 10])
    def test_a_read_fails(
        self, call: int, convert: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failing(monkeypatch, "preadv", call, errno.EIO)
        assert "read" in str(refused(tmp_path, "io-failed", convert))

    @pytest.mark.parametrize("call", [0, 2, 6])
    def test_an_fsync_fails(
        self, call: int, convert: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failing(monkeypatch, "fsync", call, errno.EIO)
        refused(tmp_path, "io-failed", convert)

    def test_without_fsync_nothing_is_synced(
        self, convert: Callable[..., object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failing(monkeypatch, "fsync", 0, errno.EIO)
        convert(fsync=False)

    def test_with_fsync_every_file_is_synced(
        self, convert: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: set[int] = set()
        real = os.fsync

        def fsync(descriptor: int) -> None:
            synced.add(os.fstat(descriptor).st_ino)
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        convert()
        published = list((tmp_path / "new").rglob("*"))
        assert published
        assert [path for path in published if path.stat().st_ino not in synced] == []
        assert tmp_path.stat().st_ino in synced

    def test_the_files_are_synced_before_they_are_published(
        self, convert: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        events: list[str] = []
        real_fsync, real_rename, real_replace = os.fsync, Path.rename, Path.replace

        def fsync(descriptor: int) -> None:
            events.append(f"fsync {os.readlink(f'/proc/self/fd/{descriptor}')}")
            real_fsync(descriptor)

        def rename(path: Path, target: Path) -> Path:
            events.append(f"rename {target}")
            return real_rename(path, target)

        def replace(path: Path, target: Path) -> Path:
            events.append(f"replace {target}")
            return real_replace(path, target)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "rename", rename)
        monkeypatch.setattr(Path, "replace", replace)
        convert()
        (published,) = [k for k, event in enumerate(events) if event.startswith("rename ") and "shardway" not in event]
        data = [k for k, event in enumerate(events) if event.endswith((".distcp", ".safetensors", "config.json"))]
        assert data
        assert max(data) < published
        trackers = [k for k, event in enumerate(events) if event.endswith("latest_checkpointed_iteration.txt")]
        assert len(trackers) == ("iter_" in events[published])
        assert all(published < k == max(j for j, e in enumerate(events) if not e.startswith("fsync")) for k in trackers)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ZeroDivisionError])
    def test_a_worker_is_interrupted(
        self,
        error: type[BaseException],
        convert: Callable[..., object],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        real = Mover.move
        calls = iter(range(10**6))

        def move(self: Mover, stream: Stream) -> None:
            if next(calls) == 4:
                raise error
            real(self, stream)

        monkeypatch.setattr(Mover, "move", move)
        before = listing(tmp_path)
        with pytest.raises(error):
            convert()
        assert listing(tmp_path) == before

    def test_the_progress_callback_raises(self, convert: Callable[..., object], tmp_path: Path) -> None:
        class StoppedError(Exception):
            pass

        def progress(at: Progress) -> None:
            if at.done_bytes:
                raise StoppedError

        before = listing(tmp_path)
        with pytest.raises(StoppedError):
            convert(progress=progress)
        assert listing(tmp_path) == before

    def test_progress_ends_at_the_total(self, convert: Callable[..., object]) -> None:
        seen: list[Progress] = []
        convert(progress=seen.append, verify=True)
        for phase in ("copy", "verify"):
            mine = [at for at in seen if at.phase == phase]
            assert mine[0].done_bytes == 0
            assert mine[-1].done_bytes == mine[-1].total_bytes > 0
            assert [at.done_bytes for at in mine] == sorted(at.done_bytes for at in mine)

    def test_several_workers_fail_and_all_is_told(
        self, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        barrier = threading.Barrier(2, timeout=30)

        def move(self: Mover, stream: Stream) -> None:
            barrier.wait()
            raise shardway.ShardwayError(
                shardway.Problem(code=shardway.Code.IO_FAILED, what=f"could not move {stream.tensor}")
            )

        monkeypatch.setattr(Mover, "move", move)
        before = listing(tmp_path)
        with pytest.raises(shardway.ShardwayError) as caught:
            shardway.import_hf(hf, tmp_path / "out", workers=2, max_file_size=4000)
        assert len(caught.value.problems) == 2
        assert listing(tmp_path) == before

    @pytest.mark.parametrize("place", ["data", "frame"])
    def test_verify_finds_what_a_disk_got_wrong(
        self, place: str, convert: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = check_readable

        def damaged(plan: Plan, written: Path) -> None:
            catalog = plan.mcore if plan.direction is Direction.IMPORT else plan.hf
            tensor = catalog.tensors[max(catalog.tensors)]
            file = written / tensor.chunks[0].file
            data = bytearray(file.read_bytes())
            name = tensor.name.encode() if plan.direction is Direction.EXPORT else b"byteorder"
            data[tensor.chunks[0].offset + 3 if place == "data" else data.index(name)] ^= 1
            file.write_bytes(data)
            real(plan, written)

        for module in (making, exporting):
            monkeypatch.setattr(module, "check_readable", damaged)
        before = listing(tmp_path)
        with pytest.raises(shardway.ShardwayError) as caught:
            convert(verify=True)
        if place == "data":
            assert caught.value.codes <= {"verify-failed", "digest-mismatch"}
        assert listing(tmp_path) == before

    def test_the_source_changes_while_it_is_read(
        self, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = {path.name for path in tmp_path.iterdir()}
        real = Mover.move

        def move(self: Mover, stream: Stream) -> None:
            real(self, stream)
            with (hf / "model.safetensors").open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"x")

        monkeypatch.setattr(Mover, "move", move)
        with pytest.raises(shardway.ShardwayError) as caught:
            shardway.import_hf(hf, tmp_path / "out")
        assert caught.value.codes == {"source-changed"}
        assert {path.name for path in tmp_path.iterdir()} == before

    def test_the_source_becomes_shorter_while_it_is_read(
        self, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = Staging.create

        def create(self: Staging, name: str, num_bytes: int) -> None:
            real(self, name, num_bytes)
            os.truncate(hf / "model.safetensors", 3000)

        monkeypatch.setattr(Staging, "create", create)
        with pytest.raises(shardway.ShardwayError) as caught:
            shardway.import_hf(hf, tmp_path / "out", workers=1)
        assert caught.value.codes == {"source-changed"}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def failing(monkeypatch: pytest.MonkeyPatch, function: str, call: int, kind: int) -> None:
    """Let one call of a function of `os` fail, and all that come after it."""
    real = getattr(os, function)
    calls = iter(range(10**6))

    def replacement(*arguments: Any) -> Any:
        if next(calls) >= call:
            raise OSError(kind, os.strerror(kind))
        return real(*arguments)

    monkeypatch.setattr(os, function, replacement)


INTERRUPTED = """
import os, signal, sys, threading
import shardway
from shardway.run.mover import Mover
real = Mover.move
began = threading.Event()
def move(self, stream):
    began.set()
    threading.Event().wait(0.02)
    real(self, stream)
Mover.move = move
def kill():
    began.wait(60)
    os.kill(os.getpid(), int(sys.argv[3]))
threading.Thread(target=kill, daemon=True).start()
shardway.import_hf(sys.argv[1], sys.argv[2], workers=2, max_file_size=1)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped(number: int, tmp_path: Path) -> None:
    """An interrupted run leaves nothing; a killed one leaves nothing that a reader would take for a checkpoint."""
    hf = Tiny(layers=30).write(tmp_path / "hf")
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, hf, tmp_path / "m", str(int(number))],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(Path(shardway.__file__).parents[1])},
    )
    assert ended.returncode != 0
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in ended.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
        return
    (left,) = (tmp_path / "m").iterdir()
    assert left.name == ".iter_0000000.shardway-staging"
    with pytest.raises(shardway.ShardwayError) as caught:
        shardway.export_hf(tmp_path / "m", tmp_path / "out", hf=hf)
    assert caught.value.codes == {"not-a-checkpoint"}
    shardway.import_hf(hf, tmp_path / "m", fsync=False, verify=True)
    assert shardway.inspect(tmp_path / "m").iteration == 0


@pytest.mark.parametrize("name", ["latest_train_state.pt", "latest_checkpointed_iteration.txt"])
def test_a_tracker_that_can_not_be_written_publishes_nothing(
    name: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_bytes

    def write_bytes(path: Path, contents: bytes) -> int:
        if name in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, contents)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    refused(tmp_path, "no-space", lambda: shardway.import_hf(hf, tmp_path / "new"))


def test_the_record_names_what_was_done(mcore: Path, hf: Path) -> None:
    record = json.loads((mcore / "iter_0000000/shardway.json").read_text())
    assert record["architecture"] == "LlamaForCausalLM"
    assert record["options"]["dtype"] == "auto"
    assert record["copies"] == {}
    assert len(record["digests"]["chunks"]) == len(read_distcp(mcore))
    with contextlib.suppress(OSError):
        assert str(hf) not in json.dumps(record)


@pytest.fixture(autouse=True)
def _no_thread_outlives_a_test() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("shardway-") and thread not in before
    ]
