"""The pickle of a ``.metadata`` file, emitted without torch's classes."""

from __future__ import annotations

import io
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
    integer,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape
    from shardway.formats.dcp import DcpLocation, DcpTensor

_Word = bytes | str | tuple[str, str]

METADATA = "torch.distributed.checkpoint.metadata"
FILESYSTEM = "torch.distributed.checkpoint.filesystem"


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
        for key, tensor in tensors.items():
            self._tensor(key, tensor)
        for key in objects:
            put((writer.text(key), writer.reference(METADATA, "BytesStorageMetadata"), NEW_OBJECT))
        put((SETITEMS, writer.text("planner_data"), NONE))
        put((writer.text("storage_data"), EMPTY_DICT, MARK))
        for key, tensor in tensors.items():
            for start, _, location in tensor.chunks:
                self._placed(key, start, location)
        for key, location in objects.items():
            self._placed(key, None, location)
        put((SETITEMS, writer.text("storage_meta"), writer.reference(METADATA, "StorageMeta"), NEW_OBJECT))
        put((EMPTY_DICT, MARK, writer.text("checkpoint_id"), NONE))
        put((writer.text("save_id"), NONE if save_id is None else writer.text(save_id)))
        put((writer.text("load_id"), NONE, writer.text("modules"), EMPTY_LIST, SETITEMS, BUILD))
        put((writer.text("version"), writer.text("1.0.0"), SETITEMS, BUILD, STOP))
        return self._out.getvalue()

    def _tensor(self, key: str, tensor: DcpTensor) -> None:
        writer = self._writer
        put = self._out.writelines
        put((writer.text(key), writer.reference(METADATA, "TensorStorageMetadata"), NEW_OBJECT, EMPTY_DICT, MARK))
        put(
            (
                writer.text("properties"),
                self._properties(tensor.dtype),
                writer.text("size"),
                self._size(tensor.shape),
            )
        )
        put((writer.text("chunks"), EMPTY_LIST, MARK))
        for start, size, _ in tensor.chunks:
            put(
                (
                    self._phrase((METADATA, "ChunkStorageMetadata"), NEW_OBJECT, EMPTY_DICT, MARK, "offsets"),
                    self._size(start),
                    self._phrase("sizes"),
                    self._size(size),
                    SETITEMS,
                    BUILD,
                )
            )
        put((APPENDS, SETITEMS, BUILD))

    def _phrase(self, *words: _Word) -> bytes:
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

    def _placed(self, key: str, start: Shape | None, location: DcpLocation) -> None:
        """An entry of `storage_data`: which chunk, or object, and where it is."""
        self._out.writelines(
            (
                self._phrase((METADATA, "MetadataIndex"), NEW_OBJECT, EMPTY_DICT, MARK, "fqn"),
                self._writer.text(key),
                self._phrase("index", NONE),
                b"" if start is None else self._phrase("offset") + self._size(start),
                SETITEMS,
                BUILD,
                self._phrase((FILESYSTEM, "_StorageInfo"), NEW_OBJECT, EMPTY_DICT, MARK, "relative_path"),
                self._writer.text(location.file),
                self._phrase("offset"),
                integer(location.offset),
                self._phrase("length"),
                integer(location.length),
                SETITEMS,
                BUILD,
            )
        )
