"""Assembling what ranks wrote: the small files of a checkpoint, or every reason why there can't be one."""

from __future__ import annotations

import random

import pytest

from shardway.core.dtypes import BFLOAT16, FLOAT32, DType
from shardway.core.errors import Code, ShardwayError
from shardway.formats.dcp import DcpChunk, DcpLocation, read_metadata
from shardway.formats.record import FileDigest, Record
from shardway.formats.saved_objects import read_torch_bytes
from shardway.live.assemble import assemble
from shardway.live.records import Shard
from shardway.live.written import WriterResult, WrittenFile, WrittenObject, WrittenShard
from shardway.verification.recording import digest_bytes

CONTENT: dict[str, object] = {"singleton_local_shards": False}


def written(
    key: str,
    start: tuple[int, ...],
    size: tuple[int, ...],
    *,
    shape: tuple[int, ...] = (4, 6),
    dtype: DType = BFLOAT16,
    rank: int = 0,
    offset: int = 0,
) -> WrittenShard:
    location = DcpLocation(f"__{rank}_0.distcp", offset, 700)
    return WrittenShard(Shard(key, dtype, shape, start, size, 0), location, f"{rank:02x}{offset:04x}")


def result(rank: int, *shards: WrittenShard, objects: tuple[str, ...] = ()) -> WriterResult:
    name = f"__{rank}_0.distcp"
    places = tuple(WrittenObject(key, DcpLocation(name, 0, 9)) for key in objects)
    return WriterResult(rank=rank, files=(WrittenFile(name, 5000 + rank, "a" * 32),), shards=shards, objects=places)


def halves() -> list[WriterResult]:
    return [
        result(0, written("w", (0, 0), (2, 6)), written("b", (), (), shape=(), offset=700), objects=("o/shard_0_2",)),
        result(1, written("w", (2, 0), (2, 6), rank=1), objects=("o/shard_1_2",)),
    ]


def test_the_small_files_of_a_checkpoint() -> None:
    assembly = assemble(halves(), iteration=7, content_metadata=CONTENT)
    assert list(assembly.small_files) == [".metadata", "metadata.json", "common.pt", "train_state.pt"]
    metadata = read_metadata(assembly.small_files[".metadata"], ".metadata")
    assert metadata.tensors["w"].chunks == (
        DcpChunk((0, 0), (2, 6), DcpLocation("__0_0.distcp", 0, 700)),
        DcpChunk((2, 0), (2, 6), DcpLocation("__1_0.distcp", 0, 700)),
    )
    assert metadata.tensors["b"].shape == ()
    assert metadata.objects == {
        "o/shard_0_2": DcpLocation("__0_0.distcp", 0, 9),
        "o/shard_1_2": DcpLocation("__1_0.distcp", 0, 9),
    }
    common = read_torch_bytes(assembly.small_files["common.pt"], file="common.pt")
    assert common == {"checkpoint_version": 3.0, "iteration": 7, "content_metadata": CONTENT}
    state = read_torch_bytes(assembly.small_files["train_state.pt"], file="train_state.pt")
    assert isinstance(state, dict)
    assert state["step"].item() == 7
    assert assembly.files == {"__0_0.distcp": 5000, "__1_0.distcp": 5001}
    assert assembly.digests == {("w", (0, 0)): "000000", ("w", (2, 0)): "010000", ("b", ()): "0002bc"}
    assert (assembly.num_tensors, assembly.num_elements, assembly.num_bytes) == (2, 25, 10_001)


def test_the_order_of_the_ranks_does_not_matter() -> None:
    parts = [result(rank, written("w", (rank, 0), (1, 6), rank=rank)) for rank in range(4)]
    expected = assemble(parts, iteration=0, content_metadata=CONTENT).small_files
    random.Random(1).shuffle(parts)
    assert assemble(parts, iteration=0, content_metadata=CONTENT).small_files == expected


def test_the_record_gets_the_digests() -> None:
    record = Record(written_by="x", family="", architecture="", source="", options={})
    companions = {"hf/config.json": b"{}"}
    assembly = assemble(halves(), iteration=0, content_metadata=CONTENT, record=record, companions=companions)
    small_files = dict(assembly.small_files)
    written_record = small_files.pop("shardway.json")
    files = {name: FileDigest(5000 + rank, "a" * 32) for rank, name in enumerate(assembly.files)}
    files |= {name: digest_bytes(contents) for name, contents in (small_files | companions).items()}
    assert written_record == record.with_digests(assembly.digests, files).to_json()


def test_what_must_be_there() -> None:
    tensors = {"w": (BFLOAT16, (4, 6)), "b": (BFLOAT16, ())}
    objects = ("o/shard_0_2", "o/shard_1_2")
    assemble(halves(), iteration=0, content_metadata=CONTENT, tensors=tensors, objects=objects)
    with pytest.raises(ShardwayError) as caught:
        assemble(
            halves(),
            iteration=0,
            content_metadata=CONTENT,
            tensors={"w": (FLOAT32, (5, 6)), "other": (FLOAT32, (1,))},
            objects=["o/shard_0_2", "another"],
        )
    assert [(problem.code, problem.tensor) for problem in caught.value.problems] == [
        (Code.TENSOR_MISSING, "other"),
        (Code.TENSOR_UNEXPECTED, "b"),
        (Code.TENSOR_MISSING, "another"),
        (Code.TENSOR_UNEXPECTED, "o/shard_1_2"),
        (Code.DTYPE_MIXED, "w"),
        (Code.SHAPE_MISMATCH, "w"),
    ]


@pytest.mark.parametrize(
    ("shards", "code", "text"),
    [
        ([written("w", (0, 0), (3, 6))], Code.COVERAGE, "was not written"),
        ([written("w", (0, 0), (3, 6)), written("w", (2, 0), (2, 6))], Code.COVERAGE, "was written 2 times"),
        ([written("w", (0, 0), (4, 7))], Code.COVERAGE, "outside"),
        ([written("w", (0, 0), (4, 6), offset=4301)], Code.COVERAGE, "outside of the file"),
        ([written("w", (0, 0), (4, 6), rank=1)], Code.COVERAGE, "outside of the file"),
        ([written("w", (0,), (4,))], Code.SHAPE_MISMATCH, "axes"),
        ([written("w", (0, 0), (2, 6)), written("w", (2, 0), (2, 6), dtype=FLOAT32)], Code.DTYPE_MIXED, "float32"),
        ([written("w", (0, 0), (2, 6)), written("w", (2, 0), (2, 6), shape=(4, 8))], Code.SHAPE_MISMATCH, "[4, 8]"),
    ],
)
def test_what_does_not_cover_is_refused(shards: list[WrittenShard], code: Code, text: str) -> None:
    with pytest.raises(ShardwayError) as caught:
        assemble([result(0, *shards)], iteration=0, content_metadata=CONTENT)
    assert caught.value.codes == {code}
    assert "w" in str(caught.value)
    assert text in str(caught.value)


def test_files_and_objects_written_twice_are_refused() -> None:
    whole = written("w", (0, 0), (4, 6))
    with pytest.raises(ShardwayError) as caught:
        assemble([result(0, whole, objects=("o",)), result(0, objects=("o",))], iteration=0, content_metadata=CONTENT)
    assert [problem.code for problem in caught.value.problems] == [Code.TENSOR_DUPLICATE] * 2


def test_a_result_survives_the_journey() -> None:
    for part in halves():
        assert WriterResult.from_bytes(part.to_bytes()) == part
