"""Progress: a bar with bytes, rate and remaining time on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from shardway.cli.text import human_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import TaskID

    from shardway.run.progress import Progress

_LINE_SECONDS = 5.0
_BAR_SECONDS = 0.1


@contextlib.contextmanager
def progress_display(*, quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Show progress on standard error while the context lasts; yields the callback that receives it."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar() as callback:
            yield callback
    else:
        yield _Lines().show


class _Lines:
    """Plain lines, for logs: one every few seconds; a short run prints none."""

    def __init__(self) -> None:
        self._phase = ""
        self._began = self._last = time.monotonic()

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        new = progress.phase != self._phase
        if new:
            self._phase, self._began, self._last = progress.phase, now, now
        if progress.waiting_for and (new or now - self._last >= _LINE_SECONDS):
            self._last = now
            print(f"waiting for {progress.waiting_for}", file=sys.stderr, flush=True)
        if now - self._last < _LINE_SECONDS or not progress.done_bytes:
            return
        self._last = now
        rate = progress.done_bytes / (now - self._began)
        left = (progress.total_bytes - progress.done_bytes) / rate
        print(
            f"{progress.phase} {progress.done_bytes / max(progress.total_bytes, 1):4.0%}  "
            f"{human_bytes(progress.done_bytes)} of {human_bytes(progress.total_bytes)}  "
            f"{human_bytes(rate)}/s  {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """A bar that is drawn only when the run outlasts a moment, so that short ones don't pay for it."""
    began = time.monotonic()
    bar: _Bar | None = None

    def show(progress: Progress) -> None:
        nonlocal bar
        if bar is None:
            if time.monotonic() - began < 2 * _BAR_SECONDS:
                return
            bar = _Bar()
        bar.show(progress)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


class _Bar:
    """rich's bar on standard error."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description:<7}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.start()
        self._tasks: dict[str, TaskID] = {}
        self._last = 0.0

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last < _BAR_SECONDS and progress.done_bytes < progress.total_bytes:
            return
        self._last = now
        if progress.phase not in self._tasks:
            self._tasks[progress.phase] = self._bar.add_task(progress.phase, total=progress.total_bytes or None)
        task = self._tasks[progress.phase]
        if progress.waiting_for:
            self._last = now
            self._bar.update(task, description=f"waiting for {progress.waiting_for}")
        else:
            self._bar.update(task, completed=progress.done_bytes)

    def close(self) -> None:
        self._bar.stop()
