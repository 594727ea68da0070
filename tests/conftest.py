"""Fixtures that cost seconds and serve a whole session: tiny models, their logits, what shardway makes of them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import pytest
from hypothesis import settings
from tests.megatron import require
from tests.models import BY_NAME, logits_of, make_model, tokens_for

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


settings.register_profile("any machine", deadline=None)  # however slow it is and however busy
settings.load_profile("any machine")


class Imported(Protocol):
    """Gives the checkpoint root that shardway makes of a model; each is made once."""

    def __call__(self, name: str, layout: Literal["stacked", "per-layer"] = "stacked") -> Path: ...


@pytest.fixture(scope="session")
def shared_fixtures() -> Path:
    """Checkpoints that others wrote; they live beside the repository."""
    path = (Path(__file__).resolve().parents[1] / "../shared/fixtures").resolve()
    if not path.is_dir():
        pytest.skip("the fixtures of other tools are not beside this repository")
    return path


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the directory of a model of ``tests.models.MODELS``; each is made once."""
    require("torch", "transformers", "safetensors", "tokenizers")
    root = tmp_path_factory.mktemp("hf")
    return functools.cache(lambda name: make_model(BY_NAME[name], root / name))


@pytest.fixture(scope="session")
def hf_logits(hf_model: Callable[[str], Path]) -> Callable[[str], torch.Tensor]:
    """Gives transformers' own float32 logits of such a model for its ``tokens_for``."""
    return functools.cache(lambda name: logits_of(hf_model(name), tokens_for(BY_NAME[name])))


@pytest.fixture(scope="session")
def imported(hf_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Imported:
    """Gives the Megatron checkpoint that ``shardway.import_hf`` makes of such a model."""
    import shardway

    root = tmp_path_factory.mktemp("megatron")

    @functools.cache
    def make(name: str, layout: Literal["stacked", "per-layer"]) -> Path:
        destination = root / f"{name}_{layout}"
        if layout == "stacked":
            shardway.import_hf(hf_model(name), destination)
        else:
            shardway.import_hf(hf_model(name), destination, layout=layout)
        return destination

    return lambda name, layout="stacked": make(name, layout)
