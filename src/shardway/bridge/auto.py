"""AutoBridge: names, arguments and defaults of Megatron Bridge, on top of shardway's own calls."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.families.registry import families
from shardway.formats.huggingface import CONFIG_FILE, is_tokenizer_file, read_companions, read_small_files
from shardway.hub.client import cached_snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from torch import nn

    from shardway.convert.report import ConversionReport
    from shardway.live.building import MegatronProvider
    from shardway.live.gather import HFWeight
    from shardway.live.pieces import HFPiece
    from shardway.live.rendezvous import StoreLike
    from shardway.live.save import AsyncSave, CheckpointConfig, SaveReport


# Arguments of transformers' from_pretrained that are no keys of a config.
_OF_TRANSFORMERS = frozenset(
    """
    attn_implementation cache_dir code_revision config device_map dtype experts_implementation force_download
    local_files_only low_cpu_mem_usage max_memory offload_folder output_loading_info proxies revision state_dict
    subfolder token torch_dtype trust_remote_code use_auth_token use_safetensors weights_only
    """.split()  # noqa: SIM905
)


class AutoBridge:
    """A Hugging Face model as the point of reference for its Megatron counterpart.

    Making one reads only the config and the names of the small files; weights may be there or not.

    Attributes:
        config: Content of the model's config.json.
        files: Paths or contents of the files that a checkpoint keeps in its ``hf`` folder, by name.
        root: The model's directory, where weights are loaded from by default; None for a config alone.
    """

    def __init__(
        self, config: Mapping[str, object], files: Mapping[str, Path | bytes], root: Path | None = None
    ) -> None:
        self.config = config
        self.files = files
        self.root = root
        self._last: AsyncSave | None = None

    @classmethod
    def from_hf_pretrained(cls, path: str | os.PathLike[str], **overrides: object) -> Self:
        """The bridge of a model directory, or of a model in the local cache of the Hub.

        Args:
            path: Directory with config.json and tokenizer, or a name on the Hub (``org/name``) that has been
                downloaded before.
            overrides: Values for keys of the config, as transformers' ``from_pretrained`` takes them; what else that
                takes (``trust_remote_code``, ``torch_dtype``, ...) has no meaning here: no code of a model is ever
                run, and no weights are loaded yet.

        Raises:
            ShardwayError: `not-a-checkpoint`, `config-missing`, `config-invalid`.

        *Ranks*: local.
        """
        root = _directory(path)
        config, small_files = read_companions(root)
        files: dict[str, Path | bytes] = {file.name: root / file.name for file in small_files}
        changed = {key: value for key, value in overrides.items() if key not in _OF_TRANSFORMERS}
        if changed:
            config = {**config, **changed}
            files[CONFIG_FILE] = _config_text(config)
        return cls(config, files, root)

    @classmethod
    def from_hf_config(cls, config: Any) -> Self:
        """The bridge of a config alone.

        Args:
            config: A transformers ``PretrainedConfig``, or the content of a config.json. Where it names no model
                class, as one that was not read from a model doesn't, that of its ``model_type`` is taken.

        *Ranks*: local.
        """
        values = dict(config.to_dict() if hasattr(config, "to_dict") else config)
        if not values.get("architectures"):
            known = (family.architectures for family in families() if family.name == values.get("model_type"))
            values["architectures"] = list(next(known, ()))[:1] or None
        text = _config_text(values)
        return cls(json.loads(text), {CONFIG_FILE: text})

    def import_ckpt(self, path: str | os.PathLike[str], **options: Any) -> ConversionReport:
        """Convert the model's files to a Megatron torch_dist checkpoint: no torch, no model, no process group.

        Args:
            path: Root of the checkpoint to be made.
            options: Those of `shardway.import_hf`.

        Returns:
            What was done.

        Raises:
            ShardwayError: What `shardway.import_hf` raises; `not-a-checkpoint` without weights.

        *Ranks*: one of them; the others may wait for it or not.
        """
        from shardway.convert.importing import import_hf

        return import_hf(self._weights(None), Path(path), **options)

    def export_ckpt(
        self, megatron_path: str | os.PathLike[str], hf_path: str | os.PathLike[str], **options: Any
    ) -> ConversionReport:
        """Convert a Megatron torch_dist checkpoint of the model to Hugging Face files, likewise.

        Args:
            megatron_path: Root of the checkpoint, or an iteration's folder.
            hf_path: Directory to be made; gets the bridge's config and tokenizer.
            options: Those of `shardway.export_hf`.

        Raises:
            ShardwayError: What `shardway.export_hf` raises.

        *Ranks*: one of them.
        """
        from shardway.convert.exporting import export_hf

        return export_hf(Path(megatron_path), Path(hf_path), hf=self.root, **options)

    def load_hf_weights(
        self,
        model: Sequence[nn.Module] | nn.Module,
        path: str | os.PathLike[str] | None = None,
        *,
        hf_path: str | os.PathLike[str] | None = None,
    ) -> Sequence[nn.Module] | nn.Module:
        """Fill a live Megatron model from Hugging Face files; each rank reads only the bytes of its own shards.

        Nothing communicates and no rank waits for another. All of the checkpoint's names, shapes and dtypes are
        checked first; the model is changed only when there is nothing to say. See `shardway.live.load`.

        Args:
            model: The model, or the list of its pipeline chunks on this rank; any TP, PP, VPP, EP and expert-TP.
            path: Directory or cached Hub name of the weights; by default the bridge's own.
            hf_path: The same, under Megatron Bridge's name for it.

        Returns:
            `model`, with its weights. What was read is logged.

        Raises:
            ShardwayError: All problems together.

        *Ranks*: local; any rank may call it or not.
        """
        from shardway.live.load import load_huggingface

        load_huggingface(model, self._weights(path if path is not None else hf_path), config=self.config)
        return model

    def load_megatron_weights(
        self, model: Sequence[nn.Module] | nn.Module, path: str | os.PathLike[str]
    ) -> Sequence[nn.Module] | nn.Module:
        """Fill a live Megatron model from a torch_dist checkpoint, saved at any parallelism.

        As `load_hf_weights`; megatron-core's loader has no part in it.

        Args:
            model: The model, or the list of its pipeline chunks on this rank.
            path: Root of the checkpoint, or an iteration's folder.
        """
        from shardway.live.load import load_torch_dist

        load_torch_dist(model, path, config=self.config)
        return model

    def to_megatron_provider(
        self,
        load_weights: bool = True,
        hf_path: str | os.PathLike[str] | None = None,
        *,
        dtype: torch.dtype | str | None = None,
    ) -> MegatronProvider:
        """The megatron-core model that this config describes, before it is built: its fields can still be changed.

        Args:
            load_weights: Let `provide_distributed_model` load the Hugging Face weights.
            hf_path: Where those are; by default the bridge's own.
            dtype: Of the parameters; by default what the config says, bfloat16 where it says nothing.

        Raises:
            ShardwayError: `architecture-unsupported`, `config-invalid`; `not-a-checkpoint` where weights are wanted and
                there are none.

        *Ranks*: local.
        """
        from shardway.live.building import provider_of
        from shardway.live.load import load_huggingface

        if not load_weights:
            return provider_of(self.config, load=None, dtype=dtype)
        weights = self._weights(hf_path)

        def load(chunks: Sequence[nn.Module]) -> None:
            load_huggingface(chunks, weights, config=self.config)

        return provider_of(self.config, load=load, dtype=dtype, hf=weights)

    def to_transformer_config(self, **fields: Any) -> Any:
        """The megatron-core TransformerConfig (MLATransformerConfig) that this config describes.

        Args:
            fields: Fields that are to have other values, such as ``tensor_model_parallel_size``.

        *Ranks*: local.
        """
        provider = self.to_megatron_provider(load_weights=False)
        for name, value in fields.items():
            setattr(provider, name, value)
        return provider.transformer_config()

    @property
    def transformer_config(self) -> Any:
        """`to_transformer_config`, under Megatron Bridge's name."""
        return self.to_transformer_config()

    def to_megatron_model(
        self,
        load_weights: bool = True,
        hf_path: str | os.PathLike[str] | None = None,
        *,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        expert_model_parallel_size: int = 1,
        dtype: torch.dtype | str | None = None,
        wrap_with_ddp: bool = False,
        **fields: Any,
    ) -> list[nn.Module]:
        """This rank's chunks of a megatron-core GPTModel, with the Hugging Face weights.

        The Transformer Engine layers are used where it is installed and there is a GPU, megatron-core's own otherwise.
        megatron-core's process groups are made where there are none.

        Args:
            load_weights: Load the Hugging Face weights, otherwise they are random.
            hf_path: Where those are; by default the bridge's own.
            tensor_model_parallel_size: As in megatron-core.
            pipeline_model_parallel_size: As in megatron-core.
            expert_model_parallel_size: As in megatron-core.
            dtype: Of the parameters; by default what the config says.
            wrap_with_ddp: Wrap the chunks in megatron-core's DistributedDataParallel.
            fields: Further fields of the model's config.

        Raises:
            ShardwayError: All problems together.

        *Ranks*: all of the job where groups are to be made; otherwise local.
        """
        provider = self.to_megatron_provider(load_weights, hf_path, dtype=dtype)
        sizes = {
            "tensor_model_parallel_size": tensor_model_parallel_size,
            "pipeline_model_parallel_size": pipeline_model_parallel_size,
            "expert_model_parallel_size": expert_model_parallel_size,
        }
        for name, value in {**sizes, **fields}.items():
            setattr(provider, name, value)
        return provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp)

    def load_megatron_model(
        self,
        path: str | os.PathLike[str],
        *,
        mp_overrides: Mapping[str, Any] | None = None,
        dtype: torch.dtype | str | None = None,
        wrap_with_ddp: bool = False,
        skip_temp_dist_context: bool | None = None,
    ) -> list[nn.Module]:
        """This rank's chunks of a megatron-core GPTModel, with the weights of a torch_dist checkpoint.

        Args:
            path: Root of the checkpoint, or an iteration's folder; saved at any parallelism.
            mp_overrides: Parallel sizes and other fields of the model's config. Sizes that are not given are those of
                megatron-core's process groups, or 1 where there are none.
            dtype: Of the parameters; by default what the config says.
            wrap_with_ddp: Wrap the chunks in megatron-core's DistributedDataParallel.
            skip_temp_dist_context: Accepted for compatibility: groups are made only where there are none.

        Raises:
            ShardwayError: All problems together.

        *Ranks*: as `to_megatron_model`.
        """
        del skip_temp_dist_context
        from shardway.live.building import provider_of
        from shardway.live.load import load_torch_dist

        def load(chunks: Sequence[nn.Module]) -> None:
            load_torch_dist(chunks, path, config=self.config)

        provider = provider_of(self.config, load=load, dtype=dtype, megatron=Path(path))
        provider.adopt_sizes()
        for name, value in (mp_overrides or {}).items():
            setattr(provider, name, value)
        return provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp)

    def export_hf_weights(
        self,
        model: Sequence[nn.Module] | nn.Module,
        cpu: bool = False,
        show_progress: bool = True,
        *,
        distributed_timeout_minutes: float | None = None,
    ) -> Iterator[HFWeight]:
        """Yield (name, tensor) for each Hugging Face tensor that this rank's model-parallel group holds, whole.

        Tensors come in the order in which an export writes them: embedding, layers, final norm, head. A rank gets the
        tensors of its own pipeline stage and of its own experts, not those of others. Where the parts of a tensor sit
        on several ranks they are gathered within the smallest group that holds them all (tensor parallel, expert
        tensor parallel, or these with expert parallel) and nothing wider. Beside the model there is one whole tensor
        and one rank's part of it at any time. A tensor that a rank has by itself may be the model's own memory.

        Args:
            model: The model, or the list of its pipeline chunks on this rank.
            cpu: Yield tensors in host memory; otherwise where the parameters are.
            show_progress: Accepted for compatibility.
            distributed_timeout_minutes: The most that any one wait may take; None for 10 minutes.

        Raises:
            ShardwayError: `gather-failed` when a rank of the group does not take part in time; problems of the model
                before the first tensor.

        *Ranks*: all of a model-parallel group, to the end; different pipeline stages need not wait for each other.
        """
        del show_progress
        from shardway.live.export import export_hf_weights

        return export_hf_weights(model, self.config, cpu=cpu, timeout_minutes=distributed_timeout_minutes)

    def export_hf_pieces(self, model: Sequence[nn.Module] | nn.Module) -> Iterator[HFPiece]:
        """Yield what this rank holds of each Hugging Face tensor, with its place; nothing communicates.

        For an engine that takes shards: `full[piece.slices] = piece.tensor`. The pieces of all ranks together (one
        data-parallel replica) are every element of every tensor, once. Order as `export_hf_weights`.

        Args:
            model: The model, or the list of its pipeline chunks on this rank.

        *Ranks*: local.
        """
        from shardway.live.export import export_hf_pieces

        return export_hf_pieces(model, self.config)

    def save_hf_pretrained(
        self,
        model: Sequence[nn.Module] | nn.Module,
        path: str | os.PathLike[str],
        show_progress: bool = True,
        source_path: str | os.PathLike[str] | None = None,
        strict: bool = True,
        *,
        distributed_timeout_minutes: float | None = None,
        participants: Sequence[int] | None = None,
        store: StoreLike | Literal["file"] | None = None,
        dtype: str = "auto",
        max_shard_size: str | int = "auto",
        if_exists: Literal["error", "replace"] = "error",
        config: CheckpointConfig | None = None,
    ) -> SaveReport:
        """Save a live Megatron model as a Hugging Face directory, with whoever of the job calls this; it can't hang.

        No collective runs: as `save_megatron_model`, but for the files. Every rank writes its own pieces into place in
        the safetensors files. Where the bridge has the original weights, tensors get their types, and are divided into
        files, as there; a model that was not changed is saved bit for bit.

        Args:
            model: The model, or the list of its pipeline chunks on this rank.
            path: The directory, on a filesystem that all ranks see.
            show_progress: Accepted for compatibility.
            source_path: Directory or cached Hub name of the original weights; by default the bridge's own.
            strict: Accepted for compatibility: a save that is not complete always fails.
            distributed_timeout_minutes: The most that any one wait may take; None for 10 minutes.
            participants: See `save_megatron_model`.
            store: See `save_megatron_model`.
            dtype: ``"auto"``, or ``"bf16"``, ``"fp16"``, ``"fp32"`` for all tensors.
            max_shard_size: Most tensor bytes in one file, or ``"auto"``.
            if_exists: ``"error"``, or ``"replace"`` for a Hugging Face directory that is there already.
            config: These together, and more; the single arguments that it covers are then not looked at.

        Returns:
            What was done.

        Raises:
            SaveIncomplete: Some part of the model has no holder among those who came within the deadline.
            ShardwayError: What any rank ran into, the same on all of them. Nothing was published in either case.

        *Ranks*: every rank that holds something which no other rank holds must call this; any other rank may.
        """
        del show_progress, strict
        from shardway.convert.options import parse_dtype, parse_shard_size
        from shardway.live.hf_save import save_huggingface
        from shardway.live.save import CheckpointConfig, Companions

        return save_huggingface(
            model,
            path,
            companions=Companions(config=self.config, files=self.files),
            source=_directory(source_path) if source_path is not None else self.root,
            config=config
            or CheckpointConfig(distributed_timeout_minutes=distributed_timeout_minutes, if_exists=if_exists),
            participants=participants,
            store=store,
            dtype=parse_dtype(dtype),
            max_shard_bytes=parse_shard_size(max_shard_size),
        )

    def save_megatron_model(
        self,
        model: nn.Module | Sequence[nn.Module],
        path: str | os.PathLike[str],
        hf_tokenizer_path: str | os.PathLike[str] | None = None,
        low_memory_save: bool = False,
        hf_tokenizer_kwargs: Mapping[str, object] | None = None,
        fully_parallel_save: bool = True,
        validate_access_integrity: bool = True,
        distributed_timeout_minutes: float | None = None,
        *,
        participants: Sequence[int] | None = None,
        store: StoreLike | Literal["file"] | None = None,
        async_save: bool = False,
        iteration: int = 0,
        if_exists: Literal["error", "replace"] = "error",
        config: CheckpointConfig | None = None,
    ) -> SaveReport | AsyncSave:
        """Save a live Megatron model as a torch_dist checkpoint, with whoever of the job calls this; it can't hang.

        No collective runs. The ranks that call meet through a key-value store; the save begins as soon as those who
        came hold every element of the model that the config describes, and ends with the same outcome for all.

        Args:
            model: The model, or the list of its pipeline chunks on this rank.
            path: Root of the checkpoint, on a filesystem that all ranks see.
            hf_tokenizer_path: Directory or cached Hub name of the tokenizer; by default the model's own.
            low_memory_save: Accepted for compatibility; a save never holds a second copy of the model.
            hf_tokenizer_kwargs: Accepted for compatibility; the tokenizer's files are copied, not loaded.
            fully_parallel_save: Spread the bytes evenly over the replicas that arrived; False: the lowest replica of
                each shard writes it.
            validate_access_integrity: Check that ranks agree on configuration, shapes and dtypes. Coverage is proven
                in any case.
            distributed_timeout_minutes: The most that any one wait may take; None for 10 minutes.
            participants: See `shardway.live.save.save_megatron_model`.
            store: Where the ranks meet; None for the job's own store, ``"file"`` for a file in `path`.
            async_save: Copy the model to host memory, return a handle, and save in the background.
            iteration: Number of the iteration folder.
            if_exists: ``"error"``, or ``"replace"`` for an iteration that is there already.
            config: All of these together, and more; the single arguments that it covers are then not looked at.

        Returns:
            What was done, or, for an async save, a handle with ``wait()`` and ``done()``.

        Raises:
            SaveIncomplete: Some part of the model has no holder among those who came within the deadline.
            ShardwayError: What any rank ran into, the same on all of them. Nothing was published in either case.

        *Ranks*: every rank that holds something which no other rank holds must call this; any other rank may.
        Source: NVIDIA-NeMo/Megatron-Bridge#3207.
        """
        del low_memory_save, hf_tokenizer_kwargs
        from shardway.live.save import AsyncSave, CheckpointConfig, Companions, save_megatron_model

        config = config or CheckpointConfig(
            fully_parallel_save=fully_parallel_save,
            validate_access_integrity=validate_access_integrity,
            distributed_timeout_minutes=distributed_timeout_minutes,
            async_save=async_save,
            if_exists=if_exists,
        )
        files = dict(self.files)
        if hf_tokenizer_path is not None:
            root = _directory(hf_tokenizer_path)
            files = {name: file for name, file in files.items() if not is_tokenizer_file(name)}
            files |= {file.name: root / file.name for file in read_small_files(root) if is_tokenizer_file(file.name)}
        saved = save_megatron_model(
            model,
            path,
            companions=Companions(config=self.config, files=files),
            config=config,
            participants=participants,
            store=store,
            iteration=iteration,
            reuse=self._last,
        )
        if isinstance(saved, AsyncSave):
            self._last = saved
        return saved

    def _weights(self, path: str | os.PathLike[str] | None) -> Path:
        """The directory of the weights."""
        if path is not None:
            return _directory(path)
        if self.root is None:
            what = "the bridge was made from a config alone, so that there are no weights to load"
            cure = "pass the directory of the weights, or use AutoBridge.from_hf_pretrained"
            raise ShardwayError(Problem(code=Code.NOT_A_CHECKPOINT, what=what, cure=cure))
        return self.root


def _config_text(values: Mapping[str, object]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, default=str) + "\n").encode()


def _directory(path: str | os.PathLike[str]) -> Path:
    """A local directory: the path itself, or the Hub's cache for a name such as ``org/name``."""
    root = Path(path)
    if root.exists():
        return root
    found = cached_snapshot(os.fspath(path))
    if found is not None:
        return found
    raise ShardwayError(
        Problem(
            code=Code.NOT_A_CHECKPOINT,
            what=f"{os.fspath(path)} is neither a directory nor a model in the local cache of the Hub",
            file=root,
            cure="give the directory that holds config.json, or download the model first",
        )
    )
