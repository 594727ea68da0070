"""What a live save does to the disk: one iteration folder, staged beside its place and renamed into it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import time
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
from shardway.run.publish import exchange, live_staging_name

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
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY}
_ASIDE = "-old"  # `exchange` calls so what it puts aside on filesystems that can't exchange
_TURNS = 40  # with the pauses between them about eight seconds, while another rank is at it


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
            with failing(f"look for {num_bytes:,} bytes that a rank wrote", path / name):
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
        target = path / _mark(staging, tag)
        directories = {target}
        for name, contents in {**assembly.small_files, **companions}.items():
            directories |= _write(target, name, contents, sync=self.sync)
            report(len(contents))
        belong = [*assembly.files, *assembly.small_files, *([HF_FOLDER] if companions else [])]
        _write(target, _MANIFEST, json.dumps(belong).encode(), sync=self.sync)
        if self.sync:
            for directory in (*sorted(directories, reverse=True), path):
                sync_directory(directory)

    def finish(self, staging: str, tag: str, report: Report) -> None:
        """Rename the staging folder into place and let the root name it; done already is success.

        Several ranks may do this at once, and any of them may be killed at any point of it. What makes that safe is
        that each takes the staging folder over by renaming it to a name of its own: of two, one succeeds, and who
        was overtaken has nothing left under the name that it goes on to use. The new folder is told from an old one
        that it replaced by the directory of its attempt, which is removed last.

        Raises:
            ShardwayError: `io-failed`; `destination-exists` when something else has come to lie there meanwhile.

        *Ranks*: any.
        """
        mark = _mark(staging, tag)
        with failing("publish", self.folder):
            self._take_place(staging, mark)
            report(1)
            staged = self._staged(staging)
            in_place = (self.folder / mark).is_dir()
            for path in staged:
                # Without an exchange, a rank that was overtaken may be about to put back what it has put aside.
                if in_place or not path.name.endswith(_ASIDE):
                    shutil.rmtree(path, ignore_errors=True)
            shutil.rmtree(self.folder / mark, ignore_errors=True)
        publish_tracker(self.root, self.folder, self.iteration, sync=self.sync)
        if self.sync:
            sync_directory(self.root)

    def abandon(self, staging: str) -> None:
        """Remove the staging folder, and what directories above it this save has made; never raises.

        *Ranks*: every participant.
        """
        shutil.rmtree(self._staging(staging), ignore_errors=True)
        with contextlib.suppress(OSError):
            for directory in self.made:
                directory.rmdir()  # succeeds only when it is empty

    def _staging(self, staging: str) -> Path:
        return self.root / live_staging_name(self.folder.name, staging)

    def _staged(self, staging: str) -> list[Path]:
        """The staging folder under whatever name it has now, and those that it has replaced."""
        name = self._staging(staging).name
        return [
            self.root / each for each in sorted(os.listdir(self.root)) if each == name or each.startswith(f"{name}-")
        ]

    def _take_place(self, staging: str, mark: str) -> None:
        """Return when the new folder is in its place, whoever has put it there."""
        path = self._staging(staging)
        for turn in range(_TURNS):
            time.sleep(0.01 * turn)  # another rank is at it: let it
            staged = self._staged(staging)
            new = next((each for each in staged if (each / mark).is_dir()), None)
            if new is None:
                if staged == self._staged(staging) and self.folder.is_dir():
                    return
                continue
            own = path.with_name(f"{path.name}-{secrets.token_hex(4)}")
            with contextlib.suppress(FileNotFoundError):  # taken over by another rank
                new.rename(own)
                _tidy(own, mark)
                if self.sync:
                    sync_directory(own)
                self._put(own)
                shutil.rmtree(own, ignore_errors=True)  # what was replaced, if anything was
                return
        raise FileNotFoundError(errno.ENOENT, "what was staged has vanished", os.fspath(self.folder))

    def _put(self, new: Path) -> None:
        """Rename the new folder into place, or exchange it for what is there."""
        try:
            new.rename(self.folder)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            if not self.replace:
                raise in_the_way(
                    self.folder, "something has come to lie there", "move it away, and save again"
                ) from error
            try:
                exchange(new, self.folder)
            except OSError as overtaken:
                if overtaken.errno not in _TAKEN:
                    raise
                # While this rank had put the old folder aside, another one has put the new one in its place.
                raise FileNotFoundError(errno.ENOENT, "taken over by another rank", os.fspath(new)) from overtaken

    def _read_companions(self) -> dict[str, bytes]:
        """Contents of the files that go into ``hf/``, by their names in the iteration folder."""
        found = {}
        for name, source in self.companions.items():
            if isinstance(source, bytes):
                found[f"{HF_FOLDER}/{name}"] = source
            else:
                with failing("read a file for the hf folder", source):
                    found[f"{HF_FOLDER}/{name}"] = source.read_bytes()
        return found

    def _kinds(self, results: Sequence[WriterResult]) -> Mapping[str, tuple[DType, Shape]]:
        """What must be there: what is known to belong to the model, and all that the ranks brought."""
        known = {key: (dtype or BFLOAT16, shape) for key, (dtype, shape) in (self.tensors or {}).items()}
        items = (item.shard for result in results for item in result.shards)
        return known | {shard.key: (shard.dtype, shard.global_shape) for shard in items}


def _tidy(path: Path, mark: str) -> None:
    """Leave in the staging folder the files of the attempt's manifest alone, under their names."""
    belong = {*json.loads((path / mark / _MANIFEST).read_bytes()), mark}
    for name in os.listdir(path):
        if name not in belong:
            _remove(path / name)
    for name in os.listdir(path / mark):
        if name != _MANIFEST:
            (path / mark / name).rename(path / name)


def _write(target: Path, name: str, contents: bytes, *, sync: bool) -> set[Path]:
    """Write a file below the attempt's own directory; never create what is above that, which others may have moved.

    Returns:
        The directories that lead to it.
    """
    path = target / name
    directories = [*reversed(path.relative_to(target.parent).parents)][1:]
    with failing(f"write {len(contents):,} bytes", path):
        for directory in directories:
            (target.parent / directory).mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.write(contents)
            file.flush()
            if sync:
                os.fsync(file.fileno())
    return {target.parent / directory for directory in directories}


def _mark(staging: str, tag: str) -> str:
    return f".publish-{staging}-{tag}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
