"""A store in memory that counts, and that knows which registers may be set only once."""

from __future__ import annotations

from collections import Counter

from shardway.live import requests as ask


class Store:
    """The calls of a store, counted; a register that is to be set once may be set once."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.ever: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.num_bytes = 0
        self.broken: list[str] = []

    def call(self, request: ask.Request) -> object:
        """Answer a request for the store."""
        kind = type(request).__name__
        match request:
            case ask.Get(keys):
                self.calls[kind] += len(keys)
                found = tuple(self.values.get(key) or None for key in keys)
                self.num_bytes += sum(len(value or b"") for value in found)
                return found
            case ask.Put(items):
                self.calls[kind] += len(items)
                for key, value in items:
                    self.num_bytes += len(value)
                    self.store(key, value)
                return None
            case ask.Swap(key, expected, value):
                self.calls[kind] += 1
                self.num_bytes += len(expected) + len(value)
                return self.swap(key, expected, value)
            case ask.Add(key, amount):
                self.calls[kind] += 1
                total = int(self.values.get(key, b"0")) + amount
                self.values[key] = b"%d" % total
                return total
            case ask.Delete(keys):
                self.calls[kind] += len(keys)
                for key in keys:
                    self.values.pop(key, None)
                return None
            case _:
                raise TypeError(request)

    def swap(self, key: str, expected: bytes, value: bytes) -> bytes:
        """Compare and set."""
        found = self.values.get(key, b"")
        if found == expected:
            self.store(key, value)
            return value
        return found or expected

    def store(self, key: str, value: bytes) -> None:
        """Set a value."""
        self.ever.add(key)
        if self.values.get(key, value) != value and key.endswith(("/decision", "/end")):
            self.broken.append(f"{key} was set twice: {self.values[key]!r}, then {value!r}")
        self.values[key] = value
