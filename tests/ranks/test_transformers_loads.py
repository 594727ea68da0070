"""What shardway exports is what it imported: the same bits, and transformers computes the same with them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

import pytest
from tests.models import BY_NAME, MODELS, load_transformers, logits_of, tokens_for
from tests.oracle import read_safetensors, same_bits

import shardway

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from tests.conftest import Imported

NAMES = [spec.name for spec in MODELS]
BESIDE_THE_WEIGHTS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def exported(imported: Imported, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    """Gives the directory that ``shardway.export_hf`` makes of what ``shardway.import_hf`` made of a model."""
    root = tmp_path_factory.mktemp("exported")

    @functools.cache
    def export(name: str, layout: Literal["stacked", "per-layer"]) -> Path:
        destination = root / f"{name}_{layout}"
        shardway.export_hf(imported(name, layout), destination)
        return destination

    return lambda name, layout="stacked": export(name, layout)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_the_same_model(name: str, exported: Imported, hf_model: Callable[[str], Path]) -> None:
    """Every parameter and buffer of the loaded model, so that its logits can't but be identical."""
    import torch

    ours, theirs = (load_transformers(path) for path in (exported(name), hf_model(name)))
    assert ours.config.to_diff_dict() == theirs.config.to_diff_dict()
    left, right = ({**dict(model.named_parameters()), **dict(model.named_buffers())} for model in (ours, theirs))
    assert left.keys() == right.keys()
    assert [key for key, value in right.items() if not torch.equal(left[key], value)] == []


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_identical(name: str, exported: Imported, hf_logits: Callable[[str], torch.Tensor]) -> None:
    """Identical but for how a matrix product may round from one call to the next: 2e-4 was seen on one machine."""
    import torch

    torch.testing.assert_close(logits_of(exported(name), tokens_for(BY_NAME[name])), hf_logits(name), rtol=0, atol=1e-3)


@pytest.mark.parametrize("layout", ["stacked", "per-layer"])
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_has_the_same_bits(
    name: str, layout: Literal["stacked", "per-layer"], exported: Imported, hf_model: Callable[[str], Path]
) -> None:
    source, result = read_safetensors(hf_model(name)), read_safetensors(exported(name, layout))
    assert result.keys() == source.keys()
    assert [key for key, tensor in source.items() if not same_bits(result[key], tensor)] == []


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_the_same_config(name: str, exported: Imported, hf_model: Callable[[str], Path]) -> None:
    import transformers

    def config(path: Path) -> dict[str, object]:
        values = transformers.AutoConfig.from_pretrained(path, local_files_only=True).to_dict()
        return {key: value for key, value in values.items() if key != "_name_or_path"}

    assert config(exported(name)) == config(hf_model(name))


@pytest.mark.parametrize("name", ["llama", "qwen2_tied"])
def test_the_files_beside_the_weights_come_along(
    name: str, exported: Imported, hf_model: Callable[[str], Path]
) -> None:
    for file in BESIDE_THE_WEIGHTS:
        assert (exported(name) / file).read_bytes() == (hf_model(name) / file).read_bytes()


def test_the_tokenizer_still_tokenizes(exported: Imported) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(exported("llama"), local_files_only=True)
    assert tokenizer("w7 w99 nothing <s>")["input_ids"] == [7, 99, 0, 1]
