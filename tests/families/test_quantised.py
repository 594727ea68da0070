"""Models with quantised weights become what torch makes of them, whichever way they are looked at."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.quantised import dequantised, fp8_block, fp8_whole, int4_group, mxfp4
from tests.tiny import bits, read_distcp, read_safetensors, same, write_safetensors

import shardway
from shardway.cli.main import main
from shardway.formats.record import read_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BLOCK = (32, 24)  # ragged in every model
CASES: dict[str, tuple[str, str, Callable[[Path], Path]]] = {
    "deepseek_v3-fp8-block": ("deepseek_v3", "fp8-block", lambda path: fp8_block(path, BLOCK)),
    "qwen3_moe-fp8-block": ("qwen3_moe", "fp8-block", lambda path: fp8_block(path, BLOCK)),
    "qwen3_moe_packed-fp8-block": ("qwen3_moe_packed", "fp8-block", lambda path: fp8_block(path, BLOCK)),
    "minimax_m2-fp8-block": ("minimax_m2", "fp8-block", lambda path: fp8_block(path, BLOCK)),
    "glm4_moe-fp8-tensor": ("glm4_moe", "fp8-tensor", lambda path: fp8_whole(path, "tensor", "fp8")),
    "glm4_moe-fp8-channel": ("glm4_moe", "fp8-channel", lambda path: fp8_whole(path, "channel", "compressed-tensors")),
    "qwen3_moe_packed-modelopt": ("qwen3_moe_packed", "fp8-tensor", lambda path: fp8_whole(path, "tensor", "modelopt")),
    "deepseek_v3-int4": ("deepseek_v3", "int4-group", int4_group),
    "gpt_oss-mxfp4": ("gpt_oss_square", "mxfp4", mxfp4),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest, family_model: Callable[[str], Path], tmp_path: Path) -> tuple[Path, str]:
    """A quantised model and its scheme."""
    name, scheme, change = CASES[request.param]
    shutil.copytree(family_model(name), tmp_path / "hf")
    return change(tmp_path / "hf"), scheme


def plain_twin(model: Path, path: Path) -> Path:
    """The same model with the weights that torch makes of the quantised ones."""
    path.mkdir()
    config = json.loads((model / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    write_safetensors(path / "model.safetensors", dequantised(model, BLOCK))
    return path


def test_it_becomes_what_torch_makes_of_it(
    case: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, scheme = case
    twin = plain_twin(model, tmp_path / "twin")
    stored = read_safetensors(model)
    count = sum(name not in stored or stored[name][0] != tag for name, (tag, _) in dequantised(model, BLOCK).items())
    assert shardway.plan(model).dequantised == {scheme: count}
    assert shardway.inspect(model).quantised == {scheme: count}
    report = shardway.import_hf(model, tmp_path / "ckpt", fsync=False, verify=True)
    assert report.dequantised == {scheme: count}
    assert f"{count} tensors were dequantised from {scheme} to bfloat16" in report.notes
    shardway.import_hf(twin, tmp_path / "expected", fsync=False)
    assert same(read_distcp(tmp_path / "ckpt"), read_distcp(tmp_path / "expected"))
    record = read_record(tmp_path / "ckpt/iter_0000000")
    assert record is not None
    assert len(record.quantised[scheme]) == count

    for other in (tmp_path / "ckpt", tmp_path / "expected", twin):
        for pair in ((model, other), (other, model)):
            found = shardway.verify(*pair)
            assert found.equal, found.differences
            assert found.dequantised == {scheme: count}
    assert main(["verify", str(model), str(twin)]) == 0
    assert f"{count} dequantised from {scheme}" in capsys.readouterr().out

    exported = shardway.export_hf(tmp_path / "ckpt", tmp_path / "back", fsync=False, verify=True)
    assert any("quantization_config" in note for note in exported.notes)
    assert same(bits(read_safetensors(tmp_path / "back").items()), bits(read_safetensors(twin).items()))
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    assert shardway.verify(model, tmp_path / "back").equal
    again = shardway.import_hf(tmp_path / "back", tmp_path / "again", fsync=False)
    assert again.dequantised == {}


def test_one_other_bit_is_found(case: tuple[Path, str], tmp_path: Path) -> None:
    model, _ = case
    twin = plain_twin(model, tmp_path / "twin")
    shardway.import_hf(model, tmp_path / "ckpt", fsync=False)
    entries = read_safetensors(twin)
    name = next(name for name in entries if name not in read_safetensors(model) or "proj" in name)
    changed = entries[name][1].copy()
    changed[(-1,) * changed.ndim] ^= 1
    write_safetensors(twin / "model.safetensors", entries | {name: ("BF16", changed)})
    for other in (twin, tmp_path / "ckpt"):
        source = model if other is twin else twin
        (found,) = shardway.verify(source, other).differences
        assert (found.tensor, found.kind, found.num_elements) == (name, "values", 1)
        assert found.first_index == tuple(n - 1 for n in changed.shape)


def test_float32_is_computed_without_a_detour(family_model: Callable[[str], Path], tmp_path: Path) -> None:
    import torch
    from tests.quantised import torch_values

    shutil.copytree(family_model("qwen3_moe"), tmp_path / "hf")
    stored = read_safetensors(fp8_block(tmp_path / "hf"))
    shardway.import_hf(tmp_path / "hf", tmp_path / "wide", dtype="fp32", fsync=False, verify=True)
    shardway.import_hf(tmp_path / "hf", tmp_path / "half", dtype="fp16", fsync=False, verify=True)
    name = "model.layers.1.self_attn.o_proj.weight"
    values = torch_values(stored[name][1], stored[f"{name}_scale_inv"][1], (128, 128))
    key = "decoder.layers.self_attention.linear_proj.weight"
    assert (read_distcp(tmp_path / "wide")[key][1] == values.view(torch.int32).numpy().view(np.uint32)).all()
    halves = values.half().view(torch.int16).numpy().view(np.uint16)
    assert (read_distcp(tmp_path / "half")[key][1] == halves).all()
    differences = shardway.verify(tmp_path / "hf", tmp_path / "wide").differences
    assert {found.kind for found in differences} == {"dtype"}  # of the tensors that are stored plainly
    assert not any("_proj" in found.tensor for found in differences)
