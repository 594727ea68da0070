"""Every family carries a model that transformers made, in every layout that applies, and is what it says it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.families.spec import FamilySpec, read_config
from tests.oracle import read_safetensors, same_bits
from tests.tiny import read_safetensors as read_bits

import shardway
from shardway.families.config import HFConfig
from shardway.families.mapping import map_model, variants_in
from shardway.families.registry import families, family_of
from shardway.families.restore import restore_config
from shardway.formats.record import read_record
from shardway.testing.families import check_family, check_words

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_a_round_trip_gives_every_bit_back(
    spec: FamilySpec, family_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = family_model(spec.name)
    before = read_safetensors(model)
    for layout in ("auto", *spec.layouts):
        report = shardway.import_hf(model, tmp_path / layout, layout=layout, fsync=False)
        assert report.layout == (spec.layout if layout == "auto" else layout)
        if layout != "auto":
            assert shardway.verify(model, tmp_path / layout).equal
            shardway.export_hf(tmp_path / layout, tmp_path / f"{layout}_back", fsync=False)
            after = read_safetensors(tmp_path / f"{layout}_back")
            assert after.keys() == before.keys()
            assert [key for key, tensor in before.items() if not same_bits(after[key], tensor)] == []
    if not spec.stackable:
        with pytest.raises(shardway.ShardwayError, match="can't be stacked"):
            shardway.import_hf(model, tmp_path / "stacked", layout="stacked", fsync=False)


def test_the_family_passes_what_every_family_must(
    spec: FamilySpec, family_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = family_model(spec.name)
    tags = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    found = read_bits(model)
    check_family(
        read_config(model),
        tmp_path,
        shapes={name: array.shape for name, (_, array) in found.items()},
        dtypes={name: tags[tag] for name, (tag, _) in found.items()},
    )


def test_in_megatron_it_computes_the_same(
    spec: FamilySpec, megatron_logits: Callable[[str], object], transformers_logits: Callable[[str], object]
) -> None:
    np.testing.assert_allclose(
        np.asarray(megatron_logits(spec.name)), np.asarray(transformers_logits(spec.name)), rtol=0, atol=spec.tolerance
    )


def test_its_config_comes_back_from_megatrons(spec: FamilySpec, family_model: Callable[[str], Path]) -> None:
    model = family_model(spec.name)
    config = HFConfig(read_config(model))
    if family_of(config).restore is None:
        pytest.skip("its config.json can't be told from Megatron's config")
    mapping = map_model(config, variants=variants_in(config, hf=read_bits(model)))
    found = restore_config(mapping.megatron_config, mapping.mcore, mapping.provider.target, spec.dtype)
    if "ernie" in spec.name and any(key.startswith("mtp.") for key in mapping.mcore):
        assert "tensors are unknown, such as mtp.layers.0." in found.tried["ernie4_5_moe"]
        assert found.config is None
        return
    assert found.config is not None, found.tried
    again = HFConfig(found.config)
    restored = map_model(again, variants=variants_in(again, mcore=mapping.mcore))
    assert restored.architecture == mapping.architecture
    assert restored.mcore == mapping.mcore
    assert restored.aliases == mapping.aliases
    assert restored.megatron_config == mapping.megatron_config


def test_every_family_has_a_spec_and_every_word_of_its_rules_a_meaning() -> None:
    from tests.families.conftest import SPECS

    for family in families():
        check_words(family)
    listed = {spec.released or spec.architecture for spec in SPECS.values()} | {
        "LlamaForCausalLM",  # tests/models.py has tiny models of these
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    }
    assert {architecture for family in families() for architecture in family.architectures} <= listed


def test_layers_that_the_config_promises_and_the_weights_lack_are_reported(
    family_model: Callable[[str], Path], tmp_path: Path
) -> None:
    report = shardway.import_hf(family_model("mimo_without_mtp"), tmp_path / "out", fsync=False)
    assert any("1 layers of multi-token prediction" in note for note in report.notes)
    record = read_record(tmp_path / "out/iter_0000000")
    assert record is not None
    assert "mtp_num_layers" not in record.megatron_config


def test_the_config_says_which_form_is_meant(family_model: Callable[[str], Path]) -> None:
    model = family_model("qwen3_moe")
    config = HFConfig(read_config(model))
    names = read_bits(model)
    variants = variants_in(config, hf=names)
    assert map_model(config, variants=variants).hf.keys() == names.keys()
    assert variants["packed_experts"] is any(name.endswith("gate_up_proj") for name in names)
