"""Planning models of the largest sizes from their headers alone: time and memory of whole processes.

The files are sparse: headers of the real names and sizes, and holes for weights. `shardway plan` reads the headers,
matches every tensor with the rules, proves that the rules cover both sides, and lays out every file of an import.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure import program, run

from shardway.core.dtypes import BFLOAT16, FLOAT32, dtype_of_torch
from shardway.families.config import HFConfig
from shardway.families.mapping import map_model
from shardway.formats.safetensors_layout import lay_out
from shardway.formats.sharding import index_json, shard_tensors

if TYPE_CHECKING:
    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape

# config.json of deepseek-ai/DeepSeek-V3 and moonshotai/Kimi-K2-Instruct, as far as it decides about tensors.
_DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MODELS = {
    "DeepSeek-V3": _DEEPSEEK_V3,
    "DeepSeek-V3, FP8 as released": _DEEPSEEK_V3 | {"quantization_config": _FP8},
    "Kimi-K2": _DEEPSEEK_V3
    | {
        "first_k_dense_replace": 1,
        "max_position_embeddings": 131072,
        "n_group": 1,
        "n_routed_experts": 384,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0,
        "rope_theta": 50000,
        "routed_scaling_factor": 2.827,
        "topk_group": 1,
        "vocab_size": 163840,
    },
}


def make(path: Path, config: dict[str, object]) -> tuple[int, int]:
    """Write a directory whose safetensors files have real headers and no weights; tensors and bytes of it."""
    mapping = map_model(HFConfig(config))
    tensors = [(name, BFLOAT16, shape) for name, shape in mapping.with_copies(mapping.aliases).hf.items()]
    if "quantization_config" in config:
        tensors = [stored for tensor in tensors for stored in _quantised(*tensor)]
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    shards = shard_tensors(tensors, 8 * 10**9)
    (path / "model.safetensors.index.json").write_bytes(index_json(shards))
    num_bytes = 0
    for shard in shards:
        layout = lay_out(shard.tensors, {"format": "pt"})
        with (path / shard.file).open("wb") as file:
            file.write(layout.header)
            file.truncate(layout.num_bytes)
        num_bytes += layout.num_bytes
    return len(tensors), num_bytes


def _quantised(name: str, dtype: DType, shape: Shape) -> list[tuple[str, DType, Shape]]:
    """What a release in FP8 blocks stores of a tensor: projections are quantised, all else is as it is."""
    if not name.endswith(("_proj.weight", "_with_mqa.weight")) or name.endswith("eh_proj.weight"):
        return [(name, dtype, shape)]
    grid = tuple(-(-extent // 128) for extent in shape)
    return [(name, dtype_of_torch("float8_e4m3fn"), shape), (f"{name}_scale_inv", FLOAT32, grid)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=Path("bench-work"))
    arguments = parser.parse_args()
    for name, config in MODELS.items():
        path = arguments.dir / name
        try:
            num_tensors, num_bytes = make(path, config)
            samples = [run([program("shardway"), "plan", str(path), "--json"]) for _ in range(arguments.rounds)]
        finally:
            shutil.rmtree(path, ignore_errors=True)
        seconds, peak = (
            statistics.median(values) for values in zip(*((s.seconds, s.peak_bytes) for s in samples), strict=True)
        )
        cpu = statistics.median(sample.cpu_seconds for sample in samples)
        print(
            f"{name:<28} {num_tensors:>7,} tensors, {num_bytes / 1e12:.2f} TB: "
            f"{seconds:.2f} s ({cpu:.2f} s of a processor), {peak / 2**20:,.0f} MiB at most"
        )


if __name__ == "__main__":
    main()
