"""Malformed safetensors files, indexes and configurations."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from tests.conformance.malformed.case import Case, cases, link_out, overwrite

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
FIRST = "model.embed_tokens.weight"
READERS = ("inspect", "import", "plan")
PLANNERS = ("import", "plan")
# Three bytes of text for every hundred of memory.
BRACKETS = b"[" + b"[]," * 600_000 + b"[]]"


def split(path: Path) -> tuple[bytes, bytes]:
    """The header's JSON and the data of a safetensors file."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def join(path: Path, raw: bytes, data: bytes) -> None:
    """Write a safetensors file of these parts."""
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def header(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Changes the text of a header."""

    def spoil(folder: Path) -> None:
        raw, data = split(folder / SHARD)
        join(folder / SHARD, change(raw), data)

    return spoil


def entries(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Changes the entries of a header."""

    def edit(raw: bytes) -> bytes:
        document = json.loads(raw)
        change(document)
        return json.dumps(document).encode()

    return header(edit)


def first(**fields: object) -> Callable[[Path], object]:
    """Changes fields of the first tensor's entry."""
    return entries(lambda document: document[FIRST].update(fields))


def document(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Changes a JSON file."""

    def spoil(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return spoil


def config(**fields: object) -> Callable[[Path], object]:
    """Changes values of config.json."""
    return document("config.json", lambda value: value.update(fields))


def weight_map(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Changes the index's map."""
    return document(INDEX, lambda value: change(value["weight_map"]))


def pipe(name: str) -> Callable[[Path], object]:
    """Puts a named pipe in the place of a file: opening it would wait for ever."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def appended(folder: Path) -> None:
    with (folder / SHARD).open("ab") as file:
        file.write(bytes(8))


def hole(folder: Path) -> None:
    shifted(2)(folder)
    appended(folder)


def shifted(by: int) -> Callable[[Path], object]:
    """Moves the last tensor's data."""

    def change(document: dict[str, Any]) -> None:
        name = max(document.keys() - {"__metadata__"}, key=lambda each: document[each]["data_offsets"])
        document[name]["data_offsets"] = [offset + by for offset in document[name]["data_offsets"]]

    return entries(change)


CASES: tuple[Case, ...] = (
    *cases(
        "safetensors-truncated",
        READERS,
        {
            "an empty file": overwrite(SHARD, b""),
            "seven bytes": overwrite(SHARD, b"\x01\0\0\0\0\0\0"),
            "a header longer than the file": overwrite(SHARD, (5000).to_bytes(8, "little") + b"{}"),
            "data cut short": lambda folder: os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1),
        },
    ),
    *cases(
        "safetensors-header",
        READERS,
        {
            "a header of exabytes": overwrite(SHARD, (2**63).to_bytes(8, "little") + b"{}"),
            "a header of 2**64 - 1 bytes": overwrite(SHARD, b"\xff" * 16),
            "a header of no bytes": overwrite(SHARD, bytes(16)),
            "a Git LFS pointer": overwrite(SHARD, b"version https://git-lfs.github.com/spec/v1\n"),
            "a header that is no object": header(lambda raw: b"[" + raw[1:]),
            "a header that is not UTF-8": header(lambda raw: raw.replace(b"model", b"\xff\xfe\xfd\xfc\xfb", 1)),
            "a header cut short": header(lambda raw: raw[:-10]),
            "a header nested deeply": header(lambda _: b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
            "a header of brackets": header(lambda _: b'{"a":' + BRACKETS + b"}"),
            "a field twice": header(lambda raw: raw.replace(b'"dtype"', b'"dtype": "F32", "dtype"', 1)),
            "a field too many": first(strides=[1]),
            "a field too few": entries(lambda document: document[FIRST].pop("shape")),
            "an entry that is no object": entries(lambda document: document.update({FIRST: []})),
            "a negative size": first(shape=[-11, 8]),
            "a size of 2**63": first(shape=[2**63, 0]),
            "sizes whose product overflows": first(shape=[2**32, 2**32, 2**32]),
            "a number of 5,000 digits": header(lambda raw: raw.replace(b"11", b"1" * 5000, 1)),
            "65 axes": first(shape=[1] * 65),
            "a fraction as a size": first(shape=[11.0, 8]),
            "a truth as a size": first(shape=[True, 8]),
            "offsets in reverse": first(data_offsets=[176, 0]),
            "negative offsets": first(data_offsets=[-176, 0]),
            "offsets beyond 2**63": first(data_offsets=[2**64, 2**64 + 176]),
            "offsets that contradict the shape": first(data_offsets=[0, 175]),
            "half of a surrogate pair": header(lambda raw: raw.replace(b'"model.', b'"\\ud800.', 1)),
            "metadata that is no text": entries(lambda document: document.update(__metadata__={"format": 1})),
        },
    ),
    *cases("safetensors-overlap", READERS, {"two tensors that share bytes": shifted(-2)}),
    *cases("safetensors-gap", READERS, {"bytes at the end of nobody": appended}),
    *cases(
        "safetensors-gap",
        READERS,
        {"bytes between tensors of nobody": hole},
    ),
    *cases(
        "tensor-duplicate",
        READERS,
        {"a tensor twice": header(lambda raw: raw.replace(b"k_proj", b"q_proj").replace(b"v_proj", b"q_proj"))},
    ),
    *cases("dtype-unknown", READERS, {"a dtype that nobody knows": first(dtype="F128\x1b[2J")}),
    *cases(
        "file-unreadable",
        READERS,
        {"a pipe for weights": pipe(SHARD)},
    ),
    *cases("config-missing", READERS, {"a pipe for a config": pipe("config.json")}),
    *cases(
        "index-invalid",
        READERS,
        {
            "an index that is no JSON": overwrite(INDEX, b"{"),
            "an index that is a list": overwrite(INDEX, b"[]"),
            "an index without a map": overwrite(INDEX, b'{"metadata": {}}'),
            "an index that maps to numbers": weight_map(lambda names: names.update(a=1)),
            "an index with a key twice": overwrite(INDEX, b'{"weight_map": {"a": "b", "a": "c"}}'),
            "an index of brackets": overwrite(INDEX, BRACKETS),
            "an index nested deeply": overwrite(INDEX, b"[" * 100_000),
            "an index of 65 MiB": lambda folder: os.truncate(folder / INDEX, 65 << 20),
        },
    ),
    *cases(
        "path-escapes",
        READERS,
        {
            "an index with an absolute path": weight_map(lambda names: names.update({FIRST: "/etc/passwd"})),
            "an index that climbs": weight_map(lambda names: names.update({FIRST: "../../etc/passwd"})),
            "an index that climbs within": weight_map(lambda names: names.update({FIRST: "a/../../b"})),
            "an index with a zero byte": weight_map(lambda names: names.update({FIRST: "a\0b"})),
            "an index with a backslash": weight_map(lambda names: names.update({FIRST: "..\\b"})),
            "a tokenizer that is a link out": link_out("tokenizer.json"),
            "a config that is a link out": link_out("config.json"),
        },
    ),
    *cases(
        "file-missing",
        READERS,
        {"an index of other files": weight_map(lambda names: names.update({FIRST: "x\x1b"}))},
    ),
    *cases("index-mismatch", READERS, {"a tensor of the index alone": weight_map(lambda names: names.update(a=SHARD))}),
    *cases(
        "config-invalid",
        READERS,
        {
            "a config that is no JSON": overwrite("config.json", b"hidden_size: 8"),
            "a config that is not UTF-8": overwrite("config.json", b'{"a": "\xff"}'),
            "a config with a key twice": overwrite("config.json", b'{"hidden_size": 8, "hidden_size": 16}'),
            "a config that is a string": overwrite("config.json", b'"x"'),
            "a config nested deeply": overwrite("config.json", b'{"a":' * 100_000),
            "a config of brackets": overwrite("config.json", BRACKETS),
            "a config of 17 MiB": lambda folder: os.truncate(folder / "config.json", 17 << 20),
        },
    ),
    *cases(
        "config-invalid",
        PLANNERS,
        {
            "a trillion layers": config(num_hidden_layers=10**12),
            "a million layers": config(num_hidden_layers=10**6),
            "minus one layer": config(num_hidden_layers=-1),
            "two and a half layers": config(num_hidden_layers=2.5),
            "layers in words": config(num_hidden_layers="2"),
            "a size that is not a number": config(hidden_size=float("nan")),
            "no architecture": config(architectures=[]),
            "an architecture with escape codes": config(architectures=["Llama\x1b[2J"]),
            "an architecture of a megabyte": config(architectures=["Llama" * 200_000]),
        },
    ),
    *cases("shape-mismatch", PLANNERS, {"a config of another size": config(hidden_size=2**39)}),
)
