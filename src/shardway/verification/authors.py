"""Who wrote a Megatron checkpoint, as far as it shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.formats.run_config import RUN_CONFIG

if TYPE_CHECKING:
    from shardway.formats.record import Record
    from shardway.formats.torch_dist import TorchDistCheckpoint

FORMS = {"common.pt": "mcore <= 0.18 (common.pt)", "common_state": "mcore >= 0.19 (common_state)"}


def author(checkpoint: TorchDistCheckpoint, record: Record | None) -> str:
    """The program, and its version where that is known or the form tells a range of megatron-core's.

    shardway says so itself, in its record. Others are told by what they leave beside the weights: Megatron Bridge its
    run_config.yaml, Megatron-LM its arguments, NeMo a prefix before every key. Everyone may write the older form.

    Source: megatron/core/dist_checkpointing (the form changed in 0.19, commit 40b1fd37c1).
    """
    if record is not None:
        return record.written_by
    if RUN_CONFIG in checkpoint.files:
        program = "Megatron Bridge"
    elif "args" in checkpoint.common:
        program = "Megatron-LM"
    elif any(key.startswith("module.") for key in checkpoint.catalog.tensors):
        program = "NeMo"
    else:
        program = "megatron-core"
    return f"{program}, {FORMS[checkpoint.common_form].partition(' (')[0]}"
