"""A model family: its rules, the dimensions and flags that a config gives them, and its Megatron config."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shardway.families.config import HFConfig
    from shardway.families.rules import Rule

Dims = Mapping[str, int]

Flags = Mapping[str, "bool | str | Callable[[HFConfig], bool]"]

_MOST_LAYERS = 100_000  # every layer is enumerated, so a config must not be able to ask for billions

# Megatron's name for the dimensions that every config has under one name or another.
_DIMENSIONS = {
    "L": "num_layers",
    "H": "hidden_size",
    "F": "ffn_hidden_size",
    "nq": "num_attention_heads",
    "G": "num_query_groups",
    "d": "kv_channels",
    "V": "vocab_size",
    "E": "num_moe_experts",
    "Fe": "moe_ffn_hidden_size",
    "Fs": "moe_shared_expert_intermediate_size",
}


class Field(NamedTuple):
    """A config value that both sides have, under two names.

    Attributes:
        hf: Key in config.json.
        mcore: Field of megatron-core's TransformerConfig or GPTModel.
        default: What an absent key means; None leaves the field out.
    """

    hf: str
    mcore: str
    default: int | float | bool | str | None = None


class Layer(NamedTuple):
    """What is particular about one layer.

    Attributes:
        kinds: Words that `Rule.when` may ask for: ``moe``, ``mamba``, ...
        dims: Dimensions in which it differs from the model's.
        names: Placeholders beside the stack's own, such as ``n`` for the number under which Hugging Face has it.
    """

    kinds: frozenset[str] = frozenset()
    dims: Mapping[str, int] = {}
    names: Mapping[str, int] = {}


class Variant(NamedTuple):
    """A flag that the names of the tensors decide, where one model comes in several forms.

    Attributes:
        flag: The flag.
        hf: Matches the start of a Hugging Face name that only this form has.
        mcore: The same for a Megatron key.
        default: What holds where names decide nothing.
    """

    flag: str
    hf: str = ""
    mcore: str = ""
    default: bool = False


class Alias(NamedTuple):
    """A Hugging Face tensor that may be present as an exact copy of another one, which alone Megatron stores.

    Attributes:
        hf: Template of its name.
        of: The tensor that it copies.
        when: Flags that have to hold, as in `Rule.when`.
        restored: Whether an export writes it where nothing is known about the source.
    """

    hf: str
    of: str
    when: str = ""
    restored: bool = False


class Provider(NamedTuple):
    """What Megatron Bridge builds a model of the family with, beside the fields of megatron-core's config.

    Attributes:
        target: Dotted name of its class.
        fields: Further fields of that class, as YAML has them.
        vocabulary_multiple: What it pads the vocabulary to a multiple of; None for the largest power of two up to 128
            that the vocabulary is a multiple of.
        layer_spec: Dotted name of the function that gives the layers, where the class's own isn't the one.
        layer_options: What that function is called with beside the config.
    """

    target: str = "megatron.bridge.models.gpt_provider.GPTModelProvider"
    fields: Mapping[str, object] = {}
    vocabulary_multiple: int | None = None
    layer_spec: str = ""
    layer_options: Mapping[str, object] = {"use_transformer_engine": True}


def no_stacks(_: HFConfig, __: Dims) -> dict[str, Sequence[Layer]]:
    """The layers of a model that are all alike."""
    return {}


class Family(NamedTuple):
    """How the checkpoints of some architectures translate, as data.

    Attributes:
        name: Short name, such as ``llama``.
        architectures: Classes in ``config.architectures`` that it serves.
        rules: The Megatron tensors and what they are made of.
        dims: Computes the extents that rules refer to. L layers, H hidden, F ffn, V vocabulary, nq heads, G query
            groups, r heads per group, d head size, E experts, Fe ffn of an expert; others as a family needs them.
        flags: Flags that rules refer to: a constant, the config key that decides (absent means false), or a function.
        stacks: The layers by the placeholder that runs over them: ``i`` the decoder's, ``k`` those of multi-token
            prediction, ``j`` the layers inside these. Without ``i`` all L layers of the decoder are alike.
        kinds: The kinds of layer that there are.
        per_layer: Megatron keeps the decoder's layers apart even where they are all alike.
        variants: Flags that the tensors' names decide.
        aliases: Tensors that may be present as copies of others.
        extra_state: Modules that keep an ``_extra_state`` beside those that `layout.has_extra_state` names.
        tied_by_default: What an absent ``tie_word_embeddings`` means.
        provider: What Megatron Bridge builds such a model with.
        hf_keys: Keys of config.json for dimensions that most families have under another key (`restore.DIMENSIONS`).
        restore: Computes from Megatron config fields what config.json has beside dimensions and `fields`; None for
            families whose config.json can't be told from Megatron's.
        fields: Config values that carry over under another name.
        constants: Megatron config fields that hold for every model of the family.
        derived: Computes further Megatron config fields from the config.
        caveats: What a Megatron model with the translated config would do otherwise, one sentence each.
        ignored: Templates of Hugging Face tensors that may be present and hold nothing that a config doesn't say.
    """

    name: str
    architectures: tuple[str, ...]
    rules: tuple[Rule, ...]
    dims: Callable[[HFConfig], dict[str, int]]
    flags: Flags
    constants: Mapping[str, object]
    derived: Callable[[HFConfig], dict[str, object]]
    caveats: Callable[[HFConfig], list[str]]
    stacks: Callable[[HFConfig, Dims], Mapping[str, Sequence[Layer]]] = no_stacks
    kinds: tuple[str, ...] = ()
    per_layer: bool = False
    variants: tuple[Variant, ...] = ()
    aliases: tuple[Alias, ...] = ()
    extra_state: tuple[str, ...] = ()
    tied_by_default: bool = False
    provider: Provider = Provider()
    hf_keys: Mapping[str, str] = {}
    restore: Callable[[Mapping[str, object]], dict[str, object]] | None = None
    fields: tuple[Field, ...] = ()
    ignored: tuple[str, ...] = ()

    def layers_of(self, config: HFConfig, dims: Dims) -> dict[str, Sequence[Layer]]:
        """The layers by the placeholder that runs over them, the decoder's under ``i``.

        Raises:
            ShardwayError: `config-invalid` where the config contradicts itself.
        """
        if dims["L"] > _MOST_LAYERS:
            raise config.invalid("num_hidden_layers", dims["L"], f"at most {_MOST_LAYERS}")
        return {"i": (Layer(),) * dims["L"], **self.stacks(config, dims)}

    def flags_of(self, config: HFConfig, variants: Mapping[str, bool]) -> frozenset[str]:
        """The flags that hold for a model with this config in these variants."""
        flags = {
            name: value if isinstance(value, bool) else self._decide(config, value)
            for name, value in self.flags.items()
        }
        flags["tied"] = config.flag("tie_word_embeddings", default=self.tied_by_default)
        flags |= {variant.flag: variants.get(variant.flag, variant.default) for variant in self.variants}
        return frozenset(name for name, value in flags.items() if value)

    def _decide(self, config: HFConfig, value: str | Callable[[HFConfig], bool]) -> bool:
        return config.flag(value, default=False) if isinstance(value, str) else value(config)

    def variants_in(
        self,
        hf: Iterable[str] | None = None,
        mcore: Iterable[str] | None = None,
        recorded: Mapping[str, bool] | None = None,
    ) -> dict[str, bool]:
        """The variants that tensors show by their names, on either side.

        Args:
            hf: Names of all Hugging Face tensors, where they are known.
            mcore: Keys of all Megatron tensors, where they are known.
            recorded: What is known from elsewhere, for the variants that names decide nothing about.
        """
        found = {variant.flag: variant.default for variant in self.variants}
        found |= {flag: value for flag, value in (recorded or {}).items() if flag in found}
        found |= self._shown(mcore, {variant.flag: variant.mcore for variant in self.variants})
        return found | self._shown(hf, {variant.flag: variant.hf for variant in self.variants})

    def _shown(self, names: Iterable[str] | None, patterns: Mapping[str, str]) -> dict[str, bool]:
        asked = {flag: re.compile(pattern) for flag, pattern in patterns.items() if pattern}
        if names is None or not asked:
            return {}
        shown = dict.fromkeys(asked, False)
        for name in names:
            for flag, pattern in asked.items():
                if not shown[flag] and pattern.match(name):
                    shown[flag] = True
        return shown

    def megatron_config(self, config: HFConfig, flags: frozenset[str]) -> dict[str, object]:
        """Fields of megatron-core's TransformerConfig and GPTModel for a model with this config."""
        dims = self.dims(config)
        translated: dict[str, object] = {name: dims[word] for word, name in _DIMENSIONS.items() if word in dims}
        translated["share_embeddings_and_output_weights"] = "tied" in flags
        for one in self.fields:
            value = config.get(one.hf)
            value = one.default if value is None else value
            if value is not None:
                translated[one.mcore] = value
        return translated | dict(self.constants) | self.derived(config)
