"""Loading into a live model: each rank reads exactly the bytes of its own shards; nothing here communicates.

Before that, a few chunks of a checkpoint that records digests are read whole, and held against them.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardway.core.boxes import Box
from shardway.core.collector import collector_paused
from shardway.core.errors import Code, Problems, ShardwayError
from shardway.core.tiles import reach
from shardway.families.config import HFConfig
from shardway.families.layout import layout_of
from shardway.families.mapping import map_model, variants_in
from shardway.formats.huggingface import CONFIG_FILE, open_huggingface
from shardway.formats.quantised import copy_problems, present
from shardway.formats.torch_dist import open_torch_dist
from shardway.live.blocks import synchronise
from shardway.live.cuts import cuts_of
from shardway.live.extra_state import restore
from shardway.live.fitting import check_model, match_stored, relate, tail_of
from shardway.live.reader import CountedFiles, Filler, Lane, jobs_of, same_bytes
from shardway.plans.matching import is_training_state, match_huggingface, tied_problem
from shardway.plans.streams import chunk_problems
from shardway.run.engine import parse_workers
from shardway.run.team import Team
from shardway.verification.integrity import check_sample

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import nn

    from shardway.core.tensors import Catalog, StoredTensor
    from shardway.core.tiles import Tile
    from shardway.families.mapping import ModelMapping
    from shardway.formats.quantised import Quantised
    from shardway.live.memory import ModelMemory, Target
    from shardway.live.reader import Job

_MOST_THREADS = 4  # a node has many ranks, each with its own
_SAMPLED_BYTES = 16 * 2**20  # milliseconds; each rank draws others, so a job of many ranks looks at gigabytes
_CHANGED = "the model's parameters may have been written in part: load again before they are used"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a load did on this rank.

    Attributes:
        num_tensors: Boxes of global tensors that were filled.
        num_bytes: Their bytes in memory.
        read_bytes: Bytes of tensors that were read from files into the model.
        compared_bytes: Bytes that were read before that to prove that tensors which a checkpoint holds twice (a tied
            head, the embedding of multi-token prediction) are equal.
        sampled_bytes: Bytes that were read before that to hold chunks, chosen at random, against recorded digests.
        seconds: Wall-clock time.
        notes: What a user should know about the result, one sentence each.
    """

    num_tensors: int
    num_bytes: int
    read_bytes: int
    compared_bytes: int
    sampled_bytes: int
    seconds: float
    notes: tuple[str, ...]


def load_huggingface(
    model: nn.Module | Sequence[nn.Module],
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, object] | None = None,
    workers: int | None = None,
) -> LoadReport:
    """Fill a live Megatron model with the weights of a Hugging Face directory, or change nothing of it.

    Names, shapes and dtypes of the whole checkpoint and of the model are compared first. Then this rank reads the
    bytes of its own shards, straight into the parameters where they need no cast. Rows by which a vocabulary is padded
    become zero. Floating-point tensors are cast to the model's dtype, which the report says; quantised ones are
    dequantised to it (docs/formats/quantised.md).

    Args:
        model: A megatron-core model, or the list of its pipeline chunks on this rank.
        path: Directory with config.json and safetensors.
        config: What stands for the directory's own config.
        workers: Threads; by default one per processor, at most 4.

    Returns:
        What was done.

    Raises:
        ShardwayError: All problems together, before anything of the model is changed; `cast-overflow`, and an
            `io-failed` that happens while bytes are read, say that it was.

    *Ranks*: local; any rank may call it or not.
    """
    began = time.perf_counter()
    threads = _threads(workers)
    memory = _memory(model)
    root = Path(path)
    checkpoint = present(open_huggingface(root))
    hf_config = HFConfig(checkpoint.config if config is None else config, str(root / CONFIG_FILE))
    tensors = checkpoint.catalog.tensors
    problems = Problems()
    variants = variants_in(hf_config, hf=tensors, recorded=memory.variants)
    full = map_model(hf_config, variants=variants)
    problems.extend(checkpoint.faults)
    matched = match_huggingface(full, tensors, problems)
    problems.extend(copy_problems(matched.copies, checkpoint))
    mapping = _mapping(hf_config, memory, variants)
    check_model(memory, mapping, problems)
    problems.raise_if_any()
    notes = _left_out(full, mapping)
    with CountedFiles(root) as source:
        _check_copies(memory, mapping.tiles, matched.copies, checkpoint.catalog, source)
        found = checkpoint.catalog, checkpoint.quantised
        return _fill(memory, mapping.tiles, mapping.shifts, *found, source, threads, began, notes)


def load_torch_dist(
    model: nn.Module | Sequence[nn.Module],
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, object] | None = None,
    workers: int | None = None,
) -> LoadReport:
    """Fill a live Megatron model with the weights of a torch_dist checkpoint, saved at any parallelism.

    As `load_huggingface`. Layers may be stacked on one side and per layer on the other. Where the checkpoint records
    digests, up to 16 MiB of chunks of the tensors that this rank reads from, chosen at random, are checked first.

    Args:
        model: A megatron-core model, or the list of its pipeline chunks on this rank.
        path: Root of the checkpoint, or an iteration's folder.
        config: Content of the model's config.json, against which the whole checkpoint is checked; without one, or for
            an architecture that isn't known, only what this rank's model asks for is.
        workers: Threads; by default one per processor, at most 4.

    Raises:
        ShardwayError: As `load_huggingface`; `digest-mismatch`, before anything of the model is changed.

    *Ranks*: local; any rank may call it or not.
    """
    began = time.perf_counter()
    threads = _threads(workers)
    memory = _memory(model)
    wanted = {tail_of(target.shard.key) for target in memory.targets}

    def is_wanted(key: str) -> bool:
        # Norms are small, and may have another name there.
        return (tail_of(key) in wanted or "norm" in key) and not is_training_state(key)

    checkpoint = open_torch_dist(Path(path), wanted=is_wanted)
    described = {key: tensor for key, tensor in checkpoint.described.items() if not is_training_state(key)}
    problems = Problems()
    mapping, stored = _mappings(config, memory, described)
    if mapping is not None and stored is not None:
        match_stored(stored, described, memory.resizable, problems)
        check_model(memory, mapping, problems)
        problems.raise_if_any()
    tiles = relate(memory, {key: tensor.shape for key, tensor in described.items()}, mapping, stored, problems)
    problems.extend(chunk_problems(checkpoint.catalog.tensors.values()))
    problems.raise_if_any()
    _check_dtypes(memory, tiles, checkpoint.catalog, problems)
    problems.raise_if_any()
    notes = () if mapping is None or stored is None else _left_out(stored, mapping)
    read_from = {tile.hf.tensor for tile in tiles}
    sampled = check_sample(checkpoint, max_bytes=_SAMPLED_BYTES, tensors=read_from)
    with CountedFiles(checkpoint.root) as source:
        report = _fill(memory, tiles, {}, checkpoint.catalog, {}, source, threads, began, notes)
    return replace(report, sampled_bytes=sampled, notes=report.notes + restore(_extra_states(model), checkpoint))


def _threads(workers: int | None) -> int:
    return min(parse_workers(None), _MOST_THREADS) if workers is None else parse_workers(workers)


def _memory(model: nn.Module | Sequence[nn.Module]) -> ModelMemory:
    from shardway.live.megatron import megatron_memory  # megatron-core takes seconds to import

    return megatron_memory(model)


def _extra_states(model: nn.Module | Sequence[nn.Module]) -> dict[str, Callable[[object], None]]:
    from shardway.live.megatron import extra_states

    return extra_states(model)


def _mapping(config: HFConfig, memory: ModelMemory, variants: Mapping[str, bool]) -> ModelMapping:
    """What a config says of the model: multi-token prediction is left out where the model has none."""
    absent = {"mtp": False} if not memory.variants.get("mtp") else {}
    return map_model(config, memory.layout, variants={**variants, **absent})


def _mappings(
    values: Mapping[str, object] | None, memory: ModelMemory, described: Mapping[str, StoredTensor]
) -> tuple[ModelMapping | None, ModelMapping | None]:
    """What a config says of the model and of a Megatron checkpoint of it, where its architecture is known."""
    if not values:
        return None, None
    config = HFConfig(values)
    try:
        variants = variants_in(config, mcore=described)
    except ShardwayError as error:
        if error.code is Code.ARCHITECTURE_UNSUPPORTED:
            return None, None
        raise
    own = {"te": memory.variants.get("te", True)}
    return _mapping(config, memory, {**variants, **own}), map_model(config, layout_of(described), variants=variants)


def _left_out(full: ModelMapping, mapping: ModelMapping) -> tuple[str, ...]:
    """What is there and not asked for."""
    absent = full.hf.keys() - mapping.hf.keys()
    if not absent:
        return ()
    return (f"{len(absent)} tensors of multi-token prediction were left out: the model has no such layers",)


@collector_paused()
def _fill(
    memory: ModelMemory,
    tiles: Sequence[Tile],
    shifts: Mapping[str, float],
    catalog: Catalog,
    quantised: Mapping[str, Quantised],
    source: CountedFiles,
    num_threads: int,
    began: float,
    notes: tuple[str, ...],
) -> LoadReport:
    """Read every element of the targets, or zero where the tiles have none."""
    targets = memory.targets
    compared_bytes = source.num_read_bytes
    cuts = cuts_of([target.shard for target in targets], tiles, catalog.tensors)
    filled = [0] * len(targets)
    for cut in cuts:
        filled[cut.target] += cut.tile.num_elements
    padded = _padded(memory, filled)
    jobs = jobs_of(cuts, targets, catalog.tensors, shifts, quantised)
    filler = Filler(targets, filled, shifts)
    for target in padded:
        if target.tensor is not None:
            target.tensor.zero_()
    synchronise({target.tensor.device for target in targets if target.tensor is not None})
    try:
        _run(jobs, filler, source, num_threads)
    except ShardwayError as error:
        facts = (_CHANGED,)
        raise ShardwayError(each._replace(facts=each.facts + facts) for each in error.problems) from error
    problems = Problems()
    for name, count in sorted(filler.overflows.items()):
        what = f"{count} finite values of {name} became infinite in the cast to the model's dtype"
        cure = "build the model in bf16 or fp32, and load again"
        problems.add(Code.CAST_OVERFLOW, what, tensor=name, facts=(_CHANGED,), cure=cure)
    problems.raise_if_any()
    cast: dict[tuple[str, str], set[str]] = {}
    computed: dict[str, set[str]] = {}
    for cut in cuts:
        if cut.tile.hf.tensor in quantised:
            computed.setdefault(quantised[cut.tile.hf.tensor].scheme, set()).add(cut.tile.hf.tensor)
            continue
        names = catalog.tensors[cut.tile.hf.tensor].dtype.name, targets[cut.target].shard.dtype.name
        if names[0] != names[1]:
            cast.setdefault(names, set()).add(cut.tile.hf.tensor)
    return LoadReport(
        num_tensors=len(targets),
        num_bytes=memory.num_bytes,
        read_bytes=source.num_read_bytes - compared_bytes,
        compared_bytes=compared_bytes,
        sampled_bytes=0,
        seconds=time.perf_counter() - began,
        notes=(
            *notes,
            *(f"{len(found)} tensors were dequantised from {scheme}" for scheme, found in computed.items()),
            *(f"{len(found)} tensors were cast from {old} to {new}" for (old, new), found in cast.items()),
            *(f"{count} values of {name} were rounded" for name, count in sorted(filler.rounded.items())),
        ),
    )


def _padded(memory: ModelMemory, filled: Sequence[int]) -> list[Target]:
    """The targets that get fewer elements than they have, which only those of a padded tensor may."""
    padded: list[Target] = []
    problems = Problems()
    for target, count in zip(memory.targets, filled, strict=True):
        if count == target.box.num_elements:
            continue
        if count < target.box.num_elements and target.shard.key in memory.resizable:
            padded.append(target)
            continue
        what = f"{count} of {target.box.num_elements} elements of a part of {target.shard.key} would be read"
        facts = (f"from {list(target.box.start)} of extent {list(target.box.size)}",)
        problems.add(Code.COVERAGE, what, tensor=target.shard.key, facts=facts)
    problems.raise_if_any()
    return padded


def _check_copies(
    memory: ModelMemory, tiles: Iterable[Tile], copies: Mapping[str, str], catalog: Catalog, source: CountedFiles
) -> None:
    """Prove that tensors which are there twice are equal, as far as this rank has a part of them."""
    problems = Problems()
    for name, of in copies.items():
        shards = [target.shard for target in memory.targets]
        one, other = catalog.tensors[of], catalog.tensors[name]
        for cut in cuts_of(shards, (tile for tile in tiles if tile.hf.tensor == of), catalog.tensors):
            side = cut.tile.hf
            box = Box(side.base, reach(cut.tile.sizes, side.steps, len(side.base)))
            if not same_bytes(source, one, other, box):
                fact = f"they differ between rows {box.start[0]} and {box.start[0] + box.size[0] - 1}"
                problems.extend([tied_problem(name, of, other.chunks[0].file, fact)])
                break
    problems.raise_if_any()


def _check_dtypes(memory: ModelMemory, tiles: Iterable[Tile], catalog: Catalog, problems: Problems) -> None:
    """Check that what is stored can be cast to what the model has."""
    wanted = {target.shard.key: target.shard.dtype for target in memory.targets}
    for tile in tiles:
        have, want = catalog.tensors[tile.hf.tensor].dtype, wanted[tile.mcore.tensor]
        if have is not want and not (have.floating and want.floating and have.bits >= 16 and want.bits >= 16):
            what = f"{tile.hf.tensor} holds {have.name} values, and the model asks for {want.name}"
            problems.add(Code.DTYPE_UNSUPPORTED, what, tensor=tile.hf.tensor)


def _run(jobs: Sequence[Job], filler: Filler, source: CountedFiles, num_threads: int) -> None:
    """Work through all jobs on several threads; the first error stops all."""
    waiting = iter(jobs)
    lock = threading.Lock()
    team = Team()

    def work() -> None:
        lane = Lane(source, filler)
        while not team.stopped.is_set():
            with lock:
                job = next(waiting, None)
            if job is None:
                break
            lane.read(job)
        lane.finish()

    team.run([work] * min(num_threads, len(jobs)), "shardway-load")
