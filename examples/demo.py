"""From Hugging Face to Megatron-Core and back, with the command line that a user would type.

Makes a random model in the shape of a small Llama, imports it, verifies it, exports it and verifies the round trip,
and says of each command how long it took and how much memory it needed. Run by ``make demo``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from shardway.core.dtypes import BFLOAT16
from shardway.formats.safetensors_layout import lay_out
from shardway.formats.sharding import index_json, shard_tensors

WORK = Path("demo-work")
NUM_LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY = 12, 1024, 16, 4, 64, 4096, 32768
SHARD_BYTES = 150_000_000
BLOCK_BYTES = 2**24

BOLD, DIM, CYAN, GREEN = "1", "2", "36", "32"


class Step(NamedTuple):
    """What one command cost."""

    name: str
    seconds: float
    peak_bytes: int
    num_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description="Show a model's way to Megatron-Core and back.")
    parser.add_argument("--keep", action="store_true", help=f"keep what was made in {WORK}")
    parser.add_argument("--make", type=Path, metavar="DIR", help="make the model there and do nothing else")
    arguments = parser.parse_args()
    if arguments.make:
        make_model(arguments.make)
        return
    os.chdir(Path(__file__).resolve().parents[1])
    shutil.rmtree(WORK, ignore_errors=True)
    try:
        show()
    finally:
        if not arguments.keep:
            shutil.rmtree(WORK, ignore_errors=True)
    if arguments.keep:
        say(f"Everything is in {WORK}.")


def show() -> None:
    hf, megatron, back, copy = (str(WORK / name) for name in ("llama", "megatron", "llama-again", "copy"))
    title("A random model in the shape of a small Llama")
    # Made by another process: this one stays small, since Linux counts its peak memory as that of what it starts.
    subprocess.run([sys.executable, __file__, "--make", hf], check=True)
    num_parameters = sum(math.prod(shape) for _, shape in shapes())
    files = list(Path(hf).glob("*.safetensors"))
    num_bytes = sum(file.stat().st_size for file in files)
    say(f"  {num_parameters / 1e6:,.0f} million parameters, bfloat16, {num_bytes / 1e6:,.0f} MB in {len(files)} files")
    steps = []

    title("The yardstick: a copy, until it is on disk")
    steps.append(run("cp -r, sync", num_bytes, f"cp -r {hf} {copy}", f"sync -f {copy}"))
    shutil.rmtree(copy)

    title("Hugging Face to Megatron-Core")
    steps.append(run("import", num_bytes, f"shardway import {hf} {megatron}"))

    title("Do both hold the same tensors, bit for bit?")
    steps.append(run("verify", num_bytes, f"shardway verify {hf} {megatron}"))

    title("What is in the checkpoint?")
    run("inspect", 0, f"shardway inspect {megatron}")

    title("Megatron-Core to Hugging Face")
    steps.append(run("export", num_bytes, f"shardway export {megatron} {back}"))

    title("Is the round trip exact?")
    steps.append(run("verify", num_bytes, f"shardway verify {hf} {back}"))

    summary(steps)


def say(text: str, style: str = "") -> None:
    """Print a line, in colour where it is read on a terminal."""
    print(f"\033[{style}m{text}\033[0m" if style and sys.stdout.isatty() else text, flush=True)


def title(text: str) -> None:
    say(f"\n{text}", BOLD)


def run(name: str, num_bytes: int, *commands: str) -> Step:
    """Run commands as a user would type them, and say what they cost together; a failure ends the demo."""
    for command in commands:
        say(f"$ {command}", CYAN)
    began = time.perf_counter()
    peak = 0
    for command in commands:
        program, *arguments = shlex.split(command)
        beside = Path(sys.executable).with_name(program)
        path = str(beside) if beside.exists() else program
        _, status, usage = os.wait4(os.posix_spawnp(path, [program, *arguments], os.environ), 0)
        if status:
            sys.exit(f"{command}: exit code {os.waitstatus_to_exitcode(status)}")
        peak = max(peak, usage.ru_maxrss * 1024)
    step = Step(name, time.perf_counter() - began, peak, num_bytes)
    speed = f"{rate(step)}, " if num_bytes else ""
    say(f"  {step.seconds:.2f} s, {speed}peak memory {peak / 1e6:.0f} MB", GREEN)
    return step


def rate(step: Step) -> str:
    return f"{step.num_bytes / step.seconds / 1e9:.2f} GB/s"


def summary(steps: list[Step]) -> None:
    print()
    say(f"{'':<14}{'time':>8}{'speed':>12}{'peak memory':>14}{'beside cp':>12}", DIM)
    for step in steps:
        ratio = step.seconds / steps[0].seconds
        print(f"{step.name:<14}{step.seconds:>6.2f} s{rate(step):>12}{step.peak_bytes / 1e6:>11.0f} MB{ratio:>10.2f} x")
    say("\nBoth ways the bits are those of the source, every file is on disk, and no torch was needed.", BOLD)


def make_model(folder: Path) -> None:
    """Write a model of random weights."""
    folder.mkdir(parents=True)
    tensors = [(name, BFLOAT16, shape) for name, shape in shapes()]
    shards = shard_tensors(tensors, SHARD_BYTES)
    for shard in shards:
        layout = lay_out(shard.tensors, {"format": "pt"})
        with (folder / shard.file).open("wb") as file:
            file.write(layout.header)
            left = layout.num_bytes - len(layout.header)
            while left:
                file.write(random_weights(min(left, BLOCK_BYTES)))
                left -= min(left, BLOCK_BYTES)
    (folder / "model.safetensors.index.json").write_bytes(index_json(shards))
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))
    subprocess.run(["sync", "-f", str(folder)], check=True)


def random_weights(num_bytes: int) -> bytes:
    """Random bfloat16 numbers of both signs between 2**-7 and 2**-3, as weights are."""
    import numpy as np

    bits = np.frombuffer(os.urandom(num_bytes), np.uint16)
    return bytes(((bits & 0x81FF) | 0x3C00).data)


def shapes() -> list[tuple[str, tuple[int, ...]]]:
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]
    for i in range(NUM_LAYERS):
        layer = f"model.layers.{i}"
        found += [
            (f"{layer}.self_attn.q_proj.weight", (HEADS * HEAD_DIM, HIDDEN)),
            (f"{layer}.self_attn.k_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)),
            (f"{layer}.self_attn.v_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)),
            (f"{layer}.self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD_DIM)),
            (f"{layer}.mlp.gate_proj.weight", (FFN, HIDDEN)),
            (f"{layer}.mlp.up_proj.weight", (FFN, HIDDEN)),
            (f"{layer}.mlp.down_proj.weight", (HIDDEN, FFN)),
            (f"{layer}.input_layernorm.weight", (HIDDEN,)),
            (f"{layer}.post_attention_layernorm.weight", (HIDDEN,)),
        ]
    return [*found, ("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (VOCABULARY, HIDDEN))]


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": FFN,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": NUM_LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}


if __name__ == "__main__":
    main()
