"""Proves the harness on a checkpoint that Megatron Bridge wrote, before it is used to judge ours."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.megatron import Failed, Job, Loaded, megatron_fields, require, run_jobs
from tests.models import logits_of

if TYPE_CHECKING:
    from pathlib import Path

GRIDS = {"one process": (1, 1), "tensor parallel": (2, 1), "pipeline parallel": (1, 2)}
TOKENS = [[(37 * i + 11 * row) % 256 for i in range(136)] for row in range(2)]


@pytest.fixture(scope="module")
def hf_side(shared_fixtures: Path) -> Path:
    return shared_fixtures / "hf/llama"


@pytest.fixture(scope="module")
def outcomes(
    shared_fixtures: Path, hf_side: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Loaded | Failed]:
    require("torch", "megatron.core")
    checkpoint = shared_fixtures / "megatron_bridge_0.3.1/llama/iter_0000000"
    fields = megatron_fields(json.loads((hf_side / "config.json").read_text()))
    jobs = [
        Job(
            name=name,
            checkpoint=checkpoint,
            fields=fields,
            tokens=TOKENS,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
        )
        for name, (tensor_parallel, pipeline_parallel) in GRIDS.items()
    ]
    wrong = {
        "wrong layout": Job(
            name="wrong layout",
            checkpoint=checkpoint,
            fields=fields,
            tokens=TOKENS,
            metadata={"non_homogeneous_layers": True},
        ),
        "wrong rope": Job(
            name="wrong rope", checkpoint=checkpoint, fields=fields | {"rotary_base": 5000}, tokens=TOKENS
        ),
    }
    return run_jobs([*wrong.values(), *jobs], tmp_path_factory.mktemp("fixture"))


@pytest.mark.parametrize("grid", GRIDS)
def test_megatron_agrees_with_transformers(outcomes: dict[str, Loaded | Failed], hf_side: Path, grid: str) -> None:
    require("transformers")
    outcome = outcomes[grid]
    assert isinstance(outcome, Loaded), outcome.report
    assert outcome.unexpected == ()
    assert all(key.endswith("._extra_state") for key in outcome.missing), outcome.missing
    np.testing.assert_allclose(outcome.logits, logits_of(hf_side, TOKENS).numpy(), rtol=0, atol=1e-4)


def test_a_load_of_the_wrong_layout_is_reported(outcomes: dict[str, Loaded | Failed]) -> None:
    outcome = outcomes["wrong layout"]
    assert isinstance(outcome, Failed)
    assert "decoder.layers.0." in outcome.report


def test_a_wrong_config_shows_in_the_logits(outcomes: dict[str, Loaded | Failed]) -> None:
    right, wrong = outcomes["one process"], outcomes["wrong rope"]
    assert isinstance(right, Loaded)
    assert isinstance(wrong, Loaded)
    assert np.abs(right.logits - wrong.logits).max() > 1e-3


def test_what_hangs_is_killed(shared_fixtures: Path, tmp_path: Path) -> None:
    require("torch", "megatron.core")
    job = Job(name="late", checkpoint=tmp_path, fields={}, tokens=[[1]], tensor_parallel=2)
    outcome = run_jobs([job], tmp_path, deadline_seconds=0.2)["late"]
    assert isinstance(outcome, Failed)
    assert "killed at the deadline" in outcome.report
