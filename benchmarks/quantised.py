"""Speed and memory of dequantising imports beside `cp -r` of their output, as whole processes.

The two commands run directly after each other, the order swapped from round to round, with what they read in the page
cache. What a command wrote is removed, and the filesystem settled, outside of the timing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.convert import line, note, warm
from benchmarks.measure import Sample, median_ratio, program, run
from benchmarks.models import BLOCK_BYTES, MODELS

from shardway.core.dtypes import BFLOAT16, DType, dtype_of_torch
from shardway.formats.safetensors_layout import lay_out

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardway.core.tensors import Shape

FP8, FP32, INT32 = (dtype_of_torch(name) for name in ("float8_e4m3fn", "float32", "int32"))
# Some layers of Llama 3 8B: all of them would need 40 GB of disk and show the same.
MODEL = dataclasses.replace(
    MODELS["llama"], num_layers=6, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocabulary=32000
)
CONFIGS: dict[str, dict[str, object]] = {
    "fp8-block": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "fp8-channel": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "int4-group": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "weights": {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True, "group_size": 32}
            }
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=6, help="of the model; each is 0.44 GB of output (default: 6)")
    parser.add_argument("--dir", type=Path, default=Path("bench-work"), help="where to work; gets 8 GB at a time")
    parser.add_argument("--json", action="store_true", help="print every sample")
    arguments = parser.parse_args()
    arguments.dir.mkdir(parents=True, exist_ok=True)
    try:
        for scheme in arguments.schemes:
            measure(scheme, arguments.dir / scheme, arguments.rounds, arguments.layers, as_json=arguments.json)
    finally:
        shutil.rmtree(arguments.dir, ignore_errors=True)


def measure(scheme: str, folder: Path, rounds: int, layers: int, *, as_json: bool) -> None:
    """Make a model and measure one scheme on it."""
    hf, megatron, output = folder / "hf", folder / "megatron", folder / "output"
    subprocess.run(
        [sys.executable, "-c", f"from benchmarks.quantised import make; make({scheme!r}, {str(hf)!r}, {layers})"],
        check=True,
    )
    command = [program("shardway"), "import", str(hf), str(output), "--quiet", "--no-fsync"]
    run([*command[:3], str(megatron), *command[4:]])
    warm(hf)
    warm(megatron)
    ours: list[Sample] = []
    others: list[Sample] = []
    for number in range(rounds):
        note(f"{scheme}: round {number + 1} of {rounds}")
        both = [(ours, command), (others, ["cp", "-r", str(megatron), str(output)])]
        for samples, each in both if number % 2 == 0 else reversed(both):
            samples.append(run(each))
            shutil.rmtree(output)
            subprocess.run(["sync", "-f", str(folder)], check=True)
    num_bytes = sum(path.stat().st_size for path in megatron.rglob("*.distcp"))
    shutil.rmtree(folder)
    if as_json:
        print(json.dumps({"scheme": scheme, "num_bytes": num_bytes, "import": ours, "cp": others}))
        return
    print(f"\n{scheme}: {num_bytes / 1e9:.2f} GB written, {rounds} rounds\n")
    print(f"{'':<22}{'median':>8}{'min':>7}{'max':>7}{'GB/s':>7}{'CPU':>7}{'peak':>8}")
    print(line("import --no-fsync", ours, num_bytes))
    print(line("cp -r of the output", others, num_bytes))
    print(f"{'':<22}{median_ratio(ours, others):>7.2f} x, the median ratio of the pairs")


def make(scheme: str, path: str, layers: int) -> None:
    """Write a model with random codes, in one file."""
    import numpy as np

    folder = Path(path)
    folder.mkdir(parents=True)
    model = dataclasses.replace(MODEL, num_layers=layers)
    tensors = [stored for name, shape in model.shapes() for stored in parts_of(scheme, name, shape)]
    layout = lay_out(tensors, {"format": "pt"})
    generator = np.random.Generator(np.random.SFC64(1))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(layout.header)
        for _, dtype, shape in tensors:
            left = dtype.num_bytes(math.prod(shape))
            while left:
                take = min(left, BLOCK_BYTES)
                file.write(values(dtype, take, generator))
                left -= take
    config = model.config() | {"quantization_config": CONFIGS[scheme]}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def parts_of(scheme: str, name: str, shape: Shape) -> Iterator[tuple[str, DType, Shape]]:
    """What is stored of a weight."""
    if not name.endswith("_proj.weight"):
        yield name, BFLOAT16, shape
        return
    rows, columns = shape
    if scheme == "int4-group":
        yield f"{name}_packed", INT32, (rows, columns // 8)
        yield f"{name}_scale", BFLOAT16, (rows, columns // 32)
        yield f"{name}_shape", INT32, (2,)
    else:
        yield name, FP8, shape
        yield (
            (f"{name}_scale_inv", FP32, (-(-rows // 128), -(-columns // 128)))
            if scheme == "fp8-block"
            else (
                f"{name}_scale",
                FP32,
                (rows, 1),
            )
        )


def values(dtype: DType, num_bytes: int, generator: object) -> bytes:
    """Random bytes of a stored tensor: codes as weights have them, scales and plain values near 2**-7."""
    import numpy as np

    assert isinstance(generator, np.random.Generator)
    if dtype is FP8:
        import ml_dtypes

        normal = generator.standard_normal(num_bytes, np.float32) * 100
        return normal.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).tobytes()
    if dtype is INT32:
        return generator.bytes(num_bytes)
    plain = (generator.random(num_bytes // dtype.itemsize, np.float32) + 1) / 128
    return plain.astype(dtype.numpy()).tobytes()


if __name__ == "__main__":
    main()
