"""Quantising tensors of a Megatron checkpoint while they are exported, a few rows of blocks at a time."""

from __future__ import annotations

import threading
from operator import mul
from typing import TYPE_CHECKING, Any

import numpy as np

from shardway.core.boxes import Box, row_major_strides
from shardway.core.dtypes import FLOAT32
from shardway.core.errors import Code, Problem, ShardwayError
from shardway.plans.model import Direction
from shardway.plans.requantised import scale_of
from shardway.run.blocks import read_pieces
from shardway.run.engine import Engine, Worker, batches
from shardway.run.files import Files
from shardway.run.fp8 import Blocks, quantise
from shardway.run.losses import Exactness, Losses

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy.typing as npt

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Catalog, StoredTensor
    from shardway.plans.model import Plan, Stream
    from shardway.plans.requantised import Requantised

    Array = npt.NDArray[Any]

_VALUES = 2**19  # of a band that is read at once: rows of blocks, at least one
_AT_ONCE = 2**17  # that are quantised at once, which takes some 60 bytes for each


class Requantiser(Worker):
    """Quantises tensors; any thread may use it.

    Args:
        plan: The export.
        mcore: Open files of the Megatron side.
        hf: Open files of the Hugging Face side, to be written; or, where `compared` is given, to be read.
        advance: Called with the bytes of codes that have passed.
        compared: Where tensors are that should be what would be written.

    Attributes:
        exactness: How well all tensors so far give their values back.
        differing: Tensors that are not what would be written.
    """

    def __init__(
        self,
        plan: Plan,
        mcore: Files,
        hf: Files,
        advance: Callable[[int], None],
        compared: Mapping[str, StoredTensor] | None = None,
    ) -> None:
        self.exactness = Exactness()
        self.differing: set[str] = set()
        self._plan = plan._replace(direction=Direction.IMPORT, hf=plan.mcore, shifts={})
        self._wanted: Requantised = _requantised(plan)
        self._tensors = plan.hf.tensors if compared is None else compared
        self._compared = compared is not None
        self._mcore = mcore
        self._hf = hf
        self._advance = advance
        self._lock = threading.Lock()

    def run(self, num_workers: int) -> None:
        """Work through all tensors.

        Raises:
            ShardwayError: `cast-overflow` for infinite values; `io-failed`, `no-space`, `source-changed`.
        """
        Engine(batches(self._wanted.streams), lambda: self, num_workers).run()

    def move(self, stream: Stream) -> None:
        """Quantise one tensor."""
        rows, columns = self._wanted.block
        shape = stream.box.size
        step = max(1, _VALUES // (rows * shape[-1])) * rows
        wide = stream._replace(dtype=FLOAT32)
        dtype = self._plan.hf.tensors[stream.pieces[0].tile.hf.tensor].dtype
        exact, error = True, 0.0
        for outer in np.ndindex(*shape[:-2]):
            for low in range(0, shape[-2], step):
                size = (*(1,) * len(outer), min(step, shape[-2] - low), shape[-1])
                box = Box((*outer, low, 0), size)
                values = read_pieces(self._plan, wide, box, self._mcore, Losses()).view(np.float32)
                found = _quantise(values.reshape(size[-2:]), (rows, columns), dtype, powers=self._wanted.powers)
                if np.isinf(values).any():
                    raise _infinite(stream.tensor)
                exact = exact and bool(found.exact.all())
                error = max(error, found.error)
                self._put(stream.tensor, box.start, found.codes)
                self._put(scale_of(stream.tensor), (*outer, low // rows, 0), found.scales)
                self._advance(found.codes.size)
        with self._lock:
            self.exactness = self.exactness.plus(stream.tensor, exact=exact, error=error)

    def _put(self, name: str, start: tuple[int, ...], array: Array) -> None:
        """Write rows of a tensor, or look whether they are there."""
        tensor = self._tensors[name]
        chunk = tensor.chunks[0]
        at = sum(map(mul, start, row_major_strides(tensor.shape)))
        offset = chunk.offset + at * array.itemsize
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        if not self._compared:
            self._hf.write_from(chunk.file, data, offset)
            return
        there = bytearray(len(data))
        self._hf.read_into(chunk.file, memoryview(there), offset)
        if there != data:
            with self._lock:
                self.differing.add(name)


def check_requantised(plan: Plan, found: Catalog, num_workers: int) -> set[str]:
    """Which tensors of codes or scales are not what an export would write.

    Args:
        plan: The export.
        found: The Hugging Face directory; its tensors have the names, dtypes and shapes of the plan's.
        num_workers: Threads.
    """
    if plan.requantised is None:
        return set()
    with Files(found.root) as hf, Files(plan.mcore.root) as mcore:
        checker = Requantiser(plan, mcore, hf, lambda _: None, found.tensors)
        checker.run(num_workers)
    return checker.differing


def _requantised(plan: Plan) -> Requantised:
    if plan.requantised is None:
        raise RuntimeError("the plan quantises nothing")
    return plan.requantised


def _quantise(values: Array, block: tuple[int, int], dtype: DType, *, powers: bool) -> Blocks:
    """Quantise a matrix; codes [rows, columns] and scales [rows of blocks, columns of blocks] of the result."""
    rows, columns = values.shape
    down, across = -(-rows // block[0]), -(-columns // block[1])
    padded = np.zeros((down * block[0], across * block[1]), np.float32)
    padded[:rows, :columns] = values
    blocks = padded.reshape(down, block[0], across, block[1]).transpose(0, 2, 1, 3)
    flat = np.ascontiguousarray(blocks).reshape(down * across, -1)
    step = max(1, _AT_ONCE // flat.shape[1])
    parts = [quantise(flat[low : low + step], dtype, powers=powers) for low in range(0, len(flat), step)]
    codes, scales, exact = (np.concatenate(each) for each in list(zip(*parts, strict=True))[:3])
    turned = codes.reshape(down, across, *block).transpose(0, 2, 1, 3).reshape(padded.shape)[:rows, :columns]
    return Blocks(turned, scales.reshape(down, across), exact, max(part.error for part in parts))


def _infinite(tensor: str) -> ShardwayError:
    return ShardwayError(
        Problem(
            code=Code.CAST_OVERFLOW,
            what=f"{tensor} holds infinite values, which FP8 has no code for",
            tensor=tensor,
            cure="export without --quantize",
        )
    )
