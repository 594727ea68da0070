"""The least that a conversion could take: threads read, hash and write the bytes of a directory, without a plan."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from pathlib import Path

import xxhash

from shardway.run.engine import parse_workers
from shardway.run.files import WRITE_BYTES
from shardway.run.mover import BUFFER_BYTES


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    found = [(path, path.stat().st_size) for path in sorted(source.rglob("*")) if path.is_file()]
    total = sum(size for _, size in found)
    for path, size in found:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
        os.truncate(copy, size)
    num_threads = parse_workers(None)
    edges = [total * number // num_threads for number in range(num_threads + 1)]
    threads = [
        threading.Thread(target=work, args=(source, target, found, begin, end))
        for begin, end in itertools.pairwise(edges)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def work(source: Path, target: Path, found: list[tuple[Path, int]], begin: int, end: int) -> None:
    """Copy the bytes from `begin` to `end` of all files one after the other."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    hasher = xxhash.xxh3_128()
    first = 0
    for path, size in found:
        low, high = max(begin - first, 0), min(end - first, size)
        first += size
        if low >= high:
            continue
        with (
            path.open("rb", buffering=0) as read,
            (target / path.relative_to(source)).open("r+b", buffering=0) as written,
        ):
            for at in range(low, high, BUFFER_BYTES):
                view = buffer[: min(BUFFER_BYTES, high - at)]
                if os.preadv(read.fileno(), [view], at) != len(view):
                    sys.exit(f"{path} is shorter than it was")
                hasher.update(view)
                done = 0
                while done < len(view):
                    done += os.pwrite(written.fileno(), view[done : done + WRITE_BYTES], at + done)


if __name__ == "__main__":
    main()
