"""Tiny quantised checkpoints with random codes, and what torch makes of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from tests.tiny import read_safetensors, write_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch
    from tests.tiny import Array

Entries = dict[str, tuple[str, Any]]

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def fp8_codes(rng: np.random.Generator, shape: tuple[int, ...], *, nans: bool = False) -> Array:
    """Random codes of float8_e4m3fn; all of them, but NaN only where asked for."""
    codes = rng.integers(0, 256, shape, np.uint8)
    return codes if nans else np.where(codes & 127 == 127, np.uint8(0x38), codes)


def scales(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Random scales as bits of float32, of the sizes that models have."""
    return np.exp(rng.uniform(-9, -3, shape)).astype(np.float32).view(np.uint32)


def grid(shape: tuple[int, ...], group: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-extent // size) for extent, size in zip(shape, group, strict=True))


def rewrite(path: Path, settings: Mapping[str, object] | None, change: Callable[[str, Array], Entries | None]) -> Path:
    """Quantise some weights of a model: `change` gives what is stored for one, or None to leave it as it is."""
    entries: Entries = {}
    for name, (tag, array) in read_safetensors(path).items():
        entries |= change(name, array) or {name: (tag, array)}
    for file in path.glob("*.safetensors*"):
        file.unlink()
    write_safetensors(path / "model.safetensors", entries)
    config = json.loads((path / "config.json").read_text())
    if settings is not None:
        config["quantization_config"] = dict(settings)
    (path / "config.json").write_text(json.dumps(config))
    return path


def is_linear(name: str) -> bool:
    """Whether a weight is one that published models quantise."""
    return name.endswith("_proj.weight") or ".experts." in name


def fp8_block(path: Path, block: tuple[int, int] = (128, 128), seed: int = 0) -> Path:
    """Turn a model into one of FP8 blocks, with random codes and scales."""
    rng = np.random.default_rng(seed)

    def change(name: str, array: Array) -> Entries | None:
        if not is_linear(name):
            return None
        group = (*(1,) * (array.ndim - 2), *block)
        return {
            name: ("F8_E4M3", fp8_codes(rng, array.shape)),
            f"{name}_scale_inv": ("F32", scales(rng, grid(array.shape, group))),
        }

    return rewrite(path, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}, change)


def fp8_whole(path: Path, strategy: str, method: str, seed: int = 0) -> Path:
    """Turn a model into one of FP8 with a scale for each tensor or channel, as three programs write them."""
    rng = np.random.default_rng(seed)
    settings: dict[str, object] = {"quant_method": method}
    if method == "compressed-tensors":
        weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "group_size": None}
        settings |= {"format": "float-quantized", "config_groups": {"group_0": {"weights": weights}}}
    elif method == "modelopt":
        settings |= {"quant_algo": "FP8"}
    else:
        settings |= {"weight_block_size": None, "activation_scheme": "static"}

    def change(name: str, array: Array) -> Entries | None:
        if not is_linear(name):
            return None
        scale_name = f"{name}_scale_inv" if method == "fp8" else f"{name}_scale"
        shape = (*array.shape[:-1], 1) if strategy == "channel" else array.shape[:-2]
        entries = {name: ("F8_E4M3", fp8_codes(rng, array.shape)), scale_name: ("F32", scales(rng, shape))}
        if method != "compressed-tensors" and name.endswith(".weight"):
            entries[f"{name.removesuffix('weight')}input_scale"] = ("F32", scales(rng, ()))
        return entries

    return rewrite(path, settings, change)


def int4_group(path: Path, size: int = 32, seed: int = 0) -> Path:
    """Turn the experts of a model into packed integers of four bits, as Kimi-K2-Thinking has them."""
    rng = np.random.default_rng(seed)
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True, "group_size": size}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
    }

    def change(name: str, array: Array) -> Entries | None:
        if ".experts." not in name:
            return None
        rows, columns = array.shape
        scale = rng.normal(0, 0.01, (rows, -(-columns // size))).astype(np.float32).view(np.uint32) >> 16
        return {
            f"{name}_packed": ("I32", rng.integers(0, 2**32, (rows, columns // 8), np.uint32)),
            f"{name}_scale": ("BF16", scale.astype(np.uint16)),
            f"{name}_shape": ("I64", np.array([rows, columns], np.uint64)),
        }

    return rewrite(path, settings, change)


def mxfp4(path: Path, seed: int = 0) -> Path:
    """Turn the experts of a gpt-oss model into MXFP4, as the released ones have them."""
    rng = np.random.default_rng(seed)

    def change(name: str, array: Array) -> Entries | None:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return None
        experts, inner, out = array.shape
        return {
            f"{name}_blocks": ("U8", rng.integers(0, 256, (experts, out, inner // 32, 16), np.uint8)),
            f"{name}_scales": ("U8", rng.integers(115, 125, (experts, out, inner // 32), np.uint8)),
        }

    return rewrite(path, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, change)


def dequantised(path: Path, block: tuple[int, int] = (128, 128), size: int = 32) -> dict[str, tuple[str, Array]]:
    """What torch makes of a quantised model: tag and bits of every plain tensor."""
    import torch

    found = read_safetensors(path)
    plain: Entries = {}
    for name, (tag, array) in found.items():
        if tag == "F8_E4M3":
            inverse = f"{name}_scale_inv"
            scale = found[inverse if inverse in found else f"{name}_scale"][1]
            group = (*(1,) * (array.ndim - 2), *block)
            if scale.shape != grid(array.shape, group):
                scale = scale.reshape(scale.shape + (1,) * (array.ndim - scale.ndim))
                group = grid(array.shape, scale.shape)
            plain[name] = "BF16", bf16_bits(torch_values(array, scale, group))
        elif name.endswith("_packed"):
            base = name.removesuffix("_packed")
            bits = torch.from_numpy(found[f"{base}_scale"][1].astype(np.int16)).view(torch.bfloat16)
            plain[base] = "BF16", bf16_bits(torch_int4(array, bits, size))
        elif name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            values = torch_fp4(array, found[f"{base}_scales"][1])
            plain[base] = "BF16", bf16_bits(values.transpose(1, 2))
        elif not name.endswith(("_scale", "_scale_inv", "_scales", "_shape")):
            plain[name] = tag, array
    return plain


def torch_values(codes: Array, scale: Array, group: tuple[int, ...]) -> torch.Tensor:
    """FP8 codes times scales (bits of float32), by torch, in float32."""
    import torch

    wide = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).float()
    spread = torch.from_numpy(scale.view(np.float32).copy())
    for axis, size in enumerate(group):
        spread = spread.repeat_interleave(size, dim=axis).narrow(axis, 0, codes.shape[axis])
    return wide * spread


def torch_fp4(blocks: Array, exponents: Array) -> torch.Tensor:
    """MXFP4 [experts, out, groups, 16] by torch, [experts, out, in] in float32, as the facts have it."""
    import torch

    low, high = torch.from_numpy(blocks & 15).long(), torch.from_numpy(blocks >> 4).long()
    table = torch.tensor(FP4)
    values = torch.stack([table[low], table[high]], dim=-1).flatten(-2)
    powers = torch.pow(2.0, torch.from_numpy(exponents.astype(np.float32)) - 127)
    return (values * powers[..., None]).flatten(-2)


def torch_int4(words: Array, scale: torch.Tensor, size: int) -> torch.Tensor:
    """Packed integers [out, words] by torch: eight in each word, the lowest bits first, 8 more than the value."""
    import torch

    found = torch.stack([(torch.from_numpy(words.astype(np.int64)) >> (4 * k)) & 15 for k in range(8)], dim=-1)
    values = (found.flatten(-2) - 8).to(scale.dtype)
    return values * scale.repeat_interleave(size, dim=1)[:, : values.shape[1]]


def bf16_bits(values: torch.Tensor) -> Array:
    """The bits of values rounded to bfloat16; all NaNs are one."""
    import torch

    return one_nan(values.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16))


def one_nan(bits: Array) -> Array:
    """Bits of bfloat16 with one NaN for all."""
    return np.where((bits & 0x7FFF) > 0x7F80, np.uint16(0x7FC0), bits)
