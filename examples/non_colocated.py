"""A save that can't hang: trainers and inference workers in one world, of which only the trainers save.

Four processes on CPU share one torch.distributed world. Ranks 0 and 1 hold a Megatron-Core model (tensor parallelism
over two); ranks 2 and 3 stand for inference workers: they are members of the world, and never enter the save.

    python examples/non_colocated.py                 saves in a second
    python examples/non_colocated.py --async-save    the trainers go on meanwhile
    python examples/non_colocated.py --incumbent     the same world in Megatron-Core's own save: it hangs

The last one is the deadlock of NVIDIA-NeMo/Megatron-Bridge#3207 and NVIDIA-NeMo/RL#2225. `--no-fully-parallel-save` and
`--no-validate` show that no flag helps: one collective goes, the next one hangs.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Job = Callable[["Demo", int], None]

TENSOR_PARALLEL = 2
TRAINERS = (0, 1)
WORLD = (0, 1, 2, 3)
PATIENCE_S = 120.0
PUBLISHED = "the newest checkpoint"
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY = 4, 256, 4, 2, 64, 512, 1024
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": FFN,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What to show, and what the processes share."""

    incumbent: bool
    async_save: bool
    fully_parallel_save: bool
    validate: bool
    timeout_s: float
    path: Path
    port: int
    began: float


def main() -> None:
    arguments = parse_arguments()
    for name in ("megatron.core", "psutil"):
        try:
            __import__(name)  # takes seconds: once, before the processes part
        except ImportError as error:
            sys.exit(f"this example needs torch, megatron-core and psutil (pip install 'shardway[megatron]'): {error}")
    print("One world of four processes: ranks 0 and 1 train (TP=2), ranks 2 and 3 serve and never enter a save.\n")
    with tempfile.TemporaryDirectory(prefix="shardway-") as scratch:
        import torch.distributed as dist

        store: Any = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        demo = Demo(
            incumbent=arguments.incumbent,
            async_save=arguments.async_save,
            fully_parallel_save=arguments.fully_parallel_save,
            validate=arguments.validate,
            timeout_s=arguments.timeout,
            path=(arguments.path or Path(scratch) / "checkpoint").absolute(),
            port=store.port,
            began=time.monotonic(),
        )
        run(demo, work, WORLD)
        if not demo.incumbent:
            inspect(demo)
            run(demo, load_back, (0,))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(__doc__.splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--incumbent", action="store_true", help="use Megatron-Core's own save, and see it hang")
    parser.add_argument("--timeout", type=float, default=10, help="seconds until a process group gives up (10)")
    parser.add_argument("--no-fully-parallel-save", dest="fully_parallel_save", action="store_false")
    parser.add_argument("--no-validate", dest="validate", action="store_false")
    parser.add_argument("--async-save", action="store_true", help="train on while the save runs (not with --incumbent)")
    parser.add_argument("--path", type=Path, help="where to save (default: a folder that is removed at the end)")
    arguments = parser.parse_args()
    if arguments.incumbent and arguments.async_save:
        parser.error("--async-save is for shardway's own save")
    return arguments


def work(demo: Demo, rank: int) -> None:
    """What each rank does."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    patience = dt.timedelta(seconds=PATIENCE_S)
    store = dist.TCPStore("127.0.0.1", demo.port, is_master=False, timeout=patience)  # type: ignore[attr-defined]
    timeout = dt.timedelta(seconds=demo.timeout_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(WORLD), timeout=timeout)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=TENSOR_PARALLEL)
    if rank not in TRAINERS:
        serve(demo, rank, store)
        return
    model = make_model(TENSOR_PARALLEL)
    train(model)
    if demo.incumbent:
        save_with_megatron_core(demo, rank, model)
    else:
        save_with_shardway(demo, rank, model)
    if rank == 0:
        store.set(PUBLISHED, str(demo.path))


def save_with_shardway(demo: Demo, rank: int, model: torch.nn.Module) -> None:
    from shardway import AutoBridge
    from shardway.live.save import AsyncSave

    bridge = AutoBridge.from_hf_config(HF_CONFIG)
    say(demo, rank, "trainer    calls AutoBridge.save_megatron_model(model, path)")
    saved = bridge.save_megatron_model(
        model,
        demo.path,
        fully_parallel_save=demo.fully_parallel_save,
        validate_access_integrity=demo.validate,
        async_save=demo.async_save,
    )
    if isinstance(saved, AsyncSave):
        say(demo, rank, "trainer    has it back, and trains on")
        steps = 0
        while not saved.done():
            train(model)
            steps += 1
        saved = saved.wait()
        say(demo, rank, f"trainer    made {steps} steps meanwhile; what was saved is the model at the call")
    say(
        demo,
        rank,
        f"trainer    saved in {saved.seconds:.2f} s: wrote {saved.wrote_bytes / 1e6:.1f} MB of "
        f"{saved.num_bytes / 1e6:.1f} MB; came: ranks {' and '.join(map(str, saved.arrived))}",
    )


def save_with_megatron_core(demo: Demo, rank: int, model: Any) -> None:
    """Megatron-Core's save, as Megatron Bridge calls it; says where it waits, and how it ends."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    cpu = torch.device("cpu")  # instead of what it asks of a GPU, of which there is none here
    mock.patch.multiple(torch.cuda, synchronize=lambda *_: None, current_device=lambda: cpu).start()
    strategy: Any = TorchDistSaveShardedStrategy("torch_dist", 1)
    if demo.fully_parallel_save:
        strategy = FullyParallelSaveStrategyWrapper(strategy)
    demo.path.mkdir(parents=True, exist_ok=True)
    say(
        demo,
        rank,
        f"trainer    calls megatron.core.dist_checkpointing.save: fully_parallel_save={demo.fully_parallel_save}, "
        f"validate={demo.validate}",
    )
    began = time.monotonic()
    watch = threading.Timer(demo.timeout_s / 2, show_stack, (demo, rank, threading.get_ident(), began))
    watch.daemon = True
    if rank == 0:
        watch.start()
    try:
        dist_checkpointing.save(
            {"model": model.sharded_state_dict()}, str(demo.path), strategy, validate_access_integrity=demo.validate
        )
    except Exception as error:  # gloo raises RuntimeError, torch its own; what matters is when
        waited = time.monotonic() - began
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
        say(demo, rank, f"trainer    gave up after {waited:.1f} s: {type(error).__name__}: {reason}")
        if waited < 0.7 * demo.timeout_s:
            raise
    else:
        sys.exit(f"rank {rank}: the save ended; it was expected to hang")
    finally:
        watch.cancel()


def show_stack(demo: Demo, rank: int, thread: int, began: float) -> None:
    """Print where the save is."""
    frames = traceback.extract_stack(sys._current_frames()[thread])  # noqa: SLF001 - there is no public way
    lines = []
    for frame in frames:
        _, found, place = frame.filename.rpartition("site-packages/")
        if found and not place.endswith(("c10d_logger.py", "_contextlib.py")):
            lines.append(f"{'':>31}{place}:{frame.lineno} {frame.name}")
    waited = time.monotonic() - began
    say(demo, rank, "\n".join([f"trainer    has been waiting for {waited:.1f} s, in", *lines[-5:]]))


def serve(demo: Demo, rank: int, store: Any) -> None:
    """Go on with something else until there are new weights, or none are to come."""
    say(demo, rank, "inference  serves")
    deadline = time.monotonic() + PATIENCE_S + demo.timeout_s
    while not store.check([PUBLISHED]):
        if time.monotonic() > deadline:
            sys.exit(f"rank {rank}: no checkpoint for {PATIENCE_S:.0f} s")
        time.sleep(0.02)
    if demo.incumbent:
        say(demo, rank, "inference  never got new weights")
    else:
        say(demo, rank, f"inference  hears of new weights: {store.get(PUBLISHED).decode()}")


def load_back(demo: Demo, rank: int) -> None:
    """Load the checkpoint as another job would: one process, Megatron-Core's own loader; compare every bit."""
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=rank, world_size=1)  # type: ignore[attr-defined]
    parallel_state.initialize_model_parallel()
    expected, model = make_model(1), make_model(1)
    train(expected)
    folder = str(demo.path / "iter_0000000")
    metadata = dist_checkpointing.load_content_metadata(folder)
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, folder)["model"]
    model.load_state_dict(loaded)
    compared = list(zip(expected.parameters(), model.parameters(), strict=True))
    if not all(torch.equal(one, other) for one, other in compared):
        sys.exit("what was loaded is not what was saved")
    print(f"\nMegatron-Core's own load, in a job of one process (TP=1): all {len(compared)} parameters, bit for bit.")


def make_model(tensor_parallel: int) -> Any:
    """A Llama in small; its global weights are the same however they are divided."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        kv_channels=HEAD_DIM,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        tensor_model_parallel_size=tensor_parallel,
        params_dtype=torch.bfloat16,
        bf16=True,
        use_cpu_initialization=True,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=1024,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    return model.to(torch.bfloat16)


def train(model: Any) -> None:
    """Something that changes every weight."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25).add_(0.5)


def inspect(demo: Demo) -> None:
    """What a user would type next."""
    print(f"\n$ shardway inspect {demo.path}", flush=True)
    subprocess.run([sys.executable, "-m", "shardway", "inspect", str(demo.path)], check=True)


def say(demo: Demo, rank: int, what: str) -> None:
    """Print something in one piece, with the time and who says it."""
    os.write(1, f"{time.monotonic() - demo.began:7.2f} s  rank {rank}  {what}\n".encode())


def run(demo: Demo, job: Job, ranks: tuple[int, ...]) -> None:
    """Run a job on every rank; ends the program unless all of them succeed, and leaves no process behind."""
    sys.stdout.flush()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=enter, args=(job, demo, rank)) for rank in ranks]
    deadline = time.monotonic() + PATIENCE_S + 2 * demo.timeout_s
    try:
        for process in processes:
            process.start()
        left = list(processes)
        while left and time.monotonic() < deadline and not any(process.exitcode for process in processes):
            multiprocessing.connection.wait([process.sentinel for process in left], timeout=1)
            left = [process for process in processes if process.exitcode is None]
        failed = [rank for rank, process in zip(ranks, processes, strict=True) if process.exitcode != 0]
    finally:
        for process in processes:
            if process.pid is not None:
                kill(process.pid)
                process.join()
    if failed:
        sys.exit(f"failed: ranks {', '.join(map(str, failed))}")
    if demo.incumbent:
        print("\nNo flag helps while one rank of the world stays away. Now the same without --incumbent.")


def enter(job: Job, demo: Demo, rank: int) -> None:
    """The beginning of a process: it ends with its parent, whatever becomes of that one."""
    import torch

    os.setsid()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=follow, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(1)
    job(demo, rank)


def follow(sentinel: int) -> None:
    """Wait for the end of the parent."""
    multiprocessing.connection.wait([sentinel])
    kill(os.getpid())


def kill(process: int) -> None:
    """End a process and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


if __name__ == "__main__":
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1"}
    warnings.simplefilter("ignore")
    main()
