"""Signs of life: a file whose contents change as long as the process that writes it is alive.

Whether it has changed is judged by whoever watches, with its own monotonic clock: the clocks of hosts are never
compared, nor are the times that a filesystem gives to files.
"""

from __future__ import annotations

import enum
import json
import os
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from shardway.run.processes import is_dead, is_here, this_process

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BEAT_S = 2.0
EXPIRY_S = 60.0
_LONGEST_BEAT_S = 10.0  # on a filesystem that stands still; the thread is left alone then
_MOST_PER_LOOK_S = 2.0
_SIGN_BYTES = 1024


class Sign(NamedTuple):
    """What a process says of itself.

    Attributes:
        doing: What it does, such as ``"import"``.
        key: What tells its work from other work on the same destination.
        host: Name of its host.
        pid: Its number there.
        process: What tells it from all other processes (`processes.this_process`).
        nonce: What tells this file from others that it may have written.
        beat: Goes up as long as it is alive; below 0 when it has ended.
    """

    doing: str = ""
    key: str = ""
    host: str = ""
    pid: int = 0
    process: str = ""
    nonce: str = ""
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host or 'an unknown host'}" + f" ({self.doing})" * bool(self.doing)

    @classmethod
    def of_this_process(cls, doing: str, key: str = "", nonce: str = "") -> Sign:
        """The sign of this process."""
        return cls(doing=doing, key=key, host=os.uname().nodename, pid=os.getpid(), process=this_process(), nonce=nonce)

    def to_bytes(self) -> bytes:
        """The contents of the file: always as long, so that it is overwritten in place and never seen empty."""
        return json.dumps(self._asdict()).encode().ljust(_SIGN_BYTES)


def read_sign(path: Path) -> Sign:
    """What a file says; an empty sign where it can't be understood.

    Raises:
        FileNotFoundError: It is not there.
        OSError: It can't be read.
    """
    with path.open("rb") as file:
        data = file.read(_SIGN_BYTES)
    try:
        fields = json.loads(data)
        kinds = {"doing": str, "key": str, "host": str, "pid": int, "process": str, "nonce": str, "beat": int}
        return Sign(**{name: kind(fields[name]) for name, kind in kinds.items()})
    except (ValueError, KeyError, TypeError):
        return Sign()


class Pulse:
    """Keeps the sign of this process beating, in a thread, from `start` to `stop`.

    The file is written in place through its path, never created anew: once it has been renamed or removed by others,
    the pulse ends and `lost` is true.

    Args:
        path: The file.
        sign: What it says.
    """

    def __init__(self, path: Path, sign: Sign) -> None:
        self.path = path
        self.lost = False
        self._sign = sign
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shardway-pulse", daemon=True)

    def start(self) -> None:
        """Begin to beat; the file exists."""
        self._thread.start()

    def stop(self) -> None:
        """Stop beating; the file stays."""
        self._ended.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_LONGEST_BEAT_S)

    def beat(self) -> None:
        """Change the file once.

        Raises:
            OSError: It could not be written; `lost` is set if it is not there.
        """
        self._write(self._sign._replace(beat=self._sign.beat + 1))

    def end(self) -> None:
        """Stop beating, and say so in the file: nobody has to watch it to know.

        Raises:
            OSError: It could not be written.
        """
        self.stop()
        self._write(self._sign._replace(beat=-1))

    def _write(self, sign: Sign) -> None:
        self._sign = sign
        try:
            with self.path.open("r+b", buffering=0) as file:
                file.write(sign.to_bytes())
        except FileNotFoundError:
            self.lost = True
            raise

    def _run(self) -> None:
        while not self.lost and not self._ended.wait(BEAT_S):
            try:
                self.beat()
            except OSError:
                continue  # a filesystem that fails now may work for the next beat


class Life(enum.Enum):
    """What is known of a process by its sign."""

    ALIVE = "alive"
    UNSURE = "unsure"
    DEAD = "dead"


class Watch:
    """Judges whether what it is shown again and again is still alive.

    Dead is a process that is known to have ended, on this machine, and what has not changed for `expiry_s` of looking.
    Time in which nobody looked, because this process stood still itself, does not count.

    Args:
        expiry_s: Seconds without a change after which something counts as dead.
        clock: Seconds of a monotonic clock.
    """

    def __init__(self, expiry_s: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._expiry_s = EXPIRY_S if expiry_s is None else expiry_s
        self._clock = clock
        self._seen: object = None
        self._at: float | None = None
        self._quiet_s = 0.0
        self._changed = False

    def look(self, seen: object, sign: Sign | None = None) -> Life:
        """Judge by what is seen now.

        Args:
            seen: Anything that changes while it is alive.
            sign: What it says of itself, if that is known.
        """
        now = self._clock()
        if self._at is None:
            self._seen = seen
        elif seen != self._seen:
            self._seen, self._quiet_s, self._changed = seen, 0.0, True
        else:
            self._quiet_s += min(now - self._at, _MOST_PER_LOOK_S)
        self._at = now
        process = "" if sign is None else sign.process
        ended = sign is not None and sign.beat < 0
        if ended or (process and is_dead(process)) or self._quiet_s >= self._expiry_s:
            return Life.DEAD
        return Life.ALIVE if self._changed or is_here(process) else Life.UNSURE
