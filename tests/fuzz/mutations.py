"""Inputs made from sound ones by chance: what finds most of what there is to find without coverage."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

_NUMBERS = (0, 1, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**61 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_PARTS = (
    b"\x80\x04",
    b"(",
    b"R",
    b"\x81",
    b"b",
    b"\x93",
    b".",
    b"}",
    b"]",
    b"u",
    b"[[",
    b"{}",
    b'"',
    b"\\ud800",
    b"-1e999",
)


def mutated(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """One of the seeds with one to four changes."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 2, 4, 8, 40, 400)))
        match rng.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.randrange(256)
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end] * rng.choice((1, 2, 50))
            case 4:
                code = rng.choice(("<B", "<H", "<I", "<Q"))
                number = rng.choice(_NUMBERS) & (1 << 8 * struct.calcsize(code)) - 1
                data[at : at + struct.calcsize(code)] = struct.pack(code, number)
            case 5:
                data[at:at] = rng.choice(_PARTS)
            case 6:
                other = rng.choice(seeds)
                begin = rng.randrange(len(other) + 1)
                data[at:end] = other[begin : begin + rng.choice((4, 40, 400))]
            case 7:
                data[at:at] = str(rng.choice(_NUMBERS)).encode()
            case _:
                data += b"."
    return bytes(data[: 1 << 20])
