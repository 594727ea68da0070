"""Planning a migration: a Megatron torch_dist iteration folder in, another one of the same values out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.boxes import Box
from shardway.core.errors import Code, Problem, Problems, ShardwayError
from shardway.core.tensors import Catalog, StoredTensor
from shardway.core.tiles import reach, restrict
from shardway.families.layout import Layout, layout_of
from shardway.formats.common_state import moved_common_state
from shardway.formats.dcp import write_metadata
from shardway.formats.record import RECORD_FILE
from shardway.formats.torch_dist import COMMON_STATE, metadata_json
from shardway.plans.chunking import shard_boxes, split_box
from shardway.plans.laying import Blob, Described, lay_out
from shardway.plans.model import Direction, Plan
from shardway.plans.relayout import relay
from shardway.plans.streams import BLOCK_BYTES, build_streams, chunk_problems
from shardway.plans.weights import joined

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from shardway.core.tensors import Chunk, Shape
    from shardway.core.tiles import Tile
    from shardway.families.parallel import Parallelism
    from shardway.formats.record import ChunkDigests
    from shardway.formats.torch_dist import TorchDistCheckpoint
    from shardway.plans.relayout import Relaid

_REWRITTEN = frozenset({".metadata", "metadata.json", "common.pt", RECORD_FILE})
_ALIGN = 64
_ALIGN_WORTHWHILE_BYTES = 2**16
_MOST_OBJECT_BYTES = 2**30  # of all pickled objects: they pass through memory
_MAX_FRAME_BYTES = 2 * BLOCK_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationOptions:
    """What a migration may be told.

    Attributes:
        common_pt: Whether the common state is to be a file ``common.pt``, as megatron-core up to 0.18 has it, or an
            object, as it has it from 0.19 on.
        layout: The layout to be; None for the one that is.
        parallel: The job along whose shards chunks are cut; None to keep the chunks that there are.
        max_file_bytes: No ``.distcp`` file grows larger, but for the least: one chunk of 4 KiB and what frames it.
    """

    common_pt: bool
    layout: Layout | None = None
    parallel: Parallelism | None = None
    max_file_bytes: int = 4 * 2**30


class Migration(NamedTuple):
    """A migration that is ready to be executed.

    Attributes:
        plan: What will be read (as the Hugging Face side) and written (as the Megatron side).
        layout: The layout that it leads to.
        expected: Digests that chunks to be must have, since they are chunks that there are.
    """

    plan: Plan
    layout: Layout
    expected: ChunkDigests


def plan_migration(
    source: TorchDistCheckpoint, recorded: ChunkDigests, destination: Path, options: MigrationOptions
) -> Migration:
    """Plan a migration completely; of the source, pickled objects are read, and no tensor.

    Args:
        source: The checkpoint, all of its tensors found.
        recorded: Digests that it records of its chunks.
        destination: The iteration folder to be.
        options: What the user chose.

    Raises:
        ShardwayError: Chunks that do not cover their tensor once; `option-invalid` for layers that can't be stacked and
            tensors that can't be cut evenly; `metadata-invalid` for a common state that can't be rewritten;
            `torch-file-invalid` for objects that are too large to pass through memory.
    """
    problems = chunk_problems(source.catalog.tensors.values())
    if problems:
        raise ShardwayError(problems)
    old = layout_of(source.catalog.tensors)
    layout = options.layout or old
    stored: Mapping[str, StoredTensor] = source.catalog.tensors
    if layout is Layout.STACKED and layout is not old:
        moved: dict[tuple[str, Shape], tuple[str, Shape]] = {}
        stored = joined(stored, source, moved, [])
        recorded = {moved.get(place, place): digest for place, digest in recorded.items()}
    objects = [key for key in source.places if key != COMMON_STATE]
    relaid = relay(stored, objects, layout if layout is not old else None, str(source.root))
    cuts = _cut(stored, relaid, options)
    kept, positions = _read_objects(source, relaid)
    common = moved_common_state(
        source.common_bytes(),
        listed=not options.common_pt,
        file=f"{source.root} (common state)",
        content_metadata=_content(source, layout) if layout is not old else None,
    )
    if not options.common_pt:
        kept.append(common)
    blobs = [cut.blob for cut in cuts]
    laid, chunks = lay_out(blobs, kept, options.max_file_bytes)
    places = {key: laid.objects[positions[key]] for key in relaid.objects}
    if not options.common_pt:
        places[COMMON_STATE] = laid.objects[-1]
    tensors = {
        key: StoredTensor(key, dtype, shape, tuple(chunks.get(key, ())))
        for key, (dtype, shape) in relaid.tensors.items()
    }
    small_files = {
        ".metadata": write_metadata(Described(tensors, laid), places),
        "metadata.json": metadata_json(common_pt=options.common_pt),
    }
    if options.common_pt:
        small_files["common.pt"] = common
    others = [name for name in source.files if name not in _REWRITTEN and not name.endswith(".distcp")]
    catalog = Catalog(root=destination, tensors=tensors)
    plan = Plan(
        direction=Direction.IMPORT,
        hf=Catalog(root=source.catalog.root, tensors=stored),
        mcore=catalog,
        streams=build_streams(relaid.tiles, stored, tensors, importing=True),
        targets=tuple(laid.targets),
        small_files=small_files,
        copied_files=tuple((name, name) for name in others),
        blob_offset=laid.blob_offset,
    )
    expected = {
        (cut.blob.key, cut.blob.box.start): digest
        for cut in cuts
        if cut.whole is not None and (digest := recorded.get(cut.whole)) is not None
    }
    return Migration(plan, layout, expected)


class _Cut(NamedTuple):
    """A chunk to be.

    Attributes:
        blob: The chunk.
        place: Where what is in it begins: by file and byte offset, or in the order of the keys.
        whole: Tensor and start of the chunk that it is the whole of.
    """

    blob: Blob
    place: tuple[str, int]
    whole: tuple[str, Shape] | None


def _cut(stored: Mapping[str, StoredTensor], relaid: Relaid, options: MigrationOptions) -> list[_Cut]:
    """All chunks, in the order in which they are to be laid down."""
    most = max(options.max_file_bytes - _MAX_FRAME_BYTES, BLOCK_BYTES)
    problems = Problems()
    ready: dict[str, list[Box]] = {}
    for key, (_, shape) in relaid.tensors.items():
        found = shard_boxes(key, shape, options.parallel, problems)
        if found is not None:
            ready[key] = found
    problems.raise_if_any()
    cuts: list[_Cut] = []
    for number, (key, boxes) in enumerate(ready.items()):
        dtype = relaid.tensors[key][0]
        for box in boxes:
            cuts += [
                _Cut(Blob(0, key, part, dtype, _ALIGN, 0), ("", number), None)
                for part in split_box(box, most // dtype.itemsize)
            ]
    for tile in relaid.tiles:
        key = tile.mcore.tensor
        if key in ready:
            continue
        tensor = stored[tile.hf.tensor]
        limit = most // tensor.dtype.itemsize
        for chunk in tensor.chunks:
            for box, whole in _parts(tile, chunk):
                align, phase = _phase(chunk, box, tensor) if whole else (_ALIGN, 0)
                origin = (tensor.name, chunk.start) if whole and box.num_elements <= limit else None
                cuts += [
                    _Cut(Blob(0, key, part, tensor.dtype, align, phase), (chunk.file, chunk.offset), origin)
                    for part in split_box(box, limit)
                ]
    cuts.sort(key=lambda cut: cut.place)
    return cuts


def _parts(tile: Tile, chunk: Chunk) -> list[tuple[Box, bool]]:
    """The boxes of the tensor to be that a chunk has of a tile, and whether they are all of the chunk."""
    box = Box(chunk.start, chunk.size)
    if not box.num_elements:
        return []
    found = []
    for part in restrict(tile, box, mcore=False):
        inside = Box(part.mcore.base, reach(part.sizes, part.mcore.steps, len(part.mcore.base)))
        found.append((inside, inside.num_elements == box.num_elements))
    return found


def _phase(chunk: Chunk, box: Box, tensor: StoredTensor) -> tuple[int, int]:
    """Alignment of a chunk, so that a filesystem can share the source's blocks."""
    worthwhile = tensor.dtype.num_bytes(box.num_elements) >= _ALIGN_WORTHWHILE_BYTES and chunk.offset % 8 == 0
    return (BLOCK_BYTES, chunk.offset % BLOCK_BYTES) if worthwhile else (_ALIGN, 0)


def _read_objects(source: TorchDistCheckpoint, relaid: Relaid) -> tuple[list[bytes], dict[str, int]]:
    """The objects' bytes, equal ones once, and which of them each key means."""
    kept: dict[bytes, int] = {}
    positions: dict[str, int] = {}
    total = 0
    known: dict[object, int] = {}
    for key, old in relaid.objects.items():
        location = source.places[old]
        if location not in known:
            contents = source.object_bytes(old)
            if contents not in kept:
                total += len(contents)
                if total > _MOST_OBJECT_BYTES:
                    raise ShardwayError(_too_large(source, total))
            known[location] = kept.setdefault(contents, len(kept))
        positions[key] = known[location]
    return list(kept), positions


def _too_large(source: TorchDistCheckpoint, total: int) -> Problem:
    return Problem(
        code=Code.TORCH_FILE_INVALID,
        what=f"the pickled objects of the checkpoint take more than {_MOST_OBJECT_BYTES:,} bytes",
        file=source.root,
        facts=(f"{total:,} bytes so far",),
        cure="an optimizer saved as one object is not carried: export the weights and import them again",
    )


def _content(source: TorchDistCheckpoint, layout: Layout) -> dict[str, object]:
    """What a loader is to read, so that it builds the matching sharded state dict."""
    content = dict(source.content_metadata)
    if layout is Layout.PER_LAYER:
        return content | {"non_homogeneous_layers": True}
    content.pop("non_homogeneous_layers", None)
    return content | ({"singleton_local_shards": False} if "singleton_local_shards" in content else {})
