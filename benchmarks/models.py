"""Makes the models that the benchmarks convert: random weights in the shapes of real ones.

Run as a program, so that the benchmark itself stays small (a child's peak memory includes its parent's until it execs).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardway.core.dtypes import BFLOAT16
from shardway.formats.safetensors_layout import lay_out
from shardway.formats.sharding import index_json, shard_tensors

if TYPE_CHECKING:
    from shardway.core.tensors import Shape

BLOCK_BYTES = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama:
    """The sizes of a model with tied or untied embeddings.

    Attributes:
        max_shard_bytes: Most tensor bytes in one file.
    """

    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    tied: bool
    max_shard_bytes: int

    def shapes(self) -> list[tuple[str, Shape]]:
        """Name and shape of every tensor, in a checkpoint's usual order."""
        q, kv, h = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden
        found: list[tuple[str, Shape]] = [("model.embed_tokens.weight", (self.vocabulary, h))]
        for i in range(self.num_layers):
            layer = f"model.layers.{i}"
            found += [
                (f"{layer}.input_layernorm.weight", (h,)),
                (f"{layer}.mlp.down_proj.weight", (h, self.ffn)),
                (f"{layer}.mlp.gate_proj.weight", (self.ffn, h)),
                (f"{layer}.mlp.up_proj.weight", (self.ffn, h)),
                (f"{layer}.post_attention_layernorm.weight", (h,)),
                (f"{layer}.self_attn.k_proj.weight", (kv, h)),
                (f"{layer}.self_attn.o_proj.weight", (h, q)),
                (f"{layer}.self_attn.q_proj.weight", (q, h)),
                (f"{layer}.self_attn.v_proj.weight", (kv, h)),
            ]
        found.append(("model.norm.weight", (h,)))
        return found if self.tied else [*found, ("lm_head.weight", (self.vocabulary, h))]

    def config(self) -> dict[str, object]:
        """The model's config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "dtype": "bfloat16",
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": self.tied,
            "vocab_size": self.vocabulary,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3Moe(Llama):
    """The sizes of a mixture of experts of Qwen3's kind; `ffn` is that of one expert, each in tensors of its own.

    Attributes:
        experts: How many a layer has.
    """

    experts: int

    def shapes(self) -> list[tuple[str, Shape]]:
        """Name and shape of every tensor, in a checkpoint's usual order."""
        found: list[tuple[str, Shape]] = []
        for name, shape in Llama.shapes(self):
            layer, is_down, _ = name.partition(".mlp.down_proj")
            if is_down:
                for e in range(self.experts):
                    expert = f"{layer}.mlp.experts.{e}"
                    found += [
                        (f"{expert}.down_proj.weight", (self.hidden, self.ffn)),
                        (f"{expert}.gate_proj.weight", (self.ffn, self.hidden)),
                        (f"{expert}.up_proj.weight", (self.ffn, self.hidden)),
                    ]
                found.append((f"{layer}.mlp.gate.weight", (self.experts, self.hidden)))
            elif ".mlp." not in name:
                found.append((name, shape))
            if name.endswith("self_attn.v_proj.weight"):
                attention = name.removesuffix("v_proj.weight")
                found += [(f"{attention}{norm}.weight", (self.head_dim,)) for norm in ("q_norm", "k_norm")]
        return found

    def config(self) -> dict[str, object]:
        """The model's config.json."""
        return Llama.config(self) | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": self.ffn,
            "norm_topk_prob": True,
            "num_experts": self.experts,
            "num_experts_per_tok": 8,
            "rope_scaling": None,
            "router_aux_loss_coef": 0.001,
        }


MODELS: dict[str, Llama] = {
    # Llama 3.2 1B, in six files.
    "llama": Llama(
        num_layers=16,
        hidden=2048,
        heads=32,
        kv_heads=8,
        head_dim=64,
        ffn=8192,
        vocabulary=128256,
        tied=True,
        max_shard_bytes=430_000_000,
    ),
    # As many tensors as a mixture of experts has, in files of the usual size.
    "deep": Llama(
        num_layers=220,
        hidden=768,
        heads=12,
        kv_heads=4,
        head_dim=64,
        ffn=2176,
        vocabulary=32768,
        tied=False,
        max_shard_bytes=1_000_000_000,
    ),
    "moe": Qwen3Moe(
        num_layers=18,
        hidden=1024,
        heads=16,
        kv_heads=4,
        head_dim=64,
        ffn=384,
        experts=64,
        vocabulary=32768,
        tied=False,
        max_shard_bytes=1_000_000_000,
    ),
    "small": Llama(
        num_layers=8,
        hidden=1024,
        heads=16,
        kv_heads=4,
        head_dim=64,
        ffn=4096,
        vocabulary=32768,
        tied=True,
        max_shard_bytes=100_000_000,
    ),
    # 50,000 tiny tensors, for the memory of a whole conversion.
    "many": Llama(
        num_layers=5555,
        hidden=32,
        heads=2,
        kv_heads=1,
        head_dim=16,
        ffn=64,
        vocabulary=128,
        tied=True,
        max_shard_bytes=20_000_000,
    ),
    # 50,000 tensors, for planning; its weights are never read.
    "wide": Llama(
        num_layers=5555,
        hidden=256,
        heads=4,
        kv_heads=2,
        head_dim=64,
        ffn=512,
        vocabulary=1024,
        tied=False,
        max_shard_bytes=1_000_000_000,
    ),
}


def make(model: Llama, folder: Path, *, weights: bool = True) -> None:
    """Write a model's directory.

    Args:
        model: Its sizes.
        folder: To be created.
        weights: False leaves holes in the place of the weights: headers only.
    """
    import numpy as np

    generator = np.random.Generator(np.random.SFC64(1))
    folder.mkdir(parents=True)
    shards = shard_tensors([(name, BFLOAT16, shape) for name, shape in model.shapes()], model.max_shard_bytes)
    for shard in shards:
        layout = lay_out(shard.tensors, {"format": "pt"})
        with (folder / shard.file).open("wb") as file:
            file.write(layout.header)
            if not weights:
                file.truncate(layout.num_bytes)
                continue
            left = (layout.num_bytes - len(layout.header)) // 2
            while left:
                take = min(left, BLOCK_BYTES // 2)
                bits = generator.integers(0, 2**16, take, np.uint16)
                file.write(((bits & 0x81FF) | 0x3C00).data)  # both signs, 2**-7 to 2**-3
                left -= take
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_bytes(index_json(shards))
    (folder / "config.json").write_text(json.dumps(model.config(), indent=2))


if __name__ == "__main__":
    make(MODELS[sys.argv[1]], Path(sys.argv[2]))
