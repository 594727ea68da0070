"""The enumeration of both sides of a model, and the proof that it refuses wrong rules."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.property.tilings import indices
from tests.tiny import ARCHITECTURES, Array, Tiny

from shardway.core.errors import ShardwayError
from shardway.families import mapping as mapping_module
from shardway.families import registry
from shardway.families.config import HFConfig
from shardway.families.layout import Layout, extra_state_keys, extra_state_module, layout_of
from shardway.families.llama import LLAMA
from shardway.families.mapping import cover_problems, map_model
from shardway.families.rules import Part, Rule, expand, extent, holds, qkv, rows, same, split

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


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_tiles_come_in_runs_and_one_layer_of_a_kind_proves_all(architecture: str, layout: Layout) -> None:
    config = Tiny(layers=4).config
    if architecture != "LlamaForCausalLM":
        config = config | {"architectures": [architecture], "num_experts": 3, "moe_intermediate_size": 8}
        config |= {"num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": []}
    with mock.patch.object(mapping_module, "cover_problems", wraps=cover_problems) as looked:
        mapping = map_model(HFConfig(config), layout)
    ((sample, *_), _) = looked.call_args
    assert looked.call_count == 1
    assert len(sample) < len(mapping.tiles) / 2
    assert not cover_problems(mapping.tiles, mapping.hf, mapping.mcore)
    assert [tile for _, _, tiles in mapping.runs() for tile in tiles] == list(mapping.tiles)
    alike: dict[int, object] = {}
    filled: set[tuple[str, int]] = set()
    for kind, begin, tiles in mapping.runs():
        assert tiles[0] is mapping.tiles[begin]
        (key,) = {tile.mcore.tensor for tile in tiles}
        layer = tiles[0].mcore.base[0] if layout is Layout.STACKED and key.startswith("decoder.layers.") else 0
        assert (key, layer) not in filled
        filled.add((key, layer))
        form = [
            (tile.sizes, tile.hf[1:], (tile.mcore.base[0] - layer, *tile.mcore.base[1:]), tile.mcore.steps)
            for tile in tiles
        ]
        assert alike.setdefault(kind, form) == form


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
    ("key", "module"),
    [
        ("decoder.layers.3.self_attention.linear_qkv.weight", "decoder.layers.3.self_attention.linear_qkv"),
        ("decoder.layers.self_attention.linear_qkv.layer_norm_weight", None),
        ("decoder.layers.self_attention.linear_qkv.bias", None),
        ("decoder.layers.mlp.router.weight", None),
        ("decoder.layers.mlp.router.expert_bias", None),
        ("decoder.layers.mlp.shared_experts.gate_weight", None),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm"),
        ("decoder.final_norm.weight", "decoder.final_norm"),
        ("embedding.word_embeddings.weight", None),
        ("output_layer.weight", None),
        ("decoder.layers.0.mixer.in_proj.weight.z", "decoder.layers.0.mixer.in_proj"),
        ("decoder.layers.0.mixer.conv1d.weight.x", None),
        ("decoder.layers.0.mixer.norm.weight", None),
        ("decoder.layers.0.self_attention.out_norm.weight", "decoder.layers.0.self_attention.out_norm"),
        ("decoder.layers.0.mlp.fc1_latent_proj.weight", "decoder.layers.0.mlp.fc1_latent_proj"),
        ("decoder.layers.self_attention.core_attention.softmax_offset", "decoder.layers.self_attention.core_attention"),
        ("mtp.layers.0.eh_proj.weight", "mtp.layers.0.eh_proj"),
        ("mtp.layers.0.enorm.weight", "mtp.layers.0.enorm"),
    ],
)
def test_which_modules_have_extra_state(key: str, module: str | None) -> None:
    assert extra_state_module(key) == module


@pytest.mark.parametrize(
    ("module", "layer", "keys"),
    [
        ("decoder.layers.mlp.linear_fc1", 1, ["decoder.layers.mlp.linear_fc1._extra_state/shard_1_7"]),
        ("decoder.layers.1.mlp.linear_fc1", None, ["decoder.layers.1.mlp.linear_fc1._extra_state/shard_0_1"]),
        (
            "d.mlp.experts.experts.linear_fc1",
            1,
            [f"d.mlp.experts.experts.linear_fc1._extra_state/shard_1.{e}_7.2" for e in range(2)],
        ),
        (
            "d.1.mlp.experts.experts.linear_fc1",
            None,
            [f"d.1.mlp.experts.experts.linear_fc1._extra_state/shard_{e}_2" for e in range(2)],
        ),
    ],
)
def test_keys_of_extra_state(module: str, layer: int | None, keys: list[str]) -> None:
    assert extra_state_keys(module, layer, 7, 2) == keys


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

    wrong = LLAMA._replace(rules=rules)
    return mock.patch.dict(registry._REGISTERED, {"LlamaForCausalLM": wrong})


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
    sizes=st.lists(st.sampled_from(["r*d", "d", "2*d", "3"]), min_size=1, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_expanded_extents(dims: dict[str, int], sizes: list[str]) -> None:
    expanded = expand(rows(*((f"p{k}.{{i}}", size) for k, size in enumerate(sizes)), trailing=("H",)), dims)
    assert expanded.mcore_shape == (sum(extent(size, dims) for size in sizes), dims["H"])
    stacked = expanded.stack(7)
    assert stacked.mcore_shape == (7, *expanded.mcore_shape)
    for k, (shape, tile) in enumerate(stacked.tiles("m", (("{i}", "5"),), 5, {}, {})):
        assert tile.hf.tensor == f"p{k}.5"
        assert shape == (extent(sizes[k], dims), dims["H"])
        assert tile.mcore.base[0] == 5
        assert all(axis > 0 for axis, _ in tile.mcore.steps)


def moved(parts: tuple[Part, ...], dims: dict[str, int], arrays: dict[str, Array]) -> Array:
    """What the parts make of Hugging Face arrays, element by element."""
    expanded = expand(parts, dims)
    made = np.full(expanded.mcore_shape, -1)
    for shape, tile in expanded.tiles("m", (), None, {}, {}):
        assert arrays[tile.hf.tensor].shape == shape
        theirs, ours = indices(tile, mcore=False), indices(tile, mcore=True)
        assert (made[tuple(ours.T)] == -1).all()
        made[tuple(ours.T)] = arrays[tile.hf.tensor][tuple(theirs.T)]
    assert (made >= 0).all()
    return made


@given(dims=st.fixed_dictionaries({name: st.integers(1, 4) for name in ("G", "r", "d", "H", "E", "F")}))
@settings(max_examples=40, deadline=None)
def test_axes_in_words_mean_what_numpy_says(dims: dict[str, int]) -> None:
    G, r, d, H, E, F = (dims[name] for name in ("G", "r", "d", "H", "E", "F"))  # noqa: N806

    def numbered(*shape: int, first: int = 0) -> Array:
        return np.arange(first, first + math.prod(shape)).reshape(shape)

    q, k, v = numbered(G * r * d, H), numbered(G * d, H, first=1000), numbered(G * d, H, first=2000)
    expected = np.concatenate([q.reshape(G, -1, H), k.reshape(G, -1, H), v.reshape(G, -1, H)], axis=1).reshape(-1, H)
    assert (moved(qkv(q="q", k="k", v="v", trailing=("H",)), dims, {"q": q, "k": k, "v": v}) == expected).all()

    experts = {f"e{e}": numbered(F, H, first=1000 * e) for e in range(E)}
    parts: tuple[Part, ...] = (Part("e{e}", "F H", "[e] F H"),)
    assert (moved(parts, dims, experts) == np.stack(list(experts.values()))).all()

    packed = numbered(E, H, 2 * F)
    turned = packed.transpose(0, 2, 1)
    parts = (
        Part("w", "[e] H (F 1@0/2)", "[e] F@0/2*F H"),
        Part("w", "[e] H (F 1@1/2)", "[e] F@F/2*F H"),
    )
    assert (moved(parts, dims, {"w": packed}) == np.concatenate([turned[:, 0::2], turned[:, 1::2]], axis=1)).all()

    square = numbered(H, H)
    assert (moved(same("s", "H", "H"), dims, {"s": square}) == square).all()
    assert (moved((Part("s", "H H'", "H' H"),), dims, {"s": square}) == square.T).all()

    fused = numbered(F + H, G)
    (_, left), (_, right) = split("f", ("a", "F"), ("b", "H"), trailing=("G",))
    assert (moved(left, dims, {"f": fused}) == fused[:F]).all()
    assert (moved(right, dims, {"f": fused}) == fused[F:]).all()
    assert (moved((Part("b", "1 E", "E"),), dims, {"b": numbered(1, E)}) == np.arange(E)).all()


def test_parts_that_contradict_each_other_are_refused() -> None:
    dims = {"F": 2, "H": 3}
    with pytest.raises(ValueError, match="different words"):
        expand((Part("a", "F H", "F"),), dims)
    with pytest.raises(ValueError, match="different shapes"):
        expand((Part("a", "F", "F"), Part("b", "H", "H")), dims)


def test_conditions() -> None:
    assert holds("", frozenset())
    assert holds("moe !tied", frozenset({"moe"}))
    assert not holds("moe !tied", frozenset({"moe", "tied"}))
    assert not holds("moe", frozenset())


def test_copies_cover_the_same_tensor() -> None:
    mapping = map_model(HFConfig(Tiny(tied=True).config))
    doubled = mapping.with_copies(mapping.aliases)
    assert doubled.hf["lm_head.weight"] == mapping.hf["model.embed_tokens.weight"]
    assert len(doubled.tiles) == len(mapping.tiles) + 1
    assert list(doubled.hf)[:-1] == list(mapping.hf)
