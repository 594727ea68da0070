"""Boxes of a model's tensors filled from files, and taken apart again, against numpy."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.property.tilings import Mosaic, affine_tiles, chunkings, indices, mosaics, numbered

from shardway.core.boxes import Box
from shardway.core.dtypes import dtype_of_torch
from shardway.core.tensors import Chunk, Shape, StoredTensor
from shardway.core.tiles import Side, Tile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

torch = pytest.importorskip("torch")

from shardway.live import reader  # noqa: E402
from shardway.live.cuts import cuts_of  # noqa: E402
from shardway.live.memory import Deferred, Target, grid_of  # noqa: E402
from shardway.live.pieces import indexed  # noqa: E402
from shardway.live.reader import CountedFiles, Filler, Lane, Region, jobs_of  # noqa: E402
from shardway.live.records import Shard  # noqa: E402

EXAMPLES = settings(max_examples=80, deadline=None)
Array = np.ndarray[Any, Any]


def stored(root: Path, name: str, array: Array, boxes: list[Any]) -> StoredTensor:
    """A bfloat16 tensor in a file of its own, in chunks with gaps between them."""
    chunks = []
    with (root / name).open("wb") as file:
        for box in boxes:
            file.write(b"gap")
            chunks.append(Chunk(box.start, box.size, name, file.tell()))
            file.write(np.ascontiguousarray(array[slices(box)]).tobytes())
    return StoredTensor(name, dtype_of_torch("bfloat16"), array.shape, tuple(chunks))


def slices(box: Any) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(box.start, box.size, strict=True))


def keeping(finished: list[tuple[int, Any]], number: int) -> Callable[[Sequence[Any]], None]:
    return lambda parts: finished.append((number, parts[0]))


@EXAMPLES
@given(mosaic=mosaics(), data=st.data())
def test_boxes_are_filled(mosaic: Mosaic, data: st.DataObject) -> None:
    values = {name: numbered(shape, 7919 * place) for place, (name, shape) in enumerate(mosaic.hf.items())}
    dtype = dtype_of_torch(data.draw(st.sampled_from(["bfloat16", "float32"])))
    boxes = data.draw(chunkings(mosaic.mcore))
    shards = [Shard("m", dtype, mosaic.mcore, box.start, box.size, 0) for box in boxes]
    kind = getattr(torch, dtype.name)
    finished: list[tuple[int, Any]] = []
    targets = []
    for number, shard in enumerate(shards):
        how = data.draw(st.sampled_from(["plain", "strided", "deferred"]))
        if how == "deferred":
            later = Deferred(1, torch.device("cpu"), keeping(finished, number))
            targets.append(Target(shard, None, later, 0))
        elif how == "plain":
            targets.append(Target(shard, torch.zeros(shard.size, dtype=kind), None, 0))
        else:
            room = torch.zeros([2 * extent for extent in shard.size], dtype=kind)
            targets.append(Target(shard, room[tuple(slice(0, None, 2) for _ in shard.size)], None, 0))
    with tempfile.TemporaryDirectory() as folder:
        tensors = {
            name: stored(Path(folder), name, array, data.draw(chunkings(array.shape))) for name, array in values.items()
        }
        cuts = cuts_of(shards, mosaic.tiles, tensors)
        wanted = [0] * len(targets)
        for cut in cuts:
            wanted[cut.target] += cut.tile.num_elements
        assert wanted == [box.num_elements for box in boxes]
        limits: dict[str, Any] = {
            "_SHORT_RUN_BYTES": data.draw(st.sampled_from([0, 6, 512])),
            "BUFFER_BYTES": data.draw(st.sampled_from([2, 10, 64, 4096])),
            "_STEP_BYTES": data.draw(st.sampled_from([4, 30, 4096])),
            "_MAX_VECTORS": data.draw(st.sampled_from([1, 2, 512])),
        }
        with mock.patch.multiple(reader, **limits), CountedFiles(Path(folder)) as source:
            filler = Filler(targets, wanted, {})
            lane = Lane(source, filler)
            for job in jobs_of(cuts, targets, tensors, {}):
                lane.read(job)
            lane.finish()
            num_bytes = 2 * sum(box.num_elements for box in boxes)
            assert source.num_read_bytes == num_bytes or is_interleaved(mosaic)
    expected = torch.from_numpy(mosaic.make(values).copy().view(np.int16)).view(torch.bfloat16).to(kind)
    found = {number: target.tensor for number, target in enumerate(targets) if target.tensor is not None}
    found |= dict(finished)
    width = torch.int16 if kind is torch.bfloat16 else torch.int32
    for number, box in enumerate(boxes):
        assert torch.equal(found[number].contiguous().view(width), expected[slices(box)].contiguous().view(width))
    assert not filler.overflows


def is_interleaved(mosaic: Mosaic) -> bool:
    """Whether a box may need every other element of a stored tensor, which is read as a whole."""
    return any(step > 1 for tile in mosaic.tiles for _, step in tile.hf.steps)


def test_interleaved_columns_are_read_once() -> None:
    """As gpt-oss has them: gate in the even and up in the odd columns, in memory one above the other."""
    values = numbered((2, 3, 8), 1)
    tiles = [
        Tile(
            (2, 3, 4),
            hf=Side("w", (0, 0, odd), ((0, 1), (1, 1), (2, 2))),
            mcore=Side("m", (0, 4 * odd, 0), ((0, 1), (2, 1), (1, 1))),
        )
        for odd in (0, 1)
    ]
    bfloat16 = dtype_of_torch("bfloat16")
    halves = [Shard("m", bfloat16, (2, 8, 3), (0, 4 * odd, 0), (2, 4, 3), 0) for odd in (0, 1)]
    targets = [Target(half, torch.zeros(half.size, dtype=torch.bfloat16), None, 0) for half in halves]
    with tempfile.TemporaryDirectory() as folder, CountedFiles(Path(folder)) as source:
        tensors = {"w": stored(Path(folder), "w", values, [Box((0, 0, 0), (2, 3, 8))])}
        cuts = cuts_of(halves, tiles, tensors)
        jobs = jobs_of(cuts, targets, tensors, {})
        assert all(isinstance(job, Region) for job in jobs)
        lane = Lane(source, Filler(targets, [24, 24], {}))
        for job in jobs:
            lane.read(job)
        assert source.num_read_bytes == values.nbytes
    for odd, target in enumerate(targets):
        assert target.tensor is not None
        found = target.tensor.view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(found, values.transpose(0, 2, 1)[:, odd::2])


def test_shifted_values() -> None:
    """What Megatron holds as the stored value plus a number, computed in float32; what that loses is counted."""
    stored_values = torch.tensor([1.0, 1.5, 2.0**-20], dtype=torch.bfloat16)
    shard = Shard("m", dtype_of_torch("bfloat16"), (3,), (0,), (3,), 0)
    target = Target(shard, torch.zeros(3, dtype=torch.bfloat16), None, 0)
    tile = Tile((3,), Side("w", (0,), ((0, 1),)), Side("m", (0,), ((0, 1),)))
    with tempfile.TemporaryDirectory() as folder, CountedFiles(Path(folder)) as source:
        array = stored_values.view(torch.int16).numpy().view(np.uint16)
        tensors = {"w": stored(Path(folder), "w", array, [Box((0,), (3,))])}
        filler = Filler([target], [3], {"m": -1.0})
        lane = Lane(source, filler)
        for job in jobs_of(cuts_of([shard], [tile], tensors), [target], tensors, {"m": -1.0}):
            lane.read(job)
    assert target.tensor is not None
    assert target.tensor.tolist() == [0.0, 0.5, -1.0]
    assert filler.rounded == {"w": 1}


def test_overflows_are_counted() -> None:
    shard = Shard("m", dtype_of_torch("float16"), (2,), (0,), (2,), 0)
    target = Target(shard, torch.zeros(2, dtype=torch.float16), None, 0)
    tile = Tile((2,), Side("w", (0,), ((0, 1),)), Side("m", (0,), ((0, 1),)))
    with tempfile.TemporaryDirectory() as folder, CountedFiles(Path(folder)) as source:
        array = torch.tensor([1.0, 1e30], dtype=torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        tensors = {"w": stored(Path(folder), "w", array, [Box((0,), (2,))])}
        filler = Filler([target], [2], {})
        lane = Lane(source, filler)
        for job in jobs_of(cuts_of([shard], [tile], tensors), [target], tensors, {}):
            lane.read(job)
    assert filler.overflows == {"w": 1}


@EXAMPLES
@given(drawn=affine_tiles())
def test_slices_say_where_a_grid_lies(drawn: tuple[Tile, Shape, Shape]) -> None:
    tile, hf_shape, mcore_shape = drawn
    memory = torch.from_numpy(numbered(mcore_shape, 1).view(np.int16).copy())
    grid = grid_of(memory, tile.sizes, tile.mcore, (0,) * len(mcore_shape))
    expected = np.zeros(hf_shape, np.int16)
    places, origins = indices(tile, mcore=False), indices(tile, mcore=True)
    expected[tuple(places.T)] = memory.numpy()[tuple(origins.T)]
    found = torch.zeros(hf_shape, dtype=torch.int16)
    for where, piece in indexed(tile, grid, len(hf_shape)):
        assert (found[where] == 0).all()
        found[where] = piece
    np.testing.assert_array_equal(found.numpy(), expected)
