"""Real Megatron-Core processes on CPU that load checkpoints and answer with logits.

``run_jobs`` starts one process per rank (this file as a script), each of which builds megatron-core's GPTModel with the
local layer spec in float32, loads every checkpoint that it is given and runs a forward pass. What Megatron-Core takes
from CUDA is replaced in those processes alone. Nothing here imports shardway: it is the other side of the bargain.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt
    import torch

COLLECTIVE_TIMEOUT_SECONDS = 30
"""For every process group, so that a rank left alone gives up before its parent does."""
VOCABULARY_MULTIPLE = 128
"""Megatron-LM's default for --make-vocab-size-divisible-by, used wherever tensor parallelism splits the vocabulary."""

# Ways of computing the same that need a GPU or Transformer Engine.
_WITHOUT_CUDA = {
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "cross_entropy_loss_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_shared_expert_overlap": False,
    "moe_token_dispatcher_type": "allgather",
    "persist_layer_norm": False,
}

_GPT_ARGUMENTS = {
    "vocab_size": "vocab_size",
    "seq_length": "max_sequence_length",
    "position_embedding_type": "position_embedding_type",
    "rotary_base": "rotary_base",
    "rotary_percent": "rotary_percent",
    "rope_scaling": "rope_scaling",
    "rope_scaling_factor": "rope_scaling_factor",
    "seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "share_embeddings_and_output_weights": "share_embeddings_and_output_weights",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One checkpoint to load and run."""

    name: str
    checkpoint: Path
    """The directory with .metadata, that is iter_0000000."""
    fields: Mapping[str, Any]
    """What GPTModel and its TransformerConfig are built from, as ``megatron_fields`` returns it."""
    tokens: Sequence[Sequence[int]]
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    metadata: Mapping[str, bool] | None = None
    """Passed to ``sharded_state_dict``; None for the checkpoint's own ``content_metadata``, as Megatron-LM does."""
    wide_norms: bool = False
    """Whether query and key norms span all heads, as in Megatron Bridge's layers for OLMoE and MiniMax-M2."""

    @property
    def num_processes(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What Megatron-Core made of a checkpoint."""

    logits: npt.NDArray[np.float32]
    """[sequences, length, vocabulary], without the padding of the vocabulary."""
    missing: tuple[str, ...]
    """Keys of the checkpoint that no rank asked for."""
    unexpected: tuple[str, ...]
    """Keys that a rank asked for and the checkpoint lacks."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """Why there are no logits: tracebacks and output of the ranks."""

    report: str


def require(*modules: str) -> None:
    """Skip the calling test unless all of these can be imported; none of them is."""
    import pytest

    for module in modules:
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            pytest.skip(f"needs {module}")


def megatron_fields(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The Megatron-Core fields of a Llama, Mistral, Qwen2 or Qwen3 config.json: a second opinion on shardway's mapping.

    Raises:
        ValueError: the family is none of these, or the rope is of a kind that GPTModel of 0.16.1 cannot express.
    """
    family = hf_config["model_type"]
    if family not in {"llama", "mistral", "qwen2", "qwen3"}:
        raise ValueError(f"no such family here: {family}")
    num_heads = hf_config["num_attention_heads"]
    rope = {"rope_type": "default"} | dict(hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {})
    fields = {
        "num_layers": hf_config["num_hidden_layers"],
        "hidden_size": hf_config["hidden_size"],
        "ffn_hidden_size": hf_config["intermediate_size"],
        "num_attention_heads": num_heads,
        "num_query_groups": hf_config.get("num_key_value_heads") or num_heads,
        "kv_channels": hf_config.get("head_dim") or hf_config["hidden_size"] // num_heads,
        "vocab_size": hf_config["vocab_size"],
        "seq_length": hf_config["max_position_embeddings"],
        "layernorm_epsilon": hf_config["rms_norm_eps"],
        "init_method_std": hf_config["initializer_range"],
        "share_embeddings_and_output_weights": hf_config["tie_word_embeddings"],
        "position_embedding_type": "rope",
        "rotary_base": rope.get("rope_theta") or hf_config["rope_theta"],
        "rotary_percent": hf_config.get("partial_rotary_factor", 1.0),
        "add_qkv_bias": family == "qwen2" or bool(hf_config.get("attention_bias")),
        "add_bias_linear": bool(hf_config.get("mlp_bias")),
        "qk_layernorm": family == "qwen3",
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": hf_config["hidden_act"],
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if family == "mistral" and hf_config.get("sliding_window"):
        # A query sees `sliding_window` keys there, its own included; here so many to its left and right.
        fields["window_size"] = [hf_config["sliding_window"] - 1, 0]
    if rope["rope_type"] == "llama3":
        fixed: dict[str, object] = {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if any(rope[name] != value for name, value in fixed.items()):
            raise ValueError(f"GPTModel takes {fixed} for granted, the config says {rope}")
        fields |= {"rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    elif rope["rope_type"] == "linear":
        fields["seq_len_interpolation_factor"] = rope["factor"]
    elif rope["rope_type"] == "yarn":
        fields |= {
            "position_embedding_type": "yarn",
            "yarn_rotary_scaling_factor": rope["factor"],
            "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
            "yarn_beta_fast": rope.get("beta_fast", 32.0),
            "yarn_beta_slow": rope.get("beta_slow", 1.0),
            "yarn_mscale": rope.get("mscale"),
            "yarn_mscale_all_dim": rope.get("mscale_all_dim"),
            "yarn_correction_range_round_to_int": rope.get("truncate", True),
        }
    elif rope["rope_type"] != "default":
        raise ValueError(f"no rope of this type here: {rope['rope_type']}")
    return fields


def run_jobs(jobs: Sequence[Job], scratch: Path, *, deadline_seconds: float = 90) -> dict[str, Loaded | Failed]:
    """Load and run every job, those of one world size in the same processes, one after the other.

    A job that fails ends its processes; the jobs after it run in new ones. No process is left when this returns.

    Args:
        jobs: with names that differ.
        scratch: an existing empty directory, for requests, outputs and answers.
        deadline_seconds: for all the processes of one world size, after which they are killed.

    Returns:
        What became of each job, by its name.
    """
    outcomes: dict[str, Loaded | Failed] = {}
    for num_processes in sorted({job.num_processes for job in jobs}):
        waiting = [job for job in jobs if job.num_processes == num_processes]
        deadline = time.monotonic() + deadline_seconds
        attempt = 0
        while waiting:
            folder = scratch / f"ranks{num_processes}_attempt{attempt}"
            folder.mkdir()
            attempt += 1
            done = _run_together(waiting, num_processes, folder, deadline)
            outcomes |= done
            waiting = waiting[len(done) :]
    return outcomes


def _run_together(jobs: Sequence[Job], num_processes: int, folder: Path, deadline: float) -> dict[str, Loaded | Failed]:
    """Run jobs until one fails; the failed one is the last of those returned."""
    requests = [{**dataclasses.asdict(job), "checkpoint": str(job.checkpoint)} for job in jobs]
    (folder / "jobs.json").write_text(json.dumps(requests))
    why = _run_ranks(num_processes, folder, deadline)
    outcomes: dict[str, Loaded | Failed] = {}
    for index, job in enumerate(jobs):
        answer = folder / f"{index}.json"
        if not answer.exists():
            outcomes[job.name] = Failed(report=f"{job.name}: {why}\n{_outputs(folder, num_processes)}")
            break
        keys = json.loads(answer.read_text())
        outcomes[job.name] = Loaded(
            logits=np.load(folder / f"{index}.npy"),
            missing=tuple(keys["missing"]),
            unexpected=tuple(keys["unexpected"]),
        )
    return outcomes


def _run_ranks(num_processes: int, folder: Path, deadline: float) -> str:
    """Start every rank, wait for all of them, kill what is left; returns what there is to say of how they ended."""
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "TORCHDYNAMO_DISABLE": "1",  # Megatron-Core compiles its fused functions, for minutes on a CPU
    }
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(num_processes):
            with (folder / f"rank{rank}.log").open("wb") as log:
                # -P keeps this folder out of sys.path, where this file would pass for the megatron package.
                command = [sys.executable, "-P", __file__, str(rank), str(num_processes), str(folder)]
                ranks.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True))
        while any(process.poll() is None for process in ranks):
            if any(process.poll() for process in ranks):
                break
            if time.monotonic() > deadline:
                return "killed at the deadline"
            time.sleep(0.02)
        return f"the processes ended with {[process.poll() for process in ranks]}"
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _outputs(folder: Path, num_processes: int) -> str:
    return "\n".join(
        f"--- rank {rank}\n{(folder / f'rank{rank}.log').read_text(errors='replace')}" for rank in range(num_processes)
    )


# What follows runs in the ranks.


def _main(rank: int, num_processes: int, folder: Path) -> None:
    import datetime as dt

    import torch

    torch.set_num_threads(1)
    _replace_cuda()
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_processes,
        timeout=dt.timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS),
    )
    for index, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        logits, missing, unexpected = _load_and_run(job)
        everything: list[list[str] | None] = [None] * num_processes
        torch.distributed.all_gather_object(everything, sorted(unexpected))
        if rank == num_processes - 1:
            if logits is None:
                raise RuntimeError("the last rank has no logits")
            np.save(folder / f"{index}.npy", logits.numpy())
            keys = {
                "missing": sorted(missing),
                "unexpected": sorted({key for keys in everything for key in keys or ()}),
            }
            (folder / f"{index}.json.part").write_text(json.dumps(keys))
            (folder / f"{index}.json.part").rename(folder / f"{index}.json")
    torch.distributed.destroy_process_group()


def _replace_cuda() -> None:
    """Stand in for what Megatron-Core asks of CUDA while it builds, loads and runs a model."""
    import contextlib

    import torch
    from megatron.core import tensor_parallel
    from megatron.core.fusions import fused_softmax
    from megatron.core.transformer import multi_latent_attention, torch_norm
    from megatron.core.transformer.moe import moe_utils
    from torch.overrides import TorchFunctionMode

    class NoGenerators:
        def fork(self, *_: object) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if kwargs and "device" in kwargs:
                kwargs = {**kwargs, "device": "cpu"}
            return function(*args, **(kwargs or {}))

    window_mask = fused_softmax.get_sliding_window_causal_mask

    def window_mask_on_cpu(*args: Any) -> Any:
        with OnCpu():
            return window_mask(*args)

    torch_norm_of = torch_norm.WrappedTorchNorm.__new__

    class OverOnePlus(torch.nn.RMSNorm):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(hidden, self.normalized_shape, 1 + self.weight, self.eps)

    def norm(cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, **others: Any) -> Any:
        if config.layernorm_zero_centered_gamma and config.normalization == "RMSNorm":
            return OverOnePlus(hidden_size, eps)
        return torch_norm_of(cls, config, hidden_size, eps, **others)

    mock.patch.object(torch.cuda, "current_device", return_value=torch.device("cpu")).start()
    mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor).start()
    mock.patch.object(tensor_parallel, "get_cuda_rng_tracker", NoGenerators).start()
    mock.patch.object(torch_norm.WrappedTorchNorm, "__new__", norm).start()
    mock.patch.object(moe_utils, "te_general_gemm", None, create=True).start()
    mock.patch.object(multi_latent_attention, "TELinear", type("TELinear", (), {})).start()
    mock.patch.object(fused_softmax, "get_sliding_window_causal_mask", window_mask_on_cpu).start()


def _load_and_run(job: Mapping[str, Any]) -> tuple[torch.Tensor | None, set[str], set[str]]:
    """Logits on the last pipeline stage, missing and unexpected keys."""
    import torch
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=job["tensor_parallel"],
        pipeline_model_parallel_size=job["pipeline_parallel"],
        distributed_timeout_minutes=COLLECTIVE_TIMEOUT_SECONDS / 60,
    )
    try:
        model = _build(job)
        missing, unexpected = _load(model, job)
        with torch.no_grad():
            return _forward(model, job), missing, unexpected
    finally:
        parallel_state.destroy_model_parallel()


def _build(job: Mapping[str, Any]) -> Any:
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    fields = dict(job["fields"])
    arguments = {name: fields.pop(field) for field, name in _GPT_ARGUMENTS.items() if field in fields}
    kind = TransformerConfig
    if fields.get("multi_latent_attention"):
        kind = MLATransformerConfig
        fields |= {field: arguments[field] for field in ("rotary_base", "rotary_percent") if field in arguments}
    if job["tensor_parallel"] > 1:
        multiple = VOCABULARY_MULTIPLE * job["tensor_parallel"]
        arguments["vocab_size"] = -(-arguments["vocab_size"] // multiple) * multiple
    activation = _activation(fields.pop("activation_func"))
    attributes = {field: fields.pop(field) for field in list(fields) if field.startswith("yarn_")}
    fields |= {field: value for field, value in _WITHOUT_CUDA.items() if field in fields}
    pattern = fields.pop("hybrid_layer_pattern", None)
    fields.pop("mamba_chunk_size", None)  # of the kernel
    unknown = sorted(fields.keys() - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(f"neither GPTModel nor {kind.__name__} knows {unknown}")
    config = kind(
        **fields,
        activation_func=activation,
        tensor_model_parallel_size=job["tensor_parallel"],
        pipeline_model_parallel_size=job["pipeline_parallel"],
        pipeline_dtype=torch.float32,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
    )
    for name, value in attributes.items():  # GPTModel reads these from the config, which has no fields for them
        setattr(config, name, value)
    if pattern is not None:
        return _unset(_hybrids().mamba_model(config, pattern, arguments))
    if config.num_moe_experts or config.multi_latent_attention or config.experimental_attention_variant:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    if job["wide_norms"]:
        _widen_norms(spec.layer_specs)
    if config.experimental_attention_variant == "gated_delta_net":
        spec = _hybrids().with_delta_nets(spec, config)
    if config.multi_latent_attention:
        _attend(spec.layer_specs)
    predicting = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if config.mtp_num_layers else None
    model = GPTModel(
        config,
        spec,
        mtp_block_spec=predicting,
        parallel_output=False,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        **arguments,
    )
    return _unset(model)


def _unset(model: Any) -> Any:
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # what a load leaves out must not pass for a weight
    return model.eval()


def _hybrids() -> Any:
    """The module beside this file, which is no package's in a rank."""
    spec = importlib.util.spec_from_file_location("megatron_hybrids", Path(__file__).with_name("megatron_hybrids.py"))
    if spec is None or spec.loader is None:
        raise ImportError("megatron_hybrids.py is not beside this file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def _widen_norms(layers: Sequence[Any]) -> None:
    """Stand in for the layers that Megatron Bridge has for such models: norms over all query or key heads at once."""
    import torch

    class OverAllHeads(torch.nn.RMSNorm):
        def forward(self, heads: torch.Tensor) -> torch.Tensor:
            return super().forward(heads.flatten(-2)).view_as(heads)

    class OfQueries:
        def __new__(cls, *, config: Any, hidden_size: int, eps: float) -> Any:
            return OverAllHeads(config.num_attention_heads * hidden_size, eps)

    class OfKeys:
        def __new__(cls, *, config: Any, hidden_size: int, eps: float) -> Any:
            return OverAllHeads(config.num_query_groups * hidden_size, eps)

    for layer in layers:
        layer.submodules.self_attention.submodules.q_layernorm = OfQueries
        layer.submodules.self_attention.submodules.k_layernorm = OfKeys


def _attend(layers: Sequence[Any]) -> None:
    """Stand in for Transformer Engine's attention: megatron-core's own has no heads of different sizes (0.16.1)."""
    import torch

    class Attention(torch.nn.Module):
        def __init__(self, *, softmax_scale: float, **_: Any) -> None:
            super().__init__()
            self.scale = softmax_scale

        def forward(self, query: Any, key: Any, value: Any, attention_mask: Any, **_: Any) -> torch.Tensor:
            scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * self.scale
            weights = scores.masked_fill(attention_mask, -torch.inf).softmax(dim=-1)
            return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)

    for layer in layers:
        layer.submodules.self_attention.submodules.core_attention = Attention


def _activation(name: str) -> Any:
    """The function that a config's ``activation_func`` names, as `TransformerConfig` wants it."""
    import torch
    from megatron.core.activations import fast_gelu, quick_gelu, squared_relu

    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "fast_gelu": fast_gelu,
        "quick_gelu": quick_gelu,
        "squared_relu": squared_relu,
    }
    return functions[name]


def _load(model: Any, job: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Load under the default strictness, into the model, and once more to hear of keys without a partner."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    metadata = job["metadata"]
    if metadata is None:
        metadata = dist_checkpointing.load_content_metadata(job["checkpoint"])

    def wanted() -> dict[str, Any]:
        return {"model": model.sharded_state_dict(metadata=dict(metadata))}

    model.load_state_dict(dist_checkpointing.load(wanted(), job["checkpoint"])["model"])
    _, missing, unexpected = dist_checkpointing.load(wanted(), job["checkpoint"], strict=StrictHandling.RETURN_ALL)
    return missing, unexpected


def _forward(model: Any, job: Mapping[str, Any]) -> torch.Tensor | None:
    import torch
    from megatron.core import parallel_state

    tokens = torch.tensor(job["tokens"])
    num_sequences, length = tokens.shape
    positions = torch.arange(length).expand(num_sequences, length)
    mask = torch.ones(length, length, dtype=torch.bool).triu(diagonal=1).view(1, 1, length, length)
    if not parallel_state.is_pipeline_first_stage():
        hidden = torch.empty(length, num_sequences, model.config.hidden_size)
        torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    if model.config.mtp_num_layers:  # loaded all the same; without labels they can't run
        model.mtp_process, model.config.mtp_num_layers = False, None
    output = model(tokens, positions, mask)
    if not parallel_state.is_pipeline_last_stage():
        torch.distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    logits = output[..., : job["fields"]["vocab_size"]].contiguous()
    return logits if isinstance(logits, torch.Tensor) else None


if __name__ == "__main__":
    try:
        _main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # at once: a peer may wait in a collective that this rank will never enter
