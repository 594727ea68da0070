"""Whether those who came hold the whole model: pure functions over their tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.boxes import UNPROVEN, Box, exact_cover, whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape
    from shardway.live.messages import Table
    from shardway.live.records import ObjectShard, Shard
    from shardway.live.saving import Needed

    Kind = tuple[DType, Shape]


class Unit(NamedTuple):
    """What is written by exactly one rank: a box of a tensor, or an object (whose box is None)."""

    key: str
    box: Box | None
    num_bytes: int


class Gap(NamedTuple):
    """A tensor or object of which some part is held by nobody who came; `box` is one such part."""

    key: str
    shape: Shape | None
    box: Box | None
    times: int

    def __str__(self) -> str:
        if self.box is None or self.shape is None:
            return self.key
        if self.box == whole(self.shape):
            return f"{self.key} {list(self.shape)}"
        ways = "ways" if self.times == UNPROVEN else f"{self.times} ways"
        how = {0: "is missing", -1: "lies outside of it"}.get(self.times, f"is held in {ways} that overlap")
        return f"{self.key} {list(self.shape)}: {list(self.box.size)} from {list(self.box.start)} {how}"


class Conflict(NamedTuple):
    """A table (by its place in the order of adding; -1: what is needed) describes a tensor unlike an earlier one."""

    key: str
    first: int
    said: tuple[DType | None, Shape]
    second: int
    says: tuple[DType | None, Shape]


class Holdings:
    """What a set of tables holds together. Tables are only ever added, each for the work of reading it once.

    Args:
        needed: What must be held, besides the whole of everything that is held in part.
    """

    def __init__(self, needed: Needed) -> None:
        self.units: list[Unit] = []
        self.conflicts: list[Conflict] = []
        self.tables: dict[str, tuple[int, ...]] = {}
        self._needed = needed
        self._kinds: dict[str, Kind] = {}
        self._said_by: dict[str, int] = {}
        self._boxes: dict[str, dict[Box, int]] = {}
        self._objects: dict[str, int] = {}
        self._tiled: dict[str, tuple[list[int], Gap | None]] | None = None
        self._lacking: dict[str, int] = {key: math.prod(shape) for key, (_, shape) in (needed.tensors or {}).items()}
        self._short = {key for key, lacking in self._lacking.items() if lacking > 0}

    def add(self, digest: str, table: Table) -> None:
        """Take in a table; one that was added before costs nothing.

        `tables[digest]` are then the units of its shards and of its objects, in their order; -1 for a shard that
        contradicts what is needed or was said before, which nobody will be asked to write.
        """
        if digest in self.tables:
            return
        self._tiled = None
        units = [self._unit(shard) for shard in table.shards]
        units += [self._object(record) for record in table.objects]
        self.tables[digest] = tuple(units)

    def match(self, table: Table) -> tuple[int, ...]:
        """The units of another table's shards and objects, -1 for those that aren't known here; adds nothing."""
        shards = (
            self._boxes[shard.key].get(Box(shard.start, shard.size), -1)
            if self._kinds.get(shard.key) == (shard.dtype, shard.global_shape)
            else -1
            for shard in table.shards
        )
        return (*shards, *(self._objects.get(record.key, -1) for record in table.objects))

    def _unit(self, shard: Shard) -> int:
        kind = (shard.dtype, shard.global_shape)
        known = self._kinds.get(shard.key)
        if known is None:
            if not self._begin(shard, kind):
                return -1
        elif known != kind:
            self._conflict(shard.key, self._said_by[shard.key], known, kind)
            return -1
        boxes = self._boxes[shard.key]
        box = Box(shard.start, shard.size)
        number = boxes.get(box)
        if number is None:
            number = boxes[box] = len(self.units)
            num_elements = box.num_elements
            self.units.append(Unit(shard.key, box, shard.dtype.num_bytes(num_elements)))
            lacking = self._lacking[shard.key] = self._lacking[shard.key] - num_elements
            if lacking <= 0:
                self._short.discard(shard.key)
        return number

    def _begin(self, shard: Shard, kind: Kind) -> bool:
        """Note the first shard of a tensor; False when it isn't the tensor that is needed."""
        key = shard.key
        wanted = (self._needed.tensors or {}).get(key)
        if wanted is not None:
            dtype, shape = wanted
            resized = key in self._needed.resizable and len(shape) == len(kind[1]) and shape[1:] == kind[1][1:]
            if (dtype is not None and dtype != kind[0]) or (shape != kind[1] and not resized):
                self._conflict(key, -1, wanted, kind)
                return False
        self._kinds[key] = kind
        self._said_by[key] = len(self.tables)
        self._boxes[key] = {}
        self._lacking[key] = math.prod(kind[1])
        (self._short.add if self._lacking[key] else self._short.discard)(key)
        return True

    def _conflict(self, key: str, first: int, said: tuple[DType | None, Shape], says: Kind) -> None:
        self.conflicts.append(Conflict(key, first, said, len(self.tables), says))

    def _object(self, record: ObjectShard) -> int:
        number = self._objects.get(record.key)
        if number is None:
            number = self._objects[record.key] = len(self.units)
            self.units.append(Unit(record.key, None, record.num_bytes))
        return number

    def known(self) -> dict[str, Shape | None]:
        """Every tensor (with its shape) and object (None) that is needed, or that is held in part."""
        found: dict[str, Shape | None] = {key: self._shape(key) for key in self._lacking}
        found.update(dict.fromkeys((*self._needed.objects, *self._objects)))
        return found

    def gaps(self) -> list[Gap]:
        """Every tensor and object of which some part is held by nobody; empty when the model is complete."""
        found = [Gap(key, None, None, 0) for key in sorted(self._needed.objects - self._objects.keys())]
        return found + [gap for _, gap in self._tilings().values() if gap is not None]

    def complete(self) -> bool:
        """Whether every element of every tensor, and every object, is held; most often much cheaper than `gaps`."""
        return not self._short and not self.gaps()

    def chosen(self) -> list[int]:
        """Units that together are every element exactly once, and every object.

        Shards of replicas are equal boxes. Where boxes overlap otherwise, the larger ones are chosen.

        Raises:
            ValueError: The model is not complete.
        """
        gaps = self.gaps()
        if gaps:
            raise ValueError(str(gaps[0]))
        tiles = [unit for units, _ in self._tilings().values() for unit in units]
        return sorted([*self._objects.values(), *tiles])

    def _tilings(self) -> dict[str, tuple[list[int], Gap | None]]:
        """For every tensor the units that tile it, or where they don't."""
        if self._tiled is None:
            self._tiled = {}
            for key in sorted(self._lacking):
                boxes = self._boxes.get(key, {})
                tiles, gap = _tiling(self._shape(key), boxes)
                self._tiled[key] = [boxes[box] for box in tiles], gap and gap._replace(key=key)
        return self._tiled

    def _shape(self, key: str) -> Shape:
        known = self._kinds.get(key)
        return known[1] if known is not None else (self._needed.tensors or {})[key][1]


def _tiling(shape: Shape, boxes: Iterable[Box]) -> tuple[list[Box], Gap | None]:
    """Boxes among `boxes` that cover the shape exactly once, or why there are none."""
    filled = [box for box in boxes if box.num_elements or not math.prod(shape)]
    if not math.prod(shape):
        return filled[:1], None if filled else Gap("", shape, whole(shape), 0)
    fault = exact_cover(shape, filled)
    if fault is None:
        return filled, None
    if fault.times == -1:
        return [], Gap("", shape, *fault)
    for ordered in (sorted(filled, key=lambda box: (-box.num_elements, box)), sorted(filled, key=_by_size)):
        picked: list[Box] = []
        for box in ordered:
            if not any(_overlap(box, other) for other in picked):
                picked.append(box)
        hole = exact_cover(shape, picked)
        if hole is None:
            return picked, None
    return [], Gap("", shape, *(fault if fault.times == 0 else _hole(shape, filled) or fault))


def _by_size(box: Box) -> tuple[int, Box]:
    return box.num_elements, box


def _overlap(one: Box, other: Box) -> bool:
    return all(a < d + e and d < a + b for a, b, d, e in zip(one.start, one.size, other.start, other.size, strict=True))


def _hole(shape: Shape, boxes: Sequence[Box]) -> tuple[Box, int] | None:
    """A part that no box covers, where some parts are covered more than once."""
    disjoint: list[Box] = []
    for box in boxes:
        pieces = [box]
        for other in disjoint:
            pieces = [rest for piece in pieces for rest in _minus(piece, other)]
        disjoint += pieces
    fault = exact_cover(shape, disjoint)
    return None if fault is None else (fault.box, fault.times)


def _minus(box: Box, other: Box) -> list[Box]:
    """Disjoint boxes of what `box` has outside of `other`."""
    if not _overlap(box, other):
        return [box]
    rest: list[Box] = []
    start, size = list(box.start), list(box.size)
    for axis in range(len(start)):
        low, high = start[axis], start[axis] + size[axis]
        inner_low, inner_high = other.start[axis], other.start[axis] + other.size[axis]
        for begin, end in ((low, max(low, inner_low)), (min(high, inner_high), high)):
            if begin < end:
                rest.append(
                    Box((*start[:axis], begin, *start[axis + 1 :]), (*size[:axis], end - begin, *size[axis + 1 :]))
                )
        start[axis] = max(low, inner_low)
        size[axis] = min(high, inner_high) - start[axis]
    return rest
