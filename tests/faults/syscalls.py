"""Runs a function in a child process whose system calls on files can be made to fail, or be its last.

The kernel hands each such call to this process before it is carried out (seccomp's user notification), so that nothing
the interpreter or a library does in C is missed, and every failure is one that the kernel could have returned. It needs
Linux 5.5, x86-64 or ARM64, and no privileges.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import pickle
import platform
import select
import signal
import socket
import struct
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import pytest

from shardway.core.errors import ShardwayError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Name: (number on x86-64, number on ARM64 or None, which argument is a descriptor, which are paths).
_CALLS: dict[str, tuple[int, int | None, int | None, tuple[int, ...]]] = {
    "write": (1, 64, 0, ()),
    "close": (3, 57, 0, ()),
    "ioctl": (16, 29, 0, ()),
    "pwrite64": (18, 68, 0, ()),
    "writev": (20, 66, 0, ()),
    "sendfile": (40, 71, 0, ()),
    "fsync": (74, 82, 0, ()),
    "fdatasync": (75, 83, 0, ()),
    "ftruncate": (77, 46, 0, ()),
    "rename": (82, None, None, (0, 1)),
    "mkdir": (83, None, None, (0,)),
    "rmdir": (84, None, None, (0,)),
    "unlink": (87, None, None, (0,)),
    "openat": (257, 56, None, (1,)),
    "mkdirat": (258, 34, None, (1,)),
    "unlinkat": (263, 35, 0, (1,)),
    "renameat": (264, 38, None, (1, 3)),
    "sync_file_range": (277, 84, 0, ()),
    "pwritev": (296, 70, 0, ()),
    "renameat2": (316, 276, None, (1, 3)),
    "copy_file_range": (326, 285, 2, ()),
}
_FICLONERANGE = 0x4020940D
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_NEW_LISTENER, _FILTER, _SECCOMP = 8, 1, {"x86_64": 317, "aarch64": 277}
_ALLOW, _NOTIFY, _CONTINUE = 0x7FFF0000, 0x7FC00000, 1
_LIMIT_S = 60.0
_libc = ctypes.CDLL(None, use_errno=True)


class Call(NamedTuple):
    """A system call that is about to be made.

    Attributes:
        name: Of the call.
        path: The file that it is about, below `root`.
        descriptor: Its descriptor, or -1.
        arguments: All six.
        pid: The thread that makes it.
    """

    name: str
    path: str
    descriptor: int
    arguments: tuple[int, ...]
    pid: int


class Fail(NamedTuple):
    """What is to happen to a call: it fails with an errno, or (0) writes one byte less than it should."""

    number: int


@dataclass(kw_only=True)
class Ended:
    """How a child ended.

    Attributes:
        calls: What it did, in order.
        error: What it raised: None for nothing.
        killed: Whether it was killed.
    """

    calls: list[Call] = field(default_factory=list)
    error: BaseException | None = None
    killed: bool = False


KILL = "kill"
Decide = "Callable[[int, Call], Fail | str | None]"


def require_notification() -> None:
    """Skip the test where the kernel can't do this."""
    if platform.machine() not in _SECCOMP or platform.system() != "Linux":
        pytest.skip("system calls can't be intercepted here")
    with contextlib.suppress(OSError):
        if not run(lambda: None, "/", lambda number, call: None).error:
            return
    pytest.skip("this kernel has no seccomp notification")


def run(action: Callable[[], object], root: Path | str, decide: Callable[[int, Call], Fail | str | None]) -> Ended:
    """Run an action in a forked child; decide about each of its calls on files below `root`.

    Args:
        action: What the child does.
        root: Directory; what is done elsewhere is not touched.
        decide: Given the number of a call, counted from 0, and the call: None to let it happen, `Fail`, or ``"kill"``.

    Returns:
        How it ended. A child that does not end is killed after a minute, which is an error.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if not pid:
        ours.close()
        _child(action, theirs)
    theirs.close()
    try:
        return _supervise(pid, ours, f"{root}", decide)
    finally:
        ours.close()


def kill_after(action: Callable[[], object], seconds: float) -> Ended:
    """Run an action in a forked child and kill it after a while, wherever it is then."""
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            os.setsid()
            action()
        os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return Ended(killed=os.WIFSIGNALED(status))


def _child(action: Callable[[], object], parent: socket.socket) -> None:
    error: BaseException | None = None
    try:
        listener = _install()
        socket.send_fds(parent, [b"f"], [listener])
        os.close(listener)
        parent.recv(1)
        try:
            action()
        except BaseException as raised:
            error = raised
            if not isinstance(raised, ShardwayError):
                error = RuntimeError("".join(traceback.format_exception(raised)))
        parent.sendall(pickle.dumps(error))
        parent.shutdown(socket.SHUT_WR)
    finally:
        os._exit(0)


def _install() -> int:
    numbers = [number for number in _numbers() if number is not None]
    program = struct.pack("HBBI", 0x20, 0, 0, 0)
    for place, number in enumerate(numbers):
        program += struct.pack("HBBI", 0x15, len(numbers) - place, 0, number)
    program += struct.pack("HBBI", 0x06, 0, 0, _ALLOW) + struct.pack("HBBI", 0x06, 0, 0, _NOTIFY)
    buffer = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer)))
    _libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    listener = int(_libc.syscall(_SECCOMP[platform.machine()], _FILTER, _NEW_LISTENER, header))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return listener


def _numbers() -> list[int | None]:
    """The numbers of the calls on this machine, in their order; None for those that it does not have."""
    return [x86 if platform.machine() == "x86_64" else arm for x86, arm, _, _ in _CALLS.values()]


def _supervise(pid: int, child: socket.socket, root: str, decide: Callable[[int, Call], Fail | str | None]) -> Ended:
    ended = Ended()
    _, descriptors, _, _ = socket.recv_fds(child, 1, 1)
    if not descriptors:
        os.waitpid(pid, 0)
        raise OSError(errno.ENOSYS, "no seccomp notification")
    (listener,) = descriptors
    names = dict(zip(_numbers(), _CALLS, strict=True))
    report = b""
    try:
        child.send(b"g")
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(child.fileno(), select.POLLIN)
        until = time.monotonic() + _LIMIT_S
        open_ends = {listener, child.fileno()}
        while open_ends and not ended.killed:
            events = poll.poll(1000)
            if time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
                raise TimeoutError(f"the child has hung; it made {len(ended.calls)} calls, at last {ended.calls[-3:]}")
            for descriptor, event in events:
                if descriptor == child.fileno():
                    part = child.recv(2**16)
                    report += part
                    if not part:
                        poll.unregister(descriptor)
                        open_ends.discard(descriptor)
                elif event & select.POLLIN:
                    _answer(listener, pid, names, root, decide, ended)
                else:
                    poll.unregister(descriptor)
                    open_ends.discard(descriptor)
    finally:
        os.close(listener)
        _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        ended.killed = True
    elif report:
        ended.error = pickle.loads(report)
    else:
        ended.error = RuntimeError(f"the child ended with status {status} and said nothing")
    return ended


def _answer(
    listener: int,
    pid: int,
    names: dict[int | None, str],
    root: str,
    decide: Callable[[int, Call], Fail | str | None],
    ended: Ended,
) -> None:
    message = bytearray(80)
    try:
        fcntl.ioctl(listener, _RECEIVE, message)
    except FileNotFoundError:
        return  # the thread has ended
    token, thread, _, number, _, _, *arguments = struct.unpack("QIIiIQ6Q", message)
    call = _describe(names[number], thread, tuple(arguments), root)
    answer: tuple[int, int, int] = (0, 0, _CONTINUE)
    if call is not None:
        verdict = decide(len(ended.calls), call)
        ended.calls.append(call)
        if verdict == KILL:
            os.kill(pid, signal.SIGKILL)
            ended.killed = True
            return
        if isinstance(verdict, Fail):
            answer = (0, -verdict.number, 0) if verdict.number else (_write_less(call), 0, 0)
    with contextlib.suppress(FileNotFoundError):
        fcntl.ioctl(listener, _SEND, bytearray(struct.pack("QqiI", token, *answer)))


def _describe(name: str, thread: int, arguments: tuple[int, ...], root: str) -> Call | None:
    """The call, where it is about a file below the root and may change something."""
    _, _, which, paths = _CALLS[name]
    descriptor = -1
    if name == "ioctl" and arguments[1] & 0xFFFFFFFF != _FICLONERANGE:
        return None
    try:
        if which is not None:
            descriptor = ctypes.c_int(arguments[which] & 0xFFFFFFFF).value
        path = "" if descriptor < 0 else os.readlink(f"/proc/{thread}/fd/{descriptor}")
        for place in paths:
            text = _text(thread, arguments[place])
            path = text if text.startswith("/") else f"{path}/{text}"
    except OSError:
        return None
    return Call(name, path, descriptor, arguments, thread) if path.startswith(f"{root}/") else None


def _text(thread: int, address: int) -> str:
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return os.fsdecode(memory.read(4096).split(b"\0", 1)[0])


def _write_less(call: Call) -> int:
    """Do a write in the child's stead, all but its last byte; return how many bytes it was."""
    if call.name not in ("write", "pwrite64"):
        raise ValueError(f"{call.name} is not written short")
    length = call.arguments[2] - 1
    with open(f"/proc/{call.pid}/mem", "rb", buffering=0) as memory:
        memory.seek(call.arguments[1])
        data = memory.read(length)
    # The child's own description of the open file, so that its position moves; opening it anew would have another one.
    pidfd = os.pidfd_open(_process_of(call.pid))
    try:
        own = int(_libc.syscall(438, pidfd, call.descriptor, 0))  # pidfd_getfd
        if own < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        try:
            return os.write(own, data) if call.name == "write" else os.pwrite(own, data, call.arguments[3])
        finally:
            os.close(own)
    finally:
        os.close(pidfd)


def _process_of(thread: int) -> int:
    with open(f"/proc/{thread}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Tgid:"))
