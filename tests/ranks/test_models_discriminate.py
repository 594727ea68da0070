"""The logits of the tiny models tell a right load from a wrong one, whichever tensor is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.models import MODELS, ModelSpec, tokens_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

VISIBLE = 1e-2
"""A hundred times what test_megatron_loads.py tolerates."""


@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.name)
def test_every_parameter_out_of_place_shows(
    spec: ModelSpec, hf_model: Callable[[str], Path], hf_logits: Callable[[str], torch.Tensor]
) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        hf_model(spec.name), dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    tokens = torch.tensor(tokens_for(spec))
    invisible = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            original = parameter.clone()
            parameter.copy_(original.roll(1))
            difference = float((model(tokens, use_cache=False).logits - hf_logits(spec.name)).abs().max())
            parameter.copy_(original)
            if difference < VISIBLE:
                invisible[name] = difference
    assert invisible == {}
