"""Which files of a destination are finished, written down as they are, so that another run can go on from there.

A journal is a hint and never a proof: whoever goes on from it checks what it names.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
from typing import TYPE_CHECKING, NamedTuple

from shardway.run.files import failing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from shardway.formats.record import ChunkDigests

_MAX_BYTES = 2**30
_VERSION = 1
_AT_ONCE = 1024  # digests


class Finished(NamedTuple):
    """What a journal says.

    Attributes:
        files: Finished files, each with the digests of the Megatron chunks that it holds (none for an export).
        published: Inode of the directory that was about to be published, or None.
    """

    files: Mapping[str, ChunkDigests] = {}
    published: int | None = None


class Journal:
    """A journal that is being written, a line for each file; any thread may add to it.

    Args:
        path: The file; what is there is replaced.
        key: What tells the work that it is about from other work.
        finished: Files that are finished already.

    Raises:
        ShardwayError: `io-failed`, `no-space`.
    """

    def __init__(self, path: Path, key: str, finished: Finished) -> None:
        self._broken = False
        self._lock = threading.Lock()
        new = path.with_name(f"{path.name}-{os.urandom(8).hex()}")
        with failing("begin a journal", new):
            self._descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                self._append(_line([_compact({"format": _VERSION, "key": key})]))
                for name, digests in finished.files.items():
                    self._append(_line(_entry(name, digests)))
                new.replace(path)
            except BaseException:
                os.close(self._descriptor)
                raise

    def add(self, name: str, *digests: ChunkDigests) -> None:
        """Note that every byte of a file is written, and the digests of its chunks; never raises."""
        self._note(_line(_entry(name, *digests)))

    def publishing(self, inode: int) -> None:
        """Note that the directory of this inode is about to be published; never raises."""
        self._note(_line([_compact({"published": inode})]))

    def close(self) -> None:
        """Close the file; it stays."""
        with self._lock:
            if self._descriptor >= 0:
                descriptor, self._descriptor = self._descriptor, -1
                with contextlib.suppress(OSError):
                    os.close(descriptor)

    def _note(self, line: bytearray) -> None:
        with self._lock:
            if self._broken or self._descriptor < 0:
                return
            try:
                self._append(line)
            except OSError:
                self._broken = True  # a hint less: no reason to give up the work of hours

    def _append(self, line: bytearray) -> None:
        # In one piece where the system takes it so: who is killed in the middle of a line has noted nothing.
        while line:
            del line[: os.write(self._descriptor, line)]


def read_journal(path: Path, key: str) -> Finished:
    """What a journal says about the work of `key`: nothing where it is missing, or about other work.

    Lines are believed up to the first that can't be understood.
    """
    files: dict[str, ChunkDigests] = {}
    published = None
    try:
        with path.open("rb") as file:
            lines = file.read(_MAX_BYTES).splitlines()
        head = json.loads(lines[0])
        if head["format"] != _VERSION or head["key"] != key:
            return Finished()
        for line in lines[1:]:
            entry = json.loads(line)
            if "published" in entry:
                published = int(entry["published"])
                continue
            files[str(entry["file"])] = {
                (str(tensor), tuple(map(int, start))): str(digest) for tensor, start, digest in entry["digests"]
            }
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        pass
    return Finished(files=files, published=published)


def _entry(name: str, *digests: ChunkDigests) -> Iterator[str]:
    """The line of a file piece by piece, for a file may hold tens of thousands of chunks."""
    yield f'{{"file":{_compact(name)},"digests":['
    comma = ""
    found = itertools.chain.from_iterable(each.items() for each in digests)
    while some := [(tensor, start, digest) for (tensor, start), digest in itertools.islice(found, _AT_ONCE)]:
        yield comma + _compact(some)[1:-1]
        comma = ","
    yield "]}"


def _line(parts: Iterable[str]) -> bytearray:
    line = bytearray()
    for text in parts:
        line += text.encode()
    line += b"\n"
    return line


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
