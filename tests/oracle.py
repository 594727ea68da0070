"""A second, slow implementation of what shardway does, with torch tensors and torch.distributed.checkpoint.

It covers Llama, Mistral, Qwen2 and Qwen3, shares no code with shardway, and exists to be compared with.
"""

from __future__ import annotations

import io
import json
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file in a directory; a name that two files hold is an error."""
    import safetensors.torch

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        here = safetensors.torch.load_file(file)
        if twice := tensors.keys() & here.keys():
            raise ValueError(f"{file}: held by an earlier file too: {sorted(twice)}")
        tensors |= here
    return tensors


def megatron_tensors(path: Path, *, per_layer: bool = False) -> dict[str, torch.Tensor]:
    """The global tensors of the torch_dist checkpoint of a Hugging Face model, by their keys on disk."""
    import torch

    config = json.loads((path / "config.json").read_text())
    hf = read_safetensors(path)
    layers = [_layer(hf, f"model.layers.{i}", config) for i in range(config["num_hidden_layers"])]
    tensors = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    if not config["tie_word_embeddings"]:
        tensors["output_layer.weight"] = hf["lm_head.weight"]
    if per_layer:
        return tensors | {
            f"decoder.layers.{i}.{name}": tensor for i, layer in enumerate(layers) for name, tensor in layer.items()
        }
    return tensors | {f"decoder.layers.{name}": torch.stack([layer[name] for layer in layers]) for name in layers[0]}


def _layer(hf: Mapping[str, torch.Tensor], prefix: str, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    import torch

    num_groups = config["num_key_value_heads"]

    def qkv(kind: str) -> torch.Tensor:
        parts = [hf[f"{prefix}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
        groups = [part.reshape(num_groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def gate_up(kind: str) -> torch.Tensor:
        return torch.cat([hf[f"{prefix}.mlp.{name}_proj.{kind}"] for name in ("gate", "up")])

    tensors = {
        "self_attention.linear_qkv.weight": qkv("weight"),
        "self_attention.linear_qkv.layer_norm_weight": hf[f"{prefix}.input_layernorm.weight"],
        "self_attention.linear_proj.weight": hf[f"{prefix}.self_attn.o_proj.weight"],
        "mlp.linear_fc1.weight": gate_up("weight"),
        "mlp.linear_fc1.layer_norm_weight": hf[f"{prefix}.post_attention_layernorm.weight"],
        "mlp.linear_fc2.weight": hf[f"{prefix}.mlp.down_proj.weight"],
    }
    if f"{prefix}.self_attn.q_proj.bias" in hf:
        tensors["self_attention.linear_qkv.bias"] = qkv("bias")
    if f"{prefix}.self_attn.o_proj.bias" in hf:
        tensors["self_attention.linear_proj.bias"] = hf[f"{prefix}.self_attn.o_proj.bias"]
    if f"{prefix}.mlp.gate_proj.bias" in hf:
        tensors["mlp.linear_fc1.bias"] = gate_up("bias")
        tensors["mlp.linear_fc2.bias"] = hf[f"{prefix}.mlp.down_proj.bias"]
    if f"{prefix}.self_attn.q_norm.weight" in hf:
        tensors["self_attention.q_layernorm.weight"] = hf[f"{prefix}.self_attn.q_norm.weight"]
        tensors["self_attention.k_layernorm.weight"] = hf[f"{prefix}.self_attn.k_norm.weight"]
    return tensors


def write_torch_dist(path: Path, tensors: Mapping[str, torch.Tensor], *, num_layers: int, per_layer: bool) -> Path:
    """Write a torch_dist directory of the old form (common.pt), as megatron-core up to 0.18 does, on one process."""
    import torch
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    modules = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    extra = ["decoder.final_layernorm._extra_state/shard_0_1"]
    for layer in range(num_layers):
        where, shard = (f".{layer}", "0_1") if per_layer else ("", f"{layer}_{num_layers}")
        extra += [f"decoder.layers{where}.{module}._extra_state/shard_{shard}" for module in modules]
    content: dict[str, Any] = {**tensors, **{key: [None] for key in extra}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(
            content,
            storage_writer=FileSystemWriter(path),
            planner=DefaultSavePlanner(flatten_state_dict=False),
            no_dist=True,
        )
    torch.save({"checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}}, path / "common.pt")
    versions = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (path / "metadata.json").write_text(json.dumps(versions | {"common_backend": "torch", "common_backend_version": 1}))
    return path


def read_torch_dist(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Every tensor, and every object, of a directory with .metadata, as torch.distributed.checkpoint reads it."""
    import torch
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(path)
    entries = reader.read_metadata().state_dict_metadata
    content: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else io.BytesIO()
        for key, entry in entries.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(
            content,
            storage_reader=reader,
            planner=DefaultLoadPlanner(flatten_state_dict=False),
            no_dist=True,
        )
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    objects = {key: value for key, value in content.items() if key not in tensors}
    return tensors, objects


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have one shape, one dtype and the same bytes (so that NaNs and signed zeros count)."""
    import torch

    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
