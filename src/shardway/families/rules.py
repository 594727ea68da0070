"""The rule language: one declarative line says how a Megatron tensor is made of Hugging Face tensors.

Names are templates: ``{i}`` runs over the layers, ``{k}`` over the layers of multi-token prediction, ``{e}`` over the
experts. A rule is data for both directions.

The axes of a tensor are written in words, outermost first, as in ``"V H"``. A word is an extent: a product of
dimensions such as ``r*d``, which the family computes from the config. It is also a walk: the same word on both sides
of a part means the same elements. From there:

* ``(G r*d) H``: the first axis is `G` times `r*d` long.
* ``F@F/2*F H``: of an axis that is `2*F` long, the stretch of `F` that begins at `F`.
* ``(G r*d)@0/nq*d+2*G*d H``: the same of a whole axis: query heads in a tensor of queries, keys and values.
* ``[e] F H``: the first axis has a place for each expert; the part is the one of `{e}`.
* ``1 E``: an axis of extent 1.
* ``H H'``: two walks of one length; the prime tells them apart.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.tiles import Side, Tile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from shardway.core.tensors import Shape
    from shardway.core.tiles import Steps

# The dimension that counts what a placeholder in brackets runs over.
_COUNTS = {"[e]": "E"}


class Part(NamedTuple):
    """What one Hugging Face tensor supplies of a Megatron tensor.

    Attributes:
        hf: Template of its name.
        hf_axes: The axes of that tensor.
        mcore_axes: The axes of the Megatron tensor, in the same words.
    """

    hf: str
    hf_axes: str
    mcore_axes: str


class Rule(NamedTuple):
    """One Megatron tensor and the Hugging Face tensors that it is made of.

    Attributes:
        mcore: Template of its logical name; ``{i}`` in it makes it one tensor per layer.
        parts: What it is made of.
        when: Flags and kinds of layer that have to hold, separated by spaces; a leading ``!`` negates; empty: always.
        dtype: Type in which Megatron holds it whatever the source's is, by torch's name; it must be no narrower.
        plus: What is added to each value on the way to Megatron, in float32, and taken away on the way back.
    """

    mcore: str
    parts: tuple[Part, ...]
    when: str = ""
    dtype: str = ""
    plus: float = 0.0

    @property
    def stack(self) -> str:
        """The placeholder of the layers that the rule stands in, innermost first; empty where it stands for itself."""
        return next((letter for letter in ("j", "k", "i") if f"{{{letter}}}" in self.mcore), "")


def holds(when: str, flags: frozenset[str]) -> bool:
    """Whether a condition such as ``"moe !tied"`` holds where these flags and kinds do."""
    return all((word[1:] not in flags) if word[0] == "!" else word in flags for word in when.split())


def same(hf: str, *extents: str) -> tuple[Part, ...]:
    """The Megatron tensor is the Hugging Face tensor, whose shape is `extents`."""
    axes = _distinct(extents)
    return (Part(hf, axes, axes),)


def rows(*parts: tuple[str, str], trailing: tuple[str, ...] = ()) -> tuple[Part, ...]:
    """The rows of several tensors one above the other: gate above up."""
    rest = " ".join(("", *trailing))
    total = "+".join(size for _, size in parts)
    found, at = [], "0"
    for hf, size in parts:
        found.append(Part(hf, f"{size}{rest}", f"{size}@{at}/{total}{rest}"))
        at = size if at == "0" else f"{at}+{size}"
    return tuple(found)


def split(hf: str, *pieces: tuple[str, str], trailing: tuple[str, ...] = ()) -> list[tuple[str, tuple[Part, ...]]]:
    """One tensor's rows dealt out, in order, to several Megatron tensors: pairs of an ending and its parts.

    Args:
        hf: Template of the tensor.
        pieces: Ending of the Megatron name, and rows.
        trailing: Extents of the other axes.
    """
    rest = " ".join(("", *trailing))
    total = "+".join(size for _, size in pieces)
    found: list[tuple[str, tuple[Part, ...]]] = []
    at = "0"
    for ending, size in pieces:
        found.append((ending, (Part(hf, f"{size}@{at}/{total}{rest}", f"{size}{rest}"),)))
        at = size if at == "0" else f"{at}+{size}"
    return found


def qkv(*, q: str, k: str, v: str, trailing: tuple[str, ...] = ()) -> tuple[Part, ...]:
    """Query, key and value rows interleaved by query group, as megatron-core's `linear_qkv` holds them.

    Source: megatron/core/transformer/attention.py, `SelfAttention.get_query_key_value_tensors`.
    """
    rest = " ".join(("", *trailing))
    return (
        Part(q, f"(G r*d){rest}", f"(G r*d@0/r*d+2*d){rest}"),
        Part(k, f"(G d){rest}", f"(G d@r*d/r*d+2*d){rest}"),
        Part(v, f"(G d){rest}", f"(G d@r*d+d/r*d+2*d){rest}"),
    )


def fused_qkv(hf: str, *, trailing: tuple[str, ...] = ()) -> tuple[Part, ...]:
    """`qkv` of one tensor that holds all queries, then all keys, then all values."""
    rest = " ".join(("", *trailing))
    places = ("(G r*d)@0", "(G d)@G*r*d", "(G d)@G*r*d+G*d")
    total = "/G*r*d+2*G*d"
    return tuple(
        Part(hf, f"{place}{total}{rest}", part.mcore_axes)
        for place, part in zip(places, qkv(q="", k="", v="", trailing=trailing), strict=True)
    )


def only_when(rules: Iterable[Rule], when: str) -> tuple[Rule, ...]:
    """The same rules where `when` has to hold besides."""
    return tuple(rule._replace(when=f"{when} {rule.when}".strip()) for rule in rules)


def renamed(
    rules: Iterable[Rule], *, mcore: tuple[str, str] = ("", ""), hf: tuple[str, str], when: str = ""
) -> tuple[Rule, ...]:
    """The same rules under other names: in each name the first text of a pair is replaced by the second.

    Args:
        rules: Rules of a block.
        mcore: What to replace in the Megatron names.
        hf: What to replace in the Hugging Face names.
        when: Flags that have to hold besides.
    """
    return tuple(
        Rule(
            rule.mcore.replace(*mcore),
            tuple(Part(part.hf.replace(*hf), part.hf_axes, part.mcore_axes) for part in rule.parts),
            when=f"{rule.when} {when}".strip(),
            dtype=rule.dtype,
            plus=rule.plus,
        )
        for rule in rules
    )


def extent(expression: str, dims: Mapping[str, int]) -> int:
    """Evaluate a sum of products of dimension names and integers, such as ``"r*d+2*d"`` or ``"1"``."""
    return sum(
        math.prod(dims[factor] if factor in dims else int(factor) for factor in term.split("*"))
        for term in expression.split("+")
    )


class Grid(NamedTuple):
    """Where a part lies: the name and shape of its own tensor, and the tile to be, without its names.

    `hf_index` and `mcore_index` are the axes along which each expert has a place; None where there is none.
    """

    hf: str
    hf_shape: Shape
    sizes: Shape
    hf_base: Shape
    hf_steps: Steps
    hf_index: int | None
    mcore_base: Shape
    mcore_steps: Steps
    mcore_index: int | None


class Expanded(NamedTuple):
    """The parts of a rule with their extents known.

    Attributes:
        mcore_shape: Shape of the Megatron tensor.
        grids: One for each part.
        num_indexed: How many experts have a place of their own in the Megatron tensor; 0 without that axis.
        stacked: Whether the Megatron tensor has a leading axis of layers.
    """

    mcore_shape: Shape
    grids: tuple[Grid, ...]
    num_indexed: int = 0
    stacked: bool = False

    @property
    def num_tiles(self) -> int:
        """How many tiles there are in one layer."""
        return len(self.grids) * (self.num_indexed or 1)

    def num_named(self, template: str) -> int:
        """How many Hugging Face tensors a template of one of the parts names in one layer."""
        return (self.num_indexed or 1) if "{e}" in template else 1

    def stack(self, num_layers: int) -> Expanded:
        """The same with a leading axis of layers on the Megatron side."""
        grids = tuple(
            grid._replace(
                mcore_steps=tuple((axis + 1, step) for axis, step in grid.mcore_steps),
                mcore_index=None if grid.mcore_index is None else grid.mcore_index + 1,
            )
            for grid in self.grids
        )
        return Expanded((num_layers, *self.mcore_shape), grids, self.num_indexed, stacked=True)

    def tiles(
        self, mcore: str, names: Placeholders, layer: int | None, known: Mapping[str, str], bases: dict[Shape, Shape]
    ) -> Iterator[tuple[Shape, Tile]]:
        """The tiles of one layer, each with the shape of its Hugging Face tensor.

        Args:
            mcore: Key of the Megatron tensor on disk.
            names: What placeholders in the parts' names stand for.
            layer: Place along the leading axis of layers, where there is one.
            known: Names that are strings already, by themselves.
            bases: Places along layers and experts that are tuples already, by themselves; gets those that are not.
        """
        named = [(grid, fill(grid.hf, names)) for grid in self.grids]
        for expert in range(self.num_indexed or 1):
            for (_, shape, sizes, hf_base, hf_steps, hf_index, base, steps, mcore_index), name in named:
                if self.stacked and layer is not None:
                    base = (layer, *base)
                if mcore_index is not None:
                    name = name.replace("{e}", str(expert))
                    base = (*base[:mcore_index], expert, *base[mcore_index + 1 :])
                base = bases.setdefault(base, base)
                if hf_index is not None:
                    hf_base = (*hf_base[:hf_index], expert, *hf_base[hf_index + 1 :])
                yield shape, Tile(sizes, Side(known.get(name, name), hf_base, hf_steps), Side(mcore, base, steps))


# Placeholders of templates as they stand in them, and what they stand for: ``("{i}", "5")``.
Placeholders = tuple[tuple[str, str], ...]


def placeholders(numbers: Mapping[str, int]) -> Placeholders:
    """The placeholders with these letters."""
    return tuple((f"{{{letter}}}", str(number)) for letter, number in numbers.items())


def fill(template: str, names: Placeholders) -> str:
    """The name that a template is for these values of its placeholders."""
    for placeholder, value in names:
        template = template.replace(placeholder, value)
    return template


def expand(parts: tuple[Part, ...], dims: Mapping[str, int]) -> Expanded:
    """Work out the extents of a rule's parts for a model with these dimensions."""
    grids = []
    shapes = set()
    for part in parts:
        hf, mcore = _read_axes(part.hf_axes, dims), _read_axes(part.mcore_axes, dims)
        if hf.walks.keys() != mcore.walks.keys():
            raise ValueError(f"the two sides walk along different words: {part}")
        shapes.add(mcore.shape)
        words = [word for word in mcore.walks if mcore.walks[word][0] != 1] or list(mcore.walks)[:1]
        grids.append(
            Grid(
                part.hf,
                hf.shape,
                tuple(mcore.walks[word][0] for word in words),
                hf.base,
                tuple(hf.walks[word][1:] for word in words),
                hf.indexed,
                mcore.base,
                tuple(mcore.walks[word][1:] for word in words),
                mcore.indexed,
            )
        )
    if len(shapes) != 1:
        raise ValueError(f"the parts give different shapes: {parts}")
    indexed = {dims["E"] if grid.mcore_index is not None else 0 for grid in grids}
    return Expanded(shapes.pop(), tuple(grids), indexed.pop())


class _Axes(NamedTuple):
    """A tensor's shape, where a part begins in it, and along which axis, how far and in which steps each word walks."""

    shape: Shape
    base: Shape
    walks: dict[str, tuple[int, int, int]]
    indexed: int | None


def _read_axes(text: str, dims: Mapping[str, int]) -> _Axes:
    shape: list[int] = []
    base: list[int] = []
    walks: dict[str, tuple[int, int, int]] = {}
    index = None
    for axis, (factors, place_of_axis) in enumerate(_axes_of(text)):
        stride, first = 1, 0
        along: list[tuple[str, tuple[int, int, int]]] = []
        for factor in reversed(factors):
            if factor in _COUNTS:
                index = axis
                stride *= dims[_COUNTS[factor]]
                continue
            word, _, place = factor.partition("@")
            at, _, total = place.partition("/")
            size = extent(word.rstrip("'"), dims)
            if word != "1":
                along.append((word, (size, axis, stride)))
            first += extent(at, dims) * stride if at else 0
            stride *= extent(total, dims) if total else size
        at, _, total = place_of_axis.partition("/")
        walks.update(reversed(along))
        shape.append(extent(total, dims) if total else stride)
        base.append(first + extent(at, dims) if at else first)
    return _Axes(tuple(shape), tuple(base), walks, index)


def _axes_of(text: str) -> Iterator[tuple[list[str], str]]:
    """The factors of each axis, and where their product lies in it: ``"(G d)@0/T H"`` is `[G, d], "0/T"` and `[H]`."""
    inside: list[str] | None = None
    for word in text.replace("(", " ( ").replace(")", " )").split():
        if word == "(":
            inside = []
        elif word[0] == ")":
            yield inside or [], word[2:]
            inside = None
        elif inside is not None:
            inside.append(word)
        else:
            yield [word], ""


def _distinct(words: tuple[str, ...]) -> str:
    """The words with primes on those that were there before."""
    seen: Counter[str] = Counter()
    named = []
    for word in words:
        named.append(word + "'" * seen[word] if word != "1" else word)
        seen[word] += 1
    return " ".join(named)
