"""The enumeration of both sides of a model, and the proof that it refuses wrong rules."""

from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import ARCHITECTURES, Tiny

from shardway.core.errors import ShardwayError
from shardway.families import registry
from shardway.families.config import HFConfig
from shardway.families.layout import Layout, has_extra_state, layout_of
from shardway.families.llama import LLAMA
from shardway.families.mapping import map_model
from shardway.families.rules import Mosaic, Part, Rule, expand, extent, rows, same

LAYOUTS = st.sampled_from(list(Layout))


@settings(max_examples=60, deadline=None)
@given(
    architecture=st.sampled_from(ARCHITECTURES),
    layout=LAYOUTS,
    tied=st.booleans(),
    bias=st.booleans(),
    layers=st.integers(1, 4),
)
def test_both_sides_are_enumerated(architecture: str, layout: Layout, tied: bool, bias: bool, layers: int) -> None:
    tiny = Tiny(architecture=architecture, tied=tied, attention_bias=bias, mlp_bias=bias, layers=layers)
    mapping = map_model(HFConfig(tiny.config), layout)
    assert dict(mapping.hf) == tiny.shapes
    arrays = tiny.megatron(tiny.weights(), per_layer=layout is Layout.PER_LAYER)
    assert dict(mapping.mcore) == {name: array.shape for name, array in arrays.items()}
    assert {tile.hf.tensor for tile in mapping.tiles} == set(mapping.hf)
    assert {tile.mcore.tensor for tile in mapping.tiles} == set(mapping.mcore)
    assert mapping.aliases == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert layout_of(mapping.mcore) is layout


def test_the_order_of_an_export_is_that_of_the_model() -> None:
    names = list(map_model(HFConfig(Tiny(layers=11).config)).hf)
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)


@pytest.mark.parametrize("layout", list(Layout))
def test_extra_state_keys(layout: Layout) -> None:
    keys = map_model(HFConfig(Tiny(architecture="Qwen3ForCausalLM", layers=2).config), layout).extra_state
    assert len(keys) == len(set(keys))
    modules = ["linear_qkv", "q_layernorm", "k_layernorm", "linear_proj"]
    names = [f"self_attention.{name}" for name in modules] + ["mlp.linear_fc1", "mlp.linear_fc2"]
    if layout is Layout.STACKED:
        expected = [f"decoder.layers.{name}._extra_state/shard_{i}_2" for i in range(2) for name in names]
    else:
        expected = [f"decoder.layers.{i}.{name}._extra_state/shard_0_1" for i in range(2) for name in names]
    assert sorted(keys) == sorted([*expected, "decoder.final_layernorm._extra_state/shard_0_1"])


@pytest.mark.parametrize(
    ("logical", "expected"),
    [
        ("decoder.layers.{i}.self_attention.linear_qkv.weight", True),
        ("decoder.layers.{i}.self_attention.linear_qkv.layer_norm_weight", False),
        ("decoder.layers.{i}.self_attention.linear_qkv.bias", False),
        ("decoder.layers.{i}.mlp.router.weight", False),
        ("decoder.final_layernorm.weight", True),
        ("decoder.final_norm.weight", True),
        ("embedding.word_embeddings.weight", False),
        ("output_layer.weight", False),
    ],
)
def test_which_modules_have_extra_state(logical: str, expected: bool) -> None:
    assert has_extra_state(logical) is expected


def test_only_buffers_that_the_config_determines_are_ignored() -> None:
    ignored = map_model(HFConfig(Tiny().config)).ignored
    assert ignored.fullmatch("model.layers.17.self_attn.rotary_emb.inv_freq")
    for name in (
        "model.layers.x.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.inv_freq2",
        "model-layers.1.self_attn.rotary_emb.inv_freq",
        "",
    ):
        assert not ignored.fullmatch(name)


def family_with(*rules: Rule) -> mock._patch_dict:
    """Let a family of other rules serve Llama."""
    import dataclasses

    wrong = dataclasses.replace(LLAMA, rules=rules)
    return mock.patch.dict(registry._BY_ARCHITECTURE, {"LlamaForCausalLM": wrong})


GOOD = [rule for rule in LLAMA.rules if not rule.when or rule.when == "!tied"]


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize(
    ("wrong", "tensor"),
    [
        # one tensor of the source in two tensors of the destination
        (Rule("decoder.layers.{i}.more.weight", same("model.layers.{i}.mlp.up_proj.weight", "F", "H")), "up_proj"),
        # the same tensor of the destination made twice
        (Rule("decoder.final_layernorm.weight", same("model.other.weight", "H")), "decoder.final_layernorm.weight"),
        # a name without a layer in a rule of layers
        (Rule("decoder.layers.{i}.odd.weight", same("model.odd.weight", "H")), "model.odd.weight"),
        # two parts under one name
        (
            Rule(
                "decoder.layers.{i}.two.weight", rows(("model.{i}.two", "F"), ("model.{i}.two", "F"), trailing=("H",))
            ),
            "model.0.two",
        ),
        # the same name with two shapes
        (Rule("decoder.again.weight", same("model.norm.weight", "H", "H")), "model.norm.weight"),
    ],
)
def test_wrong_rules_are_refused(wrong: Rule, tensor: str, layout: Layout) -> None:
    with family_with(*GOOD, wrong), pytest.raises(ShardwayError) as caught:
        map_model(HFConfig(Tiny().config), layout)
    assert caught.value.codes == {"coverage"}
    assert tensor in str(caught.value)
    with family_with(*GOOD):
        map_model(HFConfig(Tiny().config), layout)


@given(
    dims=st.fixed_dictionaries({name: st.integers(1, 5) for name in ("G", "r", "d", "H")}),
    parts=st.lists(st.sampled_from(["r*d", "d", "2*d", "3"]), min_size=1, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_expanded_extents(dims: dict[str, int], parts: list[str]) -> None:
    mosaic = Mosaic(tuple(Part(f"p{k}.{{i}}", part) for k, part in enumerate(parts)), ("H",), groups="G")
    expanded = expand(mosaic, dims)
    period = sum(extent(part, dims) for part in parts)
    assert expanded.mcore_shape == (dims["G"] * period, dims["H"])
    stacked = expanded.stack(7)
    assert stacked.mcore_shape == (7, *expanded.mcore_shape)
    for k, (shape, tile) in enumerate(stacked.tiles("m", 5)):
        assert tile.hf.tensor == f"p{k}.5"
        assert shape == (dims["G"] * extent(parts[k], dims), dims["H"])
        assert tile.mcore.base[0] == 5
        assert all(axis > 0 for axis, _ in tile.mcore.steps)


def test_copies_cover_the_same_tensor() -> None:
    mapping = map_model(HFConfig(Tiny(tied=True).config))
    doubled = mapping.with_copies(mapping.aliases)
    assert doubled.hf["lm_head.weight"] == mapping.hf["model.embed_tokens.weight"]
    assert len(doubled.tiles) == len(mapping.tiles) + 1
    assert list(doubled.hf)[:-1] == list(mapping.hf)
