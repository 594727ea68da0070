"""Quantised weights in a Hugging Face checkpoint: which tensors hold them, by which scheme, and with which scales.

A checkpoint is presented as if it held the values: under the plain names, in the type that they are computed to. What
is stored stays in each `Quantised`, from which `run.dequantise` computes them, a part at a time.
docs/formats/quantised.md describes the schemes.

Source: transformers 5.24 (`integrations/finegrained_fp8.py`, `integrations/mxfp4.py`); compressed-tensors' formats
`float-quantized` and `pack-quantized`; the configs of published models.
"""

from __future__ import annotations

import enum
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.dtypes import BFLOAT16, FLOAT16, FLOAT32
from shardway.core.errors import Code, Problem
from shardway.core.tensors import Catalog, Chunk, StoredTensor
from shardway.formats.file_problems import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape
    from shardway.formats.huggingface import HuggingFaceCheckpoint

QUANTIZATION_CONFIG = "quantization_config"

_FP8 = "float8_e4m3fn"
_SCALE_TYPES = {"float32", "bfloat16", "float16", "float8_e8m0fnu"}
_BLOCK = (128, 128)  # of FP8, where a config says nothing
_MXFP4_GROUP = 32
_BYTE_VALUES = 2  # of four bits each
# What modules of quantised weights have beside them, for activations and caches; the weights don't depend on it.
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale")


class Scheme(enum.StrEnum):
    """How values are stored; every one of them is a code times a scale."""

    FP8_BLOCK = "fp8-block"
    FP8_CHANNEL = "fp8-channel"
    FP8_TENSOR = "fp8-tensor"
    INT4_GROUP = "int4-group"
    MXFP4 = "mxfp4"


class Quantised(NamedTuple):
    """Where the values of a tensor come from.

    Attributes:
        scheme: How codes and scales are to be read.
        codes: The stored codes.
        scales: The stored scales: row-major, one for each group, whatever axes of extent 1 their shape leaves out.
        shape: Of the values, in the order of axes in which they are stored.
        group: How many neighbours on each axis share a scale; the last group of an axis may be ragged.
        swapped: Whether the tensor that is presented has the last two axes the other way round.
    """

    scheme: Scheme
    codes: StoredTensor
    scales: StoredTensor
    shape: Shape
    group: Shape
    swapped: bool = False

    @property
    def values_per_byte(self) -> int:
        """How many values a byte of the codes holds; the lower bits come first."""
        return _BYTE_VALUES if self.scheme in {Scheme.INT4_GROUP, Scheme.MXFP4} else 1

    @property
    def grid(self) -> Shape:
        """How many groups there are on each axis."""
        return tuple(-(-extent // group) for extent, group in zip(self.shape, self.group, strict=True))

    @property
    def shown(self) -> Shape:
        """Shape of the tensor that is presented."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.swapped else self.shape


def present(checkpoint: HuggingFaceCheckpoint, dtype: DType | None = None) -> HuggingFaceCheckpoint:
    """A checkpoint with the values of its quantised weights in the place of what is stored.

    Quantised weights of schemes that aren't known stay as they are, and what is wrong with the scales of the others is
    in `faults`; neither is ever cast. Reads nothing.

    Args:
        checkpoint: As opened.
        dtype: What the values are going to be cast to; they are computed to float32 where that is not bfloat16. None
            for the floating-point type that the config declares, or bfloat16.
    """
    settings = checkpoint.config.get(QUANTIZATION_CONFIG)
    if settings is not None and not isinstance(settings, dict):
        return checkpoint
    found = _Finder(checkpoint.catalog.tensors, settings or {})
    found.look()
    if not found.quantised and not found.problems:
        return checkpoint
    wanted = _declared(checkpoint.config) if dtype is None else BFLOAT16 if dtype is BFLOAT16 else FLOAT32
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in checkpoint.catalog.tensors.items():
        if name in found.plain:
            plain = found.plain[name]
            shape, codes = found.quantised[plain].shown, tensor.chunks[0]
            chunk = Chunk((0,) * len(shape), shape, codes.file, codes.offset)
            tensors[plain] = StoredTensor(plain, wanted, shape, (chunk,))
        elif name not in found.taken:
            tensors[name] = tensor
    return checkpoint._replace(
        catalog=Catalog(root=checkpoint.catalog.root, tensors=tensors),
        quantised=found.quantised,
        num_activation_scales=found.num_left_out,
        faults=tuple(found.problems),
    )


def computed_as(checkpoint: HuggingFaceCheckpoint, dtypes: Mapping[str, DType]) -> HuggingFaceCheckpoint:
    """A checkpoint that is presented, with the values of quantised weights computed to other types.

    Args:
        checkpoint: What `present` returns.
        dtypes: The types by name; all but bfloat16, float16 and float32 are passed over.
    """
    tensors = dict(checkpoint.catalog.tensors)
    for name in checkpoint.quantised:
        if dtypes.get(name) in {BFLOAT16, FLOAT16, FLOAT32}:
            tensors[name] = tensors[name]._replace(dtype=dtypes[name])
    return checkpoint._replace(catalog=Catalog(root=checkpoint.catalog.root, tensors=tensors))


def dequantised_notes(checkpoint: HuggingFaceCheckpoint) -> list[str]:
    """What a user should know about the weights whose values are computed, one sentence each."""
    of: Counter[tuple[str, str]] = Counter()
    for name, source in checkpoint.quantised.items():
        of[source.scheme.value, checkpoint.catalog.tensors[name].dtype.name] += 1
    notes = [f"{count} tensors were dequantised from {scheme} to {dtype}" for (scheme, dtype), count in of.items()]
    if checkpoint.num_activation_scales:
        notes.append(f"{checkpoint.num_activation_scales} scales of activations and caches were left out")
    return notes


def without_quantisation(config: Mapping[str, object]) -> dict[str, object]:
    """A config.json for weights that are not quantised."""
    return {key: value for key, value in config.items() if key != QUANTIZATION_CONFIG}


def count_schemes(quantised: Mapping[str, Quantised]) -> dict[str, int]:
    """Number of tensors by scheme."""
    return dict(Counter(source.scheme.value for source in quantised.values()))


def names_by_scheme(quantised: Mapping[str, Quantised]) -> dict[str, tuple[str, ...]]:
    """Names of tensors by scheme."""
    found: dict[str, list[str]] = {}
    for name, source in quantised.items():
        found.setdefault(source.scheme.value, []).append(name)
    return {scheme: tuple(names) for scheme, names in found.items()}


def copy_problems(copies: Mapping[str, str], checkpoint: HuggingFaceCheckpoint) -> list[Problem]:
    """Tensors that should be copies of another one whose values are computed: whether they are is not looked into.

    Args:
        copies: Names, and of which tensor each is a copy.
        checkpoint: What holds them.
    """
    return [
        Problem(
            code=Code.DTYPE_UNSUPPORTED,
            what=f"{printable(name)} should be a copy of {printable(of)}, which is quantised",
            tensor=name,
            file=checkpoint.catalog.tensors[name].chunks[0].file,
            cure="remove the copy, or convert a bf16 version of the model",
        )
        for name, of in copies.items()
        if of in checkpoint.quantised
    ]


def _declared(config: Mapping[str, object]) -> DType:
    declared = config.get("dtype", config.get("torch_dtype"))
    name = declared.removeprefix("torch.") if isinstance(declared, str) else ""
    return {dtype.name: dtype for dtype in (FLOAT32, FLOAT16)}.get(name, BFLOAT16)


class _Finder:
    """Finds the quantised weights among stored tensors.

    Attributes:
        quantised: What was found, by the plain name.
        plain: The plain name of each tensor of codes.
        taken: Names of all tensors that belong to quantised weights.
        num_left_out: How many of those are for activations.
        problems: What is wrong.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], settings: Mapping[str, object]) -> None:
        self.quantised: dict[str, Quantised] = {}
        self.plain: dict[str, str] = {}
        self.taken: set[str] = set()
        self.num_left_out = 0
        self.problems: list[Problem] = []
        self._tensors = tensors
        self._settings = settings
        self._method = str(settings.get("quant_method"))
        self._algorithm = str(settings.get("quant_algo"))

    def look(self) -> None:
        groups = self._config_groups()
        block = self._block(groups)
        int4 = self._int4(groups)
        for name, tensor in self._tensors.items():
            if name.endswith("_blocks") and tensor.dtype.name == "uint8" and len(tensor.shape) > 2:
                self._mxfp4(name, tensor)
            elif name.endswith("_packed") and tensor.dtype.name == "int32" and int4 and len(tensor.shape) == 2:
                self._packed(name, tensor, int4)
            elif tensor.dtype.name == _FP8 and len(tensor.shape) > 1 and self._knows_fp8():
                self._fp8(name, tensor, block)
        modules = {plain.removesuffix(".weight") for plain in self.quantised}
        for name in self._tensors:
            module, _, last = name.rpartition(".")
            if last in _OF_ACTIVATIONS and (module in modules or f"{module}.{last[0]}_proj" in modules):
                self.taken.add(name)
                self.num_left_out += 1

    def _knows_fp8(self) -> bool:
        if self._method == "modelopt":
            return self._algorithm in {"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"}
        return self._method in {"fp8", "compressed-tensors", "fbgemm_fp8"}

    def _fp8(self, name: str, tensor: StoredTensor, block: Shape | None) -> None:
        shape = tensor.shape
        alone = (1,) * (len(shape) - 2)
        names = [f"{name}_scale_inv", f"{name}_scale"][:: 1 if self._method == "fp8" else -1]
        scale_name = next((each for each in names if each in self._tensors), names[0])
        ways: list[tuple[Scheme, Shape]] = []
        if block is not None:
            ways.append((Scheme.FP8_BLOCK, (*alone, *block)))
        if block is None or self._method != "fp8":
            ways.append((Scheme.FP8_TENSOR, (*alone, *shape[-2:])))
            ways.append((Scheme.FP8_CHANNEL, (*alone, 1, shape[-1])))
        self._add(name, name, tensor, scale_name, shape, ways)

    def _packed(self, name: str, tensor: StoredTensor, group: int | None) -> None:
        plain = name.removesuffix("_packed")
        rows, words = tensor.shape
        shape = (rows, words * 8)
        self._add(plain, name, tensor, f"{plain}_scale", shape, [(Scheme.INT4_GROUP, (1, group or shape[1]))])
        shape_name = f"{plain}_shape"
        stored = self._tensors.get(shape_name)
        self.taken.add(shape_name)
        if stored is None:
            self._missing(shape_name, name, "the shape of the values")
        elif stored.shape != (2,) or stored.dtype.name not in {"int32", "int64"}:
            self._misshapen(stored, "two integers: the shape of the values")

    def _mxfp4(self, name: str, tensor: StoredTensor) -> None:
        plain = name.removesuffix("_blocks")
        *outer, groups, num_bytes = tensor.shape
        if num_bytes * _BYTE_VALUES != _MXFP4_GROUP:
            return
        shape = (*outer, groups * _MXFP4_GROUP)
        group = (*(1,) * len(outer), _MXFP4_GROUP)
        # Released files hold [experts, out, in]; the plain tensor that transformers reads is [experts, in, out].
        self._add(plain, name, tensor, f"{plain}_scales", shape, [(Scheme.MXFP4, group)], swapped=True)

    def _add(
        self,
        plain: str,
        name: str,
        codes: StoredTensor,
        scale_name: str,
        shape: Shape,
        ways: Sequence[tuple[Scheme, Shape]],
        *,
        swapped: bool = False,
    ) -> None:
        """Note a weight, with the way whose scales have the shape that is found, and what is wrong with them."""
        self.taken |= {name, scale_name}
        scales = self._tensors.get(scale_name)
        fits = None
        if scales is not None:
            fits = next((way for way in ways if _same(scales.shape, _grid(shape, way[1]))), None)
        scheme, group = fits or ways[0]
        if scales is None:
            self._missing(scale_name, name, "its scales")
        elif fits is None:
            expected = " or ".join(dict.fromkeys(str(list(_grid(shape, one))) for _, one in ways))
            self._misshapen(scales, f"{expected}, for {list(shape)} values in {name}")
        elif not self._is_scale(scales, scheme):
            self.problems.append(
                Problem(
                    code=Code.DTYPE_UNSUPPORTED,
                    what=f"{printable(scale_name)} holds {scales.dtype.name} values, which are no scales of {scheme}",
                    tensor=scale_name,
                    file=scales.chunks[0].file,
                    cure="fetch the checkpoint again, or convert a bf16 version of the model",
                )
            )
        if plain in self._tensors and plain != name:
            self.problems.append(
                Problem(
                    code=Code.TENSOR_DUPLICATE,
                    what=f"{printable(plain)} is there both plain and quantised, as {printable(name)}",
                    tensor=plain,
                    file=codes.chunks[0].file,
                    cure="remove one of the two",
                )
            )
        self.plain[name] = plain
        self.quantised[plain] = Quantised(
            scheme=scheme, codes=codes, scales=scales or codes, shape=shape, group=group, swapped=swapped
        )

    def _is_scale(self, scales: StoredTensor, scheme: Scheme) -> bool:
        if scales.dtype.name == "uint8":
            return scheme is Scheme.MXFP4 or self._settings.get("scale_fmt") == "ue8m0"
        return scheme is not Scheme.MXFP4 and scales.dtype.name in _SCALE_TYPES

    def _missing(self, name: str, of: str, what: str) -> None:
        self.problems.append(
            Problem(
                code=Code.TENSOR_MISSING,
                what=f"{printable(of)} is quantised, and no file holds {printable(name)}, {what}",
                tensor=name,
                file=self._tensors[of].chunks[0].file,
                cure="fetch or save the checkpoint again; without its scales a weight means nothing",
            )
        )

    def _misshapen(self, tensor: StoredTensor, expected: str) -> None:
        self.problems.append(
            Problem(
                code=Code.SHAPE_MISMATCH,
                what=f"{printable(tensor.name)} has the wrong shape",
                tensor=tensor.name,
                file=tensor.chunks[0].file,
                facts=(f"expected {expected}, got {list(tensor.shape)}",),
                cure=f"check that {QUANTIZATION_CONFIG} in config.json belongs to these weights",
            )
        )

    def _config_groups(self) -> list[_Weights]:
        """What compressed-tensors' config says of weights, one for each of its groups."""
        groups = self._settings.get("config_groups") if self._method == "compressed-tensors" else None
        values: Iterable[object] = groups.values() if isinstance(groups, dict) else ()
        return [_weights_of(group.get("weights")) for group in values if isinstance(group, dict)]

    def _block(self, groups: Sequence[_Weights]) -> Shape | None:
        """How many rows and columns share a scale, where the config says that blocks do."""
        by_default = self._method == "fp8" or self._algorithm == "FP8_PB_WO"
        given = self._settings.get("weight_block_size", _BLOCK if by_default else None)
        structures = [group.block for group in groups if group.num_bits == 8 and group.block is not None]
        if given is None and structures:
            given = structures[0]
        if given is None:
            return None
        if (
            isinstance(given, list | tuple)
            and len(given) == 2
            and all(type(size) is int and 0 < size < 2**31 for size in given)
        ):
            return tuple(given)
        self.problems.append(
            Problem(
                code=Code.CONFIG_INVALID,
                what=f"weight_block_size in {QUANTIZATION_CONFIG} is {given!r:.80}; expected two positive integers",
                file="config.json",
                cure="fetch config.json again; it says how many rows and columns share a scale",
            )
        )
        return None

    def _int4(self, groups: Sequence[_Weights]) -> int | None:
        """How many values of a row share a scale, where the config says that there are packed integers of 4 bits."""
        sizes = {
            group.size
            for group in groups
            if group.num_bits == 4 and group.kind == "int" and group.symmetric and group.size
        }
        return next(iter(sizes)) if len(sizes) == 1 else None


class _Weights(NamedTuple):
    """How compressed-tensors stores the weights of one group."""

    num_bits: object
    kind: object
    symmetric: bool
    size: int | None
    block: object


def _weights_of(weights: object) -> _Weights:
    if not isinstance(weights, dict):
        return _Weights(None, None, False, None, None)
    size = weights.get("group_size")
    return _Weights(
        weights.get("num_bits"),
        weights.get("type", "int"),
        weights.get("symmetric", True) is True,
        size if type(size) is int and size > 0 and weights.get("strategy", "group") == "group" else None,
        weights.get("block_structure") if weights.get("strategy") == "block" else None,
    )


def _grid(shape: Shape, group: Shape) -> Shape:
    return tuple(-(-extent // size) for extent, size in zip(shape, group, strict=True))


def _same(found: Shape, grid: Shape) -> bool:
    """Whether a shape is that of a grid, but for axes of extent 1 that it may leave out at the end."""
    full = len(found)
    return full <= len(grid) and found == grid[:full] and all(extent == 1 for extent in grid[full:])
