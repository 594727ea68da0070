"""Save together: the protocol's thin shell over a real store, a real clock and real threads; no collective."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardway.live.records import ObjectShard, Shard
    from shardway.live.saving import Needed, SaveActions, SaveIdentity, SaveOptions, SaveOutcome


class StoreLike(Protocol):
    """The part of `torch.distributed.Store` that a save uses (and `delete_key`, `clone` where there are any)."""

    def set(self, key: str, value: str, /) -> None:
        """Store a value."""

    def get(self, key: str, /) -> bytes:
        """The value of a key that exists."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a counter, which begins at 0; return the sum."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Replace `expected` (empty: absent) by `desired`; return what is there afterwards."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys exist."""


def save_together(
    *,
    store: StoreLike | None,
    rank: int,
    identity: SaveIdentity,
    shards: Sequence[Shard],
    objects: Sequence[ObjectShard],
    needed: Needed,
    agreement: Mapping[str, str],
    options: SaveOptions,
    actions: SaveActions,
) -> SaveOutcome:
    """Save with whoever comes; return when the checkpoint is in place, or raise the error that all of them raise."""
    raise NotImplementedError
