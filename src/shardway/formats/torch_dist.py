"""The directory of a Megatron-Core ``torch_dist`` checkpoint: opened and proven complete, or written in pieces."""

from __future__ import annotations

import json
import os
import struct
from typing import TYPE_CHECKING, Literal, NamedTuple

from shardway.core.collector import collector_paused
from shardway.core.dtypes import dtype_of_torch
from shardway.core.errors import Code, Problem, Problems, ShardwayError
from shardway.core.tensors import Catalog, Chunk, StoredTensor
from shardway.formats.dcp import DcpMetadata, read_metadata
from shardway.formats.file_problems import missing_file, unreadable_file
from shardway.formats.iterations import (
    RELEASE,
    TRACKER,
    find_iteration,
    is_iteration_name,
    iteration_folder,
    shorten,
    tracker_text,
)
from shardway.formats.json_text import JsonInvalidError, parse_json
from shardway.formats.pickles import SavedObject
from shardway.formats.saved_objects import (
    MAX_FILE_BYTES,
    SavedTensor,
    read_torch_bytes,
    read_torch_file,
    write_torch_file,
)
from shardway.formats.small_files import read_small_file
from shardway.formats.torch_file import find_framed, read_tensor_blob

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping
    from pathlib import Path

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape
    from shardway.formats.dcp import DcpChunk, DcpLocation

__all__ = [
    "COMMON_STATE",
    "TRACKER",
    "TorchDistCheckpoint",
    "common_pt",
    "extra_state",
    "find_iteration",
    "iteration_folder",
    "metadata_json",
    "open_torch_dist",
    "tracker_text",
    "train_state_pt",
]

COMMON_STATE = "common_state/shard_0_1"
_MAX_METADATA_BYTES = 1 << 30
_MAX_JSON_BYTES = 1 << 20
_MAX_FILES = 100_000
_MAX_PROBLEMS = 32  # a damaged file can break every one of 50,000 chunks
_CURE_COPY = "the checkpoint is incomplete: copy or save it again"


class TorchDistCheckpoint(NamedTuple):
    """A torch_dist checkpoint whose every tensor has been found, with type, shape and size as announced.

    Attributes:
        root: The folder of the iteration.
        iteration: Its number, or None for a release.
        release: Whether it is a ``release`` checkpoint.
        catalog: Its tensors; chunk offsets are those of the elements, chunk files are relative to `root`.
        objects: Keys of its pickled objects, sorted.
        common: The common state.
        content_metadata: What the model said about its own layout when it was saved.
        common_form: Where the common state was.
        hf_dir: The Hugging Face files that were saved along (``hf/``), if there are any.
        files: Every file in `root`, by path relative to it, with its bytes.
        described: Every tensor of ``.metadata``; where one is not in the catalog, offsets are those of the blobs that
            hold its chunks.
        places: Where each of its pickled objects is.
    """

    root: Path
    iteration: int | None
    release: bool
    catalog: Catalog
    objects: tuple[str, ...]
    common: dict[str, object]
    content_metadata: dict[str, object]
    common_form: Literal["common.pt", "common_state"]
    hf_dir: Path | None
    files: Mapping[str, int]
    described: Mapping[str, StoredTensor]
    places: Mapping[str, DcpLocation]

    def read_object(self, key: str) -> object:
        """The pickled object `key`, read as `read_torch_bytes` does.

        Raises:
            ShardwayError: `tensor-missing` for a key that is not there, or what `read_torch_bytes` raises.
        """
        return read_torch_bytes(self.object_bytes(key), file=f"{self.root} ({key})")

    def object_bytes(self, key: str) -> bytes:
        """The file of `torch.save` that holds the pickled object `key`, unread.

        Raises:
            ShardwayError: `tensor-missing` for a key that is not there, `torch-file-invalid` for an object of more than
                256 MiB, `distcp-truncated`, `file-missing`, `file-unreadable`.
        """
        location = self.places.get(key)
        if location is None:
            raise ShardwayError(Problem(code=Code.TENSOR_MISSING, what=f"there is no object {key}", file=self.root))
        return _object_bytes(self.root, key, location)

    def common_bytes(self) -> bytes:
        """The file of `torch.save` that holds the common state: a dict, or in the newer form a list of one.

        Raises:
            ShardwayError: As `object_bytes`.
        """
        if self.common_form == "common.pt":
            return read_small_file(self.root / "common.pt", MAX_FILE_BYTES)
        return self.object_bytes(COMMON_STATE)


def open_torch_dist(path: Path, *, wanted: Callable[[str], bool] | None = None) -> TorchDistCheckpoint:
    """Open a checkpoint and find every element of every tensor in its files; no element is read, nothing is executed.

    Args:
        path: The root, where the tracker file names the iteration, or an iteration's folder.
        wanted: Which tensors to find, by key; all by default. A model's own are few among an optimizer's.

    Returns:
        The checkpoint.

    Raises:
        ShardwayError: Every problem of the files together; the codes of the Megatron side (docs/errors.md).

    Source: megatron/core/dist_checkpointing/serialization.py, megatron/training/checkpointing.py (core 0.16.1, 0.20).
    """
    try:
        return _open(find_iteration(path), wanted)
    except OSError as error:
        what = f"cannot read the checkpoint: {error.strerror or error}"
        raise ShardwayError(Problem(code=Code.FILE_UNREADABLE, what=what, file=error.filename or path)) from None


@collector_paused()
def _open(root: Path, wanted: Callable[[str], bool] | None) -> TorchDistCheckpoint:
    files = _list_files(root)
    _check_backend(root, files)
    metadata_path = root / ".metadata"
    metadata = read_metadata(read_small_file(metadata_path, _MAX_METADATA_BYTES), str(metadata_path))
    problems = Problems()
    present = _check_files(root, metadata, files, problems)
    tensors = _find_tensors(root, metadata, present, wanted, problems)
    problems.raise_if_any()
    common, form = _read_common(root, metadata)
    content = common.get("content_metadata")
    iteration, release = _iteration_of(root, common)
    unopened = _unopened(metadata, tensors)
    return TorchDistCheckpoint(
        root=root,
        iteration=iteration,
        release=release,
        catalog=Catalog(root=root, tensors=tensors),
        objects=tuple(sorted(metadata.objects)),
        common=common,
        content_metadata=_string_keyed(content) if isinstance(content, dict) else {},
        common_form=form,
        hf_dir=_hf_dir(root),
        files=files,
        described={**unopened, **tensors} if unopened else tensors,
        places=metadata.objects,
    )


def _hf_dir(root: Path) -> Path | None:
    """The folder ``hf``; what is in it will be copied as it is, so it must not be a link to somewhere else."""
    path = root / "hf"
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        what = f"{path.name} is a link to {path.resolve()}, outside of the checkpoint"
        cure = "if you trust it, put a copy of the directory in the place of the link"
        raise ShardwayError(Problem(code=Code.PATH_ESCAPES, what=what, file=path, cure=cure))
    return path if path.is_dir() else None


def metadata_json(*, common_pt: bool = True) -> bytes:
    """Content of ``metadata.json``: with ``common.pt`` the four fields that every megatron-core reads, else two."""
    fields: dict[str, object] = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    if common_pt:
        fields |= {"common_backend": "torch", "common_backend_version": 1}
    return json.dumps(fields).encode()


def common_pt(
    iteration: int, content_metadata: Mapping[str, object], args: Mapping[str, object] | None = None
) -> bytes:
    """Content of ``common.pt``; `checkpoint_version` 3.0 is what Megatron-LM needs to leave QKV as it is.

    Args:
        iteration: Number of the iteration.
        content_metadata: What a loader reads to build the matching sharded state dict.
        args: Attributes of the namespace of arguments that Megatron-LM reads; None for none.
    """
    state: dict[str, object] = {
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "content_metadata": dict(content_metadata),
    }
    if args is not None:
        state["args"] = SavedObject("argparse.Namespace", state=dict(args))
    return write_torch_file(state, name="common")


def train_state_pt(step: int = 0) -> bytes:
    """Content of ``train_state.pt``, as Megatron Bridge writes it for a model that has not been trained."""
    int64, float32, boolean = (dtype_of_torch(name) for name in ("int64", "float32", "bool"))
    counts = ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    state = {name: SavedTensor(int64, (), struct.pack("<q", step if name == "step" else 0)) for name in counts}
    state["floating_point_operations_so_far"] = SavedTensor(float32, (), bytes(4))
    state |= {name: SavedTensor(boolean, (), b"\0") for name in ("do_train", "do_valid", "do_test")}
    return write_torch_file(state, name="train_state")


def extra_state() -> bytes:
    """The ``_extra_state`` object of a module that has none: `torch.save([None])`."""
    return write_torch_file([None])


def _iteration_of(root: Path, common: Mapping[str, object]) -> tuple[int | None, bool]:
    name = root.absolute().name
    if name == RELEASE:
        return None, True
    if is_iteration_name(name):
        return int(name.removeprefix("iter_")), False
    number = common.get("iteration")
    return (number if type(number) is int else None), False


def _list_files(root: Path) -> dict[str, int]:
    """Every file below `root` with its bytes; links to folders are not followed."""
    files: dict[str, int] = {}
    pending = [""]
    while pending:
        folder = pending.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = f"{folder}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{name}/")
                elif entry.is_file():
                    files[name] = entry.stat().st_size
        if len(files) + len(pending) > _MAX_FILES:
            what = f"{root} holds more than {_MAX_FILES:,} files"
            raise ShardwayError(Problem(code=Code.NOT_A_CHECKPOINT, what=what, file=root))
    return dict(sorted(files.items()))


def _check_backend(root: Path, files: Mapping[str, int]) -> None:
    """Refuse what is no complete torch_dist checkpoint, saying what it is instead."""
    if "metadata.json" in files:
        path = root / "metadata.json"
        try:
            config = parse_json(read_small_file(path, _MAX_JSON_BYTES))
        except JsonInvalidError as error:
            what = f"metadata.json {error}"
            raise ShardwayError(Problem(code=Code.METADATA_INVALID, what=what, file=path, cure=_CURE_COPY)) from None
        backend = config.get("sharded_backend") if isinstance(config, dict) else None
        if not isinstance(backend, str):
            what = "metadata.json does not say which backend wrote the checkpoint"
            raise ShardwayError(Problem(code=Code.METADATA_INVALID, what=what, file=path, cure=_CURE_COPY))
        if backend != "torch_dist":
            raise ShardwayError(
                Problem(
                    code=Code.BACKEND_UNSUPPORTED,
                    what=f"the checkpoint was written by the backend {backend!r:.80}; shardway reads torch_dist",
                    file=path,
                    cure="convert it with Megatron-LM (--ckpt-convert-format torch_dist)",
                )
            )
    missing = [name for name in (".metadata", "metadata.json") if name not in files]
    if missing:
        raise ShardwayError(
            Problem(
                code=Code.METADATA_MISSING,
                what=f"{' and '.join(missing)} missing in {root}",
                file=root,
                facts=(f"found: {shorten(sorted(files)) or 'nothing'}",),
                cure=_explain(missing, files),
            )
        )


def _explain(missing: list[str], files: Mapping[str, int]) -> str:
    names = list(files)
    if any(name.startswith(("mp_rank_", "tp_rank_")) for name in names):
        return "this is a legacy Megatron checkpoint (mp_rank_*): save it with --ckpt-format torch_dist"
    if any(name.endswith("model_optim_rng.pt") for name in names):
        return "this is a legacy Megatron checkpoint (model_optim_rng.pt): save it with --ckpt-format torch_dist"
    if missing == ["metadata.json"]:
        return "this is an unfinished save, or a plain torch.distributed.checkpoint that Megatron-Core has not written"
    if any(name.endswith(".safetensors") for name in names):
        return "this looks like a Hugging Face folder: use it as the source of an import"
    if any(name.endswith(".distcp") for name in names):
        return "the save was not finished (it writes .metadata last): use an earlier iteration"
    return "use another iteration: this one holds no checkpoint"


def _check_files(root: Path, metadata: DcpMetadata, files: Mapping[str, int], problems: Problems) -> set[str]:
    """The files that hold all of what they should; the others are reported with everything that lies in them."""
    users: dict[str, list[str]] = {}
    needed: dict[str, int] = {}
    for key, location in _locations(metadata):
        needed[location.file] = max(needed.get(location.file, 0), location.offset + location.length)
        names = users.setdefault(location.file, [])
        if not names or names[-1] != key:
            names.append(key)
    present = set()
    for name, num_bytes in sorted(needed.items()):
        size = files.get(name)
        if size is not None and size >= num_bytes:
            present.add(name)
            continue
        concerned = f"{len(users[name]):,} keys have data in it: {shorten(users[name])}"
        if size is None:
            what = f"{name} is missing"
            problems.add(Code.FILE_MISSING, what, file=root / name, facts=(concerned,), cure=_CURE_COPY)
        else:
            what = f"{name} is cut off"
            facts = (f"it should have at least {num_bytes:,} bytes, has {size:,}", concerned)
            problems.add(Code.DISTCP_TRUNCATED, what, file=root / name, facts=facts, cure=_CURE_COPY)
    return present


def _locations(metadata: DcpMetadata) -> Iterable[tuple[str, DcpLocation]]:
    for key, tensor in metadata.tensors.items():
        for chunk in tensor.chunks:
            yield key, chunk.location
    yield from metadata.objects.items()


def _find_tensors(
    root: Path, metadata: DcpMetadata, present: set[str], wanted: Callable[[str], bool] | None, problems: Problems
) -> dict[str, StoredTensor]:
    """The wanted tensors; incomplete if problems are reported."""
    keys = [key for key in metadata.tensors if wanted is None or wanted(key)]
    places: dict[str, list[tuple[int, str, DcpChunk]]] = {}
    for key in keys:
        for chunk in metadata.tensors[key].chunks:
            places.setdefault(chunk.location.file, []).append((chunk.location.offset, key, chunk))
    found: dict[tuple[str, Shape], Chunk] = {}
    # One file after the other: a job of thousands of ranks leaves more files than a process may hold open.
    for name in sorted(present & places.keys()):
        file = str(root / name)
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            reached = 0
            for begin, key, chunk in sorted(places[name]):
                if len(problems) >= _MAX_PROBLEMS:
                    break
                if begin < reached:  # a small file could stand for any number of large tensors
                    what = f"a chunk of {key} lies in bytes that belong to another chunk"
                    problems.add(Code.METADATA_INVALID, what, tensor=key, file=file, cure=_CURE_COPY)
                reached = begin + chunk.location.length
                offset = _find_chunk(fd, file, key, metadata.tensors[key].dtype, chunk, problems)
                found[key, chunk.start] = Chunk(chunk.start, chunk.size, name, offset)
        finally:
            os.close(fd)
    if len(problems):
        return {}
    tensors = {}
    for key in keys:
        dtype, shape, chunks = metadata.tensors[key]
        tensors[key] = StoredTensor(key, dtype, shape, tuple(found[key, chunk.start] for chunk in chunks))
    return tensors


def _unopened(metadata: DcpMetadata, opened: Container[str]) -> dict[str, StoredTensor]:
    """The tensors that were not looked for, their chunks where their blobs are."""
    found = {}
    for key, (dtype, shape, chunks) in metadata.tensors.items():
        if key not in opened:
            places = (Chunk(start, size, at.file, at.offset) for start, size, at in chunks)
            found[key] = StoredTensor(key, dtype, shape, tuple(places))
    return found


def _find_chunk(fd: int, file: str, key: str, dtype: DType, chunk: DcpChunk, problems: Problems) -> int:
    """Byte offset in the file of a chunk's first element, or 0 and a problem."""
    _, offset, length = chunk.location
    framed = find_framed(fd, offset, length, dtype, chunk.size)
    if framed is not None:
        return framed
    try:
        blob = read_tensor_blob(fd, offset, length, file=file, tensor=key)
    except ShardwayError as error:
        problems.extend(error.problems)
        return 0
    if blob.dtype != dtype or blob.shape != chunk.size:
        problems.add(
            Code.SHAPE_MISMATCH,
            f"a chunk of {key} is not what .metadata says",
            tensor=key,
            file=file,
            facts=(
                f"at {list(chunk.start)} expected {dtype.name} of shape {list(chunk.size)}",
                f"found {blob.dtype.name} of shape {list(blob.shape)}",
            ),
            cure="the files are of different saves: copy the checkpoint again",
        )
    return blob.data_offset


def _read_common(root: Path, metadata: DcpMetadata) -> tuple[dict[str, object], Literal["common.pt", "common_state"]]:
    path = root / "common.pt"
    form: Literal["common.pt", "common_state"] = "common.pt"
    location = metadata.objects.get(COMMON_STATE)
    if path.exists():
        value = read_torch_file(path)
    elif location is not None:
        form = "common_state"
        value = read_torch_bytes(_object_bytes(root, COMMON_STATE, location), file=f"{root} ({COMMON_STATE})")
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
    else:
        raise ShardwayError(
            Problem(
                code=Code.METADATA_MISSING,
                what=f"{root} has neither common.pt nor the object {COMMON_STATE}",
                file=root,
                cure=_CURE_COPY,
            )
        )
    if not isinstance(value, dict):
        what = f"the common state ({form}) is a {type(value).__name__}, not a dict"
        raise ShardwayError(Problem(code=Code.METADATA_INVALID, what=what, file=root, cure=_CURE_COPY))
    return _string_keyed(value), form


def _object_bytes(root: Path, key: str, location: DcpLocation) -> bytes:
    name, offset, length = location
    if length > MAX_FILE_BYTES:
        what = f"the object {key} has {length:,} bytes; at most {MAX_FILE_BYTES:,} are read"
        raise ShardwayError(Problem(code=Code.TORCH_FILE_INVALID, what=what, tensor=key, file=root / name))
    try:
        fd = os.open(root / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            data = os.pread(fd, length, offset)
        finally:
            os.close(fd)
    except FileNotFoundError:
        raise ShardwayError(missing_file(root / name)) from None
    except OSError as error:
        raise ShardwayError(unreadable_file(root / name, error)) from None
    if len(data) != length:
        what = f"{name} ends within the object {key}"
        raise ShardwayError(Problem(code=Code.DISTCP_TRUNCATED, what=what, tensor=key, file=root / name))
    return data


def _string_keyed(value: dict[object, object]) -> dict[str, object]:
    return {key: item for key, item in value.items() if isinstance(key, str)}
