"""Telling whether another process of this machine is still alive, and when this one began."""

from __future__ import annotations

import os
from pathlib import Path

_PROC = Path("/proc")


def this_process() -> str:
    """Identifies this process among all processes of all machines that have a ``/proc``; else an empty string."""
    try:
        return f"{_machine()}:{os.getpid()}:{_stat(os.getpid())[1]}"
    except OSError:
        return ""


def is_dead(process: str) -> bool:
    """Whether the process that called itself so is known to have died; False where that can't be known from here."""
    machine, _, rest = process.rpartition(":")
    machine, _, number = machine.rpartition(":")
    try:
        if not machine or machine != _machine():
            return False
    except OSError:
        return False
    try:
        state, began = _stat(int(number))
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return state in "ZX" or began != rest


def is_here(process: str) -> bool:
    """Whether the process that called itself so is known to be alive, on this machine."""
    try:
        return bool(process) and process.startswith(f"{_machine()}:") and not is_dead(process)
    except OSError:
        return False


def began_at() -> float:
    """When this process began, in seconds since 1970; 0 where that can't be known."""
    try:
        boot = next(line for line in (_PROC / "stat").read_text().splitlines() if line.startswith("btime "))
        return int(boot.split()[1]) + int(_stat(os.getpid())[1]) / os.sysconf("SC_CLK_TCK")
    except (OSError, StopIteration, ValueError):
        return 0.0


def _machine() -> str:
    """This boot of this machine, and the process namespace, in which numbers mean the same processes."""
    boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{(_PROC / 'self/ns/pid').readlink()}"


def _stat(number: int) -> tuple[str, str]:
    """State and starting time (in clock ticks since the boot) of a process."""
    fields = (_PROC / str(number) / "stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]
