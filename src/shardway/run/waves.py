"""The order of work when the files of a source arrive one by one and few of them can stay."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NamedTuple, Protocol

from shardway.run.engine import Selection

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shardway.plans.model import Plan, Stream


class Wave(NamedTuple):
    """Streams that read the same files.

    Attributes:
        needs: Those files.
        streams: The streams, in the order of the plan; none for files that are only to be looked at.
        frees: Files that no later wave needs.
    """

    needs: tuple[str, ...]
    streams: Sequence[Stream]
    frees: tuple[str, ...]


class Supply(Protocol):
    """Brings the files of a source, and takes them away again."""

    @property
    def others(self) -> Iterable[str]:
        """Files that have to come by once, whatever the streams read."""

    def begin(self, waves: Sequence[Wave]) -> None:
        """Be told what will be needed, in which order."""

    def wait(self, names: Iterable[str]) -> None:
        """Return when these files are there, whole.

        Raises:
            ShardwayError: They will not come.
        """

    def release(self, names: Iterable[str]) -> None:
        """Be told that these files are not needed any more, and not open."""


def files_read(plan: Plan, stream: Stream) -> frozenset[str]:
    """The files of the source that a stream of an import reads."""
    files = set()
    for tile, chunk in stream.pieces:
        source = plan.quantised.get(tile.hf.tensor)
        files |= {chunk.file} if source is None else {part.chunks[0].file for part in (source.codes, source.scales)}
    return frozenset(files)


def in_waves(plan: Plan, streams: Sequence[Stream], others: Iterable[str] = ()) -> list[Wave]:
    """Put streams into an order in which each file is needed from once to once, and few of them at a time.

    Files come in the order of their names, but the one that has been there for longest is finished first: models whose
    layers lie in order need two files at a time, and others few more.

    Args:
        plan: An import.
        streams: Those of its streams that are to be done.
        others: Files that are needed once, whatever the streams read.

    Returns:
        Waves that hold every stream once.
    """
    groups: dict[frozenset[str], array[int]] = {}
    for place, stream in enumerate(streams):
        groups.setdefault(files_read(plan, stream), array("I")).append(place)
    for name in sorted(set(others) - {name for files in groups for name in files}):
        groups[frozenset((name,))] = array("I")
    of: dict[str, dict[frozenset[str], None]] = {}
    for files in groups:
        for name in files:
            of.setdefault(name, {})[files] = None
    held: dict[str, None] = {}  # in the order in which they came
    waves = []
    while groups:
        oldest = next((name for name in held if of[name]), None)
        candidates = groups if oldest is None else of[oldest]
        files = min(candidates, key=lambda each: (len(each - held.keys()), sorted(each)))
        held |= dict.fromkeys(sorted(files))
        for name in files:
            del of[name][files]
        freed = tuple(name for name in held if not of[name])
        for name in freed:
            del held[name]
        waves.append(Wave(tuple(sorted(files)), Selection(streams, groups.pop(files)), freed))
    return waves


def most_at_once(waves: Sequence[Wave]) -> int:
    """How many files have to be there at the same time at most."""
    most = 0
    held: set[str] = set()
    for wave in waves:
        held |= set(wave.needs)
        most = max(most, len(held))
        held -= set(wave.frees)
    return most


def bytes_at_once(waves: Sequence[Wave], sizes: Mapping[str, int], most: int) -> int:
    """The bytes of the largest files that may be there at the same time, when up to `most` are brought.

    Args:
        waves: The waves.
        sizes: Bytes of each file that takes room.
        most: How many are brought before others have gone, at least `most_at_once`.
    """
    order = arrivals(waves)
    return max((sum(sizes.get(name, 0) for name in order[k : k + most]) for k in range(len(order))), default=0)


def arrivals(waves: Sequence[Wave]) -> list[str]:
    """The files in the order in which they are needed."""
    return list(dict.fromkeys(name for wave in waves for name in wave.needs))
