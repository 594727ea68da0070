"""The bytes of live tensors in file order, block by block, without a second copy of any tensor.

Host tensors that are contiguous are read where they are. Everything else passes through two buffers in turn: while
the bytes of one are being written, the copy that fills the other is under way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from shardway.core.boxes import whole
from shardway.plans.chunking import split_box

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    import numpy.typing as npt

BUFFER_BYTES = 8 * 2**20


class Block(NamedTuple):
    """Consecutive bytes of one tensor, valid until the next block is asked for.

    Attributes:
        number: Which of the tensors.
        view: The bytes.
    """

    number: int
    view: memoryview


class Stage(Protocol):
    """A buffer in host memory, and the copies that fill it."""

    def begin(self, source: torch.Tensor) -> None:
        """Begin to copy a tensor of at most `BUFFER_BYTES` into the buffer, row-major; may return before it is done."""

    def finish(self) -> memoryview:
        """Wait for the copy that was begun last, and return its bytes."""


class HostStage:
    """A buffer for host tensors that are not contiguous; the copy is done when `begin` returns."""

    def __init__(self) -> None:
        self._buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
        self._num_bytes = 0

    def begin(self, source: torch.Tensor) -> None:
        """Copy at once."""
        _place(self._buffer, source).copy_(source)
        self._num_bytes = source.numel() * source.element_size()

    def finish(self) -> memoryview:
        """The bytes of the last copy."""
        return _bytes_of(self._buffer[: self._num_bytes])


class CudaStage:
    """A pinned buffer that a stream of its own fills while the processor does something else.

    Args:
        device: The GPU that the tensors are on; their last update must be complete (see `synchronise`).
    """

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._num_bytes = 0

    def begin(self, source: torch.Tensor) -> None:
        """Enqueue the copy on the stage's own stream, after what this thread has enqueued."""
        self._stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(self._stream):
            _place(self._buffer, source).copy_(source, non_blocking=True)
            source.record_stream(self._stream)
            self._done.record(self._stream)
        self._num_bytes = source.numel() * source.element_size()

    def finish(self) -> memoryview:
        """Wait for the copy alone, not for other work on the GPU."""
        self._done.synchronize()
        return _bytes_of(self._buffer[: self._num_bytes])


def synchronise(devices: Iterable[torch.device]) -> None:
    """Wait until what the calling thread has enqueued on its current streams of these GPUs is done."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


class Blocks:
    """Turns tensors into blocks; each thread that writes has one of its own.

    Holds at most two buffers of `BUFFER_BYTES` for each device, made when the first tensor needs them.
    """

    def __init__(self) -> None:
        self._stages: dict[torch.device, tuple[Stage, Stage]] = {}

    def of(self, tensors: Iterable[torch.Tensor]) -> Iterator[Block]:
        """The blocks of several tensors, in order; the copy behind the next block runs while one is in use.

        Args:
            tensors: Of any device, dtype of whole bytes and stride. Each is asked for when its turn is near.

        Yields:
            For each tensor its bytes in row-major order, in at least one block.
        """
        begun: tuple[int, Stage | memoryview] | None = None
        turns: dict[torch.device, int] = {}
        for number, tensor in enumerate(tensors):
            for part in _parts(tensor):
                following: Stage | memoryview
                if _is_plain(part):
                    following = _bytes_of(part)
                else:
                    turn = turns[part.device] = turns.get(part.device, 1) ^ 1
                    following = self._stage(part.device, turn)
                    following.begin(part)
                if begun is not None:
                    yield _finished(*begun)
                begun = (number, following)
        if begun is not None:
            yield _finished(*begun)

    def _stage(self, device: torch.device, turn: int) -> Stage:
        stages = self._stages.get(device)
        if stages is None:
            stages = self._stages[device] = (self._make_stage(device), self._make_stage(device))
        return stages[turn]

    def _make_stage(self, device: torch.device) -> Stage:
        return CudaStage(device) if device.type == "cuda" else HostStage()


def _finished(number: int, begun: Stage | memoryview) -> Block:
    return Block(number, begun if isinstance(begun, memoryview) else begun.finish())


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor's bytes can be read where they are."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor in row-major order, cut so that each part fits in a buffer; plain tensors stay whole."""
    most = BUFFER_BYTES // tensor.element_size()
    if _is_plain(tensor) or tensor.numel() <= most:
        yield tensor
        return
    if tensor.is_contiguous():
        tensor = tensor.reshape(-1)
    for box in split_box(whole(tuple(tensor.shape)), most):
        yield tensor[tuple(slice(start, start + size) for start, size in zip(box.start, box.size, strict=True))]


def _place(buffer: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The front of a byte buffer as a tensor of the source's shape and dtype."""
    num_bytes = source.numel() * source.element_size()
    return buffer[:num_bytes].view(source.dtype).view(source.shape)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.as_strided((tensor.numel(),), (1,))  # an axis of extent 1 may have any stride
    array: npt.NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return array.data
