"""What a live save does to the disk: one iteration folder, staged beside its place and renamed into it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardway.core.dtypes import BFLOAT16
from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats.iterations import iteration_folder
from shardway.live.assemble import assemble
from shardway.live.writer import write_shards
from shardway.plans.imports import HF_FOLDER
from shardway.run.destination import holds_checkpoint, in_the_way, publish_tracker, refuse_older
from shardway.run.files import failing, sync_directory
from shardway.run.publish import live_staging_name, write_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape
    from shardway.formats.record import Record
    from shardway.live.saving import Assignment, Report
    from shardway.live.state import LiveState
    from shardway.live.written import WriterResult

_MANIFEST = "manifest.json"
_GONE = {errno.ENOENT, errno.ENOTDIR}
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY}


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationFolder:
    """The folder of one iteration, as the save protocol's actions see it (`saving.SaveActions`).

    Every file but the shards' is first put into a directory of the publishing attempt, so that two coordinators, of
    which one was taken for dead, can't mix theirs; `finish` moves those of the attempt that was decided on.

    Attributes:
        root: Root of the checkpoint.
        iteration: Number of the iteration.
        rank: This rank; names the files that it writes.
        state: What this rank holds.
        tensors: Dtype (None: any) and shape of the tensors that must be there, where they are known.
        record: What `shardway.json` will say; None for none.
        companions: Paths of the files that go into ``hf/``, by name.
        replace: Whether an iteration folder that is there already gives way.
        writers: Files, and threads, with which this rank writes.
        sync: Force everything to the device before it is published.

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

    @property
    def folder(self) -> Path:
        """Where the iteration will be."""
        return self.root / iteration_folder(self.iteration)

    def prepare(self, staging: str) -> None:
        """Create the staging folder, unless the iteration is in place already and may not be replaced.

        Raises:
            ShardwayError: `destination-exists`, `destination-unwritable`, `io-failed`, `no-space`.

        *Ranks*: coordinator.
        """
        if holds_checkpoint(self.root, self.folder):
            if not self.replace:
                raise in_the_way(
                    self.folder, "it holds a checkpoint", "choose another path or iteration, or if_exists='replace'"
                )
        else:
            refuse_older(self.root, self.folder, self.iteration)
        path = self._staging(staging)
        with failing("create directory", path, Code.DESTINATION_UNWRITABLE):
            path.mkdir(parents=True, exist_ok=True)

    def write(self, assignment: Assignment, report: Report) -> WriterResult:
        """Write what this rank was assigned.

        Raises:
            ShardwayError: `io-failed`, `no-space`.

        *Ranks*: those that were assigned something.
        """
        return write_shards(
            self.state,
            assignment.shards,
            assignment.objects,
            self._staging(assignment.staging),
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
        path = self._staging(staging)
        assembly = assemble(
            results,
            iteration=self.iteration,
            content_metadata=self.state.content_metadata,
            tensors=self._kinds(results),
            record=self.record,
        )
        for name, num_bytes in assembly.files.items():
            with failing("look at what a rank wrote", path / name):
                found = (path / name).stat().st_size
            if found != num_bytes:
                raise ShardwayError(
                    Problem(
                        code=Code.DISTCP_TRUNCATED,
                        what=f"{name} is not as the rank that wrote it said",
                        file=path / name,
                        facts=(f"{num_bytes} bytes written, {found} found",),
                        cure="do all ranks see the same filesystem at this path?",
                    )
                )
        target = path / _attempt(tag)
        for name, contents in assembly.small_files.items():
            write_file(target / name, contents, sync=self.sync)
            report(len(contents))
        for name, source in self.companions.items():
            with failing(f"read {source}", target) if not isinstance(source, bytes) else contextlib.nullcontext():
                contents = source if isinstance(source, bytes) else source.read_bytes()
            write_file(target / HF_FOLDER / name, contents, sync=self.sync)
            report(len(contents))
        belong = [*assembly.files, *assembly.small_files, *([HF_FOLDER] if self.companions else [])]
        write_file(target / _MANIFEST, json.dumps(belong).encode(), sync=self.sync)
        if self.sync:
            sync_directory(path)

    def finish(self, staging: str, tag: str, report: Report) -> None:
        """Rename the staging folder into place and let the root name it; done already is success.

        Several ranks may do this at once, and any of them may be killed at any point of it.

        Raises:
            ShardwayError: `io-failed`.

        *Ranks*: any.
        """
        path = self._staging(staging)
        with failing("publish", self.folder):
            self._take_place(path, self._aside(staging), path / _attempt(tag))
        report(1)
        publish_tracker(self.root, self.folder, self.iteration, sync=self.sync)
        if self.sync:
            sync_directory(self.root)

    def abandon(self, staging: str) -> None:
        """Remove the staging folder, and the root if this save has made it; never raises.

        *Ranks*: every participant.
        """
        shutil.rmtree(self._staging(staging), ignore_errors=True)
        with contextlib.suppress(OSError):
            self.root.rmdir()  # succeeds only when it is empty

    def _staging(self, staging: str) -> Path:
        return self.root / live_staging_name(self.folder.name, staging)

    def _aside(self, staging: str) -> Path:
        return self.root / live_staging_name(self.folder.name, f"{staging}-old")

    def _take_place(self, path: Path, aside: Path, attempt: Path) -> None:
        moved = False
        try:
            _tidy(path, attempt)
            if self.replace and path.exists():
                moved = _put_aside(self.folder, aside)
            path.rename(self.folder)
        except OSError as error:
            if error.errno not in _GONE | _TAKEN or path.exists():
                raise
            # Another rank was faster: the staging folder has become the iteration's. What this one put aside after
            # that was the new folder, which then goes back.
            if moved and not self.folder.exists():
                aside.rename(self.folder)
        else:
            shutil.rmtree(aside, ignore_errors=True)

    def _kinds(self, results: Sequence[WriterResult]) -> Mapping[str, tuple[DType, Shape]]:
        """What must be there: what is known to belong to the model, and all that the ranks brought."""
        known = {key: (dtype or BFLOAT16, shape) for key, (dtype, shape) in (self.tensors or {}).items()}
        items = (item.shard for result in results for item in result.shards)
        return known | {shard.key: (shard.dtype, shard.global_shape) for shard in items}


def _tidy(path: Path, attempt: Path) -> None:
    """Leave in the staging folder the files of the attempt's manifest alone, under their names."""
    manifest = attempt / _MANIFEST
    if manifest.exists():
        belong = {*json.loads(manifest.read_bytes()), attempt.name}
        for name in os.listdir(path):
            if name not in belong:
                _remove(path / name)
        for name in os.listdir(attempt):
            if name != _MANIFEST:
                with contextlib.suppress(FileNotFoundError):  # moved by another rank
                    (attempt / name).rename(path / name)
        manifest.unlink(missing_ok=True)
    shutil.rmtree(attempt, ignore_errors=True)


def _put_aside(folder: Path, aside: Path) -> bool:
    try:
        folder.rename(aside)
    except OSError as error:
        if error.errno not in _GONE | _TAKEN:  # nothing to put aside, or done by another rank
            raise
        return False
    return True


def _attempt(tag: str) -> str:
    return f".publish-{tag}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
