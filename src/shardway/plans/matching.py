"""Holding a checkpoint's tensors against a model's mapping: everything missing, unexpected or misshapen, at once."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.errors import Code, Problem, Problems
from shardway.families.layout import VOCABULARY
from shardway.formats.file_problems import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.core.tensors import Shape, StoredTensor
    from shardway.families.mapping import ModelMapping

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_QUANTISED = re.compile(r"\.(weight_scale_inv|weight_scale|input_scale|weight_packed|scales|qweight|qzeros|g_idx)$")

# What a training checkpoint holds beside the model's weights; by megatron/training/checkpointing.py (0.16.1).
_TRAINING_STATE = re.compile(
    r"(optimizer|chained_\d+|rng_state|rerun_state|opt_param_scheduler|param_groups|dist_signal)"
)


class Matched(NamedTuple):
    """What a checkpoint holds beside the tensors of the mapping.

    Attributes:
        copies: Tensors that are allowed as copies of another one (name: which one).
        left_out: Names that are recognised and carried no further.
    """

    copies: dict[str, str]
    left_out: tuple[str, ...]


def match_huggingface(mapping: ModelMapping, tensors: Mapping[str, StoredTensor], problems: Problems) -> Matched:
    """Check that a Hugging Face checkpoint holds exactly the tensors of the mapping, in weights that can be carried.

    Args:
        mapping: What the config promises.
        tensors: What the files hold.
        problems: Receives everything that is wrong.
    """
    copies: dict[str, str] = {}
    left_out: list[str] = []
    unexpected: list[str] = []
    for name in tensors:
        if name in mapping.hf:
            continue
        if name in mapping.aliases:
            copies[name] = mapping.aliases[name]
        elif mapping.ignored.fullmatch(name):
            left_out.append(name)
        else:
            unexpected.append(name)
    if unexpected or not mapping.hf.keys() <= tensors.keys():
        _count_layers(mapping.hf, tensors, "config.json", problems)
    quantised = [name for name in unexpected if _QUANTISED.search(name)]
    scales = f"scales found: {', '.join(map(printable, quantised[:3])) or 'none'}"
    _match(mapping.hf, tensors, unexpected, problems)
    for name in mapping.hf:
        tensor = tensors.get(name)
        if tensor is not None and (not tensor.dtype.floating or tensor.dtype.bits < 16):
            problems.add(
                Code.DTYPE_UNSUPPORTED,
                f"{name} holds {tensor.dtype.name} values, which mean nothing without their scales",
                tensor=name,
                file=tensor.chunks[0].file,
                facts=(scales,),
                cure="convert a bf16 version of the model; quantised sources of this kind are not supported",
            )
    for name, of in copies.items():
        tensor, original = tensors[name], tensors.get(of)
        if original is not None and (tensor.shape, tensor.dtype) != (original.shape, original.dtype):
            problems.extend([tied_problem(name, of, tensor.chunks[0].file, "their shapes or dtypes differ")])
    return Matched(copies, tuple(left_out))


def is_training_state(key: str) -> bool:
    """Whether a key of a Megatron checkpoint belongs to the training run (optimizer, RNG, ...), not to the model."""
    return _TRAINING_STATE.match(key) is not None


def match_megatron(mapping: ModelMapping, tensors: Mapping[str, StoredTensor], problems: Problems) -> None:
    """Check that a Megatron checkpoint holds exactly the model's tensors.

    Args:
        mapping: What the config promises, in the checkpoint's layout.
        tensors: What the files hold, training state left out.
        problems: Receives everything that is wrong.
    """
    unexpected = [name for name in tensors if name not in mapping.mcore]
    if unexpected or not mapping.mcore.keys() <= tensors.keys():
        _count_layers(mapping.mcore, tensors, "the config", problems)
    _match(mapping.mcore, tensors, unexpected, problems)


def padded_rows(mapping: ModelMapping, tensors: Mapping[str, StoredTensor]) -> dict[str, Shape]:
    """The tensors whose vocabulary Megatron has padded, and their shapes with the padding.

    Megatron-LM pads it to a multiple of ``--make-vocab-size-divisible-by`` times the tensor parallelism; the rows that
    this adds belong to no token.
    """
    found = {}
    for name in VOCABULARY:
        tensor, wanted = tensors.get(name), mapping.mcore.get(name)
        if tensor is None or wanted is None or len(tensor.shape) != len(wanted):
            continue
        if tensor.shape[0] > wanted[0] and tensor.shape[1:] == wanted[1:]:
            found[name] = tensor.shape
    return found


def tied_problem(name: str, of: str, file: str, fact: str) -> Problem:
    """The problem of a tensor that the config ties to another one and that differs from it."""
    return Problem(
        code=Code.TIED_WEIGHTS_DIFFER,
        what=f"the config ties {name} to {of}, but the two are not the same",
        tensor=name,
        file=file,
        facts=(fact,),
        cure="if the model is not tied, set tie_word_embeddings to false in config.json",
    )


def _match(
    expected: Mapping[str, Shape],
    tensors: Mapping[str, StoredTensor],
    unexpected: list[str],
    problems: Problems,
) -> None:
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            problems.add(
                Code.TENSOR_MISSING,
                f"the config asks for {name}, which no file holds",
                tensor=name,
                facts=(f"expected shape {list(shape)}",),
                cure="fetch or save the checkpoint again, or check that the config belongs to these weights",
            )
        elif tensor.shape != shape:
            facts = [f"expected {list(shape)}, got {list(tensor.shape)}"]
            if len(shape) > 1 and tensor.shape == shape[::-1]:
                facts.append("it looks transposed")
            problems.add(
                Code.SHAPE_MISMATCH,
                f"{name} has the wrong shape",
                tensor=name,
                file=tensor.chunks[0].file if tensor.chunks else None,
                facts=facts,
                cure="the shape follows from the config: check that the config belongs to these weights",
            )
    for name in unexpected:
        tensor = tensors[name]
        problems.add(
            Code.TENSOR_UNEXPECTED,
            f"no rule of this architecture claims {printable(name)}",
            tensor=name,
            file=tensor.chunks[0].file if tensor.chunks else None,
            facts=(f"shape {list(tensor.shape)}, {tensor.dtype.name}",),
            cure="nothing is dropped silently: check the architecture in the config, or remove the tensor",
        )


def _count_layers(
    expected: Mapping[str, Shape], tensors: Mapping[str, StoredTensor], whose: str, problems: Problems
) -> None:
    wanted, found = ({int(m[1]) for name in names if (m := _LAYER.search(name))} for names in (expected, tensors))
    if found and wanted and found != wanted:
        problems.add(
            Code.CONFIG_INVALID,
            f"{whose} describes {len(wanted)} layers, and the weights hold {len(found)}",
            facts=(f"layers {min(wanted)}-{max(wanted)} described, {min(found)}-{max(found)} found",),
            cure="check num_hidden_layers in the config",
        )
