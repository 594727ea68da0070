"""What does not depend on a model's size: the start of the command line, and planning.

`shardway --help` is run beside `python -c pass`, the order swapped from round to round. Planning is timed in this
process, on a model of 50,000 tensors whose files have headers and holes for weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Sample, median_ratio, program, run
from benchmarks.models import MODELS, make

import shardway


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--dir", type=Path, default=Path("bench-work"))
    parser.add_argument("--json", action="store_true", help="print every sample")
    arguments = parser.parse_args()
    ours, yardstick = start(arguments.rounds)
    planning, num_tensors = plan(arguments.dir)
    if arguments.json:
        document = {
            "help": [sample._asdict() for sample in ours],
            "pass": [sample._asdict() for sample in yardstick],
            "planning_seconds": planning,
            "planning_tensors": num_tensors,
        }
        print(json.dumps(document, indent=2))
        return
    for name, samples in (("shardway --help", ours), ("python -c pass", yardstick)):
        print(f"{name:<20}{statistics.median(sample.seconds for sample in samples) * 1000:>8.1f} ms")
    print(f"{'':<20}{median_ratio(ours, yardstick):>8.2f} x, the median ratio of {arguments.rounds} pairs\n")
    print(f"planning the import of {num_tensors:,} tensors: {statistics.median(planning):.2f} s, headers included")


def start(rounds: int) -> tuple[list[Sample], list[Sample]]:
    """Samples of ``shardway --help`` and of ``python -c pass``."""
    ours: list[Sample] = []
    yardstick: list[Sample] = []
    both = [(ours, [program("shardway"), "--help"]), (yardstick, [sys.executable, "-c", "pass"])]
    for _, command in both:
        run(command)
    for number in range(rounds):
        for samples, command in both if number % 2 == 0 else reversed(both):
            samples.append(run(command))
    return ours, yardstick


def plan(folder: Path) -> tuple[list[float], int]:
    """Seconds of three plans, and the tensors in each."""
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder))
    try:
        make(MODELS["wide"], work / "hf", weights=False)
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            report = shardway.plan(work / "hf")
            seconds.append(time.perf_counter() - began)
            if not report.feasible:
                sys.exit(f"can't be planned: {report.problems}")
        return seconds, report.num_tensors
    finally:
        shutil.rmtree(work)
        with contextlib.suppress(OSError):  # it holds something else
            folder.rmdir()


if __name__ == "__main__":
    main()
