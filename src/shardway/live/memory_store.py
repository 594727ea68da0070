"""A store for a single process, such as a save without torch.distributed."""

from __future__ import annotations

import threading


class MemoryStore:
    """The calls of `torch.distributed.Store` that a save uses, on a dictionary; any thread may use it."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: str | bytes) -> None:
        """Store a value."""
        with self._lock:
            self._values[key] = _bytes(value)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, which begins at 0; return the sum."""
        with self._lock:
            total = int(self._values.get(key, b"0")) + amount
            self._values[key] = b"%d" % total
            return total

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Replace `expected` (empty: absent) by `desired`; return what is there, or `expected` where nothing is."""
        with self._lock:
            found = self._values.get(key)
            if (found or b"") == _bytes(expected):
                found = self._values[key] = _bytes(desired)
            return _bytes(expected) if found is None else found

    def delete_key(self, key: str) -> bool:
        """Forget a value; whether there was one."""
        with self._lock:
            return self._values.pop(key, None) is not None


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
