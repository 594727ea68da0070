"""Hugging Face checkpoint directories: which files hold the weights, what is missing, and how shards are split."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardway.core.dtypes import DType, dtype_of_torch
from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats.huggingface import SmallFile, open_huggingface, read_companions
from shardway.formats.safetensors_layout import lay_out
from shardway.formats.sharding import index_json, shard_tensors

if TYPE_CHECKING:
    from shardway.core.tensors import Shape

FIXTURES = Path(__file__).parents[4] / "shared" / "fixtures" / "hf"
U8 = dtype_of_torch("uint8")
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def put(root: Path, name: str, *tensors: str) -> None:
    """Write a safetensors file of 4-byte tensors."""
    layout = lay_out([(tensor, U8, (4,)) for tensor in tensors], {"format": "pt"})
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(layout.header + bytes(layout.num_bytes - len(layout.header)))


def put_index(root: Path, weight_map: object) -> None:
    (root / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def refusal(root: Path) -> ShardwayError:
    with pytest.raises(ShardwayError) as caught:
        open_huggingface(root)
    return caught.value


def only_problem(root: Path, code: Code, *said: str) -> Problem:
    error = refusal(root)
    assert [problem.code for problem in error.problems] == [code], str(error)
    for part in said:
        assert part in str(error)
    return error.problems[0]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with nothing but a configuration."""
    root = tmp_path / "checkpoint"
    root.mkdir()
    (root / "config.json").write_text('{"model_type": "llama", "time_step_limit": [0.0, Infinity]}')
    return root


@pytest.fixture
def sharded(root: Path) -> Path:
    """A good checkpoint of two shards and an index."""
    put(root, ONE, "a", "b")
    put(root, TWO, "c")
    put_index(root, {"a": ONE, "b": ONE, "c": TWO})
    return root


# Which files hold the weights


def test_single_file(root: Path) -> None:
    put(root, "model.safetensors", "a")
    found = open_huggingface(root)
    assert found.files == ("model.safetensors",)
    assert found.unread is None
    assert found.config == {"model_type": "llama", "time_step_limit": [0.0, float("inf")]}
    assert found.catalog.root == root
    assert found.catalog.tensors["a"].chunks[0].file == "model.safetensors"
    assert found.catalog.num_bytes == 4
    assert [file.name for file in found.small_files] == ["config.json"]
    assert found.left_out == ()


def test_index_chooses_exactly_its_files(sharded: Path) -> None:
    put(sharded, "consolidated.safetensors", "other")
    put(sharded, "original/x.safetensors", "a")
    found = open_huggingface(sharded)
    assert found.files == (ONE, TWO)
    assert found.unread == frozenset()
    assert list(found.catalog.tensors) == ["a", "b", "c"]
    assert found.left_out == ("consolidated.safetensors", "original/x.safetensors")


def test_index_may_name_files_in_subdirectories(root: Path) -> None:
    put(root, "experts/e.safetensors", "e")
    put(root, ONE, "a")
    put_index(root, {"a": ONE, "e": "experts/e.safetensors"})
    found = open_huggingface(root)
    assert found.catalog.tensors["e"].chunks[0].file == "experts/e.safetensors"
    assert found.left_out == ()


def test_single_file_wins_over_an_index_that_agrees(sharded: Path) -> None:
    put(sharded, "model.safetensors", "c", "b", "a")
    found = open_huggingface(sharded)
    assert found.files == ("model.safetensors",)
    assert found.unread is None
    assert found.left_out == (ONE, TWO, INDEX)


def test_single_file_and_an_index_that_disagrees(sharded: Path) -> None:
    put(sharded, "model.safetensors", "a", "b", "x")
    problem = only_problem(sharded, Code.INDEX_MISMATCH, "1 tensors: c", "1 tensors: x")
    assert problem.file == sharded / "model.safetensors"


def test_index_that_names_the_single_file_decides(root: Path) -> None:
    put(root, "model.safetensors", "a")
    put(root, "mtp.safetensors", "m")
    put_index(root, {"a": "model.safetensors", "m": "mtp.safetensors"})
    found = open_huggingface(root)
    assert found.files == ("model.safetensors", "mtp.safetensors")
    assert found.unread == frozenset()


def test_shards_without_an_index(root: Path) -> None:
    put(root, ONE, "a")
    put(root, TWO, "b")
    put(root, "mtp.safetensors", "m")
    put(root, "consolidated-00001-of-00009.safetensors", "other")
    found = open_huggingface(root)
    assert found.files == (ONE, TWO, "mtp.safetensors")
    assert found.left_out == ("consolidated-00001-of-00009.safetensors",)


def test_consolidated_alone_is_used(root: Path) -> None:
    put(root, "consolidated.safetensors", "a")
    assert open_huggingface(root).files == ("consolidated.safetensors",)


@pytest.mark.parametrize(
    ("present", "missing"),
    [
        ([2], "1 of 2 shards are missing: model-00001-of-00002.safetensors"),
        ([1, 4], "2 of 4 shards are missing: model-00002-of-00004.safetensors, model-00003-of-00004.safetensors"),
        ([0, 1], "1 of 3 shards are missing: model-00002-of-00003.safetensors"),
        ([7], "99999998 of 99999999 shards are missing: model-00001-of-99999999.safetensors"),
    ],
)
def test_missing_shards_without_an_index(root: Path, present: list[int], missing: str) -> None:
    total = missing.split()[2]
    for number in present:
        put(root, f"model-{number:05d}-of-{int(total):05d}.safetensors", f"t{number}")
    only_problem(root, Code.FILE_MISSING, missing)


@pytest.mark.parametrize("numbers", [(0, 1), (1, 2)])
def test_shards_may_count_from_zero_or_one(root: Path, numbers: tuple[int, ...]) -> None:
    for number in numbers:
        put(root, f"model-{number}-of-2.safetensors", f"t{number}")
    assert len(open_huggingface(root).files) == 2


# What is wrong with the directory


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/README.md").write_text("hello")
    for name in ("nowhere", "file", "file/below", "empty", "notes"):
        only_problem(tmp_path / name, Code.NOT_A_CHECKPOINT, name)


def test_a_megatron_checkpoint_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    only_problem(tmp_path, Code.NOT_A_CHECKPOINT, "Megatron", "other direction")


def test_config_missing(sharded: Path) -> None:
    (sharded / "config.json").unlink()
    only_problem(sharded, Code.CONFIG_MISSING, "config.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON"),
        (b"[]", "list, not an object"),
        (b"null", "NoneType, not an object"),
        (b"\xff{}", "not UTF-8 at byte 0"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "key c twice"),
        (b'{"a": ' + b"[" * 200_000, "too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b" " * (16 * 2**20) + b"{}", "16777218 bytes; at most 16777216"),
    ],
)
def test_config_invalid(root: Path, content: bytes, said: str) -> None:
    put(root, "model.safetensors", "a")
    (root / "config.json").write_bytes(content)
    problem = only_problem(root, Code.CONFIG_INVALID, said)
    assert problem.file == root / "config.json"


def test_no_weights(root: Path) -> None:
    only_problem(root, Code.FILE_MISSING, "has no weights", "model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-00001.PTH", "llama-q4.gguf", "tf_model.h5"])
def test_weights_of_another_kind(root: Path, name: str) -> None:
    (root / name).write_bytes(b"PK")
    only_problem(root, Code.WEIGHTS_NOT_SAFETENSORS, name, "save_pretrained(..., safe_serialization=True)")


def test_other_copies_are_left_out(root: Path) -> None:
    put(root, "model.safetensors", "a")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "original.pth", "flax_model.msgpack", "x.onnx"):
        (root / name).write_bytes(b"")
    assert len(open_huggingface(root).left_out) == 5


# What is wrong with the index


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "list, not an object"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 1, "b": null}}', "2 tensors to something other than a file name: a, b"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "key a twice"),
    ],
)
def test_index_invalid(root: Path, content: str, said: str) -> None:
    (root / INDEX).write_text(content)
    problem = only_problem(root, Code.INDEX_INVALID, said)
    assert problem.file == root / INDEX


def test_index_too_big(sharded: Path) -> None:
    os.truncate(sharded / INDEX, 2**26 + 1)
    only_problem(sharded, Code.INDEX_INVALID, "67108865 bytes; at most 67108864")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x", "", ".", "a//b", "a\\..\\x", "x\0", "a/", "./x"]
)
def test_index_cannot_lead_outside(sharded: Path, name: str) -> None:
    put_index(sharded, {"a": ONE, "b": name})
    only_problem(sharded, Code.PATH_ESCAPES, INDEX)


def test_all_missing_shards_are_named_with_what_they_held(root: Path) -> None:
    names = [f"model-{i:05d}-of-00012.safetensors" for i in range(1, 13)]
    put_index(root, {f"t{i}": names[i % 12] for i in range(30)})
    put(root, names[0], "t0", "t12", "t24")
    error = refusal(root)
    assert error.codes == {Code.FILE_MISSING}
    assert [problem.file for problem in error.problems] == [root / name for name in names[1:]]
    assert "places 3 of 30 tensors in it" in str(error.problems[0])
    assert "places 2 of 30 tensors in it" in str(error.problems[-1])


def test_index_and_shards_disagree(sharded: Path) -> None:
    put(sharded, TWO, "x", *(f"y{i:02d}" for i in range(10)))
    problem = only_problem(sharded, Code.INDEX_MISMATCH, "1 tensors: c", "11 tensors: x, y00", "y06 and 3 more")
    assert problem.file == sharded / TWO


def test_index_places_a_tensor_in_the_wrong_shard(sharded: Path) -> None:
    put_index(sharded, {"a": ONE, "b": TWO, "c": TWO})
    error = refusal(sharded)
    assert [(problem.code, problem.file) for problem in error.problems] == [
        (Code.INDEX_MISMATCH, sharded / ONE),
        (Code.INDEX_MISMATCH, sharded / TWO),
    ]


@pytest.mark.parametrize("indexed", [True, False])
def test_tensor_in_two_files(sharded: Path, indexed: bool) -> None:
    put(sharded, TWO, "c", "a")
    if not indexed:
        (sharded / INDEX).unlink()
    only_problem(sharded, Code.TENSOR_DUPLICATE, ONE, TWO, "1 tensors", ": a")


def test_problems_of_all_files_come_at_once(sharded: Path) -> None:
    (sharded / "config.json").write_text("[]")
    (sharded / ONE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    (sharded / TWO).write_bytes((sharded / TWO).read_bytes()[:-1])
    error = refusal(sharded)
    assert [problem.code for problem in error.problems] == [
        Code.CONFIG_INVALID,
        Code.SAFETENSORS_HEADER,
        Code.SAFETENSORS_TRUNCATED,
    ]


# Links and other files


def test_snapshot_of_the_hub_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    put(blobs, "aa", "a")
    (blobs / "bb").write_text('{"model_type": "llama"}')
    (snapshot / "model.safetensors").symlink_to("../../blobs/aa")
    (snapshot / "config.json").symlink_to("../../blobs/bb")
    found = open_huggingface(snapshot)
    assert found.catalog.tensors["a"].chunks[0].file == "model.safetensors"
    assert found.small_files == (SmallFile(name="config.json", num_bytes=23),)


def test_small_files_behind_links(sharded: Path, tmp_path: Path) -> None:
    (sharded / "LICENSE").write_text("free")
    (sharded / "COPYING").symlink_to("LICENSE")
    assert {"LICENSE", "COPYING"} < {file.name for file in open_huggingface(sharded).small_files}
    (tmp_path / "private").write_text("a key")
    (sharded / "NOTICE").symlink_to(tmp_path / "private")
    problem = only_problem(sharded, Code.PATH_ESCAPES, "NOTICE is a link to", "private")
    assert problem.file == sharded / "NOTICE"
    with pytest.raises(ShardwayError, match="path-escapes"):
        read_companions(sharded)


@pytest.mark.parametrize("name", ["config.json", ONE, INDEX, "tokenizer.json"])
def test_link_to_nowhere(sharded: Path, name: str) -> None:
    (sharded / name).unlink(missing_ok=True)
    (sharded / name).symlink_to("../blobs/gone")
    problem = only_problem(sharded, Code.FILE_MISSING, "../blobs/gone", "cache is incomplete")
    assert problem.file == sharded / name


def test_link_to_nowhere_that_is_not_needed(sharded: Path) -> None:
    (sharded / "pytorch_model.bin").symlink_to("gone")
    assert open_huggingface(sharded).left_out == ("pytorch_model.bin",)


def test_small_files(sharded: Path) -> None:
    for name in ("tokenizer.json", ".gitattributes", ".cache/x.json", "assets/y/z.txt", "assets/y/deep/er.txt"):
        (sharded / name).parent.mkdir(parents=True, exist_ok=True)
        (sharded / name).write_text("12345")
    for name, num_bytes in (("limit.txt", 2**26), ("huge.txt", 2**26 + 1)):
        (sharded / name).touch()
        os.truncate(sharded / name, num_bytes)
    os.mkfifo(sharded / "pipe")
    (sharded / "link").symlink_to("assets")
    found = open_huggingface(sharded)
    assert [file.name for file in found.small_files] == ["assets/y/z.txt", "config.json", "limit.txt", "tokenizer.json"]
    assert found.small_files[-1].num_bytes == 5
    assert found.left_out == ("assets/y/deep/", "huge.txt", "link/", "pipe")


def test_directory_that_cannot_be_listed(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sharded / "assets").mkdir()
    whole_scandir = os.scandir

    def scandir(path: Path) -> object:
        if path.name == "assets":
            raise PermissionError(13, "Permission denied")
        return whole_scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    only_problem(sharded, Code.FILE_UNREADABLE, "assets", "Permission denied")


# Splitting into shards

SIZES = st.lists(st.integers(0, 12), max_size=20)


def named(sizes: list[int]) -> list[tuple[str, DType, Shape]]:
    return [(f"t{i}", U8, (size,)) for i, size in enumerate(sizes)]


@given(sizes=SIZES, limit=st.integers(1, 20))
@settings(deadline=None)
def test_splits_as_huggingface_hub_does(sizes: list[int], limit: int) -> None:
    hub = pytest.importorskip("huggingface_hub.serialization._base")
    split = hub.split_state_dict_into_shards_factory(
        {f"t{i}": size for i, size in enumerate(sizes)},
        get_storage_size=lambda size: size,
        get_storage_id=lambda size: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    shards = shard_tensors(named(sizes), limit)
    assert {shard.file: [name for name, _, _ in shard.tensors] for shard in shards} == split.filename_to_tensors


def test_a_giant_gets_its_own_shard() -> None:
    shards = shard_tensors(named([2, 9, 2, 3]), 4)
    assert [(shard.file, [name for name, _, _ in shard.tensors]) for shard in shards] == [
        ("model-00001-of-00003.safetensors", ["t1"]),
        ("model-00002-of-00003.safetensors", ["t0", "t2"]),
        ("model-00003-of-00003.safetensors", ["t3"]),
    ]


def test_one_shard_has_the_plain_name() -> None:
    assert [shard.file for shard in shard_tensors(named([2, 2]), 4)] == ["model.safetensors"]
    assert shard_tensors([], 4) == ()


def test_unsplittable() -> None:
    with pytest.raises(ShardwayError, match="0 bytes") as caught:
        shard_tensors(named([1]), 0)
    assert caught.value.codes == {Code.OPTION_INVALID}
    with pytest.raises(ShardwayError, match="tensor t is to be written twice") as caught:
        shard_tensors([("t", U8, (1,)), ("t", U8, (1,))], 1)
    assert caught.value.codes == {Code.TENSOR_DUPLICATE}


def test_index_as_transformers_writes_it() -> None:
    bfloat16 = dtype_of_torch("bfloat16")
    shards = shard_tensors([("b", bfloat16, (2, 3)), ("a", U8, (5,))], 12)
    assert index_json(shards).decode() == (
        '{\n  "metadata": {\n    "total_parameters": 11,\n    "total_size": 17\n  },\n  "weight_map": {\n'
        '    "a": "model-00002-of-00002.safetensors",\n    "b": "model-00001-of-00002.safetensors"\n  }\n}\n'
    )


# What transformers wrote


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the checkpoints that transformers wrote are not here")
@pytest.mark.parametrize("root", sorted(FIXTURES.glob("*")), ids=lambda root: root.name)
def test_opens_what_transformers_wrote(root: Path) -> None:
    found = open_huggingface(root)
    assert found.files == ("model.safetensors",)
    assert found.config["architectures"]
    assert {file.name for file in found.small_files} == {path.name for path in root.glob("*.json")}
    assert found.left_out == ()


def test_shards_that_transformers_wrote(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=4000)
    found = open_huggingface(tmp_path)
    assert len(found.files) > 2
    state = model.state_dict()
    assert {name: tensor.shape for name, tensor in found.catalog.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }
    for name, tensor in found.catalog.tensors.items():
        content = (tmp_path / tensor.chunks[0].file).read_bytes()[tensor.chunks[0].offset :]
        assert content[: tensor.num_bytes] == bytes(state[name].contiguous().view(torch.uint8).flatten().tolist())
    # Splitting the same tensors in the same order gives the same files and the same index.
    in_order = [(name, found.catalog.tensors[name].dtype, tuple(tensor.shape)) for name, tensor in state.items()]
    shards = shard_tensors(in_order, 4000)
    assert index_json(shards) == (tmp_path / INDEX).read_bytes()
