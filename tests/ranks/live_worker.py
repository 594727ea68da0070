"""A rank of the live tests: builds a model, announces what it holds, writes its part, or loads a checkpoint back.

Run as a script by `run_world`, once for each rank. Values are a function of a tensor's key and global index, worked
out here from megatron-core's own description of the shards.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 30

DENSE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "vocab_size": 64,
    "seq_length": 32,
    "share_embeddings_and_output_weights": False,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "silu",
}
MODELS: dict[str, dict[str, Any]] = {
    "untied": DENSE,
    "tied": DENSE | {"share_embeddings_and_output_weights": True, "qk_layernorm": True},
    "biases": DENSE | {"add_qkv_bias": True, "add_bias_linear": True},
    "layernorm": DENSE | {"normalization": "LayerNorm", "gated_linear_unit": False, "num_query_groups": 4},
    "moe": DENSE | {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 16, "num_layers": 2},
    "mixed": DENSE
    | {"num_moe_experts": 4, "moe_ffn_hidden_size": 16, "moe_layer_freq": [0, 1, 1, 1], "moe_router_topk": 2},
}


def run_world(
    tasks: Sequence[Mapping[str, Any]], num_ranks: int, folder: Path, *, deadline_seconds: float = 90
) -> None:
    """Run every task on every rank, one after the other; none of the processes is left when this returns.

    Args:
        tasks: What to do; ``action`` names a function of this module, ``folder`` is where it leaves its answers.
        num_ranks: Processes.
        folder: A scratch folder.
        deadline_seconds: After which all of them are killed.

    Raises:
        AssertionError: With the output of every rank, when one of them fails or is late.
    """
    folder.mkdir(parents=True)
    (folder / "tasks.json").write_text(json.dumps(list(tasks), default=str))
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
        "PYTHONWARNINGS": "ignore",
        "TORCHDYNAMO_DISABLE": "1",
    }
    deadline = time.monotonic() + deadline_seconds
    ranks: list[subprocess.Popen[bytes]] = []
    late = False
    try:
        for rank in range(num_ranks):
            with (folder / f"rank{rank}.log").open("wb") as log:
                command = [sys.executable, "-P", __file__, str(rank), str(num_ranks), str(folder)]
                ranks.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True))
        while any(process.poll() is None for process in ranks) and not any(process.poll() for process in ranks):
            late = time.monotonic() > deadline
            if late:
                break
            time.sleep(0.02)
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    outputs = [f"--- rank {rank}\n{(folder / f'rank{rank}.log').read_text()}" for rank in range(num_ranks)]
    assert not late, "\n".join(["killed at the deadline", *outputs])
    assert not any(process.returncode for process in ranks), "\n".join(outputs)


# What follows runs in the ranks.


def _main(rank: int, num_ranks: int, folder: Path) -> None:
    import datetime as dt

    import torch
    from tests.megatron import _replace_cuda

    torch.set_num_threads(1)
    _replace_cuda()
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_ranks,
        timeout=dt.timedelta(seconds=TIMEOUT_SECONDS),
    )
    for task in json.loads((folder / "tasks.json").read_text()):
        Path(task["folder"]).mkdir(parents=True, exist_ok=True)
        globals()[task["action"]](task, rank, num_ranks)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def save_megatron(task: Mapping[str, Any], rank: int, num_ranks: int) -> None:
    """Make records, without communicating and without waiting for the ranks that come later; write the main ones."""
    from tests.collectives import collectives_forbidden

    from shardway.live.megatron import megatron_state
    from shardway.live.writer import write_shards

    folder = Path(task["folder"])
    with _parallel(task):
        chunks = _build(task)
        if "checkpoint" in task:
            _load(chunks, task)
        else:
            for described in _described(chunks, task):
                _pattern(described, described.data)
        _wait_for(folder / f"{rank - 1}.pickle" if rank else None)
        with collectives_forbidden():
            state = megatron_state(_wrapped(chunks), metadata=task.get("metadata"))
            state = state.trimmed({key: tuple(shape) for key, shape in task.get("trim", {}).items()})
        own = [
            (one.key, tuple(one.global_offset), tuple(one.global_shape), _is_main(one))
            for one in _described(chunks, task)
        ]
        answer = {
            "shards": state.shards,
            "objects": state.objects,
            "content_metadata": state.content_metadata,
            "resizable": state.resizable,
            "left_out": state.left_out,
            "own": own,
            "own_objects": [(one.unique_key, _is_main(one)) for one in _objects(chunks, task)],
        }
        part = folder / f"{rank}.part"
        part.write_bytes(pickle.dumps(answer))
        part.rename(folder / f"{rank}.pickle")
        _validate(chunks, task)
        checkpoint = folder / "iter_0000000"
        checkpoint.mkdir(exist_ok=True)
        main = [shard for shard in state.shards if not shard.replica]
        objects = [item for item in state.objects if not item.replica]
        result = write_shards(
            state, main, objects, checkpoint, rank=rank, on_progress=lambda _: None, fsync=False, num_files=2
        )
        (folder / f"{rank}.result").write_bytes(result.to_bytes())


def load_megatron(task: Mapping[str, Any], rank: int, num_ranks: int) -> None:
    """Load a checkpoint under the default strictness, and compare every element with the pattern."""
    import torch

    with _parallel(task):
        chunks = _build(task)
        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.fill_(torch.nan)
        _load(chunks, task)
        for described in _described(chunks, task):
            expected = torch.empty_like(described.data)
            _pattern(described, expected)
            assert torch.equal(described.data, expected), described.key


def save_plain(task: Mapping[str, Any], rank: int, num_ranks: int) -> None:
    """Make records of a plain torch model without communicating; each part is written by its lowest replica."""
    import torch
    from tests.collectives import CollectiveCalledError, collectives_forbidden
    from torch.distributed.tensor import DTensor

    from shardway.live.dtensor import dtensor_state
    from shardway.live.writer import write_shards

    folder = Path(task["folder"])
    model = _plain_model(task["kind"], num_ranks)
    _wait_for(folder / f"{rank - 1}.pickle" if rank else None)
    with collectives_forbidden():
        state = dtensor_state(model, rank=rank)
        sharded = [value for value in model.state_dict().values() if isinstance(value, DTensor)]
        for value in sharded[:1]:
            try:
                value.full_tensor()
            except CollectiveCalledError:
                continue
            raise AssertionError("a collective was called and nobody noticed")
    part = folder / f"{rank}.part"
    part.write_bytes(pickle.dumps(state.shards))
    part.rename(folder / f"{rank}.pickle")
    _wait_for(folder / f"{num_ranks - 1}.pickle")
    if not rank:
        torch.save(_plain_model("whole", num_ranks).state_dict(), folder / "full.pt")
    lowest: dict[Any, int] = {}
    for other in range(num_ranks):
        for shard in pickle.loads((folder / f"{other}.pickle").read_bytes()):
            lowest[shard[:-1]] = min(lowest.get(shard[:-1], shard.replica), shard.replica)
    mine = [shard for shard in state.shards if lowest[shard[:-1]] == shard.replica]
    (folder / "iter_0000000").mkdir(exist_ok=True)
    result = write_shards(state, mine, [], folder / "iter_0000000", rank=rank, on_progress=lambda _: None, fsync=False)
    (folder / f"{rank}.result").write_bytes(result.to_bytes())


def _plain_model(kind: str, num_ranks: int) -> Any:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 13))
    model.append(nn.Linear(13, 1))  # fewer rows than ranks: most ranks hold nothing
    model.append(nn.Linear(1, 1))
    model.register_buffer("steps", torch.tensor(12))
    if kind == "plain":
        model[6].bias = model[5].bias  # tied: one parameter under two names
    if kind in ("plain", "whole"):
        return model
    if kind == "fsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (num_ranks,)))
    if kind == "hsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (2, num_ranks // 2), mesh_dim_names=("r", "s")))
    mesh = init_device_mesh("cpu", (num_ranks // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"]) if kind == "fsdp_tp" else model


def _parallel(task: Mapping[str, Any]) -> Any:
    import contextlib

    from megatron.core import parallel_state

    @contextlib.contextmanager
    def initialised() -> Iterator[None]:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=task.get("tp", 1),
            pipeline_model_parallel_size=task.get("pp", 1),
            virtual_pipeline_model_parallel_size=task.get("vpp"),
            expert_model_parallel_size=task.get("ep", 1),
            expert_tensor_parallel_size=1 if "ep" in task else None,
            distributed_timeout_minutes=TIMEOUT_SECONDS / 60,
        )
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()

    return initialised()


def _build(task: Mapping[str, Any]) -> list[Any]:
    """The pipeline chunks of this rank."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
    )
    from megatron.core.transformer import TransformerConfig
    from tests.megatron import _GPT_ARGUMENTS

    fields = dict(MODELS[task["model"]] if isinstance(task["model"], str) else task["model"])
    arguments = {name: fields.pop(field) for field, name in _GPT_ARGUMENTS.items() if field in fields}
    fields["activation_func"] = {"silu": torch.nn.functional.silu}[fields["activation_func"]]
    dtype = getattr(torch, task.get("dtype", "float32"))
    config = TransformerConfig(
        **fields,
        tensor_model_parallel_size=task.get("tp", 1),
        pipeline_model_parallel_size=task.get("pp", 1),
        virtual_pipeline_model_parallel_size=task.get("vpp"),
        expert_model_parallel_size=task.get("ep", 1),
        expert_tensor_parallel_size=1 if "ep" in task else None,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=True,
    )
    chunks = []
    for stage in range(task.get("vpp") or 1):
        vp_stage = stage if task.get("vpp") else None
        if isinstance(config.moe_layer_freq, list):
            spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage)
        else:
            spec = get_gpt_layer_local_spec(
                num_experts=config.num_moe_experts,
                qk_layernorm=config.qk_layernorm,
                normalization=config.normalization,
            )
        model = GPTModel(
            config,
            spec,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
            **arguments,
        )
        chunks.append(model.to(dtype))  # norms of the local spec are float32 otherwise, as before Float16Module
    return chunks


def _wrapped(chunks: Sequence[Any]) -> Any:
    """As a trainer holds them: in wrappers, one alone or a list."""
    import torch

    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    wrapped = [Wrapper(Wrapper(chunk)) for chunk in chunks]
    return wrapped[0] if len(wrapped) == 1 else wrapped


def _state_dict(chunks: Sequence[Any], task: Mapping[str, Any]) -> dict[str, Any]:
    """As Megatron-LM's own save and load form it."""
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    metadata = {"singleton_local_shards": False} | (task.get("metadata") or {})
    return {name: chunk.sharded_state_dict(metadata=dict(metadata)) for name, chunk in zip(names, chunks, strict=True)}


def _described(chunks: Sequence[Any], task: Mapping[str, Any]) -> list[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state_dict = _state_dict(chunks, task)
    apply_factories(state_dict)
    return [value for value in nested_values(state_dict) if isinstance(value, ShardedTensor)]


def _objects(chunks: Sequence[Any], task: Mapping[str, Any]) -> list[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return [value for value in nested_values(_state_dict(chunks, task)) if isinstance(value, ShardedObject)]


def _is_main(described: Any) -> bool:
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    return bool(is_main_replica(described.replica_id))


def _validate(chunks: Sequence[Any], task: Mapping[str, Any]) -> None:
    """megatron-core's own check that the main replicas of all ranks cover everything once (a collective)."""
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

    save_preprocess(_state_dict(chunks, task), validate_access_integrity=True)


def _load(chunks: Sequence[Any], task: Mapping[str, Any]) -> None:
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(_state_dict(chunks, task), task["checkpoint"])
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded["model" if len(chunks) == 1 else f"model{number}"])


def _pattern(described: Any, target: torch.Tensor) -> None:
    import torch

    expected = pattern(described.key, tuple(described.global_shape))
    box = tuple(
        slice(start, start + size)
        for start, size in zip(
            described.global_offset, (1,) * described.prepend_axis_num + tuple(described.local_shape), strict=True
        )
    )
    with torch.no_grad():
        target.copy_(expected[box].reshape(described.local_shape))


def pattern(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The global tensor of a key: no two elements of a small tensor are alike, and no two keys either."""
    import math

    import torch

    numbers = torch.arange(math.prod(shape)) + zlib.crc32(key.encode()) % 65_521
    return (numbers * 7919 % 16_777_213).to(torch.float32).reshape(shape)


def _wait_for(path: Path | None) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while path is not None and not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.005)


if __name__ == "__main__":
    try:
        _main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # at once: a peer may wait in a collective that this rank will never enter
