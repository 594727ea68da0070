"""A model that is to be built, before it is; tests/ranks builds real ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.tiny import Tiny

import shardway
from shardway.core.errors import Code, ShardwayError

if TYPE_CHECKING:
    from shardway.live import building
else:
    pytest.importorskip("megatron.core")
    building = pytest.importorskip("shardway.live.building")

# megatron-core warns of a default of its own.
pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning")

CONFIG = Tiny(layers=4, hidden=32, heads=4, groups=2, head_dim=8, ffn=48, vocab=66).config


def provider(**fields: Any) -> Any:
    made = shardway.AutoBridge.from_hf_config(CONFIG).to_megatron_provider(load_weights=False)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_fields_are_attributes() -> None:
    """Those that the config says, megatron-core's defaults for the others, and what is set."""
    made = provider()
    assert (made.num_layers, made.hidden_size, made.vocab_size) == (4, 32, 66)
    assert made.tensor_model_parallel_size == 1
    assert made.expert_tensor_parallel_size is None
    assert made.pipeline_dtype is None
    assert made.activation_func is torch.nn.functional.silu
    assert made.params_dtype is torch.bfloat16
    assert made.bf16
    made.pipeline_model_parallel_size = 2
    made.finalize()
    config = made.transformer_config()
    assert config is made.transformer_config()
    assert config.pipeline_dtype is torch.bfloat16
    made.layernorm_epsilon = 0.25
    assert made.transformer_config().layernorm_epsilon == 0.25
    with pytest.raises(AttributeError):
        _ = made.no_such_field


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("tensor_parallel", 2, "knows no field 'tensor_parallel'"),
        ("activation_func", "swish2", "activation_func 'swish2' is none of"),
    ],
)
def test_what_is_not_known_is_refused(name: str, value: object, said: str) -> None:
    made = provider()
    with pytest.raises(ShardwayError) as refused:
        setattr(made, name, value)
    assert refused.value.code is Code.OPTION_INVALID
    assert said in str(refused.value)


def test_attention_that_is_not_built_here_is_refused() -> None:
    made = provider(experimental_attention_variant="dsa")
    with pytest.raises(ShardwayError, match=r"experimental attention \(dsa\) can't be built here") as refused:
        made.provide()
    assert refused.value.code is Code.OPTION_INVALID


def test_hybrids_are_not_built_here() -> None:
    mixer = {"mamba_num_heads": 2, "mamba_head_dim": 4, "n_groups": 1, "ssm_state_size": 4}
    hybrid = {**CONFIG, **mixer, "architectures": ["NemotronHForCausalLM"], "hybrid_override_pattern": "M*-M"}
    with pytest.raises(
        ShardwayError, match=r"models with Mamba mixers can't be built here.*\n.*load_hf_weights"
    ) as refused:
        shardway.AutoBridge.from_hf_config(hybrid).to_megatron_provider(load_weights=False)
    assert refused.value.code is Code.OPTION_INVALID


def test_megatron_core_has_its_say() -> None:
    made = provider(num_attention_heads=5, tensor_model_parallel_size=2)
    with pytest.raises(ShardwayError) as refused:
        made.finalize()
    assert refused.value.code is Code.OPTION_INVALID
    assert "megatron-core refuses this config" in str(refused.value)


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", "bfloat16"), ("float16", "float16"), (None, "bfloat16")])
def test_dtypes(dtype: str | None, expected: str) -> None:
    made = shardway.AutoBridge.from_hf_config(CONFIG).to_megatron_provider(load_weights=False, dtype=dtype)
    assert made.params_dtype is getattr(torch, expected)
    assert (made.bf16, made.fp16) == (expected == "bfloat16", expected == "float16")


def test_a_dtype_that_no_model_has() -> None:
    bridge = shardway.AutoBridge.from_hf_config(CONFIG)
    with pytest.raises(ShardwayError) as refused:
        bridge.to_megatron_provider(load_weights=False, dtype="int8")
    assert refused.value.code is Code.OPTION_INVALID


@pytest.mark.parametrize(
    ("num_tokens", "ranks", "always", "padded"),
    [(66, 1, False, 66), (66, 2, False, 66), (66, 4, False, 512), (66, 1, True, 128), (256, 2, True, 256)],
)
def test_vocabularies_are_padded_where_they_must_be(num_tokens: int, ranks: int, always: bool, padded: int) -> None:
    assert building.padded_vocabulary(num_tokens, ranks, 128, always=always) == padded


def test_the_config_alone() -> None:
    config = shardway.AutoBridge.from_hf_config(CONFIG).to_transformer_config(
        tensor_model_parallel_size=2, sequence_parallel=True
    )
    assert config.num_query_groups == 2
    assert config.sequence_parallel
    assert shardway.AutoBridge.from_hf_config(CONFIG).transformer_config.num_layers == 4


def test_weights_are_wanted_and_there_are_none() -> None:
    with pytest.raises(ShardwayError) as refused:
        shardway.AutoBridge.from_hf_config(CONFIG).to_megatron_provider()
    assert refused.value.code is Code.NOT_A_CHECKPOINT
