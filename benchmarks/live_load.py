"""Loading a live model: shardway beside safetensors, transformers and Megatron-Core, in one process on a CPU.

The model is a Megatron-Core GPTModel whose memory is there already; every way of loading has to fill it, or memory of
its own of the same size. In every round each of them runs once, in an order that moves on from round to round. What is
read lies in the page cache. What was loaded is checked against the files outside of the timing.

    python -m benchmarks.live_load             about 1.1 GB twice on disk, 7 rounds, a minute or two
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import shutil
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

OURS_HF = "shardway, from Hugging Face files"
OURS_MEGATRON = "shardway, from torch_dist"
COPIED = "safetensors load_file, copied into the model"
PREAD = "safetensors load_file, backend='pread'"
MAPPED = "safetensors load_file"
TOUCHED = "safetensors load_file, each page touched"
TRANSFORMERS = "transformers from_pretrained"
TRANSFORMERS_TOUCHED = "transformers from_pretrained, each page touched"
MEGATRON = "megatron-core load of torch_dist"
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY = 2048, 16, 8, 128, 8192, 32768
PAGE_BYTES = 4096


class Sample(NamedTuple):
    """What one load cost.

    Attributes:
        seconds: Wall-clock time.
        cpu_seconds: User and system time of all threads.
        extra_bytes: High-water mark of resident memory above what it was before.
    """

    seconds: float
    cpu_seconds: float
    extra_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1.1, help="gigabytes of weights (1.1)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dir", type=Path, default=Path("bench-work"), help="where the files go, and are removed from")
    parser.add_argument("--json", action="store_true", help="print every sample")
    arguments = parser.parse_args()
    folder: Path = arguments.dir.absolute() / "live-load"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        result = measure(folder, arguments.size, arguments.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            arguments.dir.rmdir()
    print(json.dumps(result, indent=2)) if arguments.json else show(result)


def measure(folder: Path, gigabytes: float, rounds: int) -> dict[str, Any]:
    """Make the files and the model, run every case in every round."""
    import torch
    import transformers

    import shardway

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cpu = torch.device("cpu")  # what Megatron-Core asks of a GPU when it loads
    mock.patch.multiple(torch.cuda, synchronize=lambda *_: None, current_device=lambda: cpu).start()
    hf = folder / "hf"
    make_files(hf, gigabytes)
    shardway.import_hf(hf, folder / "megatron", fsync=False)
    bridge = shardway.AutoBridge.from_hf_pretrained(hf)
    (model,) = bridge.to_megatron_model(load_weights=False, perform_initialization=False)
    parameters = list(model.parameters())
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    bridge.load_hf_weights(model)
    expected = [parameter.detach().clone() for parameter in parameters]
    room = [torch.empty_like(parameter) for parameter in parameters]
    for each in room:
        each.zero_()  # its pages are there, as the model's are
    cases = make_cases(bridge, model, hf, folder / "megatron", room)
    samples: dict[str, list[Sample]] = {name: [] for name in cases}
    names = list(cases)
    for number in range(-1, rounds):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            fills = name in (OURS_HF, OURS_MEGATRON, MEGATRON)
            if fills:
                with torch.no_grad():
                    for parameter in parameters:
                        parameter.zero_()
            sample = once(cases[name])
            if fills and not all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True)):
                sys.exit(f"{name} did not load the model")
            if number >= 0:
                samples[name].append(sample)
    return {
        "num_bytes": num_bytes,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "samples": {name: [sample._asdict() for sample in found] for name, found in samples.items()},
    }


def once(load: Callable[[], object]) -> Sample:
    """Load once."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    began, cpu = time.perf_counter(), time.process_time()
    loaded = load()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    extra = memory("VmHWM") - before
    del loaded
    return Sample(seconds, cpu_seconds, extra)


def make_cases(
    bridge: Any, model: Any, hf: Path, megatron: Path, room: Sequence[torch.Tensor]
) -> dict[str, Callable[[], object]]:
    """Every way to load; what is returned is let go of outside of the timing."""
    import transformers
    from megatron.core import dist_checkpointing
    from safetensors.torch import load_file

    files = sorted(hf.glob("*.safetensors"))

    def load_files(backend: str = "mmap") -> dict[str, torch.Tensor]:
        return {name: tensor for file in files for name, tensor in load_file(file, backend=backend).items()}

    def from_pretrained() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(hf, dtype="auto")

    def touched(tensors: Iterable[torch.Tensor]) -> Any:
        """What is mapped is read when it is first used."""
        return [tensor.view(-1)[:: PAGE_BYTES // tensor.element_size()].sum() for tensor in tensors]

    def copied() -> None:
        """The same bytes into memory of the same sizes: what a loader would do that has no names to translate."""
        targets = iter(room)
        target, at = next(targets).view(-1), 0
        for tensor in load_files().values():
            source = tensor.view(-1)
            while len(source):
                if at == len(target):
                    target, at = next(targets).view(-1), 0
                take = min(len(source), len(target) - at)
                target[at : at + take].copy_(source[:take])
                source, at = source[take:], at + take

    def with_megatron() -> None:
        chunk = model.module if hasattr(model, "module") else model
        metadata = dist_checkpointing.load_content_metadata(str(megatron / "iter_0000000"))
        wanted = {"model": chunk.sharded_state_dict(metadata=dict(metadata))}
        loaded = dist_checkpointing.load(wanted, str(megatron / "iter_0000000"))
        chunk.load_state_dict(loaded["model"])

    return {
        OURS_HF: lambda: bridge.load_hf_weights(model),
        COPIED: copied,
        PREAD: lambda: load_files("pread"),
        MAPPED: load_files,
        TOUCHED: lambda: touched(load_files().values()),
        TRANSFORMERS: from_pretrained,
        TRANSFORMERS_TOUCHED: lambda: touched(from_pretrained().parameters()),
        OURS_MEGATRON: lambda: bridge.load_megatron_weights(model, megatron),
        MEGATRON: with_megatron,
    }


def make_files(folder: Path, gigabytes: float) -> None:
    """A random Llama of about this size."""
    from benchmarks.models import Llama, make

    layer = HIDDEN * (2 * HEADS * HEAD_DIM + 2 * KV_HEADS * HEAD_DIM + 3 * FFN)
    model = Llama(
        num_layers=max(1, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / layer)),
        hidden=HIDDEN,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        ffn=FFN,
        vocabulary=VOCABULARY,
        tied=False,
        max_shard_bytes=500_000_000,
    )
    make(model, folder)


def memory(name: str) -> int:
    """Bytes of this process's memory, as Linux counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(name)


def show(result: dict[str, Any]) -> None:
    """Print a table."""
    print(f"\n{result['num_bytes'] / 1e9:.2f} GB, torch {result['torch']}, transformers {result['transformers']}\n")
    print(f"{'':46} {'median':>8} {'min to max':>16} {'CPU':>8} {'extra memory':>13} {'ours is':>16}")
    samples = {name: [Sample(**each) for each in found] for name, found in result["samples"].items()}
    for name, found in samples.items():
        ours = OURS_MEGATRON if name == MEGATRON else OURS_HF
        ratio = statistics.median(a.seconds / b.seconds for a, b in zip(found, samples[ours], strict=True))
        seconds = sorted(each.seconds for each in found)
        extra = max(each.extra_bytes for each in found) / 1e6
        told = "" if name in (OURS_HF, OURS_MEGATRON) else f"{ratio:.2f} x as fast"
        spread = f"{seconds[0]:.2f} - {seconds[-1]:.2f} s"
        cpu = statistics.median(each.cpu_seconds for each in found)
        print(f"{name:46} {statistics.median(seconds):6.2f} s {spread:>16} {cpu:6.2f} s {extra:10.1f} MB {told:>16}")


if __name__ == "__main__":
    main()
