"""Planning to quantise anew what came from FP8 blocks: which tensors, and the streams in which their values are read.

Here the sides change places: a stream follows a Hugging Face tensor, which is written from first byte to last, and its
pieces are where its values lie in the Megatron checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from shardway.core.dtypes import FLOAT32, dtype_of_torch
from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats.quantised import QUANTIZATION_CONFIG, Scheme
from shardway.plans.streams import build_streams

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape, StoredTensor
    from shardway.core.tiles import Tile
    from shardway.plans.model import Stream

FP8 = dtype_of_torch("float8_e4m3fn")
_BLOCK = (128, 128)


class Requantised(NamedTuple):
    """Tensors that an export quantises.

    Attributes:
        block: How many rows and columns share a scale.
        powers: Whether scales are to be powers of two.
        streams: One for each tensor; the pieces' other side is the Megatron checkpoint.
        checked: Streams of chunks that nothing else reads, so that their digests are checked too.
    """

    block: tuple[int, int]
    powers: bool
    streams: Sequence[Stream]
    checked: tuple[Stream, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of codes."""
        return sum(stream.num_bytes for stream in self.streams)


def scale_of(name: str) -> str:
    """Name of the tensor of scales that goes with a weight."""
    return f"{name}_scale_inv"


def stored_as(name: str, shape: Shape, block: tuple[int, int]) -> list[tuple[str, DType, Shape]]:
    """What is stored of a weight: codes and scales."""
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return [(name, FP8, shape), (scale_of(name), FLOAT32, grid)]


def names_to_quantise(recorded: Mapping[str, Collection[str]], shapes: Mapping[str, Shape]) -> frozenset[str]:
    """The tensors that came from FP8 blocks.

    Args:
        recorded: By scheme, what the checkpoint's record says was dequantised.
        shapes: Every tensor that is exported.

    Raises:
        ShardwayError: `option-invalid` where there are none.
    """
    names = frozenset(name for name in recorded.get(Scheme.FP8_BLOCK, ()) if len(shapes.get(name, ())) > 1)
    if not names:
        raise _impossible("no tensor of this checkpoint is known to have come from FP8 blocks: its record names none")
    return names


def block_of(config: Mapping[str, object]) -> tuple[tuple[int, int], bool]:
    """The size of blocks that a config asks for, and whether scales are to be powers of two.

    Raises:
        ShardwayError: `option-invalid` where it doesn't describe FP8 blocks.
    """
    settings = config.get(QUANTIZATION_CONFIG)
    if not isinstance(settings, dict) or settings.get("quant_method") != "fp8":
        raise _impossible(f"config.json has no {QUANTIZATION_CONFIG} with quant_method fp8")
    given = settings.get("weight_block_size", _BLOCK)
    if not (isinstance(given, list | tuple) and len(given) == 2 and all(type(n) is int and n > 0 for n in given)):
        raise _impossible(f"weight_block_size in {QUANTIZATION_CONFIG} is {given!r:.80}")
    return (given[0], given[1]), settings.get("scale_fmt") == "ue8m0"


def plan_requantised(
    names: Collection[str],
    config: Mapping[str, object],
    tiles: Iterable[Tile],
    tensors: Mapping[str, StoredTensor],
    source: Mapping[str, StoredTensor],
    passing: Iterable[Stream],
) -> Requantised:
    """Plan how tensors are quantised.

    Args:
        names: The tensors.
        config: The config that they go with.
        tiles: All tiles of the model.
        tensors: What is written, codes and scales among it.
        source: The Megatron tensors.
        passing: The streams of the plan, by which chunks are read anyway.
    """
    block, powers = block_of(config)
    swapped = [tile._replace(hf=tile.mcore, mcore=tile.hf) for tile in tiles if tile.hf.tensor in names]
    streams = build_streams(swapped, source, {name: tensors[name] for name in tensors if name in names})
    seen = {(stream.tensor, chunk.start) for stream in passing for chunk in stream.chunks}
    used = {piece.tile.hf.tensor: source[piece.tile.hf.tensor] for stream in streams for piece in stream.pieces}
    needed = {(piece.tile.hf.tensor, piece.hf.start) for stream in streams for piece in stream.pieces} - seen
    checked = tuple(
        stream
        for stream in build_streams((), {}, used)
        if any((stream.tensor, chunk.start) in needed for chunk in stream.chunks)
    )
    return Requantised(block=block, powers=powers, streams=streams, checked=checked)


def _impossible(why: str) -> ShardwayError:
    return ShardwayError(
        Problem(
            code=Code.OPTION_INVALID,
            what=f"quantize={Scheme.FP8_BLOCK.value!r} can't be done: {why}",
            cure="import the FP8 model with this version and export that, or export without the option",
        )
    )
