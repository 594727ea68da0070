"""What a live save does to the disk: one iteration folder, staged beside its place and renamed into it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardway.core.dtypes import BFLOAT16
from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats.huggingface import is_tokenizer_file
from shardway.formats.iterations import iteration_folder
from shardway.formats.run_config import RUN_CONFIG
from shardway.live.assemble import assemble
from shardway.live.writer import write_shards
from shardway.plans.imports import HF_FOLDER, TOKENIZER_FOLDER
from shardway.run.destination import holds_checkpoint, in_the_way, publish_tracker, refuse_older
from shardway.run.files import failing, sync_directory
from shardway.run.places import is_unsettled
from shardway.run.publish import SharedStaging, persistently

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape
    from shardway.formats.record import Record
    from shardway.live.saving import Assignment, Report
    from shardway.live.state import LiveState
    from shardway.live.written import WriterResult
    from shardway.run.pulse import Pulse


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationFolder:
    """The folder of one iteration, as the save protocol's actions see it (`saving.SaveActions`).

    How several ranks share a staging folder, and any of them can publish it, is told in `publish.SharedStaging`.

    Attributes:
        root: Root of the checkpoint.
        iteration: Number of the iteration.
        rank: This rank; names the files that it writes.
        state: What this rank holds.
        tensors: Dtype (None: any) and shape of the tensors that must be there, where they are known.
        record: What `shardway.json` will say; None for none.
        companions: Paths of the files that go into ``hf/``, by name.
        run_config: Content of run_config.yaml, by which Megatron Bridge takes the checkpoint as its own; the tokenizer
            is then put beside it. None for none.
        replace: Whether an iteration folder that is there already gives way.
        writers: Files, and threads, with which this rank writes.
        sync: Force everything to the device before it is published.
        made: The root and the directories above it that were not there when the save began, innermost first.

    *Ranks*: each method says which.
    """

    root: Path
    iteration: int
    rank: int
    state: LiveState
    tensors: Mapping[str, tuple[DType | None, Shape]] | None
    record: Record | None
    companions: Mapping[str, Path | bytes]
    replace: bool
    writers: int
    sync: bool
    made: tuple[Path, ...] = ()
    run_config: bytes | None = None
    _pulses: dict[str, Pulse | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def folder(self) -> Path:
        """Where the iteration will be."""
        return self.root / iteration_folder(self.iteration)

    def prepare(self, staging: str) -> None:
        """Create the staging folder, unless the iteration is in place already and may not be replaced.

        An iteration whose save was killed after its last rename, but before the tracker named it, may be.

        Raises:
            ShardwayError: `destination-exists`, `destination-unwritable`, `io-failed`, `no-space`.

        *Ranks*: coordinator.
        """
        if holds_checkpoint(self.root, self.folder):
            if not self.replace and not is_unsettled(self.folder):
                raise in_the_way(
                    self.folder, "it holds a checkpoint", "choose another path or iteration, or if_exists='replace'"
                )
        else:
            refuse_older(self.root, self.folder, self.iteration)
        self._staging(staging).create()
        self._show_life(staging)

    def write(self, assignment: Assignment, report: Report) -> WriterResult:
        """Write what this rank was assigned.

        Raises:
            ShardwayError: `io-failed`, `no-space`.

        *Ranks*: those that were assigned something.
        """
        self._show_life(assignment.staging)
        return write_shards(
            self.state,
            assignment.shards,
            assignment.objects,
            self._staging(assignment.staging).path,
            rank=self.rank,
            on_progress=report,
            fsync=self.sync,
            num_files=self.writers,
            first_file=assignment.first_file,
        )

    def publish(self, staging: str, tag: str, results: Sequence[WriterResult], report: Report) -> None:
        """Write the metadata and the other small files into the attempt's own directory.

        Raises:
            ShardwayError: `coverage` and the like, should what was written not be the model; `io-failed`, `no-space`;
                `distcp-truncated` when a rank's file is not there as it was reported.

        *Ranks*: coordinator.
        """
        shared = self._staging(staging)
        companions = self._read_companions()
        assembly = assemble(
            results,
            iteration=self.iteration,
            content_metadata=self.state.content_metadata,
            tensors=self._kinds(results),
            record=self.record,
            companions=companions,
        )
        for name, num_bytes in assembly.files.items():
            path = shared.path / name
            with failing(f"look for {num_bytes:,} bytes that a rank wrote", path):
                found = path.stat().st_size
            if found != num_bytes:
                raise ShardwayError(
                    Problem(
                        code=Code.DISTCP_TRUNCATED,
                        what=f"{name} is not as the rank that wrote it said",
                        file=path,
                        facts=(f"{num_bytes} bytes written, {found} found",),
                        cure="do all ranks see the same filesystem at this path?",
                    )
                )
        for name, contents in {**assembly.small_files, **companions}.items():
            shared.write(tag, name, contents)
            report(len(contents))
        shared.seal(tag, assembly.files)

    def finish(self, staging: str, tag: str, report: Report) -> None:
        """Rename the staging folder into place and let the root name it; done already is success.

        Several ranks may do this at once, and any of them may be killed at any point of it.

        Raises:
            ShardwayError: `io-failed`; `destination-exists` when something else has come to lie there meanwhile.

        *Ranks*: any.
        """
        shared = self._staging(staging)
        shared.publish(tag, replace=self.replace, report=report)
        persistently(lambda: publish_tracker(self.root, self.folder, self.iteration, sync=self.sync))
        if self.sync:
            persistently(lambda: sync_directory(self.root))
        shared.settle(tag)

    def abandon(self, staging: str) -> None:
        """Remove the staging folder, and what directories above it this save has made; never raises.

        *Ranks*: every participant.
        """
        pulse = self._pulses.pop(staging, None)
        if pulse is not None:
            pulse.stop()
        self._staging(staging).remove()
        with contextlib.suppress(OSError):
            for directory in self.made:
                directory.rmdir()  # succeeds only when it is empty

    def _staging(self, staging: str) -> SharedStaging:
        return SharedStaging(self.folder, staging, sync=self.sync)

    def _show_life(self, staging: str) -> None:
        if self._pulses.get(staging) is None:
            self._pulses[staging] = self._staging(staging).show_life()

    def _read_companions(self) -> dict[str, bytes]:
        """Contents of the files of the Hugging Face model and of its config, by their names in the iteration folder."""
        found: dict[str, bytes] = {}
        for name, source in self.companions.items():
            if isinstance(source, bytes):
                found[f"{HF_FOLDER}/{name}"] = source
            else:
                with failing("read a file for the hf folder", source):
                    found[f"{HF_FOLDER}/{name}"] = source.read_bytes()
        if self.run_config is not None:
            tokenizer = filter(is_tokenizer_file, self.companions)
            found |= {f"{TOKENIZER_FOLDER}/{name}": found[f"{HF_FOLDER}/{name}"] for name in tokenizer}
            found[RUN_CONFIG] = self.run_config
        return found

    def _kinds(self, results: Sequence[WriterResult]) -> Mapping[str, tuple[DType, Shape]]:
        """What must be there: what is known to belong to the model, and all that the ranks brought."""
        known = {key: (dtype or BFLOAT16, shape) for key, (dtype, shape) in (self.tensors or {}).items()}
        items = (item.shard for result in results for item in result.shards)
        return known | {shard.key: (shard.dtype, shard.global_shape) for shard in items}
