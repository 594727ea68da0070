"""The pickle of a ``.metadata`` file, emitted without torch's classes."""

from __future__ import annotations

import io
from array import array
from typing import TYPE_CHECKING

from shardway.formats.pickle_writer import (
    APPENDS,
    BUILD,
    EMPTY_DICT,
    EMPTY_LIST,
    FALSE,
    MARK,
    NEW_OBJECT,
    NONE,
    REDUCE,
    SETITEMS,
    STOP,
    PickleWriter,
    fetch,
    integer,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape
    from shardway.formats.dcp import DcpChunk, DcpLocation, DcpTensor

_Word = bytes | str | tuple[str, str]

METADATA = "torch.distributed.checkpoint.metadata"
FILESYSTEM = "torch.distributed.checkpoint.filesystem"

_END = SETITEMS + BUILD
_TENSOR: tuple[_Word, ...] = ((METADATA, "TensorStorageMetadata"), NEW_OBJECT, EMPTY_DICT, MARK, "properties")
_SIZE: tuple[_Word, ...] = ("size",)
_CHUNKS: tuple[_Word, ...] = ("chunks", EMPTY_LIST, MARK)
_CHUNK: tuple[_Word, ...] = ((METADATA, "ChunkStorageMetadata"), NEW_OBJECT, EMPTY_DICT, MARK, "offsets")
_SIZES: tuple[_Word, ...] = ("sizes",)
_INDEX: tuple[_Word, ...] = ((METADATA, "MetadataIndex"), NEW_OBJECT, EMPTY_DICT, MARK, "fqn")
_NO_INDEX: tuple[_Word, ...] = ("index", NONE)
_NO_INDEX_BUT_OFFSET: tuple[_Word, ...] = ("index", NONE, "offset")
_INFO: tuple[_Word, ...] = (_END, (FILESYSTEM, "_StorageInfo"), NEW_OBJECT, EMPTY_DICT, MARK, "relative_path")
_OFFSET: tuple[_Word, ...] = ("offset",)
_LENGTH: tuple[_Word, ...] = ("length",)


class MetadataEmitter:
    """Emits the objects of ``.metadata``; strings, sizes and classes are written once and referred to after that."""

    def __init__(self) -> None:
        self._writer = PickleWriter(4)
        self._out = io.BytesIO()
        self._phrases: dict[tuple[_Word, ...], bytes] = {}

    def metadata(
        self, tensors: Mapping[str, DcpTensor], objects: Mapping[str, DcpLocation], save_id: str | None
    ) -> bytes:
        """The whole pickle; see `shardway.formats.dcp.write_metadata`."""
        writer = self._writer
        put = self._out.writelines
        put((writer.start, writer.reference(METADATA, "Metadata"), NEW_OBJECT, EMPTY_DICT, MARK))
        put((writer.text("state_dict_metadata"), EMPTY_DICT, MARK))
        places = _Places()
        for key, (dtype, shape, chunks) in tensors.items():
            number = self._key(key)
            self._tensor(dtype, shape, chunks)
            for start, _, location in chunks:
                places.add(number, self._size(start), location)
        for key, location in objects.items():
            places.add(self._key(key), None, location)
            put((writer.reference(METADATA, "BytesStorageMetadata"), NEW_OBJECT))
        put((SETITEMS, writer.text("planner_data"), NONE))
        put((writer.text("storage_data"), EMPTY_DICT, MARK))
        for number, begin, file, offset, length in places:
            put(
                (
                    self._phrase(_INDEX),
                    fetch(number),
                    self._phrase(_NO_INDEX) if begin is None else self._phrase(_NO_INDEX_BUT_OFFSET) + begin,
                    self._phrase(_INFO),
                    writer.text(file),
                    self._phrase(_OFFSET),
                    integer(offset),
                    self._phrase(_LENGTH),
                    integer(length),
                    _END,
                )
            )
        put((SETITEMS, writer.text("storage_meta"), writer.reference(METADATA, "StorageMeta"), NEW_OBJECT))
        put((EMPTY_DICT, MARK, writer.text("checkpoint_id"), NONE))
        put((writer.text("save_id"), NONE if save_id is None else writer.text(save_id)))
        put((writer.text("load_id"), NONE, writer.text("modules"), EMPTY_LIST, SETITEMS, BUILD))
        put((writer.text("version"), writer.text("1.0.0"), SETITEMS, BUILD, STOP))
        return self._out.getvalue()

    def _key(self, key: str) -> int:
        """Define a key, which is referred to by its number."""
        number, definition = self._writer.define(key)
        self._out.write(definition)
        return number

    def _tensor(self, dtype: DType, shape: Shape, chunks: Sequence[DcpChunk]) -> None:
        put = self._out.writelines
        put((self._phrase(_TENSOR), self._properties(dtype), self._phrase(_SIZE), self._size(shape)))
        self._out.write(self._phrase(_CHUNKS))
        for start, size, _ in chunks:
            put((self._phrase(_CHUNK), self._size(start), self._phrase(_SIZES), self._size(size), _END))
        put((APPENDS, _END))

    def _phrase(self, words: tuple[_Word, ...]) -> bytes:
        """Opcodes, strings and classes that occur together again and again."""
        known = self._phrases.get(words)
        if known is None:
            first = self._spelled(words)  # defines what the memo lacks
            self._phrases[words] = self._spelled(words)  # refers to it
            return first
        return known

    def _spelled(self, words: tuple[_Word, ...]) -> bytes:
        writer = self._writer
        found = (
            word if isinstance(word, bytes) else writer.text(word) if isinstance(word, str) else writer.reference(*word)
            for word in words
        )
        return b"".join(found)

    def _properties(self, dtype: DType) -> bytes:
        writer = self._writer
        known = writer.recall(dtype)
        if known is not None:
            return known
        cls = writer.reference(METADATA, "TensorProperties") + NEW_OBJECT
        state = (
            MARK,
            writer.reference("torch", dtype.name),
            self._layout(),
            FALSE,
            self._memory_format(),
            FALSE,
            b"tb",
        )
        return writer.memoise(dtype, cls + b"".join(state))

    def _layout(self) -> bytes:
        writer = self._writer
        known = writer.recall(("layout",))
        if known is not None:
            return known
        function = writer.reference("torch.serialization", "_get_layout")
        return writer.memoise(("layout",), function + writer.text("torch.strided") + b"\x85" + REDUCE)

    def _memory_format(self) -> bytes:
        writer = self._writer
        known = writer.recall(("memory format",))
        if known is not None:
            return known
        cls = writer.reference(METADATA, "_MEM_FORMAT_ENCODING")
        return writer.memoise(("memory format",), cls + integer(0) + b"\x85" + REDUCE)

    def _size(self, values: Shape) -> bytes:
        writer = self._writer
        known = writer.recall(values)
        if known is not None:
            return known
        return writer.memoise(values, writer.reference("torch", "Size") + writer.integers(values) + b"\x85" + REDUCE)


class _Places:
    """Which chunk, or object, is where, column by column, without a tuple and three numbers for each."""

    def __init__(self) -> None:
        self._keys = array("I")
        self._starts: list[bytes | None] = []
        self._files: list[str] = []
        self._offsets = array("q")
        self._lengths = array("q")

    def add(self, key: int, start: bytes | None, location: DcpLocation) -> None:
        """Add the number of a key, the opcodes that fetch the start of a chunk, and the place."""
        file, offset, length = location
        self._keys.append(key)
        self._starts.append(start)
        self._files.append(file)
        self._offsets.append(offset)
        self._lengths.append(length)

    def __iter__(self) -> Iterator[tuple[int, bytes | None, str, int, int]]:
        return zip(self._keys, self._starts, self._files, self._offsets, self._lengths, strict=True)
