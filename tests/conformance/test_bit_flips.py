"""A single bit that is flipped anywhere in a checkpoint is found by `verify PATH`, in its file and its tensor."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, NamedTuple

import pytest
from tests.tiny import Tiny

import shardway
from shardway.formats.record import read_record
from shardway.formats.torch_dist import open_torch_dist
from shardway.verification.integrity import check_sample

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Files of which some bits carry nothing, so that flipping them need not be found. There are none: frames and padding
# are recorded like everything else.
CARRY_NOTHING: frozenset[str] = frozenset()
MODEL = Tiny(layers=3, hidden=16, ffn=24, vocab=40)


class Flipped(NamedTuple):
    """A bit that has been flipped; `tensor` is the one whose element it belongs to."""

    file: str
    offset: int
    bit: int
    tensor: str | None


class Checkpoint:
    """A checkpoint on disk, and whose elements lie where in its files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sizes = {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*") if path.is_file()}
        opened = open_torch_dist(root)
        self.spans: dict[str, list[tuple[int, int, str]]] = {}
        for name, tensor in opened.catalog.tensors.items():
            for chunk in tensor.chunks:
                end = chunk.offset + tensor.dtype.num_bytes(math.prod(chunk.size))
                file = str((opened.root / chunk.file).relative_to(root))
                self.spans.setdefault(file, []).append((chunk.offset, end, name))

    def flips(self, count: int, rng: random.Random) -> Iterator[Flipped]:
        """Flip one bit after the other, each for as long as the caller looks at it; every file gets some."""
        files = sorted(self.sizes)
        for number in range(count):
            if number % 2:
                (file,) = rng.choices(files, [self.sizes[name] for name in files])
            else:
                file = files[number // 2 % len(files)]
            offset, bit = rng.randrange(self.sizes[file]), rng.randrange(8)
            inside = (name for begin, end, name in self.spans.get(file, ()) if begin <= offset < end)
            self.flip(file, offset, bit)
            yield Flipped(file, offset, bit, next(inside, None))
            self.flip(file, offset, bit)

    def flip(self, file: str, offset: int, bit: int) -> None:
        with (self.root / file).open("r+b", buffering=0) as opened:
            opened.seek(offset)
            (value,) = opened.read(1)
            opened.seek(offset)
            opened.write(bytes((value ^ 1 << bit,)))

    def damage(self) -> list[tuple[str, str | None]]:
        """File and tensor of everything that `verify` finds wrong."""
        try:
            report = shardway.verify(self.root, workers=1)
        except shardway.ShardwayError as error:
            if not error.codes <= {"record-invalid", "tracker-invalid"}:
                raise
            return [(str(problem.file), problem.tensor) for problem in error.problems]
        assert report.equal == (not report.differences)
        assert {difference.kind for difference in report.differences} <= {"damaged"}
        return [(difference.file or "", difference.tensor or None) for difference in report.differences]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """An import in several files."""
    path = tmp_path_factory.mktemp("flips")
    source = MODEL.write(path / "hf")
    shardway.import_hf(source, path / "m", iteration=10, max_file_size=12_000, fsync=False)
    return Checkpoint(path / "m")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A live save, in two files, of a model of no known family."""
    torch = pytest.importorskip("torch")
    from shardway.live.save import CheckpointConfig, Companions, save_megatron_model

    path = tmp_path_factory.mktemp("flips")
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.LayerNorm(30), torch.nn.Linear(30, 20))
    save_megatron_model(
        model,
        path / "m",
        companions=Companions(files={"tokenizer.json": b"{}" * 40}),
        config=CheckpointConfig(fsync=False, writers_per_rank=2, grace_seconds=0.0),
    )
    return Checkpoint(path / "m")


def test_what_is_covered(imported: Checkpoint, saved: Checkpoint) -> None:
    assert {"shardway.json", ".metadata", "common.pt", "metadata.json", "train_state.pt", "hf/config.json"} < {
        name.partition("/")[2] for name in imported.sizes if "/" in name
    }
    assert {"latest_checkpointed_iteration.txt", "latest_train_state.pt"} < imported.sizes.keys()
    assert len(imported.spans) > 2
    assert len(saved.spans) == 2
    record = read_record(saved.root / "iter_0000000")
    assert record is not None
    assert (record.family, record.architecture, record.source) == (None, None, "live")
    assert shardway.inspect(saved.root).written_by == record.written_by
    for checkpoint in (imported, saved):
        report = shardway.verify(checkpoint.root)
        assert report.equal
        assert report.b is None
        assert report.num_tensors == len(open_torch_dist(checkpoint.root).catalog.tensors)
        assert report.num_bytes == sum(
            size for name, size in checkpoint.sizes.items() if "/" in name and not name.endswith("shardway.json")
        )


@pytest.mark.parametrize(("name", "count"), [("imported", 1000), ("saved", 300)])
def test_every_flipped_bit_is_found_and_located(name: str, count: int, request: pytest.FixtureRequest) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(name)
    files = set()
    in_tensors = 0
    for flipped in checkpoint.flips(count, random.Random(name)):
        damage = checkpoint.damage()
        if not damage and flipped.file in CARRY_NOTHING:
            continue
        assert damage, f"not found: {flipped}"
        assert {file for file, _ in damage} == {str(checkpoint.root / flipped.file)}, (flipped, damage)
        if flipped.tensor is not None:
            assert [tensor for _, tensor in damage] == [flipped.tensor], (flipped, damage)
            in_tensors += 1
        files.add(flipped.file)
    assert files == checkpoint.sizes.keys()
    assert in_tensors > count // 10
    assert not checkpoint.damage()


def test_bits_around_a_chunk_name_its_tensor(imported: Checkpoint) -> None:
    file, spans = next(iter(imported.spans.items()))
    begin, end, name = sorted(spans)[1]
    for offset in (begin - 1, begin - 40, end, end + 30):
        imported.flip(file, offset, 3)
        assert imported.damage() == [(str(imported.root / file), name)], offset
        imported.flip(file, offset, 3)


def test_a_sample_finds_what_it_reads(imported: Checkpoint) -> None:
    opened = open_torch_dist(imported.root)
    total = opened.catalog.num_bytes
    assert check_sample(opened) == total
    assert 0 < check_sample(opened, max_bytes=total // 4, seed=1) <= total // 4
    file, spans = next(iter(imported.spans.items()))
    begin, _, name = spans[0]
    imported.flip(file, begin, 0)
    with pytest.raises(shardway.ShardwayError) as caught:
        check_sample(opened)
    found = 0
    for seed in range(40):
        try:
            check_sample(opened, max_bytes=total // 2, seed=seed)
        except shardway.ShardwayError:
            found += 1
    assert check_sample(opened, tensors=opened.catalog.tensors.keys() - {name}) < total
    imported.flip(file, begin, 0)
    (problem,) = caught.value.problems
    assert (problem.code, problem.tensor, problem.file) == ("digest-mismatch", name, file.partition("/")[2])
    assert 0 < found < 40
