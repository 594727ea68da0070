"""Nemotron-H: what its config may say, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from shardway.core.errors import ShardwayError
from shardway.families.config import HFConfig
from shardway.families.mapping import map_model

CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "vocab_size": 16,
    "hybrid_override_pattern": "M*-E",
    "num_hidden_layers": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 3,
    "n_groups": 2,
    "ssm_state_size": 5,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 6,
    "moe_shared_expert_intermediate_size": 7,
}
PREDICTING = {"num_nextn_predict_layers": 3, "mtp_hybrid_override_pattern": "*M"}


def mapped(**changed: object) -> Any:
    values = {key: value for key, value in {**CONFIG, **changed}.items() if value is not None}
    return map_model(HFConfig(values))


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"hybrid_override_pattern": "M*-X"}, "hybrid_override_pattern is 'M\\*-X'; expected letters of M\\*-E"),
        ({"hybrid_override_pattern": "M*-"}, "gives 3 layers, num_hidden_layers 4"),
        ({"hybrid_override_pattern": None}, "gives 0 layers, num_hidden_layers 4"),
        ({"layers_block_type": ["mamba", "window", "mlp", "moe"]}, "layers_block_type is .*; expected a list of"),
        ({"layers_block_type": ["mamba", "mlp", "attention", "moe"]}, "expected M-\\*E, as layers_block_type says"),
        ({"use_bias": True}, "use_bias is true, which a hybrid model"),
        ({"use_conv_bias": False}, "use_conv_bias is false, which a hybrid model"),
        ({"num_nextn_predict_layers": 1}, "mtp_hybrid_override_pattern is missing"),
        ({**PREDICTING, "num_nextn_predict_layers": 2**39}, "num_nextn_predict_layers is .*; expected at most 1000"),
        ({"n_routed_experts": None}, "num_experts is missing"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(changed: dict[str, object], what: str) -> None:
    with pytest.raises(ShardwayError, match=what) as caught:
        mapped(**changed)
    assert caught.value.codes == {"config-invalid"}


def test_layers_may_be_listed_in_words_old_or_new() -> None:
    released = mapped()
    for words in (("mamba", "attention", "mlp", "moe"), ("linear_attention", "full_attention", "mlp", "moe")):
        listed = mapped(hybrid_override_pattern=None, num_hidden_layers=None, layers_block_type=list(words))
        assert (listed.mcore, listed.hf) == (released.mcore, released.hf)
        assert listed.megatron_config == released.megatron_config


def test_one_block_that_repeats_stands_for_all_further_tokens() -> None:
    """megatron-core's `mtp_use_repeated_layer`: the pattern names each token, the weights are there once."""
    once, apart = mapped(**PREDICTING), mapped(**PREDICTING, mtp_use_repeated_layer=False)
    assert (
        once.megatron_config["hybrid_layer_pattern"] == apart.megatron_config["hybrid_layer_pattern"] == "M*-E/*M/*M/*M"
    )
    blocks = [{key.split(".")[2] for key in each.mcore if key.startswith("mtp.")} for each in (once, apart)]
    assert blocks == [{"0"}, {"0", "1", "2"}]
    assert "mtp.layers.5.mixer.A_log" in apart.hf
    assert "mtp.layers.2.mtp_model_layer.layers.1.mixer.A_log" in apart.mcore


def test_a_model_without_experts_says_nothing_of_them() -> None:
    dense = mapped(hybrid_override_pattern="M*--")
    assert not [name for name in dense.megatron_config if "moe" in name]


def test_a_head_may_be_there_although_it_is_tied() -> None:
    tied = mapped(tie_word_embeddings=True)
    assert tied.aliases == {"lm_head.weight": "backbone.embeddings.weight"}
    assert "output_layer.weight" not in tied.mcore


def test_a_width_of_mlps_is_asked_for_where_there_are_any() -> None:
    assert mapped(hybrid_override_pattern="M*ME", intermediate_size=None).megatron_config["ffn_hidden_size"] == 32
    with pytest.raises(ShardwayError, match="intermediate_size is missing"):
        mapped(intermediate_size=None)


def test_the_words_of_another_activation_are_a_caveat() -> None:
    assert any("mlp_hidden_act is 'silu'" in caveat for caveat in mapped(mlp_hidden_act="silu").caveats)
    assert any("convolve 4 tokens" in caveat for caveat in mapped(conv_kernel=3).caveats)
    assert mapped().caveats == ()
