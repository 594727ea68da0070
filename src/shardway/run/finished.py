"""Noting in the journal each destination file whose last byte is written.

It may not be on the device yet: whoever goes on from the journal reads the file, and forces it there in the end.
"""

from __future__ import annotations

import threading
from array import array
from collections import Counter
from typing import TYPE_CHECKING

from shardway.plans.model import Direction
from shardway.run.engine import Selection

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from shardway.formats.record import ChunkDigests
    from shardway.plans.model import Plan, Stream
    from shardway.run.engine import Batch
    from shardway.run.journal import Journal


def files_of(plan: Plan, stream: Stream) -> set[str]:
    """The destination files that a stream writes to."""
    if plan.direction is Direction.IMPORT:
        return {chunk.file for chunk in stream.chunks}
    return {piece.hf.file for piece in stream.pieces}


def unfinished(plan: Plan, finished: Collection[str]) -> Sequence[Stream]:
    """The streams of a plan that write to a file which is not finished."""
    if not finished:
        return plan.streams
    done = set(finished)
    left = (place for place, stream in enumerate(plan.streams) if not files_of(plan, stream) <= done)
    return Selection(plan.streams, array("I", left))


class FinishedFiles:
    """Tells from the batches that are done which files are finished, and notes them in the journal.

    Args:
        plan: The plan that is executed.
        work: Its batches.
        journal: Gets the files.
        digests: The digests of all chunks that have passed so far, by the chunk's file, one mapping for each thread.
    """

    def __init__(
        self,
        plan: Plan,
        work: Sequence[Batch],
        journal: Journal,
        digests: Callable[[], Iterable[Mapping[str, ChunkDigests]]],
    ) -> None:
        self._journal = journal
        self._digests = digests
        self._lock = threading.Lock()
        self._left = Counter(batch.file for batch in work)
        self._needs: dict[str, set[str]] = {}  # which batches, by their file, write to a file
        for batch in work:
            for stream in batch.streams:
                for name in files_of(plan, stream):
                    self._needs.setdefault(name, set()).add(batch.file)
        self._touches: dict[str, list[str]] = {}
        for name, batches in self._needs.items():
            for batch_file in batches:
                self._touches.setdefault(batch_file, []).append(name)

    def done(self, batch_file: str) -> None:
        """Count a batch that is done, and note the files that are finished by it."""
        with self._lock:
            self._left[batch_file] -= 1
            if self._left[batch_file]:
                return
            finished = [name for name in self._touches[batch_file] if not any(map(self._left.get, self._needs[name]))]
        for name in finished:
            known: ChunkDigests = {}
            for digests in self._digests():
                known |= digests.get(name, {})
            self._journal.add(name, known)
