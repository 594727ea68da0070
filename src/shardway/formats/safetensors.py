"""safetensors files: reading a header that nobody has to trust.

Source: the format as published (safetensors README, "Format") and what its reference reader refuses
(safetensors/src/tensor.rs, 0.6): 8 bytes of little-endian header length N, N bytes of UTF-8 JSON that begin with
``{`` and may end in spaces, then the data, where the tensors lie back to back without holes.
"""

from __future__ import annotations

import json
import math
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.dtypes import DType, dtype_of_safetensors
from shardway.core.errors import Code, Problem, ShardwayError
from shardway.core.tensors import Chunk, Shape, StoredTensor
from shardway.formats.file_problems import brief, missing_file, printable, unreadable_file
from shardway.formats.json_text import JsonInvalidError, check_density

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the reference reader's own limit
_MAX_NUMBER = 2**63 - 1  # what a file offset can be; the reference reader's usize is wider by one bit
_MAX_AXES = 64  # torch's and numpy's limit; it also bounds the product of hostile axes
_MAX_PROBLEMS = 32  # of one header; a broken writer can break every one of 50,000 tensors
METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_LFS_POINTER = b"version "  # how a Git LFS pointer begins, in place of the length
_CURE_DOWNLOAD = "fetch the file again: it was cut short on its way here"
_CURE_DTYPE = "have the tensor written in a dtype that the format defines"
_CURE_WRITER = "the file is damaged or its writer is broken; fetch it again, or have it written again"


class SafetensorsFile(NamedTuple):
    """What the header of one safetensors file says, every word of it checked.

    Attributes:
        path: The file that was read.
        tensors: The tensors by name, in the header's order; each is one chunk of this file.
        metadata: The free-form ``__metadata__``.
        header_bytes: Bytes of the JSON header, without the 8 bytes of its length.
        num_bytes: Bytes of the whole file.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    header_bytes: int
    num_bytes: int


_Span = tuple[int, int, str]  # first data byte, the one after the last, and the tensor that claims them


class _Entry(NamedTuple):
    """One tensor as a header describes it; its data is from byte `begin` to before byte `end`."""

    dtype: DType
    shape: Shape
    begin: int
    end: int


class _EntryError(Exception):
    """What is wrong with one entry of a header; becomes a `Problem` once tensor and file are known."""

    def __init__(self, what: str, *facts: str, code: Code = Code.SAFETENSORS_HEADER) -> None:
        super().__init__(what)
        self.what = what
        self.facts = facts
        self.code = code


class _HeaderProblems:
    """Gathers the problems of one header: the first of them in full, the rest, however many, as a count."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: list[Problem] = []
        self._num_more = 0
        self.file = printable(path.name)

    def add(
        self,
        code: Code,
        what: str,
        *,
        tensor: str | None = None,
        facts: tuple[str, ...] = (),
        cure: str | None = _CURE_WRITER,
    ) -> None:
        if len(self._found) < _MAX_PROBLEMS:
            self._found.append(Problem(code=code, what=what, tensor=tensor, file=self._path, facts=facts, cure=cure))
        else:
            self._num_more += 1

    def raise_if_any(self) -> None:
        if self._num_more:
            what = f"and {self._num_more} more problems in {self.file}"
            self._found.append(Problem(code=self._found[-1].code, what=what, file=self._path))
        if self._found:
            raise ShardwayError(self._found)


def read_safetensors(path: Path, *, file: str | None = None) -> SafetensorsFile:
    """Read the header of a safetensors file, and vouch that it describes the file's bytes exactly.

    Reads the 8 bytes of the length, the header, and the file's size; never the data.

    Args:
        path: The file; a symbolic link is followed.
        file: What to call the file in the tensors' chunks; by default its name.

    Returns:
        The tensors, whose data is inside the file, doesn't overlap and leaves no byte over.

    Raises:
        ShardwayError: `file-missing`, `file-unreadable`, `safetensors-truncated` (file or header shorter than
            stated), `safetensors-header` (malformed), `dtype-unknown`, `tensor-duplicate`, `safetensors-overlap`,
            `safetensors-gap`; all problems of the header at once.
    """
    raw, num_bytes = _read_header(path)
    header = _parse_header(raw, path)
    problems = _HeaderProblems(path)
    metadata = _read_metadata(header.pop(METADATA, {}), problems)
    data_start = LENGTH_BYTES + len(raw)
    tensors, spans = _read_entries(header, path.name if file is None else file, data_start, problems)
    problems.raise_if_any()
    _check_coverage(spans, data_start, num_bytes, problems)
    problems.raise_if_any()
    return SafetensorsFile(path=path, tensors=tensors, metadata=metadata, header_bytes=len(raw), num_bytes=num_bytes)


def _read_header(path: Path) -> tuple[bytes, int]:
    """The header's JSON and the file's size in bytes, with one open."""
    try:
        # Non-blocking, so that a named pipe is refused below and not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ShardwayError(missing_file(path)) from None
    except (OSError, ValueError) as error:
        raise ShardwayError(unreadable_file(path, error)) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ShardwayError(unreadable_file(path, "it is not a regular file"))
        num_bytes = status.st_size
        length = _pread(descriptor, LENGTH_BYTES, 0)
        header_bytes = _check_length(length, num_bytes, path)
        raw = _pread(descriptor, header_bytes, LENGTH_BYTES)
    except OSError as error:
        raise ShardwayError(unreadable_file(path, error)) from error
    finally:
        os.close(descriptor)
    if len(raw) != header_bytes:
        raise _truncated(path, f"the header has {header_bytes} bytes, the file ended after {len(raw)} of them")
    return raw, num_bytes


def _pread(descriptor: int, num_bytes: int, offset: int) -> bytes:
    """`num_bytes` from `offset`, or fewer at the end of the file."""
    data = os.pread(descriptor, num_bytes, offset)
    while data and len(data) < num_bytes:
        more = os.pread(descriptor, num_bytes - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _check_length(length: bytes, num_bytes: int, path: Path) -> int:
    if len(length) < LENGTH_BYTES:
        raise _truncated(path, f"the file has {num_bytes} bytes; the length of the header alone takes {LENGTH_BYTES}")
    if length == _LFS_POINTER:
        raise _header_error(
            f"{printable(path.name)} is a Git LFS pointer of {num_bytes} bytes, not the weights",
            path,
            "run 'git lfs pull' where the checkpoint was cloned",
        )
    header_bytes = int.from_bytes(length, "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise _header_error(
            f"{printable(path.name)} states a header of {header_bytes} bytes; the limit is {MAX_HEADER_BYTES}",
            path,
            "this is not a safetensors file, whatever its name, or it is damaged",
        )
    if header_bytes == 0:
        raise _header_error(f"{printable(path.name)} states a header of 0 bytes", path)
    if LENGTH_BYTES + header_bytes > num_bytes:
        needed = LENGTH_BYTES + header_bytes
        raise _truncated(path, f"the file has {num_bytes} bytes, its header alone ends at byte {needed}")
    return header_bytes


def _parse_header(raw: bytes, path: Path) -> dict[str, object]:
    """The header as JSON, where no key of any object is given twice; an object that describes a tensor is an `_Entry`.

    Entries are checked as they are parsed, so that memory never holds the lists and dicts of all of them.
    """
    shown = printable(path.name)
    if raw[:1] != b"{":
        raise _header_error(f"the header of {shown} begins with {raw[:1]!r}, not with '{{'", path)
    repeated: list[tuple[dict[str, object], list[str]]] = []
    shapes: dict[Shape, Shape] = {}  # one tuple for all tensors of a shape

    def parsed(pairs: list[tuple[str, object]]) -> dict[str, object] | _Entry:
        found = dict(pairs)
        if len(found) != len(pairs):
            repeated.append((found, [key for key, _ in pairs]))
        elif found.keys() == _FIELDS:
            try:
                return _read_entry(found, shapes)
            except _EntryError:  # said when the tensor's name is known
                return found
        return found

    try:
        text = raw.decode()
        check_density(raw)
        header = json.loads(text, object_pairs_hook=parsed)
    except UnicodeDecodeError as error:
        raise _header_error(f"the header of {shown} is not UTF-8 at byte {error.start}: {error.reason}", path) from None
    except JsonInvalidError as error:
        raise _header_error(f"the header of {shown} {error}", path) from None
    except RecursionError:
        raise _header_error(f"the header of {shown} nests JSON too deeply", path) from None
    except ValueError as error:
        raise _header_error(f"the header of {shown} is not valid JSON: {error}", path) from None
    if not isinstance(header, dict):
        raise _header_error(f"the header of {shown} is an entry itself, of a tensor without a name", path)
    if repeated:
        _raise_repeated(header, repeated, path)
    if "\\u" in text:  # only an escape can smuggle in half of a surrogate pair, which nothing can print or write
        for name in header:
            if any("\ud800" <= character <= "\udfff" for character in name):
                raise _header_error(f"the tensor name {printable(name)} in {shown} is not valid Unicode", path)
    return header


def _raise_repeated(header: dict[str, object], repeated: list[tuple[dict[str, object], list[str]]], path: Path) -> None:
    problems = _HeaderProblems(path)
    for found, keys in repeated[: -_MAX_PROBLEMS - 1 : -1]:  # the outermost object, with the tensors' names, is last
        owner = next((name for name, entry in header.items() if entry is found), None)
        seen: set[str] = set()
        for key in keys:
            if key not in seen:
                seen.add(key)
            elif found is header and key != METADATA:
                what = f"tensor {printable(key)} is in the header of {problems.file} more than once"
                problems.add(Code.TENSOR_DUPLICATE, what, tensor=key)
            else:
                what = f"{printable(owner or 'the header')} in {problems.file} has the field {printable(key)} twice"
                problems.add(Code.SAFETENSORS_HEADER, what, tensor=owner)
    problems.raise_if_any()


def _read_metadata(metadata: object, problems: _HeaderProblems) -> dict[str, str]:
    if not isinstance(metadata, dict):
        shown = "a tensor's entry" if type(metadata) is _Entry else brief(metadata)
        what = f"{METADATA} of {problems.file} is {shown}, not an object of strings"
        problems.add(Code.SAFETENSORS_HEADER, what)
        return {}
    for key, value in metadata.items():
        if not isinstance(value, str):
            what = f"{METADATA} of {problems.file} maps {printable(key)} to {brief(value)}, not to a string"
            problems.add(Code.SAFETENSORS_HEADER, what)
    return metadata


def _read_entries(
    header: dict[str, object], file: str, data_start: int, problems: _HeaderProblems
) -> tuple[dict[str, StoredTensor], list[_Span]]:
    """The tensors, and the bytes of the data that each claims."""
    tensors: dict[str, StoredTensor] = {}
    spans: list[_Span] = []
    origins = [(0,) * num_axes for num_axes in range(_MAX_AXES + 1)]
    for name, entry in header.items():
        try:
            dtype, shape, begin, end = entry if type(entry) is _Entry else _read_entry(entry, {})
        except _EntryError as error:
            what = f"tensor {printable(name)} in {problems.file}: {error.what}"
            cure = _CURE_DTYPE if error.code is Code.DTYPE_UNKNOWN else _CURE_WRITER
            problems.add(error.code, what, tensor=name, facts=error.facts, cure=cure)
            continue
        spans.append((begin, end, name))
        chunk = Chunk(origins[len(shape)], shape, file, data_start + begin)
        tensors[name] = StoredTensor(name, dtype, shape, (chunk,))
    return tensors, spans


def _read_entry(entry: object, shapes: dict[Shape, Shape]) -> _Entry:
    """One entry of the header, checked; on the path of every tensor, so it tests types by identity (no bool is int)."""
    if type(entry) is not dict:
        raise _EntryError(f"its entry is {brief(entry)}, not an object")
    if entry.keys() != _FIELDS:
        missing = ", ".join(sorted(_FIELDS - entry.keys())) or "none"
        extra = ", ".join(printable(key) for key in sorted(entry.keys() - _FIELDS)[:8]) or "none"
        raise _EntryError("its entry has the wrong fields", f"missing: {missing}; not in the format: {extra}")
    tag, dims, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = _read_dtype(tag)
    if type(dims) is not list or len(dims) > _MAX_AXES:
        raise _EntryError(f"shape is {brief(dims)}, not a list of at most {_MAX_AXES} sizes")
    for dim in dims:
        if type(dim) is not int or not 0 <= dim <= _MAX_NUMBER:
            raise _EntryError(f"shape has an axis of {brief(dim)}, not an integer from 0 to 2**63 - 1")
    if type(offsets) is not list or len(offsets) != 2:
        raise _EntryError(f"data_offsets is {brief(offsets)}, not a list of two numbers")
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or not (0 <= begin <= _MAX_NUMBER and 0 <= end <= _MAX_NUMBER):
        raise _EntryError(f"data_offsets is {brief(offsets)}, not two integers from 0 to 2**63 - 1")
    if begin > end:
        raise _EntryError(f"its data begins at byte {begin} and ends before that, at byte {end}")
    num_bits = math.prod(dims) * dtype.bits
    if num_bits & 7:
        raise _EntryError(f"{tag} of shape {dims} takes {num_bits} bits, which is no whole number of bytes")
    if end - begin != num_bits >> 3:
        raise _EntryError(
            "data_offsets contradict dtype and shape",
            f"expected {num_bits >> 3} bytes for {tag} of shape {dims}; got {end - begin} (from {begin} to {end})",
        )
    shape = tuple(dims)
    return _Entry(dtype, shapes.setdefault(shape, shape), begin, end)


def _read_dtype(tag: object) -> DType:
    if type(tag) is not str:
        raise _EntryError(f"dtype is {brief(tag)}, not a string")
    try:
        return dtype_of_safetensors(tag)
    except ShardwayError as error:
        facts = error.problems[0].facts
        raise _EntryError(f"unknown dtype {printable(tag)}", *facts, code=Code.DTYPE_UNKNOWN) from None


def _check_coverage(spans: Sequence[_Span], data_start: int, num_bytes: int, problems: _HeaderProblems) -> None:
    """Check that the tensors fill the data from its first byte to the file's last, each byte once."""
    file = problems.file
    position, last = 0, ""
    for begin, end, name in sorted(spans):
        if begin < position:
            what = f"tensor {printable(name)} in {file} overlaps tensor {printable(last)}"
            facts = (f"it begins at data byte {begin}; the other ends at data byte {position}",)
            problems.add(Code.SAFETENSORS_OVERLAP, what, tensor=name, facts=facts)
        elif begin > position:
            what = f"{begin - position} bytes before tensor {printable(name)} in {file} belong to no tensor"
            facts = (f"it begins at data byte {begin}; expected {position}",)
            problems.add(Code.SAFETENSORS_GAP, what, tensor=name, facts=facts)
        if end > position:
            position, last = end, name
    data_bytes = num_bytes - data_start
    implied = f"file has {num_bytes} bytes, its header implies {data_start + position}"
    if data_bytes < position:
        cut = [span for span in spans if span[1] > data_bytes]
        first = min(cut)[2]
        what = f"{file} is cut short by {position - data_bytes} bytes"
        incomplete = f"incomplete: {len(cut)} of {len(spans)} tensors, from {printable(first)} on"
        problems.add(Code.SAFETENSORS_TRUNCATED, what, tensor=first, facts=(implied, incomplete), cure=_CURE_DOWNLOAD)
    elif data_bytes > position:
        what = f"{data_bytes - position} bytes at the end of {file} belong to no tensor"
        problems.add(Code.SAFETENSORS_GAP, what, facts=(implied,))


def _truncated(path: Path, fact: str) -> ShardwayError:
    what = f"{printable(path.name)} is cut short"
    return ShardwayError(
        Problem(code=Code.SAFETENSORS_TRUNCATED, what=what, file=path, facts=(fact,), cure=_CURE_DOWNLOAD)
    )


def _header_error(what: str, path: Path, cure: str = _CURE_WRITER) -> ShardwayError:
    return ShardwayError(Problem(code=Code.SAFETENSORS_HEADER, what=what, file=path, cure=cure))
