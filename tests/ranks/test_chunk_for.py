"""How much torch's own reader fetches for each rank of a job: of chunks that were cut for it, and of the usual ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.megatron import require
from tests.ranks.fleet import World
from tests.ranks.test_live_load import EDITS, FIELDS

import shardway

if TYPE_CHECKING:
    from tests.ranks.fleet import Fleet, Ran

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures/hf"
# The model, the job, and how much more than its own a rank reads of the usual chunks, at least.
CASES: list[tuple[str, dict[str, int], float]] = [
    ("llama", {"tp": 2}, 1.9),
    ("llama", {"pp": 2}, 1.0),
    ("qwen3_moe", {"tp": 2, "ep": 1, "etp": 2}, 1.9),
    ("qwen3_moe", {"tp": 1, "ep": 2, "etp": 1}, 1.0),
    ("qwen3_moe", {"tp": 2, "ep": 2, "etp": 1}, 1.1),
    ("deepseek_v3", {"tp": 2, "ep": 1, "etp": 2}, 1.7),
]


def named(case: tuple[str, dict[str, int], float]) -> str:
    return "-".join([case[0], *(f"{name}{size}" for name, size in case[1].items())])


@pytest.fixture(scope="module")
def ran(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """What the ranks of every case say: of the usual chunks, of those that an import and that a migration cut."""
    require("transformers", "safetensors")
    root = tmp_path_factory.mktemp("chunks")
    worlds = []
    for case in CASES:
        name, grid, _ = case
        place = root / named(case)
        shutil.copytree(FIXTURES / name, place / "hf")
        config = json.loads((place / "hf/config.json").read_text())
        (place / "hf/config.json").write_text(json.dumps(config | EDITS.get(name, {})))
        job = ",".join(f"{each}={size}" for each, size in grid.items())
        shardway.import_hf(place / "hf", place / "usual", spec="local", fsync=False)
        shardway.import_hf(place / "hf", place / "cut", spec="local", chunk_for=job, verify=True, fsync=False)
        shardway.migrate(place / "usual", place / "migrated", chunk_for=job, verify=True, fsync=False)
        task: dict[str, Any] = {
            "do": "read_by_torch",
            "hf": str(place / "hf"),
            "checkpoints": [str(place / each / "iter_0000000") for each in ("usual", "cut", "migrated")],
            "grid": grid,
            "fields": FIELDS.get(name, {}) | ({"moe_shared_expert_overlap": False} if name == "deepseek_v3" else {}),
        }
        worlds.append(World(ranks=2, tasks=[task], model=None))
    return dict(zip(map(named, CASES), fleet.run(*worlds), strict=True))


@pytest.mark.parametrize("case", CASES, ids=named)
def test_no_rank_reads_what_belongs_to_another(case: tuple[str, dict[str, int], float], ran: dict[str, Ran]) -> None:
    outcomes = ran[named(case)].of(0)
    assert len(outcomes) == 2
    for outcome in outcomes:
        usual, cut, migrated = (fetched / outcome.notes["held"] for fetched in outcome.notes["fetched"])
        assert usual >= case[2]
        assert 0.98 <= cut <= 1.02
        assert migrated == cut
