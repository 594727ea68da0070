"""Random small models with random bits: imports against an independent oracle, exports against the original."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.property.tilings import boxes, chunkings, count, mosaics
from tests.tiny import ARCHITECTURES, Tiny, bits, read_distcp, read_safetensors, same, write_chunks, write_model

import shardway
from shardway.core.tiles import restrict
from shardway.formats.torch_dist import open_torch_dist
from shardway.plans import imports
from shardway.plans.chunking import assign_files, chunk_boxes, split_box
from shardway.run import blocks, engine, mover
from shardway.run.files import OpenFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.property.tilings import Mosaic
    from tests.tiny import Array

    from shardway.core.boxes import Box
    from shardway.core.tensors import Shape

EXAMPLES = settings(max_examples=30, deadline=None)


@st.composite
def models(draw: st.DrawFn) -> Tiny:
    """Any dense model of the four families, in dimensions that share no factor but where they have to."""
    groups = draw(st.integers(1, 3))
    return Tiny(
        architecture=draw(st.sampled_from(ARCHITECTURES)),
        layers=draw(st.integers(1, 3)),
        hidden=draw(st.integers(1, 9)),
        heads=groups * draw(st.integers(1, 3)),
        groups=groups,
        head_dim=draw(st.integers(1, 5)),
        ffn=draw(st.integers(1, 7)),
        vocab=draw(st.integers(1, 17)),
        tied=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float32", "float64"])),
    )


class Ways(NamedTuple):
    """Everything about a run that must not show in its result."""

    workers: int
    num_files: int
    max_file_size: int
    max_shard_size: int
    buffer: int
    block: int
    batch: int
    portion: int
    few_runs: int


WAYS = st.builds(
    Ways,
    workers=st.integers(1, 4),
    num_files=st.integers(1, 3),
    max_file_size=st.sampled_from([1, 3000, 20_000, 4 << 30]),
    max_shard_size=st.sampled_from([1, 100, 400, 5 * 10**9]),
    buffer=st.integers(1100, 1200),
    block=st.sampled_from([1, 64, 1 << 20]),
    batch=st.sampled_from([1, 500, 1 << 20]),
    portion=st.sampled_from([1, 3, 64]),
    few_runs=st.sampled_from([0, 64]),
)


@contextlib.contextmanager
def limited(ways: Ways) -> Iterator[None]:
    with (
        mock.patch.multiple(mover, BUFFER_BYTES=ways.buffer, _SHORT_RUN_BYTES=1 << 40, _FEW_RUNS=ways.few_runs),
        mock.patch.multiple(blocks, BLOCK_BYTES=ways.block),
        mock.patch.multiple(engine, _BATCH_BYTES=ways.batch, _PORTION=ways.portion),
        mock.patch.multiple(imports, _MAX_FRAME_BYTES=900),
    ):
        yield


@EXAMPLES
@given(model=models(), layout=st.sampled_from(["stacked", "per-layer"]), ways=WAYS, seed=st.integers(0, 2**32))
def test_import_and_export(model: Tiny, layout: str, ways: Ways, seed: int) -> None:
    weights = model.weights(seed)
    with tempfile.TemporaryDirectory() as directory, limited(ways):
        root = Path(directory)
        model.write(root / "hf", seed=seed, num_files=ways.num_files)
        report = shardway.import_hf(
            root / "hf",
            root / "mcore",
            layout=layout,
            workers=ways.workers,
            max_file_size=ways.max_file_size,
            fsync=False,
            verify=True,
        )
        assert same(read_distcp(root / "mcore"), model.megatron(weights, per_layer=layout == "per-layer"))
        assert report.num_bytes == sum(array.nbytes for array in weights.values())
        assert shardway.verify(root / "hf", root / "mcore").equal
        shardway.export_hf(
            root / "mcore",
            root / "back",
            workers=ways.workers,
            max_shard_size=ways.max_shard_size,
            fsync=False,
            verify=True,
        )
        assert same(bits(read_safetensors(root / "back").items()), weights)
        assert list(read_safetensors(root / "hf")) != [] != list(read_safetensors(root / "back"))
        assert shardway.verify(root / "hf", root / "back").equal
        for name in ("config.json", "tokenizer.json"):
            assert (root / "back" / name).read_bytes() == (root / "hf" / name).read_bytes()
        assert sorted(path.name for path in root.iterdir()) == ["back", "hf", "mcore"]
        assert sorted(path.name for path in (root / "mcore").iterdir()) == [
            "iter_0000000",
            "latest_checkpointed_iteration.txt",
            "latest_train_state.pt",
        ]


@EXAMPLES
@given(model=models(), ways=WAYS)
def test_every_byte_is_written_once(model: Tiny, ways: Ways) -> None:
    written: dict[tuple[str, str], list[tuple[int, int]]] = {}
    original = OpenFile.write_from

    def write_from(self: OpenFile, view: memoryview | bytes, offset: int) -> None:
        written.setdefault((self.path.parent.name, self.path.name), []).append((offset, offset + len(view)))
        original(self, view, offset)

    with tempfile.TemporaryDirectory() as directory, limited(ways):
        root = Path(directory)
        model.write(root / "hf")
        with mock.patch.object(OpenFile, "write_from", write_from):
            shardway.import_hf(
                root / "hf", root / "mcore", max_file_size=ways.max_file_size, workers=ways.workers, fsync=False
            )
            shardway.export_hf(
                root / "mcore", root / "back", max_shard_size=ways.max_shard_size, workers=ways.workers, fsync=False
            )
        sizes = {path.name: path.stat().st_size for path in (root / "mcore/iter_0000000").glob("*.distcp")}
        sizes |= {path.name: path.stat().st_size for path in (root / "back").glob("*.safetensors")}
    assert {name for _, name in written} == set(sizes)
    for (_, name), spans in written.items():
        at = 0
        for begin, end in sorted(spans):
            assert begin == at, name
            at = end
        assert at == sizes[name], name


@EXAMPLES
@given(model=models(), limit=st.integers(2000, 30_000))
def test_no_file_grows_past_its_limit(model: Tiny, limit: int) -> None:
    with tempfile.TemporaryDirectory() as directory, mock.patch.multiple(imports, BLOCK_BYTES=64, _MAX_FRAME_BYTES=900):
        root = Path(directory)
        model.write(root / "hf")
        shardway.import_hf(root / "hf", root / "mcore", max_file_size=limit, fsync=False)
        sizes = [path.stat().st_size for path in (root / "mcore/iter_0000000").glob("*.distcp")]
        shardway.export_hf(root / "mcore", root / "back", max_shard_size=limit, fsync=False)
        assert all(path.stat().st_size <= limit + 30_000 for path in (root / "back").glob("*.safetensors"))
    assert max(sizes) <= limit


def test_results_are_the_same_whatever_the_ways(tmp_path: Path) -> None:
    model = Tiny(layers=3, hidden=33, ffn=65, vocab=101, attention_bias=True)
    model.write(tmp_path / "hf1")
    model.write(tmp_path / "hf3", num_files=3)
    found = []
    for k, (source, workers, few_runs) in enumerate([("hf1", 1, 64), ("hf1", 4, 64), ("hf3", 3, 64), ("hf1", 2, 0)]):
        with mock.patch.multiple(mover, _FEW_RUNS=few_runs, _SHORT_RUN_BYTES=1 << 40):
            shardway.import_hf(tmp_path / source, tmp_path / f"m{k}", workers=workers, fsync=False)
            shardway.export_hf(tmp_path / f"m{k}", tmp_path / f"b{k}", workers=workers, fsync=False)
        folder = tmp_path / f"m{k}/iter_0000000"
        found.append(
            {path.name: path.read_bytes() for path in [*folder.glob("*.distcp"), *(tmp_path / f"b{k}").iterdir()]}
            | {".metadata": (folder / ".metadata").read_bytes()}
        )
        record = json.loads((folder / "shardway.json").read_text())
        found[-1]["digests"] = json.dumps(record["digests"]).encode()
    assert found[0] == found[1] == found[3]
    # The order in which the source's files hold the tensors is not the model's, and does not show.
    assert found[0]["model.safetensors"] == found[2]["model.safetensors"]
    assert found[0]["digests"] == found[2]["digests"]


@pytest.mark.parametrize("rows", [3000, 700])
@pytest.mark.parametrize("max_shard_size", ["5GB", "400KB"])
def test_a_tied_head_that_is_stored_is_restored(rows: int, max_shard_size: str, tmp_path: Path) -> None:
    """Larger than the buffer that bytes pass through, and smaller: both tensors come from the same bytes."""
    model = Tiny(tied=True, vocab=rows, hidden=256, layers=1)
    weights = model.weights()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    write_model(tmp_path / "hf", model.config, weights)
    shardway.import_hf(tmp_path / "hf", tmp_path / "mcore", fsync=False)
    assert "output_layer.weight" not in open_torch_dist(tmp_path / "mcore").catalog.tensors
    shardway.export_hf(tmp_path / "mcore", tmp_path / "back", max_shard_size=max_shard_size, fsync=False)
    assert same(bits(read_safetensors(tmp_path / "back").items()), weights)
    assert shardway.verify(tmp_path / "hf", tmp_path / "mcore").equal


@pytest.mark.parametrize("layout", ["stacked", "per-layer"])
def test_torch_reads_what_the_oracle_expects(layout: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests.oracle import read_torch_dist

    for architecture in ARCHITECTURES:
        model = Tiny(architecture=architecture, layers=3, attention_bias=True, mlp_bias=True)
        model.write(tmp_path / architecture)
        out = tmp_path / f"{architecture}-mcore"
        shardway.import_hf(tmp_path / architecture, out, layout=layout, max_file_size=20_000, fsync=False)
        tensors, objects = read_torch_dist(out / "iter_0000000")
        import torch

        read = {name: tensor.view(torch.int16).numpy().view(np.uint16) for name, tensor in tensors.items()}
        assert same(read, model.megatron(model.weights(), per_layer=layout == "per-layer"))
        assert all(name.rpartition("/")[0].endswith("._extra_state") for name in objects)


@settings(max_examples=100, deadline=None)
@given(mosaic=mosaics(), limit=st.integers(0, 50))
def test_chunks_follow_each_other_and_cover_the_tensor(mosaic: Mosaic, limit: int) -> None:
    found = chunk_boxes(mosaic.mcore, mosaic.tiles, limit)
    numbers = np.arange(int(np.prod(mosaic.mcore))).reshape(mosaic.mcore)
    seen: list[int] = []
    for box, tile_numbers in found:
        reached = [number for number, tile in enumerate(mosaic.tiles) if restrict(tile, box, mcore=True)]
        assert set(reached) <= set(tile_numbers)
        where = tuple(slice(first, first + size) for first, size in zip(box.start, box.size, strict=True))
        seen += numbers[where].reshape(-1).tolist()
        assert box.num_elements <= max(limit, 1)
    assert seen == list(range(numbers.size))


@settings(max_examples=100, deadline=None)
@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), limit=st.integers(0, 40), data=st.data())
def test_split_box(shape: Shape, limit: int, data: st.DataObject) -> None:
    box = data.draw(boxes(shape))
    parts = split_box(box, limit) if box.num_elements else []
    assert (count(shape, parts) == count(shape, [box])).all()
    assert all(part.num_elements <= max(limit, 1) for part in parts)
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    order = [
        int(number)
        for part in parts
        for number in numbers[tuple(slice(a, a + n) for a, n in zip(part.start, part.size, strict=True))].reshape(-1)
    ]
    assert order == sorted(order)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 100), max_size=40), limit=st.integers(1, 300))
def test_assign_files(sizes: list[int], limit: int) -> None:
    numbers = assign_files(sizes, limit)
    assert len(numbers) == len(sizes)
    assert numbers == sorted(numbers)
    assert sorted(set(numbers)) == list(range(len(set(numbers))))
    for number in set(numbers):
        mine = [size for size, file in zip(sizes, numbers, strict=True) if file == number]
        assert len(mine) == 1 or sum(mine) <= limit


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_chunking_is_exported(data: st.DataObject) -> None:
    """A checkpoint whose chunks are bricks, as tensor, pipeline and data parallel ranks together may leave them."""
    pytest.importorskip("torch")
    model = Tiny(hidden=4, heads=2, groups=2, head_dim=2, ffn=3, vocab=5, layers=2)
    weights = model.weights(data.draw(st.integers(0, 1000)))
    chunked: dict[str, list[tuple[Box, Array]]] = {}
    for name, array in model.megatron(weights).items():
        bricks = data.draw(chunkings(array.shape), label=name)
        chunked[name] = [
            (box, array[tuple(slice(a, a + n) for a, n in zip(box.start, box.size, strict=True))]) for box in bricks
        ]
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        model.write(root / "hf")
        write_chunks(root / "iter_0000001", {n: a.shape for n, a in model.megatron(weights).items()}, chunked)
        shardway.export_hf(root / "iter_0000001", root / "back", hf=root / "hf", fsync=False, verify=True)
        assert same(bits(read_safetensors(root / "back").items()), weights)
