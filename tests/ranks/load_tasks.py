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
    "first": "num_layers_in_first_pipeline_stage",
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
    plain: str | None = None,
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
        plain: Directory with the values of the weights, where `hf` has them quantised.
    """
    import torch
    from safetensors.torch import load_file
    from tests.collectives import collectives_forbidden

    import shardway
    from shardway.live.load import load_huggingface, load_torch_dist

    bridge = shardway.AutoBridge.from_hf_pretrained(hf)
    wanted = {
        name: tensor for file in Path(plain or hf).glob("*.safetensors") for name, tensor in load_file(file).items()
    }
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


def read_by_torch(
    me: Any, *, hf: str, checkpoints: Sequence[str], grid: Mapping[str, int], fields: Mapping[str, Any]
) -> Outcome:
    """Load Megatron checkpoints with megatron-core; the bytes of tensors that torch's reader fetches for each.

    Args:
        me: This rank.
        hf: Hugging Face directory.
        checkpoints: Iteration folders that hold the same model.
        grid: As `through_a_grid`.
        fields: Likewise.
    """
    import math
    from unittest import mock

    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    import shardway

    read = FileSystemReader.read_data
    fetched: list[int] = []

    def counted(reader: Any, plan: Any, planner: Any) -> Any:
        for item in plan.items:
            entry = planner.metadata.state_dict_metadata[item.storage_index.fqn]
            if isinstance(entry, TensorStorageMetadata):
                (size,) = (chunk.sizes for chunk in entry.chunks if chunk.offsets == item.storage_index.offset)
                fetched[-1] += math.prod(size) * entry.properties.dtype.itemsize
        return read(reader, plan, planner)

    bridge = shardway.AutoBridge.from_hf_pretrained(hf)
    values = []
    with model_of(bridge, grid, None, fields) as (_, model), mock.patch.object(FileSystemReader, "read_data", counted):
        for checkpoint in checkpoints:
            for chunk in model:
                for _, value in _tensors(chunk):
                    value.fill_(torch.nan)
            fetched.append(0)
            _load_with_megatron(model, checkpoint)
            values.append([value.clone() for chunk in model for _, value in _tensors(chunk)])
            assert all(map(_same, values[0], values[-1]))
        held = sum(value.numel() * value.element_size() for value in values[0])
    return Outcome(notes={"fetched": fetched, "held": held})


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


def refused(me: Any, *, hf: str, cases: Mapping[str, Mapping[str, Any]], fields: Mapping[str, Any]) -> Outcome:
    """Load what can't be loaded, and see that the model has not changed.

    Args:
        me: This rank.
        hf: Directory of the model's config.
        cases: By name ``{"hf": directory}`` or ``{"megatron": folder}``, and ``failing``: after how many reads the
            filesystem fails.
        fields: Fields of the model's config that are different.
    """
    import errno
    import os
    from unittest import mock

    import torch

    import shardway
    from shardway.core.errors import ShardwayError

    bridge = shardway.AutoBridge.from_hf_pretrained(hf)
    found: dict[str, Any] = {}
    with model_of(bridge, {}, None, fields) as (_, model):
        for _, value in _tensors(model[0]):
            value.fill_(3.0)
        for name, case in cases.items():
            reads = 0
            real = os.preadv

            def preadv(*arguments: Any, failing: int | None = case.get("failing"), real: Any = real) -> Any:
                nonlocal reads
                reads += 1
                if failing is not None and reads > failing:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return real(*arguments)

            try:
                with mock.patch.object(os, "preadv", preadv):
                    if "hf" in case:
                        bridge.load_hf_weights(model, case["hf"])
                    else:
                        bridge.load_megatron_weights(model, case["megatron"])
            except ShardwayError as error:
                untouched = all(bool((value == 3.0).all()) for _, value in _tensors(model[0]))
                found[name] = {
                    "codes": [str(problem.code) for problem in error.problems],
                    "tensors": [problem.tensor for problem in error.problems],
                    "text": str(error),
                    "untouched": untouched,
                }
            else:
                found[name] = None
            with torch.no_grad():
                for _, value in _tensors(model[0]):
                    value.fill_(3.0)
    return Outcome(notes=found)


def alone(me: Any, *, hf: str, grid: Mapping[str, int], call: str) -> Outcome:
    """Rank 0 loads, or exports, while the others do nothing until it is done.

    Args:
        me: This rank.
        hf: Hugging Face directory.
        grid: As `through_a_grid`.
        call: ``load`` or ``export``.
    """
    import time

    from tests.ranks.save_worker import _until

    import shardway
    from shardway.core.errors import ShardwayError

    bridge = shardway.AutoBridge.from_hf_pretrained(hf)
    done = me.folder / f"alone-{call}"
    error = ""
    with model_of(bridge, grid) as (_, model):
        if me.rank:
            _until(done.exists)
        began = time.monotonic()
        try:
            if call == "load":
                bridge.load_hf_weights(model)
            elif not me.rank:
                list(bridge.export_hf_weights(model, distributed_timeout_minutes=0.02))
        except ShardwayError as refused:
            error = str(refused)
        seconds = time.monotonic() - began
        done.touch()
    return Outcome(text=error, notes={"seconds": seconds})


def measured(me: Any, *, hf: str, grid: Mapping[str, int], sources: Sequence[str], save: str | None = None) -> Outcome:
    """Load a model of some hundred megabytes; what memory that takes beside the model, and what is read.

    Args:
        me: This rank.
        hf: Hugging Face directory.
        grid: As `through_a_grid`.
        sources: Roots of Megatron checkpoints of the same model.
        save: Where to save the model as a Megatron checkpoint.
    """
    import ctypes
    import gc

    import shardway
    from shardway.live.load import load_huggingface, load_torch_dist

    def memory(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise ValueError(name)

    bridge = shardway.AutoBridge.from_hf_pretrained(hf)
    found = []
    with model_of(bridge, grid) as (_, model):
        for chunk in model:
            for _, value in _tensors(chunk):
                value.fill_(1.0)
        for source in (hf, *sources):
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            before = memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            if source == hf:
                report = load_huggingface(model, source)
            else:
                report = load_torch_dist(model, source, config=bridge.config)
            extra_bytes = memory("VmHWM") - before
            totals = [float(value.double().sum()) for chunk in model for _, value in _tensors(chunk)]
            found.append((extra_bytes, report.read_bytes, report.num_bytes, totals))
        if save is not None:
            bridge.save_megatron_model(model, save, distributed_timeout_minutes=1)
    return Outcome(notes={"found": found})


def save_hf(
    me: Any,
    *,
    hf: str,
    path: str,
    grid: Mapping[str, int],
    absent: Sequence[int] = (),
    fault: Mapping[str, Any] | None = None,
    sign: int = 1,
    **options: Any,
) -> Outcome | None:
    """Save the model as a Hugging Face directory; no collective may be called meanwhile.

    Args:
        me: This rank.
        hf: Hugging Face directory that the model is loaded from.
        path: Where to save it.
        grid: As `through_a_grid`.
        absent: Ranks that don't call.
        fault: ``rank``, ``at`` (``pwrite`` or a step of the save), ``do`` (``kill``, ``stall`` or an errno's name) and
            ``after``, how many calls go well before.
        sign: What the values are multiplied with.
        options: Of `save_hf_pretrained`.
    """
    import dataclasses

    import torch
    from tests.collectives import collectives_forbidden
    from tests.ranks.save_worker import _failed, _until

    import shardway

    bridge = shardway.AutoBridge.from_hf_pretrained(hf)
    with model_of(bridge, grid) as (_, model):
        bridge.load_hf_weights(model)
        with torch.no_grad():
            for chunk in model:
                for _, value in _tensors(chunk):
                    value.mul_(sign)
        if me.rank in absent:
            calling = [rank for rank in range(me.world["ranks"]) if rank not in absent]
            _until(lambda: all((me.folder / f"saved{rank}").exists() for rank in calling))
            return None
        if fault is not None and fault["do"].startswith("kill") and fault["rank"] != me.rank:
            out = Path(path)
            _until(lambda: bool(list(out.parent.glob(f".{out.name}.*"))))  # that rank coordinates
        try:
            with contextlib.ExitStack() as stack:
                if fault is not None and fault["rank"] == me.rank:
                    stack.enter_context(_going_wrong(path, **fault))
                stack.enter_context(collectives_forbidden())
                options = {"distributed_timeout_minutes": 1.0, **options}
                report = bridge.save_hf_pretrained(model, path, **options)
            return Outcome(report=dataclasses.asdict(report))
        except Exception as error:
            return _failed(error)
        finally:
            (me.folder / f"saved{me.rank}").touch()


@contextlib.contextmanager
def _going_wrong(path: str, *, rank: int, at: str, do: str, after: int = 0, seconds: float = 0.0) -> Iterator[None]:
    """Let something go wrong on this rank: at a step of the save, or at a write below its destination."""
    import errno
    import os
    import signal
    import time
    from unittest import mock

    from shardway.live.hf_folder import HuggingFaceFolder

    owner: Any = os if at == "pwrite" else HuggingFaceFolder
    real = getattr(owner, at)
    calls = 0

    def instead(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            if do == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if do == "kill after":
                real(*arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            if do == "stall":
                time.sleep(seconds)
            else:
                number = getattr(errno, do)
                raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    with mock.patch.object(owner, at, instead):
        yield
