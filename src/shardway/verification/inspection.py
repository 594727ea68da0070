"""Looking into a checkpoint of either kind."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardway.families.layout import layout_of
from shardway.formats.huggingface import CONFIG_FILE, HuggingFaceCheckpoint, read_companions
from shardway.formats.quantised import count_schemes, present
from shardway.formats.record import read_record
from shardway.hub.names import is_repository, refuse_revision
from shardway.plans.imports import HF_FOLDER
from shardway.plans.matching import is_training_state
from shardway.run.engine import parse_workers
from shardway.run.source import unchanged
from shardway.verification.authors import FORMS, author
from shardway.verification.digests import tensor_digests
from shardway.verification.opening import Checkpoint, in_whole_bytes, open_checkpoint, snapshot_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardway.run.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """One tensor of a checkpoint.

    Attributes:
        shape: Global shape.
        dtype: torch's name of its element type.
        num_chunks: Pieces in which it lies on disk.
        sha256: Hex digest of its elements, row-major and little-endian; only where digests were asked for.
    """

    shape: tuple[int, ...]
    dtype: str
    num_chunks: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectReport:
    """What a checkpoint is and holds.

    Attributes:
        path: The directory with the weights: the iteration folder of a Megatron checkpoint.
        kind: ``huggingface`` or ``megatron``.
        architecture: Hugging Face class, where the directory says it.
        layout: ``stacked`` or ``per-layer``, for Megatron.
        iteration: Number of the iteration, for Megatron; None for a release.
        form: For Megatron: ``mcore <= 0.18`` (common.pt) or ``mcore >= 0.19`` (common_state).
        written_by: Program that wrote it, where that shows.
        num_parameters: Elements of all tensors.
        num_bytes: Bytes of all tensors.
        dtypes: Number of tensors by dtype.
        tensors: Every tensor of the model by name.
        objects: Keys of pickled objects, ``_extra_state`` among them; never unpickled.
        training_state: Keys of optimizer, RNG and other training state.
        files: Bytes of the files by name.
        content_metadata: What a Megatron checkpoint says about its layout.
        quantised: Number of weights that are stored quantised, by scheme; only those of schemes that can be read.
    """

    path: str
    kind: str
    architecture: str | None
    layout: str | None
    iteration: int | None
    form: str | None
    written_by: str | None
    num_parameters: int
    num_bytes: int
    dtypes: dict[str, int]
    tensors: dict[str, TensorReport]
    objects: tuple[str, ...]
    training_state: tuple[str, ...]
    files: dict[str, int]
    content_metadata: dict[str, object]
    quantised: dict[str, int]

    def to_dict(self) -> dict[str, object]:
        """The report as JSON-ready data; digests are left out where they were not asked for."""
        document = dataclasses.asdict(self)
        for tensor in document["tensors"].values():
            if tensor["sha256"] is None:
                del tensor["sha256"]
        return document


def inspect(
    path: str | Path,
    *,
    digest: bool = False,
    workers: int | None = None,
    revision: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> InspectReport:
    """Say what a checkpoint is and what it holds, from its metadata alone unless digests are asked for.

    Args:
        path: A Hugging Face directory, or the root or an iteration folder of a Megatron checkpoint; or ``"org/name"``
            of a repository on the Hub, of which headers alone are fetched unless digests are asked for.
        digest: Read every tensor and give its sha256.
        workers: Threads; by default one per processor, at most 16.
        revision: Of a repository on the Hub: branch, tag or commit; by default ``main``.
        progress: Called from the worker threads while digests are taken.

    Raises:
        ShardwayError: When it can't be read or is damaged; all problems together.
    """
    num_workers = parse_workers(workers)
    if is_repository(path):
        from shardway.hub.source import fetch, open_hub

        with open_hub(str(path), revision, keep=digest) as hub:
            root = fetch(hub, progress) if digest else hub.root
            report = inspect(root, digest=digest, workers=workers, progress=progress)
            return dataclasses.replace(report, path=str(hub.repository))
    refuse_revision(path, revision)
    snapshot = snapshot_of(Path(path))
    checkpoint = open_checkpoint(Path(path))
    catalog = checkpoint.catalog
    with unchanged(snapshot.reading(catalog)):
        digests = tensor_digests(in_whole_bytes(catalog), num_workers, progress) if digest else {}
    tensors = {
        name: TensorReport(
            shape=tensor.shape, dtype=tensor.dtype.name, num_chunks=len(tensor.chunks), sha256=digests.get(name)
        )
        for name, tensor in sorted(catalog.tensors.items())
    }
    return InspectReport(
        path=str(catalog.root),
        num_parameters=catalog.num_elements,
        num_bytes=catalog.num_bytes,
        dtypes=dict(Counter(tensor.dtype for tensor in tensors.values()).most_common()),
        tensors=tensors,
        **_particulars(checkpoint),
    )


def _particulars(checkpoint: Checkpoint) -> dict[str, Any]:
    if isinstance(checkpoint, HuggingFaceCheckpoint):
        root = checkpoint.catalog.root
        names = [*checkpoint.files, *(file.name for file in checkpoint.small_files)]
        version = checkpoint.config.get("transformers_version")
        return {
            "kind": "huggingface",
            "architecture": _architecture(checkpoint.config),
            "layout": None,
            "iteration": None,
            "form": None,
            "written_by": f"transformers {version}" if isinstance(version, str) else None,
            "objects": (),
            "training_state": (),
            "files": {name: (root / name).stat().st_size for name in names},
            "content_metadata": {},
            "quantised": count_schemes(present(checkpoint).quantised),
        }
    record = read_record(checkpoint.root)
    architecture = record.architecture if record else None
    if architecture is None and checkpoint.hf_dir is not None and f"{HF_FOLDER}/{CONFIG_FILE}" in checkpoint.files:
        architecture = _architecture(read_companions(checkpoint.hf_dir)[0])
    keys = (*checkpoint.described, *checkpoint.places)
    return {
        "kind": "megatron",
        "architecture": architecture,
        "layout": layout_of(checkpoint.catalog.tensors).value,
        "iteration": checkpoint.iteration,
        "form": FORMS[checkpoint.common_form],
        "written_by": author(checkpoint, record),
        "objects": tuple(key for key in checkpoint.objects if not is_training_state(key)),
        "training_state": tuple(sorted(filter(is_training_state, keys))),
        "files": dict(checkpoint.files),
        "content_metadata": checkpoint.content_metadata,
        "quantised": {},
    }


def _architecture(config: dict[str, object]) -> str | None:
    listed = config.get("architectures")
    return listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], str) else None
