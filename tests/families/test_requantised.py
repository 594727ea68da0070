"""Exports that quantise again: what came from FP8 blocks comes back as FP8 blocks that hold the same values."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.quantised import dequantised, fp8_block, mxfp4
from tests.tiny import bits, listing, read_safetensors, same

import shardway
from shardway.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.tiny import Array

    from shardway.convert.report import ConversionReport

BLOCK = (32, 24)


@pytest.fixture(params=["deepseek_v3", "qwen3_moe_packed"])
def model(request: pytest.FixtureRequest, family_model: Callable[[str], Path], tmp_path: Path) -> Path:
    shutil.copytree(family_model(request.param), tmp_path / "hf")
    fp8_block(tmp_path / "hf", BLOCK)
    shardway.import_hf(tmp_path / "hf", tmp_path / "ckpt", fsync=False)
    return tmp_path / "hf"


def test_it_gives_every_value_back(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = read_safetensors(model)
    count = sum(tag == "F8_E4M3" for tag, _ in source.values())
    arguments = [str(tmp_path / "ckpt"), str(tmp_path / "back"), "--quantize", "fp8-block", "--verify", "--no-fsync"]
    assert main(["export", *arguments]) == 0
    assert (
        f"{count} tensors were quantised to fp8-block; {count} of them give every bit back" in capsys.readouterr().out
    )
    back = read_safetensors(tmp_path / "back")
    assert {name: (tag, array.shape) for name, (tag, array) in back.items()} == {
        name: (tag, array.shape) for name, (tag, array) in source.items()
    }
    assert same(bits(dequantised(tmp_path / "back", BLOCK).items()), bits(dequantised(model, BLOCK).items()))
    config, before = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "back", model))
    assert config["quantization_config"] == before["quantization_config"]
    assert shardway.verify(tmp_path / "back", tmp_path / "ckpt").equal
    report = shardway.import_hf(tmp_path / "back", tmp_path / "again", fsync=False)
    assert report.dequantised == {"fp8-block": count}
    assert shardway.verify(tmp_path / "ckpt", tmp_path / "again").equal


def test_a_plan_knows_what_is_quantised(model: Path, tmp_path: Path) -> None:
    planned = shardway.plan(tmp_path / "ckpt", quantize="fp8-block")
    assert sum(planned.writes.values()) < sum(shardway.plan(tmp_path / "ckpt").writes.values())
    shardway.export_hf(tmp_path / "ckpt", tmp_path / "back", quantize="fp8-block", fsync=False)
    for name, num_bytes in planned.writes.items():
        assert (tmp_path / "back" / name).stat().st_size == num_bytes


def test_a_finished_one_is_reused_and_a_changed_one_is_not(model: Path, tmp_path: Path) -> None:
    first = shardway.export_hf(tmp_path / "ckpt", tmp_path / "back", quantize="fp8-block", fsync=False)
    assert not first.reused
    assert first.requantised is not None
    assert first.requantised["num_tensors"] == first.requantised["num_exact"]
    before = listing(tmp_path / "back")

    def again() -> ConversionReport:
        return shardway.export_hf(
            tmp_path / "ckpt", tmp_path / "back", quantize="fp8-block", fsync=False, if_exists="reuse"
        )

    assert again().reused
    assert listing(tmp_path / "back") == before
    file = tmp_path / "back/model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])["model.layers.1.self_attn.o_proj.weight"]
    data[8 + length + entry["data_offsets"][0]] ^= 1
    file.write_bytes(data)
    with pytest.raises(shardway.ShardwayError, match="1 of its tensors hold other values"):
        again()


def test_blocks_of_another_size_are_said_to_be_inexact(model: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "ckpt/iter_0000000/hf", tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [40, 40]
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    report = shardway.export_hf(
        tmp_path / "ckpt", tmp_path / "back", hf=tmp_path / "other", quantize="fp8-block", fsync=False, verify=True
    )
    found = report.requantised
    assert found is not None
    assert found["num_exact"] == 0
    plain, back = dequantised(model, BLOCK), dequantised(tmp_path / "back", (40, 40))

    def wide(array: Array) -> Array:
        return (array.astype(np.uint32) << 16).view(np.float32)

    errors = {
        name: float(np.abs(wide(plain[name][1]) - wide(array)).max())
        for name, (tag, array) in back.items()
        if tag == "BF16"
    }
    assert found["max_abs_error"] == max(errors.values())
    assert errors[str(found["largest"])] == max(errors.values())
    assert "differ by at most" in report.notes[-1]


def test_a_damaged_chunk_is_found_though_only_quantised_tensors_read_it(model: Path, tmp_path: Path) -> None:
    record = json.loads((tmp_path / "ckpt/iter_0000000/shardway.json").read_text())
    (name,) = [each for each in record["quantised"]["fp8-block"] if each.endswith("layers.1.self_attn.o_proj.weight")]
    assert name
    from shardway.formats.torch_dist import open_torch_dist

    opened = open_torch_dist(tmp_path / "ckpt")
    key = next(each for each in opened.catalog.tensors if each.endswith("self_attention.linear_proj.weight"))
    chunk = opened.catalog.tensors[key].chunks[-1]
    path = opened.root / chunk.file
    data = bytearray(path.read_bytes())
    data[chunk.offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(shardway.ShardwayError, match="does not hold the bytes that were written") as caught:
        shardway.export_hf(tmp_path / "ckpt", tmp_path / "back", quantize="fp8-block", fsync=False)
    assert caught.value.problems[0].tensor == key
    assert not (tmp_path / "back").exists()


def test_what_did_not_come_from_blocks_can_not_be_quantised(
    family_model: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(family_model("gpt_oss_square"), tmp_path / "hf")
    mxfp4(tmp_path / "hf")
    shardway.import_hf(tmp_path / "hf", tmp_path / "ckpt", fsync=False)
    with pytest.raises(shardway.ShardwayError, match="have come from FP8 blocks") as caught:
        shardway.export_hf(tmp_path / "ckpt", tmp_path / "back", quantize="fp8-block", fsync=False)
    assert caught.value.code == "option-invalid"
    with pytest.raises(shardway.ShardwayError, match="expected fp8-block"):
        shardway.export_hf(tmp_path / "ckpt", tmp_path / "back", quantize="mxfp4", fsync=False)


def test_a_config_without_blocks_is_refused(model: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "ckpt/iter_0000000/hf", tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    for settings in (None, {"quant_method": "mxfp4"}, {"quant_method": "fp8", "weight_block_size": None}):
        (tmp_path / "other/config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        with pytest.raises(shardway.ShardwayError, match="can't be done"):
            shardway.export_hf(
                tmp_path / "ckpt", tmp_path / "back", hf=tmp_path / "other", quantize="fp8-block", fsync=False
            )
