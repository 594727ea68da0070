"""Pickles written opcode by opcode: the few shapes of object that checkpoints need, without the classes they name."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

MARK, BUILD, REDUCE, STOP, BINPERSID = b"(", b"b", b"R", b".", b"Q"
TUPLE, APPENDS, SETITEMS = b"t", b"e", b"u"
EMPTY_LIST, EMPTY_TUPLE, EMPTY_DICT = b"]", b")", b"}"
NONE, TRUE, FALSE = b"N", b"\x88", b"\x89"
_UINT16, _UINT32, _INT32 = (struct.Struct(kind).pack for kind in ("<H", "<I", "<i"))
NEW_OBJECT = b")\x81"  # EMPTY_TUPLE NEWOBJ: an instance of the class before it, made without arguments


class PickleWriter:
    """Turns values into opcodes and numbers the memo.

    Every method returns bytes that must be emitted in the order of the calls, for a later call may refer to a value
    that an earlier one has defined.

    Args:
        protocol: 2 for torch's zip files, whose restricted reader knows no later opcodes; 4 for ``.metadata``.
    """

    def __init__(self, protocol: int) -> None:
        self.start = b"\x80" + bytes((protocol,))
        self._protocol = protocol
        self._memo: dict[Hashable, bytes] = {}
        self._num_memoised = 0

    def memoise(self, key: Hashable, definition: bytes) -> bytes:
        """`definition`, remembered under `key`, so that `recall` finds it."""
        number, opcodes = self._define(definition)
        self._memo[key] = fetch(number)
        return opcodes

    def define(self, value: str) -> tuple[int, bytes]:
        """A string that is to be fetched by its number in the memo and not by its value, which takes no memory."""
        return self._define(self._spell(value))

    def _define(self, definition: bytes) -> tuple[int, bytes]:
        number = self._num_memoised
        self._num_memoised += 1
        if self._protocol >= 4:
            return number, definition + b"\x94"
        return number, definition + (b"q" + bytes((number,)) if number < 256 else b"r" + _UINT32(number))

    def recall(self, key: Hashable) -> bytes | None:
        """The opcodes that fetch what was memoised under `key`, or None."""
        return self._memo.get(key)

    def text(self, value: str) -> bytes:
        """A string, written once however often it occurs."""
        known = self._memo.get(value)
        if known is not None:
            return known
        return self.memoise(value, self._spell(value))

    def _spell(self, value: str) -> bytes:
        data = value.encode("utf-8", "surrogatepass")
        if self._protocol >= 4 and len(data) < 256:
            return b"\x8c" + bytes((len(data),)) + data
        return b"X" + _UINT32(len(data)) + data

    def reference(self, module: str, name: str) -> bytes:
        """The global `module.name`."""
        key = (module, name)
        known = self._memo.get(key)
        if known is not None:
            return known
        if self._protocol >= 4:
            return self.memoise(key, self.text(module) + self.text(name) + b"\x93")
        return self.memoise(key, f"c{module}\n{name}\n".encode())

    def sequence(self, items: Iterable[bytes]) -> bytes:
        """A tuple of opcodes already made."""
        return b"".join((MARK, *items, TUPLE))

    def integers(self, values: tuple[int, ...]) -> bytes:
        """A tuple of integers."""
        return self.sequence(map(integer, values))

    def attributes(self, items: Iterable[tuple[str, bytes]]) -> bytes:
        """The state of an object: a dict with string keys, and the opcode that sets it.

        `items` is drawn one by one, after the key before it has been written.
        """
        parts = [EMPTY_DICT, MARK]
        for key, value in items:
            parts += (self.text(key), value)
        return b"".join((*parts, SETITEMS, BUILD))


def fetch(number: int) -> bytes:
    """What has this number in the memo."""
    return b"h" + bytes((number,)) if number < 256 else b"j" + _UINT32(number)


def integer(value: int) -> bytes:
    """An integer, in the shortest form."""
    if 0 <= value < 256:
        return b"K" + bytes((value,))
    if 0 <= value < 65536:
        return b"M" + _UINT16(value)
    if -(2**31) <= value < 2**31:
        return b"J" + _INT32(value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes((len(data),)) + data


def real(value: float) -> bytes:
    """A float."""
    return b"G" + struct.pack(">d", value)
