"""How far a run has come."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable


class Progress(NamedTuple):
    """How far a run has come.

    Attributes:
        phase: ``"copy"``, ``"verify"``, ``"resume"`` while files that an earlier run has left are checked, or
            ``"wait"`` while another process makes what was asked for.
        done_bytes: Bytes of tensors that have passed in this phase; 0 while waiting.
        total_bytes: Bytes of tensors that will pass in it; 0 while waiting.
        waiting_for: Who is waited for, and since when, in a few words; empty in other phases.
    """

    phase: str
    done_bytes: int
    total_bytes: int
    waiting_for: str = ""


class Meter:
    """Adds up what the threads report and passes it on, one call at a time."""

    def __init__(self, phase: str, total_bytes: int, callback: Callable[[Progress], None] | None) -> None:
        self._phase = phase
        self._total = total_bytes
        self._done = 0
        self._callback = callback
        self._lock = threading.Lock()
        self.advance(0)

    def advance(self, num_bytes: int) -> None:
        """Count bytes that have passed."""
        if self._callback is None:
            return
        with self._lock:
            self._done += num_bytes
            self._callback(Progress(self._phase, self._done, self._total))
