"""Threads that do one job together: the first error stops all of them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from shardway.core.errors import ShardwayError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Team:
    """Runs tasks side by side.

    Attributes:
        stopped: Set when a task has failed or the caller was interrupted; tasks look at it between steps, and end.
    """

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._errors: list[BaseException] = []

    def run(self, tasks: Sequence[Callable[[], None]], name: str) -> None:
        """Run each task on a thread of its own; returns when every thread has ended.

        Args:
            tasks: What the threads do.
            name: What they are called, with a number each.

        Raises:
            ShardwayError: What any task raised, all problems together; any other error takes precedence, as it is.
            KeyboardInterrupt: After the threads have stopped.
        """
        threads = [
            threading.Thread(target=self._attempt, args=(task,), name=f"{name}-{number}")
            for number, task in enumerate(tasks)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:
            self.stopped.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
        if not self._errors:
            return
        known = [error for error in self._errors if isinstance(error, ShardwayError)]
        if len(known) < len(self._errors):
            raise next(error for error in self._errors if not isinstance(error, ShardwayError))
        raise ShardwayError(dict.fromkeys(problem for error in known for problem in error.problems)) from known[0]

    def _attempt(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:  # noqa: BLE001 - raised again by run()
            self._errors.append(error)
            self.stopped.set()
