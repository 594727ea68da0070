"""The record that shardway leaves in an iteration folder: where the weights came from, and digests of every byte.

``shardway.json`` is JSON; Megatron and Megatron Bridge ignore it. Everything that an export needs beside the tensors
and the ``hf`` folder is in it, and a checkpoint without it exports as well.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats.dcp import is_plain_path
from shardway.formats.json_text import JsonInvalidError, parse_json
from shardway.formats.small_files import read_small_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shardway.core.tensors import StoredTensor

RECORD_FILE = "shardway.json"
_MAX_BYTES = 256 * 2**20
_VERSION = 2
_ALGORITHM = "xxh3-128"
_BLANK = "0" * 32
_END = b'"\n}\n'  # what follows the record's own digest
_TAIL_BYTES = len(_BLANK) + len(_END)
_PART_BYTES = 2**16

# Digest of each chunk of a tensor, by the chunk's first index.
ChunkDigests = Mapping[tuple[str, tuple[int, ...]], str]


class FileDigest(NamedTuple):
    """A file of a checkpoint.

    Attributes:
        num_bytes: Its size.
        digest: xxh3-128 of its bytes in their order, but for the elements of chunks, which have digests of their own.
    """

    num_bytes: int
    digest: str


class Record(NamedTuple):
    """What is known about how a checkpoint was made.

    Attributes:
        written_by: Program and version.
        family: Name of the model family; None where it is not known.
        architecture: Hugging Face class; None where it is not known.
        source: Fingerprint of the source's files.
        options: What the conversion was told that changes its result.
        copies: Hugging Face tensors that were exact copies of another one, and which.
        variants: The form that the source was in, where its family knows several.
        dtypes: Hugging Face tensors that Megatron holds in a wider type than the source did, and the source's type.
        megatron_config: Fields of megatron-core's TransformerConfig and GPTModel.
        quantised: By scheme, the Hugging Face tensors that were dequantised.
        digests: xxh3-128 of the bytes of every chunk.
        files: Every file of the iteration folder but the record itself, by its path in the folder.
    """

    written_by: str
    family: str | None
    architecture: str | None
    source: str
    options: Mapping[str, object]
    copies: Mapping[str, str] = {}
    variants: Mapping[str, bool] = {}
    dtypes: Mapping[str, str] = {}
    megatron_config: Mapping[str, object] = {}
    quantised: Mapping[str, tuple[str, ...]] = {}
    digests: Mapping[tuple[str, tuple[int, ...]], str] = {}
    files: Mapping[str, FileDigest] = {}

    def with_digests(self, digests: ChunkDigests, files: Mapping[str, FileDigest]) -> Record:
        """The record with the digests of the chunks and files that were written."""
        return self._replace(digests=digests, files=files)

    def to_json(self) -> bytes:
        """The record as the bytes of ``shardway.json``, its own digest last."""
        return b"".join(self.parts())

    def parts(self) -> Iterator[bytes]:
        """The bytes of ``shardway.json`` piece by piece."""
        import xxhash

        document = {
            "format": _VERSION,
            "written_by": self.written_by,
            "family": self.family,
            "architecture": self.architecture,
            "source": self.source,
            "options": dict(self.options),
            "copies": dict(self.copies),
            "variants": dict(self.variants),
            "dtypes": dict(self.dtypes),
            "megatron_config": dict(self.megatron_config),
            "quantised": {scheme: list(names) for scheme, names in self.quantised.items()},
            "digests": {
                "algorithm": _ALGORITHM,
                "files": {
                    name: {"bytes": size, "digest": digest} for name, (size, digest) in sorted(self.files.items())
                },
                "chunks": {},
            },
            "digest": _BLANK,
        }
        before, key, after = json.dumps(document, indent=1).rpartition('"chunks": {')
        hasher = xxhash.xxh3_128()
        waiting = bytearray()
        for text in itertools.chain((before, key), _listed(self.digests), (after, "\n")):
            waiting += text.encode()
            if len(waiting) > _PART_BYTES:
                part = bytes(waiting[:-_TAIL_BYTES])
                del waiting[:-_TAIL_BYTES]
                hasher.update(part)
                yield part
        hasher.update(waiting)
        yield _with_own_digest(bytes(waiting), hasher.hexdigest())


def read_record(folder: Path, tensors: Mapping[str, StoredTensor] = {}) -> Record | None:
    """The record of an iteration folder, every byte of it as it was written; None where there is none.

    Args:
        folder: The folder.
        tensors: Tensors whose names are not to be held in memory a second time.

    Raises:
        ShardwayError: `record-invalid` when there is one that can't be understood or was changed, `path-escapes` when
            it names files outside of the folder.
    """
    path = folder / RECORD_FILE
    try:
        data = read_small_file(path, _MAX_BYTES)
        document = parse_json(data)
    except JsonInvalidError as error:
        raise _invalid(path, f"it {error}") from None
    except ShardwayError as error:
        if error.code is Code.FILE_MISSING:
            return None
        raise _invalid(path, error.problems[0].what) from error
    if not isinstance(document, dict) or document.get("format") != _VERSION:
        raise _invalid(path, f"its format is not {_VERSION}")
    if document.get("digest") != _own_digest(data) or _with_own_digest(data, document["digest"]) != data:
        raise _invalid(path, "it was changed or damaged after it was written: its own digest does not fit")
    try:
        record = _parse(document, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _invalid(path, f"{type(error).__name__}: {error!s:.200}") from error
    escaping = [name for name in record.files if not is_plain_path(name)]
    if escaping:
        what = f"the record names the file {escaping[0][:200]!r}, which is not a plain path inside the checkpoint"
        raise ShardwayError(Problem(code=Code.PATH_ESCAPES, what=what, file=path, cure="do not trust this checkpoint"))
    return record


def _parse(document: dict[str, Any], tensors: Mapping[str, StoredTensor]) -> Record:
    digests = document["digests"]
    if digests["algorithm"] != _ALGORITHM:
        raise ValueError(f"its digests are not {_ALGORITHM}")
    family, architecture = document["family"], document["architecture"]
    return Record(
        written_by=_text(document["written_by"]),
        family=None if family is None else _text(family),
        architecture=None if architecture is None else _text(architecture),
        source=_text(document["source"]),
        options=dict(document["options"]),
        copies={name: _text(of) for name, of in document["copies"].items()},
        variants={flag: _flag(value) for flag, value in document["variants"].items()},
        dtypes={name: _text(dtype) for name, dtype in document["dtypes"].items()},
        megatron_config=dict(document["megatron_config"]),
        quantised={
            scheme: tuple(map(_text, names))
            for scheme, names in document.get("quantised", {}).items()  # records of 0.1.0 have none
        },
        digests=_chunk_digests(digests["chunks"], tensors),
        files={
            name: FileDigest(_size(file["bytes"]), _text(file["digest"])) for name, file in digests["files"].items()
        },
    )


def _listed(digests: ChunkDigests) -> Iterator[str]:
    """The entries of ``chunks`` as they stand between its braces, tensor by tensor."""
    comma = ""
    for tensor, places in itertools.groupby(sorted(digests), key=itemgetter(0)):
        chunks = {".".join(map(str, start)): digests[tensor, start] for _, start in places}
        entry = json.dumps({tensor: chunks}, indent=1)[1:-2]
        yield comma + entry.replace("\n", "\n  ")
        comma = ","
    if comma:
        yield "\n  "


def _chunk_digests(listed: dict[str, dict[str, str]], tensors: Mapping[str, StoredTensor]) -> ChunkDigests:
    """The digests of chunks as they are listed; takes them out of the list."""
    found: dict[tuple[str, tuple[int, ...]], str] = {}
    starts: dict[str, tuple[int, ...]] = {"": ()}  # layers and experts have most of them in common
    for tensor in list(listed):
        name = tensors[tensor].name if tensor in tensors else tensor
        for text, digest in listed.pop(tensor).items():
            start = starts.get(text)
            if start is None:
                start = starts[text] = tuple(map(int, text.split(".")))
            found[name, start] = _text(digest)
    return found


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} in the place of a string")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"a {type(value).__name__} in the place of true or false")
    return value


def _size(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise TypeError("a size in bytes is no count")
    return value


def _own_digest(data: bytes) -> str:
    """xxh3-128 of the record's bytes, with zeros where this digest stands in them."""
    import xxhash

    return str(xxhash.xxh3_128_hexdigest(_with_own_digest(data, _BLANK)))


def _with_own_digest(data: bytes, digest: str) -> bytes:
    return data[:-_TAIL_BYTES] + digest.encode() + _END


def _invalid(path: Path, why: str) -> ShardwayError:
    return ShardwayError(
        Problem(
            code=Code.RECORD_INVALID,
            what="the record of the conversion can't be understood",
            file=path,
            facts=(why,),
            cure="if the weights are known to be good, remove the file; its digests are then not checked",
        )
    )
