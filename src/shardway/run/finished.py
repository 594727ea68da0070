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


def files_of(plan: Plan, stream: Stream) -> tuple[str, ...]:
    """The destination files that a stream is written to, in order."""
    chunks = stream.chunks if plan.direction is Direction.IMPORT else [piece.hf for piece in stream.pieces]
    return (chunks[0].file,) if len(chunks) == 1 else tuple(dict.fromkeys([chunk.file for chunk in chunks]))


def unfinished(plan: Plan, finished: Collection[str]) -> Sequence[Stream]:
    """The streams of a plan that write to a file which is not finished."""
    if not finished:
        return plan.streams
    done = set(finished)
    left = (place for place, stream in enumerate(plan.streams) if not done.issuperset(files_of(plan, stream)))
    return Selection(plan.streams, array("I", left))


class FinishedFiles:
    """Tells from the batches that are done which files are finished, and notes them in the journal.

    Args:
        work: The batches of the plan that is executed.
        journal: Gets the files.
        digests: The digests of all chunks that have passed so far, by the chunk's file, one mapping for each thread.
    """

    def __init__(
        self, work: Iterable[Batch], journal: Journal, digests: Callable[[], Iterable[Mapping[str, ChunkDigests]]]
    ) -> None:
        self._journal = journal
        self._digests = digests
        self._lock = threading.Lock()
        self._left = Counter(name for batch in work for name in batch.files)

    def done(self, batch: Batch) -> list[str]:
        """Count a batch that is done; note the files that are finished by it, and return them."""
        with self._lock:
            self._left.subtract(batch.files)
            finished = [name for name in sorted(batch.files) if not self._left[name]]
        for name in finished:
            self._journal.add(name, *(digests.get(name, {}) for digests in self._digests()))
        return finished
