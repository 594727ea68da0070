"""torch_dist directories: every fixture's tensors are found where they lie, and every kind of damage is an error."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardway.core.dtypes import BFLOAT16, FLOAT32, DType, dtype_of_torch
from shardway.core.errors import Code, ShardwayError
from shardway.formats.dcp import DcpChunk, DcpLocation, DcpTensor, write_metadata
from shardway.formats.iterations import TRACKER, find_iteration, iteration_folder, tracker_text
from shardway.formats.saved_objects import SavedTensor, write_torch_file
from shardway.formats.torch_dist import (
    COMMON_STATE,
    TorchDistCheckpoint,
    common_pt,
    extra_state,
    metadata_json,
    open_torch_dist,
    train_state_pt,
)
from shardway.formats.torch_file import tensor_blob_frame

if TYPE_CHECKING:
    from shardway.core.tensors import StoredTensor

torch = pytest.importorskip("torch")

CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
DESCRIBED = (
    "megatron_bridge_0.3.1/llama",
    "megatron_bridge_0.7.0/deepseek_v3",
    "megatron_bridge_0.7.0/deepseek_v3_mtp",
    "megatron_bridge_0.7.0/llama",
    "megatron_bridge_0.7.0/nemotron_h",
    "megatron_bridge_0.7.0/nemotron_h_super",
    "megatron_bridge_0.7.0/qwen3",
    "megatron_bridge_0.7.0/qwen3_moe",
    "megatron_bridge_0.7.0/qwen3_next",
)
PARALLEL = ("deepseek_v3_pp2", "llama_tp2", "qwen3_moe_ep2")


def assembled(checkpoint: TorchDistCheckpoint, tensor: StoredTensor) -> Any:
    """The tensor's elements as unsigned integers of its item size, put together from its chunks."""
    unsigned = np.dtype(f"u{tensor.dtype.itemsize}")
    whole = np.zeros(tensor.shape, unsigned)
    for start, size, file, offset in tensor.chunks:
        count = int(np.prod(size, dtype=np.int64))
        piece = np.fromfile(checkpoint.root / file, unsigned, count, offset=offset).reshape(size)
        whole[tuple(slice(first, first + extent) for first, extent in zip(start, size, strict=True))] = piece
    return whole


@pytest.mark.parametrize("name", DESCRIBED)
def test_fixtures(name: str, shared_fixtures: Path) -> None:
    described = json.loads((shared_fixtures / f"{name}.json").read_text())
    checkpoint = open_torch_dist(shared_fixtures / name)
    assert checkpoint.root == shared_fixtures / name / "iter_0000000"
    assert (checkpoint.iteration, checkpoint.release, checkpoint.hf_dir) == (0, False, None)
    assert checkpoint.content_metadata == CONTENT
    assert checkpoint.common == {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": CONTENT}
    assert checkpoint.common_form == ("common.pt" if "0.3.1" in name else "common_state")
    assert list(checkpoint.objects) == sorted(described["bytes"])
    assert set(checkpoint.catalog.tensors) == set(described["tensors"])
    for key, expected in described["tensors"].items():
        tensor = checkpoint.catalog.tensors[key]
        assert (tensor.name, tensor.dtype.name, list(tensor.shape)) == (key, expected["dtype"], expected["shape"])
        chunks = [[list(chunk.start), list(chunk.size)] for chunk in tensor.chunks]
        assert sorted(chunks) == sorted(expected["chunks"])
        assert hashlib.sha256(assembled(checkpoint, tensor).tobytes()).hexdigest() == expected["sha256"]
    for key, entry in described["bytes"].items():
        found: Any = checkpoint.read_object(key)
        if entry["repr"] == "[tensor([], dtype=torch.uint8)]":
            assert found == [SavedTensor(dtype_of_torch("uint8"), (0,), b"")]
        else:
            assert repr(found) == entry["repr"]
    folder = checkpoint.root
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert dict(checkpoint.files) == files


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_saves_hold_the_same_tensors(name: str, shared_fixtures: Path) -> None:
    single = open_torch_dist(shared_fixtures / "megatron_bridge_0.7.0" / name[:-4])
    split = open_torch_dist(shared_fixtures / "megatron_bridge_0.7.0" / name)
    assert split.catalog.tensors.keys() == single.catalog.tensors.keys()
    assert split.objects == single.objects
    assert {chunk.file for tensor in split.catalog.tensors.values() for chunk in tensor.chunks} >= {"__1_0.distcp"}
    for key, tensor in split.catalog.tensors.items():
        assert np.array_equal(assembled(split, tensor), assembled(single, single.catalog.tensors[key])), key


def test_only_wanted_tensors_are_opened(shared_fixtures: Path) -> None:
    checkpoint = open_torch_dist(shared_fixtures / DESCRIBED[0], wanted=lambda key: key.startswith("decoder.final"))
    assert list(checkpoint.catalog.tensors) == ["decoder.final_layernorm.weight"]


def test_what_is_written_equals_the_fixture(shared_fixtures: Path) -> None:
    old = shared_fixtures / "megatron_bridge_0.3.1/llama"
    new = shared_fixtures / "megatron_bridge_0.7.0/llama"
    assert metadata_json() == (old / "iter_0000000/metadata.json").read_bytes()
    assert tracker_text(0) == (old / TRACKER).read_bytes()
    loaded = torch.load(io.BytesIO(common_pt(0, CONTENT)), weights_only=True)
    assert loaded == torch.load(old / "iter_0000000/common.pt", weights_only=True)
    state = torch.load(io.BytesIO(train_state_pt()), weights_only=True)
    expected = torch.load(new / "iter_0000000/train_state.pt", weights_only=True)
    assert list(state) == list(expected)
    for key, tensor in expected.items():
        assert (state[key].dtype, state[key].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(state[key], tensor)


def test_small_pieces() -> None:
    assert torch.load(io.BytesIO(extra_state()), weights_only=True) == [None]
    assert torch.load(io.BytesIO(train_state_pt(7)), weights_only=True)["step"].item() == 7
    assert torch.load(io.BytesIO(common_pt(12, {"x": True})), weights_only=True) == {
        "checkpoint_version": 3.0,
        "iteration": 12,
        "content_metadata": {"x": True},
    }
    assert [iteration_folder(number) for number in (0, 12, 12345678, None)] == [
        "iter_0000000",
        "iter_0000012",
        "iter_12345678",
        "release",
    ]
    assert [tracker_text(number) for number in (0, 12, None)] == [b"0", b"12", b"release"]


class Written:
    """A small checkpoint: two tensors in two files, with the objects and small files around them."""

    def __init__(self, root: Path, *, iteration: int | None = 3) -> None:
        self.root = root
        self.folder = root / iteration_folder(iteration)
        self.folder.mkdir(parents=True)
        self.tensors: dict[str, DcpTensor] = {}
        self.values: dict[str, Any] = {
            "w": np.arange(24, dtype=np.uint16).reshape(4, 6),
            "b": np.arange(5, dtype=np.uint32),
        }
        first, second = bytearray(extra_state()), bytearray()
        self.objects = dict.fromkeys(
            ("x._extra_state/shard_0_1", "y._extra_state/shard_0_1"), DcpLocation("__0_0.distcp", 0, len(first))
        )
        top = self.add(first, "__0_0.distcp", BFLOAT16, (0, 0), self.values["w"][:3])
        bottom = self.add(second, "__0_1.distcp", BFLOAT16, (3, 0), self.values["w"][3:])
        self.tensors["w"] = DcpTensor(BFLOAT16, (4, 6), (top, bottom))
        self.tensors["b"] = DcpTensor(
            FLOAT32, (5,), (self.add(second, "__0_1.distcp", FLOAT32, (0,), self.values["b"]),)
        )
        (self.folder / "__0_0.distcp").write_bytes(first)
        (self.folder / "__0_1.distcp").write_bytes(second)
        (self.folder / "common.pt").write_bytes(common_pt(iteration or 0, CONTENT))
        (self.folder / "metadata.json").write_bytes(metadata_json())
        (self.root / TRACKER).write_bytes(tracker_text(iteration))
        self.write_metadata()

    @staticmethod
    def add(content: bytearray, file: str, dtype: DType, start: tuple[int, ...], values: Any) -> DcpChunk:
        offset = len(content)
        frame = tensor_blob_frame(dtype, values.shape, offset=offset)
        content += frame.head + values.tobytes() + frame.tail
        return DcpChunk(start, values.shape, DcpLocation(file, offset, frame.length))

    def write_metadata(self) -> None:
        (self.folder / ".metadata").write_bytes(write_metadata(self.tensors, self.objects))

    def error(self, path: Path | None = None) -> ShardwayError:
        with pytest.raises(ShardwayError) as caught:
            open_torch_dist(path or self.root)
        return caught.value


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path / "checkpoint")


@pytest.mark.parametrize("iteration", [3, 12345678, None])
def test_what_is_written_is_opened(iteration: int | None, tmp_path: Path) -> None:
    written = Written(tmp_path / "c", iteration=iteration)
    (written.folder / "hf").mkdir()
    (written.folder / "hf/config.json").write_text("{}")
    for path in (written.root, written.folder):
        checkpoint = open_torch_dist(path)
        assert checkpoint.root == written.folder
        assert (checkpoint.iteration, checkpoint.release) == (iteration, iteration is None)
        assert checkpoint.hf_dir == written.folder / "hf"
        assert checkpoint.files["hf/config.json"] == 2
        assert checkpoint.objects == ("x._extra_state/shard_0_1", "y._extra_state/shard_0_1")
        assert checkpoint.read_object("y._extra_state/shard_0_1") == [None]
        for key, value in written.values.items():
            assert np.array_equal(assembled(checkpoint, checkpoint.catalog.tensors[key]), value)


@pytest.mark.filterwarnings("ignore")
def test_torch_loads_what_is_written(written: Written) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    state: dict[str, Any] = {"w": torch.zeros(4, 6, dtype=torch.bfloat16), "b": torch.zeros(5)}
    load(state, storage_reader=FileSystemReader(written.folder), no_dist=True)
    assert np.array_equal(state["w"].view(torch.uint16).numpy(), written.values["w"])
    assert np.array_equal(state["b"].view(torch.uint32).numpy(), written.values["b"])
    objects: dict[str, Any] = dict.fromkeys(written.objects, object())
    load(objects, storage_reader=FileSystemReader(written.folder), no_dist=True)
    assert objects == {key: [None] for key in written.objects}


def test_relative_paths(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(written.folder)
    assert open_torch_dist(Path()).iteration == 3
    monkeypatch.chdir(written.root)
    assert open_torch_dist(Path("iter_0000003")).iteration == 3
    assert open_torch_dist(Path()).iteration == 3


def test_the_tracker_decides(written: Written) -> None:
    (written.root / "iter_0000009").mkdir()  # newer, and killed before it wrote anything
    assert open_torch_dist(written.root).iteration == 3
    error = written.error(written.root / "iter_0000009")
    assert error.code == Code.METADATA_MISSING
    assert "found: nothing" in str(error)


@pytest.mark.parametrize("text", ["4", "release", "", "latest", "-1", "3.0", "../x", "3 3", "\x00", "9" * 30, "٣"])
def test_trackers_that_name_nothing(text: str, written: Written) -> None:
    (written.root / TRACKER).write_text(text)
    error = written.error()
    assert error.code == Code.TRACKER_INVALID
    assert "iter_0000003" in str(error)


def test_a_tracker_may_end_in_a_newline(written: Written) -> None:
    (written.root / TRACKER).write_text("3\n")
    assert find_iteration(written.root) == written.folder


def test_without_a_tracker_iterations_are_listed_not_guessed(written: Written) -> None:
    (written.root / TRACKER).unlink()
    error = written.error()
    assert error.code == Code.TRACKER_INVALID
    assert "iterations there: iter_0000003" in str(error)
    assert "pass the folder" in str(error)


def test_folders_that_are_no_checkpoint(written: Written, tmp_path: Path) -> None:
    assert written.error(tmp_path / "absent").code == Code.FILE_MISSING
    assert written.error(written.folder / "common.pt").code == Code.FILE_MISSING
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.safetensors").touch()
    error = written.error(tmp_path / "other")
    assert error.code == Code.NOT_A_CHECKPOINT
    assert "found: model.safetensors" in str(error)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["mp_rank_00/model_optim_rng.pt"], "legacy"),
        (["model_optim_rng.pt"], "legacy"),
        (["__0_0.distcp", "__0_1.distcp"], "not finished"),
        (["model.safetensors", "config.json"], "Hugging Face"),
        ([], "another iteration"),
    ],
)
def test_folders_without_metadata_say_what_they_are(
    files: list[str], words: str, tmp_path: Path, written: Written
) -> None:
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    error = written.error(folder)
    assert error.code == Code.METADATA_MISSING
    assert words in str(error)
    assert all(name in str(error) for name in files)


def test_missing_small_files(written: Written) -> None:
    (written.folder / "common.pt").unlink()
    error = written.error()
    assert error.code == Code.METADATA_MISSING
    assert "neither common.pt nor" in str(error)
    (written.folder / "metadata.json").unlink()
    error = written.error()
    assert error.code == Code.METADATA_MISSING
    assert "has not written" in str(error)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ('{"sharded_backend": "zarr", "sharded_backend_version": 1}', Code.BACKEND_UNSUPPORTED),
        ('{"sharded_backend": "fsdp_dtensor"}', Code.BACKEND_UNSUPPORTED),
        ('{"sharded_backend": ["x"]}', Code.METADATA_INVALID),
        ("{}", Code.METADATA_INVALID),
        ("[]", Code.METADATA_INVALID),
        ("", Code.METADATA_INVALID),
        ("\xff", Code.METADATA_INVALID),
        ("[" * 100_000, Code.METADATA_INVALID),
    ],
)
def test_metadata_json(content: str, code: Code, written: Written) -> None:
    (written.folder / "metadata.json").write_text(content, "latin1")
    assert written.error().code == code


def test_zarr_is_named_even_without_metadata(written: Written) -> None:
    (written.folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    (written.folder / ".metadata").unlink()
    error = written.error()
    assert error.code == Code.BACKEND_UNSUPPORTED
    assert "zarr" in str(error)


def test_missing_and_truncated_files_name_their_tensors(written: Written) -> None:
    path = written.folder / "__0_1.distcp"
    os.truncate(path, path.stat().st_size - 1)
    error = written.error()
    assert error.code == Code.DISTCP_TRUNCATED
    assert f"should have at least {path.stat().st_size + 1:,} bytes, has {path.stat().st_size:,}" in str(error)
    assert "2 keys have data in it: w, b" in str(error)
    path.unlink()
    (written.folder / "__0_0.distcp").unlink()
    error = written.error()
    assert [problem.code for problem in error.problems] == [Code.FILE_MISSING, Code.FILE_MISSING]
    assert "3 keys have data in it: w, x._extra_state/shard_0_1, y._extra_state/shard_0_1" in str(error)


def test_long_lists_are_shortened(written: Written) -> None:
    location = written.tensors["b"].chunks[0].location._replace(file="gone.distcp")
    chunk = DcpChunk((0,), (5,), location)
    written.tensors |= {f"t{number:03d}": DcpTensor(FLOAT32, (5,), (chunk,)) for number in range(100)}
    written.write_metadata()
    assert "100 keys have data in it: t000, t001, t002, t003, t004, t005, t006, t007 and 92 more" in str(
        written.error()
    )


def test_tensors_that_are_not_what_metadata_says(written: Written) -> None:
    weight, bias = written.tensors["w"], written.tensors["b"]
    written.tensors["b"] = DcpTensor(BFLOAT16, (5,), bias.chunks)
    top, bottom = weight.chunks
    written.tensors["w"] = DcpTensor(BFLOAT16, (4, 6), (top._replace(size=(2, 6)), bottom))
    written.write_metadata()
    error = written.error()
    assert [problem.code for problem in error.problems] == [Code.SHAPE_MISMATCH, Code.SHAPE_MISMATCH]
    assert "expected bfloat16 of shape [2, 6]" in str(error)
    assert "found bfloat16 of shape [3, 6]" in str(error)
    assert "found float32 of shape [5]" in str(error)


def test_places_that_hold_something_else(written: Written) -> None:
    (chunk,) = written.tensors["b"].chunks
    location = chunk.location
    for offset, length in ((location.offset + 1, location.length - 1), (0, 10), (location.offset, location.length - 1)):
        written.tensors["b"] = DcpTensor(
            FLOAT32, (5,), (chunk._replace(location=DcpLocation(location.file, offset, length)),)
        )
        written.write_metadata()
        error = written.error()
        assert error.code == Code.TORCH_FILE_INVALID
        assert "cannot read b" in str(error)
    written.tensors["b"] = DcpTensor(
        FLOAT32, (5,), (chunk._replace(location=written.objects["x._extra_state/shard_0_1"]),)
    )
    written.write_metadata()
    assert "does not hold one tensor" in str(written.error())


def test_common_state_object(written: Written) -> None:
    (written.folder / "common.pt").unlink()
    for value, code in (
        ([{"iteration": 5, "content_metadata": {"a": 1}}], None),
        ({"iteration": 5, "content_metadata": {"a": 1}}, None),
        ([1], Code.METADATA_INVALID),
        ([], Code.METADATA_INVALID),
    ):
        data = write_torch_file(value)
        (written.folder / "__9_0.distcp").write_bytes(data)
        written.objects[COMMON_STATE] = DcpLocation("__9_0.distcp", 0, len(data))
        written.write_metadata()
        if code is None:
            checkpoint = open_torch_dist(written.root)
            assert (checkpoint.common_form, checkpoint.content_metadata) == ("common_state", {"a": 1})
        else:
            assert written.error().code == code


def test_common_pt_wins_over_common_state(written: Written) -> None:
    written.objects[COMMON_STATE] = written.objects["x._extra_state/shard_0_1"]
    written.write_metadata()
    assert open_torch_dist(written.root).common_form == "common.pt"


def test_objects_that_are_not_there(written: Written) -> None:
    checkpoint = open_torch_dist(written.root)
    with pytest.raises(ShardwayError) as caught:
        checkpoint.read_object("nothing")
    assert caught.value.code == Code.TENSOR_MISSING
    os.truncate(written.folder / "__0_0.distcp", 10)
    with pytest.raises(ShardwayError) as caught:
        checkpoint.read_object("x._extra_state/shard_0_1")
    assert caught.value.code == Code.DISTCP_TRUNCATED
    (written.folder / "__0_0.distcp").unlink()
    with pytest.raises(ShardwayError) as caught:
        checkpoint.read_object("x._extra_state/shard_0_1")
    assert caught.value.code == Code.FILE_MISSING


def test_pipes_and_folders_in_the_place_of_files(written: Written) -> None:
    for name in (".metadata", "metadata.json", "common.pt", "__0_0.distcp"):
        path = written.folder / name
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        written.error()
        path.unlink()
        path.mkdir()
        written.error()
        path.rmdir()
        path.symlink_to("nowhere")
        written.error()
        path.unlink()
        path.write_bytes(content)
    open_torch_dist(written.root)


def test_linked_files_are_followed(written: Written, tmp_path: Path) -> None:
    path = written.folder / "__0_0.distcp"
    path.rename(tmp_path / "blob")
    path.symlink_to(tmp_path / "blob")
    open_torch_dist(written.root)


def test_unreadable_files(written: Written) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (written.folder / "__0_0.distcp").chmod(0)
    assert written.error().code == Code.FILE_UNREADABLE
    written.root.chmod(0)
    assert written.error().code == Code.FILE_UNREADABLE
    written.root.chmod(0o755)


@pytest.mark.parametrize("name", [".metadata", "metadata.json", "common.pt", "__0_0.distcp", "__0_1.distcp"])
def test_every_truncation_is_an_error(name: str, written: Written) -> None:
    path = written.folder / name
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        written.error()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.data())
def test_mutations_end_in_a_checkpoint_or_an_error(written: Written, data: st.DataObject) -> None:
    names = [".metadata", "metadata.json", "common.pt", "__0_0.distcp", "__0_1.distcp"]
    path = written.folder / data.draw(st.sampled_from(names))
    content = path.read_bytes()
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        checkpoint = open_torch_dist(written.root)
        for tensor in checkpoint.catalog.tensors.values():
            assembled(checkpoint, tensor)
    except ShardwayError:
        pass
    finally:
        path.write_bytes(content)
