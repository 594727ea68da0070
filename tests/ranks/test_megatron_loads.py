"""Real Megatron-Core loads what shardway imports, under its default strictness, and computes what transformers does."""

from __future__ import annotations

import dataclasses
import functools
import json
import traceback
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
from tests.megatron import Failed, Job, Loaded, megatron_fields, require, run_jobs
from tests.models import BY_NAME, MODELS, tokens_for
from tests.oracle import megatron_tensors, read_torch_dist, same_bits

from shardway.families.config import HFConfig
from shardway.families.mapping import map_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from tests.conftest import Imported

TOLERANCE = 1e-4
"""On float32 logits of standard deviation 1; test_models_discriminate.py shows by how much errors move them."""

MEGATRON_DEFAULTS = {"add_qkv_bias": False, "qk_layernorm": False, "rope_scaling": False, "rope_scaling_factor": 8.0}

STATED: dict[str, dict[str, bool]] = {"stacked": {}, "per-layer": {"non_homogeneous_layers": True}}
"""What a caller who knows the layout asks for; with several processes, the checkpoint's own metadata is to say it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    model: str
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    layout: Literal["stacked", "per-layer"] = "stacked"

    @property
    def num_processes(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    def __str__(self) -> str:
        return f"{self.model}-tp{self.tensor_parallel}-pp{self.pipeline_parallel}-{self.layout}"


def _cases() -> list[Case]:
    cases = []
    for spec in MODELS:
        cases += [Case(model=spec.name), Case(model=spec.name, layout="per-layer")]
        if spec.overrides.get("num_key_value_heads", 2) % 2 == 0:
            cases.append(Case(model=spec.name, tensor_parallel=2))
        if spec.num_layers % 2 == 0:
            cases.append(Case(model=spec.name, pipeline_parallel=2))
    cases += [Case(model="qwen2_tied", pipeline_parallel=2, layout="per-layer")]
    cases += [Case(model="qwen3", tensor_parallel=2, layout="per-layer")]
    return cases


CASES = _cases()
NAMES = [spec.name for spec in MODELS]


def _config(path: Path) -> dict[str, object]:
    config = json.loads((path / "config.json").read_text())
    assert isinstance(config, dict)
    return config


@pytest.fixture(scope="module")
def outcome_of(
    hf_model: Callable[[str], Path], imported: Imported, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], Loaded | Failed]:
    """Runs all cases of one world size when the first of them is asked for."""
    require("megatron.core")

    def job(case: Case) -> Job:
        return Job(
            name=str(case),
            checkpoint=imported(case.model, case.layout) / "iter_0000000",
            fields=map_model(HFConfig(_config(hf_model(case.model)))).megatron_config,
            tokens=tokens_for(BY_NAME[case.model]),
            tensor_parallel=case.tensor_parallel,
            pipeline_parallel=case.pipeline_parallel,
            metadata=STATED[case.layout] if case.num_processes == 1 else None,
        )

    @functools.cache
    def run(num_processes: int) -> dict[str, Loaded | Failed]:
        failed: dict[str, Loaded | Failed] = {}
        jobs = []
        for case in CASES:
            if case.num_processes == num_processes:
                try:
                    jobs.append(job(case))
                except Exception:
                    failed[str(case)] = Failed(report=traceback.format_exc())
        return failed | run_jobs(jobs, tmp_path_factory.mktemp("ranks"))

    return lambda case: run(case.num_processes)[str(case)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_agree(
    case: Case, outcome_of: Callable[[Case], Loaded | Failed], hf_logits: Callable[[str], torch.Tensor]
) -> None:
    outcome = outcome_of(case)
    assert isinstance(outcome, Loaded), outcome.report
    assert outcome.unexpected == ()
    assert all(key.endswith("._extra_state") for key in outcome.missing), outcome.missing
    np.testing.assert_allclose(outcome.logits, hf_logits(case.model).numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layout", ["stacked", "per-layer"])
@pytest.mark.parametrize("name", NAMES)
def test_torch_reads_the_tensors_that_the_oracle_computes(
    name: str, layout: Literal["stacked", "per-layer"], hf_model: Callable[[str], Path], imported: Imported
) -> None:
    tensors, _ = read_torch_dist(imported(name, layout) / "iter_0000000")
    expected = megatron_tensors(hf_model(name), per_layer=layout == "per-layer")
    assert tensors.keys() == expected.keys()
    assert [key for key, tensor in expected.items() if not same_bits(tensors[key], tensor)] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_config_is_the_one_that_the_oracle_computes(name: str, hf_model: Callable[[str], Path]) -> None:
    config = _config(hf_model(name))
    assert MEGATRON_DEFAULTS | dict(map_model(HFConfig(config)).megatron_config) == (
        MEGATRON_DEFAULTS | megatron_fields(config)
    )
