"""The mapping of one model: every tensor of both sides, enumerated, and the tiles between them, proven to cover."""

from __future__ import annotations

import itertools
import re
from array import array
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.collector import collector_paused
from shardway.core.errors import Code, Problem, Problems, ShardwayError
from shardway.core.tiles import Tile, cover_fault
from shardway.families.family import Layer
from shardway.families.layout import Layout, extra_state_keys, extra_state_module
from shardway.families.registry import family_of
from shardway.families.rules import expand, fill, holds, placeholders

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from shardway.core.tensors import Shape
    from shardway.families.config import HFConfig
    from shardway.families.family import Dims, Family, Provider
    from shardway.families.rules import Expanded, Placeholders, Rule

# Where a config.json says how many layers of multi-token prediction there are.
_PROMISES = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


class ModelMapping(NamedTuple):
    """How the tensors of one model translate; complete and proven, so whatever is not in it is an error.

    Attributes:
        family: Name of the family.
        architecture: The Hugging Face class.
        layout: How the layers of its decoder lie on disk on the Megatron side.
        variants: The form that the tensors are in, where the family knows several.
        tiles: The mosaic. On both sides every element of every tensor lies in exactly one tile.
        run_kinds: Tiles come in runs, each of which fills one Megatron tensor or one layer of it: for each run the
            number of its kind. Those of a kind are alike but for names and for where they are on the first axis.
        run_lengths: For each kind of run, how many tiles it has.
        hf: Shape of every Hugging Face tensor, in the order in which an export writes them.
        mcore: Global shape of every Megatron tensor, by its key on disk.
        dtypes: Megatron tensors that are held in a type of their own whatever the source's is, by torch's name.
        shifts: Megatron tensors whose values are the source's plus a number, computed in float32, and that number.
        extra_state: Keys of the ``_extra_state`` objects that a default-strictness load asks for.
        aliases: Hugging Face tensors that may be present as exact copies of another one, and which.
        restored: Those of the aliases that an export writes where nothing is known about the source.
        ignored: Matches Hugging Face tensors that may be present and carry nothing.
        megatron_config: Fields of megatron-core's TransformerConfig and GPTModel.
        provider: What Megatron Bridge builds such a model with.
        content_metadata: What a loader reads to build the matching sharded state dict.
        caveats: What a Megatron model with that config would do otherwise than transformers, one sentence each.
    """

    family: str
    architecture: str
    layout: Layout
    variants: Mapping[str, bool]
    tiles: tuple[Tile, ...]
    run_kinds: Sequence[int]
    run_lengths: Sequence[int]
    hf: Mapping[str, Shape]
    mcore: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    shifts: Mapping[str, float]
    extra_state: tuple[str, ...]
    aliases: Mapping[str, str]
    restored: Mapping[str, str]
    ignored: re.Pattern[str]
    megatron_config: Mapping[str, object]
    provider: Provider
    content_metadata: Mapping[str, object]
    caveats: tuple[str, ...]

    def runs(self) -> Iterator[tuple[int, int, tuple[Tile, ...]]]:
        """The tiles run by run: the number of its kind, the place of its first tile, and its tiles."""
        begin = 0
        for kind in self.run_kinds:
            end = begin + self.run_lengths[kind]
            yield kind, begin, self.tiles[begin:end]
            begin = end

    def with_copies(self, copies: Mapping[str, str]) -> ModelMapping:
        """The mapping that also writes each of `copies` (name: which tensor it copies) on the Hugging Face side."""
        if not copies:
            return self
        named: dict[str, list[str]] = {}
        for name, of in copies.items():
            named.setdefault(of, []).append(name)
        tiles = list(self.tiles)
        for tile in self.tiles:
            tiles += [tile._replace(hf=tile.hf._replace(tensor=name)) for name in named.get(tile.hf.tensor, ())]
        hf = dict(self.hf) | {name: self.hf[of] for name, of in copies.items()}
        return self._replace(tiles=tuple(tiles), hf=hf)


def variants_in(
    config: HFConfig,
    *,
    hf: Iterable[str] | None = None,
    mcore: Iterable[str] | None = None,
    recorded: Mapping[str, bool] | None = None,
) -> dict[str, bool]:
    """In which of the forms that its family knows a model is, by the names of its tensors.

    Args:
        config: The model's config.json.
        hf: Names of all Hugging Face tensors, where they are known.
        mcore: Keys of all Megatron tensors, where they are known.
        recorded: What is known from elsewhere, for forms that names decide nothing about.

    Raises:
        ShardwayError: `architecture-unsupported`, `config-invalid`.
    """
    return family_of(config).variants_in(hf, mcore, recorded)


@collector_paused()
def map_model(
    config: HFConfig,
    layout: Layout | None = None,
    *,
    variants: Mapping[str, bool] | None = None,
    known: Iterable[str] = (),
) -> ModelMapping:
    """Enumerate both sides of a model and prove that its tiles cover each exactly once.

    Args:
        config: The model's config.json.
        layout: How the Megatron side stores the decoder's layers; None for what megatron-core does with such a model.
        variants: The form that the tensors are in, as `variants_in` finds it; by default that of published models.
        known: Names of tensors and objects that are in memory already; the mapping refers to these strings and keeps
            none of its own for them.

    Raises:
        ShardwayError: `architecture-unsupported`, `config-invalid`; `option-invalid` for layers that can't be stacked;
            `coverage` if the family's own rules are wrong.
    """
    family = family_of(config)
    chosen = family.variants_in(recorded=variants)
    dims, flags = family.dims(config), family.flags_of(config, chosen)
    stacks = family.layers_of(config, dims)
    alike = len({(layer.kinds, tuple(sorted(layer.dims.items()))) for layer in stacks["i"]}) == 1
    natural = Layout.STACKED if alike and not family.per_layer else Layout.PER_LAYER
    if layout is Layout.STACKED and not alike:
        raise ShardwayError(_not_stackable(config))
    layout = layout or natural
    tiles: list[Tile] = []
    hf: dict[str, Shape] = {}
    mcore: dict[str, Shape] = {}
    dtypes: dict[str, str] = {}
    shifts: dict[str, float] = {}
    extra_state = dict.fromkeys(f"{module}._extra_state/shard_0_1" for module in family.extra_state)
    shared = {name: name for name in known}
    bases: dict[Shape, Shape] = {}
    run_kinds = array("I")
    run_lengths: list[int] = []
    first_runs: list[int] = []
    proof = _Proof()
    for like, names, place in _enumerate(family, dims, flags, stacks, layout):
        begin = len(tiles)
        if like.number == len(first_runs):
            first_runs.append(len(run_lengths))
            run_lengths += [member.parts.num_tiles for member in like.members]
        run_kinds.extend(range(first_runs[like.number], first_runs[like.number] + len(like.members)))
        for rule, parts, template, module in like.members:
            on_axis = place if parts.stacked else None
            key = fill(template, names)
            key = shared.setdefault(key, key)  # one string for all layers that share a key
            mcore[key] = parts.mcore_shape
            for shape, tile in parts.tiles(key, names, on_axis, shared, bases):
                hf[tile.hf.tensor] = shape
                tiles.append(tile)
            if rule.dtype:
                dtypes[key] = rule.dtype
            if rule.plus:
                shifts[key] = rule.plus
            if module is not None:
                states = extra_state_keys(fill(module, names), on_axis, dims["L"], dims.get("E", 0))
                extra_state.update((shared.get(state, state), None) for state in states)
        proof.add(like, tiles, begin)
    if not proof.holds(hf, mcore):
        cover_problems(tiles, hf, mcore).raise_if_any()
    aliases = {}
    restored = {}
    for alias in family.aliases:
        if not holds(alias.when, flags):
            continue
        stack = stacks.get("k", ()) if "{n}" in alias.hf or "{k}" in alias.hf else (None,)
        for layer in stack:
            name = fill(alias.hf, placeholders(layer.names) if layer else ())
            aliases[name] = alias.of
            if alias.restored:
                restored[name] = alias.of
    metadata: dict[str, object] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if layout is Layout.PER_LAYER and natural is Layout.STACKED:
        metadata["non_homogeneous_layers"] = True
    fields = family.megatron_config(config, flags)
    caveats = list(family.caveats(config))
    promised = len(stacks.get("k", ()))
    if not promised or "mtp" not in flags:
        fields = _without_prediction(fields)
    if promised and "mtp" not in flags and any(config.get(key) for key in _PROMISES):
        caveats.append(f"config.json promises {promised} layers of multi-token prediction, which the weights lack")
    ignored = "|".join(re.escape(template).replace(r"\{i\}", r"\d+") for template in family.ignored)
    return ModelMapping(
        family=family.name,
        architecture=config.architecture,
        layout=layout,
        variants=chosen,
        tiles=tuple(tiles),
        run_kinds=run_kinds,
        run_lengths=run_lengths,
        hf=hf,
        mcore=mcore,
        dtypes=dtypes,
        shifts=shifts,
        extra_state=tuple(extra_state),
        aliases=aliases,
        restored=restored,
        ignored=re.compile(ignored or r"(?!)"),
        megatron_config=fields,
        provider=family.provider,
        content_metadata=metadata,
        caveats=tuple(caveats),
    )


class _Member(NamedTuple):
    """A rule as it applies to all layers of a kind.

    Attributes:
        rule: The rule.
        parts: Its parts, with the extents that they have in such a layer.
        key: Template of the key on disk.
        module: Template of the module whose ``_extra_state`` goes with the tensor; None where there is none.
    """

    rule: Rule
    parts: Expanded
    key: str
    module: str | None


class _Kind(NamedTuple):
    """What layers of a kind have in common; what is no layer's counts as one.

    Attributes:
        number: Which it is, counted from 0 in the order in which they come up.
        members: Its rules.
    """

    number: int
    members: tuple[_Member, ...]


def _enumerate(
    family: Family, dims: Dims, flags: frozenset[str], stacks: Mapping[str, Sequence[Layer]], layout: Layout
) -> Iterator[tuple[_Kind, Placeholders, int]]:
    """Every layer in the order of an export, with what placeholders stand for in it, and its place in its stack."""

    def member(rule: Rule, layer: Layer) -> _Member:
        parts, key = expand(rule.parts, {**dims, **layer.dims}), rule.mcore
        if rule.stack == "i" and layout is Layout.STACKED:
            parts, key = parts.stack(dims["L"]), key.replace("{i}.", "")
        return _Member(rule, parts, key, extra_state_module(key))

    numbers = itertools.count()

    def kind_of(rules: Iterable[Rule], stack: str, layer: Layer) -> _Kind:
        holding = [rule for rule in rules if rule.stack == stack and holds(rule.when, flags | layer.kinds)]
        return _Kind(next(numbers), tuple(member(rule, layer) for rule in holding))

    first = next((k for k, rule in enumerate(family.rules) if rule.stack), len(family.rules))
    yield kind_of(family.rules[:first], "", Layer()), (), 0
    for stack in ("i", "k", "j"):
        alike: dict[object, _Kind] = {}
        for place, layer in enumerate(stacks.get(stack, ())):
            kind = layer.kinds, tuple(layer.dims.items())
            if kind not in alike:
                alike[kind] = kind_of(family.rules, stack, layer)
            yield alike[kind], placeholders({stack: place, **layer.names}), place
    yield kind_of(family.rules[first:], "", Layer()), (), 0


def _without_prediction(fields: Mapping[str, object]) -> dict[str, object]:
    """The fields of a model without layers of multi-token prediction."""
    left = {name: value for name, value in fields.items() if not name.startswith(("mtp_", "keep_mtp_"))}
    if "hybrid_layer_pattern" in left:
        left["hybrid_layer_pattern"] = str(left["hybrid_layer_pattern"]).partition("/")[0]
    return left


def _not_stackable(config: HFConfig) -> Problem:
    return Problem(
        code=Code.OPTION_INVALID,
        what=f"the layers of {config.architecture} can't be stacked: they are not all alike",
        file=config.file,
        cure="leave the layout to shardway (--layout auto), or choose per-layer",
    )


class _Proof:
    """Proves of one layer of each kind that its tiles cover its tensors, and that no two layers share one.

    Every other layer is like one of them but for its names, and so is covered as well.
    """

    def __init__(self) -> None:
        self._kinds: dict[int, _Kind] = {}
        self._num_layers: Counter[int] = Counter()
        self._tiles: list[Tile] = []

    def add(self, kind: _Kind, tiles: Sequence[Tile], begin: int) -> None:
        """Add a layer, whose tiles are those from `begin`."""
        self._num_layers[kind.number] += 1
        if kind.number not in self._kinds:
            self._kinds[kind.number] = kind
            self._tiles += tiles[begin:]

    def holds(self, hf: Mapping[str, Shape], mcore: Mapping[str, Shape]) -> bool:
        """Whether the proof is complete for tensors of these shapes; if not, only a look at all tiles can tell."""
        num_hf = num_mcore = 0
        stacked = set()
        for number, kind in self._kinds.items():
            num_layers = self._num_layers[number]
            names = {grid.hf: member.parts for member in kind.members for grid in member.parts.grids}
            num_hf += num_layers * sum(parts.num_named(name) for name, parts in names.items())
            num_mcore += num_layers * len({member.key for member in kind.members if not member.parts.stacked})
            on_axis = {member.key for member in kind.members if member.parts.stacked}
            if any(mcore[key][0] != num_layers for key in on_axis):
                return False
            stacked |= on_axis
        # Layers can't have more names than that, so where there are as many, all of them are different.
        if (num_hf, num_mcore + len(stacked)) != (len(hf), len(mcore)):
            return False
        sample = {tile.mcore.tensor: mcore[tile.mcore.tensor] for tile in self._tiles}
        sample |= {key: (1, *mcore[key][1:]) for key in stacked}
        return not cover_problems(self._tiles, {tile.hf.tensor: hf[tile.hf.tensor] for tile in self._tiles}, sample)


def cover_problems(tiles: Sequence[Tile], hf: Mapping[str, Shape], mcore: Mapping[str, Shape]) -> Problems:
    """Where tiles don't cover tensors of these shapes exactly once."""
    problems = Problems()
    for shapes, is_mcore in ((hf, False), (mcore, True)):
        on: dict[str, list[Tile]] = {name: [] for name in shapes}
        for tile in tiles:
            _, *sides = tile
            on[sides[is_mcore].tensor].append(tile)
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
    return problems
