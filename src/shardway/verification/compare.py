"""Comparing the two sides of a plan, element by element, in bounded memory."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.core.tensors import Catalog
from shardway.core.tiles import identity
from shardway.formats.huggingface import open_huggingface
from shardway.formats.torch_dist import open_torch_dist
from shardway.plans.model import Direction, Plan
from shardway.run.engine import Engine, Worker, batches
from shardway.run.files import Files
from shardway.run.progress import Meter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy.typing as npt

    from shardway.core.dtypes import DType
    from shardway.core.tiles import Tile
    from shardway.formats.record import ChunkDigests
    from shardway.plans.model import Stream
    from shardway.run.progress import Progress

    Array = npt.NDArray[Any]


class ValueDifference(NamedTuple):
    """Where two tensors of one shape differ.

    Attributes:
        num_elements: How many elements differ in their bits.
        first_index: Index, on the Hugging Face side, of the first of them in row-major order.
        max_abs: Largest absolute difference of their values; NaN where one of two differing values is NaN.
    """

    num_elements: int
    first_index: tuple[int, ...]
    max_abs: float


def compare_streams(
    plan: Plan,
    num_workers: int,
    progress: Callable[[Progress], None] | None = None,
    expected: ChunkDigests | None = None,
) -> tuple[dict[str, ValueDifference], list[Problem]]:
    """Read both sides of a plan and compare every element.

    Args:
        plan: Any plan; it is only read. Where dtypes differ, the side that an export reads is cast to the dtype of the
            side that it writes; otherwise the Hugging Face side to the dtype of the Megatron side.
        num_workers: Threads.
        progress: Called as the comparison proceeds.
        expected: Digests that the chunks of the Megatron side must have.

    Returns:
        Differences by Hugging Face tensor, and the digests that did not match as problems.

    Raises:
        ShardwayError: `io-failed`, `source-changed`.
    """
    meter = Meter("verify", plan.num_bytes, progress)
    with Files(plan.hf.root) as hf, Files(plan.mcore.root) as mcore:
        shared = _Findings()
        engine = Engine(
            batches(plan.streams),
            lambda: _Comparer(plan, hf, mcore, meter.advance, expected or {}, shared),
            num_workers,
        )
        engine.run()
    return shared.differences, shared.damaged


def compare_plan(
    plan: Plan,
    written: Path,
    num_workers: int,
    progress: Callable[[Progress], None] | None,
    digests: ChunkDigests,
) -> None:
    """Compare what a plan wrote into a directory with what it read.

    Args:
        plan: The import or export that was executed.
        written: Where its files are now.
        num_workers: Threads.
        progress: Called as the comparison proceeds.
        digests: Digests that the chunks of the Megatron side must have.

    Raises:
        ShardwayError: `verify-failed` for every tensor that differs, `digest-mismatch`.
    """
    if plan.direction is Direction.IMPORT:
        plan = plan._replace(mcore=Catalog(root=written, tensors=plan.mcore.tensors))
    else:
        plan = plan._replace(hf=Catalog(root=written, tensors=plan.hf.tensors))
    differences, damaged = compare_streams(plan, num_workers, progress, digests)
    problems = damaged + [
        Problem(
            code=Code.VERIFY_FAILED,
            what=f"{name} was not written as it was read",
            tensor=name,
            facts=(f"{found.num_elements} elements differ, the first at {list(found.first_index)}",),
            cure="the disk or memory may be faulty; nothing was published",
        )
        for name, found in sorted(differences.items())
    ]
    if plan.requantised is not None:
        from shardway.run.requantise import check_requantised

        problems += [
            Problem(
                code=Code.VERIFY_FAILED,
                what=f"{name} was not written as it was quantised",
                tensor=name,
                cure="the disk or memory may be faulty; nothing was published",
            )
            for name in sorted(check_requantised(plan, plan.hf, num_workers))
        ]
    if problems:
        raise ShardwayError(problems)


def check_readable(plan: Plan, written: Path) -> None:
    """Open what a plan wrote into a directory as any reader would, and find every tensor where it was planned.

    Args:
        plan: The import or export that was executed.
        written: Where its files are now.

    Raises:
        ShardwayError: `verify-failed`, or what opening the checkpoint raises.
    """
    if plan.direction is Direction.IMPORT:
        found, planned = open_torch_dist(written).catalog.tensors, plan.mcore.tensors
    else:
        found, planned = open_huggingface(written).catalog.tensors, plan.hf.tensors
    differing = sorted(name for name in found.keys() | planned.keys() if found.get(name) != planned.get(name))
    if differing:
        raise ShardwayError(
            Problem(
                code=Code.VERIFY_FAILED,
                what=f"{name} is not described as it was written",
                tensor=name,
                cure="the disk or memory may be faulty; nothing was published",
            )
            for name in differing
        )


class _Findings:
    """What all threads of a comparison have found."""

    def __init__(self) -> None:
        self.differences: dict[str, ValueDifference] = {}
        self.damaged: list[Problem] = []
        self._lock = threading.Lock()

    def differ(self, tensor: str, found: ValueDifference) -> None:
        with self._lock:
            known = self.differences.get(tensor)
            if known is not None:
                found = ValueDifference(
                    num_elements=known.num_elements + found.num_elements,
                    first_index=min(known.first_index, found.first_index),
                    max_abs=_larger(known.max_abs, found.max_abs),
                )
            self.differences[tensor] = found

    def damage(self, problems: tuple[Problem, ...]) -> None:
        with self._lock:
            self.damaged += problems


class _Comparer(Worker):
    """Compares streams on one thread."""

    def __init__(
        self,
        plan: Plan,
        hf: Files,
        mcore: Files,
        advance: Callable[[int], None],
        expected: Mapping[tuple[str, tuple[int, ...]], str],
        findings: _Findings,
    ) -> None:
        self._plan = plan
        self._hf = hf
        self._mcore = mcore
        self._advance = advance
        self._expected = expected
        self._findings = findings

    def move(self, stream: Stream) -> None:
        import xxhash

        from shardway.run.blocks import as_exported, blocks_of, part_of, parts_of, pieces_in, read_chunks, read_part
        from shardway.run.losses import Losses
        from shardway.run.mover import digest_mismatch

        plan, losses = self._plan, Losses()
        hashers = [xxhash.xxh3_128() for _ in stream.chunks]
        done = [0] * len(stream.chunks)
        for block in blocks_of(stream, plan):
            stored = read_chunks(stream, block, self._mcore, hashers, done)
            if plan.direction is Direction.EXPORT:  # as Hugging Face has the values: a cast may have rounded them
                for piece, part in pieces_in(stream, block):
                    ours = as_exported(plan, stream, part, part_of(stored, part, block), losses)
                    theirs = read_part(plan, piece, part, self._hf, losses)
                    self._hold(part, ours, theirs, plan.hf.tensors[part.hf.tensor].dtype)
            else:
                for part, theirs in parts_of(plan, stream, block, self._hf, losses):
                    self._hold(part, part_of(stored, part, block), theirs, stream.dtype)
            self._advance(stored.nbytes)
        for chunk, hasher, num_bytes in zip(stream.chunks, hashers, done, strict=True):
            expected = self._expected.get((stream.tensor, chunk.start))
            digest = hasher.hexdigest()
            if expected is not None and digest != expected:
                error = digest_mismatch(stream.tensor, chunk, expected, digest, num_bytes)
                self._findings.damage(error.problems)

    def _hold(self, part: Tile, ours: Array, theirs: Array, dtype: DType) -> None:
        """Hold the two sides of a part against each other, both in the shape of its grid."""
        import numpy as np

        if np.array_equal(ours, theirs):
            return
        differing = np.argwhere(ours != theirs)
        places = differing @ _index_matrix(part) + np.array(part.hf.base, dtype=np.int64)
        found = ValueDifference(
            num_elements=len(differing),
            first_index=min(map(tuple, places.tolist())),
            max_abs=_max_abs(ours[ours != theirs], theirs[ours != theirs], dtype),
        )
        self._findings.differ(part.hf.tensor, found)


def _index_matrix(tile: Tile) -> Array:
    """For each axis of the grid, how a step along it changes the index in the Hugging Face tensor."""
    import numpy as np

    matrix = np.zeros((len(tile.sizes), len(tile.hf.base)), np.int64)
    for k, (axis, step) in enumerate(tile.hf.steps):
        matrix[k, axis] = step
    return matrix


def _max_abs(left: Array, right: Array, dtype: DType) -> float:
    import numpy as np

    kind = dtype.numpy()
    wide = np.complex128 if kind.kind == "c" else np.float64
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.max(np.abs(left.view(kind).astype(wide) - right.view(kind).astype(wide))))


def _larger(left: float, right: float) -> float:
    return left if left != left or left > right else right


def check_copies(plan: Plan, num_workers: int) -> None:
    """Prove that tensors which a config ties to another one are bit-equal copies of it.

    Raises:
        ShardwayError: `tied-weights-differ` for every one that is not.
    """
    if not plan.copies:
        return
    from shardway.plans.matching import tied_problem
    from shardway.plans.streams import build_streams

    tensors = plan.hf.tensors
    tiles = [identity(name, of, tensors[name].shape) for name, of in plan.copies.items()]
    streams = build_streams(tiles, tensors, {of: tensors[of] for of in plan.copies.values()})
    compared = Plan(direction=Direction.COMPARE, hf=plan.hf, mcore=plan.hf, streams=streams, quantised=plan.quantised)
    differences, _ = compare_streams(compared, num_workers)
    if differences:
        raise ShardwayError(
            tied_problem(
                name,
                plan.copies[name],
                tensors[name].chunks[0].file,
                f"{found.num_elements} elements differ, the first at {list(found.first_index)}",
            )
            for name, found in differences.items()
        )
