"""run_config.yaml of every family against what Megatron Bridge's sources say (tests/fixtures/run_config/bridge-*.json).

A field that is written is one that the class has. What a bridge sets for every model of an architecture is written, or
is that class's default, or stands in `OTHERWISE` and in docs/guide/megatron-bridge.md with the reason.
"""

from __future__ import annotations

import ast
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from tests.families.spec import FamilySpec, read_config
from tests.tiny import ARCHITECTURES, Tiny
from tests.tiny import read_safetensors as read_bits

from shardway.families.bridge import BridgeVersion, provider_of, run_config
from shardway.families.bridge import fields_of as fields_of_document
from shardway.families.config import HFConfig
from shardway.families.mapping import map_model, variants_in
from shardway.families.registry import family_of
from shardway.families.restore import restore_config
from shardway.formats.run_config import run_config_yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
RECORDS: dict[BridgeVersion, dict[str, Any]] = {
    version: json.loads((ROOT / f"tests/fixtures/run_config/bridge-{version}.json").read_text())
    for version in BridgeVersion
}
RECORD = RECORDS[BridgeVersion.V0_7]
GUIDE = (ROOT / "docs/guide/megatron-bridge.md").read_text()

# Fields in which ours differs from what a bridge sets.
OTHERWISE: dict[str, set[str]] = {
    "DeepseekV2ForCausalLM": {"seq_length"},
    "Ernie4_5_MoeForCausalLM": {"transformer_layer_spec"},
    "GlmMoeDsaForCausalLM": {"mtp_num_layers"},
    "GptOssForCausalLM": {"activation_func_clamp_value"},
    "KimiK2ForCausalLM": {"seq_length"},
    "OlmoeForCausalLM": {"moe_router_pre_softmax"},
    "Qwen3NextForCausalLM": {"experimental_attention_variant"},
}
# Of these 0.3.1 has a class of their own that only has other defaults.
OF_PLAIN_CLASS = {"Qwen3NextForCausalLM"}
# config.json and Megatron's config, where both have the value under one name in every family.
CARRIED = {
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "seq_length",
    "initializer_range": "init_method_std",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "num_experts_per_tok": "moe_router_topk",
    "kv_lora_rank": "kv_lora_rank",
    "q_lora_rank": "q_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}


def model_of(config: dict[str, Any], names: Any = None, version: BridgeVersion = BridgeVersion.V0_7) -> dict[str, Any]:
    hf = HFConfig(config)
    mapping = map_model(hf, variants=variants_in(hf, hf=names))
    document = yaml.safe_load(run_config_yaml(run_config(mapping, "bfloat16", "tokenizer", version)))
    found: dict[str, Any] = document["model"]
    return found


@functools.cache
def fields_of(name: str, version: BridgeVersion = BridgeVersion.V0_7) -> dict[str, str]:
    """The fields of a recorded class with their defaults as source text, its bases' included."""
    recorded = RECORDS[version]["classes"].get(name, {"bases": [], "fields": {}})
    found: dict[str, str] = {}
    for base in reversed(recorded["bases"]):
        found |= fields_of(base, version)
    found |= recorded["fields"]
    return found


def said(text: str) -> tuple[bool, Any]:
    """Whether source text says a value whatever the model is, and which: functions and types by their last name."""
    try:
        return True, _plain(ast.literal_eval(text))
    except ValueError:
        node = ast.parse(text, mode="eval").body
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "partial":
        node = node.args[0]
    name = ast.unparse(node)
    last = name.rpartition(".")[2]
    known = {function.rpartition(".")[2] for function in RECORD["functions"]}
    return last in known or name.startswith(("torch.", "F.", "AttnBackend.")), last


def _plain(value: Any) -> Any:
    if isinstance(value, dict) and "_target_" in value:
        return value["_target_"].rpartition(".")[2]
    return list(value) if isinstance(value, tuple) else value


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping with a ``_target_`` in a value."""
    if isinstance(value, dict):
        yield from [value] if "_target_" in value else []
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from objects(each)


def check_names(model: dict[str, Any], architecture: str, version: BridgeVersion) -> None:
    """Hold the class, the fields and the functions against those that there are; objects are named, not called."""
    record, target = RECORDS[version], model["_target_"]
    recorded = record["architectures"].get(architecture)
    assert target in record["classes"]
    if recorded is not None and (version is BridgeVersion.V0_7 or architecture not in OF_PLAIN_CLASS):
        assert target == recorded["provider"]
    assert model.keys() - fields_of(target, version).keys() == {"_target_"}
    for each in objects(list(model.values())):
        assert each.get("_call_") is False or each.get("_partial_") is True, each
        assert each["_target_"] in record["functions"] or each["_target_"].startswith("torch."), each


def check(config: dict[str, Any], names: Any = None) -> None:
    architecture = config["architectures"][0]
    model = model_of(config, names)
    check_names(model, architecture, BridgeVersion.V0_7)
    if architecture in RECORDS[BridgeVersion.V0_3]["architectures"]:
        check_names(model_of(config, names, BridgeVersion.V0_3), architecture, BridgeVersion.V0_3)
    recorded, known = RECORD["architectures"].get(architecture), fields_of(model["_target_"])
    for hf, mcore in CARRIED.items():
        if config.get(hf) is not None and concerns(model, mcore):
            assert model[mcore] == config[hf], mcore
    for field, text in (recorded["sets"] if recorded else {}).items():
        fixed, value = said(text)
        if fixed and field in known and field not in OTHERWISE.get(architecture, ()) and concerns(model, field):
            default = said(known[field])[1] if known[field] else None
            assert (_plain(model[field]) if field in model else default) == value, field


def concerns(model: dict[str, Any], field: str) -> bool:
    """Whether a field says anything of a model without experts, or without layers of multi-token prediction."""
    experts = field.startswith("moe_") and not model.get("num_moe_experts")
    return not experts and not (field.startswith("mtp_") and not model.get("mtp_num_layers"))


def test_the_run_config_of_every_family(spec: FamilySpec, family_model: Callable[[str], Path]) -> None:
    path = family_model(spec.name)
    check(read_config(path), read_bits(path))


@pytest.mark.parametrize("version", BridgeVersion)
def test_a_config_comes_back_from_it(
    spec: FamilySpec, version: BridgeVersion, family_model: Callable[[str], Path]
) -> None:
    path = family_model(spec.name)
    config, names = read_config(path), read_bits(path)
    if family_of(HFConfig(config)).restore is None:
        pytest.skip("its config.json can't be told from Megatron's config")
    mapping = map_model(HFConfig(config), variants=variants_in(HFConfig(config), hf=names))
    document = {"model": model_of(config, names, version)}
    found = restore_config(fields_of_document(document), mapping.mcore, provider_of(document), spec.dtype)
    without_prediction = mapping.family == "ernie4_5_moe" or (mapping.family, version) == ("nemotron_h", "0.3.1")
    if without_prediction and any(key.startswith("mtp.") for key in mapping.mcore):
        assert found.config is None
        return
    assert found.config is not None, found.tried
    again = HFConfig(found.config)
    restored = map_model(again, variants=variants_in(again, mcore=mapping.mcore))
    assert (restored.architecture, restored.mcore) == (mapping.architecture, mapping.mcore)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_run_config_of_the_first_families(architecture: str) -> None:
    check(Tiny(architecture=architecture).config)


def test_no_place_on_this_machine_is_in_it(spec: FamilySpec, family_model: Callable[[str], Path]) -> None:
    path = family_model(spec.name)
    config = read_config(path) | {"_name_or_path": str(path)}
    model = model_of(config, read_bits(path))
    assert str(path.parent) not in json.dumps(model)
    for value in model.values():
        assert not (isinstance(value, str) and value.startswith("/"))


@pytest.mark.parametrize("name", ["llama-0.7.0", "deepseek_v3-0.7.0", "nemotron_h-0.7.0", "llama-0.3.1"])
def test_the_record_has_the_fields_that_megatron_bridge_writes(name: str) -> None:
    model = yaml.safe_load((ROOT / f"tests/fixtures/run_config/{name}.yaml").read_text())["model"]
    version = BridgeVersion(name.rpartition("-")[2])
    assert {"_target_", *fields_of(model["_target_"], version)} == model.keys()


def test_what_is_otherwise_is_explained() -> None:
    for architecture, fields in OTHERWISE.items():
        assert architecture in RECORD["architectures"]
        for field in fields:
            assert field in RECORD["architectures"][architecture]["sets"]
            assert f"`{field}`" in GUIDE
