"""run_config.yaml against those of Megatron Bridge, field by field; configs worked out from it, and from args."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conformance.test_fixtures import ROUNDED
from tests.megatron import require
from tests.tiny import bits, read_safetensors, same

import shardway
from shardway.formats.run_config import read_run_config

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
BRIDGE = FIXTURES / "megatron_bridge_0.7.0"

# The fields whose values differ from the defaults of the class that Megatron Bridge builds with, by family.
GPT = {
    "activation_func", "add_bias_linear", "attention_dropout", "autocast_dtype", "bf16", "ffn_hidden_size",
    "gated_linear_unit", "hidden_dropout", "hidden_size", "kv_channels", "layernorm_epsilon", "normalization",
    "num_attention_heads", "num_layers", "num_query_groups", "params_dtype", "position_embedding_type", "seq_length",
    "share_embeddings_and_output_weights", "vocab_size",
}  # fmt: skip
FUSED = {"apply_rope_fusion", "bias_activation_fusion", "bias_dropout_fusion", "persist_layer_norm"}
EXPERTS = {
    "moe_aux_loss_coeff", "moe_ffn_hidden_size", "moe_grouped_gemm", "moe_permute_fusion", "moe_token_dispatcher_type",
    "num_moe_experts",
}  # fmt: skip
SIGMOID = {
    "moe_router_dtype", "moe_router_enable_expert_bias", "moe_router_group_topk", "moe_router_load_balancing_type",
    "moe_router_num_groups", "moe_router_score_function", "moe_router_topk_scaling_factor",
    "moe_shared_expert_intermediate_size", "moe_shared_expert_overlap",
}  # fmt: skip
LATENT = {
    "attention_softmax_in_fp32", "bias_activation_fusion", "bias_dropout_fusion", "cross_entropy_fusion_impl",
    "cross_entropy_loss_fusion", "gradient_accumulation_fusion", "kv_lora_rank", "make_vocab_size_divisible_by",
    "masked_softmax_fusion", "moe_layer_freq", "moe_router_pre_softmax", "mscale_all_dim", "multi_latent_attention",
    "persist_layer_norm", "q_lora_rank", "qk_head_dim", "qk_layernorm", "qk_pos_emb_head_dim", "rotary_scaling_factor",
    "transformer_layer_spec", "v_head_dim",
}  # fmt: skip
HYBRID = GPT | EXPERTS | SIGMOID | {
    "first_last_layers_bf16", "hybrid_layer_pattern", "is_hybrid_model", "mamba_chunk_size", "mamba_head_dim",
    "mamba_num_groups", "mamba_num_heads", "mamba_state_dim", "masked_softmax_fusion", "persist_layer_norm",
    "attention_softmax_in_fp32",
}  # fmt: skip
PREDICTING = {
    "keep_mtp_spec_in_bf16", "mtp_hybrid_override_pattern", "mtp_loss_scaling_factor", "mtp_num_layers",
    "mtp_use_repeated_layer",
}  # fmt: skip
DELTA = {
    "attention_output_gate", "experimental_attention_variant", "hetereogenous_dist_checkpoint",
    "layernorm_zero_centered_gamma", "linear_attention_freq", "linear_key_head_dim", "linear_num_key_heads",
    "linear_num_value_heads", "linear_value_head_dim", "moe_router_dtype", "moe_router_load_balancing_type",
    "moe_shared_expert_gate", "moe_shared_expert_intermediate_size", "qk_layernorm", "rotary_percent",
    "transformer_layer_spec",
}  # fmt: skip
NEEDED = {
    "llama": GPT | FUSED,
    "qwen3": GPT | {"qk_layernorm"},
    "qwen3_moe": GPT | EXPERTS | {"qk_layernorm"},
    "deepseek_v3": GPT | EXPERTS | SIGMOID | LATENT,
    "deepseek_v3_mtp": GPT | EXPERTS | SIGMOID | LATENT | {"mtp_num_layers"},
    "nemotron_h": HYBRID,
    "nemotron_h_super": HYBRID | PREDICTING | {"moe_latent_size"},
    "qwen3_next": GPT | EXPERTS | DELTA,
}


def theirs(name: str, version: str = "0.7.0") -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((FIXTURES / f"run_config/{name}-{version}.yaml").read_text())
    return document


def ours(name: str, path: Path, **options: str) -> dict[str, Any]:
    shardway.import_hf(FIXTURES / "hf" / name, path, fsync=False, **options)  # type: ignore[arg-type]
    document = read_run_config(path / "iter_0000000")
    assert document is not None
    return document


@pytest.mark.parametrize("name", NEEDED)
def test_every_field_of_the_model_is_that_of_megatron_bridge(name: str, tmp_path: Path) -> None:
    model, known = ours(name, tmp_path / "out")["model"], theirs(name)["model"]
    assert {key: known.get(key, "absent") for key in model} == model
    assert NEEDED[name] - model.keys() == set()


def test_an_older_megatron_bridge_knows_every_field(tmp_path: Path) -> None:
    model = ours("llama", tmp_path / "out", bridge_version="0.3.1")["model"]
    known = theirs("llama", "0.3.1")["model"]
    assert {key: known.get(key, "absent") for key in model} == model


def test_an_older_megatron_bridge_builds_hybrids_with_another_class(tmp_path: Path) -> None:
    """Source: models/mamba/mamba_provider.py of Megatron Bridge 0.3.1, megatron-core 0.16.1."""
    model = ours("nemotron_h", tmp_path / "in", bridge_version="0.3.1")["model"]
    assert model["_target_"] == "megatron.bridge.models.mamba.mamba_provider.MambaModelProvider"
    assert model["hybrid_override_pattern"] == "M-M*ME"
    assert not {"hybrid_layer_pattern", "mamba_chunk_size"} & model.keys()
    shutil.rmtree(tmp_path / "in/iter_0000000/hf")
    export_without_config(tmp_path / "in", tmp_path, "nemotron_h", rounded=False)


def test_what_is_beside_the_model(tmp_path: Path) -> None:
    document, known = ours("llama", tmp_path / "out"), theirs("llama")
    assert document["_target_"] == known["_target_"]
    checkpoint = document["checkpoint"]
    assert checkpoint == {key: known["checkpoint"][key] for key in checkpoint}
    assert document["tokenizer"]["_target_"] == known["tokenizer"]["_target_"]
    folder = tmp_path / "out/iter_0000000/tokenizer"
    assert {path.name for path in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    text = (tmp_path / "out/iter_0000000/run_config.yaml").read_text()
    assert str(tmp_path) not in text
    assert str(FIXTURES) not in text
    assert "!" not in text


def export_without_config(folder: Path, tmp_path: Path, name: str, *, rounded: bool) -> shardway.ConversionReport:
    report = shardway.export_hf(folder, tmp_path / "back", fsync=False, verify=True)
    before, after = read_safetensors(FIXTURES / "hf" / name), read_safetensors(tmp_path / "back")
    assert before.keys() == after.keys()
    # What a checkpoint of Megatron Bridge has lost already; tests/conformance/test_fixtures.py says how much.
    lost = ROUNDED.get(name, ()) if rounded else ()
    pairs = [[item for item in read.items() if not item[0].endswith(lost)] for read in (before, after)]
    assert same(bits(pairs[0]), bits(pairs[1]))
    return report


@pytest.mark.parametrize(("name", "version"), [*((name, "0.7.0") for name in NEEDED), ("llama", "0.3.1")])
def test_a_checkpoint_of_megatron_bridge_exports_by_its_own_config(name: str, version: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / f"megatron_bridge_{version}" / name, tmp_path / "in")
    shutil.copy(FIXTURES / f"run_config/{name}-{version}.yaml", tmp_path / "in/iter_0000000/run_config.yaml")
    report = export_without_config(tmp_path / "in", tmp_path, name, rounded=True)
    assert "worked out from run_config.yaml" in report.notes[0]
    config = json.loads((tmp_path / "back/config.json").read_text())
    original = json.loads((FIXTURES / f"hf/{name}/config.json").read_text())
    assert config["architectures"] == original["architectures"]
    assert config["model_type"] == original["model_type"]


@pytest.mark.parametrize("name", NEEDED)
def test_a_checkpoint_for_megatron_lm_says_what_it_is(name: str, tmp_path: Path) -> None:
    require("torch")
    import torch

    shardway.import_hf(FIXTURES / "hf" / name, tmp_path / "in", target="megatron-lm", fsync=False)
    folder = tmp_path / "in/iter_0000000"
    assert not (folder / "run_config.yaml").exists()
    args = torch.load(folder / "common.pt", weights_only=False)["args"]
    config = json.loads((FIXTURES / f"hf/{name}/config.json").read_text())
    listed = config.get("layers_block_type", ())
    assert (args.num_layers, args.hidden_size) == (config.get("num_hidden_layers", len(listed)), config["hidden_size"])
    assert (args.swiglu, args.squared_relu) == (("nemotron" not in name), ("nemotron" in name))
    assert (args.normalization, args.params_dtype) == ("RMSNorm", torch.bfloat16)
    assert args.untie_embeddings_and_output_weights is not config["tie_word_embeddings"]
    experts = config.get("num_local_experts", config.get("num_experts", config.get("n_routed_experts")))
    assert getattr(args, "num_experts", None) == experts
    assert args.multi_latent_attention is ("deepseek" in name)
    shutil.rmtree(folder / "hf")
    report = export_without_config(tmp_path / "in", tmp_path, name, rounded=False)
    assert "worked out from the arguments of Megatron-LM" in report.notes[0]


def test_a_config_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    shutil.copytree(BRIDGE / "llama", tmp_path / "in")
    document = theirs("llama")
    document["model"]["num_layers"] = 5
    (tmp_path / "in/iter_0000000/run_config.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(shardway.ShardwayError) as caught:
        shardway.export_hf(tmp_path / "in", tmp_path / "out")
    assert caught.value.codes == {"config-missing"}
    assert "llama: decoder.layers.mlp" in str(caught.value) or "llama: decoder.layers" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("model: !!python/object/apply:os.system ['true']\n", "the tag"),
        ("model: &a {x: 1}\nmore: *a\n", "anchors or aliases"),
        ("model: {x: 1, x: 2}\n", "twice"),
        ("[" * 100 + "]" * 100, "nested deeper"),
        ("- 1\n", "holds a list"),
        ("a: [\n", "no YAML"),
        ("\x00\x01", "no YAML"),
        ("x: " + "[1," * 20 + "2" + "]" * 20 + "\n" + "y: [" + "0, " * 250_000 + "1]\n", "more than"),
    ],
)
def test_a_hostile_run_config_raises_an_error_and_does_nothing_else(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "run_config.yaml").write_text(text)
    with pytest.raises(shardway.ShardwayError, match=why) as caught:
        read_run_config(tmp_path)
    assert caught.value.codes == {"config-invalid"}


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_run_config_raises_at_most_an_error(data: st.DataObject, tmp_path: Path) -> None:
    """Values of any kind, and bytes flipped anywhere: an export that needs it is refused or right."""
    folder = tmp_path / "in"
    if not folder.exists():
        shutil.copytree(BRIDGE / "llama", folder)
    text = bytearray((FIXTURES / "run_config/llama-0.7.0.yaml").read_bytes())
    model = st.integers(text.index(b"\nmodel:"), text.index(b"\nnvrx_straggler"))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(model)
        text[place] = data.draw(st.integers(0, 255))
    (folder / "iter_0000000/run_config.yaml").write_bytes(text)
    try:
        report = shardway.plan(folder)
    except shardway.ShardwayError:
        return
    assert report.feasible or {problem.code for problem in report.problems} <= {"config-missing", "config-invalid"}
