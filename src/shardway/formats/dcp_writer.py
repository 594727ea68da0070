"""The pickle of a ``.metadata`` file, emitted without torch's classes."""

from __future__ import annotations

import io
from array import array
from itertools import repeat
from typing import TYPE_CHECKING, TypeVar

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
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape
    from shardway.formats.dcp import DcpChunk, DcpLocation, DcpTensor

_Word = bytes | str | tuple[str, str]

METADATA = "torch.distributed.checkpoint.metadata"
FILESYSTEM = "torch.distributed.checkpoint.filesystem"

_END = SETITEMS + BUILD


class _Phrase:
    """Opcodes, strings and classes that occur together again and again."""

    def __init__(self, *words: _Word) -> None:
        self.words = words


_TENSOR = _Phrase((METADATA, "TensorStorageMetadata"), NEW_OBJECT, EMPTY_DICT, MARK, "properties")
_SIZE = _Phrase("size")
_CHUNKS = _Phrase("chunks", EMPTY_LIST, MARK)
_CHUNK = _Phrase((METADATA, "ChunkStorageMetadata"), NEW_OBJECT, EMPTY_DICT, MARK, "offsets")
_SIZES = _Phrase("sizes")
_INDEX = _Phrase((METADATA, "MetadataIndex"), NEW_OBJECT, EMPTY_DICT, MARK, "fqn")
_NO_INDEX = _Phrase("index", NONE)
_NO_INDEX_BUT_OFFSET = _Phrase("index", NONE, "offset")
_INFO = _Phrase(_END, (FILESYSTEM, "_StorageInfo"), NEW_OBJECT, EMPTY_DICT, MARK, "relative_path")
_OFFSET = _Phrase("offset")
_LENGTH = _Phrase("length")

_Key = TypeVar("_Key")


class _Spelled(dict[_Key, bytes]):
    """How things are spelled: what defines a thing when it is asked for the first time, what refers to it after that.

    Args:
        spell: What to write for a thing, by what the writer remembers.
    """

    def __init__(self, spell: Callable[[_Key], bytes]) -> None:
        super().__init__()
        self._spell = spell

    def __missing__(self, key: _Key) -> bytes:
        definition = self._spell(key)
        self[key] = self._spell(key)
        return definition


class MetadataEmitter:
    """Emits the objects of ``.metadata``; strings, sizes and classes are written once and referred to after that."""

    def __init__(self) -> None:
        self._writer = PickleWriter(4)
        self._out = io.BytesIO()
        self._phrases = _Spelled(self._spell_phrase)
        self._sizes = _Spelled(self._spell_size)
        self._texts = _Spelled(self._writer.text)

    def metadata(
        self, tensors: Mapping[str, DcpTensor], objects: Mapping[str, DcpLocation], save_id: str | None
    ) -> bytes:
        """The whole pickle; see `shardway.formats.dcp.write_metadata`."""
        writer, phrases, texts = self._writer, self._phrases, self._texts
        put = self._out.writelines
        put((writer.start, writer.reference(METADATA, "Metadata"), NEW_OBJECT, EMPTY_DICT, MARK))
        put((writer.text("state_dict_metadata"), EMPTY_DICT, MARK))
        places = _Places()
        for key, (dtype, shape, chunks) in tensors.items():
            number = self._key(key)
            self._tensor(dtype, shape, chunks)
            starts = [self._sizes[start] for start, _, _ in chunks]
            places.add(repeat(number, len(chunks)), starts, [location for _, _, location in chunks])
        numbers = []
        for key in objects:
            numbers.append(self._key(key))
            put((writer.reference(METADATA, "BytesStorageMetadata"), NEW_OBJECT))
        places.add(numbers, repeat(None, len(numbers)), objects.values())
        put((SETITEMS, writer.text("planner_data"), NONE))
        put((writer.text("storage_data"), EMPTY_DICT, MARK))
        for number, begin, file, offset, length in places:
            put((phrases[_INDEX], fetch(number)))
            put((phrases[_NO_INDEX],) if begin is None else (phrases[_NO_INDEX_BUT_OFFSET], begin))
            where = phrases[_INFO], texts[file], phrases[_OFFSET], integer(offset), phrases[_LENGTH], integer(length)
            put((*where, _END))
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
        phrases, sizes = self._phrases, self._sizes
        put = self._out.writelines
        put((phrases[_TENSOR], self._properties(dtype), phrases[_SIZE], sizes[shape], phrases[_CHUNKS]))
        for start, size, _ in chunks:
            put((phrases[_CHUNK], sizes[start], phrases[_SIZES], sizes[size], _END))
        put((APPENDS, _END))

    def _spell_phrase(self, phrase: _Phrase) -> bytes:
        writer = self._writer
        found = (
            word if isinstance(word, bytes) else writer.text(word) if isinstance(word, str) else writer.reference(*word)
            for word in phrase.words
        )
        return b"".join(found)

    def _spell_size(self, values: Shape) -> bytes:
        writer = self._writer
        known = writer.recall(values)
        if known is not None:
            return known
        return writer.memoise(values, writer.reference("torch", "Size") + writer.integers(values) + b"\x85" + REDUCE)

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


class _Places:
    """Which chunk, or object, is where, column by column, without a tuple and three numbers for each."""

    def __init__(self) -> None:
        self._keys = array("I")
        self._starts: list[bytes | None] = []
        self._files: list[str] = []
        self._offsets = array("q")
        self._lengths = array("q")

    def add(self, keys: Iterable[int], starts: Iterable[bytes | None], locations: Collection[DcpLocation]) -> None:
        """Add numbers of keys, the opcodes that fetch the starts of chunks, and the places of these."""
        self._keys.extend(keys)
        self._starts.extend(starts)
        self._files += [file for file, _, _ in locations]
        self._offsets.extend([offset for _, offset, _ in locations])
        self._lengths.extend([length for _, _, length in locations])

    def __iter__(self) -> Iterator[tuple[int, bytes | None, str, int, int]]:
        return zip(self._keys, self._starts, self._files, self._offsets, self._lengths, strict=True)
