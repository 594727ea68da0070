"""AutoBridge: the names, order and defaults of Megatron Bridge, and what goes into the hf folder."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

import pytest
from tests.megatron import require
from tests.tiny import Tiny, bits, read_safetensors, same

import shardway
from shardway.core.errors import Code, ShardwayError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# NVIDIA-NeMo/Megatron-Bridge#3207
PARAMETERS = {
    "model": inspect.Parameter.empty,
    "path": inspect.Parameter.empty,
    "hf_tokenizer_path": None,
    "low_memory_save": False,
    "hf_tokenizer_kwargs": None,
    "fully_parallel_save": True,
    "validate_access_integrity": True,
    "distributed_timeout_minutes": None,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 4,
}


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of the saves that a bridge asks for; none of them happens."""
    require("torch")
    import shardway.live.save

    calls: list[dict[str, Any]] = []
    real = inspect.signature(shardway.live.save.save_megatron_model)

    def record(*args: Any, **kwargs: Any) -> str:
        calls.append(dict(real.bind(*args, **kwargs).arguments))
        return "report"

    monkeypatch.setattr(shardway.live.save, "save_megatron_model", record)
    return calls


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A model directory whose weights are not there."""
    root = tmp_path / "hf"
    root.mkdir()
    (root / "config.json").write_text(json.dumps(LLAMA | {"architectures": ["LlamaForCausalLM"]}))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "README.md"):
        (root / name).write_text(f"{name} of the model")
    return root


def test_the_signature_is_that_of_megatron_bridge() -> None:
    parameters = [*inspect.signature(shardway.AutoBridge.save_megatron_model).parameters.values()][1:]
    positional = {each.name: each.default for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(PARAMETERS.items())
    assert all(each.kind is each.KEYWORD_ONLY for each in parameters[len(positional) :])


def test_positional_arguments_arrive_where_they_belong(saved: list[dict[str, Any]], hf: Path, tmp_path: Path) -> None:
    bridge = shardway.AutoBridge.from_hf_pretrained(str(hf), trust_remote_code=True)
    model: Any = object()
    report: object = bridge.save_megatron_model(model, tmp_path, None, True, {"use_fast": True}, False, False, 3)
    assert report == "report"
    (call,) = saved
    assert call["model"] is model
    assert call["path"] == tmp_path
    config = call["config"]
    assert (config.fully_parallel_save, config.validate_access_integrity) == (False, False)
    assert config.distributed_timeout_minutes == 3
    assert (config.async_save, config.if_exists) == (False, "error")
    assert (call["participants"], call["store"], call["iteration"]) == (None, None, 0)


def test_keywords_arrive_too(saved: list[dict[str, Any]], hf: Path, tmp_path: Path) -> None:
    from shardway.live.save import CheckpointConfig

    bridge = shardway.AutoBridge.from_hf_pretrained(hf)
    model: Any = object()
    bridge.save_megatron_model(
        model, tmp_path, async_save=True, if_exists="replace", iteration=7, participants=[0, 2], store="file"
    )
    own = CheckpointConfig(writers_per_rank=3, fsync=False)
    bridge.save_megatron_model(model, tmp_path, config=own)
    assert (saved[0]["config"].async_save, saved[0]["config"].if_exists) == (True, "replace")
    assert (saved[0]["participants"], saved[0]["store"], saved[0]["iteration"]) == ([0, 2], "file", 7)
    assert saved[1]["config"] is own


def test_the_hf_folder_has_the_small_files_of_the_model(saved: list[dict[str, Any]], hf: Path, tmp_path: Path) -> None:
    bridge = shardway.AutoBridge.from_hf_pretrained(hf)
    assert bridge.config["architectures"] == ["LlamaForCausalLM"]
    model: Any = object()
    bridge.save_megatron_model(model, tmp_path)
    companions = saved[0]["companions"]
    assert companions.config == bridge.config
    assert companions.files == {path.name: path for path in hf.iterdir()}


def test_another_tokenizer_takes_the_place_of_the_models(saved: list[dict[str, Any]], hf: Path, tmp_path: Path) -> None:
    """All of it: files of two tokenizers are none."""
    other = tmp_path / "tokenizer"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "config.json", "notes.txt"):
        (other / name).write_text(f"{name} of the tokenizer")
    bridge = shardway.AutoBridge.from_hf_pretrained(hf)
    model: Any = object()
    bridge.save_megatron_model(model, tmp_path, other)
    bridge.save_megatron_model(model, tmp_path)
    new = {"tokenizer.json", "tokenizer.model", "special_tokens_map.json"}
    kept = {"config.json", "generation_config.json", "README.md"}
    assert saved[0]["companions"].files == {name: other / name for name in new} | {name: hf / name for name in kept}
    assert saved[1]["companions"].files == {path.name: path for path in hf.iterdir()}


@pytest.mark.parametrize("kind", ["dict", "transformers"])
def test_a_config_alone_is_enough(kind: str, saved: list[dict[str, Any]], tmp_path: Path) -> None:
    config: Any = LLAMA
    if kind == "transformers":
        require("transformers")
        import transformers

        config = transformers.LlamaConfig(**{key: value for key, value in LLAMA.items() if key != "model_type"})
    bridge = shardway.AutoBridge.from_hf_config(config)
    assert bridge.config["architectures"] == ["LlamaForCausalLM"]
    model: Any = object()
    bridge.save_megatron_model(model, tmp_path)
    (text,) = saved[0]["companions"].files.values()
    assert json.loads(text) == bridge.config
    assert {key: bridge.config[key] for key in LLAMA} == LLAMA


def test_a_config_keeps_its_own_architecture() -> None:
    own = LLAMA | {"architectures": ["Mine"]}
    assert shardway.AutoBridge.from_hf_config(own).config == own
    assert shardway.AutoBridge.from_hf_config({"model_type": "mine"}).config["architectures"] is None


def test_names_are_looked_up_in_the_local_cache(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("huggingface_hub")
    import huggingface_hub

    asked = []

    def download(name: str, *, local_files_only: bool) -> str:
        asked.append((name, local_files_only))
        return str(hf)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert shardway.AutoBridge.from_hf_pretrained("org/name").files.keys() == {path.name for path in hf.iterdir()}
    assert asked == [("org/name", True)]


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda root: root / "absent/deeper/than/a/name", Code.NOT_A_CHECKPOINT),
        (lambda root: "no-such-organisation/no-such-model", Code.NOT_A_CHECKPOINT),
        (lambda root: root, Code.CONFIG_MISSING),
    ],
)
def test_what_is_no_model_is_refused(make: Callable[[Path], str | Path], code: Code, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(ShardwayError) as refused:
        shardway.AutoBridge.from_hf_pretrained(make(tmp_path))
    assert refused.value.code is code


@pytest.mark.parametrize(
    "wrong",
    [
        {"distributed_timeout_minutes": 0},
        {"if_exists": "merge"},
        {"config_fields": {"writers_per_rank": 0}},
        {"config_fields": {"grace_seconds": -1}},
        {"config_fields": {"ckpt_format": "zarr"}},
        {"iteration": -1},
        {"iteration": True},
        {"iteration": "5"},
    ],
    ids=str,
)
def test_options_are_checked(wrong: dict[str, Any], hf: Path, tmp_path: Path) -> None:
    require("torch")
    import torch

    from shardway.live.save import CheckpointConfig

    bridge = shardway.AutoBridge.from_hf_pretrained(hf)

    def save() -> None:
        options = {"config": CheckpointConfig(**wrong["config_fields"])} if "config_fields" in wrong else wrong
        bridge.save_megatron_model(torch.nn.Linear(1, 1), tmp_path / "out", **options)

    with pytest.raises(ShardwayError) as refused:
        save()
    assert refused.value.code is Code.OPTION_INVALID
    assert not (tmp_path / "out").exists()


def test_values_for_keys_of_the_config(saved: list[dict[str, Any]], hf: Path, tmp_path: Path) -> None:
    """As transformers takes them; its other arguments mean nothing here."""
    changed = shardway.AutoBridge.from_hf_pretrained(hf, trust_remote_code=True, rms_norm_eps=0.5, torch_dtype="auto")
    plain = shardway.AutoBridge.from_hf_pretrained(hf)
    assert changed.config == {**plain.config, "rms_norm_eps": 0.5}
    model: Any = object()
    changed.save_megatron_model(model, tmp_path)
    contents = saved[0]["companions"].files["config.json"]
    assert json.loads(contents) == changed.config


def test_files_are_converted_without_torch(tmp_path: Path) -> None:
    tiny = Tiny()
    bridge = shardway.AutoBridge.from_hf_pretrained(tiny.write(tmp_path / "hf"))
    imported = bridge.import_ckpt(tmp_path / "megatron", fsync=False, layout="per-layer")
    assert imported.layout == "per-layer"
    exported = bridge.export_ckpt(tmp_path / "megatron", tmp_path / "out", fsync=False)
    assert exported.num_tensors == imported.num_tensors
    assert same(bits(read_safetensors(tmp_path / "out").items()), tiny.weights())
    alone = shardway.AutoBridge.from_hf_config(tiny.config)
    with pytest.raises(ShardwayError) as refused:
        alone.import_ckpt(tmp_path / "nowhere")
    assert refused.value.code is Code.NOT_A_CHECKPOINT
    assert "from a config alone" in str(refused.value)
