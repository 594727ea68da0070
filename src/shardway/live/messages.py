"""What ranks tell each other through the store: small, self-contained values, and the keys that they stand under."""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from shardway.core.dtypes import dtype_of_torch
from shardway.core.errors import Code, Problem
from shardway.live.records import ObjectShard, Shard
from shardway.live.saving import SaveOutcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shardway.live.saving import SaveIdentity

_ROOT = "shardway/save"
_MAX_BYTES = 1 << 30
_T = TypeVar("_T", int, str)


class Keys:
    """The store's keys of one attempt; the attempt's nonce keeps every attempt of every job apart."""

    def __init__(self, nonce: str) -> None:
        base = f"{_ROOT}/{nonce}"
        self.lead = f"{base}/lead"  # register: who coordinates, with its pulse
        self.arrivals = f"{base}/arrivals"  # counter
        self.results = f"{base}/results"  # counter
        self.decision = f"{base}/decision"  # register, set once: publish or not
        self.end = f"{base}/end"  # register, set once: whether the decision was carried out
        self._base = base

    def arrival(self, number: int) -> str:
        """Who arrived as the `number`-th."""
        return f"{self._base}/arrival/{number}"

    def pulse(self, number: int) -> str:
        """How far that one is; its change is a sign of life."""
        return f"{self._base}/pulse/{number}"

    def entry(self, number: int) -> str:
        """An entry of the ledger: a register, set once."""
        return f"{self._base}/ledger/{number}"

    def work(self, entry: int, number: int) -> str:
        """What an entry of the ledger means for the `number`-th to arrive."""
        return f"{self._base}/work/{entry}/{number}"

    def result(self, number: int) -> str:
        """The `number`-th result of an assignment."""
        return f"{self._base}/result/{number}"


def attempt_key(identity: SaveIdentity) -> str:
    """The register of a save's newest attempt."""
    text = json.dumps([identity.destination, identity.iteration, identity.token])
    return f"{_ROOT}/attempt/{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def table_key(digest: str) -> str:
    """Where a table lies; by its contents, so that replicas, and one save after another, share it."""
    return f"{_ROOT}/table/{digest}"


def place_key(rank: int) -> str:
    """Where a rank says what it is saving; read when it is missed elsewhere."""
    return f"{_ROOT}/at/{rank}"


class Table(NamedTuple):
    """The shards and objects of a rank, with all replica numbers zero: replicas have equal tables."""

    shards: tuple[Shard, ...]
    objects: tuple[ObjectShard, ...]


def encode_table(shards: Sequence[Shard], objects: Sequence[ObjectShard]) -> tuple[str, bytes]:
    """The digest and the compact form of a table, without replica numbers: about 15 bytes for each shard."""
    columns = {
        "key": [shard.key for shard in shards],
        "dtype": _runs(shard.dtype.name for shard in shards),
        "shape": [shard.global_shape for shard in shards],
        "start": [shard.start for shard in shards],
        "size": [shard.size for shard in shards],
        "objects": [(record.key, record.num_bytes) for record in objects],
    }
    text = json.dumps(columns, separators=(",", ":")).encode()
    return hashlib.blake2b(text, digest_size=16).hexdigest(), zlib.compress(text, 1)


def decode_table(data: bytes) -> Table:
    """What `encode_table` made."""
    columns = json.loads(zlib.decompressobj().decompress(data, _MAX_BYTES))
    dtypes = [dtype_of_torch(name) for name in _expand(columns["dtype"])]
    rows = zip(columns["key"], dtypes, columns["shape"], columns["start"], columns["size"], strict=True)
    return Table(
        tuple(Shard(key, dtype, tuple(shape), tuple(start), tuple(size), 0) for key, dtype, shape, start, size in rows),
        tuple(ObjectShard(key, 0, num_bytes) for key, num_bytes in columns["objects"]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A rank that came to save.

    Attributes:
        rank: Its number in the job.
        process: Identifies its process on its machine; see `shardway.run.processes`.
        table: Digest of its table.
        replicas: Replica numbers of its shards, then of its objects.
        agreement: What has to be the same on all ranks, as text.
        validate: Whether it asks for that to be checked.
    """

    rank: int
    process: str
    table: str
    replicas: tuple[int, ...]
    agreement: Mapping[str, str]
    validate: bool

    def encode(self) -> bytes:
        """For the store."""
        row = (self.rank, self.process, self.table, _runs(self.replicas), dict(self.agreement), self.validate)
        return _dump(row)

    @classmethod
    def decode(cls, data: bytes) -> Arrival:
        """What `encode` made."""
        rank, process, table, replicas, agreement, validate = json.loads(data)
        return cls(
            rank=rank,
            process=process,
            table=table,
            replicas=tuple(_expand(replicas)),
            agreement=agreement,
            validate=validate,
        )


class Lead(NamedTuple):
    """Who coordinates; the register changes with every sign of life, and only its holder can change it.

    Attributes:
        term: Grows by one with every change of hands.
        number: The coordinator's arrival number, or -1.
        rank: Its rank.
        process: Its process.
        beat: Grows with every sign of life.
        announced: How many entries of the ledger have been turned into work that ranks can read.
        stage: ``"open"`` or ``"ended"``.
    """

    term: int
    number: int
    rank: int
    process: str
    beat: int
    announced: int
    stage: str

    def encode(self) -> bytes:
        """For the store."""
        return _dump(self)

    @classmethod
    def decode(cls, data: bytes) -> Lead:
        """What `encode` made."""
        return cls(*json.loads(data))


class Entry(NamedTuple):
    """One step of the ledger: which work is taken back, and among whom it is shared anew.

    Everything else follows from it and the arrivals, so that every coordinator derives the same assignments.

    Attributes:
        holders: Arrival numbers of those who may be given work.
        dropped: Assignments taken back, as (entry, arrival number).
        fully_parallel: How to share.
    """

    holders: tuple[int, ...]
    dropped: tuple[tuple[int, int], ...]
    fully_parallel: bool

    def encode(self) -> bytes:
        """For the store."""
        return _dump((_ranges(self.holders), self.dropped, self.fully_parallel))

    @classmethod
    def decode(cls, data: bytes) -> Entry:
        """What `encode` made."""
        holders, dropped, fully_parallel = json.loads(data)
        return cls(_unrange(holders), tuple((entry, number) for entry, number in dropped), fully_parallel)


class Work(NamedTuple):
    """Indices into a rank's own shards and objects."""

    shards: tuple[int, ...]
    objects: tuple[int, ...]

    def encode(self) -> bytes:
        """For the store."""
        return _dump((_ranges(self.shards), _ranges(self.objects)))

    @classmethod
    def decode(cls, data: bytes) -> Work:
        """What `encode` made."""
        shards, objects = json.loads(data)
        return cls(_unrange(shards), _unrange(objects))


class Result(NamedTuple):
    """How an assignment went: what was written (`WriterResult.to_bytes`), or the problems."""

    entry: int
    number: int
    problems: tuple[Problem, ...]
    written: bytes

    def encode(self) -> bytes:
        """For the store."""
        head = (self.entry, self.number, _problems(self.problems))
        return _dump(head) + b"\n" + self.written

    @classmethod
    def decode(cls, data: bytes) -> Result:
        """What `encode` made."""
        head, _, written = data.partition(b"\n")
        entry, number, problems = json.loads(head)
        return cls(entry, number, _problems_of(problems), written)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Publish or not: set once by compare-and-set, never changed.

    Attributes:
        problems: Why nothing is published; empty for publishing.
        tag: Whose metadata is published.
        outcome: What every rank returns (`wrote_bytes` left 0); None where nothing is published.
        decided_at: Seconds since 1970 on the clock of the one who decided.
    """

    problems: tuple[Problem, ...] = ()
    tag: str = ""
    outcome: SaveOutcome | None = None
    decided_at: float = 0.0

    def encode(self) -> bytes:
        """For the store."""
        how = self.outcome
        row = how and (how.staging, how.arrived, how.lost, how.coordinator, how.num_files, how.num_bytes)
        return _dump((_problems(self.problems), self.tag, row, self.decided_at))

    @classmethod
    def decode(cls, data: bytes) -> Decision:
        """What `encode` made."""
        problems, tag, row, decided_at = json.loads(data)
        outcome = None
        if row is not None:
            staging, arrived, lost, coordinator, num_files, num_bytes = row
            outcome = SaveOutcome(
                staging=staging,
                arrived=tuple(arrived),
                lost=tuple(lost),
                coordinator=coordinator,
                num_files=num_files,
                num_bytes=num_bytes,
                wrote_bytes=0,
            )
        return cls(problems=_problems_of(problems), tag=tag, outcome=outcome, decided_at=decided_at)


def encode_end(problems: Sequence[Problem]) -> bytes:
    """Whether the decision to publish was carried out: no problems if so."""
    return _dump(_problems(problems))


def decode_end(data: bytes) -> tuple[Problem, ...]:
    """What `encode_end` made."""
    return _problems_of(json.loads(data))


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _problems(problems: Sequence[Problem]) -> list[list[object]]:
    return [
        [each.code, each.what, each.tensor, None if each.file is None else str(each.file), each.facts, each.cure]
        for each in problems
    ]


def _problems_of(rows: Iterable[Sequence[str]]) -> tuple[Problem, ...]:
    return tuple(
        Problem(code=Code(code), what=what, tensor=tensor, file=file, facts=tuple(facts), cure=cure)
        for code, what, tensor, file, facts, cure in rows
    )


def _runs(values: Iterable[_T]) -> list[tuple[_T, int]]:
    return [(value, len(list(group))) for value, group in groupby(values)]


def _expand(runs: Iterable[tuple[_T, int]]) -> list[_T]:
    return [value for value, times in runs for _ in range(times)]


def _ranges(values: Sequence[int]) -> list[tuple[int, int]]:
    """First values and lengths of the runs of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for value in values:
        if runs and value == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    return runs


def _unrange(runs: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(value for first, length in runs for value in range(first, first + length))
