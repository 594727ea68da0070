"""Handing out the weights of a live model under their Hugging Face names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.core.errors import Problems
from shardway.families.config import HFConfig
from shardway.families.layout import Layout
from shardway.families.mapping import map_model, variants_in
from shardway.formats.huggingface import CONFIG_FILE
from shardway.live.fitting import check_model
from shardway.live.gather import export_weights
from shardway.live.pieces import own_pieces

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from shardway.families.mapping import ModelMapping
    from shardway.live.gather import HFWeight
    from shardway.live.pieces import HFPiece
    from shardway.live.state import LiveState

_DEFAULT_TIMEOUT_MINUTES = 10.0


def mapping_of(state: LiveState, values: Mapping[str, object], hf: Sequence[str] | None = None) -> ModelMapping:
    """How a live model's tensors translate.

    Args:
        state: What this rank holds.
        values: Content of config.json.
        hf: Names of the Hugging Face tensors that are wanted, where the family knows several forms.

    Raises:
        ShardwayError: `architecture-unsupported`, `config-invalid`.
    """
    config = HFConfig(values, CONFIG_FILE)
    variants = {**variants_in(config, hf=hf, recorded=state.variants), **state.variants}
    layout = Layout.PER_LAYER if state.content_metadata.get("non_homogeneous_layers") else None
    return map_model(config, layout, variants=variants)


def held(
    model: Sequence[nn.Module] | nn.Module, values: Mapping[str, object], hf: Sequence[str] | None = None
) -> tuple[LiveState, ModelMapping]:
    """What this rank holds of a model, without the padding of its vocabulary, and how it translates.

    Raises:
        ShardwayError: Where the model and the config don't belong together, all problems.

    *Ranks*: local.
    """
    from shardway.live.megatron import megatron_memory, megatron_state

    state = megatron_state(model)
    mapping = mapping_of(state, values, hf)
    problems = Problems()
    check_model(megatron_memory(model), mapping, problems)
    problems.raise_if_any()
    return state.trimmed({key: mapping.mcore[key] for key in state.resizable & mapping.mcore.keys()}), mapping


def export_hf_weights(
    model: Sequence[nn.Module] | nn.Module,
    values: Mapping[str, object],
    *,
    cpu: bool,
    timeout_minutes: float | None = None,
) -> Iterator[HFWeight]:
    """Yield the whole Hugging Face tensors of this rank's model-parallel group; see `AutoBridge.export_hf_weights`."""
    from shardway.live.megatron import model_parallel_groups

    state, mapping = held(model, values)
    mapping = mapping.with_copies(mapping.restored)
    timeout_s = 60.0 * (timeout_minutes or _DEFAULT_TIMEOUT_MINUTES)
    yield from export_weights(state, mapping, model_parallel_groups(), cpu=cpu, timeout_s=timeout_s)


def export_hf_pieces(model: Sequence[nn.Module] | nn.Module, values: Mapping[str, object]) -> Iterator[HFPiece]:
    """Yield what this rank holds of each Hugging Face tensor; see `AutoBridge.export_hf_pieces`."""
    state, mapping = held(model, values)
    yield from own_pieces(state, mapping.with_copies(mapping.restored))
