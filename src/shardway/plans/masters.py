"""The float32 copies of the weights that an optimizer trains, where a checkpoint stores them by the model's names.

Source: megatron/core/optimizer/distrib_optimizer.py `sharded_state_dict`: of its forms, ``fully_reshardable`` stores
``optimizer.state.param.KEY`` in the shape of each weight; the others store flat buffers of the ranks that saved them.
The optimizer that is not distributed stores ``optimizer.state.fp32_param.KEY`` (optimizer.py; 0.16.1, 0.20).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from shardway.core.dtypes import FLOAT32
from shardway.core.errors import Code, Problem, ShardwayError
from shardway.plans.matching import is_training_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shardway.core.tensors import StoredTensor
    from shardway.formats.torch_dist import TorchDistCheckpoint

_MASTER = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?:fp32_)?param\.(.+)")
_BUCKET = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\.(.+)")
_CURE = (
    "save the checkpoint once more with --dist-ckpt-optim-fully-reshardable, or leave out --weights fp32 to take the "
    "model's own weights"
)


def master_of(key: str) -> str | None:
    """The key of the weight whose float32 copy a tensor is; None for any other tensor."""
    match = _MASTER.fullmatch(key)
    return None if match is None else match[1]


def with_masters(
    tensors: Mapping[str, StoredTensor], masters: Mapping[str, StoredTensor], checkpoint: TorchDistCheckpoint
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors with the optimizer's copies in the place of the model's own, and the names of those that have none.

    A weight may have none only if no copies are stored in a form that hides whose they are: then it is not trained.

    Args:
        tensors: The model's weights, by the names of a mapping.
        masters: The copies, by the same names.
        checkpoint: Where they are.

    Raises:
        ShardwayError: `masters-missing`.
    """
    found: dict[str, StoredTensor] = {}
    problems: list[Problem] = []
    untrained: list[str] = []
    for name, tensor in tensors.items():
        master = masters.get(name)
        if master is None:
            found[name] = tensor
            if tensor.dtype.floating and tensor.dtype.bits < FLOAT32.bits:
                untrained.append(name)
        elif master.dtype is not FLOAT32 or master.shape != tensor.shape:
            problems.append(_no_master(name, tensor, master, checkpoint))
        else:
            found[name] = master
    bucketed = _forms(checkpoint.described) | _forms(checkpoint.places)
    if problems:
        raise ShardwayError(problems)
    if untrained and (bucketed or not masters):
        raise ShardwayError(_no_masters(len(untrained), untrained[0], bucketed, checkpoint))
    return found, untrained


def _no_master(name: str, tensor: StoredTensor, master: StoredTensor, checkpoint: TorchDistCheckpoint) -> Problem:
    flattened = len(master.shape) != len(tensor.shape)
    return Problem(
        code=Code.MASTERS_MISSING,
        what=f"the optimizer's copy of {name} is not float32 values in the shape of the weight",
        tensor=name,
        file=checkpoint.root,
        facts=(
            f"{master.name} is {master.dtype.name} {list(master.shape)}, the weight {list(tensor.shape)}",
            *(("it was saved flattened, as fully_sharded_model_space",) if flattened else ()),
        ),
        cure=_CURE,
    )


def _no_masters(count: int, name: str, bucketed: set[str], checkpoint: TorchDistCheckpoint) -> Problem:
    if bucketed:
        why = f"the optimizer was saved as {', '.join(sorted(bucketed))}, which does not say which values are whose"
    elif any(is_training_state(key) for key in checkpoint.described):
        why = "there is optimizer state, but no optimizer.state.param or fp32_param among it"
    else:
        why = "there is no optimizer state in it"
    return Problem(
        code=Code.MASTERS_MISSING,
        what=f"the checkpoint does not hold float32 copies of the weights by name: {count:,} have none, such as {name}",
        tensor=name,
        file=checkpoint.root,
        facts=(why,),
        cure=_CURE,
    )


def _forms(keys: Iterable[str]) -> set[str]:
    """The forms of optimizer state that are tied to the ranks that saved it, by keys."""
    forms = set()
    for key in keys:
        match = _BUCKET.match(key)
        if match is None:
            continue
        if match[1].startswith("gbuf_idx_"):
            forms.add("dp_reshardable" if ".bucket_idx_" in match[1] else "fully_sharded_bucket_space")
        elif match[1].startswith("param_state/"):
            forms.add("dp_zero_gather_scatter")
    return forms


def about_masters(trained: Mapping[str, StoredTensor], untrained: Sequence[str]) -> list[str]:
    """What a user should know about weights that are such copies, one sentence each."""
    notes = [f"{len(trained)} weights are the optimizer's float32 copies"]
    if untrained:
        listed = ", ".join(untrained[:3]) + (", ..." if len(untrained) > 3 else "")
        notes.append(f"{len(untrained)} weights that the optimizer does not train are the model's own: {listed}")
    return notes
