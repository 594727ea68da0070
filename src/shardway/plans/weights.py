"""A model's weights among everything that a training checkpoint holds, under the names that a mapping knows them by.

What is renamed or joined here is only described otherwise: chunks stay where they are in the files.

Source: megatron/training/checkpointing.py `generate_state_dict`, megatron/core/optimizer/distrib_optimizer.py
`sharded_state_dict`, megatron/core/transformer/mlp.py `apply_swiglu_sharded_factory` and
megatron/core/transformer/moe/experts.py (0.16.1, 0.20); NeMo prefixes every key with ``module.``.
"""

from __future__ import annotations

import enum
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.core.tensors import Catalog, StoredTensor
from shardway.plans.masters import about_masters, master_of, with_masters
from shardway.plans.matching import is_training_state

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardway.core.tensors import Chunk, Shape
    from shardway.formats.record import ChunkDigests
    from shardway.formats.torch_dist import TorchDistCheckpoint

_WRAPPED = re.compile(r"(?:(?:model\d*|module)\.)+(?=(?:embedding|decoder|output_layer|mtp)\.)")
_EXPERT = re.compile(r"(.+\.experts\.experts)\.(\d+)\.(linear_fc[12]\..+)")
_HALF = re.compile(r"(.+\.linear_fc1\.(?:weight|bias))_([wv])")
_EXTRA_STATE = re.compile(r"\._extra_state(?:/|$)")
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.(?:state\.[a-z0-9_]+|distributed\.dp_group_idx_\d+)")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_SHARD = re.compile(r"/shard_.*")
_MOST_EXPERTS = 100_000

# Keys of the common state that say what a checkpoint is rather than how the run stood.
_ABOUT = frozenset({"checkpoint_version", "iteration", "content_metadata", "args"})


class Weights(enum.StrEnum):
    """Which copy of the weights is meant, where a checkpoint holds two."""

    MODEL = "model"
    FP32 = "fp32"

    def wants(self, key: str) -> bool:
        """Whether a tensor of a checkpoint has to be looked at, by its key."""
        return not is_training_state(key) or (self is Weights.FP32 and master_of(key) is not None)


class ModelState(NamedTuple):
    """The weights of a checkpoint.

    Attributes:
        catalog: The tensors, under the names of a mapping.
        left_out: Everything else in the checkpoint: keys of tensors and objects, and of the common state.
        notes: What a user should know about it, one sentence each.
        passed_over: The model's own weights in whose place wider copies were taken, by name.
        moved: The name and start of chunks that have others here, by those that they have in the checkpoint.
    """

    catalog: Catalog
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    passed_over: Mapping[str, StoredTensor] = {}
    moved: Mapping[tuple[str, Shape], tuple[str, Shape]] = {}

    def digests(self, recorded: ChunkDigests) -> ChunkDigests:
        """Recorded digests by the names and starts that chunks have here."""
        if not self.moved:
            return recorded
        return {self.moved.get(place, place): digest for place, digest in recorded.items()}


def model_state(checkpoint: TorchDistCheckpoint, weights: Weights = Weights.MODEL) -> ModelState:
    """Find the weights of a checkpoint.

    Prefixes of wrappers and of pipeline chunks (``model.``, ``model1.``, ``module.``) are taken off; halves of a gated
    MLP and experts that were saved under keys of their own (``weight_w``, ``weight_v``, ``experts.3.``) become the
    tensors that they are parts of. No object is read.

    Args:
        checkpoint: The checkpoint; its catalog holds at least what `weights` wants.
        weights: ``FP32`` takes the copies that an optimizer has trained in place of the model's own.

    Raises:
        ShardwayError: `masters-missing` where the optimizer's copies are asked for and are not stored by the model's
            names; `shape-mismatch` or `dtype-mixed` where parts of one tensor do not belong together.
    """
    own: dict[str, StoredTensor] = {}
    masters: dict[str, StoredTensor] = {}
    for key, tensor in checkpoint.catalog.tensors.items():
        weight = master_of(key)
        if weight is not None:
            masters[weight] = tensor
        elif not _EXTRA_STATE.search(key) and not is_training_state(key):
            own[key] = tensor
    moved: dict[tuple[str, Shape], tuple[str, Shape]] = {}
    copies: list[str] = []
    tensors = joined(own, checkpoint, moved, copies)
    notes: list[str] = []
    used: set[str] = set()
    passed_over: dict[str, StoredTensor] = {}
    if weights is Weights.FP32:
        trained = joined(masters, checkpoint, {}, [])
        found = tensors
        tensors, untrained = with_masters(found, trained, checkpoint)
        passed_over = {name: tensor for name, tensor in found.items() if tensors[name].dtype is not tensor.dtype}
        used = {tensor.name for tensor in masters.values()}
        notes += about_masters(trained, untrained)
    state = (*checkpoint.described, *checkpoint.places)
    left_out = [key for key in state if (is_training_state(key) or _EXTRA_STATE.search(key)) and key not in used]
    left_out += copies
    left_out += [f"common state: {key}" for key in checkpoint.common if key not in _ABOUT]
    left_out.sort()
    summary = _summary(left_out)
    return ModelState(
        catalog=Catalog(root=checkpoint.catalog.root, tensors=tensors),
        left_out=tuple(left_out),
        notes=(*notes, *summary),
        passed_over=passed_over,
        moved=moved,
    )


class _Place(NamedTuple):
    """Where a stored tensor belongs.

    Attributes:
        name: The tensor that it is, or is a part of.
        expert: Its place on the leading axis of experts, where it is one expert's.
        half: ``w`` for the upper half of the rows, ``v`` for the lower one, where it is one of two.
    """

    name: str
    expert: int | None
    half: str | None


def _place_of(key: str) -> _Place:
    name = _WRAPPED.sub("", key, count=1) if _WRAPPED.match(key) else key
    expert, half = None, None
    match = _HALF.fullmatch(name)
    if match is not None:
        name, half = match[1], match[2]
    match = _EXPERT.fullmatch(name)
    if match is not None and int(match[2]) < _MOST_EXPERTS:
        name, expert = f"{match[1]}.{match[3]}", int(match[2])
    return _Place(name, expert, half)


def joined(
    stored: Mapping[str, StoredTensor],
    checkpoint: TorchDistCheckpoint,
    moved: dict[tuple[str, Shape], tuple[str, Shape]],
    copies: list[str],
) -> dict[str, StoredTensor]:
    """The tensors that stored ones are, or are parts of.

    Args:
        stored: By key, without what it is a master of.
        checkpoint: Where they are.
        moved: Receives where chunks are now, by tensor and start.
        copies: Receives keys of tensors of which there is another whole one.

    Raises:
        ShardwayError: `shape-mismatch` or `dtype-mixed` where parts of one tensor do not belong together.
    """
    parts: dict[str, list[tuple[_Place, StoredTensor]]] = {}
    for key, tensor in stored.items():
        place = _place_of(key)
        parts.setdefault(place.name, []).append((place, tensor))
    found = {}
    for name, members in parts.items():
        if len(members) == 1 and members[0][0].expert is None and members[0][0].half is None:
            tensor = members[0][1]
            found[name] = tensor
            if tensor.name != name:
                found[name] = tensor._replace(name=name)
                moved.update({(tensor.name, chunk.start): (name, chunk.start) for chunk in tensor.chunks})
            continue
        found[name] = _join(name, _without_copies(members, copies), checkpoint, moved)
    return found


def _without_copies(
    members: Sequence[tuple[_Place, StoredTensor]], copies: list[str]
) -> list[tuple[_Place, StoredTensor]]:
    """Of several chunks of a pipeline, the first and the last may hold the embedding, each the whole of it."""
    kept: list[tuple[_Place, StoredTensor]] = []
    whole: set[tuple[int | None, str | None]] = set()
    for place, tensor in members:
        part = place.expert, place.half
        if part in whole:
            copies.append(tensor.name)
            continue
        kept.append((place, tensor))
        if sum(math.prod(chunk.size) for chunk in tensor.chunks) == tensor.num_elements:
            whole.add(part)
    return kept


def _join(
    name: str,
    members: Sequence[tuple[_Place, StoredTensor]],
    checkpoint: TorchDistCheckpoint,
    moved: dict[tuple[str, Shape], tuple[str, Shape]],
) -> StoredTensor:
    first = members[0][1]
    kinds = {(place.expert is None, place.half is None) for place, _ in members}
    for _, tensor in members:
        if tensor.dtype is not first.dtype:
            raise _unlike(Code.DTYPE_MIXED, name, first, tensor, checkpoint)
        if tensor.shape != first.shape or len(kinds) > 1:
            raise _unlike(Code.SHAPE_MISMATCH, name, first, tensor, checkpoint)
    rows = first.shape[0] if first.shape else 0
    experts = [place.expert for place, _ in members if place.expert is not None]
    shape = first.shape if members[0][0].half is None else (2 * rows, *first.shape[1:])
    if experts:
        shape = (max(experts) + 1, *shape)
    chunks: list[Chunk] = []
    for place, tensor in members:
        for chunk in tensor.chunks:
            start, size = chunk.start, chunk.size
            if place.half == "v":
                start = (start[0] + rows, *start[1:])
            if place.expert is not None:
                start, size = (place.expert, *start), (1, *size)
            moved[tensor.name, chunk.start] = name, start
            chunks.append(chunk._replace(start=start, size=size))
    return StoredTensor(name, first.dtype, shape, tuple(chunks))


def _unlike(
    code: Code, name: str, one: StoredTensor, other: StoredTensor, checkpoint: TorchDistCheckpoint
) -> ShardwayError:
    return ShardwayError(
        Problem(
            code=code,
            what=f"{one.name} and {other.name} are parts of {name} and do not fit together",
            tensor=name,
            file=checkpoint.root,
            facts=tuple(f"{each.name}: {each.dtype.name} {list(each.shape)}" for each in (one, other)),
            cure="the checkpoint is damaged, or its keys were changed: save it again",
        )
    )


def _summary(left_out: Sequence[str]) -> list[str]:
    """One note on what was left out, by kind; every checkpoint has ``_extra_state``, which is no news."""
    kinds = Counter(_kind(key) for key in left_out if not _EXTRA_STATE.search(key))
    if not kinds:
        return []
    listed = ", ".join(f"{kind} ({count:,})" if count > 1 else kind for kind, count in sorted(kinds.items()))
    return [f"{sum(kinds.values())} entries of training state were left out: {listed}"]


def _kind(key: str) -> str:
    """What several entries that are left out have in common."""
    match = _OPTIMIZER.match(key)
    return match[0] if match is not None else _LAYER.sub(".layers.*.", _SHARD.sub("", key))
