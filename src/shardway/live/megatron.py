"""A live Megatron-Core model as shard records. The only module beside building.py that imports megatron-core.

megatron-core describes a model's tensors itself (`sharded_state_dict`); nothing is derived here from names or configs.
Building that description needs no communication in megatron-core 0.16.1, with one exception that is refused: a DTensor
parameter with fewer rows than its mesh has ranks, which megatron-core would gather (`get_full_tensor_if_necessary`).
DTensors that split unevenly are refused as well: it takes every rank's part for as large as its own.

Source: megatron/core/dist_checkpointing/mapping.py, strategies/torch.py `mcore_to_pyt_state_dict`,
state_dict_utils.py `save_preprocess`, transformer/transformer_block.py (0.16.1).
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor

from shardway.core.dtypes import dtype_of_torch
from shardway.core.errors import Code, Problem, Problems, ShardwayError
from shardway.formats.torch_dist import extra_state
from shardway.live.memory import Deferred, ModelMemory, Target
from shardway.live.records import ObjectShard, Shard
from shardway.live.state import LiveState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    from shardway.live.state import Source

_REPLICA_RADIX = 2**20
# What Megatron Bridge stores with every checkpoint; without the first, newer releases write another layout.
_CONTENT_METADATA: dict[str, object] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
_NOT_STORED = "dp_cp_group"  # a process group that megatron-core adds for its own use
_EXTRA_STATE = "._extra_state"
_TRANSFORMER_ENGINE = "megatron.core.extensions.transformer_engine"


def megatron_state(
    model: nn.Module | Sequence[nn.Module], *, metadata: Mapping[str, object] | None = None
) -> LiveState:
    """Everything that this rank holds of a model, as megatron-core's own save would store it.

    Keys carry no prefix for the model or the pipeline chunk. Parameters must be up to date on this rank: a trainer
    that overlaps its parameter all-gather with the forward pass has to finish that first, as for Megatron's own save
    (`disable_forward_pre_hook`). No element is read or copied, except what a ShardedTensorFactory itself copies.

    Replica numbers: 0 where all of megatron-core's replica id is 0; otherwise the id (pipeline, tensor, data) read
    as the digits of one number in base 2**20, so that ids keep their order.

    Args:
        model: The model, or the list of its pipeline chunks on this rank, wrapped in DDP or Float16Module or not.
        metadata: Passed to `sharded_state_dict` and stored as the checkpoint's content metadata, over the defaults
            `singleton_local_shards` False and `chained_optim_avoid_prefix` True.

    Returns:
        Records, the tensors behind them, and the content metadata, with `non_homogeneous_layers` where the model's
        config makes megatron-core use keys per layer.

    Raises:
        ShardwayError: All problems of all tensors together: `tensor-unexpected` for a tensor that megatron-core did
            not describe, `dtype-unknown`, `option-invalid` for metadata that can't be stored or what can't be saved.

    *Ranks*: local; no collective is called.
    """
    problems = Problems()
    wanted = _content(model, metadata, problems)
    tensors: list[tuple[Shard, Source]] = []
    objects: list[tuple[ObjectShard, bytes]] = []
    resizable: set[str] = set()
    left_out: list[str] = []
    for path, leaf, _ in _described(model, wanted, problems):
        if isinstance(leaf, ShardedTensor):
            shard = _shard(leaf, problems)
            if shard is not None:
                tensors.append((shard, _source(leaf, shard)))
                if leaf.allow_shape_mismatch:
                    resizable.add(leaf.key)
        elif isinstance(leaf, ShardedObject):
            data = _serialise(leaf.data)
            objects.append((ObjectShard(leaf.unique_key, _replica(leaf.replica_id), len(data)), data))
        else:
            left_out.append(path)
    problems.raise_if_any()
    stored = {key: value for key, value in wanted.items() if key != _NOT_STORED}
    return LiveState.of(
        tensors,
        objects,
        content_metadata=stored,
        resizable=resizable,
        variants=_variants(_chunks(model)),
        left_out=left_out,
    )


def megatron_memory(model: nn.Module | Sequence[nn.Module]) -> ModelMemory:
    """Where the elements of a model's tensors belong in this rank's memory: what a load writes into.

    Every tensor is there, also those that are the same box of the same global tensor (an embedding and the output
    layer that is tied to it). Quantised parameters, and parts that megatron-core describes in another form than they
    have in memory, are marked as deferred. No element is read or changed.

    Args:
        model: As for `megatron_state`.

    Raises:
        ShardwayError: As `megatron_state`.

    *Ranks*: local; no collective is called.
    """
    problems = Problems()
    wanted = _content(model, None, problems)
    targets: list[Target] = []
    resizable: set[str] = set()
    deferred: dict[int, Deferred] = {}
    for _, leaf, factory in _described(model, wanted, problems):
        if not isinstance(leaf, ShardedTensor):
            continue
        shard = _shard(leaf, problems)
        if shard is None:
            continue
        if leaf.allow_shape_mismatch:
            resizable.add(leaf.key)
        data: torch.Tensor = leaf.data
        if factory is not None and factory.is_apart(data):
            later = deferred.setdefault(id(factory), Deferred(factory.size, data.device, factory.write_back))
            targets.append(Target(shard, None, later, factory.place_of(leaf)))
        elif is_float8tensor(data):
            targets.append(Target(shard, None, Deferred(1, data.device, _quantiser(data)), 0))
        else:
            targets.append(Target(shard, data.detach()[(None,) * leaf.prepend_axis_num], None, 0))
    problems.raise_if_any()
    chunks = _chunks(model)
    configs = [chunk.config for chunk in chunks if getattr(chunk, "config", None) is not None]
    return ModelMemory(
        targets=tuple(targets),
        resizable=frozenset(resizable),
        variants=_variants(chunks),
        num_layers=getattr(configs[0], "num_layers", None) if configs else None,
        is_whole=not parallel_state.is_initialized() or parallel_state.get_pipeline_model_parallel_world_size() == 1,
    )


@dataclass(slots=True, eq=False)
class _Built:
    """A factory of sharded tensors, and what it has built."""

    factory: Any
    value: object

    @property
    def size(self) -> int:
        return len(self._parts())

    def is_apart(self, part: torch.Tensor) -> bool:
        """Whether a built tensor is a copy, not a view of the factory's own tensor."""
        whole: torch.Tensor = self.factory.data
        if is_float8tensor(whole):
            return True
        return bool(part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr())

    def place_of(self, part: object) -> int:
        return next(place for place, each in enumerate(self._parts()) if each is part)

    def write_back(self, parts: Sequence[torch.Tensor]) -> None:
        """Put what was loaded for the built tensors back into the form of the factory's own tensor."""

        def replaced(value: object) -> object:
            if isinstance(value, LocalNonpersistentObject):
                return value.unwrap()
            if isinstance(value, dict):
                return {key: replaced(item) for key, item in value.items()}
            if isinstance(value, list):
                return [replaced(item) for item in value]
            return next(given) if isinstance(value, ShardedTensor) else value

        shapes = (each.local_shape for each in self._parts())
        given = iter([part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])
        with torch.no_grad():
            self.factory.data.copy_(self.factory.merge_fn(replaced(self.value)))

    def _parts(self) -> list[Any]:
        return [leaf for _, leaf, _ in _leaves(self.value, "") if isinstance(leaf, ShardedTensor)]


class _Leaf(NamedTuple):
    path: str
    value: object
    built: _Built | None


def _chunks(model: nn.Module | Sequence[nn.Module]) -> list[Any]:
    return [unwrapped(chunk) for chunk in ([model] if isinstance(model, torch.nn.Module) else model)]


def _content(
    model: nn.Module | Sequence[nn.Module], metadata: Mapping[str, object] | None, problems: Problems
) -> dict[str, object]:
    """What `sharded_state_dict` is asked for."""
    wanted = {**_CONTENT_METADATA, **(metadata or {})}
    chunks = _chunks(model)
    if any(_has_keys_per_layer(chunk) for chunk in chunks):
        wanted["non_homogeneous_layers"] = True
    _check_content(wanted, problems)
    for chunk in chunks:
        _check_dtensors(chunk, problems)
    problems.raise_if_any()
    return wanted


def _described(
    model: nn.Module | Sequence[nn.Module], wanted: Mapping[str, object], problems: Problems
) -> Iterator[_Leaf]:
    """The leaves of the state dicts of all chunks; a tensor that isn't described becomes a problem."""
    chunks = _chunks(model)
    for number, chunk in enumerate(chunks):
        prefix = "model" if len(chunks) == 1 else f"model{number}"
        with _virtual_stage(number, len(chunks)):
            described = chunk.sharded_state_dict(metadata=dict(wanted))
        for leaf in _leaves(described, prefix):
            if isinstance(leaf.value, torch.Tensor):
                what = f"{leaf.path} is a tensor that the model's sharded_state_dict does not describe"
                cure = "wrap it in a ShardedTensor there"
                problems.add(Code.TENSOR_UNEXPECTED, what, tensor=leaf.path, cure=cure)
            else:
                yield leaf


def _quantiser(parameter: torch.Tensor) -> Callable[[Sequence[torch.Tensor]], None]:
    def store(parts: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            parameter.copy_(parts[0].reshape(parameter.shape))

    return store


def extra_states(model: nn.Module | Sequence[nn.Module]) -> dict[str, Callable[[object], None]]:
    """What takes the ``_extra_state`` of each module that has one, by its key on disk.

    *Ranks*: local.
    """
    problems = Problems()
    chunks = _chunks(model)
    found: dict[str, Callable[[object], None]] = {}
    for path, leaf, _ in _described(model, _content(model, None, problems), problems):
        if isinstance(leaf, ShardedObject) and path.endswith(_EXTRA_STATE):
            prefix, _, name = path.removesuffix(_EXTRA_STATE).partition(".")
            chunk = chunks[int(prefix.removeprefix("model") or 0)]
            with contextlib.suppress(AttributeError):  # a module that a state dict names otherwise
                found[leaf.unique_key] = chunk.get_submodule(name).set_extra_state
    return found


def model_parallel_groups() -> list[dist.ProcessGroup]:
    """The groups of this rank that parts of one tensor may be spread over, the smaller ones first.

    Tensor parallelism, that of the experts, and the experts' tensor and expert parallelism together.

    *Ranks*: local.
    """
    if not parallel_state.model_parallel_is_initialized():
        return []
    groups = (
        parallel_state.get_expert_tensor_parallel_group(),
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_expert_tensor_and_model_parallel_group(),
    )
    by_ranks = {tuple(dist.get_process_group_ranks(group)): group for group in reversed(groups)}
    return [group for ranks, group in sorted(by_ranks.items(), key=_size) if len(ranks) > 1]


def _size(item: tuple[tuple[int, ...], object]) -> tuple[int, tuple[int, ...]]:
    return len(item[0]), item[0]


def unwrapped(module: nn.Module) -> Any:
    """The model inside of DistributedDataParallel, Float16Module and their like.

    Raises:
        ShardwayError: `option-invalid` for a module without `sharded_state_dict`.
    """
    inner: Any = module
    while isinstance(getattr(inner, "module", None), torch.nn.Module):
        inner = inner.module
    if not callable(getattr(inner, "sharded_state_dict", None)):
        what = f"{type(inner).__name__} has no sharded_state_dict: it is no Megatron-Core model"
        raise ShardwayError(Problem(code=Code.OPTION_INVALID, what=what))
    return inner


def _variants(chunks: Sequence[Any]) -> dict[str, bool]:
    """The forms in which a family's tensors may be that this model says of itself, not of the layers on this rank."""
    engine = any(
        type(module).__module__.startswith(_TRANSFORMER_ENGINE) for chunk in chunks for module in chunk.modules()
    )
    predicts = any(getattr(getattr(chunk, "config", None), "mtp_num_layers", None) for chunk in chunks)
    return {"te": engine, "mtp": predicts}


def _has_keys_per_layer(model: Any) -> bool:
    """Whether the config makes `TransformerBlock.sharded_state_dict` use a key for each layer."""
    config = getattr(model, "config", None)

    def irregular(frequency: object) -> bool:
        return isinstance(frequency, list) or (isinstance(frequency, int) and frequency > 1)

    return bool(
        getattr(config, "hetereogenous_dist_checkpoint", False)  # sic
        or getattr(config, "heterogeneous_block_specs", False)
        or irregular(getattr(config, "moe_layer_freq", 1))
        or irregular(getattr(config, "linear_attention_freq", None))
    )


@contextlib.contextmanager
def _virtual_stage(number: int, num_chunks: int) -> Iterator[None]:
    """Let releases that ask the global state for a chunk's number find it there, as Megatron-LM's own save does."""
    if num_chunks == 1 or parallel_state.get_virtual_pipeline_model_parallel_world_size() is None:
        yield
        return
    before = parallel_state.get_virtual_pipeline_model_parallel_rank()
    parallel_state.set_virtual_pipeline_model_parallel_rank(number)
    try:
        yield
    finally:
        parallel_state.set_virtual_pipeline_model_parallel_rank(before)


def _leaves(value: object, path: str, built: _Built | None = None) -> Iterator[_Leaf]:
    """The leaves of a sharded state dict with their places; factories are replaced by what they build."""
    if isinstance(value, ShardedTensorFactory):
        if value.flattened_range is not None:
            yield _Leaf(path, value, None)
            return
        built = _Built(value, value.build())
        value = built.value
    if isinstance(value, LocalNonpersistentObject):
        return
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}", built)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _leaves(item, f"{path}.{place}", built)
    else:
        yield _Leaf(path, value, built)


def _shard(described: Any, problems: Problems) -> Shard | None:
    key: str = described.key
    if described.flattened_range is not None or described.data is None:
        flat = described.flattened_range is not None
        what = f"{key} is a flattened slice of a tensor" if flat else f"{key} has no data"
        cure = "save model weights, whose shards are boxes; optimizer state is not supported" if flat else None
        problems.add(Code.OPTION_INVALID, what, tensor=key, cure=cure)
        return None
    try:
        dtype = dtype_of_torch(str(described.dtype))
    except ShardwayError as error:
        problems.add(Code.DTYPE_UNKNOWN, f"{key} has a dtype that can't be stored", tensor=key, facts=[str(error)])
        return None
    size = (1,) * described.prepend_axis_num + tuple(map(int, described.local_shape))
    return Shard(
        key,
        dtype,
        tuple(map(int, described.global_shape)),
        tuple(map(int, described.global_offset)),
        size,
        _replica(described.replica_id),
    )


def _source(described: Any, shard: Shard) -> Source:
    data: torch.Tensor = described.data
    if is_float8tensor(data):
        return lambda: torch.Tensor(dequantize_fp8_tensor(data)).reshape(shard.size)
    # Axes of extent 1 in front: always a view, whatever the strides.
    return data.detach()[(None,) * described.prepend_axis_num]


def _replica(replica_id: int | tuple[int, ...]) -> int:
    number = 0
    for digit in (replica_id,) if isinstance(replica_id, int) else replica_id:
        number = number * _REPLICA_RADIX + int(digit)
    return number


def _serialise(value: object) -> bytes:
    """What megatron-core stores of an object: `torch.save` of a list that holds it."""
    if value is None:
        return extra_state()
    file = io.BytesIO()
    torch.save([value], file)
    return file.getvalue()


def _check_content(content: Mapping[str, object], problems: Problems) -> None:
    for key, value in content.items():
        if key != _NOT_STORED and not _is_plain(value):
            what = f"metadata {key!r} is a {type(value).__name__}, which can't be stored in common.pt"
            problems.add(Code.OPTION_INVALID, what, cure="use bools, numbers, strings, lists and dicts")


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _check_dtensors(model: Any, problems: Problems) -> None:
    """Refuse DTensors that `sharded_state_dict` would gather (waiting for ranks that may never come) or misplace."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        mesh = getattr(tensor, "device_mesh", None)
        for axis, placement in enumerate(getattr(tensor, "placements", ())):
            dim = getattr(placement, "dim", None)
            if mesh is not None and dim is not None and tensor.shape[dim] % mesh.size(axis):
                problems.add(
                    Code.OPTION_INVALID,
                    f"{name} is split unevenly; megatron-core can't describe that",
                    tensor=name,
                    facts=(f"dim {dim} has {tensor.shape[dim]} elements, the mesh has {mesh.size(axis)} ranks",),
                    cure="leave this parameter unsharded, or save the model as a plain torch model",
                )
