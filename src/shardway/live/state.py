"""What one rank holds of a model: the records that it announces, and the tensors and objects behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import torch

from shardway.core.errors import Code, Problem, Problems, ShardwayError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from shardway.core.tensors import Shape
    from shardway.live.records import ObjectShard, Shard

    # A tensor of a shard's shape, or what computes one when it is wanted (a dequantised parameter).
    Source = torch.Tensor | Callable[[], torch.Tensor]
    Place = tuple[str, Shape, Shape]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveState:
    """The part of a model that this process holds: plain records, and the live memory that they describe.

    Making one reads and copies no element; the tensors are the model's own until `snapshot`.

    Attributes:
        shards: Boxes of global tensors, each once, in the order of the state dict.
        objects: Pickled objects, each once.
        content_metadata: What the model was asked for when its state dict was made; stored in ``common.pt``.
        resizable: Keys of tensors whose global shape may differ from what the model's config says, because
            megatron-core pads them (``allow_shape_mismatch``: embeddings and output layer, on their first axis).
        variants: In which of the forms that model families know the model is; the same on every rank.
        left_out: Places in the state dict of plain values that no tensor or object record can carry.
        is_snapshot: Whether the tensors are copies of its own.
        sources: The tensors; use `tensor_of`.
        blobs: The serialised objects; use `object_bytes`.

    *Ranks*: local; nothing here communicates.
    """

    shards: tuple[Shard, ...]
    objects: tuple[ObjectShard, ...] = ()
    content_metadata: Mapping[str, object] = field(default_factory=dict)
    resizable: frozenset[str] = frozenset()
    variants: Mapping[str, bool] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    is_snapshot: bool = False
    sources: Mapping[Place, Source] = field(default_factory=dict, repr=False)
    blobs: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        tensors: Iterable[tuple[Shard, Source]],
        objects: Iterable[tuple[ObjectShard, bytes]] = (),
        *,
        content_metadata: Mapping[str, object] | None = None,
        resizable: Iterable[str] = (),
        variants: Mapping[str, bool] | None = None,
        left_out: Iterable[str] = (),
    ) -> Self:
        """A state of these tensors and objects; what is held twice is kept once, as its lowest replica.

        Args:
            tensors: Each record with a tensor of exactly its `size`, contiguous or not, on any device.
            objects: Each record with its serialised bytes.
            content_metadata: See the class.
            resizable: See the class.
            variants: See the class.
            left_out: See the class.
        """
        held: dict[Place, tuple[Shard, Source]] = {}
        for shard, source in tensors:
            place = (shard.key, shard.start, shard.size)
            known = held.get(place)
            if known is None or shard.replica < known[0].replica:
                held[place] = (shard, source)
        blobs: dict[str, tuple[ObjectShard, bytes]] = {}
        for record, data in objects:
            found = blobs.get(record.key)
            if found is None or record.replica < found[0].replica:
                blobs[record.key] = (record, data)
        return cls(
            shards=tuple(shard for shard, _ in held.values()),
            objects=tuple(record for record, _ in blobs.values()),
            content_metadata=dict(content_metadata or {}),
            resizable=frozenset(resizable),
            variants=dict(variants or {}),
            left_out=tuple(left_out),
            sources={place: source for place, (_, source) in held.items()},
            blobs={key: data for key, (_, data) in blobs.items()},
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all local tensors."""
        return sum(shard.dtype.num_bytes(math.prod(shard.size)) for shard in self.shards)

    @property
    def devices(self) -> frozenset[torch.device]:
        """The devices that tensors are on, leaving out those that are computed when they are wanted."""
        return frozenset(source.device for source in self.sources.values() if isinstance(source, torch.Tensor))

    def tensor_of(self, shard: Shard) -> torch.Tensor:
        """The local tensor of a shard: a view of the model's own memory, of shape `shard.size`, contiguous or not.

        Quantised parameters are dequantised anew by each call; everything else costs nothing.

        Raises:
            ShardwayError: `tensor-missing` for a shard that is not of this state, `shape-mismatch` when the tensor
                has another shape or dtype than its record.
        """
        source = self.sources.get((shard.key, shard.start, shard.size))
        if source is None:
            what = f"this rank holds no shard of {shard.key} at {list(shard.start)} of extent {list(shard.size)}"
            raise ShardwayError(Problem(code=Code.TENSOR_MISSING, what=what, tensor=shard.key))
        tensor = (source if isinstance(source, torch.Tensor) else source()).detach()
        if tuple(tensor.shape) != shard.size or str(tensor.dtype) != f"torch.{shard.dtype.name}":
            raise ShardwayError(
                Problem(
                    code=Code.SHAPE_MISMATCH,
                    what=f"the local tensor of {shard.key} is not what its record says",
                    tensor=shard.key,
                    facts=(
                        f"record: {shard.dtype.name} of shape {list(shard.size)}",
                        f"tensor: {tensor.dtype} of shape {list(tensor.shape)}",
                    ),
                )
            )
        return tensor

    def object_bytes(self, key: str) -> bytes:
        """The serialised form of an object.

        Raises:
            ShardwayError: `tensor-missing` for a key that is not of this state.
        """
        data = self.blobs.get(key)
        if data is None:
            what = f"this rank holds no object {key}"
            raise ShardwayError(Problem(code=Code.TENSOR_MISSING, what=what, tensor=key))
        return data

    def trimmed(self, shapes: Mapping[str, Shape]) -> LiveState:
        """A state without the padding of resizable tensors, which a loader puts back as zeros.

        Megatron pads the vocabulary to a multiple that depends on the tensor-parallel size; a checkpoint without
        that loads at any size, and exports. The tensors stay views of the same memory.

        Args:
            shapes: Wanted global shapes, by key; those of tensors that are not resizable are passed over.

        Raises:
            ShardwayError: `shape-mismatch` where a tensor would have to grow.
        """
        problems = Problems()
        kept: list[tuple[Shard, Source]] = []
        for shard in self.shards:
            source = self.sources[shard.key, shard.start, shard.size]
            shape = shapes.get(shard.key)
            if shape is None or shard.key not in self.resizable or shape == shard.global_shape:
                kept.append((shard, source))
            elif shape[1:] != shard.global_shape[1:] or shape[0] > shard.global_shape[0]:
                what = f"{shard.key} has a global shape of {list(shard.global_shape)}, wanted is {list(shape)}"
                problems.add(Code.SHAPE_MISMATCH, what, tensor=shard.key)
            elif (rows := min(shard.start[0] + shard.size[0], shape[0]) - shard.start[0]) > 0:
                part = shard._replace(global_shape=shape, size=(rows, *shard.size[1:]))
                kept.append((part, self.tensor_of(shard)[:rows]))
        problems.raise_if_any()
        return replace(
            self,
            shards=tuple(shard for shard, _ in kept),
            sources={(shard.key, shard.start, shard.size): source for shard, source in kept},
        )

    def snapshot(self, *, reuse: LiveState | None = None) -> LiveState:
        """A state of the same records on copies in host memory, so that the model may change while it is saved.

        Returns when every copy is complete. CUDA tensors are copied to pinned memory on the caller's current stream,
        all of them before one wait; call it on the thread and stream that updated the parameters.

        Args:
            reuse: An earlier snapshot, no longer being written, whose memory is used again where shapes agree:
                fresh memory costs a page fault for every 4 KiB, and pinning it costs more. A state that is no
                snapshot is not touched.
        """
        old = reuse.sources if reuse is not None and reuse.is_snapshot else {}
        copies: dict[Place, Source] = {}
        devices: set[torch.device] = set()
        for shard in self.shards:
            place = (shard.key, shard.start, shard.size)
            tensor = self.tensor_of(shard)
            copy = old.get(place)
            on_gpu = tensor.is_cuda
            if not isinstance(copy, torch.Tensor) or copy.dtype != tensor.dtype or copy.is_pinned() != on_gpu:
                copy = torch.empty(shard.size, dtype=tensor.dtype, pin_memory=on_gpu)
            copy.copy_(tensor, non_blocking=True)
            copies[place] = copy
            if on_gpu:
                devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return replace(self, sources=copies, is_snapshot=True)
