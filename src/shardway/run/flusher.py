"""Forcing files to the device while others are still being written.

Waiting for the device and copying take turns when the thread that finishes a file also syncs it; side by side they take
as long as the slower of the two.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shardway.run.files import Files


class Flusher:
    """A thread that syncs the files it is told of, in turn, and may be told of a file again and again.

    Args:
        files: Open files that are being written.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._told: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._work, name="shardway-flusher")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._told.put(None)
        self._thread.join()

    def flush(self, name: str) -> None:
        """Have what was written to a file so far on its way to the device soon; returns at once."""
        self._told.put(name)

    def finish(self, names: Iterable[str]) -> None:
        """Sync every file; returns when all of their bytes are on the device.

        Raises:
            ShardwayError: `io-failed`, or `no-space`, of any sync so far.
        """
        self._told.put(None)
        self._thread.join()
        if self._errors:
            raise self._errors[0]
        for name in names:
            self._files.sync(name)

    def _work(self) -> None:
        try:
            ended = False
            while not ended:
                told = [self._told.get()]
                while not self._told.empty():
                    told.append(self._told.get())
                ended = None in told
                for name in dict.fromkeys(told):
                    if name is not None:
                        self._files.sync(name)
        except BaseException as error:  # noqa: BLE001 - raised again by finish()
            self._errors.append(error)
