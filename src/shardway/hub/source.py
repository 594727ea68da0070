"""A repository on the Hub as the source of a conversion."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.core.tensors import Catalog
from shardway.formats.huggingface import CONFIG_FILE, open_huggingface
from shardway.hub.client import cache_directory, cached, look_up
from shardway.hub.skeleton import make_skeleton
from shardway.hub.supply import HubSupply, files_at_once
from shardway.plans.model import Direction, Plan
from shardway.run.files import failing
from shardway.run.waves import Wave, arrivals, bytes_at_once, in_waves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shardway.hub.client import Repository
    from shardway.run.progress import Progress

_MAX_LISTED = 4
_PASSING = {Code.HUB_UNREACHABLE, Code.HUB_OFFLINE, Code.DOWNLOAD_DAMAGED, Code.HUB_REFUSED, Code.HUB_GATED}


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A repository, looked up, its headers fetched.

    Attributes:
        repository: The repository.
        root: Directory that looks like it to whoever reads headers and small files; gone when the context ends.
        keep: Whether what is fetched goes into the local cache and stays there.
    """

    repository: Repository
    root: Path
    keep: bool

    @property
    def fingerprint(self) -> str:
        """What tells it from other sources: repository and commit."""
        return f"hub:{self.repository.name}@{self.repository.sha}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, one sentence each."""
        code = sorted(name for name in self.repository.files if name.endswith(".py"))
        notes = [f"read from the Hub: {self.repository.name} at commit {self.repository.sha}"]
        if code:
            listed = ", ".join(code[:_MAX_LISTED]) + (", ..." if len(code) > _MAX_LISTED else "")
            notes.append(f"code of the repository was not fetched: {listed}")
        return tuple(notes)

    def spoken(self, problem: Problem) -> Problem:
        """A problem, speaking of the repository instead of the directory that stands for it."""

        def spoken(text: str) -> str:
            return text.replace(str(self.root), str(self.repository))

        cure = None if problem.cure is None else spoken(problem.cure)
        if self.repository.offline and problem.code is Code.FILE_MISSING:
            cure = "it is not in the cache: unset HF_HUB_OFFLINE, or run the command once where there is a network"
        return problem._replace(
            what=spoken(problem.what),
            facts=tuple(map(spoken, problem.facts)),
            file=None if problem.file is None else spoken(str(problem.file)),
            cure=cure,
        )

    def bytes_held(self, plan: Plan) -> int:
        """The most bytes that fetched files will take beside the destination; 0 where they go into the cache.

        Raises:
            ShardwayError: `no-space` where the cache has too little room.
        """
        waves = in_waves(plan, plan.streams)
        sizes = {
            name: self.repository.files[name].num_bytes
            for name in arrivals(waves)
            if cached(self.repository, name) is None
        }
        if not self.keep:
            return bytes_at_once(waves, sizes, files_at_once(waves, keep=False))
        cache = cache_directory()
        with failing("find the free space", cache):
            free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
        if sum(sizes.values()) > free:
            raise ShardwayError(
                Problem(
                    code=Code.NO_SPACE,
                    what="the cache of the Hub has too little free space",
                    file=cache,
                    facts=(f"needed {sum(sizes.values()):,} bytes, free {free:,} bytes",),
                    cure="--no-keep-source needs two files at a time; or set HF_HOME to a larger disk",
                )
            )
        return 0

    def supply(self, plan: Plan, folder: Path, progress: Callable[[Progress], None] | None) -> tuple[Plan, HubSupply]:
        """The plan with its source in a directory, and what brings the files there.

        Args:
            plan: A plan whose source is `root`.
            folder: Directory to be made.
            progress: Called as bytes arrive.
        """
        plan = plan._replace(hf=Catalog(root=folder, tensors=plan.hf.tensors))
        return plan, HubSupply(self.repository, plan, self.root, folder, keep=self.keep, progress=progress)


@contextlib.contextmanager
def open_hub(name: str, revision: str | None, *, keep: bool) -> Iterator[HubSource]:
    """Look a repository up and fetch its headers and small files.

    Raises:
        ShardwayError: What `look_up` and `make_skeleton` raise. Errors about files that are raised in the context speak
            of the repository, not of the directory that stands for it.
    """
    repository = look_up(name, revision)
    with tempfile.TemporaryDirectory(prefix="shardway-hub-") as folder:
        source = HubSource(repository=repository, root=Path(folder).resolve(), keep=keep)
        try:
            make_skeleton(repository, source.root, keep=keep)
            yield source
        except ShardwayError as error:
            raise ShardwayError(map(source.spoken, error.problems)) from error


def is_passing(error: BaseException) -> bool:
    """Whether an import that fails so may succeed when it goes on later: the network failed, or somebody stopped it."""
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, ShardwayError) and error.codes <= _PASSING)


def fetched(name: str, revision: str | None, progress: Callable[[Progress], None] | None) -> Path:
    """The directory in the local cache of a repository, all that is needed of it fetched.

    Raises:
        ShardwayError: What `open_hub` raises, what is wrong with its headers, and what fetching raises.
    """
    with open_hub(name, revision, keep=True) as source:
        return fetch(source, progress)


def fetch(source: HubSource, progress: Callable[[Progress], None] | None) -> Path:
    """Fetch all that is needed of a repository into the local cache.

    Returns:
        Its directory there.

    Raises:
        ShardwayError: What is wrong with its headers, and what fetching raises.
    """
    found = open_huggingface(source.root)
    plan = Plan(direction=Direction.COMPARE, hf=found.catalog, mcore=found.catalog, streams=())
    waves = [Wave((name,), (), (name,)) for name in found.files]
    with (
        tempfile.TemporaryDirectory(prefix="shardway-hub-") as links,
        source.supply(plan, Path(links), progress)[1] as supply,
    ):
        supply.begin(waves)
        for wave in waves:
            supply.wait(wave.needs)
            supply.release(wave.frees)
    config = cached(source.repository, CONFIG_FILE)
    if config is None:
        raise RuntimeError(f"{source.repository} was fetched, and is not in the cache")
    return config.parent
