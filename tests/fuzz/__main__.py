"""Fuzz the parsers: coverage-guided where atheris is installed, by chance where it is not.

Each target runs in a process of its own, with a limit on its memory and on the time of one input. What breaks one is
left in ``fuzz-work/TARGET``.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

NAMES = ("safetensors", "tensor", "torch", "pickle", "metadata", "json", "index", "config", "run_config", "record")
MEMORY_BYTES = 1 << 30  # what a process may take beyond what it has when it begins; no input is larger than a few MiB
INPUT_SECONDS = 60  # for one input, on a machine that is busy


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[[], *NAMES], help="what to fuzz (default: everything)")
    parser.add_argument("--seconds", type=float, default=30, help="time for each target (default: 30)")
    parser.add_argument(
        "--inputs", type=int, help="instead of a time: inputs by chance for each target, always the same"
    )
    parser.add_argument("--here", choices=("chance", "coverage"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--work", type=Path, default=Path("fuzz-work"), help="folder for what is found (default: fuzz-work)"
    )
    chosen = parser.parse_args()
    names = chosen.targets or NAMES
    if chosen.here == "coverage":
        return by_coverage(names[0], chosen.work, chosen.seconds)
    if chosen.here == "chance":
        return by_chance(names, chosen.work, chosen.seconds, chosen.inputs)
    how = "coverage" if importlib.util.find_spec("atheris") and not chosen.inputs else "chance"
    failed = []
    for name in names:
        print(f"{name}: by {how}", flush=True)
        command = [sys.executable, "-m", "tests.fuzz", "--here", how, name, "--seconds", str(chosen.seconds)]
        command += ["--work", str(chosen.work)]
        command += ["--inputs", str(chosen.inputs)] if chosen.inputs else []
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    print(f"broken: {', '.join(failed)}; the inputs are in {chosen.work}" if failed else "nothing broke")
    return 1 if failed else 0


def by_chance(names: Sequence[str], work: Path, seconds: float, num_inputs: int | None) -> int:
    """Feed mutated inputs to targets; return 1 for the first that breaks one."""
    from tests.fuzz.mutations import mutated
    from tests.fuzz.targets import attempt, targets

    made = targets(work)
    limit_memory()
    for name in names:
        rng = random.Random(name)
        began = time.monotonic()
        count = refused = 0
        while count < num_inputs if num_inputs else time.monotonic() - began < seconds:
            data = mutated(made[name].seeds, rng)
            faulthandler.dump_traceback_later(INPUT_SECONDS, exit=True)
            try:
                refused += attempt(made[name], data) is not None
            except BaseException:
                path = work / name / f"input-{count}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                print(f"{name} broke; the input is {path}", file=sys.stderr)
                raise
            count += 1
        faulthandler.cancel_dump_traceback_later()
        print(f"{name}: {count:,} inputs, {refused:,} refused", flush=True)
    return 0


def limit_memory(num_bytes: int = MEMORY_BYTES) -> None:
    """Let this process take no more than so many bytes beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def by_coverage(name: str, work: Path, seconds: float) -> int:
    """Run libFuzzer on a target; doesn't return when it ends, and exits with another status than 0 for a broken one."""
    import atheris

    with atheris.instrument_imports(include=["shardway"]):
        from tests.fuzz.targets import attempt, targets

    folder = work / name
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    target = targets(folder)[name]
    for number, seed in enumerate(dict.fromkeys(target.seeds)):
        (folder / "corpus" / f"seed-{number}").write_bytes(seed)
    options = (
        f"-max_total_time={seconds:.0f}",
        f"-timeout={INPUT_SECONDS}",
        f"-rss_limit_mb={MEMORY_BYTES >> 20}",
        f"-artifact_prefix={folder}/",
        "-max_len=65536",
        "-verbosity=0",
        "-print_final_stats=1",
    )
    atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], lambda data: attempt(target, data))
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
