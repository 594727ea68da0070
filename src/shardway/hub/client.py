"""The one module that imports huggingface_hub: its errors become ours, and no more of it is used than this.

huggingface_hub 1.1 and later (1.1, 1.10, 2.0 and 2.4 were tried). Endpoint, token, cache and offline mode are its own
affair: the environment variables that it documents hold.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats.huggingface import CONFIG_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import ModuleType

_TIMEOUT_S = 30.0
_TRIES = 5
_FULL = {errno.ENOSPC, errno.EDQUOT}
_PASSING = {408, 425, 429}


class RemoteFile(NamedTuple):
    """A file of a repository.

    Attributes:
        name: Its path in the repository.
        num_bytes: Its size.
        sha256: Of its contents, where the Hub states it (large files); else None.
    """

    name: str
    num_bytes: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A model's repository at one commit.

    Attributes:
        name: ``org/name``.
        revision: What was asked for: branch, tag or commit.
        sha: The commit.
        files: All its files by name; in offline mode those that are in the cache.
        offline: Whether only the cache may be used.
    """

    name: str
    revision: str
    sha: str
    files: Mapping[str, RemoteFile]
    offline: bool

    def __str__(self) -> str:
        return f"{self.name}@{self.sha[:12]}"


class StoppedError(Exception):
    """A download was given up because something else went wrong."""


def library(purpose: str) -> ModuleType:
    """huggingface_hub.

    Args:
        purpose: What needs it, for the message.

    Raises:
        ShardwayError: `extra-missing`.
    """
    try:
        import huggingface_hub.constants
        import huggingface_hub.utils
    except ImportError:
        what = f"{purpose} needs huggingface_hub, which is not installed"
        cure = "pip install shardway[hub]"
        raise ShardwayError(Problem(code=Code.EXTRA_MISSING, what=what, cure=cure)) from None
    return huggingface_hub


def look_up(name: str, revision: str | None) -> Repository:
    """Find out which commit a revision of a repository is, and what files there are; nothing is fetched.

    Args:
        name: ``org/name``.
        revision: Branch, tag or commit; None for ``main``.

    Raises:
        ShardwayError: `extra-missing`, `hub-not-found`, `hub-revision-missing`, `hub-gated`, `hub-unreachable`,
            `hub-refused`; in offline mode `hub-offline` where the cache does not know the revision.
    """
    hub = library(f"{name} is no file or directory; to take it as a repository on the Hub")
    wanted = revision or "main"
    if hub.constants.HF_HUB_OFFLINE:
        return _look_into_cache(hub, name, wanted)
    with speaking(name, wanted, "look up"):
        found = hub.HfApi().model_info(name, revision=wanted, files_metadata=True, timeout=_TIMEOUT_S)
    files = {
        each.rfilename: RemoteFile(each.rfilename, each.size or 0, None if each.lfs is None else each.lfs.sha256)
        for each in found.siblings or ()
    }
    return Repository(name=name, revision=wanted, sha=str(found.sha), files=files, offline=False)


def _look_into_cache(hub: ModuleType, name: str, revision: str) -> Repository:
    config = hub.try_to_load_from_cache(name, CONFIG_FILE, revision=revision)
    if not isinstance(config, str):
        raise ShardwayError(
            Problem(
                code=Code.HUB_OFFLINE,
                what=f"{name} at {revision} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it",
                file=hub.constants.HF_HUB_CACHE,
                facts=(f"no {CONFIG_FILE} of it was found there",),
                cure="unset HF_HUB_OFFLINE, or run the command once where there is a network",
            )
        )
    root = Path(config).parent
    files = {}
    for folder, _, found in os.walk(root):
        for each in found:
            path = Path(folder, each)
            with contextlib.suppress(OSError):
                files[path.relative_to(root).as_posix()] = RemoteFile(
                    path.relative_to(root).as_posix(), path.stat().st_size
                )
    return Repository(name=name, revision=revision, sha=root.name, files=files, offline=True)


def cached(repository: Repository, file: str) -> Path | None:
    """Where a file is in the local cache, of the size that the Hub states; None where it is not."""
    found = library("the Hub").try_to_load_from_cache(repository.name, file, revision=repository.sha)
    if not isinstance(found, str):
        return None
    try:
        whole = os.stat(found).st_size == repository.files[file].num_bytes
    except OSError:
        return None
    return Path(found) if whole else None


def cache_directory() -> Path:
    """Directory of the local cache."""
    return Path(library("the Hub").constants.HF_HUB_CACHE)


def cached_snapshot(name: str) -> Path | None:
    """Directory of a repository's latest revision in the local cache; None where there is none, or no library."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return None
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def remember(repository: Repository) -> None:
    """Let the local cache know which commit the revision is, so that it is found there without a network.

    Raises:
        ShardwayError: As `download`.
    """
    hub = library("the Hub")
    if repository.offline or repository.revision == repository.sha or CONFIG_FILE not in repository.files:
        return
    with speaking(repository.name, repository.revision, f"fetch {CONFIG_FILE} of"):
        hub.hf_hub_download(repository.name, CONFIG_FILE, revision=repository.revision, tqdm_class=_bar(lambda _: None))


def read_range(repository: Repository, file: str, num_bytes: int) -> bytes:
    """The first bytes of a file, by one request; fewer where it is shorter.

    Raises:
        ShardwayError: As `look_up`; `hub-refused` where the server sends whole files only.
    """
    hub = library("the Hub")
    url = hub.hf_hub_url(repository.name, file, revision=repository.sha)
    headers = {**hub.utils.build_hf_headers(), "Range": f"bytes=0-{num_bytes - 1}", "Accept-Encoding": "identity"}
    with speaking(repository.name, repository.revision, f"read the header of {file}"):
        stream = hub.utils.http_stream_backoff
        with stream("GET", url, headers=headers, timeout=_TIMEOUT_S, follow_redirects=True, max_retries=3) as response:
            hub.utils.hf_raise_for_status(response)
            if response.status_code != 206 and repository.files[file].num_bytes > num_bytes:
                what = f"the Hub does not send parts of files, so the header of {file} can't be read by itself"
                raise ShardwayError(Problem(code=Code.HUB_REFUSED, what=what, file=file))
            return bytes(response.read())


def download(repository: Repository, file: str, folder: Path | None, advance: Callable[[int], None]) -> Path:
    """Fetch a file whole: into the local cache, or into a folder. A connection that breaks is taken up where it broke.

    Args:
        repository: The repository.
        file: Its name there.
        folder: Directory to put it in, under its name; None for the cache.
        advance: Called with the bytes that have arrived since the last call; may raise to give up.

    Returns:
        Where it is.

    Raises:
        ShardwayError: As `look_up`; `file-missing`, `download-damaged`, `no-space`, `io-failed`.
    """
    hub = library("the Hub")
    place: dict[str, Any] = {} if folder is None else {"local_dir": folder}
    for tries_left in reversed(range(_TRIES)):
        num_bytes = 0

        def arrived(more: int) -> None:
            nonlocal num_bytes
            num_bytes += more
            advance(more)

        bar = _bar(arrived)
        try:
            with speaking(repository.name, repository.revision, f"fetch {file} of"):
                got = hub.hf_hub_download(
                    repository.name, file, revision=repository.sha, tqdm_class=bar, etag_timeout=_TIMEOUT_S, **place
                )
        except ShardwayError as error:
            # Before 2.0 the library leaves it to its caller to begin again, and goes on from what has arrived.
            if error.code is not Code.HUB_UNREACHABLE or not num_bytes or not tries_left:
                raise
            advance(-num_bytes)
        else:
            return Path(got)
    raise RuntimeError("one of the tries returns or raises")


def _bar(advance: Callable[[int], None]) -> type:
    """What huggingface_hub takes for a progress bar of tqdm."""

    class Bar:
        def __init__(self, *_: object, initial: float = 0, **__: object) -> None:
            self.total = self.n = 0
            if initial:
                advance(int(initial))

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, num_bytes: float | None = 1) -> None:
            advance(int(num_bytes or 0))

        def __getattr__(self, name: str) -> Callable[..., None]:
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *_, **__: None

    return Bar


@contextlib.contextmanager
def speaking(name: str, revision: str, doing: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into the project's errors.

    Args:
        name: The repository.
        revision: Its revision.
        doing: What is being done, before the repository's name.
    """
    try:
        yield
    except (ShardwayError, StoppedError):
        raise
    except Exception as error:
        problem = _problem(error, name, revision, f"could not {doing} {name} at {revision}")
        if problem is None:
            raise
        raise ShardwayError(problem) from error


def _problem(error: BaseException, name: str, revision: str, failed: str) -> Problem | None:
    """What an exception of huggingface_hub means; None for a defect."""
    from huggingface_hub import errors

    facts: tuple[str, ...] = ()
    code: Code | None
    cure: str | None
    if isinstance(error, errors.GatedRepoError):
        code, what = Code.HUB_GATED, f"{failed}: its owner has to grant you access first"
        cure = f"ask for it on the page of {name}, and log in with `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        code, what, cure = Code.HUB_REVISION_MISSING, f"{name} has no branch, tag or commit {revision!r}", None
    elif isinstance(error, errors.RepositoryNotFoundError):
        code, what = Code.HUB_NOT_FOUND, f"{name} is neither here nor on the Hub, as far as you may see"
        cure = "check the name; for a private repository log in with `hf auth login`"
    elif isinstance(error, (RuntimeError, errors.LocalEntryNotFoundError)) and error.__cause__ is not None:
        return _problem(error.__cause__, name, revision, failed)  # it only says where that came up
    else:
        code, cure = _code_and_cure(error)
        what, facts = failed, (_first_line(error),)
        if code is None:
            return None
    return Problem(code=code, what=what, facts=facts, cure=cure)


def _code_and_cure(error: BaseException) -> tuple[Code | None, str | None]:
    from huggingface_hub import errors

    again = "run the command again: what has arrived is kept"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status >= 500 or status in _PASSING:
            return Code.HUB_UNREACHABLE, again
        if isinstance(error, errors.EntryNotFoundError):
            return Code.FILE_MISSING, "the repository was changed; run the command again"
        return Code.HUB_REFUSED, "check the rights of your token: `hf auth whoami`"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return Code.HUB_OFFLINE, "unset HF_HUB_OFFLINE, or run the command once where there is a network"
    if isinstance(error, errors.HFValidationError):
        return Code.OPTION_INVALID, None
    if isinstance(error, OSError) and error.errno in _FULL:
        return Code.NO_SPACE, "free space there, or choose another destination"
    http_error = errors.HfHubHTTPError.__bases__[0]  # of httpx, under whatever name
    if isinstance(
        error, (http_error, RuntimeError, ValueError, errors.LocalEntryNotFoundError, errors.FileMetadataError)
    ):
        return Code.HUB_UNREACHABLE, again  # the connection, or what came over it
    if isinstance(error, OSError):
        return (Code.DOWNLOAD_DAMAGED if error.errno is None else Code.IO_FAILED), again
    return None, None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def check_reachable() -> None:
    """Check that something could be uploaded, as far as that is known without asking.

    Raises:
        ShardwayError: `extra-missing`, `hub-offline`.
    """
    if library("--push").constants.HF_HUB_OFFLINE:
        what = "nothing can be pushed while HF_HUB_OFFLINE is set"
        raise ShardwayError(Problem(code=Code.HUB_OFFLINE, what=what, cure="unset HF_HUB_OFFLINE"))


class Uploaded(NamedTuple):
    """Where something was uploaded to.

    Attributes:
        url: Page of the repository.
        sha: Its commit.
    """

    url: str
    sha: str


def upload(
    folder: Path, name: str, *, private: bool | None, revision: str | None, card: bytes | None, show_progress: bool
) -> Uploaded:
    """Upload what a folder holds to a repository, which is made where it does not exist.

    Args:
        folder: The folder; hidden files are left out.
        name: ``org/name``.
        private: Whether a repository that is made can be seen by its owners alone; None for the owner's default.
        revision: Branch, which is made where it does not exist; None for ``main``.
        card: README.md, for where neither the folder nor the repository has one.
        show_progress: Whether huggingface_hub may draw its bars on standard error.

    Raises:
        ShardwayError: `extra-missing`, `hub-offline`, `hub-not-found`, `hub-refused`, `hub-unreachable`.
    """
    hub = library("--push")
    bars = contextlib.nullcontext() if show_progress else _no_bars(hub)
    with bars, speaking(name, revision or "main", "push to"):
        api = hub.HfApi()
        made = api.create_repo(name, private=private, exist_ok=True)
        if revision is not None and revision != "main":
            api.create_branch(name, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            commit_message=f"Upload {folder.name} with shardway",
            ignore_patterns=[".*", "*/.*"],
        )
        if card is not None and not api.file_exists(name, "README.md", revision=revision):
            done = api.upload_file(
                path_or_fileobj=card,
                path_in_repo="README.md",
                repo_id=name,
                revision=revision,
                commit_message="Add a model card",
            )
    return Uploaded(str(made), str(cast("Any", done).oid))


@contextlib.contextmanager
def _no_bars(hub: ModuleType) -> Iterator[None]:
    """Keep huggingface_hub from drawing progress bars, which it does unless the whole process is told not to."""
    if hub.utils.are_progress_bars_disabled():
        yield
        return
    hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        hub.utils.enable_progress_bars()
