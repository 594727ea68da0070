"""Tiny Hugging Face models with random weights, made by the real transformers classes."""

from __future__ import annotations

import dataclasses
import json
import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

ONE_FILE = "5GB"
SEVERAL_FILES = "40KB"

_SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
_SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
}
# Megatron-Core fixes the low and high frequency factors and the original length at these values.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """One tiny model: the names of transformers' model and config classes, and what differs from the common config."""

    name: str
    model: str
    config: str
    overrides: Mapping[str, Any]
    dtype: str = "bfloat16"
    max_shard_size: str = ONE_FILE
    as_released: bool = False
    """Spell the config as transformers 4 did and most published models do."""

    @property
    def num_layers(self) -> int:
        return int(self.overrides["num_hidden_layers"])

    @property
    def vocab_size(self) -> int:
        return int(self.overrides.get("vocab_size", _SMALL["vocab_size"]))


def _spec(
    name: str,
    family: str,
    *,
    dtype: str = "bfloat16",
    max_shard_size: str = ONE_FILE,
    as_released: bool = False,
    **overrides: object,
) -> ModelSpec:
    return ModelSpec(
        name=name,
        model=f"{family}ForCausalLM",
        config=f"{family}Config",
        overrides=overrides,
        dtype=dtype,
        max_shard_size=max_shard_size,
        as_released=as_released,
    )


MODELS: tuple[ModelSpec, ...] = (
    _spec("llama", "Llama", num_hidden_layers=3),
    _spec("llama_tied", "Llama", num_hidden_layers=1, tie_word_embeddings=True),
    _spec("llama_biases", "Llama", num_hidden_layers=2, attention_bias=True, mlp_bias=True),
    _spec(
        "llama3_rope",
        "Llama",
        as_released=True,
        num_hidden_layers=2,
        num_key_value_heads=4,
        rope_parameters=_LLAMA3_ROPE,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
    ),
    _spec("llama_odd_vocab", "Llama", num_hidden_layers=2, vocab_size=259, max_shard_size=SEVERAL_FILES),
    # Twelve layers: the names of layers 10 and 11 sort before that of layer 2.
    _spec("llama_deep", "Llama", num_hidden_layers=12, hidden_size=32, head_dim=8, max_shard_size=SEVERAL_FILES),
    _spec("llama_fp32", "Llama", dtype="float32", num_hidden_layers=1),
    _spec(
        "mistral",
        "Mistral",
        dtype="float16",
        num_hidden_layers=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=None,
    ),
    # A window shorter than the sequences of `tokens_for`.
    _spec("mistral_window", "Mistral", num_hidden_layers=1, sliding_window=50),
    _spec(
        "llama_linear_rope",
        "Llama",
        num_hidden_layers=1,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    ),
    _spec(
        "qwen2_yarn",
        "Qwen2",
        num_hidden_layers=1,
        use_sliding_window=False,
        max_position_embeddings=131_072,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 32_768,
        },
    ),
    _spec("qwen2", "Qwen2", num_hidden_layers=2, use_sliding_window=False),
    _spec(
        "qwen2_tied",
        "Qwen2",
        max_shard_size=SEVERAL_FILES,
        as_released=True,
        num_hidden_layers=4,
        use_sliding_window=False,
        tie_word_embeddings=True,
    ),
    _spec(
        "qwen3", "Qwen3", num_hidden_layers=3, head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
    _spec("qwen3_tied", "Qwen3", num_hidden_layers=2, head_dim=8, tie_word_embeddings=True),
)
BY_NAME: Mapping[str, ModelSpec] = {spec.name: spec for spec in MODELS}


def make_model(
    spec: ModelSpec,
    path: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: str | None = None,
) -> Path:
    """Write a model of random weights, its generation config and a tokenizer to ``path``; the same bytes each time.

    Every parameter is random, norms and biases too, and large enough to show in the logits when it is out of place.

    Args:
        spec: which model.
        path: a directory, made if it is absent.
        dtype: of the weights on disk; the spec's own by default.
        max_shard_size: of one safetensors file; the spec's own by default.

    Returns:
        ``path``.
    """
    import torch
    import transformers

    config = getattr(transformers, spec.config)(**{**_SMALL, **_SPECIAL_TOKENS, **spec.overrides})
    model = getattr(transformers, spec.model)(config)
    randomise(model, seed=zlib.crc32(spec.name.encode()))
    model.to(getattr(torch, spec.dtype) if dtype is None else dtype)
    model.generation_config.update(do_sample=True, temperature=0.625, top_p=0.875)
    model.save_pretrained(path, max_shard_size=max_shard_size or spec.max_shard_size)
    if spec.as_released:
        _spell_config_as_released(path / "config.json")
    _write_tokenizer(spec.vocab_size, path)
    return path


def randomise(model: torch.nn.Module, *, seed: int) -> None:
    """Fill every tensor that is saved from a seeded generator.

    Matrices keep the scale of their input, norms lie in [0.5, 1.5], buffers are small.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif parameter.dim() == 1:
                parameter.normal_(0.0, 0.5, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
        saved = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in saved:
                buffer.normal_(0.0, 0.1, generator=generator)


def tokens_for(spec: ModelSpec) -> list[list[int]]:
    """Two sequences that between them hold every token of the vocabulary at least once, in a seeded random order."""
    import torch

    length = 136
    order = torch.randperm(spec.vocab_size, generator=torch.Generator().manual_seed(7))
    repeated = order.repeat(-(-2 * length // spec.vocab_size))[: 2 * length]
    return [[int(token) for token in row] for row in repeated.view(2, length)]


def load_transformers(path: Path, *, dtype: torch.dtype | None = None) -> Any:
    """The model that transformers loads from ``path``, ready to compute in ``dtype`` (float32 by default)."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32 if dtype is None else dtype, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


def logits_of(path: Path, tokens: list[list[int]], *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Logits [sequences, length, vocabulary] of the model that transformers loads from ``path``, computed in ``dtype``.

    Args:
        path: a Hugging Face model directory.
        tokens: sequences of one length.
        dtype: float32 by default.
    """
    import torch

    model = load_transformers(path, dtype=dtype)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # oneDNN chooses its kernels anew in each call, and they round differently.
        with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
            logits = model(torch.tensor(tokens), use_cache=False).logits
    finally:
        torch.set_num_threads(num_threads)
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"{path}: the model returned {type(logits).__name__}, not logits")
    return logits


def _spell_config_as_released(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_tokenizer(vocab_size: int, path: Path) -> None:
    import transformers

    words = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{i}" for i in range(4, vocab_size))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    ).save_pretrained(path)
