"""What a bridge asks of live models beside saving and loading: building them, and handing out their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shardway.core.errors import Code, Problem, Problems, ShardwayError
from shardway.families.config import HFConfig
from shardway.families.layout import Layout
from shardway.families.mapping import map_model, variants_in
from shardway.formats.huggingface import CONFIG_FILE, open_huggingface
from shardway.live.fitting import check_model
from shardway.live.gather import export_weights
from shardway.live.pieces import own_pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import nn

    from shardway.families.mapping import ModelMapping
    from shardway.live.building import MegatronProvider
    from shardway.live.gather import HFWeight
    from shardway.live.pieces import HFPiece
    from shardway.live.state import LiveState

_DEFAULT_TIMEOUT_MINUTES = 10.0


def provider_of(
    values: Mapping[str, object],
    *,
    load: Callable[[Sequence[nn.Module]], object] | None,
    dtype: torch.dtype | str | None,
    weights: Path | None,
) -> MegatronProvider:
    """The megatron-core model that a config describes, to be built.

    Args:
        values: Content of config.json.
        load: Loads weights into the chunks that were built.
        dtype: Of the parameters; None for what the config says.
        weights: Directory of Hugging Face weights whose names decide in which of several forms the model is.

    Raises:
        ShardwayError: `architecture-unsupported`, `config-invalid`, `option-invalid`; what `open_huggingface` raises.

    *Ranks*: local.
    """
    from shardway.live.building import MegatronProvider  # megatron-core takes seconds to import

    config = HFConfig(values, CONFIG_FILE)
    variants = variants_in(config, hf=open_huggingface(weights).catalog.tensors if weights is not None else None)
    mapping = map_model(config, variants=variants)
    return MegatronProvider(mapping.megatron_config, dtype=_dtype(config, dtype), load=load)


def _dtype(config: HFConfig, wanted: torch.dtype | str | None) -> torch.dtype:
    if isinstance(wanted, torch.dtype):
        return wanted
    name = (wanted or config.dtype or "bfloat16").removeprefix("torch.")
    found = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(name, name)
    dtype = getattr(torch, found, None)
    if found not in ("bfloat16", "float16", "float32") or not isinstance(dtype, torch.dtype):
        what = f"dtype={name!r}; expected bfloat16, float16 or float32"
        raise ShardwayError(Problem(code=Code.OPTION_INVALID, what=what))
    return dtype


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
