"""Which family serves an architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.families.bailing import BAILING_MOE_V2
from shardway.families.decilm import DECILM
from shardway.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2
from shardway.families.ernie import ERNIE4_5_MOE
from shardway.families.falcon_h1 import FALCON_H1
from shardway.families.gemma import GEMMA, GEMMA2, GEMMA3
from shardway.families.glm import GLM4_MOE
from shardway.families.glm_mla import GLM4_MOE_LITE, GLM_MOE_DSA
from shardway.families.gpt_oss import GPT_OSS
from shardway.families.llama import LLAMA
from shardway.families.mimo import MIMO
from shardway.families.minimax import MINIMAX_M2
from shardway.families.mistral import MISTRAL
from shardway.families.mixtral import MIXTRAL
from shardway.families.nemotron import NEMOTRON
from shardway.families.nemotron_h import NEMOTRON_H
from shardway.families.olmo import EXAONE4, OLMO2
from shardway.families.olmoe import OLMOE
from shardway.families.phi import PHI3
from shardway.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from shardway.families.qwen_hybrid import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT

if TYPE_CHECKING:
    from shardway.families.config import HFConfig
    from shardway.families.family import Family

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    DEEPSEEK_V3,
    MIXTRAL,
    OLMOE,
    MINIMAX_M2,
    GLM4_MOE,
    GPT_OSS,
    BAILING_MOE_V2,
    ERNIE4_5_MOE,
    GEMMA,
    GEMMA2,
    GEMMA3,
    NEMOTRON,
    PHI3,
    OLMO2,
    EXAONE4,
    MIMO,
    DECILM,
    NEMOTRON_H,
    DEEPSEEK_V2,
    KIMI_K2,
    GLM4_MOE_LITE,
    GLM_MOE_DSA,
    # A Megatron config that says nothing of the router's type is that of Qwen3.5.
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_NEXT,
    FALCON_H1,
)
_BY_ARCHITECTURE = {architecture: family for family in FAMILIES for architecture in family.architectures}


def register(family: Family) -> None:
    """Let a family of one's own serve its architectures, in this process, before those that shardway has.

    Args:
        family: The family; `shardway.testing.families.check_family` says whether it keeps what shardway promises.
    """
    _BY_ARCHITECTURE.update(dict.fromkeys(family.architectures, family))


def family_of(config: HFConfig) -> Family:
    """The family that serves the config's architecture.

    Raises:
        ShardwayError: `architecture-unsupported`, with the nearest name and all that are supported.
    """
    architecture = config.architecture
    try:
        return _BY_ARCHITECTURE[architecture]
    except KeyError:
        from difflib import get_close_matches

        near = get_close_matches(architecture, _BY_ARCHITECTURE, n=1, cutoff=0.5)
        raise ShardwayError(
            Problem(
                code=Code.ARCHITECTURE_UNSUPPORTED,
                what=f"no family of models is known for the architecture {architecture}",
                facts=(
                    *(f"nearest supported: {name}" for name in near),
                    f"supported: {', '.join(sorted(_BY_ARCHITECTURE))}",
                ),
                file=config.file,
                cure="`shardway families` lists what is supported",
            )
        ) from None
