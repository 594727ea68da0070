"""A model family: its rules, the dimensions and flags that a config gives them, and its Megatron config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shardway.families.config import HFConfig
    from shardway.families.rules import Rule


_MOST_LAYERS = 100_000  # every layer is enumerated, so a config must not be able to ask for billions


@dataclass(frozen=True, slots=True)
class Field:
    """A config value that both sides have, under two names.

    Attributes:
        hf: Key in config.json.
        mcore: Field of megatron-core's TransformerConfig or GPTModel.
        default: What an absent key means; None leaves the field out.
    """

    hf: str
    mcore: str
    default: int | float | bool | str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the checkpoints of some architectures translate, as data.

    Attributes:
        name: Short name, such as ``llama``.
        architectures: Classes in ``config.architectures`` that it serves.
        rules: The Megatron tensors and what they are made of.
        flags: Flags that rules refer to: a constant, or the config key that decides (absent means false).
        tied_by_default: What an absent ``tie_word_embeddings`` means.
        head_dim: What an absent ``head_dim`` means; None for hidden size over heads.
        fields: Config values that carry over under another name.
        constants: Megatron config fields that hold for every model of the family.
        derived: Computes further Megatron config fields from the config.
        caveats: What a Megatron model with the translated config would do otherwise, one sentence each.
        ignored: Templates of Hugging Face tensors that may be present and hold nothing that a config doesn't say.
    """

    name: str
    architectures: tuple[str, ...]
    rules: tuple[Rule, ...]
    flags: Mapping[str, bool | str]
    tied_by_default: bool = False
    head_dim: int | None = None
    fields: tuple[Field, ...] = ()
    constants: Mapping[str, object]
    derived: Callable[[HFConfig], dict[str, object]]
    caveats: Callable[[HFConfig], list[str]]
    ignored: tuple[str, ...] = ()

    def dims(self, config: HFConfig) -> dict[str, int]:
        """The extents that rules refer to.

        L layers, H hidden, F ffn, V vocabulary, nq heads, G query groups, r heads per group, d head size.

        Raises:
            ShardwayError: `config-invalid` for values that are missing or contradict each other.
        """
        hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
        groups = config.count("num_key_value_heads", heads)
        if heads % groups:
            raise ShardwayError(
                Problem(
                    code=Code.CONFIG_INVALID,
                    what=f"{heads} attention heads can't be shared evenly by {groups} key-value heads",
                    facts=(f"num_attention_heads {heads} % num_key_value_heads {groups} = {heads % groups}",),
                    file=config.file,
                )
            )
        fallback = self.head_dim
        if fallback is None and config.get("head_dim") is None:
            if hidden % heads:
                raise ShardwayError(
                    Problem(
                        code=Code.CONFIG_INVALID,
                        what=f"hidden_size {hidden} is no multiple of {heads} attention heads, and head_dim is missing",
                        file=config.file,
                    )
                )
            fallback = hidden // heads
        layers = config.count("num_hidden_layers")
        if layers > _MOST_LAYERS:
            raise config.invalid("num_hidden_layers", layers, f"at most {_MOST_LAYERS}")
        return {
            "L": layers,
            "H": hidden,
            "F": config.count("intermediate_size"),
            "V": config.count("vocab_size"),
            "nq": heads,
            "G": groups,
            "r": heads // groups,
            "d": config.count("head_dim", fallback),
        }

    def flags_of(self, config: HFConfig) -> dict[str, bool]:
        """The flags of a model with this config."""
        flags = {
            name: value if isinstance(value, bool) else config.flag(value, default=False)
            for name, value in self.flags.items()
        }
        flags["tied"] = config.flag("tie_word_embeddings", default=self.tied_by_default)
        return flags

    def megatron_config(self, config: HFConfig) -> dict[str, object]:
        """Fields of megatron-core's TransformerConfig and GPTModel for a model with this config."""
        dims = self.dims(config)
        translated: dict[str, object] = {
            "num_layers": dims["L"],
            "hidden_size": dims["H"],
            "ffn_hidden_size": dims["F"],
            "num_attention_heads": dims["nq"],
            "num_query_groups": dims["G"],
            "kv_channels": dims["d"],
            "vocab_size": dims["V"],
            "share_embeddings_and_output_weights": self.flags_of(config)["tied"],
        }
        for field in self.fields:
            value = config.get(field.hf)
            value = field.default if value is None else value
            if value is not None:
                translated[field.mcore] = value
        return translated | dict(self.constants) | self.derived(config)
