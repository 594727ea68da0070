"""Which boxes of a tensor the ranks of a job load."""

from __future__ import annotations

import pytest

import shardway
from shardway.convert.chunk_for import parse_chunk_for
from shardway.core.boxes import Box, exact_cover
from shardway.families.parallel import Parallelism, UnevenError, described, loaded_boxes

TP2 = Parallelism(tp=2, etp=2)


def cut(key: str, shape: tuple[int, ...], parallel: Parallelism = TP2) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    boxes = loaded_boxes(key, shape, parallel)
    assert boxes is not None
    assert exact_cover(shape, boxes) is None
    assert boxes == sorted(boxes)
    return [(box.start, box.size) for box in boxes]


@pytest.mark.parametrize(
    ("key", "shape", "expected"),
    [
        ("decoder.layers.3.self_attention.linear_qkv.weight", (8, 3), [((0, 0), (4, 3)), ((4, 0), (4, 3))]),
        ("decoder.layers.3.self_attention.linear_qkv.bias", (8,), [((0,), (4,)), ((4,), (4,))]),
        ("decoder.layers.3.self_attention.linear_proj.weight", (3, 8), [((0, 0), (3, 4)), ((0, 4), (3, 4))]),
        ("decoder.layers.3.self_attention.linear_proj.bias", (8,), [((0,), (8,))]),
        ("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", (8,), [((0,), (8,))]),
        ("decoder.layers.3.mlp.router.weight", (8, 3), [((0, 0), (8, 3))]),
        ("decoder.layers.3.mlp.linear_fc1.weight", (8, 3), [((k, 0), (2, 3)) for k in (0, 2, 4, 6)]),
        ("decoder.layers.mlp.linear_fc2.weight", (2, 3, 4), [((i, 0, k), (1, 3, 2)) for i in (0, 1) for k in (0, 2)]),
        (
            "decoder.layers.mlp.experts.experts.linear_fc2.weight",
            (1, 2, 3, 4),
            [((0, e, 0, k), (1, 1, 3, 2)) for e in (0, 1) for k in (0, 2)],
        ),
        (
            "decoder.layers.1.mlp.experts.experts.0.linear_fc1.weight_w",
            (4, 3),
            [((0, 0), (4, 3))],
        ),
        ("decoder.layers.0.self_attention.linear_q_down_proj.weight", (4, 8), [((0, 0), (2, 8)), ((2, 0), (2, 8))]),
        ("decoder.layers.0.self_attention.linear_kv_down_proj.weight", (5, 8), [((0, 0), (5, 8))]),
        ("mtp.layers.0.eh_proj.weight", (4, 8), [((0, 0), (2, 8)), ((2, 0), (2, 8))]),
        (
            "optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc2.weight",
            (1, 4),
            [((0, 0), (1, 2)), ((0, 2), (1, 2))],
        ),
    ],
)
def test_what_is_cut(key: str, shape: tuple[int, ...], expected: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    assert cut(key, shape) == expected


def test_gate_and_what_it_gates_lie_apart_even_for_one_rank() -> None:
    key = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
    expected = [((e, k, 0), (1, 2, 3)) for e in (0, 1) for k in (0, 2)]
    assert cut(key, (2, 4, 3), Parallelism(tp=2)) == expected
    assert cut("decoder.layers.1.mlp.linear_fc1.bias", (3,), Parallelism()) == [((0,), (3,))]


def test_the_vocabulary_is_cut_for_ranks_that_pad_and_for_those_that_do_not() -> None:
    key = "embedding.word_embeddings.weight"
    assert [start[0] for start, _ in cut(key, (300, 4))] == [0, 150, 256]
    assert [start[0] for start, _ in cut(key, (301, 4))] == [0, 256]
    assert [start[0] for start, _ in cut(key, (256, 4))] == [0, 128]
    assert [start[0] for start, _ in cut("output_layer.weight", (11, 4))] == [0]


def test_what_can_not_be_cut_evenly() -> None:
    with pytest.raises(UnevenError, match="9 % 2 = 1"):
        loaded_boxes("decoder.layers.0.mlp.linear_fc2.weight", (4, 9), TP2)
    with pytest.raises(UnevenError, match="6 experts"):
        loaded_boxes("decoder.layers.0.mlp.experts.experts.linear_fc2.weight", (6, 4, 8), Parallelism(ep=4))
    assert loaded_boxes("optimizer.distributed.dp_group_idx_0.x", (9,), TP2) is None
    assert loaded_boxes("decoder.layers.0.x", (), TP2) is None
    assert loaded_boxes("decoder.final_layernorm.weight", (9,), TP2) == [Box((0,), (9,))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("tp=8", Parallelism(tp=8, etp=8)),
        (" tp = 2, ep=4 ,pp=3", Parallelism(tp=2, etp=2, ep=4)),
        ("etp=1,tp=4", Parallelism(tp=4, etp=1)),
    ],
)
def test_parsing(text: str, expected: Parallelism | None) -> None:
    assert parse_chunk_for(text) == expected
    if expected is not None:
        assert parse_chunk_for(described(expected)) == expected


@pytest.mark.parametrize("text", ["tp", "tp=0", "tp=-1", "tp=1,tp=2", "dp=2", "tp=2;ep=2", "tp=1e3"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(shardway.ShardwayError) as caught:
        parse_chunk_for(text)
    assert caught.value.codes == {"option-invalid"}
