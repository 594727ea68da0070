"""Real Megatron-Core training on CPU: ranks that take a step with the distributed optimizer and save it all.

Run as a script by `tests.ranks.test_training_checkpoints`, one process for each rank. What Megatron-Core takes from
CUDA is replaced in those processes alone.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Mapping


def _main(rank: int, folder: Path) -> None:
    import torch
    from tests.megatron import COLLECTIVE_TIMEOUT_SECONDS, _replace_cuda

    torch.set_num_threads(1)
    _replace_cuda()
    _replace_more_cuda()
    request = json.loads((folder / "request.json").read_text())
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=request["ranks"],
        timeout=dt.timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS),
    )
    with _on_cpu():
        for job in request["jobs"]:
            _train_and_save(job)
    torch.distributed.destroy_process_group()


def _replace_more_cuda() -> None:
    """Stand in for what the optimizer, its buffers and the save ask of CUDA."""
    import torch

    kind = torch.Tensor.type

    def type_as_on_cuda(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        found = kind(tensor, *arguments, **keywords)
        return "torch.cuda." + found.rpartition(".")[2] if isinstance(found, str) else found

    mock.patch.object(torch.Tensor, "type", type_as_on_cuda).start()
    mock.patch.object(torch.cuda, "synchronize", return_value=None).start()


def _on_cpu() -> Any:
    """Everything that is created in this context is created on the CPU."""
    from torch.overrides import TorchFunctionMode

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if kwargs and kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": "cpu"}
            return function(*args, **(kwargs or {}))

    return OnCpu()


def _train_and_save(job: Mapping[str, Any]) -> None:
    """Build, load, step, save; rank 0 also saves what the weights and their float32 copies are by then."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from tests.megatron import _build, _load

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=job["tensor_parallel"], pipeline_model_parallel_size=job["pipeline_parallel"]
    )
    model = _build(job)
    _load(model, {**job, "metadata": None})
    model = model.bfloat16().train()
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=job["distributed"]), model
    )
    config = OptimizerConfig(
        lr=1e-2, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=job["distributed"]
    )
    optimizer = get_megatron_optimizer(config, [wrapped])
    generator = torch.Generator().manual_seed(1 + parallel_state.get_tensor_model_parallel_rank())
    for parameter in wrapped.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    assert optimizer.step()[0]
    metadata = {**job["metadata"], "distrib_optim_sharding_type": job["sharding"]}
    state: dict[str, Any] = {"model": wrapped.module.sharded_state_dict(metadata=metadata)}
    state["optimizer"] = optimizer.sharded_state_dict(state, metadata=metadata)
    state |= _about_the_run(metadata)
    root = Path(job["destination"])
    if torch.distributed.get_rank() == 0:
        root.mkdir(parents=True)
    torch.distributed.barrier()
    _save(dist_checkpointing, state, root, metadata)
    parallel_state.destroy_model_parallel()


def _about_the_run(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What Megatron-LM saves beside model and optimizer."""
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    rank = torch.distributed.get_rank()
    size = torch.distributed.get_world_size()
    random = [{"torch_rng_state": torch.get_rng_state(), "rng_tracker_states": {}}]
    return {
        "checkpoint_version": 3.0,
        "iteration": 5,
        "num_floating_point_operations_so_far": 12.0,
        "opt_param_scheduler": {"max_lr": 1e-2, "num_steps": 5},
        "rng_state": ShardedObject("rng_state", random, (size,), (rank,)),
        "rerun_state_machine": ShardedObject("rerun_state_machine_state", {"mode": "disabled"}, (size,), (rank,)),
    }


def _save(dist_checkpointing: Any, state: Mapping[str, Any], root: Path, metadata: Mapping[str, Any]) -> None:
    dist_checkpointing.save(dict(state), str(root), content_metadata=dict(metadata))


if __name__ == "__main__":
    try:
        _main(int(sys.argv[1]), Path(sys.argv[2]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # at once: a peer may wait in a collective that this rank will never enter
