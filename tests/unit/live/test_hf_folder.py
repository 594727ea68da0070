"""A live save to a Hugging Face directory, one rank, step by step."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.tiny import TAGS, Tiny, bits, read_safetensors, same

from shardway.core.dtypes import dtype_of_torch
from shardway.core.errors import Code, ShardwayError
from shardway.core.tensors import Chunk, StoredTensor
from shardway.families.config import HFConfig
from shardway.families.mapping import map_model
from shardway.live.hf_folder import HuggingFaceFolder
from shardway.live.hf_layout import lay_out_weights
from shardway.live.records import Shard
from shardway.live.saving import Assignment, Superseded
from shardway.live.state import LiveState

if TYPE_CHECKING:
    from pathlib import Path

STAGING, TAG = "0123", "t1"
TINY = Tiny(hidden=16, ffn=24, layers=2)


def state_of(tiny: Tiny, weights: Any) -> LiveState:
    """The model, held by one rank: each tensor in two halves where it can be halved."""
    dtype = dtype_of_torch(tiny.dtype)
    held: list[Any] = []
    for key, array in tiny.megatron(weights).items():
        values = torch.from_numpy(array.view(f"i{array.itemsize}").copy()).view(getattr(torch, tiny.dtype))
        shape = tuple(values.shape)
        middle = shape[0] // 2 if shape[0] > 1 else shape[0]
        for first, last in ((0, middle), (middle, shape[0])):
            if first < last:
                start, size = (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
                held.append((Shard(key, dtype, shape, start, size, 0), values[first:last]))
    return LiveState.of(held)


def folder_of(path: Path, state: LiveState, tiny: Tiny = TINY, **more: Any) -> HuggingFaceFolder:
    mapping = map_model(HFConfig(tiny.config))
    options: dict[str, Any] = {"dtype": None, "declared": tiny.dtype, "max_shard_bytes": 800}
    options |= {name: more.pop(name) for name in list(more) if name in options}
    layout = lay_out_weights(mapping, more.pop("source", {}), **options)
    fields: dict[str, Any] = {
        "folder": path,
        "rank": 0,
        "state": state,
        "mapping": mapping,
        "layout": layout,
        "companions": {"config.json": json.dumps(tiny.config).encode()},
        "replace": False,
        "sync": False,
    }
    return HuggingFaceFolder(**fields | more)


def assignment_of(state: LiveState) -> Assignment:
    return Assignment(staging=STAGING, first_file=0, shards=state.shards, objects=(), num_bytes=state.num_bytes)


def save(folder: HuggingFaceFolder) -> int:
    """All steps; returns the bytes that were reported."""
    reported: list[int] = []
    folder.prepare(STAGING)
    result = folder.write(assignment_of(folder.state), reported.append)
    folder.prepare(STAGING)  # a second coordinator: nothing is lost
    folder.publish(STAGING, TAG, [result], lambda _: None)
    folder.finish(STAGING, TAG, lambda _: None)
    folder.finish(STAGING, TAG, lambda _: None)
    assert sum(reported) == result.num_bytes
    return result.num_bytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_is_written_is_what_a_reader_expects(dtype: str, tmp_path: Path) -> None:
    tiny = Tiny(dtype=dtype, attention_bias=True, mlp_bias=True)
    weights = tiny.weights(5)
    folder = folder_of(tmp_path / "out", state_of(tiny, weights), tiny)
    num_bytes = save(folder)
    found = read_safetensors(tmp_path / "out")
    assert same(bits(found.items()), weights)
    assert {tag for tag, _ in found.values()} == {TAGS[dtype]}
    assert num_bytes == sum(array.nbytes for array in weights.values())
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_copied_out_of_the_model_after_the_call_has_returned(tmp_path: Path) -> None:
    """A writer that was taken for lost goes on: what it still writes is from before."""
    weights = TINY.weights(1)
    state = state_of(TINY, weights)
    folder = folder_of(tmp_path / "out", state)
    folder.prepare(STAGING)
    reports = 0

    def report(_: int) -> None:
        nonlocal reports
        reports += 1
        if reports == 4:
            folder.close()  # the call returns, and the model is trained
            for shard in state.shards:
                state.tensor_of(shard).fill_(0.0)

    with pytest.raises(Superseded):
        folder.write(assignment_of(state), report)
    assert reports == 4
    (staging,) = tmp_path.iterdir()
    written = 0
    for file in staging.glob("*.safetensors"):
        (tmp_path / "look").mkdir(exist_ok=True)
        (tmp_path / "look" / file.name).write_bytes(file.read_bytes())
    for name, (_, array) in read_safetensors(tmp_path / "look").items():
        filled = array != 0
        assert (array[filled] == weights[name][filled]).all()
        written += int(filled.sum())
    assert 0 < written < sum(array.size for array in weights.values())


def test_casts_and_overflows(tmp_path: Path) -> None:
    tiny = Tiny(dtype="float32")
    weights = {name: (array & 0x3FFFFFFF) | 0x3F000000 for name, array in tiny.weights(2).items()}  # 0.5 to 2
    state = state_of(tiny, weights)
    save(folder_of(tmp_path / "half", state, tiny, dtype=dtype_of_torch("float16")))
    found = read_safetensors(tmp_path / "half")
    assert {tag for tag, _ in found.values()} == {"F16"}
    for name, (_, array) in found.items():
        expected = torch.from_numpy(weights[name].view("i4").copy()).view(torch.float32).half()
        assert torch.equal(torch.from_numpy(array.view("i2").copy()), expected.view(torch.int16)), name
    state.tensor_of(state.shards[0]).fill_(1e30)
    folder = folder_of(tmp_path / "full", state, tiny, dtype=dtype_of_torch("float16"))
    folder.prepare(STAGING)
    with pytest.raises(ShardwayError) as refused:
        folder.write(assignment_of(state), lambda _: None)
    assert refused.value.code is Code.CAST_OVERFLOW
    assert "model.embed_tokens.weight" in str(refused.value)


def test_a_part_that_was_not_written_is_found(tmp_path: Path) -> None:
    state = state_of(TINY, TINY.weights(3))
    folder = folder_of(tmp_path / "out", state)
    folder.prepare(STAGING)
    result = folder.write(assignment_of(state), lambda _: None)
    import dataclasses

    short = dataclasses.replace(result, shards=result.shards[1:])
    with pytest.raises(ShardwayError) as refused:
        folder.publish(STAGING, TAG, [short], lambda _: None)
    assert refused.value.code is Code.COVERAGE
    with pytest.raises(ShardwayError) as twice:
        folder.publish(STAGING, TAG, [result, dataclasses.replace(result, shards=result.shards[:1])], lambda _: None)
    assert twice.value.code is Code.COVERAGE
    assert "2 times" in str(twice.value)


def test_a_file_that_was_cut_is_found(tmp_path: Path) -> None:
    state = state_of(TINY, TINY.weights(3))
    folder = folder_of(tmp_path / "out", state)
    folder.prepare(STAGING)
    result = folder.write(assignment_of(state), lambda _: None)
    (staging,) = tmp_path.iterdir()
    with next(staging.glob("*.safetensors")).open("r+b") as file:
        file.truncate(10)
    with pytest.raises(ShardwayError) as refused:
        folder.publish(STAGING, TAG, [result], lambda _: None)
    assert refused.value.code is Code.VERIFY_FAILED
    folder.abandon(STAGING)
    assert list(tmp_path.iterdir()) == []


def test_there_has_to_be_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    folder = folder_of(tmp_path / "out", state_of(TINY, TINY.weights(3)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(ShardwayError) as refused:
        folder.prepare(STAGING)
    assert refused.value.code is Code.NO_SPACE
    assert f"{folder.layout.num_bytes:,} bytes, free 10 bytes" in str(refused.value)


def test_types_and_files_of_the_original_are_kept() -> None:
    """In the order that they have there, also where they lie in other files than a default would choose."""
    mapping = map_model(HFConfig(TINY.config))
    names = list(mapping.hf)
    source: dict[str, StoredTensor] = {}
    for place, name in enumerate(reversed(names)):
        dtype = dtype_of_torch("float32" if name.endswith("norm.weight") else "bfloat16")
        file = f"part{place % 2}.safetensors"
        chunk = Chunk((0,) * len(mapping.hf[name]), mapping.hf[name], file, 8 * place)
        source[name] = StoredTensor(name, dtype, mapping.hf[name], (chunk,))
    layout = lay_out_weights(mapping, source, dtype=None, declared="float16", max_shard_bytes=None)
    assert set(layout.files) == {"part0.safetensors", "part1.safetensors"}
    for name, (file, _, dtype) in layout.places.items():
        assert (file, dtype) == (source[name].chunks[0].file, source[name].dtype)
    header = json.loads(layout.headers["part0.safetensors"][8:])
    ordered = [name for name in reversed(names) if source[name].chunks[0].file == "part0.safetensors"]
    wide_first = sorted(ordered, key=lambda name: -source[name].dtype.bits)
    assert [name for name in header if name != "__metadata__"] == wide_first
    sharded = lay_out_weights(mapping, source, dtype=None, declared=None, max_shard_bytes=1000)
    assert len(sharded.files) > 2
    with contextlib.suppress(StopIteration):
        source.pop(next(iter(source)))
    with pytest.raises(ShardwayError) as refused:
        lay_out_weights(mapping, source, dtype=None, declared=None, max_shard_bytes=None)
    assert refused.value.code is Code.CONFIG_INVALID
    assert lay_out_weights(mapping, {}, dtype=None, declared="bfloat16", max_shard_bytes=None).digest != layout.digest
