"""Saying what a conversion would do, without writing anything."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardway.convert.chunk_for import parse_chunk_for
from shardway.convert.exporting import export_options, prepare_export
from shardway.convert.options import choice, parse_dtype, parse_size
from shardway.core.collector import collector_paused
from shardway.core.errors import Code, Problem, ShardwayError
from shardway.families.config import HFConfig
from shardway.families.layout import Layout, layout_of
from shardway.families.mapping import map_model, variants_in
from shardway.formats.huggingface import CONFIG_FILE, open_huggingface
from shardway.formats.quantised import count_schemes, present
from shardway.formats.torch_dist import iteration_folder, open_torch_dist
from shardway.hub.names import is_repository, refuse_revision
from shardway.plans.imports import ImportOptions, plan_import
from shardway.verification.opening import is_megatron

if TYPE_CHECKING:
    from shardway.core.tensors import Catalog
    from shardway.plans.model import Plan

_NOWHERE = Path("destination")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """What a conversion would read and write.

    Attributes:
        source: What would be read.
        direction: ``import`` or ``export``.
        feasible: Whether it would begin: no problem was found.
        architecture: Hugging Face class, where it could be found out.
        family: Name of the model family, likewise.
        layout: Layout on the Megatron side, likewise.
        num_tensors: Tensors on the Hugging Face side.
        num_parameters: Their elements.
        reads: Bytes of tensors in each file that would be read.
        writes: Bytes of each file that would be written.
        disk_bytes: Space that the destination would take.
        missing: Tensors that the config asks for and no file holds.
        unclaimed: Tensors that no rule claims.
        problems: Everything that stands in the way.
        notes: What a user should know about the result, one sentence each.
        dequantised: Of an import: number of tensors whose values are computed from quantised ones, by scheme.
    """

    source: str
    direction: str
    feasible: bool
    architecture: str | None = None
    family: str | None = None
    layout: str | None = None
    num_tensors: int = 0
    num_parameters: int = 0
    reads: dict[str, int] = dataclasses.field(default_factory=dict)
    writes: dict[str, int] = dataclasses.field(default_factory=dict)
    disk_bytes: int = 0
    missing: tuple[str, ...] = ()
    unclaimed: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    dequantised: dict[str, int] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """The report as JSON-ready data."""
        document = dataclasses.asdict(self)
        document["problems"] = [
            problem._asdict() | {"file": None if problem.file is None else str(problem.file)}
            for problem in self.problems
        ]
        return document


@collector_paused()
def plan(
    source: str | Path,
    *,
    hf: str | Path | None = None,
    dtype: str = "auto",
    weights: str = "model",
    layout: str = "auto",
    max_file_size: str | int = "4GiB",
    max_shard_size: str | int = "auto",
    chunk_for: str = "",
    quantize: str | None = None,
    revision: str | None = None,
) -> PlanReport:
    """Say what importing a Hugging Face checkpoint, or exporting a Megatron one, would read and write.

    Only headers and metadata are read; nothing is written.

    Args:
        source: A Hugging Face directory, or the root or an iteration folder of a Megatron checkpoint; or ``"org/name"``
            of a repository on the Hub, of which headers alone are fetched.
        hf: For an export: directory with the config, as for `export_hf`.
        dtype: As for `import_hf` and `export_hf`.
        weights: For an export, as for `export_hf`.
        layout: For an import, as for `import_hf`.
        max_file_size: For an import, as for `import_hf`.
        max_shard_size: For an export, as for `export_hf`.
        chunk_for: For an import, as for `import_hf`.
        quantize: For an export, as for `export_hf`.
        revision: For a repository on the Hub, as for `import_hf`.

    Returns:
        The plan in numbers; problems that would stop the conversion are listed in it, not raised.

    Raises:
        ShardwayError: `option-invalid`, and what looking up a repository raises.
    """
    if is_repository(source):
        from shardway.hub.source import open_hub

        with open_hub(str(source), revision, keep=False) as hub:
            report = plan(hub.root, dtype=dtype, layout=layout, max_file_size=max_file_size, chunk_for=chunk_for)
            return dataclasses.replace(
                report,
                source=str(source),
                problems=tuple(map(hub.spoken, report.problems)),
                notes=(*hub.notes, *report.notes),
            )
    refuse_revision(source, revision)
    path = Path(source)
    if is_megatron(path):
        options = export_options(dtype, weights, max_shard_size, quantize)
        try:
            checkpoint = open_torch_dist(path, wanted=options.weights.wants)
            job = prepare_export(checkpoint, None if hf is None else Path(hf), _NOWHERE, options)
        except ShardwayError as error:
            return _stopped(source, "export", error)
        layout_found = layout_of(job.plan.mcore.tensors)
        reads = _by_file(job.plan.mcore)
        return _report(source, job.plan, job.mapping.architecture, job.mapping.family, layout_found, reads)
    wanted = None if layout == "auto" else choice("layout", layout, Layout)
    importing = ImportOptions(
        dtype=parse_dtype(dtype),
        max_file_bytes=parse_size("max_file_size", max_file_size),
        parallel=parse_chunk_for(chunk_for),
    )
    try:
        stored = open_huggingface(path)
        found = present(stored, importing.dtype)
        config = HFConfig(found.config, str(path / CONFIG_FILE))
        names = found.catalog.tensors
        mapping = map_model(config, wanted, variants=variants_in(config, hf=names), known=names)
        planned = plan_import(found, mapping, _NOWHERE / iteration_folder(0), importing)
    except ShardwayError as error:
        return _stopped(source, "import", error)
    reads = _by_file(stored.catalog)
    return _report(source, planned, mapping.architecture, mapping.family, mapping.layout, reads)


def _report(
    source: str | Path, planned: Plan, architecture: str, family: str, layout: Layout, reads: dict[str, int]
) -> PlanReport:
    writes = {target.name: target.num_bytes for target in planned.targets}
    writes |= {name: len(contents) for name, contents in planned.small_files.items()}
    return PlanReport(
        source=str(source),
        direction=planned.direction.value,
        feasible=True,
        architecture=architecture,
        family=family,
        layout=layout.value,
        num_tensors=len(planned.hf.tensors),
        num_parameters=planned.mcore.num_elements,
        reads=reads,
        writes=writes,
        disk_bytes=planned.disk_bytes,
        notes=planned.notes,
        dequantised=count_schemes(planned.quantised),
    )


def _stopped(source: str | Path, direction: str, error: ShardwayError) -> PlanReport:
    def of(code: Code) -> tuple[str, ...]:
        return tuple(problem.tensor for problem in error.problems if problem.code is code and problem.tensor)

    return PlanReport(
        source=str(source),
        direction=direction,
        feasible=False,
        missing=of(Code.TENSOR_MISSING),
        unclaimed=of(Code.TENSOR_UNEXPECTED),
        problems=error.problems,
    )


def _by_file(catalog: Catalog) -> dict[str, int]:
    import math

    files: dict[str, int] = {}
    for tensor in catalog.tensors.values():
        for chunk in tensor.chunks:
            files[chunk.file] = files.get(chunk.file, 0) + tensor.dtype.num_bytes(math.prod(chunk.size))
    return files
