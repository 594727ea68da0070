"""Verifying that two checkpoints of any kinds hold the same tensors, or that one is as it was recorded: bit for bit."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.errors import ShardwayError
from shardway.core.tiles import Side, Tile, identity
from shardway.families.config import HFConfig
from shardway.families.layout import Layout, layout_of
from shardway.families.mapping import map_model, variants_in
from shardway.formats.huggingface import CONFIG_FILE, HuggingFaceCheckpoint
from shardway.formats.quantised import computed_as, count_schemes, present
from shardway.formats.record import read_record
from shardway.hub.names import is_repository, refuse_revision
from shardway.plans.matching import padded_rows
from shardway.plans.model import Direction, Plan
from shardway.plans.streams import build_streams
from shardway.plans.weights import model_state
from shardway.run.engine import parse_workers
from shardway.run.source import unchanged
from shardway.verification.compare import compare_streams
from shardway.verification.integrity import check_recorded
from shardway.verification.opening import Checkpoint, in_whole_bytes, open_checkpoint, snapshot_of
from shardway.verification.report import Difference, VerifyReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from shardway.core.errors import Problem
    from shardway.core.tensors import Catalog, Shape, StoredTensor
    from shardway.families.mapping import ModelMapping
    from shardway.formats.quantised import Quantised
    from shardway.formats.record import ChunkDigests
    from shardway.formats.torch_dist import TorchDistCheckpoint
    from shardway.plans.weights import ModelState
    from shardway.run.progress import Progress

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def verify(
    a: str | Path,
    b: str | Path | None = None,
    *,
    workers: int | None = None,
    revision: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> VerifyReport:
    """Compare two checkpoints, each a Hugging Face directory or a Megatron checkpoint, element by element.

    Both are only read. Names, layouts and chunking are translated, training state is left aside, and digests that a
    Megatron checkpoint records are checked on the way.

    One Megatron checkpoint alone is held against its own record (``shardway.json``): every bit of every file that
    shardway wrote is checked.

    Args:
        a: A Hugging Face directory, or the root or an iteration folder of a Megatron checkpoint; or ``"org/name"`` of a
            repository on the Hub, which is fetched into the local cache as far as it is not there.
        b: Likewise; None to hold the first one against its own record.
        workers: Threads; by default one per processor, at most 16.
        revision: Of the one that is a repository on the Hub: branch, tag or commit; by default ``main``.
        progress: Called from the worker threads, one call at a time.

    Returns:
        What was compared, and every difference.

    Raises:
        ShardwayError: When one of them can't be read, its architecture is unknown and has to be translated, or its
            files were changed meanwhile; `record-missing` when there is only one and nothing was recorded about it.
    """
    began = time.perf_counter()
    num_workers = parse_workers(workers)
    if not is_repository(a) and (b is None or not is_repository(b)):
        refuse_revision(a, revision)
    if b is None:
        return _verify_alone(_local(a, revision, progress), began, num_workers, progress)
    places = _local(a, revision, progress), _local(b, revision, progress)
    snapshots = snapshot_of(places[0]), snapshot_of(places[1])
    opened = open_checkpoint(places[0]), open_checkpoint(places[1])
    pair = _pair(*opened)
    with unchanged(*(each.reading(checkpoint.catalog) for each, checkpoint in zip(snapshots, opened, strict=True))):
        values, damaged = compare_streams(pair.plan, num_workers, progress, pair.digests)
    differences = list(pair.differences)
    differences += map(_damage, damaged)
    mistyped = {difference.tensor for difference in differences if difference.kind == "dtype"}
    differences += [
        Difference(
            tensor=name,
            kind="values",
            detail="after casting one to the other's dtype" if name in mistyped else "their bits differ",
            first_index=found.first_index,
            num_elements=found.num_elements,
            max_abs=found.max_abs,
        )
        for name, found in values.items()
    ]
    order = ["missing", "shape", "dtype", "values", "damaged"]
    differences.sort(key=lambda difference: (order.index(difference.kind), difference.tensor))
    return VerifyReport(
        a=str(a),
        b=str(b),
        equal=not differences,
        num_tensors=len({piece.tile.hf.tensor for stream in pair.plan.streams for piece in stream.pieces}),
        num_bytes=pair.plan.num_bytes,
        num_digests=len(pair.digests),
        differences=tuple(differences),
        seconds=time.perf_counter() - began,
        dequantised=count_schemes(pair.plan.quantised),
    )


def _local(source: str | Path, revision: str | None, progress: Callable[[Progress], None] | None) -> Path:
    """Where a checkpoint lies, fetched if it is on the Hub."""
    if not is_repository(source):
        return Path(source)
    from shardway.hub.source import fetched

    return fetched(str(source), revision, progress)


def _verify_alone(
    path: Path, began: float, num_workers: int, progress: Callable[[Progress], None] | None
) -> VerifyReport:
    found = check_recorded(path, num_workers, progress)
    return VerifyReport(
        a=str(path),
        b=None,
        equal=not found.problems,
        num_tensors=found.num_tensors,
        num_bytes=found.num_bytes,
        num_digests=found.num_digests,
        differences=tuple(map(_damage, found.problems)),
        seconds=time.perf_counter() - began,
    )


def _damage(problem: Problem) -> Difference:
    detail = "; ".join((problem.what, *problem.facts))
    file = None if problem.file is None else str(problem.file)
    return Difference(tensor=problem.tensor or "", kind="damaged", detail=detail, file=file)


class _Pair(NamedTuple):
    """Two checkpoints that are ready to be compared, and what is different already without reading them."""

    plan: Plan
    differences: list[Difference]
    digests: ChunkDigests


def _pair(a: Checkpoint, b: Checkpoint) -> _Pair:
    if isinstance(a, HuggingFaceCheckpoint):
        if isinstance(b, HuggingFaceCheckpoint):
            return _both_hf(a, b)
        return _across(a, b, ("the first", "the second"))
    if isinstance(b, HuggingFaceCheckpoint):
        return _across(b, a, ("the second", "the first"))
    ours, theirs = model_state(a), model_state(b)
    return _same_kind(ours.catalog, theirs.catalog, _digests(a, ours), _digests(b, theirs))


def _both_hf(a: HuggingFaceCheckpoint, b: HuggingFaceCheckpoint) -> _Pair:
    """Two Hugging Face checkpoints: what is stored, unless only one is quantised; then its values."""
    shown = _shown_values(a), _shown_values(b)
    if bool(shown[0].quantised) == bool(shown[1].quantised):
        return _same_kind(in_whole_bytes(a.catalog), in_whole_bytes(b.catalog), {}, {})
    sides = ("the first", "the second")
    values, plain = shown
    if shown[1].quantised:
        sides, values, plain = sides[::-1], plain, values
    dtypes = {name: tensor.dtype for name, tensor in plain.catalog.tensors.items()}
    values = computed_as(values, dtypes)
    tiles = [identity(name, name, tensor.shape) for name, tensor in plain.catalog.tensors.items()]
    left, right = in_whole_bytes(values.catalog), in_whole_bytes(plain.catalog)
    return _by_tiles(tiles, left, right, sides, {}, values.quantised)


def _shown_values(checkpoint: HuggingFaceCheckpoint) -> HuggingFaceCheckpoint:
    """A checkpoint with the values of quantised weights.

    Raises:
        ShardwayError: What is wrong with their scales.
    """
    found = present(checkpoint)
    if found.faults:
        raise ShardwayError(found.faults)
    return found


def _digests(checkpoint: TorchDistCheckpoint, state: ModelState) -> ChunkDigests:
    record = read_record(checkpoint.root)
    return state.digests(record.digests) if record else {}


def _across(hf: HuggingFaceCheckpoint, mcore: TorchDistCheckpoint, sides: tuple[str, str]) -> _Pair:
    """A Hugging Face and a Megatron checkpoint, by the mapping of the former's architecture."""
    hf = _shown_values(hf)
    config = HFConfig(hf.config, str(hf.catalog.root / CONFIG_FILE))
    state = model_state(mcore)
    keys = state.catalog.tensors
    mapping = map_model(config, layout_of(keys), variants=variants_in(config, hf=hf.catalog.tensors, mcore=keys))
    copies = {name: of for name, of in mapping.aliases.items() if name in hf.catalog.tensors}
    mapping = mapping.with_copies(copies)
    differences: list[Difference] = []
    fit: list[set[str]] = []
    for side, shapes, tensors in (
        (sides[0], mapping.hf, hf.catalog.tensors),
        (sides[1], {**mapping.mcore, **padded_rows(mapping, keys)}, keys),
    ):
        ok = set()
        for name, shape in shapes.items():
            if name not in tensors:
                differences.append(_missing(name, side))
            elif tensors[name].shape != shape:
                differences.append(_shape(name, f"the config gives {list(shape)}", f"{side} {_shown(tensors[name])}"))
            else:
                ok.add(name)
        differences += [
            Difference(tensor=name, kind="missing", detail=f"only in {side}: the config knows nothing of it")
            for name in tensors
            if name not in shapes and not mapping.ignored.fullmatch(name)
        ]
        fit.append(ok)
    tiles = [tile for tile in mapping.tiles if tile.hf.tensor in fit[0] and tile.mcore.tensor in fit[1]]
    if hf.quantised:
        hf = computed_as(hf, {tile.hf.tensor: keys[tile.mcore.tensor].dtype for tile in tiles})
    digests = _digests(mcore, state)
    return _compared(tiles, hf.catalog, state.catalog, differences, digests, mapping, hf.quantised)


def _same_kind(a: Catalog, b: Catalog, a_digests: ChunkDigests, b_digests: ChunkDigests) -> _Pair:
    """Two checkpoints under the same names, but for layers that one stacks and the other does not."""
    if layout_of(a.tensors) is not layout_of(b.tensors):
        if layout_of(b.tensors) is Layout.STACKED:
            return _by_tiles(_unstack(b.tensors.values()), a, b, ("the first", "the second"), b_digests)
        return _by_tiles(_unstack(a.tensors.values()), b, a, ("the second", "the first"), a_digests)
    tiles = [identity(name, name, tensor.shape) for name, tensor in b.tensors.items()]
    return _by_tiles(tiles, a, b, ("the first", "the second"), b_digests)


def _unstack(tensors: Iterable[StoredTensor]) -> list[Tile]:
    """Tiles between per-layer keys (as the Hugging Face side) and a stacked checkpoint (as the Megatron side)."""
    tiles = []
    for tensor in tensors:
        prefix = "decoder.layers."
        if not tensor.name.startswith(prefix):
            tiles.append(identity(tensor.name, tensor.name, tensor.shape))
            continue
        shape = tensor.shape[1:]
        along = tuple((axis, 1) for axis in range(len(shape)))
        stacked = tuple((axis + 1, 1) for axis in range(len(shape)))
        tiles += [
            Tile(
                shape,
                Side(f"{prefix}{layer}.{tensor.name.removeprefix(prefix)}", (0,) * len(shape), along),
                Side(tensor.name, (layer, *(0,) * len(shape)), stacked),
            )
            for layer in range(tensor.shape[0])
        ]
    return tiles


def _by_tiles(
    tiles: list[Tile],
    hf: Catalog,
    mcore: Catalog,
    sides: tuple[str, str],
    digests: ChunkDigests,
    quantised: Mapping[str, Quantised] | None = None,
) -> _Pair:
    """Compare by tiles of which each is the whole of its tensor on the side called hf."""
    differences: list[Difference] = []
    known = {tile.hf.tensor: tile for tile in tiles}
    fit = []
    for name, tile in known.items():
        tensor = hf.tensors.get(name)
        if tensor is None:
            differences.append(_missing(name, sides[0]))
        elif tensor.shape != tile.sizes:
            differences.append(_shape(name, f"{sides[1]} has {list(tile.sizes)}", f"{sides[0]} {_shown(tensor)}"))
        else:
            fit.append(tile)
    differences += [_missing(name, sides[1]) for name in hf.tensors if name not in known]
    return _compared(fit, hf, mcore, differences, digests, quantised=quantised)


def _compared(
    tiles: list[Tile],
    hf: Catalog,
    mcore: Catalog,
    differences: list[Difference],
    digests: ChunkDigests,
    mapping: ModelMapping | None = None,
    quantised: Mapping[str, Quantised] | None = None,
) -> _Pair:
    mistyped = {}
    held = mapping.dtypes if mapping else {}
    for tile in tiles:
        left, right = hf.tensors[tile.hf.tensor], mcore.tensors[tile.mcore.tensor]
        if left.dtype is not right.dtype and right.dtype.name != held.get(right.name):
            mistyped[left.name] = f"{left.dtype.name} against {right.dtype.name} in {right.name}"
    differences += [Difference(tensor=name, kind="dtype", detail=detail) for name, detail in mistyped.items()]
    wanted = {tile.mcore.tensor for tile in tiles}
    carried = {name: tensor for name, tensor in mcore.tensors.items() if name in wanted}
    streams = build_streams(tiles, hf.tensors, carried)
    shifts = mapping.shifts if mapping else {}
    compared = {tile.hf.tensor for tile in tiles}
    sources = {name: source for name, source in (quantised or {}).items() if name in compared}
    plan = Plan(direction=Direction.COMPARE, hf=hf, mcore=mcore, streams=streams, shifts=shifts, quantised=sources)
    return _Pair(plan, differences, digests)


def _missing(name: str, side: str) -> Difference:
    return Difference(tensor=name, kind="missing", detail=f"not in {side}")


def _shape(name: str, left: str, right: str) -> Difference:
    return Difference(tensor=name, kind="shape", detail=f"{left}, {right}")


def _shown(tensor: StoredTensor) -> str:
    shape: Shape = tensor.shape
    return f"has {list(shape)}"
