"""The mapping of one model: every tensor of both sides, enumerated, and the tiles between them, proven to cover."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shardway.core.collector import collector_paused
from shardway.core.errors import Code, Problems
from shardway.core.tiles import Tile, cover_fault
from shardway.families.layout import Layout, has_extra_state
from shardway.families.registry import family_of
from shardway.families.rules import expand

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardway.core.tensors import Shape
    from shardway.families.config import HFConfig
    from shardway.families.rules import Expanded, Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMapping:
    """How the tensors of one model translate; complete and proven, so whatever is not in it is an error.

    Attributes:
        family: Name of the family.
        architecture: The Hugging Face class.
        layout: How its layers lie on disk on the Megatron side.
        tiles: The mosaic. On both sides every element of every tensor lies in exactly one tile.
        hf: Shape of every Hugging Face tensor, in the order in which an export writes them.
        mcore: Global shape of every Megatron tensor, by its key on disk.
        extra_state: Keys of the ``_extra_state`` objects that a default-strictness load asks for.
        aliases: Hugging Face tensors that may be present as exact copies of another one, and which.
        ignored: Matches Hugging Face tensors that may be present and carry nothing.
        megatron_config: Fields of megatron-core's TransformerConfig and GPTModel.
        caveats: What a Megatron model with that config would do otherwise than transformers, one sentence each.
    """

    family: str
    architecture: str
    layout: Layout
    tiles: tuple[Tile, ...]
    hf: Mapping[str, Shape]
    mcore: Mapping[str, Shape]
    extra_state: tuple[str, ...]
    aliases: Mapping[str, str]
    ignored: re.Pattern[str]
    megatron_config: Mapping[str, object]
    caveats: tuple[str, ...]

    def with_copies(self, copies: Mapping[str, str]) -> ModelMapping:
        """The mapping that also writes each of `copies` (name: which tensor it copies) on the Hugging Face side."""
        tiles = list(self.tiles)
        for tile in self.tiles:
            tiles += [
                tile._replace(hf=tile.hf._replace(tensor=name)) for name, of in copies.items() if of == tile.hf.tensor
            ]
        hf = dict(self.hf) | {name: self.hf[of] for name, of in copies.items()}
        return replace(self, tiles=tuple(tiles), hf=hf)


@collector_paused()
def map_model(config: HFConfig, layout: Layout = Layout.STACKED) -> ModelMapping:
    """Enumerate both sides of a model and prove that its tiles cover each exactly once.

    Args:
        config: The model's config.json.
        layout: How the Megatron side stores layers.

    Raises:
        ShardwayError: `architecture-unsupported`, `config-invalid`; `coverage` if the family's own rules are wrong.
    """
    family = family_of(config)
    dims, flags = family.dims(config), family.flags_of(config)
    num_layers = dims["L"]
    stacked = layout is Layout.STACKED
    tiles: list[Tile] = []
    hf: dict[str, Shape] = {}
    mcore: dict[str, Shape] = {}
    extra_state: list[str] = []

    rules = [(rule, expand(rule.source, dims)) for rule in family.rules if rule.applies(flags)]
    if stacked:
        rules = [(rule, parts.stack(num_layers) if rule.per_layer else parts) for rule, parts in rules]
    first_layer = next(k for k, (rule, _) in enumerate(rules) if rule.per_layer)
    ordered: list[tuple[Rule, Expanded, int | None]] = [(rule, parts, None) for rule, parts in rules[:first_layer]]
    ordered += [(rule, parts, i) for i in range(num_layers) for rule, parts in rules if rule.per_layer]
    ordered += [(rule, parts, None) for rule, parts in rules[first_layer:] if not rule.per_layer]
    keys: dict[str, str] = {}  # one string for all layers that share a key
    for rule, parts, layer in ordered:
        key = layout.key(rule.mcore, layer)
        key = keys.setdefault(key, key)
        mcore[key] = parts.mcore_shape
        for shape, tile in parts.tiles(key, layer):
            hf[tile.hf.tensor] = shape
            tiles.append(tile)
        if has_extra_state(rule.mcore):
            extra_state.append(layout.extra_state_key(rule.mcore, layer, num_layers))
    ignored = "|".join(re.escape(template).replace(r"\{i\}", r"\d+") for template in family.ignored)
    _prove(tiles, hf, mcore)
    return ModelMapping(
        family=family.name,
        architecture=config.architecture,
        layout=layout,
        tiles=tuple(tiles),
        hf=hf,
        mcore=mcore,
        extra_state=tuple(extra_state),
        aliases={"lm_head.weight": "model.embed_tokens.weight"} if flags["tied"] else {},
        ignored=re.compile(ignored or r"(?!)"),
        megatron_config=family.megatron_config(config),
        caveats=tuple(family.caveats(config)),
    )


def _prove(tiles: list[Tile], hf: Mapping[str, Shape], mcore: Mapping[str, Shape]) -> None:
    problems = Problems()
    for shapes, is_mcore in ((hf, False), (mcore, True)):
        on: dict[str, list[Tile]] = {name: [] for name in shapes}
        for tile in tiles:
            on[(tile.mcore if is_mcore else tile.hf).tensor].append(tile)
        for name, shape in shapes.items():
            fault = cover_fault(shape, on[name], mcore=is_mcore)
            if fault:
                problems.add(
                    Code.COVERAGE,
                    f"the rules cover a part of {name} {fault.times} times"
                    if fault.times >= 0
                    else f"the rules reach outside of {name}",
                    tensor=name,
                    facts=(f"box from {list(fault.box.start)} of extent {list(fault.box.size)}, shape {list(shape)}",),
                    cure="this is a defect of the family's rules; nothing was written",
                )
    problems.raise_if_any()
