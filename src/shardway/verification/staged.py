"""Checking files that an earlier run, which was killed, has left as finished."""

from __future__ import annotations

import math
import threading
from array import array
from typing import TYPE_CHECKING

import xxhash

from shardway.core.errors import ShardwayError
from shardway.core.tensors import Catalog
from shardway.core.tiles import Tile
from shardway.plans.model import Direction
from shardway.plans.streams import build_streams, frame
from shardway.run.engine import Engine, Selection, Worker, batches
from shardway.run.files import Files, page_buffer
from shardway.run.finished import files_of
from shardway.run.journal import Finished
from shardway.run.progress import Meter
from shardway.verification.compare import compare_streams

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shardway.formats.record import ChunkDigests
    from shardway.plans.model import Plan, Stream
    from shardway.run.progress import Progress

_READ_BYTES = 2**20


def check_finished(
    plan: Plan,
    written: Path,
    finished: Finished,
    num_workers: int,
    progress: Callable[[Progress], None] | None,
) -> Finished:
    """Find out which of the files that are said to be finished really are: every byte of them is read.

    The chunks of an import are held against the digests that were noted when they were written, and what lies between
    them against the plan. The tensors of an export are compared with the source.

    Args:
        plan: The import or export.
        written: The directory in which the files are now.
        finished: What the journal says.
        num_workers: Threads.
        progress: Called as reading proceeds, in the phase ``"resume"``.

    Returns:
        The files that can be kept.

    Raises:
        ShardwayError: `io-failed`, `source-changed` when the source can't be read.
    """
    sizes = {target.name: target.num_bytes for target in plan.targets}
    whole = {name: finished.files[name] for name in finished.files if _size(written / name) == sizes.get(name, -2)}
    whole = {name: digests for name, digests in whole.items() if _has_literals(plan, written, name)}
    if not whole:
        return Finished()
    check = _damaged_imports if plan.direction is Direction.IMPORT else _damaged_exports
    damaged = check(plan, written, whole, num_workers, progress)
    return Finished(files={name: digests for name, digests in whole.items() if name not in damaged})


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return -1


def _has_literals(plan: Plan, written: Path, name: str) -> bool:
    target = next(target for target in plan.targets if target.name == name)
    try:
        with (written / name).open("rb") as file:
            for offset, literal in target.literals:
                file.seek(offset)
                if file.read(len(literal)) != literal:
                    return False
    except OSError:
        return False
    return True


def _damaged_imports(
    plan: Plan,
    written: Path,
    whole: dict[str, ChunkDigests],
    num_workers: int,
    progress: Callable[[Progress], None] | None,
) -> set[str]:
    there = (place for place, stream in enumerate(plan.streams) if whole.keys() >= {*files_of(plan, stream)})
    streams = Selection(plan.streams, array("I", there))
    meter = Meter("resume", sum(stream.num_bytes for stream in streams), progress)
    with Files(written) as files:
        checker = _Checker(plan, files, whole, meter.advance)
        Engine(batches(streams), lambda: checker, num_workers).run()
    return checker.damaged


class _Checker(Worker):
    """Reads the chunks of an import back; any thread may use it."""

    def __init__(
        self, plan: Plan, files: Files, whole: dict[str, ChunkDigests], advance: Callable[[int], None]
    ) -> None:
        self.damaged: set[str] = set()
        self._plan = plan
        self._files = files
        self._whole = whole
        self._advance = advance
        self._buffers = threading.local()

    def move(self, stream: Stream) -> None:
        """Check the chunks of one stream."""
        for chunk in stream.chunks:
            at, (head, tail, _) = frame(self._plan, stream.dtype, chunk)
            num_bytes = stream.dtype.num_bytes(math.prod(chunk.size))
            try:
                digest = self._digest(chunk.file, chunk.offset, num_bytes)
                whole = (
                    digest == self._whole[chunk.file].get((stream.tensor, chunk.start))
                    and self._read(chunk.file, at, len(head)) == head
                    and self._read(chunk.file, chunk.offset + num_bytes, len(tail)) == tail
                )
            except ShardwayError:
                whole = False
            if not whole:
                self.damaged.add(chunk.file)

    def _digest(self, name: str, offset: int, num_bytes: int) -> str:
        if not hasattr(self._buffers, "view"):
            self._buffers.view = page_buffer(_READ_BYTES)
        hasher = xxhash.xxh3_128()
        for low in range(0, num_bytes, _READ_BYTES):
            view = self._buffers.view[: min(_READ_BYTES, num_bytes - low)]
            self._files.read_into(name, view, offset + low)
            hasher.update(view)
            self._advance(len(view))
        return hasher.hexdigest()

    def _read(self, name: str, offset: int, num_bytes: int) -> bytes:
        data = bytearray(num_bytes)
        self._files.read_into(name, memoryview(data), offset)
        return bytes(data)


def _damaged_exports(
    plan: Plan,
    written: Path,
    whole: dict[str, ChunkDigests],
    num_workers: int,
    progress: Callable[[Progress], None] | None,
) -> set[str]:
    """Compare the tensors in the files with the source; the sides of the tiles are swapped to do it file by file."""
    staged = {name: tensor for name, tensor in plan.hf.tensors.items() if tensor.chunks[0].file in whole}
    tiles = [
        Tile(sizes=piece.tile.sizes, hf=piece.tile.mcore, mcore=piece.tile.hf)
        for stream in plan.streams
        for piece in stream.pieces
        if piece.tile.hf.tensor in staged
    ]
    swapped = plan._replace(
        direction=Direction.IMPORT,
        hf=plan.mcore,
        mcore=Catalog(root=written, tensors=staged),
        shifts={tile.mcore.tensor: -plan.shifts[tile.hf.tensor] for tile in tiles if tile.hf.tensor in plan.shifts},
    )
    streams: dict[str, list[Stream]] = {name: [] for name in whole}
    for stream in build_streams(tiles, plan.mcore.tensors, staged):
        streams[stream.chunks[0].file].append(stream)
    meter = Meter("resume", sum(tensor.num_bytes for tensor in staged.values()), progress)
    return {name for name in whole if not _is_as_source(swapped, streams[name], num_workers, meter)}


def _is_as_source(plan: Plan, streams: list[Stream], num_workers: int, meter: Meter) -> bool:
    plan = plan._replace(streams=tuple(streams))
    try:
        differences, _ = compare_streams(plan, num_workers)
    except ShardwayError:
        return False
    meter.advance(plan.num_bytes)
    return not differences
