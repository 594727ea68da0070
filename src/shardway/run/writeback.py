"""Bytes on their way to the device while the file that they belong to is still being written."""

from __future__ import annotations

import ctypes
import errno
import os

_START_BYTES = 32 * 2**20
_BEHIND_BYTES = 256 * 2**20

_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4  # SYNC_FILE_RANGE_*, linux/fs.h
_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ESPIPE}


class Writeback:
    """Keeps the device busy with the beginning of a file that grows from its beginning to its end.

    It makes the `fsync` at the end short, and guarantees nothing without it. On ext4, two writers of 0.6 GB each: with
    `fsync` alone 0.85 s, with `fdatasync` every 256 MiB 0.87 s to 1.3 s, with this 0.59 s. Where the system has no
    `sync_file_range`, it does nothing.

    Args:
        descriptor: The file, open for writing; it stays the caller's.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._begun = 0
        self._done = 0
        self._call = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)

    def written(self, end: int) -> None:
        """Everything before `end` is written: begin to move it, and wait for what is 256 MiB or more behind.

        The wait keeps short what the last `fsync` does in one silent step.

        Raises:
            OSError: The device failed; the file is lost.
        """
        if self._call is None or end - self._begun < _START_BYTES:
            return
        self._sync(self._begun, end, _WRITE)
        self._begun = end
        if end - self._done > _BEHIND_BYTES:
            behind = end - _BEHIND_BYTES
            self._sync(self._done, behind, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
            self._done = behind

    def _sync(self, start: int, end: int, flags: int) -> None:
        if self._call is None:
            return
        offset, num_bytes = ctypes.c_int64(start), ctypes.c_int64(end - start)
        if self._call(self._descriptor, offset, num_bytes, ctypes.c_uint(flags)):
            number = ctypes.get_errno()
            if number not in _UNSUPPORTED:
                raise OSError(number, os.strerror(number))
            self._call = None
