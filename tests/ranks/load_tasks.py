"""What ranks do with a live model that is loaded and exported: tasks for worlds of `tests.ranks.fleet`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.ranks.fleet import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
}


def through_a_grid(
    me: Any,
    *,
    hf: str,
    imported: Sequence[str],
    grid: Mapping[str, int],
    dtype: str | None = None,
    save: str | None = None,
    fields: Mapping[str, Any] | None = None,
    logits: str | None = None,
) -> Outcome:
    """Load a model from its Hugging Face files and from Megatron checkpoints of it, and hand it out again.

    What megatron-core loads from the first of the checkpoints is what all loads have to give, bit for bit.

    Args:
        me: This rank.
        hf: Hugging Face directory.
        imported: Iteration folders that hold the same model.
        grid: ``tp``, ``pp``, ``ep``, ``etp``, ``vpp``.
        dtype: Of the model; by default that of the config.
        save: Where to save the model as a Hugging Face directory.
        fields: Further fields of the model's config.
        logits: Where the last stage leaves the logits of `tokens_of`.
    """
    import torch
    from safetensors.torch import load_file
    from tests.collectives import collectives_forbidden

    import shardway
    from shardway.live.load import load_huggingface, load_torch_dist

    bridge = shardway.AutoBridge.from_hf_pretrained(hf)
    wanted = {name: tensor for file in Path(hf).glob("*.safetensors") for name, tensor in load_file(file).items()}
    with model_of(bridge, grid, dtype, fields) as (provider, model):
        _load_with_megatron(model, imported[0])
        expected = [{name: value.clone() for name, value in _tensors(chunk)} for chunk in model]
        reports = []
        for source in (hf, *imported):
            for chunk in model:
                for _, value in _tensors(chunk):
                    value.fill_(torch.nan)
            with collectives_forbidden():
                if source == hf:
                    reports.append(load_huggingface(model, hf))
                else:
                    reports.append(load_torch_dist(model, source, config=bridge.config))
            for chunk, values in zip(model, expected, strict=True):
                differ = [name for name, value in _tensors(chunk) if not _same(value, values[name])]
                assert not differ, (source, differ)
        exported = {}
        for name, weight in bridge.export_hf_weights(model, cpu=True, distributed_timeout_minutes=1):
            assert _same(weight, wanted[name].to(weight.dtype)), name
            exported[name] = list(weight.shape)
        pieces: list[Any] = []
        with collectives_forbidden():
            for piece in bridge.export_hf_pieces(model):
                assert tuple(piece.shape) == tuple(wanted[piece.name].shape), piece.name
                assert _same(piece.tensor, wanted[piece.name][piece.slices].to(piece.tensor.dtype)), piece.name
                pieces.append((piece.name, [(each.start, each.stop, each.step) for each in piece.slices]))
        if save is not None:
            with collectives_forbidden():
                bridge.save_hf_pretrained(model, save, distributed_timeout_minutes=1)
        if logits is not None:
            _leave_logits(model, provider, Path(logits))
        shard_bytes = sum(value.numel() * value.element_size() for chunk in model for _, value in _tensors(chunk))
    return Outcome(
        notes={
            "exported": exported,
            "pieces": pieces,
            "read": [report.read_bytes for report in reports],
            "bytes": [report.num_bytes for report in reports],
            "model": shard_bytes,
            "notes": [report.notes for report in reports],
        }
    )


@contextlib.contextmanager
def model_of(
    bridge: Any, grid: Mapping[str, int], dtype: str | None = None, fields: Mapping[str, Any] | None = None
) -> Iterator[tuple[Any, list[Any]]]:
    """This rank's chunks of a model, unset; megatron-core's groups end with the context."""
    from megatron.core import parallel_state

    _let_latent_attention_run()
    provider = bridge.to_megatron_provider(load_weights=False, dtype=dtype)
    provider.parallel_output = False
    for name, value in {**{SIZES[name]: size for name, size in grid.items()}, **(fields or {})}.items():
        setattr(provider, name, value)
    provider.initialize_model_parallel(seed=1, distributed_timeout_minutes=0.5)
    try:
        yield provider, [_bare(chunk) for chunk in provider.provide_distributed_model(wrap_with_ddp=False)]
    finally:
        parallel_state.destroy_model_parallel()


def _let_latent_attention_run() -> None:
    """Stand in for the attention that megatron-core has only with Transformer Engine: keys and values of two sizes."""
    import torch
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class Attention(DotProductAttention):  # type: ignore[misc]
        def __init__(
            self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **rest: Any
        ) -> None:
            super().__init__(*args, **rest)
            self.is_latent = k_channels is not None

        def forward(self, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **rest: Any) -> Any:
            if not self.is_latent:
                return super().forward(query, key, value, attention_mask, *args, **rest)
            scores = torch.einsum("ibnd,jbnd->bnij", query, key) * self.softmax_scale
            shares = torch.softmax(scores.masked_fill(attention_mask, -torch.inf), dim=-1)
            return torch.einsum("bnij,jbnd->ibnd", shares, value).flatten(2)

    LocalSpecProvider.core_attention = lambda _: Attention
    multi_latent_attention.HAVE_TE = False


def _bare(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk.eval()


def _tensors(chunk: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and the buffers that are part of a checkpoint."""
    for name, value in chunk.named_parameters():
        yield name, value.detach()
    for name, value in chunk.named_buffers():
        if name.endswith("expert_bias"):
            yield name, value.detach()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left, right = one.contiguous().reshape(-1), other.contiguous().reshape(-1)
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def _load_with_megatron(model: Sequence[Any], checkpoint: str) -> None:
    from megatron.core import dist_checkpointing

    metadata = dist_checkpointing.load_content_metadata(checkpoint)
    names = ["model"] if len(model) == 1 else [f"model{number}" for number in range(len(model))]
    wanted = {name: chunk.sharded_state_dict(metadata=dict(metadata)) for name, chunk in zip(names, model, strict=True)}
    loaded = dist_checkpointing.load(wanted, checkpoint)
    for name, chunk in zip(names, model, strict=True):
        chunk.load_state_dict(loaded[name])


def _leave_logits(model: Sequence[Any], provider: Any, path: Path) -> None:
    import torch
    from megatron.core import parallel_state
    from tests.megatron import _forward

    tokens = tokens_of(provider.vocab_size)
    with torch.no_grad():
        found = _forward(model[0], {"tokens": tokens, "fields": {"vocab_size": provider.vocab_size}})
    if found is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
        torch.save(found, path)


def tokens_of(vocab_size: int) -> list[list[int]]:
    """Two sequences."""
    return [[(37 * i + 11 * row) % vocab_size for i in range(64)] for row in range(2)]
