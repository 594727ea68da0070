"""Which family serves an architecture."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError

if TYPE_CHECKING:
    from shardway.families.config import HFConfig
    from shardway.families.family import Family

# The module and the name of each family, which is imported when it is asked for: start-up is faster so.
_FAMILIES = {
    "LlamaForCausalLM": "llama.LLAMA",
    "MistralForCausalLM": "mistral.MISTRAL",
    "Qwen2ForCausalLM": "qwen.QWEN2",
    "Qwen3ForCausalLM": "qwen.QWEN3",
    "Qwen3MoeForCausalLM": "qwen.QWEN3_MOE",
    "DeepseekV3ForCausalLM": "deepseek.DEEPSEEK_V3",
    "MixtralForCausalLM": "mixtral.MIXTRAL",
    "OlmoeForCausalLM": "olmoe.OLMOE",
    "MiniMaxM2ForCausalLM": "minimax.MINIMAX_M2",
    "Glm4MoeForCausalLM": "glm.GLM4_MOE",
    "GptOssForCausalLM": "gpt_oss.GPT_OSS",
    "BailingMoeV2ForCausalLM": "bailing.BAILING_MOE_V2",
    "Ernie4_5_MoeForCausalLM": "ernie.ERNIE4_5_MOE",
    "GemmaForCausalLM": "gemma.GEMMA",
    "Gemma2ForCausalLM": "gemma.GEMMA2",
    "Gemma3ForCausalLM": "gemma.GEMMA3",
    "NemotronForCausalLM": "nemotron.NEMOTRON",
    "Phi3ForCausalLM": "phi.PHI3",
    "Olmo2ForCausalLM": "olmo.OLMO2",
    "Exaone4ForCausalLM": "olmo.EXAONE4",
    "MiMoForCausalLM": "mimo.MIMO",
    "DeciLMForCausalLM": "decilm.DECILM",
    "NemotronHForCausalLM": "nemotron_h.NEMOTRON_H",
    "DeepseekV2ForCausalLM": "deepseek.DEEPSEEK_V2",
    "KimiK2ForCausalLM": "deepseek.KIMI_K2",
    "Glm4MoeLiteForCausalLM": "glm_mla.GLM4_MOE_LITE",
    "GlmMoeDsaForCausalLM": "glm_mla.GLM_MOE_DSA",
    # A Megatron config that says nothing of the router's type is that of Qwen3.5.
    "Qwen3_5ForCausalLM": "qwen_hybrid.QWEN3_5",
    "Qwen3_5MoeForCausalLM": "qwen_hybrid.QWEN3_5_MOE",
    "Qwen3NextForCausalLM": "qwen_hybrid.QWEN3_NEXT",
    "FalconH1ForCausalLM": "falcon_h1.FALCON_H1",
}
_REGISTERED: dict[str, Family] = {}


def families() -> tuple[Family, ...]:
    """The families that shardway has, in the order in which a checkpoint without an HF config is held against them."""
    return tuple(map(_family, dict.fromkeys(_FAMILIES.values())))


@cache
def _family(place: str) -> Family:
    module, name = place.split(".")
    family: Family = getattr(import_module(f"shardway.families.{module}"), name)
    return family


def register(family: Family) -> None:
    """Let a family of one's own serve its architectures, in this process, before those that shardway has.

    Args:
        family: The family; `shardway.testing.families.check_family` says whether it keeps what shardway promises.
    """
    _REGISTERED.update(dict.fromkeys(family.architectures, family))


def family_of(config: HFConfig) -> Family:
    """The family that serves the config's architecture.

    Raises:
        ShardwayError: `architecture-unsupported`, with the nearest name and all that are supported.
    """
    architecture = config.architecture
    if architecture in _REGISTERED:
        return _REGISTERED[architecture]
    if architecture in _FAMILIES:
        return _family(_FAMILIES[architecture])
    from difflib import get_close_matches

    known = sorted({*_FAMILIES, *_REGISTERED})
    near = get_close_matches(architecture, known, n=1, cutoff=0.5)
    raise ShardwayError(
        Problem(
            code=Code.ARCHITECTURE_UNSUPPORTED,
            what=f"no family of models is known for the architecture {architecture}",
            facts=(
                *(f"nearest supported: {name}" for name in near),
                f"supported: {', '.join(known)}",
            ),
            file=config.file,
            cure="`shardway families` lists what is supported",
        )
    )
