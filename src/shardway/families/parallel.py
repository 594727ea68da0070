"""Along which axes the ranks of a parallel job divide Megatron's tensors, and so which boxes of them each one loads.

Source: the `sharded_state_dict` of megatron-core's layers: tensor_parallel/layers.py, transformer/mlp.py,
transformer/attention.py, transformer/multi_latent_attention.py, transformer/moe/experts.py, ssm/mamba_mixer.py
(0.16.1).
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.boxes import Box
from shardway.families.layout import VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shardway.core.tensors import Shape

# What Megatron-LM pads the vocabulary to a multiple of, for each tensor-parallel rank.
_VOCABULARY_MULTIPLE = 128
# Tensors whose output features the ranks divide, and those whose input features; all others each rank has whole.
_BY_ROWS = re.compile(
    r".*\.(?:linear_qkv|linear_fc1|linear_q_proj|linear_q_up_proj|linear_kv_up_proj)\.(?:weight|bias)"
    r"|.*\.core_attention\.softmax_offset|.*\.eh_proj\.weight"
    r"|.*\.(?:mixer|self_attention)\.(?:in_proj\.weight|conv1d\.(?:weight|bias))(?:\..+)?"
    r"|.*\.mixer\.(?:A_log|D|dt_bias|norm\.weight)"
)
# With Transformer Engine each rank has them whole, otherwise the ranks divide them.
_BY_ROWS_IF_EVEN = re.compile(r".*\.(?:linear_q_down_proj|linear_kv_down_proj)\.weight")
_BY_COLUMNS = re.compile(r".*\.(?:linear_proj|linear_fc2|out_proj)\.weight")
_GATED = re.compile(r".*\.linear_fc1\.(?:weight|bias)")
_EXPERTS = ".experts.experts."
_STACKED = re.compile(r"(?:.*\.)?decoder\.layers\.(?!\d)")
_PREFIX = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.[a-z0-9_]+\.")


class Parallelism(NamedTuple):
    """How a job divides a model among its ranks.

    Attributes:
        tp: Tensor parallelism.
        etp: Tensor parallelism of the experts.
        ep: Expert parallelism.
    """

    tp: int = 1
    etp: int = 1
    ep: int = 1


class UnevenError(Exception):
    """Why a tensor can't be divided so, in words."""


def loaded_boxes(key: str, shape: Shape, parallel: Parallelism) -> list[Box] | None:
    """The boxes that a tensor is best cut into, so that every rank loads whole boxes only.

    Layers and experts lie apart, whoever loads them. Rows of an MLP's first matrix are cut into twice as many parts,
    since a rank has as much of the gate as of what it gates, if there is one. The vocabulary is cut for ranks that pad
    it as Megatron-LM does as well as for those that don't need to.

    Args:
        key: The tensor's key on disk; also that of an optimizer's state of a weight.
        shape: Its global shape.
        parallel: The job.

    Returns:
        Boxes that cover the tensor exactly once, by rising position; None for a tensor that is not a model's.

    Raises:
        UnevenError: Where the ranks can't have equal parts.
    """
    key = _PREFIX.sub("", key, count=1)
    if not re.match(r"(?:embedding|decoder|output_layer|mtp)\.", key) or not shape:
        return None
    expert = _EXPERTS in key
    leading = (_STACKED.match(key) is not None) + (expert and not _is_alone(key))
    parts = parallel.etp if expert else parallel.tp
    if expert and not _is_alone(key) and shape[leading - 1] % parallel.ep:
        raise UnevenError(f"{shape[leading - 1]} experts can't be divided among {parallel.ep} ranks")
    edges: list[list[int]] = [[*range(extent + 1)] for extent in shape[:leading]]
    edges += [[0, extent] for extent in shape[leading:]]
    if len(shape) > leading and (parts > 1 or _GATED.fullmatch(key)):
        if key in VOCABULARY:
            edges[0] = _vocabulary(shape[0], parts)
        elif _BY_ROWS_IF_EVEN.fullmatch(key) and shape[leading] % parts == 0:
            edges[leading] = _equal(shape[leading], parts, parts)
        elif _BY_ROWS.fullmatch(key):
            edges[leading] = _equal(shape[leading], parts, 2 * parts if _GATED.fullmatch(key) else parts)
        elif _BY_COLUMNS.fullmatch(key) and len(shape) > leading + 1:
            edges[-1] = _equal(shape[-1], parts, parts)
    return [
        Box(tuple(low for low, _ in sides), tuple(high - low for low, high in sides))
        for sides in itertools.product(*map(itertools.pairwise, edges))
    ]


def _is_alone(key: str) -> bool:
    """Whether an expert has a key of its own."""
    return key.rpartition(_EXPERTS)[2].split(".", 1)[0].isdigit()


def _equal(extent: int, parts: int, pieces: int) -> list[int]:
    if extent % parts:
        raise UnevenError(f"{extent} can't be divided among {parts} ranks: {extent} % {parts} = {extent % parts}")
    pieces = pieces if extent % pieces == 0 else parts
    return [*range(0, extent + 1, extent // pieces)] if extent else [0, 0]


def _vocabulary(rows: int, parts: int) -> list[int]:
    multiple = _VOCABULARY_MULTIPLE * parts
    padded = -(-rows // multiple) * multiple
    edges: set[int] = {0, rows, *range(0, rows, padded // parts)}
    if rows % parts == 0:
        edges |= set(range(0, rows, rows // parts))
    return sorted(edges)


def described(parallel: Parallelism) -> str:
    """The text that `Parallelism` is parsed from, in one form for all that mean the same."""
    fields: Iterable[tuple[str, int]] = (("tp", parallel.tp), ("etp", parallel.etp), ("ep", parallel.ep))
    return ",".join(f"{name}={value}" for name, value in fields)
