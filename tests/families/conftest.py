"""Every tiny model of a family, made once."""

from __future__ import annotations

import functools
import importlib
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.families.spec import VOCABULARY, FamilySpec
from tests.megatron import Failed, Job, Loaded, require, run_jobs
from tests.models import logits_of

import shardway
from shardway.formats.record import read_record

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt


def _all_specs() -> dict[str, FamilySpec]:
    found: dict[str, FamilySpec] = {}
    for path in sorted(Path(__file__).parent.glob("specs_*.py")):
        for spec in importlib.import_module(f"tests.families.{path.stem}").SPECS:
            if spec.name in found:
                raise ValueError(f"two specs are called {spec.name}")
            found[spec.name] = spec
    return found


SPECS = _all_specs()
# Two sequences that hold every token once between them.
TOKENS = [
    [(7 * place + 3) % VOCABULARY for place in range(start, start + VOCABULARY // 2)] for start in (0, VOCABULARY // 2)
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for a spec with every one of them."""
    if "spec" in metafunc.fixturenames:
        chosen = [
            spec for spec in SPECS.values() if "in_megatron" not in metafunc.function.__name__ or not spec.megatron
        ]
        metafunc.parametrize("spec", chosen, ids=lambda spec: spec.name)


@pytest.fixture(scope="session")
def family_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the directory of a spec's model."""
    require("torch", "transformers", "safetensors")
    root = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name: SPECS[name].make(root / name))


@pytest.fixture(scope="session")
def local_import(
    family_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Gives the iteration folder of a model, imported for megatron-core's own layers."""
    root = tmp_path_factory.mktemp("local")

    @functools.cache
    def make(name: str) -> Path:
        shardway.import_hf(family_model(name), root / name, spec="local", fsync=False)
        return root / name / "iter_0000000"

    return make


@pytest.fixture(scope="session")
def megatron_logits(
    local_import: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[str], npt.NDArray[np.float32]]:
    """Gives the logits that megatron-core computes with a model; all of the session when the first is asked for."""
    require("megatron.core")
    chosen = [
        spec
        for spec in SPECS.values()
        if any(f"in_megatron_it_computes_the_same[{spec.name}]" in item.name for item in request.session.items)
    ]

    @functools.cache
    def run() -> dict[str, Loaded | Failed]:
        jobs, failed = [], {}
        for spec in chosen:
            try:
                folder = local_import(spec.name)
                record = read_record(folder)
                assert record is not None
                fields = {**record.megatron_config, **spec.megatron_fields}
                job = Job(name=spec.name, checkpoint=folder, fields=fields, tokens=TOKENS, wide_norms=spec.wide_norms)
                jobs.append(job)
            except Exception:
                failed[spec.name] = Failed(report=traceback.format_exc())
        return {**run_jobs(jobs, tmp_path_factory.mktemp("ranks")), **failed}

    def logits(name: str) -> npt.NDArray[np.float32]:
        outcome = run()[name]
        assert isinstance(outcome, Loaded), outcome.report
        assert outcome.unexpected == ()
        left = [key for key in outcome.missing if "._extra_state" not in key and not key.endswith(SPECS[name].unasked)]
        assert left == []
        return outcome.logits

    return logits


@pytest.fixture(scope="session")
def transformers_logits(family_model: Callable[[str], Path]) -> Callable[[str], npt.NDArray[np.float32]]:
    """Gives the logits that transformers computes with a model."""
    return functools.cache(lambda name: logits_of(SPECS[name].reference(family_model(name)), TOKENS).numpy())
