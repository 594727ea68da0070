"""Migrating checkpoints of Megatron Bridge, and ours: forms, layouts and chunks, there and back, bit for bit."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.megatron import Failed, Job, require, run_jobs
from tests.tiny import Tiny, listing, read_distcp, same, write_chunks

import shardway
from shardway.cli.main import main
from shardway.core.boxes import Box
from shardway.families.config import HFConfig
from shardway.families.mapping import map_model
from shardway.formats.common_state import moved_common_state
from shardway.formats.pickles import SavedObject
from shardway.formats.saved_objects import read_torch_bytes, write_torch_file
from shardway.formats.torch_dist import COMMON_STATE, open_torch_dist

if TYPE_CHECKING:
    from shardway.formats.torch_dist import TorchDistCheckpoint

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
NEW = sorted(path.name for path in (FIXTURES / "megatron_bridge_0.7.0").iterdir() if path.is_dir())
OLD = FIXTURES / "megatron_bridge_0.3.1/llama"
MODEL = Tiny(layers=3)


def objects(checkpoint: TorchDistCheckpoint) -> dict[str, bytes]:
    return {key: checkpoint.object_bytes(key) for key in checkpoint.objects if key != COMMON_STATE}


def chunks(checkpoint: TorchDistCheckpoint) -> dict[str, set[Box]]:
    return {
        name: {Box(chunk.start, chunk.size) for chunk in tensor.chunks}
        for name, tensor in checkpoint.catalog.tensors.items()
    }


def assert_same_values(one: Path, other: Path) -> None:
    """Tensors, objects, common state, chunks and all other files."""
    left, right = open_torch_dist(one), open_torch_dist(other)
    assert same(read_distcp(one), read_distcp(other))
    assert {name: tensor.dtype for name, tensor in left.catalog.tensors.items()} == {
        name: tensor.dtype for name, tensor in right.catalog.tensors.items()
    }
    assert objects(left) == objects(right)
    assert (left.common, left.iteration, left.release) == (right.common, right.iteration, right.release)
    own = (".metadata", "metadata.json", "common.pt", "shardway.json")
    files = [
        {
            name: (each.root / name).read_bytes()
            for name in each.files
            if name not in own and not name.endswith(".distcp")
        }
        for each in (left, right)
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", NEW)
def test_new_form_there_and_back(name: str, tmp_path: Path) -> None:
    source = FIXTURES / "megatron_bridge_0.7.0" / name
    report = shardway.migrate(source, tmp_path / "old", verify=True, fsync=False)
    assert (report.form, report.reused, report.verified) == ("mcore-0.16", False, True)
    old = open_torch_dist(tmp_path / "old")
    assert old.common_form == "common.pt"
    assert COMMON_STATE not in old.objects
    assert json.loads((old.root / "metadata.json").read_text())["common_backend"] == "torch"
    assert_same_values(source, tmp_path / "old")
    assert chunks(old) == chunks(open_torch_dist(source))
    assert shardway.verify(tmp_path / "old").equal

    shardway.migrate(tmp_path / "old", tmp_path / "new", to="mcore-0.20", fsync=False)
    new, original = open_torch_dist(tmp_path / "new"), open_torch_dist(source)
    assert new.common_form == "common_state"
    assert not (new.root / "common.pt").exists()
    assert (new.root / "metadata.json").read_bytes() == (original.root / "metadata.json").read_bytes()
    assert new.objects == original.objects
    listed = [read_torch_bytes(each.object_bytes(COMMON_STATE), file="") for each in (new, original)]
    assert listed[0] == listed[1]
    assert isinstance(listed[0], list)
    assert_same_values(source, tmp_path / "new")
    assert shardway.verify(tmp_path / "new").equal
    assert shardway.verify(source, tmp_path / "new").equal


def test_old_form_there_and_back(tmp_path: Path) -> None:
    shardway.migrate(OLD, tmp_path / "new", to="mcore-0.20", fsync=False)
    assert open_torch_dist(tmp_path / "new").common_form == "common_state"
    assert_same_values(OLD, tmp_path / "new")
    shardway.migrate(tmp_path / "new", tmp_path / "old", fsync=False)
    assert_same_values(OLD, tmp_path / "old")
    common = [
        read_torch_bytes((path / "iter_0000000/common.pt").read_bytes(), file="") for path in (OLD, tmp_path / "old")
    ]
    assert common[0] == common[1]


@pytest.mark.parametrize("name", ["llama", "llama_tp2", "qwen3_moe", "qwen3_moe_ep2"])
def test_layouts_there_and_back(name: str, tmp_path: Path) -> None:
    """What comes of it is what an import makes in that layout; no family is asked."""
    source = FIXTURES / "megatron_bridge_0.7.0" / name
    shardway.migrate(source, tmp_path / "apart", layout="per-layer", verify=True, fsync=False)
    model = name.removesuffix("_tp2").removesuffix("_ep2")
    shardway.import_hf(FIXTURES / "hf" / model, tmp_path / "imported", layout="per-layer", fsync=False)
    apart, imported = open_torch_dist(tmp_path / "apart"), open_torch_dist(tmp_path / "imported")
    assert same(read_distcp(tmp_path / "apart"), read_distcp(tmp_path / "imported"))
    assert apart.objects == imported.objects
    assert apart.content_metadata == imported.content_metadata
    assert shardway.verify(source, tmp_path / "apart").equal

    shardway.migrate(tmp_path / "apart", tmp_path / "again", layout="stacked", to="mcore-0.20", fsync=False)
    assert_same_values(source, tmp_path / "again")
    assert chunks(open_torch_dist(tmp_path / "again")) == chunks(open_torch_dist(source))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("megatron_bridge_0.7.0/llama", "megatron-core, mcore >= 0.19"),
        ("megatron_bridge_0.3.1/llama", "megatron-core, mcore <= 0.18"),
    ],
)
def test_inspect_says_who_wrote_a_checkpoint(path: str, says: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / path, tmp_path / "m")
    assert shardway.inspect(tmp_path / "m").written_by == says
    (tmp_path / "m/iter_0000000/run_config.yaml").write_text("model: {}")
    assert shardway.inspect(tmp_path / "m").written_by == says.replace("megatron-core", "Megatron Bridge")
    shardway.migrate(tmp_path / "m", tmp_path / "out", to="mcore-0.20", fsync=False)
    report = shardway.inspect(tmp_path / "out")
    assert report.written_by == f"shardway {shardway.__version__}"
    assert report.form == "mcore >= 0.19 (common_state)"


def test_layers_that_differ_can_not_be_stacked(tmp_path: Path) -> None:
    with pytest.raises(shardway.ShardwayError) as caught:
        shardway.migrate(
            FIXTURES / "megatron_bridge_0.7.0/deepseek_v3", tmp_path / "out", layout="stacked", fsync=False
        )
    assert caught.value.codes == {"option-invalid"}
    assert "mlp.experts" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_singleton_shards_are_stacked(tmp_path: Path) -> None:
    """Halves of a gated MLP under keys of their own become the rows of one tensor."""
    require("torch")
    tensors = MODEL.megatron(MODEL.weights(), per_layer=True)
    for key in [key for key in tensors if key.endswith("linear_fc1.weight")]:
        whole = tensors.pop(key)
        tensors |= {f"{key}_w": whole[: len(whole) // 2], f"{key}_v": whole[len(whole) // 2 :]}
    chunked = {name: [(Box((0,) * array.ndim, array.shape), array)] for name, array in tensors.items()}
    write_chunks(tmp_path / "iter_0000001", {name: array.shape for name, array in tensors.items()}, chunked)
    shardway.migrate(tmp_path / "iter_0000001", tmp_path / "out", layout="stacked", verify=True, fsync=False)
    assert same(read_distcp(tmp_path / "out"), MODEL.megatron(MODEL.weights()))


def test_everything_of_a_training_run_is_carried(tmp_path: Path) -> None:
    """Optimizer states change their layout with the weights; objects are carried unread."""
    require("torch")
    import torch
    from tests.oracle import read_torch_dist, same_bits, write_torch_dist

    weights = {
        name: torch.from_numpy(a.copy()).view(torch.bfloat16) for name, a in MODEL.megatron(MODEL.weights()).items()
    }
    state = {
        f"optimizer.state.{kind}.{name}": torch.randn(tensor.shape)
        for kind in ("exp_avg", "param")
        for name, tensor in weights.items()
    }
    bucket = {"optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_x.bucket_idx_0.param": torch.randn(7)}
    rest: dict[str, object] = {"rng_state/shard_0_1": [{"x": 1}], "optimizer.param_groups": [{"lr": 1e-4}]}
    folder = tmp_path / "m/iter_0000010"
    write_torch_dist(folder, weights | state | bucket | rest, num_layers=3, per_layer=False)  # type: ignore[arg-type]
    shardway.migrate(folder, tmp_path / "out", layout="per-layer", to="mcore-0.20", fsync=False)
    found, _ = read_torch_dist(tmp_path / "out/iter_0000010")
    for name, tensor in (weights | state | bucket).items():
        head, _, tail = name.partition("decoder.layers.")
        if tail:
            layers = [found.pop(f"{head}decoder.layers.{i}.{tail}") for i in range(3)]
            assert same_bits(torch.stack(layers), tensor), name
        else:
            assert same_bits(found.pop(name), tensor), name
    assert not found
    old, new = open_torch_dist(folder), open_torch_dist(tmp_path / "out")
    assert all(new.object_bytes(key) == old.object_bytes(key) for key in rest)
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text().strip() == "10"
    assert not (tmp_path / "out/latest_train_state.pt").exists()
    assert shardway.verify(tmp_path / "out").equal


def test_a_changed_source_is_noticed(tmp_path: Path) -> None:
    """A flipped bit in a tensor, against the digest that was recorded."""
    MODEL.write(tmp_path / "hf")
    shardway.import_hf(tmp_path / "hf", tmp_path / "m", fsync=False)
    report = shardway.migrate(tmp_path / "m", tmp_path / "whole", layout="per-layer", fsync=False)
    checkpoint = open_torch_dist(tmp_path / "m")
    assert report.num_digests == sum(len(tensor.chunks) for tensor in checkpoint.catalog.tensors.values())
    chunk = checkpoint.catalog.tensors["decoder.layers.mlp.linear_fc2.weight"].chunks[1]
    with (checkpoint.root / chunk.file).open("r+b") as file:
        file.seek(chunk.offset)
        byte = file.read(1)[0]
        file.seek(chunk.offset)
        file.write(bytes((byte ^ 1,)))
    before = listing(tmp_path / "whole")
    with pytest.raises(shardway.ShardwayError) as caught:
        shardway.migrate(tmp_path / "m", tmp_path / "out", layout="per-layer", fsync=False)
    assert caught.value.codes == {"digest-mismatch"}
    assert "decoder.layers.1.mlp.linear_fc2.weight" in str(caught.value)
    assert not (tmp_path / "out/iter_0000000").exists()
    assert listing(tmp_path / "whole") == before


def test_what_is_there_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MODEL.write(tmp_path / "hf")
    shardway.import_hf(tmp_path / "hf", tmp_path / "m", fsync=False)
    command = ["migrate", str(tmp_path / "m"), str(tmp_path / "out"), "--no-fsync", "--json"]
    assert main([*command, "--to", "mcore-0.20"]) == 0
    assert main([*command, "--to", "mcore-0.20"]) == 1
    capsys.readouterr()
    assert main([*command, "--to", "mcore-0.20", "--if-exists", "reuse"]) == 0
    assert json.loads(capsys.readouterr().out)["reused"] is True
    for other in (["--to", "mcore-0.16"], ["--layout", "per-layer"], ["--chunk-for", "tp=2"]):
        assert main([*command, "--to", "mcore-0.20", *other, "--if-exists", "reuse"]) == 1, other
    assert main([*command, "--layout", "per-layer", "--if-exists", "replace", "--verify"]) == 0
    assert shardway.verify(tmp_path / "out", tmp_path / "m").equal
    assert shardway.inspect(tmp_path / "out").layout == "per-layer"
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "again"), "--quiet"]) == 0
    assert shardway.verify(tmp_path / "again", tmp_path / "hf").equal
    assert main(["migrate", str(tmp_path / "m"), str(tmp_path / "m"), "--if-exists", "replace"]) == 1
    assert "inside" in capsys.readouterr().err


def test_a_link_out_of_the_checkpoint_is_not_followed(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "m")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "m/iter_0000000/notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(shardway.ShardwayError) as caught:
        shardway.migrate(tmp_path / "m", tmp_path / "out", fsync=False)
    assert caught.value.codes == {"path-escapes"}


def test_megatron_core_loads_both_layouts_of_an_old_form(tmp_path: Path) -> None:
    """megatron-core 0.16.1 itself, under its default strictness, from what its successor wrote."""
    require("torch", "megatron.core")
    source = FIXTURES / "megatron_bridge_0.7.0/llama"
    config = json.loads((FIXTURES / "hf/llama/config.json").read_text())
    fields = dict(map_model(HFConfig(config)).megatron_config)
    jobs = []
    for layout in ("stacked", "per-layer"):
        shardway.migrate(source, tmp_path / layout, layout=layout, chunk_for="tp=2", fsync=False)
        checkpoint = tmp_path / layout / "iter_0000000"
        jobs.append(Job(name=layout, checkpoint=checkpoint, fields=fields, tokens=[[1, 2, 3, 4]]))
    jobs.append(Job(name="0.3.1", checkpoint=OLD / "iter_0000000", fields=fields, tokens=[[1, 2, 3, 4]]))
    (tmp_path / "ranks").mkdir()
    found = run_jobs(jobs, tmp_path / "ranks")
    logits = []
    for outcome in found.values():
        assert not isinstance(outcome, Failed), outcome.report
        assert outcome.unexpected == ()
        logits.append(outcome.logits)
    assert (logits[0] == logits[1]).all()
    assert math.isfinite(float(logits[0].sum()))


VALUES: dict[str, object] = {
    "args": SavedObject("argparse.Namespace", state={"lr": float("nan"), "names": ["a", "b"], "none": None}),
    "iteration": 3,
    "content_metadata": {"singleton_local_shards": False},
}


class TestCommonState:
    """Opcodes around a pickle that stays what it is."""

    def test_there_and_back(self) -> None:
        data = write_torch_file(VALUES, name="common")
        listed = moved_common_state(data, listed=True, file="x")
        assert repr(read_torch_bytes(listed, file="x")) == repr([VALUES])
        again = moved_common_state(listed, listed=False, file="x")
        assert repr(read_torch_bytes(again, file="x")) == repr(VALUES)
        assert moved_common_state(data, listed=False, file="x") is data

    def test_torch_reads_it(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        value = {"a": torch.arange(5), "b": {"c": "text", "d": ("text", 2.5)}, "content_metadata": {}}
        torch.save(value, tmp_path / "common.pt")
        moved = moved_common_state(
            (tmp_path / "common.pt").read_bytes(), listed=True, file="x", content_metadata={"x": True, "y": "text"}
        )
        (tmp_path / "moved.pt").write_bytes(moved)
        (found,) = torch.load(tmp_path / "moved.pt", weights_only=True)
        assert torch.equal(found.pop("a"), value.pop("a"))
        assert found == {**value, "content_metadata": {"x": True, "y": "text"}}

    @pytest.mark.parametrize("protocol", [3, 4])
    def test_another_protocol_is_refused(self, protocol: int, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        torch.save({"iteration": 1}, tmp_path / "common.pt", pickle_protocol=protocol)
        with pytest.raises(shardway.ShardwayError) as caught:
            moved_common_state((tmp_path / "common.pt").read_bytes(), listed=True, file="x")
        assert caught.value.codes <= {"metadata-invalid", "pickle-invalid"}
