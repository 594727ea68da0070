"""The ``_extra_state`` of a checkpoint's modules, given back to those of a live model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shardway.core.errors import ShardwayError
from shardway.formats.saved_objects import SavedTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shardway.formats.dcp import DcpLocation
    from shardway.formats.torch_dist import TorchDistCheckpoint


def restore(setters: Mapping[str, Callable[[object], None]], checkpoint: TorchDistCheckpoint) -> tuple[str, ...]:
    """Give every module the state that the checkpoint holds for it, where it holds more than a placeholder.

    Transformer Engine keeps the scaling factors of FP8 there. Objects are read by the restricted reader, so that what
    it doesn't know is left alone; a model finds such factors again while it is trained.

    Args:
        setters: What takes the state of each module on this rank, by its key on disk.
        checkpoint: The checkpoint.

    Returns:
        What a user should know about it, one sentence each.

    *Ranks*: local.
    """
    values: dict[DcpLocation, torch.Tensor | None] = {}
    unknown: list[str] = []
    for key, give in setters.items():
        location = checkpoint.places.get(key)
        if location is None:
            continue
        if location not in values:
            try:
                values[location] = _state_in(checkpoint.read_object(key))
            except (ShardwayError, _UnknownFormError):
                values[location] = None
                unknown.append(key)
        state = values[location]
        if state is not None:
            give(state)
    if not unknown:
        return ()
    return (f"{len(unknown)} extra states were left as they are, such as {unknown[0]}: their form is not known",)


class _UnknownFormError(ValueError):
    """An object that is no tensor."""


def _state_in(value: object) -> torch.Tensor | None:
    """The state in an object as megatron-core stores it; None for a placeholder."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or (isinstance(value, SavedTensor) and not value.data):
        return None
    if not isinstance(value, SavedTensor):
        raise _UnknownFormError
    dtype: torch.dtype = getattr(torch, value.dtype.name)
    return torch.frombuffer(bytearray(value.data), dtype=dtype).reshape(value.shape)
