"""Digests of everything in a checkpoint that is no tensor's element, as they go into its record."""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING

import xxhash

from shardway.formats.record import FileDigest
from shardway.plans.streams import frame
from shardway.run.files import failing

if TYPE_CHECKING:
    from pathlib import Path

    from shardway.plans.model import Plan

_STEP_BYTES = 2**20


def digest_small_files(plan: Plan, written: Path) -> dict[str, FileDigest]:
    """What the record says about the files of a conversion that hold no chunks; only those that were copied are read.

    Args:
        plan: The conversion that was executed.
        written: Where its files are now.

    Raises:
        ShardwayError: `io-failed`.
    """
    return {
        **{name: digest_bytes(contents) for name, contents in plan.small_files.items()},
        **{name: _digest_file(written / name) for name, _ in plan.copied_files},
    }


def digest_bytes(contents: bytes) -> FileDigest:
    """What a record says about a file that holds no chunks."""
    return FileDigest(len(contents), xxhash.xxh3_128_hexdigest(contents))


def _digest_file(path: Path) -> FileDigest:
    hasher = xxhash.xxh3_128()
    num_bytes = 0
    with failing("read", path), path.open("rb", buffering=0) as file:
        while data := file.read(_STEP_BYTES):
            hasher.update(data)
            num_bytes += len(data)
    return FileDigest(num_bytes, hasher.hexdigest())


def digest_frames(plan: Plan) -> dict[str, FileDigest]:
    """What the record will say about the files that hold chunks: from the plan, so that frames written otherwise show.

    Args:
        plan: An import or a migration.
    """
    hashers = {target.name: xxhash.xxh3_128() for target in plan.targets}
    literals = {target.name: list(target.literals) for target in plan.targets}
    blobs = ((chunk.file, chunk.offset, chunk, stream.dtype) for stream in plan.streams for chunk in stream.chunks)
    for file, _, chunk, dtype in sorted(blobs, key=itemgetter(0, 1)):
        hasher, waiting = hashers[file], literals[file]
        at, (head, tail, _) = frame(plan, dtype, chunk)
        while waiting and waiting[0][0] < at:
            hasher.update(waiting.pop(0)[1])
        hasher.update(head)
        hasher.update(tail)
    for name, waiting in literals.items():
        for _, literal in waiting:
            hashers[name].update(literal)
    return {target.name: FileDigest(target.num_bytes, hashers[target.name].hexdigest()) for target in plan.targets}
