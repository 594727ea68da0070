"""Whole processes, timed from outside."""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class Sample(NamedTuple):
    """What commands cost that ran one after the other.

    Attributes:
        seconds: From before the first starts until the last has ended.
        cpu_seconds: User and system time.
        peak_bytes: The larger of their peak resident memories.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run(*commands: Sequence[str]) -> Sample:
    """Run commands one after the other, without their output; a failure ends the benchmark."""
    cpu_seconds, peak_bytes = 0.0, 0
    # Bytecode is compiled once, as an installer would have done.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    for command in commands:
        quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
        process = os.posix_spawnp(command[0], list(command), environment, file_actions=quiet)
        _, status, usage = os.wait4(process, 0)
        if status:
            sys.exit(f"{' '.join(command)}: exit code {os.waitstatus_to_exitcode(status)}")
        cpu_seconds += usage.ru_utime + usage.ru_stime
        peak_bytes = max(peak_bytes, usage.ru_maxrss * 1024)
    return Sample(time.perf_counter() - began, cpu_seconds, peak_bytes)


def program(name: str) -> str:
    """A program of the environment that runs the benchmark."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def median_ratio(samples: Sequence[Sample], yardstick: Sequence[Sample]) -> float:
    """The median of the ratios of runs that followed each other."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(samples, yardstick, strict=True))
