"""Live models on real ranks: loaded from Hugging Face files and from Megatron checkpoints, handed out, saved again."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.megatron import require
from tests.models import BY_NAME, ModelSpec, logits_of, make_model
from tests.oracle import read_safetensors, same_bits
from tests.ranks.fleet import Ran, World
from tests.ranks.load_tasks import tokens_of

import shardway
from shardway.families.registry import families

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.ranks.fleet import Fleet

pytestmark = pytest.mark.timeout(300)

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures/hf"
Grid = dict[str, int]

DENSE: list[Grid] = [{}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"pp": 2, "vpp": 2}]
MOE: list[Grid] = [
    {"ep": 2},
    {"tp": 2, "ep": 2, "etp": 1},
    {"tp": 2, "ep": 2, "etp": 2},
    {"pp": 2, "ep": 2},
    {"tp": 2, "pp": 2, "ep": 2, "etp": 1},
]
GRIDS: dict[str, list[Grid]] = {
    "llama": DENSE,
    "qwen3": DENSE[:-1],
    "qwen3_moe": DENSE + MOE,
    "deepseek_v3": DENSE[:-1] + MOE,
    # A vocabulary that tensor parallelism pads, tied embeddings on two stages, biases, half a layer's files.
    "llama_odd_vocab": [{}, {"tp": 2}],
    "llama_biases": [{"tp": 2}],
    "qwen2_tied": [{"pp": 2}, {"tp": 2, "pp": 2}, {"pp": 2, "vpp": 2}],
    "deepseek_v3_mtp": [{}, {"pp": 2, "ep": 2, "first": 2}],
}
GPT_OSS = ModelSpec(
    name="gpt_oss",
    model="GptOssForCausalLM",
    config="GptOssConfig",
    overrides={
        "num_hidden_layers": 2,
        "head_dim": 16,
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 24,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 64,
            "truncate": False,
        },
        "max_position_embeddings": 2048,
    },
)
if any(GPT_OSS.model in family.architectures for family in families()):
    # megatron-core has biases of experts without expert tensor parallelism alone.
    GRIDS["gpt_oss"] = [
        {**grid, "etp": 1} if "tp" in grid else grid for grid in DENSE[:-1] + MOE if grid.get("etp") != 2
    ]
# The first is what megatron-core itself loads, without Transformer Engine.
IMPORTS: dict[str, list[dict[str, Any]]] = {
    "llama": [{}, {"layout": "per-layer"}],
    "qwen3": [{}, {"layout": "per-layer"}],
    "qwen3_moe": [{"spec": "local"}, {}, {"layout": "per-layer"}],
    "deepseek_v3": [{"spec": "local"}, {}],
    "llama_odd_vocab": [{}],
    "llama_biases": [{}],
    "qwen2_tied": [{}, {"layout": "per-layer"}],
    "deepseek_v3_mtp": [{"spec": "local"}, {}],
    "gpt_oss": [{"spec": "local"}, {}],
}
# What such a model computes, beside what its shapes say.
FIELDS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "add_bias_linear": False,
        "qk_layernorm": True,
        "rotary_scaling_factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "moe_layer_freq": [0, 1, 1, 1],
        "moe_shared_expert_intermediate_size": 32,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk": 4,
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_dtype": "fp32",
    }
}
# megatron-core judges a group of experts by its best num_experts_per_tok / topk_group, transformers by its best two.
EDITS: dict[str, dict[str, Any]] = {"deepseek_v3": {"num_experts_per_tok": 4}}
FIELDS["deepseek_v3_mtp"] = FIELDS["deepseek_v3"] | {"moe_layer_freq": [0, 1, 1], "mtp_num_layers": 1}
CASES = [(name, grid) for name, grids in GRIDS.items() for grid in grids]


def has_logits(case: tuple[str, Grid]) -> bool:
    """megatron-core wants labels for multi-token prediction, and a schedule for virtual stages."""
    return "vpp" not in case[1] and not case[0].endswith("mtp")


def ranks_of(grid: Grid) -> int:
    dense = grid.get("tp", 1)
    experts = grid.get("etp", dense) * grid.get("ep", 1)
    return grid.get("pp", 1) * max(dense, experts)


def named(case: tuple[str, Grid]) -> str:
    return "-".join([case[0], *(f"{name}{size}" for name, size in case[1].items())])


@pytest.fixture(scope="module")
def hf_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the Hugging Face directory of a model."""
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(name: str) -> Path:
        if not (FIXTURES / name).exists():
            return make_model({**BY_NAME, "gpt_oss": GPT_OSS}[name], root / name)
        shutil.copytree(FIXTURES / name, root / name)
        config = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps(config | EDITS.get(name, {})))
        return root / name

    return make


@pytest.fixture(scope="module")
def hf_logits(hf_of: Callable[[str], Path]) -> Callable[[str], Any]:
    def of(name: str) -> Any:
        vocab_size = json.loads((hf_of(name) / "config.json").read_text())["vocab_size"]
        return logits_of(hf_of(name), tokens_of(vocab_size)).numpy()

    return functools.cache(of)


@pytest.fixture(scope="module")
def ran(
    fleet: Fleet, hf_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[tuple[str, Grid]], tuple[Ran, Path]]:
    """Runs all grids of one model when the first of them is asked for: (what the ranks say, folder)."""
    require("transformers", "safetensors")
    root = tmp_path_factory.mktemp("loads")

    @functools.cache
    def run(name: str) -> dict[str, Ran] | AssertionError:
        hf = hf_of(name)
        imported = []
        for number, options in enumerate(IMPORTS[name]):
            imported.append(root / name / str(number))
            shardway.import_hf(hf, imported[-1], fsync=False, **options)
        worlds = []
        for case in CASES:
            if case[0] == name:
                task = {
                    "do": "through_a_grid",
                    "hf": str(hf),
                    "imported": [str(each / "iter_0000000") for each in imported],
                    "grid": case[1],
                    "fields": FIELDS.get(name, {}),
                    "save": str(root / "saved" / named(case)),
                }
                tasks: list[dict[str, Any]] = [task]
                if has_logits(case):
                    tasks.append(task | {"dtype": "float32", "save": None, "logits": str(root / f"{named(case)}.pt")})
                worlds.append(World(ranks=ranks_of(case[1]), tasks=tasks, model=None))
        try:
            ran = fleet.run(*worlds)
        except AssertionError as error:
            return error
        return dict(zip([named(case) for case in CASES if case[0] == name], ran, strict=True))

    def of(case: tuple[str, Grid]) -> tuple[Ran, Path]:
        found = run(case[0])
        if isinstance(found, AssertionError):
            raise found
        return found[named(case)], root

    return of


@pytest.mark.parametrize("case", CASES, ids=named)
def test_every_load_gives_what_megatron_core_loads(
    case: tuple[str, Grid], ran: Callable[[tuple[str, Grid]], tuple[Ran, Path]]
) -> None:
    """Compared bit by bit in the ranks; each reads its own bytes and no more."""
    outcomes = ran(case)[0].of(0)
    assert len(outcomes) == ranks_of(case[1])
    for outcome in outcomes:
        for read, num_bytes in zip(outcome.notes["read"], outcome.notes["bytes"], strict=True):
            assert 0 < read <= 1.05 * num_bytes  # less where a vocabulary is padded


@pytest.mark.parametrize("case", [case for case in CASES if has_logits(case)], ids=named)
def test_logits_agree_with_transformers(
    case: tuple[str, Grid],
    ran: Callable[[tuple[str, Grid]], tuple[Ran, Path]],
    hf_logits: Callable[[str], Any],
) -> None:
    import torch

    root = ran(case)[1]
    found = torch.load(root / f"{named(case)}.pt", weights_only=True)
    np.testing.assert_allclose(found.numpy(), hf_logits(case[0]), rtol=0, atol=2e-4)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_pieces_and_whole_tensors_are_all_of_the_model(
    case: tuple[str, Grid], ran: Callable[[tuple[str, Grid]], tuple[Ran, Path]], hf_of: Callable[[str], Path]
) -> None:
    outcomes = ran(case)[0].of(0)
    wanted = {name: tuple(tensor.shape) for name, tensor in read_safetensors(hf_of(case[0])).items()}
    exported = {name: tuple(shape) for outcome in outcomes for name, shape in outcome.notes["exported"].items()}
    assert exported == wanted
    for outcome in outcomes:
        order = list(outcome.notes["exported"])
        assert order == [name for name in exported_order(hf_of(case[0])) if name in set(order)]
    held = {name: np.zeros(shape, bool) for name, shape in wanted.items()}
    for outcome in outcomes:
        for name, slices in outcome.notes["pieces"]:
            held[name][tuple(slice(*each) for each in slices)] = True
    assert [name for name, mask in held.items() if not mask.all()] == []


def exported_order(hf: Path) -> list[str]:
    from shardway.families.config import HFConfig
    from shardway.families.mapping import map_model
    from shardway.formats.huggingface import open_huggingface

    mapping = map_model(HFConfig(open_huggingface(hf).config))
    return list(mapping.with_copies(mapping.restored).hf)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_saved_directory_is_the_original(
    case: tuple[str, Grid], ran: Callable[[tuple[str, Grid]], tuple[Ran, Path]], hf_of: Callable[[str], Path]
) -> None:
    root = ran(case)[1]
    before, after = read_safetensors(hf_of(case[0])), read_safetensors(root / "saved" / named(case))
    assert before.keys() == after.keys()
    assert [name for name in before if not same_bits(before[name], after[name])] == []
