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
        self._out = io.BytesIO()

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
                self._index(key, start)
                self._location(location)
        for key, location in objects.items():
            self._index(key, None)
            self._location(location)
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
            put((writer.reference(METADATA, "ChunkStorageMetadata"), NEW_OBJECT, EMPTY_DICT, MARK))
            put(
                (
                    writer.text("offsets"),
                    self._size(start),
                    writer.text("sizes"),
                    self._size(size),
                    SETITEMS,
                    BUILD,
                )
            )
        put((APPENDS, SETITEMS, BUILD))

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

    def _index(self, key: str, start: Shape | None) -> None:
        writer = self._writer
        put = self._out.writelines
        put((writer.reference(METADATA, "MetadataIndex"), NEW_OBJECT, EMPTY_DICT, MARK))
        put((writer.text("fqn"), writer.text(key), writer.text("index"), NONE))
        if start is not None:
            put((writer.text("offset"), self._size(start)))
        put((SETITEMS, BUILD))

    def _location(self, location: DcpLocation) -> None:
        writer = self._writer
        put = self._out.writelines
        put((writer.reference(FILESYSTEM, "_StorageInfo"), NEW_OBJECT, EMPTY_DICT, MARK))
        put((writer.text("relative_path"), writer.text(location.file)))
        put((writer.text("offset"), integer(location.offset), writer.text("length"), integer(location.length)))
        put((SETITEMS, BUILD))
