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

METADATA = "torch.distributed.checkpoint.metadata"
FILESYSTEM = "torch.distributed.checkpoint.filesystem"


class MetadataEmitter:
    """Emits the objects of ``.metadata``; strings, sizes and classes are written once and referred to after that."""

    def __init__(self) -> None:
        self._writer = PickleWriter(4)

    def metadata(
        self, tensors: Mapping[str, DcpTensor], objects: Mapping[str, DcpLocation], save_id: str | None
    ) -> bytes:
        """The whole pickle; see `shardway.formats.dcp.write_metadata`."""
        writer = self._writer
        parts = [writer.start, writer.reference(METADATA, "Metadata"), NEW_OBJECT, EMPTY_DICT, MARK]
        parts += (writer.text("state_dict_metadata"), EMPTY_DICT, MARK)
        out = io.BytesIO()
        for key, tensor in tensors.items():
            self._tensor(parts, key, tensor)
            _flush(parts, out)
        for key in objects:
            parts += (writer.text(key), writer.reference(METADATA, "BytesStorageMetadata"), NEW_OBJECT)
        parts += (SETITEMS, writer.text("planner_data"), NONE)
        parts += (writer.text("storage_data"), EMPTY_DICT, MARK)
        for key, tensor in tensors.items():
            for start, _, location in tensor.chunks:
                self._index(parts, key, start)
                self._location(parts, location)
            _flush(parts, out)
        for key, location in objects.items():
            self._index(parts, key, None)
            self._location(parts, location)
        parts += (SETITEMS, writer.text("storage_meta"), writer.reference(METADATA, "StorageMeta"), NEW_OBJECT)
        parts += (EMPTY_DICT, MARK, writer.text("checkpoint_id"), NONE)
        parts += (writer.text("save_id"), NONE if save_id is None else writer.text(save_id))
        parts += (writer.text("load_id"), NONE, writer.text("modules"), EMPTY_LIST, SETITEMS, BUILD)
        parts += (writer.text("version"), writer.text("1.0.0"), SETITEMS, BUILD, STOP)
        _flush(parts, out)
        return out.getvalue()

    def _tensor(self, parts: list[bytes], key: str, tensor: DcpTensor) -> None:
        writer = self._writer
        parts += (writer.text(key), writer.reference(METADATA, "TensorStorageMetadata"), NEW_OBJECT, EMPTY_DICT, MARK)
        parts += (
            writer.text("properties"),
            self._properties(tensor.dtype),
            writer.text("size"),
            self._size(tensor.shape),
        )
        parts += (writer.text("chunks"), EMPTY_LIST, MARK)
        for start, size, _ in tensor.chunks:
            parts += (writer.reference(METADATA, "ChunkStorageMetadata"), NEW_OBJECT, EMPTY_DICT, MARK)
            parts += (
                writer.text("offsets"),
                self._size(start),
                writer.text("sizes"),
                self._size(size),
                SETITEMS,
                BUILD,
            )
        parts += (APPENDS, SETITEMS, BUILD)

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

    def _index(self, parts: list[bytes], key: str, start: Shape | None) -> None:
        writer = self._writer
        parts += (writer.reference(METADATA, "MetadataIndex"), NEW_OBJECT, EMPTY_DICT, MARK)
        parts += (writer.text("fqn"), writer.text(key), writer.text("index"), NONE)
        if start is not None:
            parts += (writer.text("offset"), self._size(start))
        parts += (SETITEMS, BUILD)

    def _location(self, parts: list[bytes], location: DcpLocation) -> None:
        writer = self._writer
        parts += (writer.reference(FILESYSTEM, "_StorageInfo"), NEW_OBJECT, EMPTY_DICT, MARK)
        parts += (writer.text("relative_path"), writer.text(location.file))
        parts += (writer.text("offset"), integer(location.offset), writer.text("length"), integer(location.length))
        parts += (SETITEMS, BUILD)


def _flush(parts: list[bytes], out: io.BytesIO) -> None:
    """Write what has been emitted so far: 50,000 chunks take two million parts, and joining those 80 bytes for each."""
    out.writelines(parts)
    parts.clear()
