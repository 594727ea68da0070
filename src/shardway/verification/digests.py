"""sha256 of every global tensor's elements, however they are chunked on disk."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from shardway.plans.streams import build_streams
from shardway.run.engine import Batch, Engine, Worker
from shardway.run.files import Files, page_buffer
from shardway.run.progress import Meter

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardway.core.tensors import Catalog
    from shardway.plans.model import Stream
    from shardway.run.progress import Progress

_READ_BYTES = 2**20


def tensor_digests(
    catalog: Catalog, num_workers: int, progress: Callable[[Progress], None] | None = None
) -> dict[str, str]:
    """Hex sha256 over the row-major, little-endian bytes of every tensor.

    Args:
        catalog: Tensors of whole-byte elements; their chunks cover them exactly once.
        num_workers: Threads; a tensor is read by one of them.
        progress: Called as reading proceeds.

    Raises:
        ShardwayError: `io-failed`, `source-changed`.
    """
    slabs: dict[str, list[Stream]] = {name: [] for name in catalog.tensors}
    for stream in build_streams((), {}, catalog.tensors):
        slabs[stream.tensor].append(stream)
    work = [Batch(name, tuple(sorted(streams, key=_start))) for name, streams in slabs.items() if streams]
    meter = Meter("digest", catalog.num_bytes, progress)
    hashers = {name: hashlib.sha256() for name in catalog.tensors}
    with Files(catalog.root) as files:
        Engine(work, lambda: _Digester(files, hashers, meter.advance), num_workers).run()
    return {name: hasher.hexdigest() for name, hasher in hashers.items()}


class _Digester(Worker):
    """Feeds the slabs of a tensor, in order, to its hasher."""

    def __init__(self, files: Files, hashers: dict[str, hashlib._Hash], advance: Callable[[int], None]) -> None:
        self._files = files
        self._hashers = hashers
        self._advance = advance
        self._buffer = page_buffer(_READ_BYTES)

    def move(self, stream: Stream) -> None:
        hasher = self._hashers[stream.tensor]
        if len(stream.chunks) > 1:
            self._interleaved(stream, hasher)
            return
        (chunk,) = stream.chunks
        for low in range(0, stream.num_bytes, _READ_BYTES):
            view = self._buffer[: min(_READ_BYTES, stream.num_bytes - low)]
            self._files.read_into(chunk.file, view, chunk.offset + low)
            hasher.update(view)
            self._advance(len(view))

    def _interleaved(self, stream: Stream, hasher: hashlib._Hash) -> None:
        import xxhash

        from shardway.run.blocks import blocks_of, read_chunks

        unused = [xxhash.xxh3_128() for _ in stream.chunks]
        done = [0] * len(stream.chunks)
        for block in blocks_of(stream):
            values = read_chunks(stream, block, self._files, unused, done)
            hasher.update(values.data)
            self._advance(values.nbytes)


def _start(stream: Stream) -> tuple[int, ...]:
    return stream.box.start
