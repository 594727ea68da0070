"""Holding the float32 weights of an optimizer against the model's own, of which they are the precise form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.core.tensors import Catalog
from shardway.core.tiles import identity
from shardway.plans.model import Direction, Plan
from shardway.plans.streams import build_streams
from shardway.verification.compare import compare_streams

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shardway.core.tensors import StoredTensor
    from shardway.run.progress import Progress


def check_masters(
    own: Mapping[str, StoredTensor],
    masters: Catalog,
    num_workers: int,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Prove that every weight of an optimizer, rounded, is the model's own, as it is after each step of a training run.

    Args:
        own: The model's weights that were passed over, by name.
        masters: The weights that were taken, under the same names.
        num_workers: Threads.
        progress: Called as the comparison proceeds.

    Raises:
        ShardwayError: `verify-failed` for every weight that is another one, `io-failed`.

    Source: megatron/core/optimizer/distrib_optimizer.py `_copy_main_params_to_model_params`; its states of form
    ``fully_reshardable`` were cut at the wrong places where buckets were padded (0.16.1, mended in 0.20).
    """
    taken = {name: masters.tensors[name] for name in own}
    tiles = [identity(name, name, tensor.shape) for name, tensor in taken.items()]
    plan = Plan(
        direction=Direction.EXPORT,
        hf=Catalog(root=masters.root, tensors=dict(own)),
        mcore=Catalog(root=masters.root, tensors=taken),
        streams=build_streams(tiles, own, taken),
    )
    differences, _ = compare_streams(plan, num_workers, progress)
    if differences:
        raise ShardwayError(
            Problem(
                code=Code.VERIFY_FAILED,
                what=f"the optimizer's copy of {name} does not round to the model's own weight",
                tensor=name,
                file=masters.root,
                facts=(
                    f"{found.num_elements:,} elements differ, the first at {list(found.first_index)}",
                    f"by up to {found.max_abs:.6g}",
                ),
                cure="where the model's weights are 8-bit floats that is as it should be: leave out --verify; "
                "elsewhere take the model's own weights (megatron-core 0.16 saves some optimizers shifted)",
            )
            for name, found in sorted(differences.items())
        )
