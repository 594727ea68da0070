"""How the weights of a Hugging Face checkpoint are split into safetensors files, and the index that finds them.

Source: huggingface_hub 1.33, `split_state_dict_into_shards_factory` in serialization/_base.py.
"""

from __future__ import annotations

import io
import json
import math
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.errors import Code, Problem, Problems, ShardwayError
from shardway.formats.file_problems import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class HuggingFaceShard(NamedTuple):
    """One weights file of a checkpoint to be written.

    Attributes:
        file: Its name, as transformers would name it.
        tensors: Name, dtype and shape (elements) of the tensors in it.
    """

    file: str
    tensors: tuple[tuple[str, DType, Shape], ...]


def shard_tensors(tensors: Sequence[tuple[str, DType, Shape]], max_shard_bytes: int) -> tuple[HuggingFaceShard, ...]:
    """Split tensors into shards exactly as huggingface_hub does: greedily, in the given order.

    A tensor larger than the limit gets a shard of its own, ahead of the one that is being filled.

    Args:
        tensors: Name, dtype and shape (elements) of each tensor.
        max_shard_bytes: The most bytes of tensors in one shard.

    Returns:
        The shards in order; none for no tensors.

    Raises:
        ShardwayError: `option-invalid` for a limit below 1 byte, `tensor-duplicate` for a name given twice.
    """
    if max_shard_bytes < 1:
        what = f"a shard of at most {max_shard_bytes} bytes can hold nothing"
        raise ShardwayError(Problem(code=Code.OPTION_INVALID, what=what, cure="choose a limit such as 5 GB"))
    problems = Problems()
    seen: set[str] = set()
    groups: list[list[tuple[str, DType, Shape]]] = []
    current: list[tuple[str, DType, Shape]] = []
    current_bytes = 0
    for tensor in tensors:
        name, dtype, shape = tensor
        if name in seen:
            problems.add(Code.TENSOR_DUPLICATE, f"tensor {printable(name)} is to be written twice", tensor=name)
        seen.add(name)
        num_bytes = dtype.num_bytes(math.prod(shape))
        if num_bytes > max_shard_bytes:
            groups.append([tensor])
            continue
        if current_bytes + num_bytes > max_shard_bytes:
            groups.append(current)
            current, current_bytes = [], 0
        current.append(tensor)
        current_bytes += num_bytes
    problems.raise_if_any()
    if current:
        groups.append(current)
    if len(groups) == 1:
        return (HuggingFaceShard(file=SINGLE_FILE, tensors=tuple(groups[0])),)
    return tuple(
        HuggingFaceShard(file=f"model-{number:05d}-of-{len(groups):05d}.safetensors", tensors=tuple(group))
        for number, group in enumerate(groups, start=1)
    )


def index_json(shards: Iterable[HuggingFaceShard]) -> bytes:
    """The content of ``model.safetensors.index.json``, as transformers writes it.

    Args:
        shards: The shards that the index is to cover.

    Returns:
        JSON with sorted keys: ``metadata`` (``total_parameters`` in elements, ``total_size`` in bytes) and
        ``weight_map`` (tensor name to file).
    """
    weight_map: dict[str, str] = {}
    num_elements = num_bytes = 0
    for shard in shards:
        for name, dtype, shape in shard.tensors:
            weight_map[name] = shard.file
            num_elements += math.prod(shape)
            num_bytes += dtype.num_bytes(math.prod(shape))
    metadata = {"total_parameters": num_elements, "total_size": num_bytes}
    index = {"metadata": metadata, "weight_map": weight_map}
    contents = io.BytesIO()  # written piece by piece: the pieces take ten times as much as what they say
    contents.writelines(text.encode() for text in json.JSONEncoder(indent=2, sort_keys=True).iterencode(index))
    contents.write(b"\n")
    return contents.getvalue()
