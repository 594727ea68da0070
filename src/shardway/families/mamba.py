"""The Mamba 2 mixer, as hybrid models share it: one projection in, a convolution, a state space, a projection out.

megatron-core keeps what the projection and the convolution give apart, so that each is sharded by itself; Hugging Face
has them one above the other.

Source: megatron/core/ssm/mamba_mixer.py, `MambaMixer.sharded_state_dict` (0.16.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.families.rules import Rule, same, split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardway.families.config import HFConfig

# Extents: mi what the state space sees of a token, mh its heads, mg groups of them that share B and C, ms the size of
# its state, mc the width of the convolution.
_IN = (("z", "mi"), ("x", "mi"), ("B", "mg*ms"), ("C", "mg*ms"), ("dt", "mh"))
_CONVOLVED = _IN[1:4]


def mixer(at: str, hf: str, *, when: str = "", norm_when: str = "") -> tuple[Rule, ...]:
    """The rules of one mixer, but for the norm before it.

    Args:
        at: Template of the Megatron module, such as ``decoder.layers.{i}.mixer``.
        hf: The same of Hugging Face's.
        when: Flags and kinds of layer that have to hold.
        norm_when: The same for the norm inside it.
    """
    return (
        *(
            Rule(f"{at}.in_proj.weight.{name}", parts, when=when)
            for name, parts in split(f"{hf}.in_proj.weight", *_IN, trailing=("H",))
        ),
        *(
            Rule(f"{at}.conv1d.weight.{name}", parts, when=when)
            for name, parts in split(f"{hf}.conv1d.weight", *_CONVOLVED, trailing=("1", "mc"))
        ),
        *(
            Rule(f"{at}.conv1d.bias.{name}", parts, when=when)
            for name, parts in split(f"{hf}.conv1d.bias", *_CONVOLVED)
        ),
        Rule(f"{at}.dt_bias", same(f"{hf}.dt_bias", "mh"), when=when),
        Rule(f"{at}.A_log", same(f"{hf}.A_log", "mh"), when=when),
        Rule(f"{at}.D", same(f"{hf}.D", "mh"), when=when),
        Rule(f"{at}.norm.weight", same(f"{hf}.norm.weight", "mi"), when=f"{when} {norm_when}".strip()),
        Rule(f"{at}.out_proj.weight", same(f"{hf}.out_proj.weight", "H", "mi"), when=when),
    )


def dims(*, heads: int, head_dim: int, groups: int, state: int, width: int) -> dict[str, int]:
    """The extents that `mixer` refers to.

    Args:
        heads: Heads of the state space.
        head_dim: Size of each.
        groups: Groups of heads that share B and C.
        state: Size of the state.
        width: Width of the convolution.
    """
    return {"mi": heads * head_dim, "mh": heads, "mg": groups, "ms": state, "mc": width}


def require(config: HFConfig, *, absent: Sequence[str], conv_bias: str) -> None:
    """Refuse a model whose mixers megatron-core has no parameters for.

    Args:
        config: The model's config.json.
        absent: Keys that say whether linear layers have biases.
        conv_bias: Key that says whether the convolution has one.

    Raises:
        ShardwayError: `config-invalid`.
    """
    wrong = {key: True for key in absent if config.flag(key, default=False)}
    if not config.flag(conv_bias, default=True):
        wrong[conv_bias] = False
    if wrong:
        raise ShardwayError(
            Problem(
                code=Code.CONFIG_INVALID,
                what=f"{key} is {str(value).lower()}, which a hybrid model of megatron-core can't hold",
                facts=("its linear layers have no biases, its convolutions have",),
                file=config.file,
            )
            for key, value in wrong.items()
        )
