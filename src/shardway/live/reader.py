"""Reading parts of stored tensors into the memory that they belong in: each byte once, in the order of the files.

Bytes that lie in long runs on both sides go straight from the file into the model's memory. The rest (casts,
interleaved columns, GPUs) passes through a buffer of a few megabytes, a box of a stored tensor at a time, from which
every part that lies in it is copied.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from typing import TYPE_CHECKING, NamedTuple

import torch

from shardway.core.boxes import Box, hull, row_major_strides, span
from shardway.core.dtypes import BFLOAT16, FLOAT32
from shardway.core.tiles import linearise, reach, restrict, runs
from shardway.live.memory import grid_of
from shardway.plans.chunking import split_box
from shardway.run.dequantise import read_quantised
from shardway.run.files import Files, failing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Chunk, StoredTensor
    from shardway.core.tiles import Tile
    from shardway.formats.quantised import Quantised
    from shardway.live.cuts import Cut
    from shardway.live.memory import Deferred, Target

BUFFER_BYTES = 4 * 2**20
_STEP_BYTES = 32 * 2**20  # between two looks at whether to stop
_SHORT_RUN_BYTES = 512  # a system call costs as much as copying so many bytes once more
_MAX_VECTORS = 512  # IOV_MAX is 1,024 on Linux


class Run(NamedTuple):
    """Bytes that are contiguous in a file and in a target."""

    offset: int
    target: int
    at: int
    num_bytes: int


class Region(NamedTuple):
    """A box of a chunk that is read through a buffer, and the parts that are copied from it."""

    chunk: Chunk
    dtype: DType
    box: Box
    cuts: tuple[Cut, ...]


class Direct(NamedTuple):
    """Runs of one file, by rising offset."""

    file: str
    runs: tuple[Run, ...]


class Computed(NamedTuple):
    """A part of a tensor whose values are computed from quantised ones."""

    source: Quantised
    cut: Cut


Job = Direct | Region | Computed


def jobs_of(
    cuts: Sequence[Cut],
    targets: Sequence[Target],
    stored: Mapping[str, StoredTensor],
    shifts: Mapping[str, float],
    quantised: Mapping[str, Quantised] | None = None,
) -> list[Job]:
    """Sort out how each part is to be read.

    Args:
        cuts: In the order of the stored bytes.
        targets: What the cuts' numbers mean.
        stored: The stored tensors.
        shifts: Keys of targets whose values are not the stored ones.
        quantised: Where the values of stored tensors come from that are computed.

    Returns:
        Work in the order of the files, in steps that are not too long.
    """
    work: list[tuple[str, int, Job]] = []
    by_chunk: dict[tuple[str, int], list[Cut]] = {}
    for cut in cuts:
        source = (quantised or {}).get(cut.tile.hf.tensor)
        if source is not None:
            work.append((cut.chunk.file, cut.chunk.offset, Computed(source, cut)))
            continue
        by_chunk.setdefault((cut.chunk.file, cut.chunk.offset), []).append(cut)
    for (file, offset), group in by_chunk.items():
        dtype = stored[group[0].tile.hf.tensor].dtype
        straight: list[Run] = []
        rest: list[Cut] = []
        for cut in group:
            found = None if cut.tile.mcore.tensor in shifts else _runs(cut, dtype, targets[cut.target])
            if found is None:
                rest.append(cut)
            else:
                straight += found
        work += [(file, each.runs[0].offset, each) for each in _direct(file, straight)]
        for box, inside in _boxes(rest):
            parts = split_box(box, max(1, _STEP_BYTES // dtype.itemsize))
            work += [(file, offset, Region(group[0].chunk, dtype, part, tuple(inside))) for part in parts]
    work.sort(key=_place)
    return [each for _, _, each in work]


def _place(item: tuple[str, int, object]) -> tuple[str, int]:
    return item[:2]


def _runs(cut: Cut, dtype: DType, target: Target) -> list[Run] | None:
    """A part as byte runs; None where it has to pass through a buffer."""
    tensor = target.tensor
    if tensor is None or dtype is not target.shard.dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    grid = linearise(cut.tile, Box(cut.chunk.start, cut.chunk.size), target.box)
    num_bytes = grid.run_elements * dtype.itemsize
    if num_bytes < _SHORT_RUN_BYTES and grid.num_elements > 4 * grid.run_elements:
        return None
    origin = cut.chunk.offset
    return [
        Run(origin + hf * dtype.itemsize, cut.target, mcore * dtype.itemsize, num_bytes) for hf, mcore in runs(grid)
    ]


def _direct(file: str, found: list[Run]) -> Iterator[Direct]:
    """Runs by rising offset, in steps."""
    step: list[Run] = []
    total = 0
    for run in sorted(found):
        offset, target, at, left = run
        while left:
            take = min(left, _STEP_BYTES - total)
            step.append(Run(offset, target, at, take))
            offset, at, left, total = offset + take, at + take, left - take, total + take
            if total == _STEP_BYTES:
                yield Direct(file, tuple(step))
                step, total = [], 0
    if step:
        yield Direct(file, tuple(step))


def _boxes(cuts: Sequence[Cut]) -> list[tuple[Box, list[Cut]]]:
    """Boxes that don't overlap, with the cuts that lie in each: parts that are interleaved are read together.

    Args:
        cuts: On one chunk, by rising position.
    """
    done: list[tuple[Box, list[Cut]]] = []
    near: list[tuple[Box, list[Cut]]] = []  # may still meet one that follows
    for cut in cuts:
        side = cut.tile.hf
        strides = row_major_strides(cut.chunk.size)
        box, inside = Box(side.base, reach(cut.tile.sizes, side.steps, len(side.base))), [cut]
        first = span(box, strides)[0]
        done += [each for each in near if span(each[0], strides)[1] < first]
        near = [each for each in near if span(each[0], strides)[1] >= first]
        while overlapping := [each for each in near if _overlap(each[0], box)]:
            near = [each for each in near if not _overlap(each[0], box)]
            box = hull([box, *(each[0] for each in overlapping)])
            inside = [*(cut for each in overlapping for cut in each[1]), *inside]
        near.append((box, inside))
    return done + near


def _overlap(one: Box, other: Box) -> bool:
    return all(
        low < start + size and start < low + extent
        for low, extent, start, size in zip(one.start, one.size, other.start, other.size, strict=True)
    )


class CountedFiles(Files):
    """The files of a checkpoint that is loaded; every byte of a tensor that is read is counted here.

    Args:
        root: Directory that file names are relative to.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.num_read_bytes = 0
        self._counting = threading.Lock()

    def read_into(self, name: str, view: memoryview, offset: int) -> None:
        """Fill `view`; as `Files.read_into`."""
        super().read_into(name, view, offset)
        with self._counting:
            self.num_read_bytes += len(view)

    def read_all(self, name: str, views: Sequence[memoryview], offset: int) -> None:
        """Fill several views with the bytes from `offset` on, one after the other; errors as `read_into`."""
        done = 0
        if len(views) > 1:
            total = sum(map(len, views))
            with self.opened(name) as file, failing(f"read {total} bytes at {offset}", file.path):
                done = os.preadv(file.descriptor, views, offset)
            with self._counting:
                self.num_read_bytes += done
        for view in views:
            if done < len(view):
                self.read_into(name, view[done:], offset + done)
            done = max(0, done - len(view))
            offset += len(view)


class Filler:
    """Fills targets; any number of threads may use it, each with a `Lane` of its own.

    Args:
        targets: What is filled.
        wanted: For each target the number of elements that it will get.
        shifts: What is added to the stored values of a tensor, by its key, in float32.

    Attributes:
        overflows: For each stored tensor how many finite values a cast has made infinite.
        rounded: For each stored tensor how many values a shift has rounded, so that the way back doesn't give them.
    """

    def __init__(self, targets: Sequence[Target], wanted: Sequence[int], shifts: Mapping[str, float]) -> None:
        self.targets = targets
        self.overflows: dict[str, int] = {}
        self.rounded: dict[str, int] = {}
        self._shifts = shifts
        self._lock = threading.Lock()
        self._parts: dict[Deferred, list[torch.Tensor | None]] = {}
        self._left: dict[Deferred, int] = {}
        for target, count in zip(targets, wanted, strict=True):
            if target.deferred is not None:
                self._left[target.deferred] = self._left.get(target.deferred, 0) + count

    def tensor(self, number: int) -> torch.Tensor:
        """The memory of a target; that of a parameter which is written later is made when it is first needed."""
        target = self.targets[number]
        if target.tensor is not None:
            return target.tensor
        later = target.deferred
        if later is None:
            raise RuntimeError("a target without memory")
        with self._lock:
            parts = self._parts.setdefault(later, [None] * later.num_parts)
            part = parts[target.part]
            if part is None:
                dtype: torch.dtype = getattr(torch, target.shard.dtype.name)
                part = parts[target.part] = torch.zeros(target.shard.size, dtype=dtype, device=later.device)
            return part

    def filled(self, number: int, num_elements: int) -> None:
        """Count elements of a target that are there; store the parameter when all are."""
        later = self.targets[number].deferred
        if later is None:
            return
        with self._lock:
            self._left[later] -= num_elements
            if self._left[later]:
                return
            parts = self._parts.pop(later)
        if later.device.type == "cuda":
            torch.cuda.synchronize(later.device)  # what other threads have copied on streams of their own
        later.store([part for part in parts if part is not None])

    def put(self, source: torch.Tensor, number: int, part: Tile) -> None:
        """Put values of a stored tensor, in the shape of a part's grid, where they belong, cast and shifted."""
        target = self.tensor(number)
        place = grid_of(target, part.sizes, part.mcore, self.targets[number].shard.start)
        shift = self._shifts.get(part.mcore.tensor, 0.0)
        name = part.hf.tensor
        if shift:
            place.copy_(source.float() + shift)
            back = (place.float() - shift).to(source.dtype)
            self._count(self.rounded, name, back != source)
        else:
            place.copy_(source)
        if place.dtype != source.dtype and torch.finfo(place.dtype).max < torch.finfo(source.dtype).max:
            self._count(self.overflows, name, torch.isinf(place) & torch.isfinite(source))
        self.filled(number, part.num_elements)

    def _count(self, counts: dict[str, int], tensor: str, where: torch.Tensor) -> None:
        found = int(where.sum())
        if found:
            with self._lock:
                counts[tensor] = counts.get(tensor, 0) + found


class Lane:
    """One thread's buffers; reads jobs.

    Args:
        files: Where the stored tensors are.
        filler: Where they belong.
    """

    def __init__(self, files: CountedFiles, filler: Filler) -> None:
        self._files = files
        self._filler = filler
        self._stages: dict[torch.device, tuple[_Stage, _Stage]] = {}
        self._turn = 0

    def read(self, job: Job) -> None:
        """Read one job.

        Raises:
            ShardwayError: `io-failed` or `source-changed`.
        """
        if isinstance(job, Direct):
            self._read_direct(job)
        elif isinstance(job, Computed):
            self._compute(job)
        else:
            self._read_region(job)

    def finish(self) -> None:
        """Wait until everything is where it belongs."""
        for stages in self._stages.values():
            for stage in stages:
                stage.finish()

    def _read_direct(self, job: Direct) -> None:
        views: dict[int, memoryview] = {}
        vector: list[memoryview] = []
        begin = end = job.runs[0].offset
        for offset, target, at, num_bytes in job.runs:
            if target not in views:
                views[target] = _bytes_of(self._filler.tensor(target))
            if offset != end or len(vector) == _MAX_VECTORS:
                self._files.read_all(job.file, vector, begin)
                vector, begin, end = [], offset, offset
            vector.append(views[target][at : at + num_bytes])
            end += num_bytes
        self._files.read_all(job.file, vector, begin)

    def _read_region(self, job: Region) -> None:
        for block in split_box(job.box, max(1, BUFFER_BYTES // job.dtype.itemsize)):
            stage = self._stage(self._filler.tensor(job.cuts[0].target).device)
            num_bytes = block.num_elements * job.dtype.itemsize
            _read_box(self._files, job.chunk, block, job.dtype.itemsize, stage.room(num_bytes))
            with stage.filled(num_bytes) as flat:
                memory = flat.view(getattr(torch, job.dtype.name)).view(block.size)
                for cut in job.cuts:
                    for part in restrict(cut.tile, block, mcore=False):
                        source = grid_of(memory, part.sizes, part.hf, block.start)
                        self._filler.put(source, cut.target, part)

    def _compute(self, job: Computed) -> None:
        tile, number = job.cut.tile, job.cut.target
        target = self._filler.targets[number]
        dtype = BFLOAT16 if target.shard.dtype is BFLOAT16 else FLOAT32
        whole = Box(tile.mcore.base, reach(tile.sizes, tile.mcore.steps, len(tile.mcore.base)))
        for box in split_box(whole, BUFFER_BYTES // 4):
            for part in restrict(tile, box, mcore=True):
                bits = read_quantised(job.source, part, self._files, dtype)
                values = torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(getattr(torch, dtype.name))
                self._filler.put(values, number, part)

    def _stage(self, device: torch.device) -> _Stage:
        if device not in self._stages:
            first = _Stage(device)
            self._stages[device] = (first, _Stage(device) if device.type == "cuda" else first)
        self._turn ^= 1
        return self._stages[device][self._turn]


class _Stage:
    """A buffer in host memory, and for a GPU one beside it: it is filled while the copies from another go on.

    Args:
        device: Where the targets are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device: torch.Tensor | None = None
        if device.type != "cuda":
            self._host = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
            return
        with torch.cuda.device(device):  # pinning memory would otherwise make a context on the first GPU
            self._host = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
            self._device = torch.empty(BUFFER_BYTES, dtype=torch.uint8, device=device)
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def room(self, num_bytes: int) -> memoryview:
        """The front of the host buffer, when nothing is copied from it any more."""
        self.finish()
        return _bytes_of(self._host[:num_bytes])

    @contextlib.contextmanager
    def filled(self, num_bytes: int) -> Iterator[torch.Tensor]:
        """The bytes of the host buffer, where the targets are; what is copied meanwhile may go on afterwards."""
        if self._device is None:
            yield self._host[:num_bytes]
            return
        with torch.cuda.stream(self._stream):
            there = self._device[:num_bytes]
            there.copy_(self._host[:num_bytes], non_blocking=True)
            yield there

    def finish(self) -> None:
        """Wait for the copies."""
        if self._device is not None:
            self._stream.synchronize()


def same_bytes(files: CountedFiles, one: StoredTensor, other: StoredTensor, box: Box) -> bool:
    """Whether two stored tensors of one dtype, each in one chunk, have the same bytes in a box."""
    itemsize = one.dtype.itemsize
    for part in split_box(box, BUFFER_BYTES // itemsize):
        found = []
        for tensor in (one, other):
            found.append(bytearray(part.num_elements * itemsize))
            _read_box(files, tensor.chunks[0], part, itemsize, memoryview(found[-1]))
        if found[0] != found[1]:
            return False
    return True


def _read_box(files: CountedFiles, chunk: Chunk, box: Box, itemsize: int, view: memoryview) -> None:
    """Fill `view` with a box of a chunk, row-major: exactly its bytes."""
    strides = row_major_strides(chunk.size)
    inner = len(box.size)
    run = itemsize
    while inner:
        inner -= 1
        run *= box.size[inner]
        if box.size[inner] != chunk.size[inner]:
            break
    origin = chunk.offset
    origin += itemsize * sum(
        (low - start) * step for low, start, step in zip(box.start, chunk.start, strides, strict=True)
    )
    outer = itertools.product(*(range(0, n * step, step) for n, step in zip(box.size[:inner], strides, strict=False)))
    for number, index in enumerate(outer):
        files.read_into(chunk.file, view[number * run : (number + 1) * run], origin + itemsize * sum(index))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.as_strided((tensor.numel(),), (1,))  # an axis of extent 1 may have any stride
    array: npt.NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return array.data
