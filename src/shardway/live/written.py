"""What a rank says about the files it has written: plain data that travels between ranks, without torch."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import NamedTuple

from shardway.core.dtypes import dtype_of_torch
from shardway.formats.dcp import DcpLocation
from shardway.live.records import Shard

_MAX_BYTES = 1 << 30


class WrittenFile(NamedTuple):
    """A file in the staging folder.

    Attributes:
        name: Its name.
        num_bytes: Bytes that it must have when the checkpoint is published.
        digest: xxh3-128 (hexadecimal) of those of its bytes that are no shard's elements.
    """

    name: str
    num_bytes: int
    digest: str


class WrittenShard(NamedTuple):
    """A shard, the blob that holds it, and the xxh3-128 of its elements (hexadecimal)."""

    shard: Shard
    location: DcpLocation
    digest: str


class WrittenObject(NamedTuple):
    """An object's key and the blob that holds it; objects of equal bytes share one."""

    key: str
    location: DcpLocation


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterResult:
    """Everything that one call of `write_shards` wrote.

    Attributes:
        rank: The rank that wrote.
        files: Its files; none where nothing was assigned.
        shards: In the order in which they were assigned.
        objects: In the order in which they were assigned.
    """

    rank: int
    files: tuple[WrittenFile, ...]
    shards: tuple[WrittenShard, ...]
    objects: tuple[WrittenObject, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)

    def to_bytes(self) -> bytes:
        """A compact form for a key-value store: about 50 bytes for each shard."""
        numbers = {file.name: number for number, file in enumerate(self.files)}

        def place(location: DcpLocation) -> tuple[int, int, int]:
            return numbers[location.file], location.offset, location.length

        document = {
            "rank": self.rank,
            "files": self.files,
            "shards": [
                (shard.key, shard.dtype.name, *shard[2:], *place(location), digest)
                for shard, location, digest in self.shards
            ],
            "objects": [(key, *place(location)) for key, location in self.objects],
        }
        return zlib.compress(json.dumps(document, separators=(",", ":")).encode(), 1)

    @classmethod
    def from_bytes(cls, data: bytes) -> WriterResult:
        """What `to_bytes` made; for messages between the ranks of one job, not for files from elsewhere."""
        document = json.loads(zlib.decompressobj().decompress(data, _MAX_BYTES))
        files = tuple(WrittenFile(*fields) for fields in document["files"])

        def location(place: list[int]) -> DcpLocation:
            number, offset, length = place
            return DcpLocation(files[number].name, offset, length)

        return cls(
            rank=document["rank"],
            files=files,
            shards=tuple(
                WrittenShard(
                    Shard(key, dtype_of_torch(dtype), tuple(shape), tuple(start), tuple(size), replica),
                    location(place),
                    digest,
                )
                for key, dtype, shape, start, size, replica, *place, digest in document["shards"]
            ),
            objects=tuple(WrittenObject(key, location(place)) for key, *place in document["objects"]),
        )
