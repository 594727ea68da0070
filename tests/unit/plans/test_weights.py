"""Which tensors of a training checkpoint are the model's, and under which names; by keys that real ones have."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.tiny import Tiny, bits, read_distcp, read_safetensors, same, write_chunks

import shardway
from shardway.core.boxes import Box
from shardway.core.dtypes import BFLOAT16, FLOAT32
from shardway.core.tensors import Catalog, Chunk, StoredTensor
from shardway.formats.dcp import DcpLocation
from shardway.formats.torch_dist import TorchDistCheckpoint
from shardway.plans.weights import Weights, model_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.tiny import Array

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape

PLACE = DcpLocation("__0_0.distcp", 0, 1)
MODEL = Tiny(layers=2)


def stored(key: str, shape: Shape, dtype: DType = BFLOAT16, start: Shape = ()) -> StoredTensor:
    chunk = Chunk(start or (0,) * len(shape), shape, f"{key}.distcp", 0)
    return StoredTensor(key, dtype, shape, (chunk,))


def checkpoint(tensors: Iterable[StoredTensor], objects: Iterable[str] = ()) -> TorchDistCheckpoint:
    by_key = {tensor.name: tensor for tensor in tensors}
    return TorchDistCheckpoint(
        root=Path("ckpt"),
        iteration=1,
        release=False,
        catalog=Catalog(root=Path("ckpt"), tensors=by_key),
        objects=tuple(objects),
        common={"iteration": 1, "opt_param_scheduler": {}},
        content_metadata={},
        common_form="common.pt",
        hf_dir=None,
        files={},
        described=by_key,
        places=dict.fromkeys(objects, PLACE),
    )


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "model0.module.", "model.module."])
def test_prefixes_of_wrappers_are_taken_off(prefix: str) -> None:
    names = ["embedding.word_embeddings.weight", "decoder.layers.mlp.linear_fc2.weight", "mtp.layers.0.eh_proj.weight"]
    state = model_state(checkpoint(stored(f"{prefix}{name}", (4, 3)) for name in names))
    assert list(state.catalog.tensors) == names
    assert [tensor.name for tensor in state.catalog.tensors.values()] == names
    assert state.digests({(f"{prefix}{names[0]}", (0, 0)): "d"}) == {(names[0], (0, 0)): "d"}


def test_chunks_of_a_pipeline_hold_one_model() -> None:
    layers = [stored(f"model{i // 2}.decoder.layers.{i}.mlp.linear_fc2.weight", (4, 3)) for i in range(4)]
    halves = [
        StoredTensor(f"model{i}.decoder.layers.x.weight", BFLOAT16, (4, 3), (Chunk((2 * i, 0), (2, 3), f"{i}", 0),))
        for i in range(2)
    ]
    embeddings = [stored(f"model{i}.embedding.word_embeddings.weight", (8, 3)) for i in range(2)]
    state = model_state(checkpoint([*layers, *halves, *embeddings]))
    assert list(state.catalog.tensors) == [
        *(f"decoder.layers.{i}.mlp.linear_fc2.weight" for i in range(4)),
        "decoder.layers.x.weight",
        "embedding.word_embeddings.weight",
    ]
    assert [chunk.file for chunk in state.catalog.tensors["decoder.layers.x.weight"].chunks] == ["0", "1"]
    assert "model1.embedding.word_embeddings.weight" in state.left_out


def test_singleton_shards_are_joined() -> None:
    at = "decoder.layers.0.mlp"
    parts = [
        stored(f"{at}.experts.experts.{e}.linear_fc{k}.weight{half}", (6, 4))
        for e in (1, 0)
        for k, half in ((1, "_v"), (1, "_w"), (2, ""))
    ]
    found = model_state(checkpoint([*parts, *(stored(f"{at}.linear_fc1.bias{half}", (6,)) for half in ("_w", "_v"))]))
    first, second, bias = (
        found.catalog.tensors[f"{at}.{name}"]
        for name in ("experts.experts.linear_fc1.weight", "experts.experts.linear_fc2.weight", "linear_fc1.bias")
    )
    assert (first.shape, second.shape, bias.shape) == ((2, 12, 4), (2, 6, 4), (12,))
    assert {chunk.file: (chunk.start, chunk.size) for chunk in first.chunks} == {
        f"{at}.experts.experts.{e}.linear_fc1.weight_{half}.distcp": ((e, 6 * (half == "v"), 0), (1, 6, 4))
        for e in range(2)
        for half in "wv"
    }
    key = f"{at}.experts.experts.1.linear_fc1.weight_v"
    assert found.digests({(key, (0, 0)): "d"}) == {(first.name, (1, 6, 0)): "d"}


@pytest.mark.parametrize(
    ("one", "other", "code"),
    [
        (("_w", (6, 4), BFLOAT16), ("_v", (5, 4), BFLOAT16), "shape-mismatch"),
        (("_w", (6, 4), BFLOAT16), ("_v", (6, 4), FLOAT32), "dtype-mixed"),
        (("_w", (6, 4), BFLOAT16), ("", (6, 4), BFLOAT16), "shape-mismatch"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    one: tuple[str, Shape, DType], other: tuple[str, Shape, DType], code: str
) -> None:
    key = "decoder.layers.0.mlp.linear_fc1.weight"
    tensors = [stored(f"{key}{half}", shape, dtype) for half, shape, dtype in (one, other)]
    with pytest.raises(shardway.ShardwayError) as caught:
        model_state(checkpoint(tensors))
    assert caught.value.codes == {code}


WEIGHT = "decoder.layers.0.mlp.linear_fc2.weight"


@pytest.mark.parametrize(
    "prefix", ["optimizer.state.param", "optimizer.state.fp32_param", "chained_1.optimizer.state.fp32_param"]
)
def test_master_weights_are_found(prefix: str) -> None:
    frozen = stored("decoder.layers.1.mlp.linear_fc2.weight", (4, 3))
    bias = stored("decoder.layers.1.mlp.router.expert_bias", (4,), FLOAT32)
    state = [
        stored(f"{prefix}.{WEIGHT}", (4, 3), FLOAT32),
        stored(f"optimizer.state.exp_avg.{WEIGHT}", (4, 3), FLOAT32),
    ]
    found = model_state(checkpoint([stored(WEIGHT, (4, 3)), frozen, bias, *state]), Weights.FP32)
    assert found.catalog.tensors[WEIGHT].chunks[0].file == f"{prefix}.{WEIGHT}.distcp"
    assert found.catalog.tensors[WEIGHT].dtype is FLOAT32
    assert found.catalog.tensors[frozen.name] == frozen
    assert found.left_out == ("common state: opt_param_scheduler", f"optimizer.state.exp_avg.{WEIGHT}")
    assert any(frozen.name in note for note in found.notes)
    assert not any("expert_bias" in note for note in found.notes)


@pytest.mark.parametrize(
    ("keys", "objects", "says"),
    [
        ([], ["rng_state/shard_0_1"], "no optimizer state"),
        ([f"optimizer.state.exp_avg.{WEIGHT}"], [], "no optimizer.state.param"),
        ([], ["optimizer.distributed.dp_group_idx_0.param_state/shard_0_1"], "dp_zero_gather_scatter"),
        (["optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_x.bucket_idx_0.param"], [], "dp_reshardable"),
    ],
)
def test_master_weights_that_are_not_there_are_refused(keys: list[str], objects: list[str], says: str) -> None:
    found = checkpoint([stored(WEIGHT, (4, 3)), *(stored(key, (12,), FLOAT32) for key in keys)], objects)
    with pytest.raises(shardway.ShardwayError, match=says) as caught:
        model_state(found, Weights.FP32)
    assert caught.value.codes == {"masters-missing"}


@pytest.mark.parametrize(("shape", "dtype"), [((1, 1, 12), FLOAT32), ((4, 3), BFLOAT16)])
def test_master_weights_of_another_kind_are_refused(shape: Shape, dtype: DType) -> None:
    masters = stored(f"optimizer.state.fp32_param.{WEIGHT}", shape, dtype)
    with pytest.raises(shardway.ShardwayError) as caught:
        model_state(checkpoint([stored(WEIGHT, (4, 3)), masters]), Weights.FP32)
    assert caught.value.codes == {"masters-missing"}


@pytest.mark.parametrize("wrong", ["", "mlp.linear_fc2.weight", "layer_norm_weight"])
def test_master_weights_have_to_round_to_the_model_s_own(wrong: str, tmp_path: Path) -> None:
    """As megatron-core 0.16 does not always save them."""
    torch = pytest.importorskip("torch")
    from tests.oracle import write_torch_dist

    MODEL.write(tmp_path / "hf")
    weights = {name: torch.randn(array.shape).bfloat16() for name, array in MODEL.megatron(MODEL.weights()).items()}
    masters = {
        f"optimizer.state.param.{name}": (tensor.float().roll(1) if wrong and name.endswith(wrong) else tensor.float())
        for name, tensor in weights.items()
    }
    folder = tmp_path / "m/iter_0000001"
    write_torch_dist(folder, weights | masters, num_layers=2, per_layer=False)

    def export(*, verify: bool) -> None:
        out = tmp_path / f"out{verify}"
        shardway.export_hf(folder, out, hf=tmp_path / "hf", weights="fp32", verify=verify, fsync=False)

    export(verify=False)
    if not wrong:
        export(verify=True)
        return
    with pytest.raises(shardway.ShardwayError) as caught:
        export(verify=True)
    assert caught.value.codes == {"verify-failed"}
    assert {problem.tensor for problem in caught.value.problems} == {name for name in weights if name.endswith(wrong)}
    assert not (tmp_path / "outTrue").exists()


def padded(root: Path, rows: int, cuts: Callable[[int], list[int]]) -> tuple[Path, dict[str, Array]]:
    """A checkpoint whose vocabulary is padded and cut into chunks of rows, and the model in it."""
    pytest.importorskip("torch")
    weights = MODEL.weights()
    MODEL.write(root / "hf")
    tensors = MODEL.megatron(weights)
    chunked: dict[str, list[tuple[Box, Array]]] = {}
    for name, array in tensors.items():
        chunked[name] = [(Box((0,) * array.ndim, array.shape), array)]
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            array = np.concatenate((array, np.full((rows - len(array), array.shape[1]), 7, array.dtype)))
            tensors[name] = array
            edges = [0, *cuts(rows), rows]
            chunked[name] = [
                (Box((low, 0), (high - low, array.shape[1])), array[low:high])
                for low, high in itertools.pairwise(edges)
            ]
    write_chunks(root / "iter_0000001", {name: array.shape for name, array in tensors.items()}, chunked)
    return root / "iter_0000001", weights


@pytest.mark.parametrize("cuts", [[], [10], [11], [12], [16, 24]], ids=str)
def test_the_padding_of_the_vocabulary_is_cut_off(cuts: list[int], tmp_path: Path) -> None:
    source, weights = padded(tmp_path, 32, lambda _: cuts)
    report = shardway.export_hf(source, tmp_path / "out", hf=tmp_path / "hf", verify=True, fsync=False)
    assert same(dict(bits(read_safetensors(tmp_path / "out").items())), weights)
    assert "output_layer.weight has 32 rows for the config's 11 tokens; the padding was cut off" in report.notes
    assert report.num_parameters == sum(array.size for array in weights.values())
    assert shardway.verify(source, tmp_path / "out").equal


def test_no_padding_is_cut_off_where_rows_are_missing(tmp_path: Path) -> None:
    source, _ = padded(tmp_path, 32, lambda _: [])
    larger = dataclasses.replace(MODEL, vocab=33)
    larger.write(tmp_path / "larger")
    with pytest.raises(shardway.ShardwayError) as caught:
        shardway.export_hf(source, tmp_path / "out", hf=tmp_path / "larger", fsync=False)
    assert caught.value.codes == {"shape-mismatch"}
    assert "output_layer.weight" in str(caught.value)
    assert read_distcp(source)["output_layer.weight"].shape == (32, 8)
