"""The common state moved between its two forms, its values untouched: ``common.pt``, and the object ``common_state``.

Both are files of `torch.save`; the object holds a list of one, the dict that the file holds. Nothing is unpickled and
pickled again for that, which would lose what only the writer's classes know: the pickle's bytes stay, and opcodes are
put around them.

Source: megatron/core/dist_checkpointing/strategies/common.py (0.16.1) and serialization.py (0.20, commit 40b1fd37c1).
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats.pickle_writer import (
    APPENDS,
    EMPTY_DICT,
    EMPTY_LIST,
    FALSE,
    MARK,
    NONE,
    SETITEMS,
    STOP,
    TRUE,
    integer,
    real,
)
from shardway.formats.saved_objects import read_torch_bytes
from shardway.formats.torch_file import open_archive
from shardway.formats.zips import ZipInvalidError, archive, content_offset, read_directory

if TYPE_CHECKING:
    from collections.abc import Mapping

_START = b"\x80\x02"
_LIST = re.compile(rb"\x80\x02\](q\x00)?(\((?=[}c]))?", re.DOTALL)
_APPEND = b"a"
_FIRST_PUT, _NO_PUT = b"q\x01", b"q\x00"
_CONTENT = "content_metadata"


def moved_common_state(
    data: bytes, *, listed: bool, file: str, content_metadata: Mapping[str, object] | None = None
) -> bytes:
    """The bytes of a common state in the form that is wanted, proven to hold the same values.

    Args:
        data: The file of `torch.save` as it is: of a dict, or of a list of one.
        listed: Whether a list of one is wanted.
        file: The file to name in errors.
        content_metadata: What is to stand in the place of ``content_metadata``; None to leave that as it is.

    Raises:
        ShardwayError: `metadata-invalid` where the pickle is not as torch writes it; what `read_torch_bytes` raises.
    """
    value = read_torch_bytes(data, file=file)
    was_listed = isinstance(value, list)
    state = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(state, dict):
        raise _unlike("it holds no dict", file)
    if listed == was_listed and content_metadata is None:
        return data
    folder, pieces = _pieces(data, file)
    body = _body(pieces[b"data.pkl"], file, listed=was_listed)
    if content_metadata is not None:
        state = {**state, _CONTENT: dict(content_metadata)}
        body += MARK + _opcodes(_CONTENT, file) + _opcodes(dict(content_metadata), file) + SETITEMS
    pieces[b"data.pkl"] = _START + (EMPTY_LIST + body + _APPEND if listed else body) + STOP
    moved = archive(folder, list(pieces.items()))
    again = read_torch_bytes(moved, file=file)
    if repr(again) != repr([state] if listed else state):  # NaN equals itself only there
        raise _unlike("its values would change", file)
    return moved


def _pieces(data: bytes, file: str) -> tuple[bytes, dict[bytes, bytes]]:
    """The archive's folder, and what is in it by name."""

    def read(at: int, size: int) -> bytes:
        return data[at : at + size]

    try:
        entries = read_directory(data, len(data), read)
        folder, _ = open_archive(entries, data, read)
        found = {}
        for name, entry in reversed(entries.items()):
            at = content_offset(entry, name, data, read)
            found[name.removeprefix(folder + b"/")] = data[at : at + entry.size]
    except ZipInvalidError as error:
        raise _unlike(str(error), file) from None
    return folder, found


def _body(pickle: bytes, file: str, *, listed: bool) -> bytes:
    """The opcodes that leave the dict on the stack."""
    if not pickle.startswith(_START) or not pickle.endswith(STOP):
        raise _unlike("its pickle is not of protocol 2, which torch.save writes", file)
    if not listed:
        return pickle[len(_START) : -len(STOP)]
    match = _LIST.match(pickle)
    end = (APPENDS if match[2] == MARK else _APPEND) + STOP if match is not None else b""
    if match is None or not pickle.endswith(end):
        raise _unlike("its pickle does not begin with a list", file)
    body = pickle[match.end() : -len(end)]
    if match[1] is None:
        return body
    # The list was the memo's first entry, and readers want its indices in order: the dict becomes the first two.
    if not body.startswith(EMPTY_DICT + _FIRST_PUT):
        raise _unlike("its pickle does not begin with a list of one dict", file)
    return EMPTY_DICT + _NO_PUT + body[len(EMPTY_DICT) :]


def _opcodes(value: object, file: str) -> bytes:
    """The opcodes of a plain value, none of which needs the memo."""
    match value:
        case None:
            return NONE
        case bool():
            return TRUE if value else FALSE
        case int():
            return integer(value)
        case float():
            return real(value)
        case str():
            text = value.encode()
            return b"X" + struct.pack("<I", len(text)) + text
        case list():
            return b"".join((EMPTY_LIST, MARK, *(_opcodes(item, file) for item in value), APPENDS))
        case dict():
            parts = (_opcodes(part, file) for item in value.items() for part in item)
            return b"".join((EMPTY_DICT, MARK, *parts, SETITEMS))
    raise _unlike(f"its {_CONTENT} holds a {type(value).__name__}", file)


def _unlike(what: str, file: str) -> ShardwayError:
    return ShardwayError(
        Problem(
            code=Code.METADATA_INVALID,
            what=f"cannot rewrite the common state: {what}",
            file=file,
            cure="save the checkpoint again, or convert its weights with export and import",
        )
    )
