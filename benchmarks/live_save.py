"""Saving a live model on two ranks: shardway beside torch.distributed.checkpoint and Megatron-Core's own strategy.

All three save the same tensors of the same Megatron-Core GPTModel (tensor parallelism over two processes, gloo, on
CPU); torch.distributed.checkpoint is given them as DTensors. In every round each of them runs once, in an order that
moves on from round to round; what it wrote is removed, and the filesystem settled, outside of the timing. A time is
that of the slower rank, both beginning at a barrier.

    python -m benchmarks.live_save             about 1.1 GB, 7 rounds, some minutes
    python -m benchmarks.live_save --ranks     what 1,024 ranks ask of the store, simulated
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import datetime as dt
import gc
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from shardway import AutoBridge

TENSOR_PARALLEL = 2
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY = 2048, 16, 8, 128, 8192, 32768
KINDS = ("fsync", "no-fsync", "async")
OURS, TORCH, MEGATRON = "shardway", "torch.distributed.checkpoint", "megatron-core"
COPY = "a memory copy of the same tensors"
FRESH, REUSED = ", first save", ", later saves"
DEADLINE_S = 3600.0
SAMPLE_S = 0.005


class Case(NamedTuple):
    """One way to save.

    Attributes:
        what: ``"fsync"``, ``"no-fsync"`` or ``"async"``.
        name: Whose.
        prepare: What it needs, outside of the timing.
        save: Takes the destination and that; what it returns is called when the training loop would go on, and
            returns when the checkpoint is complete.
    """

    what: str
    name: str
    prepare: Callable[[], Any]
    save: Callable[[Path, Any], Callable[[], object] | None]


class Sample(NamedTuple):
    """What one save cost, the worse of both ranks.

    Attributes:
        blocked_s: Until the call returned.
        seconds: Until the checkpoint was complete.
        extra_bytes: High-water mark of a rank's resident memory above what it was before, with the private memory of
            the processes that it started where `is_sampled`.
        is_sampled: Whether memory was watched during the save, which takes time.
        num_bytes: Size of the checkpoint.
    """

    blocked_s: float
    seconds: float
    extra_bytes: int
    is_sampled: bool
    num_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1.1, help="gigabytes of weights (1.1)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, help="which kinds of saves")
    parser.add_argument(
        "--dir", type=Path, default=Path("bench-work"), help="where to save; gets one checkpoint at a time"
    )
    parser.add_argument("--json", action="store_true", help="print every sample")
    parser.add_argument(
        "--ranks", type=int, nargs="?", const=1024, help="simulate so many ranks (1024) instead; a multiple of 128"
    )
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker, arguments)
    elif arguments.ranks is not None:
        found = measure_ranks(arguments.ranks, arguments.rounds)
        print(json.dumps(found, indent=2)) if arguments.json else show_ranks(found)
    else:
        result = measure(arguments)
        print(json.dumps(result, indent=2)) if arguments.json else show(result)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Let both ranks work; returns what rank 0 wrote down. Leaves no process and no file behind."""
    folder: Path = arguments.dir.absolute() / "live"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "TORCHDYNAMO_DISABLE": "1",
    }
    command = [sys.executable, "-m", "benchmarks.live_save", "--dir", str(folder), "--size", str(arguments.size)]
    command += ["--rounds", str(arguments.rounds), "--only", *arguments.only]
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(TENSOR_PARALLEL):
            process = subprocess.Popen(
                [*command, "--worker", str(rank)],
                cwd=Path(__file__).resolve().parents[1],
                stdin=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
            ranks.append(process)
        deadline = time.monotonic() + DEADLINE_S
        while any(process.poll() is None for process in ranks):
            if any(process.poll() for process in ranks):
                break
            if time.monotonic() > deadline:
                sys.exit(f"not done after {DEADLINE_S:.0f} s")
            time.sleep(0.1)
        if any(process.returncode for process in ranks):
            sys.exit("a rank failed")
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return result
    finally:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            arguments.dir.rmdir()


# What follows runs in the ranks.


def work(rank: int, arguments: argparse.Namespace) -> None:
    """Make the model, run every case in every round."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    warnings.simplefilter("ignore")
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    cpu = torch.device("cpu")  # what Megatron-Core asks of a GPU when it saves
    mock.patch.multiple(torch.cuda, synchronize=lambda *_: None, current_device=lambda: cpu).start()
    folder: Path = arguments.dir
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=TENSOR_PARALLEL,
        timeout=dt.timedelta(minutes=5),
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=TENSOR_PARALLEL)
    note(rank, "making the model")
    model, hf_config = make_model(arguments.size)
    sizes = [(each.numel(), each.element_size(), "norm" in name) for name, each in model.named_parameters()]
    num_parameters = sum(number * (1 if is_shared else TENSOR_PARALLEL) for number, _, is_shared in sizes)
    num_bytes = num_parameters * sizes[0][1]
    cases = [case for case in make_cases(model, hf_config) if case.what in arguments.only]
    samples: dict[str, list[Sample]] = {f"{case.what}: {case.name}": [] for case in cases}
    for number in range(-2, arguments.rounds):  # one to warm up, one to look at memory
        turn = number % len(cases)
        for case in (*cases[turn:], *cases[:turn]):
            what = "warm-up" if number == -2 else "memory" if number == -1 else f"{number + 1} of {arguments.rounds}"
            note(rank, f"round {what}: {case.what}: {case.name}")
            sample = once(case, folder / "output", rank, num_bytes, is_sampled=number == -1)
            if number >= -1:
                samples[f"{case.what}: {case.name}"].append(sample)
    if rank == 0:
        result = {
            "num_bytes": num_bytes,
            "num_parameters": num_parameters,
            "num_ranks": TENSOR_PARALLEL,
            "torch": torch.__version__,
            "samples": {name: [sample._asdict() for sample in found] for name, found in samples.items()},
        }
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def once(case: Case, path: Path, rank: int, model_bytes: int, *, is_sampled: bool) -> Sample:
    """Save once, on both ranks."""
    import torch
    import torch.distributed as dist

    prepared = case.prepare()
    if rank == 0:
        path.mkdir()  # torch and Megatron-Core want it to be there
        settle(path)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    watch = Watch() if is_sampled else None
    dist.barrier()
    began = time.perf_counter()
    wait = case.save(path, prepared)
    blocked_s = time.perf_counter() - began
    if wait is not None:
        wait()
    seconds = time.perf_counter() - began
    extra = memory("VmHWM") - before + (watch.stop() if watch is not None else 0)
    del prepared, wait
    worst = torch.tensor([blocked_s, seconds, float(extra)], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    num_bytes = sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    if COPY not in case.name and not 1 <= num_bytes / model_bytes < 1.01:
        raise ValueError(f"{case.name} wrote {num_bytes:,} bytes of a model of {model_bytes:,}")
    dist.barrier()
    if rank == 0:
        shutil.rmtree(path)
        settle(path.parent)
    return Sample(float(worst[0]), float(worst[1]), int(worst[2]), is_sampled, num_bytes)


def make_cases(model: Any, hf_config: dict[str, object]) -> list[Case]:
    """Every way to save this model."""
    from shardway import AutoBridge

    def nothing() -> None: ...

    def new_bridge() -> AutoBridge:
        return AutoBridge.from_hf_config(hf_config)

    kept = new_bridge()
    room = [torch_like(parameter) for parameter in model.parameters()]

    def copied(_: Path, targets: list[torch.Tensor] | None) -> None:
        targets = targets or [torch_like(parameter) for parameter in model.parameters()]
        for source, target in zip(model.parameters(), targets, strict=True):
            target.copy_(source.detach())

    cases = []
    for fsync in (True, False):
        what = "fsync" if fsync else "no-fsync"
        cases += [
            Case(what, OURS, new_bridge, partial(ours, model, fsync)),
            Case(what, TORCH, partial(torch_state, model), partial(dcp, fsync)),
            Case(what, MEGATRON, nothing, partial(megatron, model, fsync)),
        ]
    return [
        *cases,
        Case("async", OURS + FRESH, new_bridge, partial(ours_async, model)),
        Case("async", OURS + REUSED, lambda: kept, partial(ours_async, model)),
        Case("async", COPY + ", to new memory", nothing, copied),
        Case("async", COPY + ", to old memory", lambda: room, copied),
        Case("async", TORCH, partial(torch_state, model), dcp_async),
        Case("async", MEGATRON, nothing, partial(megatron_async, model)),
    ]


def ours(model: Any, fsync: bool, path: Path, bridge: AutoBridge) -> None:
    from shardway.live.save import CheckpointConfig

    bridge.save_megatron_model(model, path, config=CheckpointConfig(fsync=fsync))


def ours_async(model: Any, path: Path, bridge: AutoBridge) -> Callable[[], object]:
    from shardway.live.save import AsyncSave

    handle = bridge.save_megatron_model(model, path, async_save=True)
    if not isinstance(handle, AsyncSave):
        raise TypeError(handle)
    return handle.wait


def torch_state(model: Any) -> dict[str, Any]:
    """The same tensors as torch.distributed.checkpoint knows them best: as DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

    mesh = init_device_mesh("cpu", (TENSOR_PARALLEL,))
    state: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        columns = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        placement: Placement = Replicate() if "norm" in name else Shard(1 if columns else 0)
        state[name] = DTensor.from_local(parameter.detach(), mesh, [placement], run_check=False)
    return state


def dcp(fsync: bool, path: Path, state: dict[str, Any]) -> None:
    import torch.distributed.checkpoint as checkpoint

    writer = checkpoint.FileSystemWriter(path, sync_files=fsync)  # type: ignore[attr-defined]
    checkpoint.save(state, storage_writer=writer)  # type: ignore[attr-defined]


def dcp_async(path: Path, state: dict[str, Any]) -> Callable[[], object]:
    import torch.distributed.checkpoint as checkpoint

    writer = checkpoint.FileSystemWriter(path)  # type: ignore[attr-defined]
    future: Any = checkpoint.async_save(state, storage_writer=writer)  # type: ignore[attr-defined]
    wait: Callable[[], object] = getattr(future, "upload_completion", future).result
    return wait


def megatron(model: Any, fsync: bool, path: Path, _: None) -> None:
    """Megatron-Core's save, with what Megatron Bridge passes by default; its fsync is made to do nothing on request."""
    with contextlib.nullcontext() if fsync else mock.patch("os.fsync"):
        megatron_save(model, path)


def megatron_save(model: Any, path: Path, **others: object) -> Any:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy("torch_dist", 1))
    return dist_checkpointing.save({"model": model.sharded_state_dict()}, str(path), strategy, **others)


def megatron_async(model: Any, path: Path, _: None) -> Callable[[], object]:
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    queue = AsyncCallsQueue(persistent=False)
    queue.schedule_async_request(megatron_save(model, path, async_sharded_save=True))
    return lambda: queue.maybe_finalize_async_calls(blocking=True)


def make_model(gigabytes: float) -> tuple[Any, dict[str, object]]:
    """A random Llama, divided over the ranks, and its Hugging Face config."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    layer = HIDDEN * (2 * HEADS * HEAD_DIM + 2 * KV_HEADS * HEAD_DIM + 3 * FFN)
    num_layers = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / layer))
    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        kv_channels=HEAD_DIM,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        tensor_model_parallel_size=TENSOR_PARALLEL,
        params_dtype=torch.bfloat16,
        bf16=True,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=4096,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    hf_config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": num_layers,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
    }
    return model, hf_config


def torch_like(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.empty(tensor.shape, dtype=tensor.dtype)


class Watch:
    """Samples the private memory of the processes that this one has started."""

    def __init__(self) -> None:
        self._before = self._now()
        self._peak = self._before
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The peak above what it was, in bytes."""
        self._over.set()
        self._thread.join()
        return self._peak - self._before

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self._peak = max(self._peak, self._now())

    def _now(self) -> int:
        return sum(map(private_bytes, started_by(os.getpid())))


def started_by(process: int) -> Iterator[int]:
    """All descendants."""
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, children.read_text().split()):
                yield child
                yield from started_by(child)


def private_bytes(process: int) -> int:
    """What a process holds alone: that of a forked one begins at nearly nothing."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def memory(field: str) -> int:
    """A value of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def settle(path: Path) -> None:
    subprocess.run(["sync", "-f", str(path)], check=True)


def end_with_parent() -> None:
    """Wait until the parent is gone, then end this process and what it has started."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def note(rank: int, text: str) -> None:
    if rank == 0:
        print(text, file=sys.stderr, flush=True)


# What follows runs in the parent.


def show(result: dict[str, Any]) -> None:
    every = {name: [Sample(**sample) for sample in found] for name, found in result["samples"].items()}
    timed = {name: [sample for sample in found if not sample.is_sampled] for name, found in every.items()}
    rounds = len(next(iter(timed.values())))
    print(
        f"\n{result['num_ranks']} ranks, TP={result['num_ranks']}: {result['num_parameters'] / 1e6:,.0f} million "
        f"parameters, bfloat16, {result['num_bytes'] / 1e9:.2f} GB; {rounds} rounds; torch {result['torch']}"
    )
    for what in ("fsync", "no-fsync"):
        if f"{what}: {OURS}" not in timed:
            continue
        print(f"\n{what:<31}{'median':>8}{'min':>7}{'max':>7}{'GB/s':>7}{'ours is':>13}{'extra per rank':>16}")
        for name in (OURS, TORCH, MEGATRON):
            samples = timed[f"{what}: {name}"]
            seconds = [sample.seconds for sample in samples]
            median = statistics.median(seconds)
            ratios = [a.seconds / b.seconds for a, b in zip(samples, timed[f"{what}: {OURS}"], strict=True)]
            beside = "" if name == OURS else f"{statistics.median(ratios):.2f} x as fast"
            print(
                f"  {name:<29}{median:>6.2f} s{min(seconds):>7.2f}{max(seconds):>7.2f}"
                f"{samples[0].num_bytes / median / 1e9:>7.2f}{beside:>15}{peak(every[f'{what}: {name}']):>11.1f} MB"
            )
    if f"async: {COPY}, to old memory" not in timed:
        return
    print(f"\n{'async, fsync':<50}{'blocked':>9}{'complete after':>16}{'extra per rank':>16}")
    for name in (name for name in timed if name.startswith("async: ")):
        samples = timed[name]
        blocked = statistics.median(sample.blocked_s for sample in samples)
        complete_s = statistics.median(sample.seconds for sample in samples)
        complete = "" if COPY in name else f"{complete_s:.2f} s"
        print(f"  {name.removeprefix('async: '):<48}{blocked:>7.3f} s{complete:>16}{peak(every[name]):>13.1f} MB")


def peak(samples: list[Sample]) -> float:
    return max(sample.extra_bytes for sample in samples) / 1e6


# Many ranks.


def measure_ranks(num_ranks: int, rounds: int) -> dict[str, Any]:
    """Simulate a save of many ranks; time the calls of a real store."""
    from tests.simulation.traffic import simulate_assembly

    found: list[dict[str, Any]] = []
    for number in range(rounds):
        note(0, f"round {number + 1} of {rounds}")
        found.append(dataclasses.asdict(simulate_assembly(num_ranks)))
    return {**found[0], "call_s": seconds_per_call()} | {
        name: statistics.median(each[name] for each in found) for name in ("assembly_s", "publishing_s")
    }


def seconds_per_call() -> float:
    """What one call to a TCPStore of this machine takes."""
    import torch.distributed as dist

    server: Any = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    client: Any = dist.TCPStore("127.0.0.1", server.port, is_master=False)  # type: ignore[attr-defined]
    took = []
    for number in range(2000):
        began = time.perf_counter()
        client.compare_set(f"key{number}", "", "x" * 1000)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def show_ranks(found: dict[str, Any]) -> None:
    calls = sum(found["calls"].values())
    call_s = found["call_s"]
    print(f"\n{found['num_ranks']:,} ranks, {found['num_tables']} different tables, {found['num_shards']:,} shards\n")
    for name, value in (
        ("the coordinator, until the work is shared", f"{found['assembly_s']:.2f} s of processor time"),
        ("the coordinator, after that", f"{found['publishing_s']:.2f} s of processor time"),
        ("store calls, the coordinator", f"{found['most_calls']:,}, {found['most_calls'] * call_s:.2f} s"),
        ("store calls, the rank in the middle", f"{found['median_calls']:,}"),
        ("store calls, all ranks", f"{calls:,}, {calls * call_s:.1f} s of the store's time"),
        ("bytes through the store", f"{found['store_bytes'] / 1e6:.1f} MB"),
        ("one call to a TCPStore here", f"{call_s * 1e6:.0f} us"),
        ("first arrival to last return, simulated", f"{found['waited_s']:.1f} s, 1 of arrivals and 20 of writing"),
    ):
        print(f"  {name:<44}{value}")


if __name__ == "__main__":
    main()
