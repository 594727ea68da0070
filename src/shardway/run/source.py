"""Seeing that the files of a source stay what they are while they are read."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.errors import Code, Problems, ShardwayError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from shardway.core.tensors import Catalog

_MAX_DEPTH = 3


class _Identity(NamedTuple):
    """What changes when a file is written to, cut off, or replaced by another one."""

    num_bytes: int
    mtime_ns: int
    inode: int


class Snapshot:
    """What the files below a directory were when it was made; made before anything in them is read.

    Args:
        root: The directory; links to files are followed, links to directories are not.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._found: dict[str, _Identity] = {}
        for folder, folders, names in os.walk(root):
            within = os.path.relpath(folder, root)
            if within.count(os.sep) + (within != ".") >= _MAX_DEPTH - 1:
                folders.clear()
            for name in names:
                relative = name if within == "." else f"{within}{os.sep}{name}"
                try:
                    self._found[relative] = _identify(root / relative)
                except OSError:
                    continue  # reading it will tell

    def num_bytes(self, suffix: str) -> int:
        """Bytes of all files whose names end in `suffix`."""
        return sum(found.num_bytes for name, found in self._found.items() if name.endswith(suffix))

    def fingerprint(self, names: Iterable[str]) -> str:
        """What tells one source from another: names, sizes and times of change of some files, as an xxh3-128.

        A copy that keeps the times has the same fingerprint.
        """
        import xxhash

        hasher = xxhash.xxh3_128()
        for name in sorted(set(names)):
            known = self._found.get(name, _Identity(-1, 0, 0))
            hasher.update(f"{name}\0{known.num_bytes}\0{known.mtime_ns}\0".encode())
        return str(hasher.hexdigest())

    def check(self, names: Iterable[str] | None = None) -> None:
        """Look at some files again, or at all of them.

        Raises:
            ShardwayError: `source-changed` for each that is no longer the file that it was.
        """
        problems = Problems()
        for name in sorted(set(self._found if names is None else names)):
            known = self._found.get(name)
            path = self.root / name
            try:
                found = _identify(path)
                facts = tuple(
                    f"{what}: {before} before, {after} now"
                    for what, before, after in zip(
                        ("bytes", "time of change (ns)", "inode"), known or ("none",) * 3, found, strict=True
                    )
                    if before != after
                )
            except OSError as error:
                facts = (str(error),)
            if facts:
                problems.add(
                    Code.SOURCE_CHANGED,
                    f"{name} of the source changed while it was being read",
                    file=path,
                    facts=facts,
                    cure="wait until nothing writes to the source, and run the command again",
                )
        problems.raise_if_any()

    def reading(self, catalog: Catalog) -> tuple[Snapshot, list[str]]:
        """What `unchanged` takes, for the files of a catalog that lies at or below the directory."""
        files = {chunk.file for tensor in catalog.tensors.values() for chunk in tensor.chunks}
        within = os.path.relpath(catalog.root, self.root)
        return self, [os.path.normpath(os.path.join(within, name)) for name in files]


@contextlib.contextmanager
def unchanged(*reads: tuple[Snapshot, Iterable[str] | None]) -> Iterator[None]:
    """Look again at what was read when the context ends; what went wrong in it may have no other cause.

    Args:
        reads: Snapshots, and which of their files are read; None for all.

    Raises:
        ShardwayError: `source-changed`, instead of what the context raises.
    """
    try:
        yield
    except ShardwayError:
        _check(reads)
        raise
    _check(reads)


def _check(reads: Iterable[tuple[Snapshot, Iterable[str] | None]]) -> None:
    for snapshot, names in reads:
        snapshot.check(names)


def _identify(path: Path) -> _Identity:
    status = path.stat()
    return _Identity(status.st_size, status.st_mtime_ns, status.st_ino)
