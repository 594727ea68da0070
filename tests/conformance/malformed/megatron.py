"""Malformed .metadata, .distcp, common.pt, tracker and record."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zipfile
from typing import TYPE_CHECKING, Any

import xxhash
from tests.conformance.malformed.attacks import ATTACKS, BOMBS
from tests.conformance.malformed.case import Case, cases, link_out, overwrite
from tests.conformance.malformed.huggingface import BRACKETS, document, pipe

from shardway.core.dtypes import FLOAT32
from shardway.formats.dcp import DcpChunk, DcpLocation, DcpMetadata, DcpTensor, read_metadata, write_metadata
from shardway.formats.pickle_writer import integer
from shardway.formats.saved_objects import write_torch_file
from shardway.formats.tensor_pickles import tensor_pickle
from shardway.formats.torch_file import tensor_blob_frame
from shardway.formats.zips import central_entry, directory_end, local_entry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from shardway.core.tensors import Shape

FC1 = "decoder.layers.mlp.linear_fc1.weight"
NORM = "decoder.final_layernorm.weight"
READERS = ("inspect", "export", "plan")
EXPORT = ("export",)
PROTOCOL = b"\x80\x02"
DISTCP = "__0_0.distcp"
SCALE = tensor_pickle(FLOAT32, (4,))


def archive(*entries: tuple[bytes, bytes]) -> bytes:
    """A zip of stored entries, as `torch.save` frames them."""
    body, central = b"", b""
    for name, content in entries:
        entry = local_entry(name, content)
        central += central_entry(name, len(body), len(content), int.from_bytes(entry[14:18], "little"))
        body += entry
    return body + central + directory_end(len(entries), len(central), len(body))


def torch_file(pickle: bytes, **others: bytes) -> bytes:
    """A file of `torch.save` with this pickle."""
    entries = [(b"a/data.pkl", pickle), (b"a/byteorder", b"little"), (b"a/version", b"3\n")]
    return archive(*entries, *((b"a/" + name.replace("_", "/").encode(), data) for name, data in others.items()))


def metadata(change: Callable[[DcpMetadata], DcpMetadata]) -> Callable[[Path], object]:
    """Changes .metadata."""

    def spoil(folder: Path) -> None:
        path = folder / ".metadata"
        changed = change(read_metadata(path.read_bytes(), "sound"))
        path.write_bytes(write_metadata(changed.tensors, changed.objects))
        (folder / "shardway.json").unlink(missing_ok=True)  # it would give the change away

    return spoil


def chunks(key: str, change: Callable[[tuple[DcpChunk, ...]], Sequence[DcpChunk]]) -> Callable[[Path], object]:
    """Changes the chunks of a tensor in .metadata."""

    def edit(found: DcpMetadata) -> DcpMetadata:
        tensor = found.tensors[key]
        changed = tensor._replace(chunks=tuple(change(tensor.chunks)))
        return DcpMetadata(tensors={**found.tensors, key: changed}, objects=found.objects)

    return metadata(edit)


def place(**fields: Any) -> Callable[[Path], object]:
    """Changes where the only chunk of the last norm is said to lie."""
    return chunks(NORM, lambda found: [found[0]._replace(location=found[0].location._replace(**fields))])


def beyond(folder: Path) -> None:
    """Has it lie where no file reaches, which no writer of ours can say."""
    written, meant = 2**62 + 1, 2**63
    place(offset=written)(folder)
    path = folder / ".metadata"
    before = path.read_bytes()
    assert before.count(integer(written)) == 1
    path.write_bytes(before.replace(integer(written), integer(meant)))


def shape(value: Shape) -> Callable[[Path], object]:
    """Changes the shape of the last norm."""

    def edit(found: DcpMetadata) -> DcpMetadata:
        return DcpMetadata(
            tensors={**found.tensors, NORM: found.tensors[NORM]._replace(shape=value)}, objects=found.objects
        )

    return metadata(edit)


def also(key: str, tensor: DcpTensor) -> Callable[[Path], object]:
    """Adds a tensor to .metadata."""
    return metadata(lambda found: DcpMetadata(tensors={**found.tensors, key: tensor}, objects=found.objects))


def blob(content: bytes, *, key: str = NORM) -> Callable[[Path], object]:
    """Lets the chunk of a tensor be something else, at the end of its file."""

    def spoil(folder: Path) -> None:
        with (folder / DISTCP).open("ab") as file:
            at = file.tell()
            file.write(content)
        place(offset=at, length=len(content))(folder)

    return spoil


def norm(pickle: bytes, data: bytes = bytes(16)) -> Callable[[Path], object]:
    """Lets the last norm be saved with this pickle."""
    return blob(torch_file(pickle, data_0=data))


def entangled(count: int) -> DcpTensor:
    """A tensor whose chunks cover it once, but on no axis lie side by side: a naive proof takes count**3 steps."""
    boxes = []
    for column in range(count):
        rows, planes = 1 + column, 1 + column * 7919 % count
        for x, width in ((0, rows), (rows, count + 2 - rows)):
            for y, height in ((0, planes), (planes, count + 2 - planes)):
                boxes.append(((x, y, column), (width, height, 1)))
    return DcpTensor(
        FLOAT32,
        (count + 2, count + 2, count),
        tuple(DcpChunk(*box, DcpLocation(DISTCP, k, 1)) for k, box in enumerate(boxes)),
    )


def written_entangled(folder: Path) -> None:
    """Writes an entangled tensor, sparsely, so that only its proof can refuse it."""
    tensor = entangled(100)
    found = []
    with (folder / DISTCP).open("r+b") as file:
        at = file.seek(0, os.SEEK_END)
        for chunk in tensor.chunks:
            frame = tensor_blob_frame(tensor.dtype, chunk.size, offset=at)
            file.seek(at)
            file.write(frame.head)
            file.seek(frame.num_bytes, os.SEEK_CUR)
            file.write(frame.tail)
            found.append(chunk._replace(location=DcpLocation(DISTCP, at, frame.length)))
            at += frame.length
    also("entangled", tensor._replace(chunks=tuple(found)))(folder)


def compressed(pickle: bytes) -> bytes:
    """A file of `torch.save` that was packed again with compression."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", pickle)
        file.writestr("a/data/0", bytes(1 << 24))
    return packed.getvalue()


def again_and_again(num_elements: int, times: int) -> bytes:
    """A pickle of a list of many copies of one tensor, each of which costs five bytes."""
    call = b"](" + tensor_pickle(FLOAT32, (num_elements,))[2:-2]
    arguments = bytes((call.count(b"q"),))  # every call of the writer's memo is a BINPUT, and no name has a q
    return PROTOCOL + call + b"q" + arguments + b"R" + (b"h\x00h" + arguments + b"R") * times + b"e."


def record(change: Callable[[bytes], bytes], *, signed: bool = False) -> Callable[[Path], object]:
    """Changes the text of the record, and makes its own digest fit if asked to."""

    def spoil(folder: Path) -> None:
        path = folder / "shardway.json"
        data = change(path.read_bytes())
        if signed:
            blank = data[:-36] + b"0" * 32 + data[-4:]
            data = data[:-36] + xxhash.xxh3_128_hexdigest(blank).encode() + data[-4:]
        path.write_bytes(data)

    return spoil


def run_config(content: bytes) -> Callable[[Path], object]:
    """Changes run_config.yaml, which is read where no config.json is at hand."""

    def spoil(folder: Path) -> None:
        shutil.rmtree(folder / "hf")
        (folder / "shardway.json").unlink()
        (folder / "run_config.yaml").write_bytes(content)

    return spoil


def _emptied(folder: Path) -> Path:
    run_config(b"")(folder)
    return folder


def tokenizer_link(folder: Path) -> None:
    """Makes a file of Megatron Bridge's tokenizer folder a link out."""
    run_config((folder / "run_config.yaml").read_bytes())(folder)
    (folder / "tokenizer").mkdir(exist_ok=True)
    link_out("tokenizer/tokenizer.json")(folder)


def tracker(content: bytes) -> Callable[[Path], object]:
    """Changes the tracker file, which lies above the iteration's folder."""
    return lambda folder: (folder.parent / "latest_checkpointed_iteration.txt").write_bytes(content)


_PICKLED = {
    f"a .metadata: {name}": overwrite(".metadata", PROTOCOL + code + b".") for name, (_, code) in ATTACKS.items()
}
_COMMON = {
    f"a common.pt: {name}": overwrite("common.pt", torch_file(PROTOCOL + code + b"."))
    for name, (_, code) in ATTACKS.items()
}
_TENSORS = {f"a chunk: {name}": norm(PROTOCOL + code + b".") for name, (_, code) in ATTACKS.items()}

CASES: tuple[Case, ...] = (
    *cases(
        "pickle-invalid",
        READERS,
        {
            "an empty .metadata": overwrite(".metadata", b""),
            "a .metadata of zeros": overwrite(".metadata", bytes(4096)),
            "a .metadata cut short": lambda folder: os.truncate(folder / ".metadata", 1000),
            "a .metadata and more": lambda folder: (folder / ".metadata").write_bytes(
                (folder / ".metadata").read_bytes() + b"N."
            ),
            "a .metadata of protocol 9": overwrite(".metadata", b"\x80\x09N."),
            "a shape of 65 axes": shape((1,) * 65),
            "a negative shape": shape((-8,)),
            "a .metadata in text": overwrite(".metadata", b"(lp0\nS'a'\np1\na."),
            **{
                f"a .metadata: {name}": overwrite(".metadata", PROTOCOL + bomb + b".")
                for name, (code, bomb) in BOMBS.items()
                if code == "pickle-invalid"
            },
        },
    ),
    *cases("pickle-forbidden", READERS, _PICKLED | _COMMON | _TENSORS),
    *cases(
        "metadata-invalid",
        READERS,
        {
            "a .metadata that is a dict": overwrite(".metadata", PROTOCOL + b"}."),
            "a .metadata that is deep": overwrite(".metadata", PROTOCOL + b"]" * 100_000 + b"a" * 99_999 + b"."),
            "a .metadata of doubling tuples": overwrite(".metadata", PROTOCOL + BOMBS["tuples that double"][1] + b"."),
            "an impossible shape": shape((2**62, 2**62)),
            "a key with escape codes": also("\x1b[2J", DcpTensor(FLOAT32, (), ())),
            "a key of 5,000 letters": also("k" * 5000, DcpTensor(FLOAT32, (), ())),
            "a chunk listed twice": chunks(FC1, lambda found: (*found, found[0])),
            "a negative offset": place(offset=-1),
            "an offset beyond 2**63": beyond,
            "two chunks in the same bytes": chunks(
                FC1, lambda found: (found[0], found[1]._replace(location=found[0].location), *found[2:])
            ),
            "metadata.json that is no JSON": overwrite("metadata.json", b"torch_dist"),
            "metadata.json with a key twice": overwrite(
                "metadata.json", b'{"sharded_backend": "zarr", "sharded_backend": "torch_dist"}'
            ),
            "metadata.json without a backend": overwrite("metadata.json", b"{}"),
            "metadata.json nested deeply": overwrite("metadata.json", b"[" * 100_000),
            "metadata.json of brackets": overwrite("metadata.json", BRACKETS[:1_000_000]),
            "a common.pt that is a list": overwrite("common.pt", write_torch_file([1])),
        },
    ),
    *cases("metadata-invalid", READERS, {"chunks too entangled to be proven": written_entangled}),
    *cases(
        "backend-unsupported",
        READERS,
        {"another backend": overwrite("metadata.json", b'{"sharded_backend": "zarr"}')},
    ),
    *cases(
        "chunk-out-of-bounds",
        READERS,
        {
            "a chunk outside of its tensor": shape((4,)),
            "a chunk of another rank": shape((4, 2)),
            "a chunk that wraps around": chunks(NORM, lambda found: [found[0]._replace(start=(2**63 - 1,))]),
        },
    ),
    *cases(
        "chunk-overlap",
        READERS,
        {"chunks that overlap": chunks(FC1, lambda found: (found[0], found[1]._replace(start=(0, 3, 0)), *found[2:]))},
    ),
    *cases("chunk-hole", READERS, {"a chunk that is not there": chunks(FC1, lambda found: found[1:])}),
    *cases(
        "path-escapes",
        READERS,
        {
            "a chunk in an absolute path": place(file="/etc/passwd"),
            "a chunk above the folder": place(file="../../secret"),
            "a chunk above, within": place(file="a/../../secret"),
            "a chunk behind a backslash": place(file="..\\secret"),
            "a chunk on a drive": place(file="C:secret"),
            "a chunk with a zero byte": place(file="a\0b"),
            "a chunk in an empty name": place(file=""),
            "hf that is a link out": link_out("hf"),
        },
    ),
    *cases(
        "path-escapes",
        EXPORT,
        {
            "a tokenizer in hf that is a link out": link_out("hf/tokenizer.json"),
            "a tokenizer of Megatron Bridge that is a link out": tokenizer_link,
        },
    ),
    *cases(
        "config-invalid",
        EXPORT,
        {
            "a run_config that is no YAML": run_config(b"model: [1, 2"),
            "a run_config that is a list": run_config(b"- 1\n- 2\n"),
            "a run_config with a key twice": run_config(b"model:\n  a: 1\n  a: 2\n"),
            "a run_config that calls something": run_config(
                b"model: !!python/object/apply:os.system ['touch executed']"
            ),
            "a run_config that names something": run_config(b"model: !!python/name:os.system ''"),
            "a run_config that laughs": run_config(
                b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (k, k, k - 1, k - 1) for k in range(1, 60))
            ),
            "a run_config that contains itself": run_config(b"model: &m\n  a: *m\n"),
            "a run_config that merges": run_config(b"a: &a {x: 1}\nmodel:\n  <<: *a\n"),
            "a run_config nested deeply": run_config(b"model: " + b"[" * 10_000),
            "a run_config of many values": run_config(b"model: [" + b"1," * 300_000 + b"1]"),
            "a run_config that is not UTF-8": run_config(b"model: \xff\xfe\xff"),
            "a run_config with a zero byte": run_config(b"model: \0"),
            "a run_config of a number of 5,000 digits": run_config(b"model: " + b"1" * 5000),
        },
    ),
    *cases("config-missing", EXPORT, {"a run_config of nothing that is known": run_config(b"model: {a: 1}\n")}),
    *cases(
        "file-unreadable",
        EXPORT,
        {"a run_config of 17 MiB": lambda folder: os.truncate(_emptied(folder) / "run_config.yaml", 17 << 20)},
    ),
    *cases("file-missing", READERS, {"a chunk in a file that is not there": place(file="__9_9.distcp")}),
    *cases(
        "distcp-truncated",
        READERS,
        {
            "a chunk of exabytes": place(length=2**62),
            "a chunk beyond its file": place(offset=2**40),
            "an empty .distcp": overwrite(DISTCP, b""),
            "a .distcp cut short": lambda folder: os.truncate(folder / DISTCP, (folder / DISTCP).stat().st_size - 1),
        },
    ),
    *cases(
        "torch-file-invalid",
        READERS,
        {
            "a .distcp of zeros": lambda folder: (folder / DISTCP).write_bytes(bytes((folder / DISTCP).stat().st_size)),
            "a chunk of ten bytes": place(length=10),
            "a chunk of no bytes": place(length=0),
            "a chunk that is compressed": blob(compressed(SCALE)),
            "a chunk with thousands of entries": blob(archive(*((b"a/%d" % k, b"") for k in range(3000)))),
            "a chunk without a pickle": blob(archive((b"a/data/0", bytes(16)))),
            "a chunk whose storage is too short": norm(SCALE, bytes(12)),
            "a chunk whose storage is said to be huge": norm(
                SCALE.replace(b"K\x04tQ", b"\x8a\x08" + struct.pack("<q", 2**60) + b"tQ")
            ),
            "a chunk with two entries of a name": blob(
                archive((b"a/data.pkl", SCALE), (b"a/data/0", bytes(16)), (b"a/data/0", bytes(16)))
            ),
            "a chunk that is no tensor": norm(PROTOCOL + b"]."),
            "a chunk with odd strides": norm(SCALE.replace(b"(K\x01t", b"(K\x07t")),
            "a chunk of a big-endian machine": blob(
                archive((b"a/data.pkl", SCALE), (b"a/byteorder", b"big"), (b"a/data/0", bytes(16)))
            ),
            "an empty common.pt": overwrite("common.pt", b""),
            "a common.pt in the legacy form": overwrite("common.pt", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."),
            "a common.pt that is compressed": overwrite("common.pt", compressed(PROTOCOL + b"}.")),
            "a common.pt of a huge pickle": overwrite("common.pt", torch_file(PROTOCOL + bytes(33 << 20))),
            "a common.pt whose directory lies": overwrite(
                "common.pt", torch_file(PROTOCOL + b"}.")[:-74] + struct.pack("<2Q", 2**40, 2**40) + bytes(58)
            ),
            "a common.pt of the same tensor again and again": overwrite(
                "common.pt",
                torch_file(again_and_again(1 << 18, 400), data_0=bytes(1 << 20)),
            ),
            **{
                f"a common.pt: {name}": overwrite("common.pt", torch_file(PROTOCOL + bomb + b"."))
                for name, (code, bomb) in BOMBS.items()
                if code == "torch-file-invalid"
            },
        },
    ),
    *cases(
        "pickle-invalid",
        READERS,
        {
            "a common.pt of an empty pickle": overwrite("common.pt", torch_file(b"")),
            **{
                f"a common.pt: {name}": overwrite("common.pt", torch_file(PROTOCOL + bomb + b"."))
                for name, (code, bomb) in BOMBS.items()
                if code == "pickle-invalid"
            },
        },
    ),
    *cases("shape-mismatch", READERS, {"a chunk of another shape": norm(SCALE)}),
    *cases(
        "file-unreadable",
        READERS,
        {"metadata.json of 2 MiB": lambda folder: os.truncate(folder / "metadata.json", 2 << 20)},
    ),
    *cases(
        "metadata-missing",
        READERS,
        {"a pipe for .metadata": pipe(".metadata"), "a pipe for metadata.json": pipe("metadata.json")},
    ),
    *cases("file-missing", READERS, {"a pipe for a .distcp": pipe(DISTCP)}),
    *cases(
        "tracker-invalid",
        READERS,
        {
            "a tracker that climbs": tracker(b"../../etc"),
            "a tracker of noise": tracker(b"\xff\xfe\x1b[2J"),
            "a tracker of 1,000 digits": tracker(b"1" * 1000),
            "a tracker with a sign": tracker(b"-1"),
            "an empty tracker": tracker(b""),
        },
    ),
    *cases("file-unreadable", READERS, {"a tracker of a megabyte": tracker(bytes(1 << 20))}),
    *cases(
        "record-invalid",
        ("inspect", "export", "verify"),
        {
            "a record that is no JSON": record(lambda data: data[:-3]),
            "a record with a digit changed": record(lambda data: data.replace(b'"bytes": 1', b'"bytes": 2', 1)),
            "a record with a key twice": record(lambda data: data.replace(b"{", b'{"format": 2,', 1), signed=True),
            "a record of another format": record(lambda data: data.replace(b'"format": 2', b'"format": 9')),
            "a record of brackets": record(lambda data: b'{"a":' + BRACKETS + data[-46:]),
            "a record of wrong types": record(lambda data: data.replace(b'"copies": {}', b'"copies": []'), signed=True),
            "a record of negative sizes": record(
                lambda data: data.replace(b'"bytes": 1', b'"bytes": -1', 1), signed=True
            ),
        },
    ),
    *cases(
        "path-escapes",
        ("inspect", "export", "verify"),
        {
            "a record of files above": record(
                lambda data: data.replace(b'"common.pt"', b'"../../../etc/passwd"'), signed=True
            ),
        },
    ),
    *cases(
        "digest-mismatch",
        EXPORT,
        {"a config in hf that was changed": document("hf/config.json", lambda value: value.update(a=1))},
    ),
)
