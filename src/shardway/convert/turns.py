"""Convert once: of all who ask for the same conversion, on any host, one works and the others wait."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import xxhash

from shardway import __version__
from shardway.core.errors import Code, Problem, ShardwayError
from shardway.run.finished import unfinished
from shardway.run.journal import Finished, Journal, read_journal
from shardway.run.lease import JOURNAL, Lease, look, staging_directory
from shardway.run.progress import Progress
from shardway.run.pulse import Life, Watch
from shardway.verification.staged import check_finished

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shardway.plans.model import Plan
    from shardway.run.lease import Seen
    from shardway.run.publish import Staging

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 1.0


def take_turn(
    destination: Path,
    *,
    key: str,
    doing: str,
    wait: bool,
    done: Callable[[], bool],
    progress: Callable[[Progress], None] | None,
) -> Lease | None:
    """Get the lease of a destination, or what was wanted from whoever has it.

    The lease of a process that has died is taken over, with what it had staged.

    Args:
        destination: What will be written.
        key: What tells this conversion from others to the same place: of its source, its options, its plan.
        doing: What will be done, in a word, for others to see.
        wait: Whether to wait for another process that does the same.
        done: Whether the destination is by now what was wanted; asked while another process has the lease.
        progress: Told who is waited for.

    Returns:
        The lease; None when another process has done what was wanted, even if yet another one, which may want something
        else, has the lease by now.

    Raises:
        ShardwayError: `destination-busy` when another process is at work there and it does something else, or `wait`
            is false; `destination-unwritable`, `no-space`, `io-failed`.
    """
    watch = Watch()
    began = time.monotonic()
    pause = _FIRST_PAUSE_S
    waited = False
    while True:
        seen = look(destination)
        if seen is None:
            if waited and done():
                return None
            lease = Lease.create(destination, key=key, doing=doing)
            if lease is not None:
                return lease
            continue
        life = watch.look(seen, seen.sign)
        if life is Life.DEAD:
            lease = Lease.take_over(destination, seen, key=key, doing=doing)
            if lease is not None:
                return lease
            watch = Watch()
            continue
        if seen.sign.nonce:
            if wait and done():  # whoever is at work now
                return None
            waited = seen.sign.key == key
            if life is Life.ALIVE and not (wait and waited):
                raise _busy(destination, seen, same=waited)
        if progress is not None and seen.sign.nonce:
            progress(Progress("wait", 0, 0, f"{seen.sign}, {time.monotonic() - began:.0f} s"))
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE_S)


def work_key(plan: Plan, source: str) -> str:
    """What tells a conversion from others to the same place: of its source, and of every file that it writes.

    Args:
        plan: The plan.
        source: Fingerprint of the source's files.
    """
    # Another version may have other rules for the same names and shapes.
    hasher = xxhash.xxh3_128(f"{__version__}\0{plan.direction.value}\0{source}\0{plan.shifts}\0".encode())
    for target in plan.targets:
        hasher.update(f"{target.name}\0{target.num_bytes}\0".encode())
        for offset, literal in target.literals:
            hasher.update(f"{offset}\0{len(literal)}\0".encode())
            hasher.update(literal)
    for name, contents in plan.small_files.items():
        hasher.update(f"{name}\0{len(contents)}\0".encode())
        hasher.update(contents)
    return hasher.hexdigest()


def was_published(destination: Path, key: str) -> bool:
    """Whether what is in place was put there by a run of this key that has not ended, or was killed before it could."""
    published = read_journal(staging_directory(destination) / JOURNAL, key).published
    return published is not None and published == inode(destination)


def inode(path: Path) -> int | None:
    """The inode of a directory, by which it is known when it has been renamed; None where there is none."""
    try:
        return path.stat().st_ino
    except OSError:
        return None


def resume(
    plan: Plan, lease: Lease, staging: Staging, num_workers: int, progress: Callable[[Progress], None] | None
) -> tuple[Finished, Journal]:
    """Go on from what an earlier run of the same conversion has left in the lease, as far as it holds what it should.

    What is not finished is removed, and made anew: a run that was only asleep may still be writing to it.

    Args:
        plan: What will be executed.
        lease: The lease.
        staging: Its staging directory.
        num_workers: Threads.
        progress: Called while files are read, in the phase ``"resume"``.

    Returns:
        The files that need no more work, and the journal for the others.

    Raises:
        ShardwayError: `io-failed`, `no-space`.
    """
    noted = read_journal(lease.journal, lease.key)
    if noted.files:
        noted = check_finished(plan, staging.path, noted, num_workers, progress)
    staging.keep(noted.files)
    return noted, Journal(lease.journal, lease.key, noted)


def resumed_bytes(plan: Plan, finished: Finished) -> int:
    """Bytes of tensors that need not be moved any more."""
    if not finished.files:
        return 0
    return plan.mcore.num_bytes - sum(stream.num_bytes for stream in unfinished(plan, finished.files))


def _busy(destination: Path, seen: Seen, *, same: bool) -> ShardwayError:
    return ShardwayError(
        Problem(
            code=Code.DESTINATION_BUSY,
            what=f"another process is writing {destination}: {seen.sign}",
            file=destination,
            facts=("it does the same",) if same else ("it reads another source, or was given other options",),
            cure="pass --if-exists reuse to wait for it and use what it makes"
            if same
            else "wait until it has ended, or choose another destination",
        )
    )
