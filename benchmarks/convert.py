"""Speed and memory of conversions beside `cp -r` of the same bytes, as whole processes.

Every comparison is a pair of commands that run directly after each other, the order swapped from round to round, with
the source in the page cache. What a command wrote is removed, and the filesystem settled, outside of the timing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import Sample, median_ratio, program, run

SIZES = {
    "full": ("llama", "deep", "moe"),
    "small": ("small",),
    "llama": ("llama",),
    "deep": ("deep",),
    "moe": ("moe",),
    "many": ("many",),
}
Command = list[str]
_IDLE_S = 4  # after it a host has taken back what was freed, so that it doesn't do so in the middle of a measurement


class Pair(NamedTuple):
    """A command of ours and what it is held against.

    Attributes:
        ours: Its name in the table.
        yardstick: Name of the other one.
        commands: Ours.
        others: The other one, which may be several commands.
        output: What each of them creates.
    """

    ours: str
    yardstick: str
    commands: list[Command]
    others: list[Command]
    output: Path


class Result(NamedTuple):
    """What a pair took, in every round."""

    model: str
    pair: Pair
    num_bytes: int
    ours: list[Sample]
    others: list[Sample]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", choices=SIZES, default="full", help="which models (default: 2.5 GB, 3 GB, 3 GB)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("fsync", "no-fsync"), help="half of the comparisons")
    parser.add_argument(
        "--floor", action="store_true", help="hold threads that read, hash and write without a plan against cp, too"
    )
    parser.add_argument(
        "--warm-memory", action="store_true", help="copy and remove the source before each measurement as well"
    )
    parser.add_argument("--layout", choices=("auto", "stacked", "per-layer"), default="auto", help="of the imports")
    parser.add_argument("--dir", type=Path, default=Path("bench-work"), help="where to work; gets 8 GB at a time")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    parser.add_argument("--json", action="store_true", help="print every sample")
    arguments = parser.parse_args()
    arguments.dir.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    try:
        for name in SIZES[arguments.sizes]:
            results += measure(name, arguments.dir / name, arguments)
            if not arguments.keep:
                shutil.rmtree(arguments.dir / name)
    finally:
        if not arguments.keep:
            shutil.rmtree(arguments.dir, ignore_errors=True)
    if arguments.json:
        print(json.dumps([as_json(result) for result in results], indent=2))
    else:
        show(results)


def measure(name: str, folder: Path, chosen: argparse.Namespace) -> list[Result]:
    """Make a model and run every pair on it, or those that force their files to the device, or the others."""
    rounds, layout, only = chosen.rounds, chosen.layout, chosen.only
    hf, megatron, output = folder / "hf", folder / "megatron", folder / "output"
    for left in (megatron, output):
        shutil.rmtree(left, ignore_errors=True)
    if not (hf / "config.json").exists():
        note(f"making {name}")
        shutil.rmtree(hf, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "benchmarks.models", name, str(hf)], check=True)
    shardway = program("shardway")
    run([shardway, "import", str(hf), str(megatron), "--quiet", "--layout", layout])
    pairs = []
    for verb, source, options in (("import", hf, ["--layout", layout]), ("export", megatron, [])):
        ours = [shardway, verb, str(source), str(output), "--quiet", *options]
        copy = ["cp", "-r", str(source), str(output)]
        sync = ["sync", "-f", str(output)]
        if only != "fsync":
            pairs.append(Pair(f"{verb} --no-fsync", "cp -r", [[*ours, "--no-fsync"]], [copy], output))
        if chosen.floor:
            plain = [sys.executable, "-m", "benchmarks.floor", str(source), str(output)]
            pairs.append(Pair(f"{verb}, no plan", "cp -r", [plain], [copy], output))
        if only != "no-fsync":
            pairs.append(Pair(verb, "cp -r; sync -f", [ours], [copy, sync], output))
    num_bytes = sum(path.stat().st_size for path in hf.glob("*.safetensors"))
    results = [Result(name, pair, num_bytes, [], []) for pair in pairs]
    warm(hf)
    warm(megatron)
    for number in range(rounds):
        note(f"{name}: round {number + 1} of {rounds}")
        for result in results:
            both = [(result.ours, result.pair.commands), (result.others, result.pair.others)]
            for samples, commands in both if number % 2 == 0 else reversed(both):
                if chosen.warm_memory:
                    time.sleep(_IDLE_S)
                    run(result.pair.others[0])
                    shutil.rmtree(output)
                samples.append(run(*commands))
                shutil.rmtree(output)
                subprocess.run(["sync", "-f", str(folder)], check=True)
    shutil.rmtree(megatron)
    return results


def warm(folder: Path) -> None:
    """Read every file, so that it is in the page cache."""
    buffer = bytearray(2**20)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(results: list[Result]) -> None:
    heading = f"{'':<22}{'median':>8}{'min':>7}{'max':>7}{'GB/s':>7}{'CPU':>7}{'peak':>8}"
    for name in dict.fromkeys(result.model for result in results):
        found = [result for result in results if result.model == name]
        print(f"\n{name}: {found[0].num_bytes / 1e9:.2f} GB of weights, {len(found[0].ours)} rounds\n\n{heading}")
        for result in found:
            print(line(result.pair.ours, result.ours, result.num_bytes))
            print(line(result.pair.yardstick, result.others, result.num_bytes))
            print(f"{'':<22}{median_ratio(result.ours, result.others):>7.2f} x, the median ratio of the pairs\n")


def line(name: str, samples: list[Sample], num_bytes: int) -> str:
    seconds = [sample.seconds for sample in samples]
    median = statistics.median(seconds)
    cpu = statistics.median(sample.cpu_seconds for sample in samples)
    peak = max(sample.peak_bytes for sample in samples)
    return (
        f"{name:<22}{median:>6.2f} s{min(seconds):>7.2f}{max(seconds):>7.2f}{num_bytes / median / 1e9:>7.2f}"
        f"{cpu:>7.2f}{peak / 1e6:>5.0f} MB"
    )


def as_json(result: Result) -> dict[str, object]:
    return {
        "model": result.model,
        "num_bytes": result.num_bytes,
        "command": result.pair.ours,
        "yardstick": result.pair.yardstick,
        "median_ratio": median_ratio(result.ours, result.others),
        "command_samples": [sample._asdict() for sample in result.ours],
        "yardstick_samples": [sample._asdict() for sample in result.others],
    }


if __name__ == "__main__":
    main()
