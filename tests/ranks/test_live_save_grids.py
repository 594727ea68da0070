"""However the ranks divide a model, a live save stores the same global tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.oracle import read_torch_dist, same_bits
from tests.ranks.fleet import World, same_report
from tests.ranks.live_worker import MODELS, pattern

import shardway

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.ranks.conftest import Known
    from tests.ranks.fleet import Fleet

PER_LAYER = "per-layer"
Grid = dict[str, int]

# Ranks, grid, and which models are saved on it.
GRIDS: list[tuple[int, Grid, list[str]]] = [
    (1, {}, ["untied", PER_LAYER, "tied", "moe", "mixed"]),
    (2, {}, ["untied", "moe"]),
    (2, {"tp": 2}, ["untied", PER_LAYER, "tied"]),
    (2, {"pp": 2}, ["tied", "mixed"]),
    (2, {"pp": 2, "vpp": 2}, ["untied", PER_LAYER]),
    (2, {"ep": 2}, ["moe", "mixed"]),
    (3, {}, ["untied"]),
    (4, {"tp": 2}, ["untied"]),
    (4, {"tp": 2, "pp": 2}, ["tied", PER_LAYER]),
    (4, {"ep": 2}, ["moe"]),
    (4, {"ep": 2, "tp": 2}, ["moe"]),
    (4, {"ep": 2, "pp": 2}, ["mixed"]),
]


def model_of(name: str) -> Any:
    return {**MODELS["untied"], "hetereogenous_dist_checkpoint": True} if name == PER_LAYER else name


def test_every_grid_stores_what_one_process_stores(fleet: Fleet, tmp_path: Path) -> None:
    """Values are a function of key and global index; megatron-core loads them into one process and two stages."""
    worlds, roots = [], []
    for number, (ranks, grid, names) in enumerate(GRIDS):
        for name in names:
            roots.append((name, tmp_path / f"{number}-{name}"))
            options = {"fully_parallel_save": bool(number % 2), "writers_per_rank": 1 + number % 3}
            tasks = [{"do": "save", "path": roots[-1][1], **options}]
            worlds.append(World(ranks=ranks, tasks=tasks, model=model_of(name), grid=grid))
    for world, ran in zip(worlds, fleet.run(*worlds), strict=True):
        assert same_report(ran.of(0))["arrived"] == list(range(world.ranks))
    alone: dict[str, dict[str, Any]] = {}
    loads: dict[str, list[dict[str, Any]]] = {}
    for name, root in roots:
        report = shardway.inspect(root, digest=True)
        found = {key: (tensor.shape, tensor.dtype, tensor.sha256) for key, tensor in report.tensors.items()}
        assert found == alone.setdefault(name, found), root
        assert report.objects
        loads.setdefault(name, []).append({"do": "load", "checkpoint": root / "iter_0000000"})
        assert ("decoder.layers.0.mlp.linear_fc2.weight" in found) == (name in (PER_LAYER, "mixed"))
    for name, (_, root) in zip(alone, roots, strict=False):
        tensors, _ = read_torch_dist(root / "iter_0000000")
        assert [key for key in tensors if not same_bits(tensors[key], pattern(key, tuple(tensors[key].shape)))] == []
        assert tensors.keys() == alone[name].keys()
    fleet.run(
        *(World(ranks=1, tasks=tasks, model=model_of(name)) for name, tasks in loads.items()),
        *(World(ranks=2, tasks=loads[name][:1], model=model_of(name), grid={"pp": 2}) for name in ("tied", PER_LAYER)),
    )


def test_known_families_export_bit_by_bit(fleet: Fleet, known: Callable[[str], Known], tmp_path: Path) -> None:
    """A vocabulary that tensor parallelism pads, tied embeddings on two stages, biases; no --hf for the export."""
    cases: list[tuple[str, int, dict[str, int]]] = [
        ("llama_odd_vocab", 2, {"tp": 2}),
        ("llama_biases", 4, {"tp": 2, "pp": 2}),
        ("qwen2_tied", 2, {"pp": 2}),
        ("qwen3_tied", 2, {"tp": 2}),
        ("mistral", 3, {}),
    ]
    worlds = []
    for name, ranks, grid in cases:
        model = known(name)
        worlds.append(model.world(ranks, [{"do": "save", "path": tmp_path / name, "hf": model.hf}], **grid))
    for ran in fleet.run(*worlds):
        same_report(ran.of(0))
    for name, _, _ in cases:
        ours, imported = (root / "iter_0000000" for root in (tmp_path / name, known(name).imported))
        assert (ours / "run_config.yaml").read_bytes() == (imported / "run_config.yaml").read_bytes()
        assert {path.name for path in (ours / "tokenizer").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
        assert shardway.verify(ours).equal
        known(name).check(fleet, {tmp_path / name / "iter_0000000": 1})
