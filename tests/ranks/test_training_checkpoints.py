"""Exports of what Megatron-Core itself saves while it trains: model, optimizer, scheduler, random and rerun state."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from tests.megatron import require
from tests.oracle import read_torch_dist
from tests.tiny import Tiny, bits, read_safetensors, write_model

import shardway
from shardway.families.config import HFConfig
from shardway.families.mapping import map_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.tiny import Array

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("training_worker.py")
SECONDS = 100
MODEL = Tiny(hidden=16, ffn=24)
JOBS: dict[str, dict[str, Any]] = {
    "data-parallel": {},
    "pipeline-parallel": {"pipeline_parallel": 2},
    "singleton": {"tensor_parallel": 2, "metadata": {"singleton_local_shards": True}},
    "buckets": {"sharding": "dp_reshardable"},
    "not distributed": {"distributed": False},
}
REFUSED = {"buckets": "dp_reshardable"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint for every job, by name, and the model ``hf`` that they began with."""
    require("torch", "megatron.core")
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(scale=0.1, size=shape).astype(ml_dtypes.bfloat16).view(np.uint16)
        for name, shape in MODEL.shapes.items()
    }
    hf = write_model(folder / "hf", {**MODEL.config, "max_position_embeddings": 32}, weights)
    shardway.import_hf(hf, folder / "start", fsync=False)
    common = {
        "checkpoint": str(folder / "start/iter_0000000"),
        "fields": dict(map_model(HFConfig({**MODEL.config, "max_position_embeddings": 32})).megatron_config),
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
        "metadata": {"singleton_local_shards": False},
        "wide_norms": False,
        "sharding": "fully_reshardable",
        "distributed": True,
    }
    jobs = [common | job | {"destination": str(folder / name / "iter_0000005")} for name, job in JOBS.items()]
    (folder / "request.json").write_text(json.dumps({"ranks": 2, "jobs": jobs}))
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
        "PYTHONWARNINGS": "ignore",
        "TORCHDYNAMO_DISABLE": "1",
    }
    ranks = []
    for rank in range(2):
        with (folder / f"rank{rank}.log").open("wb") as log:
            command = [sys.executable, "-P", str(WORKER), str(rank), str(folder)]
            ranks.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True))
    codes: list[int | None] = []
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            codes += [process.wait(SECONDS) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join((folder / f"rank{rank}.log").read_text() for rank in range(2))
    return folder


def saved(trained: Path, job: str, prefix: str = "") -> dict[str, Array]:
    """The tensors of a checkpoint below a prefix, as torch reads them, without the padding of the vocabulary."""
    import torch

    tensors, _ = read_torch_dist(trained / job / "iter_0000005")
    found = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix) and (prefix or not key.startswith("optimizer")):
            raw = tensor.view(torch.int16 if tensor.dtype is torch.bfloat16 else torch.int32)
            found[key.removeprefix(prefix)] = raw.numpy().view(np.uint16 if raw.dtype is torch.int16 else np.uint32)
    vocabulary = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {key: array[: MODEL.vocab] if key in vocabulary else array for key, array in found.items()}


def whole(tensors: Mapping[str, Array], *, per_layer: bool) -> dict[str, Array]:
    """The same with the halves of every gated MLP put together."""
    if not per_layer:
        return dict(tensors)
    found = {key: array for key, array in tensors.items() if not key.endswith(("_w", "_v"))}
    for key, array in tensors.items():
        if key.endswith("_w"):
            found[key[:-2]] = np.concatenate((array, tensors[f"{key[:-2]}_v"]))
    return found


def assert_same(left: Mapping[str, Array], right: Mapping[str, Array]) -> None:
    assert left.keys() == right.keys()
    assert [key for key in left if not np.array_equal(left[key], right[key])] == []


@pytest.mark.parametrize("job", JOBS)
def test_weights_are_those_that_were_saved(job: str, trained: Path, tmp_path: Path) -> None:
    report = shardway.export_hf(
        trained / job / "iter_0000005", tmp_path / "out", hf=trained / "hf", verify=True, fsync=False
    )
    exported = dict(bits(read_safetensors(tmp_path / "out").items()))
    per_layer = job == "singleton"
    assert_same(MODEL.megatron(exported, per_layer=per_layer), whole(saved(trained, job), per_layer=per_layer))
    before = dict(bits(read_safetensors(trained / "hf").items()))
    assert all(not np.array_equal(exported[name], before[name]) for name in before)
    assert {"rng_state/shard_0_2", "rerun_state_machine_state/shard_1_2", "common state: opt_param_scheduler"} <= {
        *report.left_out
    }
    state = [key for key in read_torch_dist(trained / job / "iter_0000005")[0] if key.startswith("optimizer")]
    assert set(state) <= {*report.left_out}
    assert any("of training state were left out" in note for note in report.notes)
    assert any("rows" in note for note in report.notes) == (JOBS[job].get("tensor_parallel") == 2)


@pytest.mark.parametrize("job", sorted(JOBS.keys() - REFUSED.keys()))
def test_master_weights_are_those_that_were_saved(job: str, trained: Path, tmp_path: Path) -> None:
    name = "param" if job != "not distributed" else "fp32_param"
    report = shardway.export_hf(
        trained / job / "iter_0000005", tmp_path / "out", hf=trained / "hf", weights="fp32", verify=True, fsync=False
    )
    exported = read_safetensors(tmp_path / "out")
    assert {tag for tag, _ in exported.values()} == {"F32"}
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float32"
    found = MODEL.megatron(dict(bits(exported.items())), per_layer=job == "singleton")
    masters = whole(saved(trained, job, f"optimizer.state.{name}."), per_layer=job == "singleton")
    assert_same(found, masters)
    for key, weight in whole(saved(trained, job), per_layer=job == "singleton").items():
        values = masters[key].view(np.float32)
        assert np.array_equal(values.astype(ml_dtypes.bfloat16).view(np.uint16), weight), key
        assert not np.array_equal(values, weight.view(ml_dtypes.bfloat16).astype(np.float32)), key
    assert not any(f".{name}." in key for key in report.left_out)
    assert any("exp_avg" in key for key in report.left_out)
    assert report.dtypes == {"float32": len(MODEL.shapes)}


@pytest.mark.parametrize("job", REFUSED)
def test_master_weights_that_are_not_stored_by_name_are_refused(job: str, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(shardway.ShardwayError) as caught:
        shardway.export_hf(
            trained / job / "iter_0000005", tmp_path / "out", hf=trained / "hf", weights="fp32", fsync=False
        )
    assert caught.value.codes == {"masters-missing"}
    assert REFUSED[job] in str(caught.value)
    assert not (tmp_path / "out").exists()
