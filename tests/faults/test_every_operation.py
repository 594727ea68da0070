"""Each operation on a file fails in turn: success or a clear error, and nothing is lost or left behind."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from typing import TYPE_CHECKING

import pytest
from tests.faults.scenes import Scene, litter, make_scenes
from tests.faults.syscalls import Call, Ended, Fail, require_notification, run

import shardway

if TYPE_CHECKING:
    from pathlib import Path

SHORT = Fail(0)
WRITES = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINTR, errno.ESTALE, 0)
NAMES = (errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT)
KINDS: dict[str, tuple[int, ...]] = {
    "write": WRITES,
    "pwrite64": WRITES,
    "writev": (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINTR),
    "pwritev": (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINTR),
    "sendfile": (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINVAL),
    "copy_file_range": (errno.ENOSPC, errno.EIO, errno.EOPNOTSUPP),
    "ioctl": (errno.EOPNOTSUPP, errno.EXDEV, errno.EIO),
    "fsync": (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EINTR),
    "fdatasync": (errno.EIO, errno.ENOSPC),
    "sync_file_range": (errno.EIO, errno.ENOSYS),
    "ftruncate": (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR),
    "close": (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR),
    "openat": (errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.EINTR, errno.EMFILE),
    "renameat2": (*NAMES, errno.ENOSYS, errno.EINVAL),
}
"""What the kernel may answer to each call; 0 is a write that writes less than it should."""

CODES = {"io-failed", "no-space", "destination-unwritable", "file-unreadable", "save-rank-failed", "verify-failed"}
EVERY_ERRNO = bool(os.environ.get("SHARDWAY_EVERY_ERRNO"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scene]:
    require_notification()
    pytest.importorskip("torch")
    return make_scenes(tmp_path_factory.mktemp("scenes"), live=True)


@pytest.mark.timeout(900 if EVERY_ERRNO else 240)
@pytest.mark.parametrize(
    "name",
    ["import", "import, replacing", "export", "export, replacing", "live save", "live save, replacing"],
)
def test_each_operation_fails_in_turn(name: str, scenes: dict[str, Scene], stages: Path) -> None:
    """One errno for each operation, another one for the next of its kind; all with SHARDWAY_EVERY_ERRNO=1."""
    scene = scenes[name]
    turns: dict[str, int] = {}
    numbers = itertools.count()
    ends = {"well": 0, "in an error": 0}
    wrong: list[str] = []
    for place in range(10_000):
        kinds: list[int] = [-1]
        while kinds:
            kind = kinds.pop()
            stage = stages / str(next(numbers))
            failed = fail(scene, stage, place, kind, turns, wrong)
            if failed is None:
                assert not wrong, f"{len(wrong)} of {sum(ends.values())} end wrongly:\n" + "\n".join(wrong[:20])
                assert place > 60, "hardly anything was done"
                assert ends["well"] > 10
                assert ends["in an error"] > 30
                return
            call, number, error = failed
            ends["in an error" if error else "well"] += 1
            if kind < 0 and EVERY_ERRNO:
                kinds = [each for each in KINDS.get(call.name, NAMES) if each != number]


def fail(
    scene: Scene, stage: Path, place: int, kind: int, turns: dict[str, int], wrong: list[str]
) -> tuple[Call, int, BaseException | None] | None:
    """Let one operation fail and judge how that ends; None when there is no such operation any more."""
    destination = scene.begin(stage)
    failed: list[tuple[Call, int]] = []

    def decide(number: int, call: Call) -> Fail | None:
        if number != place:
            return None
        errnos = KINDS.get(call.name, NAMES)
        chosen = kind
        if chosen < 0:
            turns[call.name] = turns.get(call.name, -1) + 1
            chosen = errnos[turns[call.name] % len(errnos)]
        # Threads take turns: the call at this place need not be the one of the last run.
        if chosen not in errnos or (chosen == 0 and call.arguments[2] < 2):
            chosen = errno.EIO
        failed.append((call, chosen))
        return Fail(chosen)

    ended = run(lambda: scene.act(destination), stage, decide)
    if not failed:
        assert ended.error is None, str(ended.error)
        return None
    ((call, number),) = failed
    what = f"{scene.name}: operation {place}, {call.name} {call.path}, {errno.errorcode.get(number, 'short')}"
    try:
        judge(scene, stage, destination, ended, number)
    except AssertionError as error:
        wrong.append(f"* {what}: {error}\n{ended.error}")
    shutil.rmtree(stage)
    return call, number, ended.error


def judge(scene: Scene, stage: Path, destination: Path, ended: Ended, number: int) -> None:
    """Success or a clear error, the old checkpoint or the new one, and nothing else."""
    assert not ended.killed, "it was killed"
    found = scene.found(destination)
    if ended.error is None:
        assert found == "new", found
    else:
        assert number, "a short write is no error"
        assert isinstance(ended.error, shardway.ShardwayError), "not an error of ours"
        assert ended.error.codes <= CODES, "another code"
        assert errno.errorcode[number] in str(ended.error), "the errno is not told"
        assert str(stage) in str(ended.error), "the file is not told"
        assert found == ("old" if scene.old else "nothing"), found
    assert litter(stage) == [], f"left behind: {litter(stage)}"
