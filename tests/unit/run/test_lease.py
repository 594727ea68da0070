"""Leases: one holder, taken over from the dead, fenced off from the sleeping."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from shardway.core.errors import ShardwayError
from shardway.run import pulse
from shardway.run.lease import Lease, look, staging_directory
from shardway.run.pulse import Life, Pulse, Sign, Watch, read_sign


def create(destination: Path, key: str = "key") -> Lease:
    lease = Lease.create(destination, key=key, doing="test")
    assert lease is not None
    return lease


def take_over(destination: Path) -> Lease | None:
    seen = look(destination)
    assert seen is not None
    return Lease.take_over(destination, seen, key="key", doing="test")


class TestWatch:
    """With a clock of its own: nothing here waits."""

    def test_what_changes_is_alive_and_what_does_not_is_dead_after_a_while(self) -> None:
        now = 0.0
        watch = Watch(10.0, lambda: now)
        assert watch.look("a") is Life.UNSURE
        now = 1.5
        assert watch.look("b") is Life.ALIVE
        while now < 10.5:
            now += 1.5
            assert watch.look("b") is Life.ALIVE
        now = 12.0
        assert watch.look("b") is Life.DEAD

    def test_a_watcher_that_stood_still_itself_does_not_count_that(self) -> None:
        now = 0.0
        watch = Watch(10.0, lambda: now)
        watch.look("a")
        now = 10_000.0
        assert watch.look("a") is Life.UNSURE

    def test_a_process_of_this_machine_is_known(self) -> None:
        mine = Sign.of_this_process("test")
        assert Watch(10.0).look(mine, mine) is Life.ALIVE
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)
        gone = Sign(process=mine.process.replace(f":{os.getpid()}:", f":{pid}:"))
        assert gone.process != mine.process
        assert Watch(10.0).look(gone, gone) is Life.DEAD
        elsewhere = Sign(process="another-boot:pid:[1]:1:1")
        assert Watch(10.0).look(elsewhere, elsewhere) is Life.UNSURE

    def test_what_has_ended_says_so(self) -> None:
        ended = Sign(process="another-boot:pid:[1]:1:1", beat=-1)
        assert Watch(10.0).look(ended, ended) is Life.DEAD


def test_a_pulse_changes_its_file_until_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "BEAT_S", 0.001)
    sign = Sign.of_this_process("test", "key", "nonce")
    beating = Pulse(tmp_path / "sign", sign)
    beating.path.write_bytes(sign.to_bytes())
    beating.start()
    while read_sign(beating.path).beat < 3:
        pass
    assert read_sign(beating.path).nonce == "nonce"
    beating.path.rename(tmp_path / "elsewhere")
    while not beating.lost:
        pass
    assert not beating.path.exists()
    beating.stop()


@pytest.mark.parametrize("contents", [b"", b"{", b"[]", b'{"beat": "x"}', b"\xff" * 2000, b"null"])
def test_a_sign_that_can_not_be_understood_says_nothing(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / "sign").write_bytes(contents)
    assert read_sign(tmp_path / "sign") == Sign()


def test_one_of_many_gets_it(tmp_path: Path) -> None:
    for turn in range(10):
        destination = tmp_path / f"{turn}/a/out"
        start = threading.Barrier(8)
        got: list[Lease | None] = []

        def run(
            destination: Path = destination, start: threading.Barrier = start, got: list[Lease | None] = got
        ) -> None:
            start.wait()
            got.append(Lease.create(destination, key="key", doing="test"))

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (lease,) = [each for each in got if each is not None]
        seen = look(destination)
        assert seen is not None
        assert seen.sign.pid == os.getpid()
        assert [path.name for path in destination.parent.iterdir()] == [".out.shardway-staging"]
        lease.release()
        assert look(destination) is None


def test_one_of_many_takes_it_over(tmp_path: Path) -> None:
    dead = create(tmp_path / "out")
    (dead.files / "x").write_bytes(b"staged")
    seen = look(tmp_path / "out")
    assert seen is not None
    start = threading.Barrier(8)
    got: list[Lease | None] = []

    def run() -> None:
        start.wait()
        got.append(Lease.take_over(tmp_path / "out", seen, key="key", doing="test"))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (lease,) = [each for each in got if each is not None]
    assert (lease.files / "x").read_bytes() == b"staged"
    # The one that was taken for dead finds nothing under its names, and does no harm.
    assert not dead.files.exists()
    with pytest.raises(ShardwayError) as lost:
        dead.check()
    assert lost.value.codes == {"lease-lost"}
    dead.release()
    lease.check()
    assert (lease.files / "x").exists()
    lease.release()
    assert list(tmp_path.iterdir()) == []


def test_nobody_takes_over_while_it_is_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing files may take its time; until the lease is gone its holder counts as alive."""
    lease = create(tmp_path / "out")
    lease.journal.touch()
    real, seen = Path.unlink, []

    def unlink(self: Path, missing_ok: bool = False) -> None:
        seen.append(look(tmp_path / "out"))
        real(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    lease.release()
    assert [found is not None and found.sign.pid == os.getpid() and found.sign.beat >= 0 for found in seen] == [
        True
    ] * 2
    assert list(tmp_path.iterdir()) == []


def test_a_lease_that_is_made_while_another_one_is_released_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = create(tmp_path / "out")
    real = Path.rmdir
    made: list[Lease] = []

    def rmdir(self: Path) -> None:
        if self == lease.directory and not made:
            made.append(create(tmp_path / "out"))
        real(self)

    monkeypatch.setattr(Path, "rmdir", rmdir)
    lease.release()
    (other,) = made
    other.check()
    assert other.files.is_dir()
    other.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", [True, False])
def test_what_a_dead_one_had_put_aside_is_put_back(there: bool, tmp_path: Path) -> None:
    dead = create(tmp_path / "out")
    aside = dead.files.with_name(f"{dead.files.name}-old")
    aside.mkdir()
    (aside / "old").touch()
    if there:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/new").touch()
    lease = take_over(tmp_path / "out")
    assert lease is not None
    assert lease.restored is not there
    lease.release()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new" if there else "old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    dead.release()


def test_a_takeover_that_is_not_finished_is_nobody_s_and_does_not_count_as_dead(tmp_path: Path) -> None:
    """Between the rename and the new sign, the file says what the dead one said."""
    dead = create(tmp_path / "out")
    directory = staging_directory(tmp_path / "out")
    (name,) = [path.name for path in directory.iterdir() if path.name.startswith("lease-")]
    (directory / name).rename(directory / "lease-0123456789abcdef")
    seen = look(tmp_path / "out")
    assert seen is not None
    assert seen.sign == Sign()
    dead.release()


def test_a_directory_that_nobody_holds_is_swept(tmp_path: Path) -> None:
    directory = staging_directory(tmp_path / "out")
    directory.mkdir()
    assert look(tmp_path / "out") is None, "an empty one is free"
    (directory / "what").touch()
    assert take_over(tmp_path / "out") is None
    assert list(tmp_path.iterdir()) == []


def test_a_link_counts_as_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with create(tmp_path / "link"):
        assert look(tmp_path / "real") is not None
        assert Lease.create(tmp_path / "real", key="key", doing="test") is None
    assert look(tmp_path / "real") is None
