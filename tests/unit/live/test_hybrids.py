"""Models whose layers differ, live: fused parameters that megatron-core describes in parts, a key for each layer.

megatron-core's Mamba mixers can't be built without CUDA packages, so a model stands in for it that has their
parameters and describes them with megatron-core's own functions.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.conformance.test_fixtures import ROUNDED
from tests.tiny import bits, read_distcp, read_safetensors, same

import shardway
from shardway.families.config import HFConfig
from shardway.families.mapping import map_model, variants_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from megatron.core.dist_checkpointing import mapping
    from megatron.core.ssm import gated_delta_net
else:
    mapping = pytest.importorskip("megatron.core.dist_checkpointing.mapping")
    gated_delta_net = pytest.importorskip("megatron.core.ssm.gated_delta_net")

HF = Path(__file__).resolve().parents[2] / "fixtures/hf"
# What a projection or a convolution is to its parts on disk.
PART = re.compile(r"(.+\.(?:in_proj|conv1d)\.(?:weight|bias))\.(\w+)")


class Hybrid(torch.nn.Module):
    """A model with the parameters that a checkpoint says, those of `PART` fused, in the types that Megatron has."""

    def __init__(self, name: str) -> None:
        super().__init__()
        values = json.loads((HF / name / "config.json").read_text())
        config = HFConfig(values)
        names = read_safetensors(HF / name)
        # Nothing here is a layer of Transformer Engine, which a live model says of itself.
        known = map_model(config, variants={**variants_in(config, hf=names), "te": False})
        self.config = SimpleNamespace(**{"mtp_num_layers": None, **known.megatron_config})
        self.kept: dict[str, torch.nn.Parameter] = {}
        self.parts: dict[str, dict[str, int]] = {}
        for key, shape in known.mcore.items():
            match = PART.fullmatch(key)
            if match is not None:
                self.parts.setdefault(match[1], {})[match[2]] = shape[0]
            else:
                self._keep(key, shape, torch.float32 if key.endswith("expert_bias") else torch.bfloat16)
        for key, parts in self.parts.items():
            _, *others = known.mcore[f"{key}.{next(iter(parts))}"]
            self._keep(key, (sum(parts.values()), *others), torch.bfloat16)

    def _keep(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        parameter = torch.nn.Parameter(torch.full(shape, torch.nan, dtype=dtype))
        self.register_parameter(key.replace(".", "_"), parameter)
        self.kept[key] = parameter

    def sharded_state_dict(self, *, metadata: dict[str, Any]) -> dict[str, Any]:
        del metadata
        described: dict[str, Any] = {}
        for key, parameter in self.kept.items():
            described[key] = mapping.ShardedTensor.from_rank_offsets(key, parameter)
            if key in self.parts:
                names = self.parts[key]
                described[key] = gated_delta_net._split_tensor_factory(
                    described[key], list(names.values()), list(names), 0
                )
        return described

    def bits(self) -> dict[str, Any]:
        """The bits of what a checkpoint has of it."""
        return {key: bits_of(value) for key, value in self._stored()}

    def _stored(self) -> Iterator[tuple[str, torch.Tensor]]:
        for key, parameter in self.kept.items():
            if key in self.parts:
                pieces = torch.split(parameter.detach(), list(self.parts[key].values()))
                yield from ((f"{key}.{part}", piece) for part, piece in zip(self.parts[key], pieces, strict=True))
            else:
                yield key, parameter.detach()


def bits_of(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().view(torch.int32 if tensor.dtype is torch.float32 else torch.int16).numpy()


def as_held(key: str, words: Any) -> Any:
    """The bits of an imported tensor as a bfloat16 model holds it."""
    if words.itemsize == 4 and not key.endswith("expert_bias"):
        words = words.view(np.float32).astype(ml_dtypes.bfloat16)
    return words.view(np.int32 if words.itemsize == 4 else np.int16)


@pytest.mark.parametrize("name", ["nemotron_h", "nemotron_h_super", "qwen3_next"])
def test_a_live_model_is_filled_saved_and_filled_again(name: str, tmp_path: Path) -> None:
    shardway.import_hf(HF / name, tmp_path / "imported", spec="local", fsync=False)
    wanted = {key: as_held(key, words) for key, words in read_distcp(tmp_path / "imported").items()}
    bridge = shardway.AutoBridge.from_hf_pretrained(HF / name)
    first, second, third = (Hybrid(name) for _ in range(3))
    bridge.load_hf_weights(first)
    assert same(first.bits(), wanted)
    bridge.load_megatron_weights(second, tmp_path / "imported")
    assert same(second.bits(), wanted)

    bridge.save_megatron_model(first, tmp_path / "saved")
    shardway.verify(tmp_path / "saved")
    bridge.load_megatron_weights(third, tmp_path / "saved")
    assert same(third.bits(), wanted)

    # What the model has no room for is gone; everything else comes back, to files and in memory.
    original = bits(read_safetensors(HF / name).items())
    shardway.export_hf(tmp_path / "saved", tmp_path / "exported", fsync=False)
    bridge.save_hf_pretrained(third, tmp_path / "hf")
    for folder in ("exported", "hf"):
        found = bits(read_safetensors(tmp_path / folder).items())
        assert found.keys() == original.keys()
        differing = [key for key in original if not np.array_equal(found[key], original[key])]
        assert [key for key in differing if not key.endswith(ROUNDED.get(name, ()))] == []
    weights = {name: bits_of(tensor) for name, tensor in bridge.export_hf_weights(third, cpu=True)}
    assert weights.keys() == original.keys()
