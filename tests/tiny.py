"""Tiny Hugging Face checkpoints with random bits for weights, made with numpy alone, and what Megatron makes of them.

Unlike `tests.models` it needs no torch, takes any dimensions, and makes a checkpoint in a millisecond.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from shardway.core.boxes import Box
    from shardway.core.tensors import Shape

Array = npt.NDArray[Any]

TAGS = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
}
RAW = {"BF16": "<u2", "F16": "<u2", "F32": "<u4", "F64": "<u8", "F8_E4M3": "u1", "I8": "u1"}
RAW |= {"U8": "u1", "F8_E8M0": "u1", "I32": "<u4", "I64": "<u8"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tiny:
    """A dense model's dimensions."""

    architecture: str = "LlamaForCausalLM"
    layers: int = 2
    hidden: int = 8
    heads: int = 4
    groups: int = 2
    head_dim: int = 4
    ffn: int = 6
    vocab: int = 11
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "bfloat16"

    @property
    def config(self) -> dict[str, object]:
        """Its config.json."""
        values: dict[str, object] = {
            "architectures": [self.architecture],
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "torch_dtype": self.dtype,
        }
        if self.architecture in {"LlamaForCausalLM", "Qwen3ForCausalLM"}:
            values["attention_bias"] = self.attention_bias
        if self.architecture == "LlamaForCausalLM":
            values["mlp_bias"] = self.mlp_bias
        return values

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, as transformers lists them."""
        h, f, v, q, kv = self.hidden, self.ffn, self.vocab, self.heads * self.head_dim, self.groups * self.head_dim
        has_bias = {
            "LlamaForCausalLM": (self.attention_bias, self.attention_bias),
            "MistralForCausalLM": (False, False),
            "Qwen2ForCausalLM": (True, False),
            "Qwen3ForCausalLM": (self.attention_bias, self.attention_bias),
        }
        qkv_bias, out_bias = has_bias[self.architecture]
        mlp_bias = self.mlp_bias and self.architecture == "LlamaForCausalLM"
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}
        for i in range(self.layers):
            at = f"model.layers.{i}"
            shapes[f"{at}.input_layernorm.weight"] = (h,)
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, h)
                if qkv_bias:
                    shapes[f"{at}.self_attn.{name}_proj.bias"] = (rows,)
            shapes[f"{at}.self_attn.o_proj.weight"] = (h, q)
            if out_bias:
                shapes[f"{at}.self_attn.o_proj.bias"] = (h,)
            if self.architecture == "Qwen3ForCausalLM":
                shapes[f"{at}.self_attn.q_norm.weight"] = shapes[f"{at}.self_attn.k_norm.weight"] = (self.head_dim,)
            shapes[f"{at}.post_attention_layernorm.weight"] = (h,)
            for name, shape in (("gate", (f, h)), ("up", (f, h)), ("down", (h, f))):
                shapes[f"{at}.mlp.{name}_proj.weight"] = shape
                if mlp_bias:
                    shapes[f"{at}.mlp.{name}_proj.bias"] = shape[:1]
        shapes["model.norm.weight"] = (h,)
        if not self.tied:
            shapes["lm_head.weight"] = (v, h)
        return shapes

    def weights(self, seed: int = 0) -> dict[str, Array]:
        """Random bits for every tensor: all NaNs, infinities and subnormal numbers are as likely as anything else."""
        rng = np.random.default_rng(seed)
        kind = np.dtype(RAW[TAGS[self.dtype]])
        return {
            name: rng.integers(0, 2 ** (8 * kind.itemsize), size=shape, dtype=kind)
            for name, shape in self.shapes.items()
        }

    def write(self, path: Path, *, seed: int = 0, num_files: int = 1) -> Path:
        """Write the model with random weights."""
        return write_model(path, self.config, self.weights(seed), TAGS[self.dtype], num_files=num_files)

    def megatron(self, weights: Mapping[str, Array], *, per_layer: bool = False) -> dict[str, Array]:
        """The Megatron tensors that the weights become, written down without a thought for how shardway does it."""
        g = self.groups
        layers: list[dict[str, Array]] = []
        for i in range(self.layers):
            layer: dict[str, Array] = {}
            for kind in ("weight", "bias"):
                if f"model.layers.{i}.self_attn.q_proj.{kind}" in weights:
                    q, k, v = (weights[f"model.layers.{i}.self_attn.{x}_proj.{kind}"] for x in "qkv")
                    rows = [np.split(part, g) for part in (q, k, v)]
                    layer[f"self_attention.linear_qkv.{kind}"] = np.concatenate(
                        [part for group in zip(*rows, strict=True) for part in group]
                    )
                if f"model.layers.{i}.mlp.gate_proj.{kind}" in weights:
                    layer[f"mlp.linear_fc1.{kind}"] = np.concatenate(
                        [weights[f"model.layers.{i}.mlp.{x}_proj.{kind}"] for x in ("gate", "up")]
                    )
            for theirs, ours in _RENAMED.items():
                if f"model.layers.{i}.{theirs}" in weights:
                    layer[ours] = weights[f"model.layers.{i}.{theirs}"]
            layers.append(layer)
        tensors = {
            "embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
            "decoder.final_layernorm.weight": weights["model.norm.weight"],
        }
        if not self.tied:
            tensors["output_layer.weight"] = weights["lm_head.weight"]
        if per_layer:
            return tensors | {
                f"decoder.layers.{i}.{name}": a for i, layer in enumerate(layers) for name, a in layer.items()
            }
        return tensors | {f"decoder.layers.{name}": np.stack([layer[name] for layer in layers]) for name in layers[0]}


_RENAMED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "self_attn.o_proj.bias": "self_attention.linear_proj.bias",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "post_attention_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
    "mlp.down_proj.bias": "mlp.linear_fc2.bias",
}


def write_model(
    path: Path, config: Mapping[str, object], weights: Mapping[str, Array], tag: str = "BF16", *, num_files: int = 1
) -> Path:
    """Write a checkpoint directory: config.json, a tokenizer, and one or several safetensors files with an index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    entries = {name: (tag, array) for name, array in weights.items()}
    if num_files == 1:
        write_safetensors(path / "model.safetensors", entries)
        return path
    names = list(entries)
    weight_map: dict[str, str] = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        mine = names[number::num_files]
        write_safetensors(path / file, {name: entries[name] for name in mine})
        weight_map |= dict.fromkeys(mine, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, Array]]) -> None:
    """Write a safetensors file; the header's padding puts the data at an odd multiple of 8."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (tag, array) in tensors.items():
        header[name] = {"dtype": tag, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def read_safetensors(path: Path) -> dict[str, tuple[str, Array]]:
    """Tag and bits of every tensor of every safetensors file in a directory."""
    found: dict[str, tuple[str, Array]] = {}
    for file in sorted(path.glob("*.safetensors")):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                bits = np.frombuffer(data[8 + length + begin : 8 + length + end], RAW[entry["dtype"]])
                assert name not in found
                found[name] = entry["dtype"], bits.reshape(entry["shape"])
    return found


def read_distcp(root: Path) -> dict[str, Array]:
    """The bits of every tensor of a torch_dist checkpoint, put together from its chunks."""
    from shardway.formats.torch_dist import open_torch_dist

    checkpoint = open_torch_dist(root)
    tensors: dict[str, Array] = {}
    for name, tensor in checkpoint.catalog.tensors.items():
        kind = np.dtype(f"u{tensor.dtype.itemsize}")
        array = np.zeros(tensor.shape, kind)
        times = np.zeros(tensor.shape, np.uint8)
        for chunk in tensor.chunks:
            where = tuple(slice(start, start + size) for start, size in zip(chunk.start, chunk.size, strict=True))
            count = int(np.prod(chunk.size))
            array[where] = np.fromfile(checkpoint.root / chunk.file, kind, count, offset=chunk.offset).reshape(
                chunk.size
            )
            times[where] += 1
        assert (times == 1).all(), name
        tensors[name] = array
    return tensors


def same(left: Mapping[str, Array], right: Mapping[str, Array]) -> bool:
    """Whether two sets of tensors have the same names, shapes and bits."""
    return left.keys() == right.keys() and all(
        left[name].shape == right[name].shape and np.array_equal(left[name], right[name]) for name in left
    )


def listing(*roots: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and directory below the roots, with the files' contents: what must not change."""
    found: dict[str, tuple[int, bytes]] = {}
    for root in roots:
        for path in sorted(root.rglob("*")):
            status = path.lstat()
            found[str(path)] = status.st_mode, path.read_bytes() if path.is_file() else b""
    return found


def bits(tensors: Iterable[tuple[str, tuple[str, Array]]]) -> dict[str, Array]:
    """The bits alone of what `read_safetensors` returns."""
    return {name: array for name, (_, array) in tensors}


def write_chunks(folder: Path, shapes: dict[str, Shape], chunked: dict[str, list[tuple[Box, Array]]]) -> None:
    """Write a torch_dist folder with torch: each chunk by torch.save, the metadata with torch's own classes."""
    import io
    import pickle

    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    folder.mkdir()
    entries: dict[str, Any] = {}
    places = {}
    with (folder / "__0_0.distcp").open("wb") as file:
        for name, chunks in chunked.items():
            found = []
            for box, array in chunks:
                blob = io.BytesIO()
                torch.save(torch.from_numpy(array.copy()).view(torch.bfloat16), blob)
                places[MetadataIndex(name, torch.Size(box.start))] = _StorageInfo(
                    "__0_0.distcp", file.tell(), blob.tell()
                )
                file.write(blob.getvalue())
                found.append(ChunkStorageMetadata(torch.Size(box.start), torch.Size(box.size)))
            properties = TensorProperties(dtype=torch.bfloat16)
            entries[name] = TensorStorageMetadata(properties, torch.Size(shapes[name]), found)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(entries, storage_data=places)))
    torch.save({"checkpoint_version": 3.0, "iteration": 1}, folder / "common.pt")
    versions = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(
        json.dumps(versions | {"common_backend": "torch", "common_backend_version": 1})
    )


ARCHITECTURES: Sequence[str] = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
