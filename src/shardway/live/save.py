"""Saving a live model: the public call, from the model on this rank to the outcome that all ranks share."""

from __future__ import annotations

import dataclasses
import math
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist

from shardway import __version__
from shardway.core.errors import Code, Problem, ShardwayError
from shardway.families.bridge import TRAINED_IN, run_config
from shardway.families.config import HFConfig
from shardway.families.layout import Layout
from shardway.families.mapping import map_model
from shardway.formats.record import Record
from shardway.formats.run_config import run_config_yaml
from shardway.live.blocks import synchronise
from shardway.live.dtensor import dtensor_state
from shardway.live.folder import IterationFolder
from shardway.live.rendezvous import save_together
from shardway.live.saving import Needed, SaveIdentity, SaveOptions
from shardway.plans.imports import TOKENIZER_FOLDER
from shardway.run.files import failing
from shardway.run.places import live_staging_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from shardway.families.mapping import ModelMapping
    from shardway.live.rendezvous import StoreLike
    from shardway.live.saving import SaveOutcome
    from shardway.live.state import LiveState

_DEFAULT_TIMEOUT_MINUTES = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """How a live save goes about it; must be the same on every rank that calls it.

    Names and defaults follow Megatron Bridge's CheckpointConfig where it has them.

    Attributes:
        fully_parallel_save: Spread the bytes evenly over the replicas that arrived; False: the lowest replica of each
            shard writes it.
        validate_access_integrity: Check that the ranks agree on configuration, shapes and dtypes. Whether every
            element has a holder is proven in any case.
        distributed_timeout_minutes: The most that any one wait may take: for a missing part of the model, for a
            writer that makes no progress. None: 10 minutes.
        async_save: Copy the model to host memory, return, and save in the background.
        if_exists: ``"error"``, or ``"replace"`` for an iteration that is there already.
        writers_per_rank: Files, and threads, with which a rank writes.
        grace_seconds: How long to wait for more replicas to share the work when the model is complete already.
        fsync: Force everything to the device before it is published.
        ckpt_format: ``"torch_dist"``.
    """

    fully_parallel_save: bool = True
    validate_access_integrity: bool = True
    distributed_timeout_minutes: float | None = None
    async_save: bool = False
    if_exists: Literal["error", "replace"] = "error"
    writers_per_rank: int = 1
    grace_seconds: float = 1.0
    fsync: bool = True
    ckpt_format: Literal["torch_dist"] = "torch_dist"

    def __post_init__(self) -> None:
        timeout = self.distributed_timeout_minutes
        for ok, name, expected in (
            (timeout is None or timeout > 0, "distributed_timeout_minutes", "a positive number of minutes, or None"),
            (self.if_exists in ("error", "replace"), "if_exists", "'error' or 'replace'"),
            (self.writers_per_rank >= 1, "writers_per_rank", "at least 1"),
            (self.grace_seconds >= 0, "grace_seconds", "0 or more"),
            (self.ckpt_format == "torch_dist", "ckpt_format", "'torch_dist'"),
        ):
            if not ok:
                what = f"{name}={getattr(self, name)!r}; expected {expected}"
                raise ShardwayError(Problem(code=Code.OPTION_INVALID, what=what))


@dataclass(frozen=True, slots=True, kw_only=True)
class Companions:
    """The Hugging Face side of a model that is saved: what says which tensors belong to it, and what goes into hf/.

    Attributes:
        config: Content of config.json; empty where there is none.
        files: Paths or contents of the small files, by name.
    """

    config: Mapping[str, object] = field(default_factory=dict)
    files: Mapping[str, Path | bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """What a live save did; the same on every rank but for `wrote_bytes` and `seconds`.

    Attributes:
        path: The iteration folder.
        arrived: Ranks that took part.
        lost: Ranks that were given work and were lost; others did it.
        coordinator: Rank that assembled the checkpoint.
        num_files: Files that the ranks wrote.
        num_bytes: Bytes in them.
        wrote_bytes: Bytes that this rank wrote.
        seconds: Wall-clock time on this rank.
    """

    path: str
    arrived: tuple[int, ...]
    lost: tuple[int, ...]
    coordinator: int
    num_files: int
    num_bytes: int
    wrote_bytes: int
    seconds: float


class AsyncSave:
    """A save that goes on in the background; the model may change meanwhile."""

    def __init__(self, folder: IterationFolder, job: _Job) -> None:
        self.state = folder.state
        self._report: SaveReport | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(folder, job), name="shardway-save")
        self._thread.start()

    def done(self) -> bool:
        """Whether the save has ended, in success or not."""
        return not self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> SaveReport:
        """Wait until the save has ended.

        Args:
            timeout: Seconds; None for as long as it takes, which is bounded.

        Raises:
            TimeoutError: It goes on; ask again.
            ShardwayError: What the save raised; every rank's handle raises the same.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the save is still going on after {timeout} s")
        if self._error is not None:
            raise self._error
        if self._report is None:
            raise RuntimeError("the save ended without an outcome")
        return self._report

    def _run(self, folder: IterationFolder, job: _Job) -> None:
        try:
            self._report = job.run(folder)
        except BaseException as error:  # noqa: BLE001 - raised again by wait()
            self._error = error


def save_megatron_model(
    model: nn.Module | Sequence[nn.Module],
    path: str | os.PathLike[str],
    *,
    companions: Companions | None = None,
    config: CheckpointConfig | None = None,
    participants: Sequence[int] | None = None,
    store: StoreLike | Literal["file"] | None = None,
    iteration: int = 0,
    reuse: AsyncSave | None = None,
) -> SaveReport | AsyncSave:
    """Save a live model as a torch_dist checkpoint, with whoever of the job calls this; it can't hang.

    No collective runs and no process group is used: the ranks that call meet through a key-value store. The save
    begins as soon as those who came hold every element of the model, and ends with the same outcome for all of them.
    A rank that never calls is not waited for, unless it alone holds something.

    Args:
        model: A megatron-core model, the list of its pipeline chunks on this rank, or a plain module, its parameters
            DTensors or not.
        path: Root of the checkpoint, on a filesystem that all ranks see.
        companions: Config and small files of the Hugging Face model.
        config: How to go about it; the same on every rank.
        participants: Ranks that have to come when the config's architecture is unknown; else the ranks for which the
            save waits a moment, to share the work, and that an error names as absent. Default: all of the job.
        store: Where the ranks meet: a `torch.distributed.Store`; None for the job's own; ``"file"`` for a file in
            `path`, which needs no living host.
        iteration: Number of the iteration folder.
        reuse: An async save that has ended; its host memory is used again.

    Returns:
        What was done; for an async save its handle.

    Raises:
        SaveIncomplete: Some part of the model has no holder among those who came within the deadline; the missing
            tensors and the ranks are named. Nothing was published.
        ShardwayError: What any rank ran into, the same on all of them. Nothing was published.

    *Ranks*: every rank that holds something which no other rank holds must call this; any other rank may.
    """
    config = config or CheckpointConfig()
    companions = companions or Companions()
    if isinstance(iteration, bool) or not isinstance(iteration, int) or iteration < 0:
        what = f"iteration={iteration!r}; expected an integer, 0 or more"
        raise ShardwayError(Problem(code=Code.OPTION_INVALID, what=what))
    root = Path(os.path.abspath(path))
    made = tuple(directory for directory in (root, *root.parents) if not directory.exists())
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    state = live_state(model, rank)
    mapping = _mapping(companions.config, state)
    if mapping is not None:
        state = state.trimmed({key: mapping.mcore[key] for key in state.resizable & mapping.mcore.keys()})
    if config.async_save:
        state = state.snapshot(reuse=reuse.state if reuse is not None and reuse.done() else None)
    else:
        synchronise(state.devices)  # what this thread has enqueued; the writing is done on others
    folder = IterationFolder(
        root=root,
        iteration=iteration,
        rank=rank,
        state=state,
        tensors=None if mapping is None else {key: (None, shape) for key, shape in mapping.mcore.items()},
        record=_record(mapping, companions.config),
        companions=companions.files,
        replace=config.if_exists == "replace",
        writers=config.writers_per_rank,
        sync=config.fsync,
        made=made,
        run_config=None if mapping is None else _run_config(mapping, state),
    )
    job = _Job(
        store=meeting_place(store, root),
        token=job_id() if store == "file" else "",
        options=SaveOptions(
            fully_parallel=config.fully_parallel_save,
            validate=config.validate_access_integrity,
            deadline_s=60.0 * (config.distributed_timeout_minutes or _DEFAULT_TIMEOUT_MINUTES),
            grace_s=config.grace_seconds,
        ),
        participants=tuple(range(world) if participants is None else participants),
        agreement=_agreement(config, mapping, state),
    )
    return AsyncSave(folder, job) if config.async_save else job.run(folder)


def live_state(model: nn.Module | Sequence[nn.Module], rank: int) -> LiveState:
    """What this rank holds of a model, whatever kind of model it is.

    *Ranks*: local.
    """
    first: object = model if isinstance(model, torch.nn.Module) else model[0]
    while isinstance(getattr(first, "module", None), torch.nn.Module):
        first = first.module  # type: ignore[attr-defined]
    if hasattr(first, "sharded_state_dict"):
        from shardway.live.megatron import megatron_state  # megatron-core takes seconds to import

        return megatron_state(model)
    if not isinstance(model, torch.nn.Module):
        if len(model) != 1:
            what = f"a list of {len(model)} plain modules can't be saved: pipeline chunks need sharded_state_dict"
            raise ShardwayError(Problem(code=Code.OPTION_INVALID, what=what))
        model = model[0]
    return dtensor_state(model, rank=rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One save, ready to be run on the caller's thread or another one."""

    store: StoreLike | None
    token: str
    options: SaveOptions
    participants: tuple[int, ...]
    agreement: Mapping[str, str]

    def run(self, folder: IterationFolder) -> SaveReport:
        began = time.perf_counter()
        outcome: SaveOutcome = save_together(
            store=self.store,
            rank=folder.rank,
            identity=SaveIdentity(destination=str(folder.root), iteration=folder.iteration, token=self.token),
            shards=folder.state.shards,
            objects=folder.state.objects,
            needed=Needed(tensors=folder.tensors, resizable=folder.state.resizable, participants=self.participants),
            agreement=self.agreement,
            options=self.options,
            actions=folder,
        )
        return SaveReport(
            path=str(folder.folder),
            arrived=outcome.arrived,
            lost=outcome.lost,
            coordinator=outcome.coordinator,
            num_files=outcome.num_files,
            num_bytes=outcome.num_bytes,
            wrote_bytes=outcome.wrote_bytes,
            seconds=time.perf_counter() - began,
        )


def _mapping(config: Mapping[str, object], state: LiveState) -> ModelMapping | None:
    """The tensors that belong to the model, where its family is known."""
    if not config:
        return None
    layout = Layout.PER_LAYER if state.content_metadata.get("non_homogeneous_layers") else None
    try:
        return map_model(HFConfig(config), layout, variants=state.variants)
    except ShardwayError as error:
        if error.code is Code.ARCHITECTURE_UNSUPPORTED:
            return None
        raise


def _record(mapping: ModelMapping | None, config: Mapping[str, object]) -> Record:
    if mapping is None:
        architecture = HFConfig(config).architecture if config else None
        return Record(
            written_by=f"shardway {__version__}", family=None, architecture=architecture, source="live", options={}
        )
    return Record(
        written_by=f"shardway {__version__}",
        family=mapping.family,
        architecture=mapping.architecture,
        source="live",
        options={"layout": mapping.layout.value},
        variants=mapping.variants,
        megatron_config=mapping.megatron_config,
    )


def _run_config(mapping: ModelMapping, state: LiveState) -> bytes:
    """run_config.yaml of a model that was not imported: its type is that of most of what this rank holds."""
    held: Counter[str] = Counter()
    for shard in state.shards:
        held[shard.dtype.name] += math.prod(shard.size)
    (usual, _), *_ = held.most_common(1) or [("", 0)]
    trained_in = usual if usual in TRAINED_IN else None
    return run_config_yaml(run_config(mapping, trained_in, TOKENIZER_FOLDER))


def _agreement(config: CheckpointConfig, mapping: ModelMapping | None, state: LiveState) -> dict[str, str]:
    """What all ranks have to say alike."""
    said = {name: str(value) for name, value in dataclasses.asdict(config).items()}
    said["content_metadata"] = str(sorted(state.content_metadata.items()))
    if mapping is not None:
        said["megatron_config"] = str(sorted(mapping.megatron_config.items()))
    return said


def job_id() -> str:
    """What tells this job from earlier ones with the same file store, by what its launcher says to every rank alike."""
    return ":".join(os.environ.get(name, "") for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "RAY_JOB_ID"))


def meeting_place(store: StoreLike | Literal["file"] | None, root: Path) -> StoreLike | None:
    """The store in which the ranks of a save meet; None where this process is alone."""
    if store == "file":
        with failing("create directory", root, Code.DESTINATION_UNWRITABLE):
            root.mkdir(parents=True, exist_ok=True)
        made: StoreLike = dist.FileStore(str(root / live_staging_name("save", "store")), -1)  # type: ignore[attr-defined]
        return made
    if store is None and dist.is_initialized():
        default: StoreLike = dist.distributed_c10d._get_default_store()  # noqa: SLF001 - torch has no public name for it
        return default
    return store
