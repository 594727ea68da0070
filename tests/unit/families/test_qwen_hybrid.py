"""Qwen3-Next and Qwen3.5: what their configs may say, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from shardway.core.errors import ShardwayError
from shardway.families.config import HFConfig
from shardway.families.mapping import map_model

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "hidden_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 3,
    "linear_value_head_dim": 5,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 6,
    "shared_expert_intermediate_size": 7,
}


def mapped(*, variants: dict[str, bool] | None = None, **changed: object) -> Any:
    values = {key: value for key, value in {**CONFIG, **changed}.items() if value is not None}
    return map_model(HFConfig(values), variants=variants)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"linear_num_value_heads": 3}, "3 value heads can't be shared evenly by 2 key heads"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types is .*; expected a list of 4 of"),
        ({"layer_types": ["linear_attention", "sliding_attention"] * 2}, "expected a list of 4 of"),
        ({"mtp_num_hidden_layers": 2}, "mtp_num_hidden_layers is 2; expected 0 or 1"),
        ({"num_experts": None}, "num_experts is missing"),
        ({"linear_key_head_dim": None}, "linear_key_head_dim is missing"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(changed: dict[str, Any], what: str) -> None:
    with pytest.raises(ShardwayError, match=what) as caught:
        mapped(**changed)
    assert caught.value.codes == {"config-invalid"}


def test_attention_comes_at_an_interval_or_where_layers_are_listed() -> None:
    kinds = ["linear_attention", "full_attention"] * 2
    listed, at_interval = mapped(layer_types=kinds), mapped(full_attention_interval=2)
    assert listed.mcore == at_interval.mcore
    assert listed.megatron_config["linear_attention_freq"] == [1, 0, 1, 0]
    assert mapped().megatron_config["linear_attention_freq"] == [1, 1, 1, 0]


def test_the_names_say_whether_a_token_more_is_predicted() -> None:
    with_it = mapped(variants={"mtp": True})
    assert with_it.megatron_config["mtp_num_layers"] == 1
    assert with_it.hf["mtp.fc.weight"] == (8, 16)
    without = mapped()
    assert "mtp_num_layers" not in without.megatron_config
    assert without.caveats == ()
    assert "promises 1 layers" in mapped(mtp_num_hidden_layers=1).caveats[-1]
    assert not [key for key in mapped(mtp_num_hidden_layers=0, variants={"mtp": True}).mcore if key.startswith("mtp.")]
