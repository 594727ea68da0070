"""A directory that looks like a repository to whoever reads headers: small files, and weights that end after theirs.

Weights are sparse files of the size that they have on the Hub, of which only the header was fetched. So everything
that is checked of a local directory is checked of a repository, before a tensor's byte is fetched.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats.huggingface import is_tokenizer_file, is_weights, weight_files
from shardway.formats.safetensors import MAX_HEADER_BYTES
from shardway.hub.client import cached, download, read_range, remember
from shardway.run.files import failing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from shardway.hub.client import RemoteFile, Repository

_NUM_REQUESTS = 8  # at once
_FIRST_BYTES = 128 * 2**10  # holds the header of most files
_MAX_SMALL_FILE_BYTES = 64 * 2**20


def is_fetched(file: RemoteFile) -> bool:
    """Whether a file is fetched along with the weights: configuration and tokenizer, never code."""
    name = file.name
    depth = name.count("/")
    if name.startswith(".") or name.lower().endswith(".py") or file.num_bytes > _MAX_SMALL_FILE_BYTES:
        return False
    return (not depth and name.endswith(".json")) or (depth < 2 and is_tokenizer_file(name))


def make_skeleton(repository: Repository, folder: Path, *, keep: bool) -> None:
    """Fill an empty directory.

    Args:
        repository: What it is to look like.
        folder: The directory.
        keep: Whether small files go through the local cache, to be found there by others.

    Raises:
        ShardwayError: `path-escapes`, and what fetching raises. What is wrong with the weights shows when the
            directory is opened.
    """
    _check_names(repository)
    if keep:
        remember(repository)
    small = [file for file in repository.files.values() if is_fetched(file)]
    with failing("look into the repository", folder):
        _in_parallel(lambda file: _fetch_small(repository, file, folder, keep=keep), small)
        for file in repository.files.values():
            if is_weights(file.name) and file not in small:
                (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
                with (folder / file.name).open("xb") as placeholder:
                    placeholder.truncate(file.num_bytes)
        try:
            chosen = weight_files(folder)
        except ShardwayError:
            return
        files = [repository.files[name] for name in chosen if name in repository.files]
        _in_parallel(lambda file: _fetch_header(repository, file, folder), files)


def header_bytes(path: Path) -> bytes:
    """The header of a safetensors file with its length, as it is in the file, without looking at what it says."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), MAX_HEADER_BYTES))


def _in_parallel(task: Callable[[RemoteFile], None], files: Iterable[RemoteFile]) -> None:
    pool = ThreadPoolExecutor(_NUM_REQUESTS, thread_name_prefix="shardway-hub")
    try:
        for _ in pool.map(task, files):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _fetch_small(repository: Repository, file: RemoteFile, folder: Path, *, keep: bool) -> None:
    known = cached(repository, file.name)
    if known is None and not keep:
        download(repository, file.name, folder, lambda _: None)
        return
    (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(known or download(repository, file.name, None, lambda _: None), folder / file.name)


def _fetch_header(repository: Repository, file: RemoteFile, folder: Path) -> None:
    known = cached(repository, file.name)
    if known is not None:
        header = header_bytes(known)
    else:
        header = read_range(repository, file.name, _FIRST_BYTES)
        wanted = 8 + int.from_bytes(header[:8], "little")
        if len(header) < wanted <= min(MAX_HEADER_BYTES, file.num_bytes):
            header = read_range(repository, file.name, wanted)
        header = header[:wanted]
    with open(os.open(folder / file.name, os.O_WRONLY | os.O_CLOEXEC), "wb") as skeleton:
        skeleton.write(header)


def _check_names(repository: Repository) -> None:
    for name in repository.files:
        if name.startswith("/") or "\\" in name or "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
            what = f"the Hub names the file {name!r}, which is not a plain path below the repository"
            cure = "don't trust this server"
            raise ShardwayError(Problem(code=Code.PATH_ESCAPES, what=what, file=repository.name, cure=cure))
