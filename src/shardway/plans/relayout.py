"""Changing the layout of a Megatron checkpoint: layers stacked on a leading axis, or one key each, whatever the model.

Everything that has layers moves: weights, an optimizer's states of them, and objects such as ``_extra_state``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.errors import Code, Problem, Problems, ShardwayError
from shardway.core.tiles import Side, Tile, identity
from shardway.families.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape, StoredTensor

_PREFIX = r"((?:chained_\d+\.)?(?:optimizer\.state\.[a-z0-9_]+\.)?)decoder\.layers\."
_OF_STACK = re.compile(_PREFIX + r"(?!\d+\.)(.+)")
_OF_LAYER = re.compile(_PREFIX + r"(\d+)\.(.+)")
_SHARD = re.compile(r"(.+)/shard_([\d.]+)_([\d.]+)")
_EXPERT = re.compile(r"(.+\.experts\.experts)\.(\d+)\.(.+)")


class Relaid(NamedTuple):
    """A checkpoint in another layout.

    Attributes:
        tiles: Between what is stored (as the Hugging Face side) and what is to be (as the Megatron side).
        tensors: Type and shape of every tensor to be, by key.
        objects: For each object to be, the key under which it is stored.
    """

    tiles: list[Tile]
    tensors: dict[str, tuple[DType, Shape]]
    objects: dict[str, str]


def relay(tensors: Mapping[str, StoredTensor], objects: Iterable[str], layout: Layout | None, root: str) -> Relaid:
    """Work out every key of a checkpoint in a layout.

    Args:
        tensors: Everything that is stored, by key, experts joined.
        objects: Keys of the pickled objects that are stored.
        layout: The layout to be, another than it has; None to leave everything as it is.
        root: The checkpoint to name in errors.

    Raises:
        ShardwayError: `option-invalid` for layers that are not all alike and so can't be stacked.
    """
    if layout is None:
        return Relaid(
            [identity(key, key, tensor.shape) for key, tensor in tensors.items()],
            {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()},
            {key: key for key in objects},
        )
    return _unstacked(tensors, objects) if layout is Layout.PER_LAYER else _stacked(tensors, objects, root)


def _unstacked(tensors: Mapping[str, StoredTensor], objects: Iterable[str]) -> Relaid:
    relaid = Relaid([], {}, {})
    for key, tensor in tensors.items():
        match = _OF_STACK.fullmatch(key)
        if match is None or not tensor.shape:
            relaid.tiles.append(identity(key, key, tensor.shape))
            relaid.tensors[key] = tensor.dtype, tensor.shape
            continue
        for layer in range(tensor.shape[0]):
            name = f"{match[1]}decoder.layers.{layer}.{match[2]}"
            relaid.tiles.append(_of_one_layer(name, key, layer, tensor.shape[1:]))
            relaid.tensors[name] = tensor.dtype, tensor.shape[1:]
    for key in objects:
        match, shard = _OF_STACK.fullmatch(key), _SHARD.fullmatch(key)
        name = key
        if match is not None and shard is not None:
            place, _, at = shard[2].partition(".")
            of = shard[3].partition(".")[2]
            module = match[2].rpartition("/")[0]
            name = f"{match[1]}decoder.layers.{place}.{module}/shard_{at or 0}_{of or 1}"
        relaid.objects[name] = key
    return relaid


def _stacked(tensors: Mapping[str, StoredTensor], objects: Iterable[str], root: str) -> Relaid:
    relaid = Relaid([], {}, {})
    stacks: dict[str, dict[int, StoredTensor]] = {}
    for key, tensor in tensors.items():
        match = _OF_LAYER.fullmatch(key)
        if match is None:
            relaid.tiles.append(identity(key, key, tensor.shape))
            relaid.tensors[key] = tensor.dtype, tensor.shape
        else:
            stacks.setdefault(f"{match[1]}decoder.layers.{match[3]}", {})[int(match[2])] = tensor
    num_layers = 1 + max((layer for stack in stacks.values() for layer in stack), default=-1)
    _check_alike(stacks, num_layers, root)
    for name, stack in stacks.items():
        shape, dtype = stack[0].shape, stack[0].dtype
        relaid.tensors[name] = dtype, (num_layers, *shape)
        for layer, tensor in sorted(stack.items()):
            tile = _of_one_layer(tensor.name, name, layer, shape)
            relaid.tiles.append(tile._replace(hf=tile.mcore, mcore=tile.hf))
    num_experts = 1 + max((int(match[2]) for match in map(_EXPERT.match, objects) if match is not None), default=-1)
    for key in objects:
        relaid.objects[_stacked_object(key, num_layers, num_experts)] = key
    return relaid


def _stacked_object(key: str, num_layers: int, num_experts: int) -> str:
    match, shard = _OF_LAYER.fullmatch(key), _SHARD.fullmatch(key)
    if match is None or shard is None:
        return key
    module, at, of = match[3].rpartition("/")[0], shard[2], shard[3]
    alone = _EXPERT.fullmatch(module)
    if alone is not None:
        module, at, of = f"{alone[1]}.{alone[3]}", alone[2], str(num_experts)
    if ".experts.experts." in module:
        at, of = f"{match[2]}.{at}", f"{num_layers}.{of}"
    else:
        at, of = match[2], str(num_layers)
    return f"{match[1]}decoder.layers.{module}/shard_{at}_{of}"


def _of_one_layer(alone: str, stacked: str, layer: int, shape: Shape) -> Tile:
    """The tile from a stack (as the Hugging Face side) to one layer of it."""
    along = tuple((axis, 1) for axis in range(len(shape)))
    within = tuple((axis + 1, 1) for axis in range(len(shape)))
    origin = (0,) * len(shape)
    return Tile(shape, Side(stacked, (layer, *origin), within), Side(alone, origin, along))


def _check_alike(stacks: Mapping[str, Mapping[int, StoredTensor]], num_layers: int, root: str) -> None:
    problems = Problems()
    for name, stack in stacks.items():
        missing = sorted(set(range(num_layers)) - stack.keys())
        kinds = {(tensor.dtype.name, tensor.shape) for tensor in stack.values()}
        facts = []
        if missing:
            facts.append(f"layers {', '.join(map(str, missing[:8]))} of {num_layers} lack it")
        if len(kinds) > 1:
            facts.append(" and ".join(f"{dtype} {list(shape)}" for dtype, shape in sorted(kinds)[:4]))
        if facts:
            problems.extend([_not_stackable(name, facts, root)])
    problems.raise_if_any()
    if not stacks:
        raise ShardwayError(_not_stackable("decoder.layers", ["there are no layers"], root))


def _not_stackable(name: str, facts: list[str], root: str) -> Problem:
    return Problem(
        code=Code.OPTION_INVALID,
        what=f"{name} can't be stacked: its layers are not all alike",
        tensor=name,
        file=root,
        facts=tuple(facts),
        cure="leave out --layout stacked",
    )
