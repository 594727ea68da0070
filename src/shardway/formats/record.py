"""The record that shardway leaves in an iteration folder: where the weights came from, and a digest of every chunk.

``shardway.json`` is JSON; Megatron and Megatron Bridge ignore it. Everything that an export needs beside the tensors
and the ``hf`` folder is in it, and a checkpoint without it exports as well.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

RECORD_FILE = "shardway.json"
_MAX_BYTES = 256 * 2**20
_VERSION = 1
_ALGORITHM = "xxh3-128"

# Digest of each chunk of a tensor, by the chunk's first index.
ChunkDigests = dict[tuple[str, tuple[int, ...]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known about how a checkpoint was made.

    Attributes:
        written_by: Program and version.
        family: Name of the model family.
        architecture: Hugging Face class.
        source: Fingerprint of the source's files.
        options: What the conversion was told that changes its result.
        copies: Hugging Face tensors that were exact copies of another one, and which.
        variants: The form that the source was in, where its family knows several.
        dtypes: Hugging Face tensors that Megatron holds in a wider type than the source did, and the source's type.
        megatron_config: Fields of megatron-core's TransformerConfig and GPTModel.
        digests: xxh3-128 of the bytes of every chunk.
    """

    written_by: str
    family: str
    architecture: str
    source: str
    options: Mapping[str, object]
    copies: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, bool] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    megatron_config: Mapping[str, object] = field(default_factory=dict)
    digests: ChunkDigests = field(default_factory=dict)

    def with_digests(self, digests: ChunkDigests) -> Record:
        """The record with the digests of the chunks that were written."""
        return dataclasses.replace(self, digests=digests)

    def to_json(self) -> bytes:
        """The record as the bytes of ``shardway.json``."""
        chunks: dict[str, dict[str, str]] = {}
        for (tensor, start), digest in sorted(self.digests.items()):
            chunks.setdefault(tensor, {})[".".join(map(str, start))] = digest
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
            "digests": {"algorithm": _ALGORITHM, "chunks": chunks},
        }
        return (json.dumps(document, indent=1) + "\n").encode()


def read_record(folder: Path) -> Record | None:
    """The record of an iteration folder; None where there is none.

    Raises:
        ShardwayError: `record-invalid` when there is one that can't be understood.
    """
    path = folder / RECORD_FILE
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise _invalid(path, f"it is larger than {_MAX_BYTES} bytes")
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _invalid(path, str(error)) from error
    if not isinstance(document, dict) or document.get("format") != _VERSION:
        raise _invalid(path, f"its format is not {_VERSION}")
    try:
        digests = document["digests"]
        if digests["algorithm"] != _ALGORITHM:
            raise _invalid(path, f"its digests are not {_ALGORITHM}")
        return Record(
            written_by=str(document["written_by"]),
            family=str(document["family"]),
            architecture=str(document["architecture"]),
            source=str(document["source"]),
            options=dict(document["options"]),
            copies={str(name): str(of) for name, of in document["copies"].items()},
            variants={str(flag): bool(value) for flag, value in document.get("variants", {}).items()},
            dtypes={str(name): str(dtype) for name, dtype in document.get("dtypes", {}).items()},
            megatron_config=dict(document["megatron_config"]),
            digests={
                (tensor, tuple(map(int, start.split("."))) if start else ()): str(digest)
                for tensor, chunks in digests["chunks"].items()
                for start, digest in chunks.items()
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _invalid(path, f"{type(error).__name__}: {error}") from error


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
