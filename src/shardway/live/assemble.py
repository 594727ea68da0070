"""From what all ranks wrote to the small files that make a checkpoint of it: pure functions over plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardway.core.boxes import UNPROVEN, Box, exact_cover
from shardway.core.errors import Code, Problems
from shardway.formats.dcp import DcpChunk, DcpLocation, DcpTensor, write_metadata
from shardway.formats.iterations import TRAIN_STATE
from shardway.formats.record import RECORD_FILE, FileDigest
from shardway.formats.torch_dist import common_pt, metadata_json, train_state_pt
from shardway.verification.recording import digest_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape
    from shardway.formats.record import ChunkDigests, Record
    from shardway.live.written import WriterResult, WrittenShard


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """What is left to write when every rank has written its shards.

    Attributes:
        small_files: Name (relative to the iteration folder) and contents of every file that is not yet there.
        files: Name and bytes that each rank's file must have before the folder is published.
        digests: xxh3-128 of every chunk, as `Record` keeps them.
        num_tensors: Global tensors.
        num_elements: Elements of all of them.
        num_bytes: Bytes of the ranks' files.
    """

    small_files: Mapping[str, bytes]
    files: Mapping[str, int]
    digests: ChunkDigests
    num_tensors: int
    num_elements: int
    num_bytes: int


def assemble(
    results: Sequence[WriterResult],
    *,
    iteration: int,
    content_metadata: Mapping[str, object],
    tensors: Mapping[str, tuple[DType, Shape]] | None = None,
    objects: Sequence[str] | None = None,
    record: Record | None = None,
    companions: Mapping[str, bytes] | None = None,
) -> Assembly:
    """The metadata of a checkpoint, after a last proof that what was written covers every tensor exactly once.

    Args:
        results: What every rank that wrote has reported; the order does not matter.
        iteration: Number of the iteration; goes into ``common.pt`` and, as the step, ``train_state.pt``.
        content_metadata: `LiveState.content_metadata` of any rank.
        tensors: Dtype and global shape of the tensors that must be there, no more and no fewer; by default what the
            shards themselves say.
        objects: Keys of the objects that must be there; by default those that are.
        record: Gets the digests and becomes ``shardway.json``; by default there is none.
        companions: Contents of the files that will lie in the iteration folder beside these, by name.

    Returns:
        The same bytes for the same results, whatever their order.

    Raises:
        ShardwayError: All problems together: `coverage`, `tensor-missing`, `tensor-unexpected`, `tensor-duplicate`,
            `shape-mismatch` or `dtype-mixed`.

    *Ranks*: coordinator.
    """
    problems = Problems()
    written: dict[str, list[WrittenShard]] = {}
    places: dict[str, DcpLocation] = {}
    files: dict[str, int] = {}
    file_digests: dict[str, FileDigest] = {}
    for result in sorted(results, key=lambda result: (result.rank, result.files)):
        for name, num_bytes, digest in result.files:
            file_digests[name] = FileDigest(num_bytes, digest)
            if name in files:
                problems.add(Code.TENSOR_DUPLICATE, f"two ranks wrote a file {name}", file=name)
            files[name] = num_bytes
        for item in result.shards:
            written.setdefault(item.shard.key, []).append(item)
        for key, location in result.objects:
            if key in places:
                problems.add(Code.TENSOR_DUPLICATE, f"object {key} was written twice", tensor=key)
            places[key] = location
    for key, location in (*places.items(), *((item.shard.key, item.location) for k in written for item in written[k])):
        if location.offset + location.length > files.get(location.file, 0):
            what = f"{key} lies outside of the file that it was written to"
            problems.add(Code.COVERAGE, what, tensor=key, file=location.file)
    described = {key: _describe(key, items, problems) for key, items in sorted(written.items())}
    _compare(described, tensors, "tensor", problems)
    _compare(places, objects, "object", problems)
    for key, expected in (tensors or {}).items():
        if key in described:
            _check_kind(key, described[key], expected, problems)
    problems.raise_if_any()

    digests = {(key, item.shard.start): item.digest for key, items in written.items() for item in items}
    small_files = {
        ".metadata": write_metadata(described, dict(sorted(places.items()))),
        "metadata.json": metadata_json(),
        "common.pt": common_pt(iteration, content_metadata),
        TRAIN_STATE: train_state_pt(iteration),
    }
    if record is not None:
        others = {**small_files, **(companions or {})}
        file_digests |= {name: digest_bytes(contents) for name, contents in others.items()}
        small_files[RECORD_FILE] = record.with_digests(digests, file_digests).to_json()
    return Assembly(
        small_files=small_files,
        files=files,
        digests=digests,
        num_tensors=len(described),
        num_elements=sum(Box(chunk.start, chunk.size).num_elements for t in described.values() for chunk in t.chunks),
        num_bytes=sum(files.values()),
    )


def _describe(key: str, items: list[WrittenShard], problems: Problems) -> DcpTensor:
    """One tensor with its chunks by rising position."""
    first = items[0].shard
    for shard in (item.shard for item in items):
        _check_kind(key, DcpTensor(shard.dtype, shard.global_shape, ()), (first.dtype, first.global_shape), problems)
    boxes = [Box(item.shard.start, item.shard.size) for item in items]
    if all(len(box.start) == len(box.size) == len(first.global_shape) for box in boxes):
        fault = exact_cover(first.global_shape, boxes)
        if fault is not None:
            what = {
                -1: "lies outside of the tensor",
                0: "was not written",
                UNPROVEN: "is cut so irregularly that it can't be proven to be written once",
            }.get(fault.times, f"was written {fault.times} times")
            problems.add(
                Code.COVERAGE,
                f"a part of {key} {what}",
                tensor=key,
                facts=(f"from {list(fault.box.start)} of extent {list(fault.box.size)}",),
            )
    else:
        problems.add(Code.SHAPE_MISMATCH, f"a shard of {key} has another number of axes than the tensor", tensor=key)
    chunks = sorted(DcpChunk(item.shard.start, item.shard.size, item.location) for item in items)
    return DcpTensor(first.dtype, first.global_shape, tuple(chunks))


def _check_kind(key: str, found: DcpTensor, expected: tuple[DType, Shape], problems: Problems) -> None:
    dtype, shape = expected
    if found.dtype != dtype:
        what = f"{key} was written as {found.dtype.name} and as {dtype.name}"
        problems.add(Code.DTYPE_MIXED, what, tensor=key)
    if found.shape != shape:
        what = f"{key} was written as a tensor of shape {list(found.shape)} and as one of {list(shape)}"
        problems.add(Code.SHAPE_MISMATCH, what, tensor=key)


def _compare(found: Iterable[str], expected: Iterable[str] | None, kind: str, problems: Problems) -> None:
    if expected is None:
        return
    there, wanted = set(found), set(expected)
    for key in sorted(wanted - there):
        problems.add(Code.TENSOR_MISSING, f"{kind} {key} was not written", tensor=key)
    for key in sorted(there - wanted):
        problems.add(Code.TENSOR_UNEXPECTED, f"{kind} {key} was written but not expected", tensor=key)
