"""Removing what runs that were killed have left, and nothing that a living one may still need."""

from __future__ import annotations

import contextlib
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, Problems, ShardwayError
from shardway.run.destination import publish_tracker, tracked_iteration
from shardway.run.files import failing
from shardway.run.lease import Lease, disk_bytes, look, remove_tree, staging_directory
from shardway.run.processes import is_dead
from shardway.run.progress import Progress
from shardway.run.publish import ALIVE, MARK, is_leftover
from shardway.run.pulse import Life, Sign, Watch, read_sign

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PAUSE_S = 0.25
_LEASE = re.compile(r"\.(.+)\.shardway-staging", re.DOTALL)
_LIVE = re.compile(r"\.(.+)\.shardway-live-[^-]+(-[0-9a-f]+)?(-old)?", re.DOTALL)
_STORE = "shardway-live-store"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """Something that a run has left, or is at work in.

    Attributes:
        path: Where it is, or was.
        num_bytes: Disk that it takes, or took.
        why: Why it was removed, or was not.
    """

    path: str
    num_bytes: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanReport:
    """What `clean` did.

    Attributes:
        path: What it was asked to clean.
        removed: What it removed.
        kept: What it left alone, because a run is alive there.
        restored: Checkpoints that a killed run had put aside, and that are in their place again.
    """

    path: str
    removed: tuple[Leftover, ...]
    kept: tuple[Leftover, ...]
    restored: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """The report as JSON-ready data."""
        return asdict(self)


def clean(
    path: str | Path, *, wait_seconds: float | None = None, progress: Callable[[Progress], None] | None = None
) -> CleanReport:
    """Remove what killed imports, exports and live saves have left of a destination; a checkpoint is never touched.

    Only what is abandoned goes: its process is known to have ended, on this machine, or has shown no sign of life for
    as long as it was watched. A checkpoint that was being replaced and had been put aside is put back first.

    Args:
        path: A destination: the root of a Megatron checkpoint, one of its iteration folders, or a Hugging Face
            directory, there or not.
        wait_seconds: How long to watch what may belong to a process of another machine; by default a minute.
        progress: Called while something is watched, in the phase ``"wait"``.

    Returns:
        What was removed, kept and restored.

    Raises:
        ShardwayError: `file-missing` when neither the path nor its parent is there; `io-failed` for everything that
            could not be removed.
    """
    place = Path(path).absolute()
    if not place.exists() and not place.parent.is_dir():
        what = f"{path} does not exist"
        raise ShardwayError(Problem(code=Code.FILE_MISSING, what=what, file=place, cure="check the path"))
    with failing("look for what was left", place):
        found = {each: Watch(wait_seconds) for each in _find(place)}
    removed: list[Leftover] = []
    kept: list[Leftover] = []
    restored: list[str] = []
    problems = Problems()
    began = time.monotonic()
    while found:
        for each in list(found):
            life, sign = _look(each, found[each])
            if life is Life.UNSURE:
                if progress is not None:
                    progress(Progress("wait", 0, 0, f"a sign of life in {each.name}, {time.monotonic() - began:.0f} s"))
                continue
            del found[each]
            if not os.path.lexists(each):
                continue
            size = disk_bytes(each) if each.is_dir() else each.lstat().st_blocks * 512
            if life is Life.ALIVE:
                kept.append(Leftover(path=str(each), num_bytes=size, why=f"in use: {sign or 'it changes'}"))
                continue
            back = _remove(each)
            if back is not None:
                restored.append(str(back))
            if os.path.lexists(each):
                problems.add(Code.IO_FAILED, f"could not remove {each}", file=each, cure="remove it by hand")
                continue
            why = f"{sign} has ended" if sign is not None and sign.nonce else "nothing has changed in it"
            removed.append(Leftover(path=str(each), num_bytes=size, why=why))
        if found:
            time.sleep(_PAUSE_S)
    problems.raise_if_any()
    return CleanReport(path=str(path), removed=tuple(removed), kept=tuple(kept), restored=tuple(restored))


def _find(place: Path) -> list[Path]:
    """Everything that runs may have left of a destination: beside it, in it, and in its iteration folders."""
    resolved = place.resolve()
    found = []
    if resolved.parent.is_dir():
        found += [each for each in resolved.parent.iterdir() if _is_of(each.name, resolved.name)]
    if resolved.is_dir():
        found += [each for each in resolved.iterdir() if is_leftover(each.name) or each.name.startswith(MARK)]
        for folder in resolved.glob("iter_*"):
            found += folder.glob(f"{MARK}*")
    return sorted(each for each in found if not each.name.endswith(_STORE))


def _is_of(name: str, destination: str) -> bool:
    return is_leftover(name) and name.startswith(f".{destination}.shardway-")


def _look(path: Path, watch: Watch) -> tuple[Life, Sign | None]:
    """Whether something is in use, and by whom."""
    lease = _LEASE.fullmatch(path.name)
    if lease is not None:
        seen = look(path.with_name(lease[1]))
        return (Life.DEAD, None) if seen is None else (watch.look(seen, seen.sign), seen.sign)
    signs = []
    if path.is_dir():
        for each in (*path.glob(f"{ALIVE}*"), *path.glob("lease-*")):
            with contextlib.suppress(OSError):
                signs.append(read_sign(each))
    if signs and all(sign.beat < 0 or is_dead(sign.process) for sign in signs):
        return Life.DEAD, signs[0]
    # Watched as one: what any of its processes does is a change. That one exists is not enough: a job goes on for
    # weeks after a save of which it could not remove what was left.
    return watch.look((*signs, *_shape(path))), signs[0] if signs else None


def _shape(path: Path) -> Iterator[tuple[str, int, int]]:
    """Names, sizes and times of everything below a path."""
    with contextlib.suppress(OSError):
        yield "", path.lstat().st_size, path.lstat().st_mtime_ns
    for folder, _, names in os.walk(path):
        for name in sorted(names):
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(folder, name))
                yield os.path.join(folder, name), status.st_size, status.st_mtime_ns


def _name_iteration(folder: Path) -> None:
    """Do what a live save still had to do when it was killed after its last rename: let the tracker name it."""
    latest = tracked_iteration(folder.parent)
    if folder.name.startswith("iter_") and (latest is None or latest < int(folder.name.removeprefix("iter_"))):
        publish_tracker(folder.parent, folder, int(folder.name.removeprefix("iter_")), sync=True)


def _remove(path: Path) -> Path | None:
    """Remove something that is abandoned; return what was put back in its place, if anything was."""
    lease = _LEASE.fullmatch(path.name)
    if lease is not None:
        destination = path.with_name(lease[1])
        seen = look(destination)
        if seen is not None:
            taken = Lease.take_over(destination, seen, key="", doing="clean")
            if taken is not None:
                taken.release()
                return destination if taken.restored else None
        elif path == staging_directory(destination):
            with contextlib.suppress(OSError):
                path.rmdir()
        return None
    if path.name.startswith(MARK):
        _name_iteration(path.parent)
    live = _LIVE.fullmatch(path.name)
    if live is not None and live[3] and path.is_dir():
        destination = path.with_name(live[1])
        if not destination.exists():
            with failing("put back", destination):
                path.rename(destination)
            return destination
    if path.is_dir() and not path.is_symlink():
        # Renamed first: a process that is only asleep finds nothing under the name that it uses.
        aside = path.with_name(f".{path.name.strip('.')}.shardway-{os.urandom(8).hex()}")
        with contextlib.suppress(OSError):
            path.rename(aside)
            path = aside
        remove_tree(path)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return None
