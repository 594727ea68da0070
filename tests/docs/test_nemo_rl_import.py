"""NeMo RL's import and export: the example runs, its own checks find imports, and its checkpoints export."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.megatron import require
from tests.tiny import bits, read_safetensors, same

import shardway

ROOT = Path(__file__).resolve().parents[2]
HF = ROOT / "tests/fixtures/hf/qwen3_moe"
DEADLINE_S = 150
LLAMA = ROOT / "tests/fixtures/hf/llama"
WRITTEN = ROOT / "tests/fixtures/megatron_bridge_0.7.0"

pytestmark = pytest.mark.timeout(200)


def converted(root: Path, model_name: str) -> tuple[Path, bool]:
    """Where NeMo RL looks for a converted model, and whether it takes what is there for one.

    Source: `validate_model_paths` and `setup_model_config` in nemo_rl/models/megatron/setup.py (7ea279a).
    """
    name = f"model_{model_name.replace('/', '_')}" if Path(model_name).exists() else model_name
    return root / name, (root / name / "iter_0000000").exists()


@pytest.mark.parametrize("local", [False, True])
def test_nemo_rl_takes_an_import_for_one_that_it_made(tmp_path: Path, local: bool) -> None:
    model_name = str(LLAMA) if local else "meta-llama/Llama-3.1-8B"
    path, there = converted(tmp_path, model_name)
    assert not there
    shardway.import_hf(LLAMA, path, fsync=False)
    assert converted(tmp_path, model_name) == (path, True)
    assert (path / "iter_0000000/run_config.yaml").is_file()
    assert (path / "latest_checkpointed_iteration.txt").read_text() == "0"
    assert shardway.is_complete(path)
    report = shardway.import_hf(LLAMA, path, if_exists="reuse", fsync=False)
    assert report.reused


def test_nemo_rl_takes_no_conversion_that_failed_for_a_converted_model(tmp_path: Path) -> None:
    shutil.copytree(LLAMA, tmp_path / "hf")
    weights = tmp_path / "hf/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(shardway.ShardwayError):
        shardway.import_hf(tmp_path / "hf", tmp_path / "nemo_rl/org/name", fsync=False)
    assert not converted(tmp_path / "nemo_rl", "org/name")[1]


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("at", ["policy/weights", "policy/weights/iter_0000000"])
def test_a_checkpoint_of_a_run_exports(tmp_path: Path, name: str, at: str) -> None:
    """Weights that Megatron Bridge wrote, in the folders in which NeMo RL has it write them."""
    step = tmp_path / "results/grpo/step_170"
    shutil.copytree(WRITTEN / name, step / "policy/weights")
    run_config = ROOT / f"tests/fixtures/run_config/{name}-0.7.0.yaml"
    shutil.copy(run_config, step / "policy/weights/iter_0000000/run_config.yaml")
    (step / "config.yaml").write_text("policy: {model_name: org/name}\n")
    shardway.export_hf(step / at, tmp_path / "hf", fsync=False)
    original = ROOT / "tests/fixtures/hf" / name
    assert same(bits(read_safetensors(original).items()), bits(read_safetensors(tmp_path / "hf").items()))
    assert {path.name for path in (tmp_path / "hf").glob("tokenizer*")} == {"tokenizer.json", "tokenizer_config.json"}


def test_import_on_two_ranks_and_export(tmp_path: Path) -> None:
    require("torch", "megatron.core", "psutil")
    command = [sys.executable, "-P", str(ROOT / "examples/nemo_rl_import.py"), "--hf", str(HF), "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=DEADLINE_S, start_new_session=True)
    output = done.stdout.decode()
    assert done.returncode == 0, output + done.stderr.decode()
    assert "on 2 ranks (TP=2, PP=1)" in output
    assert all(f"rank {rank} holds " in output for rank in (0, 1))
    assert "megatron: bit for bit the same\nexported: bit for bit the same\n" in output
    assert same(bits(read_safetensors(HF).items()), bits(read_safetensors(tmp_path / "exported").items()))
    assert (tmp_path / "megatron/latest_checkpointed_iteration.txt").read_text() == "0"
