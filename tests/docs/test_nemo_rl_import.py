"""The example of NeMo RL's import and export runs, and its results are the original."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.megatron import require
from tests.tiny import bits, read_safetensors, same

ROOT = Path(__file__).resolve().parents[2]
HF = ROOT / "tests/fixtures/hf/qwen3_moe"
DEADLINE_S = 150

pytestmark = pytest.mark.timeout(200)


def test_import_on_two_ranks_and_export(tmp_path: Path) -> None:
    require("torch", "megatron.core", "psutil")
    command = [sys.executable, "-P", str(ROOT / "examples/nemo_rl_import.py"), "--hf", str(HF), "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=DEADLINE_S, start_new_session=True)
    output = done.stdout.decode()
    assert done.returncode == 0, output + done.stderr.decode()
    assert "on 2 ranks (TP=2, PP=1)" in output
    assert "megatron: bit for bit the same\nexported: bit for bit the same\n" in output
    assert same(bits(read_safetensors(HF).items()), bits(read_safetensors(tmp_path / "exported").items()))
    assert (tmp_path / "megatron/latest_checkpointed_iteration.txt").read_text() == "0"
