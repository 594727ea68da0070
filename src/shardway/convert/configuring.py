"""The Hugging Face config that goes with a Megatron checkpoint, where nothing but Megatron's own config says so."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.families.bridge import fields_of, provider_of
from shardway.families.megatron_lm import fields_of_args
from shardway.families.restore import restore_config
from shardway.formats.pickles import SavedObject
from shardway.formats.run_config import RUN_CONFIG, read_run_config
from shardway.formats.small_files import links_out
from shardway.plans.imports import HF_FOLDER, TOKENIZER_FOLDER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.core.tensors import Shape, StoredTensor
    from shardway.formats.torch_dist import TorchDistCheckpoint


class Restored(NamedTuple):
    """A config that was worked out.

    Attributes:
        config: Content of config.json.
        files: Files of the tokenizer to go along: name in the destination, and path below the iteration folder.
        note: What a user should know about it.
    """

    config: dict[str, object]
    files: tuple[tuple[str, str], ...]
    note: str


def restored_config(checkpoint: TorchDistCheckpoint) -> Restored:
    """Work out the config.json of a checkpoint from Megatron's own config in it, and prove that it fits.

    Raises:
        ShardwayError: `config-missing` when there is none, or when no family or several differing ones fit it;
            `path-escapes` when a file of the tokenizer is a link out of the checkpoint.
    """
    tensors = checkpoint.catalog.tensors
    shapes: dict[str, Shape] = {key: tensor.shape for key, tensor in tensors.items()}
    document = read_run_config(checkpoint.root)
    args = checkpoint.common.get("args")
    if document is not None:
        origin, fields, provider = RUN_CONFIG, fields_of(document), provider_of(document)
    elif isinstance(args, SavedObject) and isinstance(args.state, dict):
        origin, fields, provider = "the arguments of Megatron-LM", fields_of_args(args.state), None
    else:
        raise _missing(checkpoint, f"there is no folder {HF_FOLDER}, no {RUN_CONFIG} and no args in it", {})
    found = restore_config(fields, shapes, provider, _dtype(tensors))
    if found.config is None:
        raise _missing(checkpoint, f"no family of models fits {origin} and the tensors", found.tried)
    folder = f"{TOKENIZER_FOLDER}/"
    names = [name for name in checkpoint.files if name.startswith(folder) and "/" not in name[len(folder) :]]
    escaping = links_out(checkpoint.root, names)
    if escaping:
        raise ShardwayError(escaping)
    note = f"config.json was worked out from {origin} as that of a {_architecture(found.config)}; look it over"
    return Restored(found.config, tuple((name[len(folder) :], name) for name in names), note)


def config_json(config: Mapping[str, object]) -> bytes:
    """The bytes of a config.json."""
    return (json.dumps(dict(config), indent=2, sort_keys=True) + "\n").encode()


def _architecture(config: Mapping[str, object]) -> object:
    listed = config["architectures"]
    return listed[0] if isinstance(listed, list) else listed


def _dtype(tensors: Mapping[str, StoredTensor]) -> str | None:
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) > 1]
    return max(matrices, key=lambda tensor: tensor.num_bytes).dtype.name if matrices else None


def _missing(checkpoint: TorchDistCheckpoint, why: str, tried: Mapping[str, str]) -> ShardwayError:
    return ShardwayError(
        Problem(
            code=Code.CONFIG_MISSING,
            what="the checkpoint does not say which Hugging Face model it belongs to",
            file=checkpoint.root,
            facts=(why, *(f"{family}: {against}" for family, against in tried.items())),
            cure="pass --hf DIR, a directory with the model's config.json and tokenizer",
        )
    )
