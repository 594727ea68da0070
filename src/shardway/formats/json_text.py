"""JSON that nobody has to trust: UTF-8, no key twice in an object, memory in proportion to the text."""

from __future__ import annotations

import json

# A container costs about 80 bytes of memory and as few as two of text. Real files have one in every ten or more.
_BYTES_PER_CONTAINER = 5
_FREE_CONTAINERS = 200_000


class JsonInvalidError(Exception):
    """What is wrong with a text, in words that follow the name of the file."""


class _RepeatedKeyError(ValueError):
    """A key that the text gives twice in one object."""


def parse_json(data: bytes) -> object:
    """The value of a JSON text.

    Time is linear in the size of `data`; memory is at most about 20 bytes for each of its bytes.

    Raises:
        JsonInvalidError: If it is not UTF-8 or not JSON, nests too deeply, gives a key twice in one object, or
            consists of little but brackets.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise JsonInvalidError(f"is not UTF-8 at byte {error.start}: {error.reason}") from None
    check_density(data)
    try:
        value: object = json.loads(text, object_pairs_hook=_unique_keys)
    except _RepeatedKeyError as error:
        key = error.args[0][:200]
        raise JsonInvalidError(
            f"gives the key {key if key.isprintable() else ascii(key)} twice in one object"
        ) from None
    except RecursionError:
        raise JsonInvalidError("nests JSON too deeply") from None
    except ValueError as error:
        raise JsonInvalidError(f"is not valid JSON: {error}") from None
    return value


def check_density(data: bytes) -> None:
    """Refuse a JSON text of so many lists and objects that they would take far more memory than the text.

    Raises:
        JsonInvalidError: If there are more than one for every 5 bytes, and more than 200,000.
    """
    if data.count(b"[") + data.count(b"{") > len(data) // _BYTES_PER_CONTAINER + _FREE_CONTAINERS:
        raise JsonInvalidError("consists of little but brackets")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RepeatedKeyError(key)
            seen.add(key)
    return found
