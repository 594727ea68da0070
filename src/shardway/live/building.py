"""Building megatron-core models from a translated config.

This module imports megatron-core beside megatron.py: what is saved and loaded needs no model class, and building one
needs nothing of what describes it.

Source: megatron/core/models/gpt/gpt_model.py, gpt_layer_specs.py (0.16.1); names as in Megatron Bridge's providers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import activations, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.module import Float16Module

from shardway.core.errors import Code, Problem, Problems, ShardwayError
from shardway.families.config import HFConfig
from shardway.families.mapping import map_model, variants_in
from shardway.formats.huggingface import CONFIG_FILE, open_huggingface
from shardway.formats.quantised import present
from shardway.formats.torch_dist import open_torch_dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import nn

_ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "fast_gelu": activations.fast_gelu,
    "quick_gelu": activations.quick_gelu,
    "squared_relu": activations.squared_relu,
}
# Arguments of GPTModel, and what they are when nothing says otherwise.
_MODEL_ARGUMENTS: dict[str, object] = {
    "vocab_size": None,
    "seq_length": 4096,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "seq_len_interpolation_factor": None,
    "share_embeddings_and_output_weights": False,
    "parallel_output": True,
    "fp16_lm_cross_entropy": False,
}
# Megatron's padding of the vocabulary, which Megatron Bridge leaves off unless it is asked for.
_PADDING: dict[str, object] = {"make_vocab_size_divisible_by": 128, "should_pad_vocab": False}
# GPTModel reads these from the config, which has no fields for them.
_CONFIG_ATTRIBUTES = ("yarn_",)
# What megatron-core's own layers have no kernels for.
_WITHOUT_TRANSFORMER_ENGINE = {"moe_grouped_gemm": False, "moe_permute_fusion": False, "apply_rope_fusion": False}
# The dispatcher that megatron-core has for a CPU; the other makes CUDA streams, and alone can overlap shared experts.
_WITHOUT_GPU = {"moe_token_dispatcher_type": "allgather", "moe_shared_expert_overlap": False}
_SIZES = {
    "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size,
    "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size,
    "virtual_pipeline_model_parallel_size": parallel_state.get_virtual_pipeline_model_parallel_world_size,
    "context_parallel_size": parallel_state.get_context_parallel_world_size,
    "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size,
    "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size,
}


class MegatronProvider:
    """A model that is to be built: the fields of its megatron-core config and of GPTModel, as attributes.

    Attributes are read and set under megatron-core's names (``tensor_model_parallel_size``, ``pipeline_dtype``,
    ``recompute_granularity``); a name that it doesn't know is refused. `finalize` checks them together, and
    `provide_distributed_model` builds this rank's part.

    Args:
        fields: What the Hugging Face config says (`ModelMapping.megatron_config`).
        dtype: Of the parameters.
        load: Loads weights into the chunks that were built; None for random ones.
    """

    def __init__(
        self,
        fields: Mapping[str, object],
        *,
        dtype: torch.dtype,
        load: Callable[[Sequence[nn.Module]], object] | None = None,
    ) -> None:
        kind = MLATransformerConfig if "kv_lora_rank" in fields else TransformerConfig
        known = {
            field.name: None if field.default is dataclasses.MISSING else field.default
            for field in dataclasses.fields(kind)
        }
        store = self.__dict__
        store["_kind"] = kind
        store["_of_config"] = frozenset(known)
        store["_load"] = load
        store["_config"] = None
        store["_given"] = set()
        store["_fields"] = known | _MODEL_ARGUMENTS | _PADDING
        defaults = {
            "params_dtype": dtype,
            "bf16": dtype is torch.bfloat16,
            "fp16": dtype is torch.float16,
            "use_cpu_initialization": not torch.cuda.is_available(),
            "perform_initialization": load is None,
        }
        if not has_transformer_engine():
            defaults |= {name: value for name, value in _WITHOUT_TRANSFORMER_ENGINE.items() if name in fields}
        if not torch.cuda.is_available():
            defaults |= {name: value for name, value in _WITHOUT_GPU.items() if name in fields}
        problems = Problems()
        for name, value in {**fields, **defaults}.items():
            try:
                setattr(self, name, value)
            except ShardwayError as error:
                problems.extend(error.problems)
        problems.raise_if_any()

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__.get("_fields", {})
        if name not in fields:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        return fields[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._fields and not name.startswith(_CONFIG_ATTRIBUTES):
            what = f"megatron-core knows no field {name!r} of a GPT model's config"
            cure = "check the name against the megatron-core that is installed"
            raise ShardwayError(Problem(code=Code.OPTION_INVALID, what=what, cure=cure))
        if name == "activation_func" and isinstance(value, str):
            if value not in _ACTIVATIONS:
                what = f"activation_func {value!r} is none of {', '.join(sorted(_ACTIVATIONS))}"
                raise ShardwayError(Problem(code=Code.OPTION_INVALID, what=what))
            value = _ACTIVATIONS[value]
        if name == "window_size" and isinstance(value, list):
            value = tuple(value)
        self._fields[name] = value
        self._given.add(name)
        self.__dict__["_config"] = None

    def adopt_sizes(self) -> None:
        """Take the parallel sizes of megatron-core's process groups, where there are any.

        *Ranks*: local.
        """
        if parallel_state.is_initialized():
            for name, size_of in _SIZES.items():
                setattr(self, name, size_of())

    def finalize(self) -> None:
        """Check all fields together; `provide_distributed_model` does so too.

        Raises:
            ShardwayError: `option-invalid` with what megatron-core says.

        *Ranks*: local.
        """
        self.transformer_config()

    def transformer_config(self) -> TransformerConfig:
        """The config that the model's chunks share; made anew after any field was set."""
        if self._config is not None:
            return self._config
        fields = {name: self._fields[name] for name in self._of_config & self._given}
        if self.pipeline_model_parallel_size > 1 and self.pipeline_dtype is None:
            fields["pipeline_dtype"] = self.params_dtype
        with _refusals("refuses this config"):
            config = self._kind(**fields)
        for name, value in self._fields.items():
            if name.startswith(_CONFIG_ATTRIBUTES):
                setattr(config, name, value)
        self.__dict__["_config"] = config
        return config

    def initialize_model_parallel(self, seed: int | None = None, **others: Any) -> None:
        """Make megatron-core's process groups for the sizes that are set, and `torch.distributed`'s where it has none.

        Without a process group and without a launcher's environment (``RANK``, ``WORLD_SIZE``), this process is alone.

        Args:
            seed: Of the random numbers, where given.
            others: Further arguments of `parallel_state.initialize_model_parallel`.

        *Ranks*: all of the job, as always when groups are made.
        """
        self.finalize()
        if not dist.is_initialized():
            _initialise_distributed()
        sizes = {name: self._fields[name] for name in _SIZES if self._fields[name] is not None}
        parallel_state.initialize_model_parallel(**sizes, **others)
        if seed is not None:
            torch.manual_seed(seed)
            if torch.cuda.is_available():
                tensor_parallel.model_parallel_cuda_manual_seed(seed)

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> GPTModel:
        """One chunk of the model, of random or unset weights, as megatron-core builds it.

        Args:
            pre_process: Whether it has the embedding; by default where the pipeline begins.
            post_process: Whether it has the output layer; by default where the pipeline ends.
            vp_stage: Number of the chunk on this rank, with virtual pipeline stages.

        Raises:
            ShardwayError: `option-invalid` for attention of a kind that isn't built here.

        *Ranks*: local, but that megatron-core sums the tied embedding over its two stages, where there are two.
        """
        config = self.transformer_config()
        variant = getattr(config, "experimental_attention_variant", None)
        if variant is not None:
            raise _not_built(f"megatron-core's experimental attention ({variant})")
        engine = has_transformer_engine()
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=engine, normalization=config.normalization, vp_stage=vp_stage
        )
        mtp = None
        if config.mtp_num_layers:
            mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=engine, vp_stage=vp_stage)
        if pre_process is None:
            pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        if post_process is None:
            post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        arguments = {name: self._fields[name] for name in _MODEL_ARGUMENTS}
        return GPTModel(
            config,
            spec,
            vocab_size=padded_vocabulary(
                arguments.pop("vocab_size"),
                config.tensor_model_parallel_size,
                self.make_vocab_size_divisible_by,
                always=self.should_pad_vocab,
            ),
            max_sequence_length=arguments.pop("seq_length"),
            pre_process=pre_process,
            post_process=post_process,
            mtp_block_spec=mtp,
            vp_stage=vp_stage,
            **arguments,
        )

    def provide_distributed_model(
        self,
        ddp_config: DistributedDataParallelConfig | None = None,
        *,
        wrap_with_ddp: bool = True,
        wrap_with_float16: bool = True,
        post_wrap_hook: Callable[[list[nn.Module]], list[nn.Module] | None] | None = None,
    ) -> list[nn.Module]:
        """This rank's chunks of the model, with their weights.

        Args:
            ddp_config: For `wrap_with_ddp`; megatron-core's defaults without.
            wrap_with_ddp: Wrap each chunk in megatron-core's DistributedDataParallel.
            wrap_with_float16: Wrap each chunk in its Float16Module, where the dtype is 16 bits wide.
            post_wrap_hook: Called with the chunks in the end; what it returns takes their place, unless that is None.

        Raises:
            ShardwayError: `option-invalid` when the process groups that are there have other sizes; what the load of
                the weights finds.

        *Ranks*: each that has a part of the model; the weights are loaded without communication.
        """
        if parallel_state.is_initialized():
            self._check_sizes()
        else:
            self.initialize_model_parallel()
        config = self.transformer_config()
        stages = config.virtual_pipeline_model_parallel_size
        with _refusals("can't build this model"):
            built = [self.provide(vp_stage=stage if stages else None) for stage in range(stages or 1)]
        chunks: list[nn.Module] = [chunk.to(config.params_dtype) for chunk in built]
        if torch.cuda.is_available() and not config.use_cpu_initialization:
            chunks = [chunk.cuda(torch.cuda.current_device()) for chunk in chunks]
        if wrap_with_float16 and (config.bf16 or config.fp16):
            chunks = [Float16Module(config, chunk) for chunk in chunks]
        for chunk in chunks:
            keep_in_float32(chunk)  # before the load: its bits would be lost
        if self._load is not None:
            self._load(chunks)
        if wrap_with_ddp:
            ddp = ddp_config or DistributedDataParallelConfig()
            chunks = [
                DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0)
                for number, chunk in enumerate(chunks)
            ]
        hooked = post_wrap_hook(chunks) if post_wrap_hook is not None else None
        return chunks if hooked is None else hooked

    def _check_sizes(self) -> None:
        problems = Problems()
        for name, size_of in _SIZES.items():
            wanted, there = self._fields[name], size_of()
            if name == "expert_tensor_parallel_size" and wanted is None:
                wanted = self.tensor_model_parallel_size
            if (wanted or 1) != (there or 1):
                what = f"{name} is {wanted}, and the process groups that are initialised have {there}"
                problems.add(Code.OPTION_INVALID, what, cure="set the size that they have, or destroy them first")
        problems.raise_if_any()


def _not_built(having: str) -> ShardwayError:
    return ShardwayError(
        Problem(
            code=Code.OPTION_INVALID,
            what=f"models with {having} can't be built here",
            cure="build it with megatron-core or Megatron Bridge; load_hf_weights and load_megatron_weights fill it",
        )
    )


@contextlib.contextmanager
def _refusals(doing: str) -> Iterator[None]:
    """Turn what megatron-core raises about a config into the project's error."""
    try:
        yield
    except (ValueError, TypeError, AssertionError) as error:
        what = f"megatron-core {doing}: {error}"
        raise ShardwayError(Problem(code=Code.OPTION_INVALID, what=what)) from error


def provider_of(
    values: Mapping[str, object],
    *,
    load: Callable[[Sequence[nn.Module]], object] | None,
    dtype: torch.dtype | str | None,
    hf: Path | None = None,
    megatron: Path | None = None,
) -> MegatronProvider:
    """The megatron-core model that a config describes, to be built.

    Args:
        values: Content of config.json.
        load: Loads weights into the chunks that were built.
        dtype: Of the parameters; None for what the config says.
        hf: Directory of Hugging Face weights whose names decide in which of several forms the model is.
        megatron: A torch_dist checkpoint whose keys do.

    Raises:
        ShardwayError: `architecture-unsupported`, `config-invalid`, `option-invalid`; what opening either raises.

    *Ranks*: local.
    """
    config = HFConfig(values, CONFIG_FILE)
    names = None if hf is None else present(open_huggingface(hf)).catalog.tensors
    keys = None if megatron is None else open_torch_dist(megatron, wanted=lambda _: False).described
    mapping = map_model(config, variants=variants_in(config, hf=names, mcore=keys))
    if "mamba_num_heads" in mapping.megatron_config:
        raise _not_built("Mamba mixers")
    return MegatronProvider(mapping.megatron_config, dtype=_dtype(config, dtype), load=load)


def _dtype(config: HFConfig, wanted: torch.dtype | str | None) -> torch.dtype:
    if isinstance(wanted, torch.dtype):
        return wanted
    name = (wanted or config.dtype or "bfloat16").removeprefix("torch.")
    found = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(name, name)
    dtype = getattr(torch, found, None)
    if found not in ("bfloat16", "float16", "float32") or not isinstance(dtype, torch.dtype):
        what = f"dtype={name!r}; expected bfloat16, float16 or float32"
        raise ShardwayError(Problem(code=Code.OPTION_INVALID, what=what))
    return dtype


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed and has a GPU to run on."""
    return importlib.util.find_spec("transformer_engine") is not None and torch.cuda.is_available()


def padded_vocabulary(num_tokens: int, tensor_parallel: int, multiple: int, *, always: bool) -> int:
    """Rows of the embedding: padded where asked for, or where tensor parallelism could not divide it."""
    if not always and num_tokens % tensor_parallel == 0:
        return num_tokens
    multiple *= tensor_parallel
    return -(-num_tokens // multiple) * multiple


def keep_in_float32(model: nn.Module) -> None:
    """Put back into float32 what megatron-core computes in it whatever the model's dtype: the router's expert bias."""
    for module in model.modules():
        bias = getattr(module, "expert_bias", None)
        if isinstance(bias, torch.Tensor):
            bias.data = bias.data.float()


def _initialise_distributed() -> None:
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
