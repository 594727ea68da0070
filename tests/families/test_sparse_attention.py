"""The tensors of GLM-5's sparse attention, which megatron-core builds of Transformer Engine's layers alone.

So its indexer is built here of other linear layers; what is around it is held against the names in Megatron Bridge's
`glm5_bridge.py` (0.7.0) and the layers of megatron-core 0.20 (`get_dsa_module_spec_for_backend`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.families.spec import read_config
from tests.megatron import require

from shardway.families.config import HFConfig
from shardway.families.mapping import map_model, variants_in

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shardway.families.mapping import ModelMapping

_INDEXER = "self_attention.core_attention.indexer"
NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    f"{_INDEXER}.linear_wq_b.weight": "self_attn.indexer.wq_b.weight",
    f"{_INDEXER}.linear_wk.weight": "self_attn.indexer.wk.weight",
    f"{_INDEXER}.k_norm.weight": "self_attn.indexer.k_norm.weight",
    f"{_INDEXER}.k_norm.bias": "self_attn.indexer.k_norm.bias",
    f"{_INDEXER}.linear_weights_proj.weight": "self_attn.indexer.weights_proj.weight",
}


@pytest.fixture
def mapping(family_model: Callable[[str], Path]) -> ModelMapping:
    config = HFConfig(read_config(family_model("glm_moe_dsa")))
    return map_model(config, variants=variants_in(config))


@pytest.mark.parametrize(
    ("at", "hf"),
    [
        ("decoder.layers.0", "model.layers.0"),
        ("decoder.layers.2", "model.layers.2"),
        ("mtp.layers.0.transformer_layer", "model.layers.3"),
    ],
)
def test_a_layers_tensors_are_those_of_megatron_bridge(at: str, hf: str, mapping: ModelMapping) -> None:
    pairs = {(tile.mcore.tensor, tile.hf.tensor) for tile in mapping.tiles if tile.mcore.tensor.startswith(f"{at}.")}
    attention = {pair for pair in pairs if ".mlp." not in pair[0] and "pre_mlp" not in pair[0]}
    assert attention == {(f"{at}.{mcore}", f"{hf}.{name}") for mcore, name in NAMES.items()}
    states = {key for key in mapping.extra_state if key.startswith(f"{at}.{_INDEXER}.")}
    layers = ("k_norm", "linear_weights_proj", "linear_wk", "linear_wq_b")
    assert states == {f"{at}.{_INDEXER}.{layer}._extra_state/shard_0_1" for layer in layers}


@pytest.mark.filterwarnings("ignore::UserWarning")  # megatron-core warns without Transformer Engine
def test_an_indexer_is_that_of_megatron_core(mapping: ModelMapping, monkeypatch: pytest.MonkeyPatch) -> None:
    require("megatron.core")
    from types import SimpleNamespace

    import torch
    from megatron.core.transformer import MLATransformerConfig
    from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexer, DSAIndexerSubmodules

    class Linear(torch.nn.Linear):
        def __init__(self, size: int, num_rows: int, *, bias: bool, **_: Any) -> None:
            super().__init__(size, num_rows, bias=bias)

    class Norm(torch.nn.LayerNorm):
        def __init__(self, *, config: Any, hidden_size: int, eps: float) -> None:
            assert config.normalization == "LayerNorm"
            super().__init__(hidden_size, eps)

    wanted = ("hidden_size", "num_attention_heads", "num_layers", "q_lora_rank", "kv_lora_rank", "qk_pos_emb_head_dim")
    names = [*wanted, *(name for name in mapping.megatron_config if name.startswith("dsa_"))]
    fields: dict[str, Any] = {name: mapping.megatron_config[name] for name in names}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    parts = DSAIndexerSubmodules(linear_wq_b=Linear, linear_wk=Linear, k_norm=Norm, linear_weights_proj=Linear)
    config = MLATransformerConfig(**fields, rope_type="rope", use_cpu_initialization=True)
    indexer = DSAIndexer(config, parts, SimpleNamespace(cp=SimpleNamespace(size=lambda: 1), tp=None))
    at = f"decoder.layers.1.{_INDEXER}."
    ours = {key.removeprefix(at): shape for key, shape in mapping.mcore.items() if key.startswith(at)}
    assert ours == {name: tuple(tensor.shape) for name, tensor in indexer.state_dict().items()}
