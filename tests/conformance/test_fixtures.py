"""Checkpoints that Megatron Bridge wrote: imports equal them bit for bit, and exporting them gives the original."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from tests.tiny import bits, read_distcp, read_safetensors, same

import shardway
from shardway.formats.torch_dist import open_torch_dist

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
IMPORTED = (
    "llama",
    "qwen3",
    "qwen3_moe",
    "deepseek_v3",
    "deepseek_v3_mtp",
    "nemotron_h",
    "nemotron_h_super",
    "qwen3_next",
)
WRITTEN = {
    "megatron_bridge_0.7.0/llama": "llama",
    "megatron_bridge_0.7.0/llama_tp2": "llama",
    "megatron_bridge_0.7.0/qwen3": "qwen3",
    "megatron_bridge_0.7.0/qwen3_moe": "qwen3_moe",
    "megatron_bridge_0.7.0/qwen3_moe_ep2": "qwen3_moe",
    "megatron_bridge_0.7.0/deepseek_v3": "deepseek_v3",
    "megatron_bridge_0.7.0/deepseek_v3_mtp": "deepseek_v3_mtp",
    "megatron_bridge_0.7.0/deepseek_v3_pp2": "deepseek_v3",
    "megatron_bridge_0.7.0/nemotron_h": "nemotron_h",
    "megatron_bridge_0.7.0/nemotron_h_super": "nemotron_h_super",
    "megatron_bridge_0.7.0/qwen3_next": "qwen3_next",
    "megatron_bridge_0.3.1/llama": "llama",
}
# Endings, on either side, of tensors that Megatron Bridge rounds to bfloat16 on the way: float32 parameters of state
# spaces, and the output norm of gated delta nets, which Megatron holds less 1. An import of ours has them in float32.
ROUNDED = {
    "nemotron_h_super": (".A_log", ".D", ".dt_bias"),
    "qwen3_next": (".out_norm.weight", ".linear_attn.norm.weight"),
}


def facts(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((FIXTURES / f"megatron_bridge_0.7.0/{name}.json").read_text())
    return document


def as_bfloat16(words: npt.NDArray[Any]) -> tuple[str, npt.NDArray[Any]]:
    """What is left of float32 numbers, given by their bits."""
    return "BF16", words.view(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def left_of(tag: str, words: npt.NDArray[Any]) -> tuple[str, npt.NDArray[Any]]:
    """What Megatron Bridge leaves of a tensor of `ROUNDED`: bfloat16, of what was bfloat16 less 1."""
    if tag == "F32":
        return as_bfloat16(words)
    less = as_bfloat16(words.view(ml_dtypes.bfloat16).astype(np.float32) - np.float32(1))[1]
    return as_bfloat16(less.view(ml_dtypes.bfloat16).astype(np.float32) + np.float32(1))


@pytest.mark.parametrize("name", IMPORTED)
def test_an_import_holds_the_tensors_of_megatron_bridge(name: str, tmp_path: Path) -> None:
    shardway.import_hf(FIXTURES / "hf" / name, tmp_path / "out", fsync=False)
    rounded = ROUNDED.get(name, ())
    tensors, bytes_of = open_torch_dist(tmp_path / "out").catalog.tensors, read_distcp(tmp_path / "out")
    ours = {}
    for key, tensor in tensors.items():
        read, dtype = bytes_of[key], tensor.dtype.name
        if key.endswith(rounded):
            assert dtype == "float32"
            read, dtype = as_bfloat16(read)[1], "bfloat16"
        digest = hashlib.sha256(read.tobytes()).hexdigest()
        ours[key] = {"dtype": dtype, "shape": list(tensor.shape), "sha256": digest}
    theirs = {
        key: {"dtype": entry["dtype"], "shape": entry["shape"], "sha256": entry["sha256"]}
        for key, entry in facts(name)["tensors"].items()
    }
    assert ours == theirs


@pytest.mark.parametrize("name", IMPORTED)
def test_inspect_gives_the_digests_of_megatron_bridge(name: str) -> None:
    report = shardway.inspect(FIXTURES / "megatron_bridge_0.7.0" / name, digest=True)
    assert {key: tensor.sha256 for key, tensor in report.tensors.items()} == {
        key: entry["sha256"] for key, entry in facts(name)["tensors"].items()
    }


@pytest.mark.parametrize("name", IMPORTED)
def test_an_import_is_chunked_as_megatron_bridge_chunks(name: str, tmp_path: Path) -> None:
    shardway.import_hf(FIXTURES / "hf" / name, tmp_path / "out", fsync=False)
    for key, tensor in open_torch_dist(tmp_path / "out").catalog.tensors.items():
        theirs = facts(name)["tensors"][key]["chunks"]
        ours = [[list(chunk.start), list(chunk.size)] for chunk in tensor.chunks]
        # Megatron Bridge writes a layer's chunk per layer; neighbouring layers of one small tensor are never merged.
        assert sorted(ours) == sorted(theirs), key


@pytest.mark.parametrize("name", IMPORTED)
def test_an_import_holds_the_extra_state_of_megatron_bridge(name: str, tmp_path: Path) -> None:
    shardway.import_hf(FIXTURES / "hf" / name, tmp_path / "out", fsync=False)
    theirs = {key for key in facts(name)["bytes"] if "_extra_state" in key}
    checkpoint = open_torch_dist(tmp_path / "out")
    assert set(checkpoint.objects) == theirs
    assert all(checkpoint.read_object(key) == [None] for key in theirs)
    # 0.3.1, of the older form, leaves this in common.pt; the loader rebuilds the layout of the tensors from it.
    older = open_torch_dist(FIXTURES / "megatron_bridge_0.3.1/llama")
    assert checkpoint.content_metadata == older.content_metadata
    assert {key: checkpoint.common[key] for key in ("checkpoint_version", "iteration")} == {
        key: older.common[key] for key in ("checkpoint_version", "iteration")
    }


@pytest.mark.parametrize(("written", "original"), WRITTEN.items())
@pytest.mark.parametrize("verify", [False, True])
def test_an_export_gives_the_original(written: str, original: str, verify: bool, tmp_path: Path) -> None:
    hf = FIXTURES / "hf" / original
    report = shardway.export_hf(FIXTURES / written, tmp_path / "out", hf=hf, fsync=False, verify=verify)
    wanted = read_safetensors(hf)
    lost = [name for name in wanted if name.endswith(ROUNDED.get(original, ()))]
    wanted |= {name: left_of(*wanted[name]) for name in lost}
    exported = read_safetensors(tmp_path / "out")
    assert {name: tag for name, (tag, _) in exported.items()} == {name: tag for name, (tag, _) in wanted.items()}
    assert same(bits(exported.items()), bits(wanted.items()))
    assert (tmp_path / "out/config.json").read_bytes() == (hf / "config.json").read_bytes()
    sizes = {"bfloat16": 2, "float32": 4}
    stored = facts(original)["tensors"].values()
    assert report.num_bytes == sum(sizes[entry["dtype"]] * math.prod(entry["shape"]) for entry in stored)
    narrowed = sorted(name for name in lost if read_safetensors(hf)[name][0] == "F32")
    assert [difference.tensor for difference in shardway.verify(hf, FIXTURES / written).differences] == narrowed


@pytest.mark.parametrize("written", WRITTEN)
def test_an_export_says_which_config_it_needs(written: str, tmp_path: Path) -> None:
    with pytest.raises(shardway.ShardwayError) as caught:
        shardway.export_hf(FIXTURES / written, tmp_path / "out")
    assert caught.value.codes == {"config-missing"}
    assert "--hf" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted({path.stem for path in (FIXTURES / "megatron_bridge_0.7.0").iterdir()}))
def test_the_copies_are_those_of_the_shared_fixtures(name: str, shared_fixtures: Path) -> None:
    for path in sorted((FIXTURES / "megatron_bridge_0.7.0" / name).rglob("*")):
        if path.is_file():
            theirs = shared_fixtures / path.relative_to(FIXTURES)
            assert path.read_bytes() == theirs.read_bytes(), path
