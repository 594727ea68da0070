"""How far a run has come."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come.

    Attributes:
        phase: ``"copy"`` or ``"verify"``.
        done_bytes: Bytes of tensors that have passed in this phase.
        total_bytes: Bytes of tensors that will pass in it.
    """

    phase: str
    done_bytes: int
    total_bytes: int


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
