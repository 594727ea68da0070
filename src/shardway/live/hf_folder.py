"""What a live save to a Hugging Face directory does to the disk: every rank writes its own pieces into place.

Unlike the files of a torch_dist checkpoint, these are shared by the ranks that write. A rank that was taken for lost,
and whose pieces another one has written as well, may still write: the same bytes to the same place, for it copies them
out of the model, a megabyte at a time, only as long as its call has not returned.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from shardway.core.boxes import Box, exact_cover
from shardway.core.errors import Code, Problem, Problems, ShardwayError
from shardway.core.tiles import addresses
from shardway.formats.dcp import DcpLocation
from shardway.formats.huggingface import CONFIG_FILE
from shardway.live.pieces import Mosaic, Values
from shardway.live.saving import Superseded
from shardway.live.written import WriterResult, WrittenFile, WrittenShard
from shardway.plans.chunking import split_box
from shardway.run.files import Files, failing
from shardway.run.places import in_the_way, is_unsettled
from shardway.run.publish import SharedStaging
from shardway.run.strided import scatter

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from shardway.families.mapping import ModelMapping
    from shardway.live.hf_layout import HFLayout
    from shardway.live.pieces import Part
    from shardway.live.saving import Assignment, Report
    from shardway.live.state import LiveState
    from shardway.run.pulse import Pulse

_BLOCK_BYTES = 2**20  # stays in the processor's cache on its way to the file


@dataclass(slots=True, kw_only=True)
class HuggingFaceFolder:
    """A directory of weights, as the save protocol's actions see it (`saving.SaveActions`).

    Attributes:
        folder: Where it will be.
        rank: This rank.
        state: What this rank holds, its vocabulary without padding.
        mapping: How that becomes Hugging Face tensors.
        layout: Where they will lie.
        companions: Paths or contents of the small files that go with them, by name.
        replace: Whether a checkpoint that is there already gives way.
        sync: Force everything to the device before it is published.
        made: The directories above it that were not there when the save began, innermost first.

    *Ranks*: each method says which.
    """

    folder: Path
    rank: int
    state: LiveState
    mapping: ModelMapping
    layout: HFLayout
    companions: Mapping[str, Path | bytes]
    replace: bool
    sync: bool
    made: tuple[Path, ...] = ()
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _is_over: bool = False
    _pulses: dict[str, Pulse | None] = field(default_factory=dict)

    def prepare(self, staging: str) -> None:
        """Create the staging directory and in it the files, of their final size, with their headers.

        Raises:
            ShardwayError: `destination-exists`, `destination-unwritable`, `no-space`, `io-failed`.

        *Ranks*: coordinator.
        """
        self._check_destination()
        shared = self._staging(staging)
        shared.create()
        with failing("find the free space", shared.path, Code.DESTINATION_UNWRITABLE):
            is_new = not any((shared.path / name).exists() for name in self.layout.files)
            free = shutil.disk_usage(shared.path).free
        if is_new and self.layout.num_bytes > free:
            raise ShardwayError(
                Problem(
                    code=Code.NO_SPACE,
                    what="the destination has too little free space",
                    file=self.folder,
                    facts=(f"needed {self.layout.num_bytes:,} bytes, free {free:,} bytes",),
                    cure="free space there, or choose another destination",
                )
            )
        for name, num_bytes in self.layout.files.items():
            path = shared.path / name
            with failing(f"create a file of {num_bytes:,} bytes", path):
                path.parent.mkdir(exist_ok=True)
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    os.ftruncate(descriptor, num_bytes)  # changes nothing where another coordinator has done it
                    os.pwrite(descriptor, self.layout.headers[name], 0)
                finally:
                    os.close(descriptor)
        self._show_life(staging)

    def write(self, assignment: Assignment, report: Report) -> WriterResult:
        """Write this rank's parts of the tensors that were assigned to it into their places.

        Raises:
            ShardwayError: `io-failed`, `no-space`; `cast-overflow`.

        *Ranks*: those that were assigned something.
        """
        self._show_life(assignment.staging)
        parts = Mosaic(self.mapping).parts_of(assignment.shards)
        ordered = sorted((self.layout.places[name][:2], name) for name in parts)
        values = Values(self.state, self.mapping.shifts)
        num_bytes = 0
        problems = Problems()
        touched: dict[str, None] = {}
        with Files(self._staging(assignment.staging).path, writable=True) as files:
            for (file, _), name in ordered:
                touched[file] = None
                lost = 0
                for part in parts[name]:
                    written, overflowed = self._write_part(files, part, values, report)
                    num_bytes += written
                    lost += overflowed
                if lost:
                    what = f"{lost} finite values of {name} became infinite in the cast"
                    cure = "choose a dtype with a wider range, such as bf16"
                    problems.add(Code.CAST_OVERFLOW, what, tensor=name, file=file, cure=cure)
            problems.raise_if_any()
            if self.sync:
                for file in touched:
                    files.sync(file)
                    report(0)
        name = f"{self.rank}.{assignment.first_file}"  # a part of the shared files, for the count of bytes
        return WriterResult(
            rank=self.rank,
            files=(WrittenFile(name, num_bytes, ""),) if assignment.shards else (),
            shards=tuple(WrittenShard(shard, DcpLocation(name, 0, 0), "") for shard in assignment.shards),
            objects=(),
        )

    def publish(self, staging: str, tag: str, results: Sequence[WriterResult], report: Report) -> None:
        """Prove that everything was written, and write the small files into the attempt's own directory.

        Raises:
            ShardwayError: `coverage`, `verify-failed` when a file is not as it was made; `io-failed`, `no-space`.

        *Ranks*: coordinator.
        """
        self._prove(results)
        shared = self._staging(staging)
        for name, num_bytes in self.layout.files.items():
            path = shared.path / name
            with failing(f"look for {num_bytes:,} bytes that ranks wrote", path):
                found = path.stat().st_size
            if found != num_bytes:
                facts = (f"{num_bytes} bytes expected, {found} found",)
                what, cure = f"{name} is not as it was made", "do all ranks see the same filesystem at this path?"
                raise ShardwayError(Problem(code=Code.VERIFY_FAILED, what=what, file=path, facts=facts, cure=cure))
        for name, source in {**self.companions, **self.layout.small_files}.items():
            if isinstance(source, bytes):
                contents = source
            else:
                with failing("read a file that goes with the weights", source):
                    contents = source.read_bytes()
            shared.write(tag, name, contents)
            report(len(contents))
        shared.seal(tag, self.layout.files)

    def finish(self, staging: str, tag: str, report: Report) -> None:
        """Rename the staging directory into place; done already is success.

        Raises:
            ShardwayError: `io-failed`; `destination-exists` when something else has come to lie there meanwhile.

        *Ranks*: any, several of them at once, and killed at any point of it.
        """
        shared = self._staging(staging)
        shared.publish(tag, replace=self.replace, report=report)
        shared.settle(tag)

    def abandon(self, staging: str) -> None:
        """Remove the staging directory, and what directories above it this save has made; never raises.

        *Ranks*: every participant.
        """
        pulse = self._pulses.pop(staging, None)
        if pulse is not None:
            pulse.stop()
        self._staging(staging).remove()
        with contextlib.suppress(OSError):
            for directory in self.made:
                directory.rmdir()  # succeeds only when it is empty

    def close(self) -> None:
        """Let nothing be copied out of the model any more: afterwards it may change.

        *Ranks*: local, when the save has ended.
        """
        with self._guard:
            self._is_over = True

    def _staging(self, staging: str) -> SharedStaging:
        return SharedStaging(self.folder, staging, sync=self.sync)

    def _show_life(self, staging: str) -> None:
        if self._pulses.get(staging) is None:
            self._pulses[staging] = self._staging(staging).show_life()

    def _check_destination(self) -> None:
        with failing("look at what is there", self.folder):
            if not self.folder.exists():
                return
            if not self.folder.is_dir():
                raise in_the_way(self.folder, "it is not a directory", "choose another destination")
            present = sorted(path.name for path in self.folder.iterdir())
        if not present:
            return
        if CONFIG_FILE not in present and not any(name.endswith(".safetensors") for name in present):
            listed = ", ".join(present[:4]) + (", ..." if len(present) > 4 else "")
            why = f"it is not empty and no Hugging Face checkpoint: {listed}"
            raise in_the_way(self.folder, why, "choose another destination")
        if not self.replace and not is_unsettled(self.folder):
            raise in_the_way(self.folder, "it holds a checkpoint", "choose another path, or if_exists='replace'")

    def _write_part(self, files: Files, part: Part, values: Values, report: Report) -> tuple[int, int]:
        """Write one part; returns its bytes and how many finite values a cast has made infinite."""
        name = part.tile.hf.tensor
        file, offset, dtype = self.layout.places[name]
        shape = self.mapping.hf[name]
        first, strides = addresses(part.tile.hf, Box((0,) * len(shape), shape))
        order = sorted(range(len(strides)), key=lambda axis: -strides[axis])
        there = [strides[axis] for axis in order]
        with self._guard:
            self._check_wanted()
            grid = values.of(part).permute(order)
        lost = 0
        for box in split_box(Box((0,) * grid.dim(), tuple(grid.shape)), _BLOCK_BYTES // dtype.itemsize):
            with self._guard:
                self._check_wanted()
                taken = grid[tuple(slice(low, low + size) for low, size in zip(box.start, box.size, strict=True))]
                block = torch.empty(box.size, dtype=getattr(torch, dtype.name)).copy_(taken)
                if dtype is not part.shard.dtype:
                    lost += int((torch.isinf(block) & torch.isfinite(taken).cpu()).sum())
            at = first + sum(low * stride for low, stride in zip(box.start, there, strict=True))
            scatter(files, file, offset + at * dtype.itemsize, tuple(there), _raw(block))
            report(block.numel() * dtype.itemsize)
        return grid.numel() * dtype.itemsize, lost

    def _check_wanted(self) -> None:
        if self._is_over:
            raise Superseded

    def _prove(self, results: Iterable[WriterResult]) -> None:
        boxes: dict[str, list[Box]] = {}
        for result in results:
            for item in result.shards:
                boxes.setdefault(item.shard.key, []).append(Box(item.shard.start, item.shard.size))
        problems = Problems()
        for key, shape in self.mapping.mcore.items():
            fault = exact_cover(shape, boxes.get(key, []))
            if fault is not None:
                what = f"a part of {key} was written {max(fault.times, 0)} times"
                facts = (f"from {list(fault.box.start)} of extent {list(fault.box.size)}",)
                problems.add(Code.COVERAGE, what, tensor=key, facts=facts)
        problems.raise_if_any()


def _raw(block: torch.Tensor) -> npt.NDArray[np.generic]:
    """A tensor's bits as numpy knows them."""
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    array: npt.NDArray[np.generic] = block.view(widths[block.element_size()]).numpy()
    return array
