"""AutoBridge: names, arguments and defaults of Megatron Bridge, on top of shardway's own calls."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.families.registry import FAMILIES
from shardway.formats.huggingface import CONFIG_FILE, is_tokenizer_file, read_companions, read_small_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from shardway.live.rendezvous import StoreLike
    from shardway.live.save import AsyncSave, CheckpointConfig, SaveReport


class AutoBridge:
    """A Hugging Face model as the point of reference for its Megatron counterpart.

    Only the config and the small files of the model are read; its weights may be there or not.

    Attributes:
        config: Content of the model's config.json.
        files: Paths or contents of the files that a checkpoint keeps in its ``hf`` folder, by name.
    """

    def __init__(self, config: Mapping[str, object], files: Mapping[str, Path | bytes]) -> None:
        self.config = config
        self.files = files
        self._last: AsyncSave | None = None

    @classmethod
    def from_hf_pretrained(cls, path: str | os.PathLike[str], **_: object) -> Self:
        """The bridge of a model directory, or of a model in the local cache of the Hub.

        Args:
            path: Directory with config.json and tokenizer, or a name on the Hub (``org/name``) that has been
                downloaded before.
            _: Whatever else transformers' ``from_pretrained`` takes; no code of a model is ever run here.

        Raises:
            ShardwayError: `not-a-checkpoint`, `config-missing`, `config-invalid`.

        *Ranks*: local.
        """
        root = _directory(path)
        config, small_files = read_companions(root)
        return cls(config, {file.name: root / file.name for file in small_files})

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
            known = (family.architectures for family in FAMILIES if family.name == values.get("model_type"))
            values["architectures"] = list(next(known, ()))[:1] or None
        text = json.dumps(values, indent=2, sort_keys=True, default=str) + "\n"
        return cls(json.loads(text), {CONFIG_FILE: text.encode()})

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


def _directory(path: str | os.PathLike[str]) -> Path:
    """A local directory: the path itself, or the Hub's cache for a name such as ``org/name``."""
    root = Path(path)
    if root.exists():
        return root
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        pass
    else:
        try:
            return Path(snapshot_download(os.fspath(path), local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError):
            pass
    raise ShardwayError(
        Problem(
            code=Code.NOT_A_CHECKPOINT,
            what=f"{os.fspath(path)} is neither a directory nor a model in the local cache of the Hub",
            file=root,
            cure="give the directory that holds config.json, or download the model first",
        )
    )
