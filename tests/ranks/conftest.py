"""The process that the ranks of live saves are forked from, and the models that they save."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import TYPE_CHECKING, Any

import pytest
from tests.megatron import VOCABULARY_MULTIPLE, megatron_fields, require
from tests.models import BY_NAME
from tests.oracle import read_safetensors, same_bits
from tests.ranks.fleet import Fleet, World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from tests.conftest import Imported


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Runs worlds of ranks."""
    require("torch", "megatron.core")
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    yield made
    made.close()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """A transformers model whose family shardway knows, and its import, from which ranks load it."""

    hf: Path
    imported: Path
    fields: Mapping[str, Any]
    dtype: str
    scratch: Path

    def world(self, ranks: int, tasks: Sequence[Mapping[str, Any]], *, tp: int = 1, pp: int = 1, **rest: Any) -> World:
        """Ranks that have loaded the model; other keywords are those of `World`."""
        multiple = VOCABULARY_MULTIPLE * tp if tp > 1 else 1
        vocab_size = -(-self.fields["vocab_size"] // multiple) * multiple
        return World(
            ranks=ranks,
            tasks=tasks,
            model={**self.fields, "vocab_size": vocab_size},
            source=self.imported / "iter_0000000",
            dtype=self.dtype,
            grid={"tp": tp, "pp": pp},
            **rest,
        )

    def check(self, fleet: Fleet, roots: Mapping[Path, int]) -> None:
        """Iteration folders have the model's values (times their sign) for megatron-core and for an export."""
        import shardway

        before = read_safetensors(self.hf)
        for folder, sign in roots.items():
            out = self.scratch / str(len(list(self.scratch.iterdir())))
            shardway.export_hf(folder, out)
            after = read_safetensors(out)
            assert before.keys() == after.keys()
            assert [key for key in before if not same_bits(before[key] if sign > 0 else -before[key], after[key])] == []
        tasks = [{"do": "load", "checkpoint": folder, "sign": sign} for folder, sign in roots.items()]
        fleet.run(self.world(1, tasks))


@pytest.fixture(scope="session")
def known(
    hf_model: Callable[[str], Path], imported: Imported, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Known]:
    """Gives a model of ``tests.models``, with its import."""

    @functools.cache
    def make(name: str) -> Known:
        hf = hf_model(name)
        return Known(
            hf=hf,
            imported=imported(name),
            fields=megatron_fields(json.loads((hf / "config.json").read_text())),
            dtype=BY_NAME[name].dtype,
            scratch=tmp_path_factory.mktemp(f"exports_{name}"),
        )

    return make
