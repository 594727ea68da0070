"""What one rank holds of a model: records of shards, plain data that travels between ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape


class Shard(NamedTuple):
    """A box of a global tensor that a rank holds in its memory.

    Attributes:
        key: Key of the tensor on disk.
        dtype: Element type.
        global_shape: Shape of the whole tensor.
        start: First index of the box on each axis.
        size: Extent of the box on each axis.
        replica: 0 for the copy that megatron-core would write; other copies have other numbers.
    """

    key: str
    dtype: DType
    global_shape: Shape
    start: Shape
    size: Shape
    replica: int


class ObjectShard(NamedTuple):
    """A pickled object, such as a module's ``_extra_state``, that a rank holds.

    Attributes:
        key: Key on disk, shard suffix included: ``decoder.layers.mlp.linear_fc1._extra_state/shard_0_32``.
        replica: 0 for the copy that megatron-core would write.
        num_bytes: Size of its serialised form.
    """

    key: str
    replica: int
    num_bytes: int
