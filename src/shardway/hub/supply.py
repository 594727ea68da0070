"""Fetching the weights of a repository in the order in which an import needs them, ahead of it by a few files."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from typing import TYPE_CHECKING, Self

import xxhash

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.hub.client import StoppedError, cached, download
from shardway.hub.skeleton import header_bytes
from shardway.plans.matching import tied_problem
from shardway.run.files import failing
from shardway.run.lease import remove_tree
from shardway.run.progress import Meter
from shardway.run.waves import arrivals, most_at_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from shardway.core.tensors import StoredTensor
    from shardway.hub.client import Repository
    from shardway.plans.model import Plan
    from shardway.run.progress import Progress
    from shardway.run.waves import Wave

_FEWEST = 2  # one is read while the next one comes
_FEWEST_KEPT = 8
_MOST_THREADS = 8
_READ_BYTES = 2**20
_LONGEST_STOP_S = 5.0  # a thread that waits for an answer looks up when it comes; it can do no harm until then


def files_at_once(waves: Sequence[Wave], *, keep: bool) -> int:
    """How many files are brought before others have gone."""
    return max(most_at_once(waves), _FEWEST_KEPT if keep else _FEWEST)


class HubSupply:
    """Brings files into a directory: links to the local cache, or files that go when they are not needed any more.

    What has been fetched has the size and sha256 that the Hub states, and the header that was planned by.

    Args:
        repository: Where they come from.
        plan: What will be done with them.
        skeleton: Directory with their headers.
        folder: The directory; what an earlier run has left in it is used.
        keep: Whether they are fetched into the local cache, and stay there.
        progress: Called as bytes arrive, in the phase ``"fetch"``.

    Attributes:
        keep: As given.
        others: Files of tensors that must be copies of others; they are looked at as they come.
    """

    def __init__(
        self,
        repository: Repository,
        plan: Plan,
        skeleton: Path,
        folder: Path,
        *,
        keep: bool,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._repository = repository
        self._skeleton = skeleton
        self._folder = folder
        self.keep = keep
        self._progress = progress
        self._plan = plan
        self._looked_at: dict[str, list[StoredTensor]] = {}
        for name in sorted({*plan.copies, *plan.copies.values()}):
            tensor = plan.hf.tensors[name]
            self._looked_at.setdefault(tensor.chunks[0].file, []).append(tensor)
        self.others = tuple(self._looked_at)
        self._digests: dict[str, str] = {}
        self._order: list[str] = []
        self._most = 0
        self._coming = 0
        self._present: set[str] = set()
        self._errors: list[BaseException] = []
        self._stopped = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        until = time.monotonic() + _LONGEST_STOP_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def begin(self, waves: Sequence[Wave]) -> None:
        """Start fetching what the waves need, in their order."""
        self._order = arrivals(waves)
        self._most = files_at_once(waves, keep=self.keep)
        with failing("look for what was fetched before", self._folder):
            self._folder.mkdir(exist_ok=True)
            self._sweep()
        absent = [name for name in self._order if cached(self._repository, name) is None]
        files = self._repository.files
        self._meter = Meter("fetch", sum(files[name].num_bytes for name in absent), self._progress if absent else None)
        self._threads = [
            threading.Thread(target=self._work, name=f"shardway-fetch-{k}", daemon=True)
            for k in range(min(self._most, _MOST_THREADS, len(self._order)))
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, names: Iterable[str]) -> None:
        """Return when these files are there, whole.

        Raises:
            ShardwayError: As `client.download`; `download-damaged`.
        """
        wanted = set(names)
        with self._changed:
            while not wanted <= self._present and not self._errors:
                self._changed.wait()
            if self._errors:
                raise self._errors[0]

    def release(self, names: Iterable[str]) -> None:
        """Make room for others: what is not in the cache is removed."""
        for name in names:
            with failing("remove what is not needed any more", self._folder / name):
                (self._folder / name).unlink()
        with self._changed:
            self._present -= set(names)
            self._changed.notify_all()

    def check_copies(self) -> None:
        """Prove that tensors which the config ties to another one are bit-equal copies of it; all have passed by now.

        Raises:
            ShardwayError: `tied-weights-differ` for every one that is not.
        """
        problems = [
            tied_problem(name, of, self._plan.hf.tensors[name].chunks[0].file, "the digests of their bytes differ")
            for name, of in self._plan.copies.items()
            if self._digests[name] != self._digests[of]
        ]
        if problems:
            raise ShardwayError(problems)

    def _sweep(self) -> None:
        """Remove what an earlier run has left and is no whole file that is needed."""
        for path in self._folder.iterdir():
            file = self._repository.files.get(path.name)
            if path.is_symlink() or not path.is_dir():
                usable = not path.is_symlink() and file is not None and path.stat().st_size == file.num_bytes
                if not usable or path.name not in self._order[: self._most]:
                    path.unlink()
            else:
                remove_tree(path)

    def _work(self) -> None:
        while (name := self._next()) is not None:
            try:
                self._bring(name)
            except BaseException as error:  # noqa: BLE001 - raised again by wait()
                with self._changed:
                    self._stopped = True
                    if not isinstance(error, StoppedError):
                        self._errors.append(error)
                    self._changed.notify_all()
                return
            with self._changed:
                self._coming -= 1
                self._present.add(name)
                self._changed.notify_all()

    def _next(self) -> str | None:
        """The next file to fetch, once there is room for it."""
        with self._changed:
            while not self._stopped and self._order and self._coming + len(self._present) >= self._most:
                self._changed.wait()
            if self._stopped or not self._order:
                return None
            self._coming += 1
            return self._order.pop(0)

    def _bring(self, name: str) -> None:
        place = self._folder / name
        found = cached(self._repository, name)
        if found is None and place.exists():
            found = self._left_over(place, name)
        if found is None:
            got = download(self._repository, name, None if self.keep else self._folder, self._arrived)
            self._check(got, name)
            found = got
        if header_bytes(found) != header_bytes(self._skeleton / name):
            raise _damaged(self._repository, name, ("its header is not the one that was sent before",))
        if found != place:
            with failing("link to the cache", place):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(found)
        for tensor in self._looked_at.get(name, ()):
            self._digests[tensor.name] = self._digest(place, tensor)

    def _left_over(self, place: Path, name: str) -> Path | None:
        """A file that an earlier run had fetched, if it is whole."""
        try:
            self._check(place, name)
        except ShardwayError:
            return None
        self._arrived(self._repository.files[name].num_bytes)
        return place

    def _arrived(self, num_bytes: int) -> None:
        if self._stopped:
            raise StoppedError
        self._meter.advance(num_bytes)

    def _check(self, path: Path, name: str) -> None:
        """Hold a file that was fetched against what the Hub states; one that is wrong is removed.

        Raises:
            ShardwayError: `download-damaged`.
        """
        stated = self._repository.files[name]
        facts = []
        with failing("read what was fetched", path):
            num_bytes = path.stat().st_size
            if num_bytes != stated.num_bytes:
                facts.append(f"expected {stated.num_bytes:,} bytes, got {num_bytes:,}")
            elif stated.sha256 is not None:
                with path.open("rb", buffering=0) as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != stated.sha256:
                    facts.append(f"expected sha256 {stated.sha256}, got {found}")
            if facts:
                blob = os.path.realpath(path)
                path.unlink()
                if os.path.lexists(blob):
                    os.unlink(blob)
                raise _damaged(self._repository, name, tuple(facts))

    def _digest(self, path: Path, tensor: StoredTensor) -> str:
        hasher = xxhash.xxh3_128(f"{tensor.dtype.name}\0".encode())
        with failing("read what was fetched", path), path.open("rb", buffering=0) as file:
            file.seek(tensor.chunks[0].offset)
            left = tensor.num_bytes
            while left and (part := file.read(min(left, _READ_BYTES))):
                hasher.update(part)
                left -= len(part)
        return str(hasher.hexdigest())


def _damaged(repository: Repository, name: str, facts: tuple[str, ...]) -> ShardwayError:
    return ShardwayError(
        Problem(
            code=Code.DOWNLOAD_DAMAGED,
            what=f"{name} of {repository.name} is not what the Hub states",
            file=name,
            facts=facts,
            cure="it was removed; run the command again",
        )
    )
