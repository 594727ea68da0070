"""The record: what is written is read, and what was changed is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from shardway.core.errors import ShardwayError
from shardway.formats.record import FileDigest, Record, read_record

if TYPE_CHECKING:
    from pathlib import Path

RECORD = Record(
    written_by="x",
    family=None,
    architecture="LlamaForCausalLM",
    source="s",
    options={"layout": "stacked", "number": 3},
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    variants={"fused": True},
    dtypes={"a": "bfloat16"},
    megatron_config={"num_layers": 2},
    digests={("a.\u00e9", (0, 1)): "a" * 32, ("scalar", ()): "b" * 32},
    files={".metadata": FileDigest(5, "c" * 32), "hf/config.json": FileDigest(2**40, "d" * 32)},
)


def test_written_is_read(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    (tmp_path / "shardway.json").write_bytes(RECORD.to_json())
    assert read_record(tmp_path) == RECORD


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b" ", lambda data: b" " + data])
def test_any_change_is_found(change: object, tmp_path: Path) -> None:
    assert callable(change)
    (tmp_path / "shardway.json").write_bytes(change(RECORD.to_json()))
    with pytest.raises(ShardwayError, match="record-invalid"):
        read_record(tmp_path)


def test_every_byte_counts(tmp_path: Path) -> None:
    data = RECORD.to_json()
    for at in range(len(data)):
        (tmp_path / "shardway.json").write_bytes(data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :])
        with pytest.raises(ShardwayError, match="record-invalid"):
            read_record(tmp_path)
