"""Records of live models on real ranks agree with Megatron-Core's own, and what is written from them loads back."""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest
from tests.megatron import megatron_fields, require
from tests.oracle import read_safetensors, read_torch_dist, same_bits
from tests.ranks.live_worker import pattern, run_world

from shardway.core.boxes import Box, exact_cover
from shardway.live.assemble import assemble
from shardway.live.written import WriterResult

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Imported

pytestmark = pytest.mark.timeout(150)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model on a grid of ranks, and the grid that loads it back."""

    model: str
    ranks: int = 1
    tp: int = 1
    pp: int = 1
    ep: int | None = None
    vpp: int | None = None
    per_layer: bool = False

    def __str__(self) -> str:
        sizes = f"{self.model}-{self.ranks}-tp{self.tp}-pp{self.pp}"
        extra = "".join(f"-{name}{value}" for name, value in (("ep", self.ep), ("vpp", self.vpp)) if value)
        return sizes + extra + ("-per-layer" if self.per_layer else "")

    def task(self, folder: Path) -> dict[str, Any]:
        task: dict[str, Any] = {"model": self.model, "tp": self.tp, "pp": self.pp, "folder": str(folder)}
        task |= {name: value for name, value in (("ep", self.ep), ("vpp", self.vpp)) if value}
        return task | ({"metadata": {"non_homogeneous_layers": True}} if self.per_layer else {})


CASES = [
    *(Case(model=model) for model in ("untied", "tied", "biases", "layernorm", "moe", "mixed")),
    *(Case(model=model, per_layer=True) for model in ("untied", "tied", "biases")),
    Case(model="tied", ranks=2),  # data parallel
    Case(model="untied", ranks=2, tp=2),
    Case(model="biases", ranks=2, tp=2, per_layer=True),
    Case(model="layernorm", ranks=2, tp=2),
    Case(model="tied", ranks=2, pp=2),
    Case(model="untied", ranks=2, pp=2, vpp=2),
    Case(model="tied", ranks=2, pp=2, vpp=2, per_layer=True),
    Case(model="moe", ranks=2, ep=2),
    Case(model="mixed", ranks=2, pp=2),
    Case(model="tied", ranks=4, tp=2, pp=2),
    Case(model="untied", ranks=4, tp=2),
    Case(model="moe", ranks=4, ep=2, tp=2),
    Case(model="mixed", ranks=4, ep=2, pp=2),
]


CONTENT: dict[str, object] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """What the ranks of a case announced, and the iteration folder that was assembled from what they wrote."""

    answers: list[dict[str, Any]]
    checkpoint: Path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Saved]:
    """Runs all cases of one world size when the first of them is asked for."""
    require("megatron.core")

    @functools.cache
    def run(num_ranks: int) -> Path:
        root = tmp_path_factory.mktemp(f"save{num_ranks}")
        tasks = [case.task(root / str(case)) | {"action": "save_megatron"} for case in CASES if case.ranks == num_ranks]
        run_world(tasks, num_ranks, root / "world")
        return root

    @functools.cache
    def save(case: Case) -> Saved:
        folder = run(case.ranks) / str(case)
        answers = [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(case.ranks)]
        finish(folder, case.ranks, answers[-1]["content_metadata"])
        return Saved(answers=answers, checkpoint=folder / "iter_0000000")

    return save


def finish(folder: Path, num_ranks: int, content_metadata: dict[str, object]) -> None:
    """Assemble what the ranks wrote, as a coordinator does."""
    results = [WriterResult.from_bytes((folder / f"{rank}.result").read_bytes()) for rank in range(num_ranks)]
    assembly = assemble(results, iteration=0, content_metadata=content_metadata)
    for name, contents in assembly.small_files.items():
        (folder / "iter_0000000" / name).write_bytes(contents)
    for name, num_bytes in assembly.files.items():
        assert (folder / "iter_0000000" / name).stat().st_size == num_bytes
    (folder / "latest_checkpointed_iteration.txt").write_text("0")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_records_are_what_megatron_says(case: Case, saved: Callable[[Case], Saved]) -> None:
    for answer in saved(case).answers:
        ours = {(shard.key, shard.start, shard.global_shape, shard.replica == 0) for shard in answer["shards"]}
        mains = {(key, start) for key, start, _, main in answer["own"] if main}
        expected = {one for one in answer["own"] if one[3] or one[:2] not in mains}
        assert ours == expected
        assert len(ours) == len(answer["shards"])
        assert {(item.key, item.replica == 0) for item in answer["objects"]} == set(answer["own_objects"])
        assert answer["left_out"] == ()
        per_layer = case.per_layer or case.model == "mixed"
        assert answer["content_metadata"] == CONTENT | ({"non_homogeneous_layers": True} if per_layer else {})
        assert answer["resizable"] <= {"embedding.word_embeddings.weight", "output_layer.weight"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_main_replicas_of_all_ranks_cover_every_tensor_once(case: Case, saved: Callable[[Case], Saved]) -> None:
    boxes: dict[str, list[Box]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for answer in saved(case).answers:
        for shard in answer["shards"]:
            assert shapes.setdefault(shard.key, shard.global_shape) == shard.global_shape
            if not shard.replica:
                boxes.setdefault(shard.key, []).append(Box(shard.start, shard.size))
    for key, shape in shapes.items():
        assert exact_cover(shape, boxes[key]) is None, key
    alone = saved(Case(model=case.model, per_layer=case.per_layer)).answers[0]
    assert shapes == {shard.key: shard.global_shape for shard in alone["shards"]}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_reads_the_global_tensors(case: Case, saved: Callable[[Case], Saved]) -> None:
    import torch

    result = saved(case)
    tensors, objects = read_torch_dist(result.checkpoint)
    for key, tensor in tensors.items():
        assert torch.equal(tensor, pattern(key, tuple(tensor.shape))), key
    assert tensors.keys() == {shard.key for answer in result.answers for shard in answer["shards"]}
    assert objects.keys() == {item.key for answer in result.answers for item in answer["objects"]}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_megatron_loads_every_element_back(num_ranks: int, saved: Callable[[Case], Saved], tmp_path: Path) -> None:
    """What one rank saved is loaded by two pipeline stages, what several saved by one process; default strictness."""
    tasks = []
    for case in CASES:
        if (case.ranks == 1) == (num_ranks == 2):
            grid = dataclasses.replace(case, ranks=num_ranks, tp=1, pp=num_ranks, ep=None, vpp=None)
            task = grid.task(tmp_path / "answers") | {"action": "load_megatron"}
            tasks.append(task | {"checkpoint": str(saved(case).checkpoint)})
    run_world(tasks, num_ranks, tmp_path / "world")


def test_a_hugging_face_model_comes_back_bit_by_bit(
    hf_model: Callable[[str], Path], imported: Imported, tmp_path: Path
) -> None:
    """Imported, loaded by megatron-core on two ranks (once with a padded vocabulary), saved from there, exported."""
    import shardway

    names = ["llama", "llama_biases", "qwen2_tied", "qwen3_tied"]
    tasks = []
    for name in names:
        config = json.loads((hf_model(name) / "config.json").read_text())
        fields = megatron_fields(config)
        task: dict[str, Any] = {
            "action": "save_megatron",
            "model": fields,
            "dtype": "bfloat16",
            "folder": str(tmp_path / name),
        }
        task["tp" if name != "qwen2_tied" else "pp"] = 2
        if name == "llama":
            fields["vocab_size"] = 256
            shape = [config["vocab_size"], config["hidden_size"]]
            task["trim"] = {"embedding.word_embeddings.weight": shape, "output_layer.weight": shape}
        tasks.append(task | {"checkpoint": str(imported(name) / "iter_0000000")})
    run_world(tasks, 2, tmp_path / "world")
    for name in names:
        finish(tmp_path / name, 2, CONTENT)
        shardway.export_hf(tmp_path / name, tmp_path / f"{name}-hf", hf=hf_model(name))
        before, after = read_safetensors(hf_model(name)), read_safetensors(tmp_path / f"{name}-hf")
        assert before.keys() == after.keys()
        assert [key for key in before if not same_bits(before[key], after[key])] == []


@pytest.mark.parametrize(
    ("num_ranks", "kinds"), [(2, ["plain", "fsdp"]), (4, ["fsdp", "hsdp", "fsdp_tp", "tp"]), (6, ["fsdp_tp"])]
)
def test_plain_torch_models(num_ranks: int, kinds: list[str], tmp_path: Path) -> None:
    """FSDP2 (even, uneven, empty shards, replicas, on top of tensor parallelism) and replicated models."""
    require("torch")
    tasks = [{"action": "save_plain", "kind": kind, "folder": str(tmp_path / kind)} for kind in kinds]
    run_world(tasks, num_ranks, tmp_path / "world")
    import torch

    for kind in kinds:
        answers = [pickle.loads((tmp_path / kind / f"{rank}.pickle").read_bytes()) for rank in range(num_ranks)]
        for rank, shards in enumerate(answers):
            assert len({shard[:-1] for shard in shards}) == len(shards)
            replicas = {shard.replica for shard in shards if shard.key in ("0.weight", "2.weight")}
            if kind == "plain":
                assert replicas == {rank}
            if kind == "fsdp":
                assert replicas == {0}
            if kind == "hsdp":
                assert replicas == {rank // 2}
        finish(tmp_path / kind, num_ranks, {})
        expected = torch.load(tmp_path / kind / "full.pt", weights_only=True)
        if kind == "plain":
            expected["6.bias"] = expected["5.bias"]
        tensors, _ = read_torch_dist(tmp_path / kind / "iter_0000000")
        assert tensors.keys() == expected.keys()
        assert {key: tensor.shape for key, tensor in tensors.items()} == {key: expected[key].shape for key in expected}
        flat = {key: (tensors[key].reshape(-1), expected[key].reshape(-1)) for key in expected}
        assert [key for key, pair in flat.items() if not same_bits(*pair)] == []
