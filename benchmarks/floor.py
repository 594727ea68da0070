"""Threads that read, hash and write the bytes of a directory, as conversions do, but without a plan."""

from __future__ import annotations

import itertools
import os
import sys
from functools import partial
from pathlib import Path

import xxhash

from shardway.run.engine import parse_workers
from shardway.run.files import Files, page_buffer
from shardway.run.mover import BUFFER_BYTES
from shardway.run.team import Team


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    sizes = {str(path.relative_to(source)): path.stat().st_size for path in source.rglob("*") if path.is_file()}
    for name, size in sizes.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).touch()
        os.truncate(target / name, size)
    num_threads = parse_workers(None)
    edges = [sum(sizes.values()) * number // num_threads for number in range(num_threads + 1)]
    with Files(source) as read, Files(target, writable=True) as written:
        Team().run([partial(copy, read, written, sizes, *part) for part in itertools.pairwise(edges)], "floor")


def copy(read: Files, written: Files, sizes: dict[str, int], begin: int, end: int) -> None:
    """Copy the bytes from `begin` to `end` of all files one after the other."""
    buffer = page_buffer(BUFFER_BYTES)
    hasher = xxhash.xxh3_128()
    first = 0
    for name, size in sizes.items():
        low, high = max(begin - first, 0), min(end - first, size)
        first += size
        for at in range(low, high, BUFFER_BYTES):
            view = buffer[: min(BUFFER_BYTES, high - at)]
            read.read_into(name, view, at)
            hasher.update(view)
            written.write_from(name, view, at)


if __name__ == "__main__":
    main()
