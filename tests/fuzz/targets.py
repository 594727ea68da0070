"""The parsers as functions of bytes, and sound inputs to start from."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.conformance.malformed.attacks import ATTACKS, BOMBS
from tests.conformance.malformed.huggingface import INDEX
from tests.conformance.malformed.megatron import PROTOCOL, SCALE, torch_file
from tests.tiny import Tiny

import shardway
from shardway.core.boxes import Box, exact_cover
from shardway.core.dtypes import BFLOAT16
from shardway.core.errors import ShardwayError
from shardway.families.config import HFConfig
from shardway.families.mapping import map_model
from shardway.formats.dcp import read_metadata
from shardway.formats.huggingface import CONFIG_FILE, open_huggingface
from shardway.formats.json_text import JsonInvalidError, parse_json
from shardway.formats.record import RECORD_FILE, read_record
from shardway.formats.run_config import RUN_CONFIG, read_run_config
from shardway.formats.safetensors import read_safetensors
from shardway.formats.saved_objects import SavedTensor, read_torch_bytes, write_torch_file
from shardway.formats.torch_dist import train_state_pt
from shardway.formats.torch_file import read_tensor_blob, tensor_blob_frame

if TYPE_CHECKING:
    from collections.abc import Callable


class Target(NamedTuple):
    """A parser.

    Attributes:
        parse: Reads bytes; returns or raises nothing but `ShardwayError`.
        seeds: Inputs to start from.
    """

    parse: Callable[[bytes], object]
    seeds: tuple[bytes, ...]


class Scratch:
    """A file in memory, and a Hugging Face and a Megatron checkpoint of which one file is replaced."""

    def __init__(self, folder: Path) -> None:
        self.descriptor = os.memfd_create("fuzz")
        self.hf = Tiny(layers=1).write(folder / "hf", num_files=2)
        shardway.import_hf(self.hf, folder / "m", if_exists="replace", fsync=False)
        self.megatron = folder / "m/iter_0000000"

    def fill(self, data: bytes) -> Path:
        """The file, filled with `data`."""
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, data, 0)
        return Path(f"/proc/self/fd/{self.descriptor}")


def targets(folder: Path) -> dict[str, Target]:
    """Every parser by name; `folder` is where those that read directories put them."""
    scratch = Scratch(folder)
    shard = (scratch.hf / "model-00001-of-00002.safetensors").read_bytes()
    index, config = ((scratch.hf / name).read_bytes() for name in (INDEX, CONFIG_FILE))
    record = (scratch.megatron / RECORD_FILE).read_bytes()
    metadata = (scratch.megatron / ".metadata").read_bytes()
    frame = tensor_blob_frame(BFLOAT16, (2, 3))
    attacks = tuple(PROTOCOL + code + b"." for _, code in ATTACKS.values())
    bombs = tuple(PROTOCOL + code + b"." for _, code in BOMBS.values() if len(code) < 10_000)
    plain: dict[object, object] = {
        "a": [1, -(2**40), 2.5, None, True],
        "b": ({1, 2}, {}),
        3: b"bytes",
        (1, "c"): frozenset("d"),
    }
    values: dict[str, object] = {
        "a": [1, -(2**40), 2.5, None, True],
        "b": ("x", {}),
        "c": SavedTensor(BFLOAT16, (2,), bytes(4)),
    }

    def safetensors(data: bytes) -> None:
        read_safetensors(scratch.fill(data))

    def tensor(data: bytes) -> None:
        scratch.fill(data)
        read_tensor_blob(scratch.descriptor, 0, len(data), file="f", tensor="t")

    def torch(data: bytes) -> None:
        read_torch_bytes(data, file="f")

    def torch_pickle(data: bytes) -> None:
        read_torch_bytes(torch_file(data, data_0=bytes(16)), file="f")

    def dcp(data: bytes) -> None:
        for _, shape, chunks in read_metadata(data, "f").tensors.values():
            exact_cover(shape, [Box(start, size) for start, size, _ in chunks])

    def json_text(data: bytes) -> None:
        try:
            parse_json(data)
        except JsonInvalidError as error:
            if not str(error).isprintable():
                raise

    def replaced(folder: Path, name: str, data: bytes, read: Callable[[Path], object]) -> None:
        path = folder / name
        sound = path.read_bytes()
        path.write_bytes(data)
        try:
            read(folder)
        finally:
            path.write_bytes(sound)

    def model(folder: Path) -> None:
        found = HFConfig(open_huggingface(folder).config)
        layers = found.get("num_hidden_layers")
        if not isinstance(layers, int) or layers < 100:  # more are allowed, and take a second
            map_model(found)

    return {
        "safetensors": Target(safetensors, (shard,)),
        "tensor": Target(tensor, (frame.head + bytes(12) + frame.tail, torch_file(SCALE, data_0=bytes(16)))),
        "torch": Target(torch, (train_state_pt(), write_torch_file(values))),
        "pickle": Target(torch_pickle, (*[SCALE, pickle.dumps(plain)] * 20, *attacks, *bombs)),
        "metadata": Target(dcp, (*[metadata] * 40, *attacks, *bombs)),
        "json": Target(json_text, (index, config, record)),
        "index": Target(lambda data: replaced(scratch.hf, INDEX, data, open_huggingface), (index,)),
        "config": Target(lambda data: replaced(scratch.hf, CONFIG_FILE, data, model), (config,)),
        "run_config": Target(
            lambda data: replaced(scratch.megatron, RUN_CONFIG, data, read_run_config),
            (
                (scratch.megatron / RUN_CONFIG).read_bytes(),
                b"a: &a [1, 2]\nb: *a\n? [x]\n: !!python/name:os.system x\n",
            ),
        ),
        "record": Target(lambda data: replaced(scratch.megatron, RECORD_FILE, data, read_record), (record,)),
    }


def attempt(target: Target, data: bytes) -> ShardwayError | None:
    """Feed one input to a target; whatever it raises but a well-formed `ShardwayError` is passed on."""
    try:
        target.parse(data)
    except ShardwayError as error:
        if not error.problems or not str(error):
            raise
        return error
    return None
