"""The stored-only zip archives that `torch.save` writes: their directory parsed, their pieces framed."""

from __future__ import annotations

import struct
from binascii import crc32
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Read = Callable[[int, int], bytes]

# Source: PKWARE APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.3.
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_PAIR = struct.Struct("<2H")
END_BYTES = _END.size + _LOCATOR.size + _END64.size
MAX_32 = 0xFFFFFFFF
_UTF8 = 0x0800
_VERSION = 45  # "needed to extract": zip64
MAX_DIRECTORY_BYTES = 16 << 20  # a hundred thousand entries


class ZipInvalidError(Exception):
    """What is wrong with an archive, in words; callers add the file and the tensor."""


class Entry(NamedTuple):
    """One stored file of an archive.

    Attributes:
        header: Offset of its local header from the archive's start.
        size: Bytes of its content.
        limit: Offset that its content may not pass: the next entry's header, or the directory.
    """

    header: int
    size: int
    limit: int


def read_directory(tail: bytes, length: int, read: Read, most_bytes: int = MAX_DIRECTORY_BYTES) -> dict[bytes, Entry]:
    """The entries of an archive, proven to be stored, in order, apart from one another and inside the archive.

    Args:
        tail: The archive's last bytes; the more of the directory it holds, the fewer reads.
        length: Bytes of the archive.
        read: Returns `size` bytes at an offset from the archive's start; used if `tail` is too short.
        most_bytes: The largest directory accepted.

    Returns:
        Entries by name.

    Raises:
        ZipInvalidError: If anything is unlike what `torch.save` writes.
    """
    count, size, start = _find_directory(tail, length)
    if size > most_bytes or count * _CENTRAL.size > size:
        raise ZipInvalidError(f"its directory of {size:,} bytes can't hold {count:,} entries")
    tail_start = length - len(tail)
    at = start - tail_start
    if at < 0:
        tail, at = read(start, size), 0
        if len(tail) != size:
            raise ZipInvalidError("its directory is cut off")
    entries: dict[bytes, Entry] = {}
    found: list[tuple[bytes, int, int]] = []
    end = at + size
    floor = 0
    unpack = _CENTRAL.unpack_from
    for _ in range(count):
        if at + 46 > end:
            raise ZipInvalidError("its directory is cut off")
        magic, _, _, flags, method, _, _, _, packed, full, name_size, extra_size, note_size, _, _, _, header = unpack(
            tail, at
        )
        name = tail[at + 46 : at + 46 + name_size]
        extra_at = at + 46 + name_size
        at = extra_at + extra_size + note_size
        if magic != b"PK\x01\x02" or at > end:
            raise ZipInvalidError("its directory is damaged")
        if full == MAX_32 or packed == MAX_32 or header == MAX_32:
            full, packed, header = _zip64_fields(tail[extra_at : extra_at + extra_size], full, packed, header)
        if method or packed != full or flags & 1:
            raise ZipInvalidError(f"entry {_shown(name)} is compressed or encrypted; torch.save stores")
        if header < floor:
            raise ZipInvalidError(f"entry {_shown(name)} overlaps the one before it")
        floor = header + 30 + name_size + full
        found.append((name, header, full))
    if at != end or floor > start:
        raise ZipInvalidError("its directory and its entries do not fit together")
    limit = start
    for name, header, full in reversed(found):
        entries[name] = Entry(header, full, limit)
        limit = header
    if len(entries) != count:
        raise ZipInvalidError("two of its entries have the same name")
    return entries


def content_offset(entry: Entry, name: bytes, head: bytes, read: Read) -> int:
    """Offset of an entry's content from the archive's start, from its local header.

    Args:
        entry: The entry.
        name: Its name, which the local header must repeat.
        head: The archive's first bytes; the local header is read from here if it is inside.
        read: Returns `size` bytes at an offset from the archive's start.

    Raises:
        ZipInvalidError: If the local header contradicts the directory.
    """
    at = entry.header
    size = 30 + len(name)
    if at + size > len(head):
        head, at = read(at, size), 0
        if len(head) != size:
            raise ZipInvalidError(f"entry {_shown(name)} is cut off")
    name_size, extra_size = _PAIR.unpack_from(head, at + 26)
    if head[at : at + 4] != b"PK\x03\x04" or head[at + 30 : at + size] != name or name_size != len(name):
        raise ZipInvalidError(f"entry {_shown(name)} is not where the directory says")
    content = entry.header + size + int(extra_size)
    if content + entry.size > entry.limit:
        raise ZipInvalidError(f"entry {_shown(name)} overlaps what follows it")
    return content


def _find_directory(tail: bytes, length: int) -> tuple[int, int, int]:
    """Number of entries, bytes and offset of the directory; torch.save writes no comment, so the end is the end."""
    if len(tail) < _END.size:
        raise ZipInvalidError(f"{length:,} bytes are too few for an archive")
    magic, _, _, _, count, size, start, note_size = _END.unpack_from(tail, len(tail) - 22)
    if magic != b"PK\x05\x06" or note_size:
        raise ZipInvalidError("it does not end with a zip directory")
    end = length - 22
    locator_at = len(tail) - 42
    if locator_at >= 0 and tail[locator_at : locator_at + 4] == b"PK\x06\x07":
        _, _, end64, _ = _LOCATOR.unpack_from(tail, locator_at)
        at = end64 - (length - len(tail))
        if end64 != length - END_BYTES or at < 0:
            raise ZipInvalidError("its zip64 directory end is not where it should be")
        magic, _, _, _, _, _, _, count, size, start = _END64.unpack_from(tail, at)
        if magic != b"PK\x06\x06":
            raise ZipInvalidError("its zip64 directory end is damaged")
        end = end64
    if start + size != end:
        raise ZipInvalidError(f"its directory at byte {start:,} has {size:,} bytes but should end at byte {end:,}")
    return count, size, start


def _zip64_fields(extra: bytes, full: int, packed: int, header: int) -> tuple[int, int, int]:
    at = 0
    while at + 4 <= len(extra):
        kind, size = _PAIR.unpack_from(extra, at)
        body = extra[at + 4 : at + 4 + size]
        at += 4 + size
        if kind != 1:
            continue
        wanted = [value == MAX_32 for value in (full, packed, header)]
        if len(body) < 8 * sum(wanted):
            break
        values = iter(struct.unpack_from(f"<{sum(wanted)}Q", body))
        fields = [next(values) if big else value for big, value in zip(wanted, (full, packed, header), strict=True)]
        return fields[0], fields[1], fields[2]
    raise ZipInvalidError("a zip64 size is missing from its directory")


def _shown(name: bytes) -> str:
    return ascii(name[:80].decode("utf-8", "replace"))


def local_entry(name: bytes, content: bytes) -> bytes:
    """A small entry: its local header and its content."""
    size = len(content)
    return _LOCAL.pack(b"PK\x03\x04", 20, _UTF8, 0, 0, 0, crc32(content), size, size, len(name), 0) + name + content


def local_header(name: bytes, size: int, padding: int, crc: int = 0) -> bytes:
    """The local header of an entry whose content of `size` bytes follows, with `padding` (at least 4) bytes of filler.

    The CRC may be left zero: torch's reader does not check it, and computing it would mean reading the content.
    """
    extra = _wide_sizes(size)
    shown = MAX_32 if extra else size
    header = _LOCAL.pack(b"PK\x03\x04", _VERSION, _UTF8, 0, 0, 0, crc, shown, shown, len(name), len(extra) + padding)
    # "FB" is the identifier that torch's own writer gives its filler.
    return b"".join((header, name, extra, b"FB", struct.pack("<H", padding - 4), bytes(padding - 4)))


def local_header_bytes(name: bytes, size: int) -> int:
    """Bytes of `local_header` without its filler."""
    return 30 + len(name) + len(_wide_sizes(size))


def central_entry(name: bytes, header: int, size: int, crc: int = 0) -> bytes:
    """An entry of the directory; `header` is the local header's offset, which must be below 4 GiB."""
    extra = _wide_sizes(size)
    shown = MAX_32 if extra else size
    sizes = (crc, shown, shown, len(name), len(extra))
    return _CENTRAL.pack(b"PK\x01\x02", _VERSION, _VERSION, _UTF8, 0, 0, 0, *sizes, 0, 0, 0, 0, header) + name + extra


def directory_end(count: int, size: int, start: int) -> bytes:
    """What follows the directory: always the zip64 form, so that there is one form to test."""
    return b"".join(
        (
            _END64.pack(b"PK\x06\x06", _END64.size - 12, _VERSION, _VERSION, 0, 0, count, count, size, start),
            _LOCATOR.pack(b"PK\x06\x07", 0, start + size, 1),
            _END.pack(b"PK\x05\x06", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF), size, min(start, MAX_32), 0),
        )
    )


def archive(folder: bytes, pieces: Sequence[tuple[bytes, bytes]]) -> bytes:
    """An archive of small files in one folder, as `torch.save` lays them out: what is below ``data/`` at 64 bytes.

    Args:
        folder: Name of the folder.
        pieces: Name below it, and content, of each file in order.
    """
    parts: list[bytes] = []
    central: list[bytes] = []
    at = 0
    for piece, content in pieces:
        full = folder + b"/" + piece
        if piece.startswith(b"data/"):
            padding = 4 + -(at + local_header_bytes(full, len(content)) + 4) % 64
            entry = local_header(full, len(content), padding, crc32(content)) + content
        else:
            entry = local_entry(full, content)
        central.append(central_entry(full, at, len(content), crc32(content)))
        parts.append(entry)
        at += len(entry)
    directory = b"".join(central)
    return b"".join((*parts, directory, directory_end(len(central), len(directory), at)))


def _wide_sizes(size: int) -> bytes:
    return struct.pack("<2H2Q", 1, 16, size, size) if size >= MAX_32 else b""
