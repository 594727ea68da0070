"""Sharing extents between source and destination, where the filesystem can (XFS, Btrfs, NFS 4.2 and others).

Source: ioctl_ficlonerange(2), linux/fs.h.
"""

from __future__ import annotations

import fcntl
import struct
from typing import TYPE_CHECKING

from shardway.plans.streams import BLOCK_BYTES

if TYPE_CHECKING:
    from shardway.run.files import Files

_FICLONERANGE = 0x4020940D


class Cloner:
    """Makes whole blocks of one file appear in another one without copying them.

    Args:
        source: Open files that are read.
        target: Open files that are written.

    Attributes:
        supported: Whether it is worth trying; false from the first refusal on.
    """

    def __init__(self, source: Files, target: Files) -> None:
        self.supported = True
        self._source = source
        self._target = target

    def share(self, source: str, offset: int, target: str, place: int, num_bytes: int) -> tuple[int, int]:
        """Share what can be shared of `num_bytes` at `offset` of the source, to lie at `place` of the target.

        Returns:
            The part that is in place, as (begin, end) counted from `offset`; equal to (num_bytes, num_bytes) when
            nothing could be shared and all has to be written.
        """
        begin = -offset % BLOCK_BYTES
        length = (num_bytes - begin) // BLOCK_BYTES * BLOCK_BYTES
        if not self.supported or (offset - place) % BLOCK_BYTES or length <= 0:
            return num_bytes, num_bytes
        with self._source.opened(source) as read, self._target.opened(target) as written:
            argument = struct.pack("qQQQ", read.descriptor, offset + begin, length, place + begin)
            try:
                fcntl.ioctl(written.descriptor, _FICLONERANGE, argument)
            except OSError:
                self.supported = False
                return num_bytes, num_bytes
        return begin, begin + length
