"""NeMo RL's way of importing and exporting a model, with shardway's AutoBridge in the place of Megatron Bridge's.

`import_model_from_hf_name` and `export_model_from_megatron` make the calls that NeMo RL's functions of these names
make, in their order; what differs is the import of AutoBridge, and that a process group is made here. The import runs
on several ranks: each builds its part of a Megatron-Core model, fills it from the Hugging Face files, and saves it.

    python examples/nemo_rl_import.py                      a random model of 0.5 GB, tensor parallelism over two ranks
    python examples/nemo_rl_import.py --hf DIR --pp 2      your own

It needs torch and megatron-core, no GPU. Source: NVIDIA-NeMo/RL, nemo_rl/models/megatron/community_import.py.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

TIMEOUT_S = 600


def import_model_from_hf_name(
    hf_model_name: str,
    output_path: str,
    megatron_config: Mapping[str, Any] | None = None,
    model_post_wrap_hook: Callable[[Any], Any] | None = None,
    **config_overrides: Any,
) -> None:
    """Import a Hugging Face model into a Megatron checkpoint, by way of a live model on the ranks that call this."""
    from shardway import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(hf_model_name, trust_remote_code=True, **config_overrides)
    model_provider = bridge.to_megatron_provider(load_weights=True)

    sizes = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "pipeline_dtype",
    )
    original = {name: getattr(model_provider, name) for name in sizes}
    if megatron_config is not None:
        for name in (*sizes, "sequence_parallel", "gradient_accumulation_fusion"):
            setattr(model_provider, name, megatron_config[name])
    model_provider.finalize()
    model_provider.initialize_model_parallel(seed=0)
    megatron_model = model_provider.provide_distributed_model(wrap_with_ddp=False, post_wrap_hook=model_post_wrap_hook)

    # The parallelism of the import is none of the checkpoint's business.
    config: Any = megatron_model[0].config
    for name, value in original.items():
        setattr(config, name, value)
    bridge.save_megatron_model(megatron_model, output_path)
    reset_megatron_core()


def export_model_from_megatron(
    hf_model_name: str,
    input_path: str,
    output_path: str,
    hf_tokenizer_path: str,
    overwrite: bool = False,
    hf_overrides: Mapping[str, Any] | None = None,
) -> None:
    """Export a Megatron checkpoint to a Hugging Face directory, by way of a live model in this process."""
    del hf_tokenizer_path  # NeMo RL passes it, and takes the tokenizer of the model
    if os.path.exists(output_path) and not overwrite:
        raise FileExistsError(f"HF checkpoint already exists at {output_path}. Delete it or set overwrite=True.")

    from shardway import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(hf_model_name, trust_remote_code=True, **(hf_overrides or {}))
    with temporary_distributed_context():
        megatron_model = bridge.load_megatron_model(input_path, skip_temp_dist_context=True)
        if_exists: Any = "replace" if overwrite else "error"
        bridge.save_hf_pretrained(megatron_model, output_path, strict=True, if_exists=if_exists)
    reset_megatron_core()


@contextlib.contextmanager
def temporary_distributed_context() -> Iterator[None]:
    """A process group of this process alone, as Megatron Bridge makes one for an export on a CPU."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        if torch.cuda.is_available():
            model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def reset_megatron_core() -> None:
    """Leave no global state of megatron-core behind, for the training that follows in the same process."""
    from megatron.core import rerun_state_machine
    from megatron.core.tensor_parallel import random as tp_random

    rerun_state_machine.destroy_rerun_state_machine()
    tp_random._CUDA_RNG_STATE_TRACKER = None  # noqa: SLF001 - as NeMo RL does
    tp_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False  # noqa: SLF001


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf", type=Path, help="Hugging Face directory; by default a random model is made")
    parser.add_argument("--out", type=Path, help="where the results are kept; by default they are removed")
    parser.add_argument("--tp", type=int, default=2, help="tensor parallelism of the import (2)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallelism of the import (1)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.worker:
        work(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="shardway-") as scratch:
        out: Path = arguments.out or Path(scratch)
        hf: Path = arguments.hf or out / "model"
        if arguments.hf is None:
            demo = Path(__file__).with_name("demo.py")
            subprocess.run([sys.executable, str(demo), "--make", str(hf)], check=True, timeout=TIMEOUT_S)
        show(hf, out / "megatron", out / "exported", arguments)


def show(hf: Path, megatron: Path, exported: Path, arguments: argparse.Namespace) -> None:
    """Import on several ranks, export in this process, and compare with the original."""
    import shardway

    ranks = arguments.tp * arguments.pp
    print(f"import {hf} on {ranks} ranks (TP={arguments.tp}, PP={arguments.pp})", flush=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    worker = [__file__, "--worker", "--hf", str(hf), "--out", str(megatron)]
    sizes = ["--tp", str(arguments.tp), "--pp", str(arguments.pp)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([*launch, *worker, *sizes], check=True, timeout=TIMEOUT_S, env=environment)
    print(f"export {megatron}", flush=True)
    export_model_from_megatron(str(hf), str(megatron), str(exported), hf_tokenizer_path=str(hf))
    for result in (megatron, exported):
        report = shardway.verify(hf, result)
        print(f"{result.name}: {'bit for bit the same' if report.equal else 'NOT THE SAME'}", flush=True)
        if not report.equal:
            sys.exit(1)


def work(arguments: argparse.Namespace) -> None:
    """One rank of the import; a launcher has set RANK and WORLD_SIZE."""
    import torch.distributed as dist

    import_model_from_hf_name(
        str(arguments.hf),
        str(arguments.out),
        megatron_config={
            "tensor_model_parallel_size": arguments.tp,
            "pipeline_model_parallel_size": arguments.pp,
            "context_parallel_size": 1,
            "expert_model_parallel_size": 1,
            "expert_tensor_parallel_size": None,
            "num_layers_in_first_pipeline_stage": None,
            "num_layers_in_last_pipeline_stage": None,
            "pipeline_dtype": None,
            "sequence_parallel": False,
            "gradient_accumulation_fusion": False,
        },
        model_post_wrap_hook=show_size,
    )
    dist.destroy_process_group()


def show_size(chunks: Any) -> None:
    """Say how much of the model this rank has built, as a hook of one's own may."""
    import torch.distributed as dist

    count = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    print(f"rank {dist.get_rank()} holds {count:,} parameters", flush=True)


if __name__ == "__main__":
    main()
