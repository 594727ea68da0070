"""Hugging Face checkpoint directories: what is in one.

Source: transformers 5.12 (`_get_resolved_checkpoint_files` in modeling_utils.py).
"""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING, NamedTuple

from shardway.core.collector import collector_paused
from shardway.core.errors import Code, Problem, Problems, ShardwayError
from shardway.core.tensors import Catalog, StoredTensor
from shardway.formats.file_problems import missing_file, printable, unreadable_file
from shardway.formats.json_text import JsonInvalidError, parse_json
from shardway.formats.safetensors import SafetensorsFile, read_safetensors
from shardway.formats.sharding import INDEX_FILE, SINGLE_FILE
from shardway.formats.small_files import links_out

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from shardway.formats.quantised import Quantised

CONFIG_FILE = "config.json"

_MAX_CONFIG_BYTES = 16 * 2**20  # the largest on the Hub have some hundred kB
_MAX_INDEX_BYTES = 64 * 2**20  # 91,000 tensors take 9 MB
_MAX_SMALL_FILE_BYTES = 64 * 2**20  # the largest tokenizers have 35 MB
_MAX_DEPTH = 3
_MAX_FILES = 100_000
_MAX_LISTED = 8  # names in one message
_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".distcp", ".npz", ".npy")
_NOT_CARRIED = (".safetensors", *_INDEX_SUFFIXES, *_OTHER_WEIGHTS)
_MEGATRON_FILES = {".metadata", "metadata.json", "latest_checkpointed_iteration.txt"}
_SHARD = re.compile(r"(.+)-(\d{1,9})-of-(\d{1,9})\.safetensors", re.DOTALL)
_CURE_DOWNLOAD = "fetch the checkpoint again; the download is incomplete"
_CURE_INDEX = f"fetch the checkpoint again, all files from one revision, or delete {INDEX_FILE} if it is a leftover"


_TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece")
_TOKENIZER_SUFFIXES = (".model", ".tiktoken", ".jinja")


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name, beside a model's weights, belongs to its tokenizer."""
    return name.startswith(_TOKENIZER) or name.endswith(_TOKENIZER_SUFFIXES)


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights in any format."""
    return name.lower().endswith((".safetensors", *_OTHER_WEIGHTS))


class SmallFile(NamedTuple):
    """A file that is no weights: configuration, tokenizer, licence.

    Attributes:
        name: Path relative to the checkpoint's root.
        num_bytes: Size in bytes.
    """

    name: str
    num_bytes: int


class HuggingFaceCheckpoint(NamedTuple):
    """What is in a Hugging Face checkpoint directory.

    Attributes:
        catalog: All tensors; their chunks name files relative to the root.
        config: The content of ``config.json``.
        files: The safetensors files that hold the weights, relative to the root, sorted.
        unread: The tensors that the index which chose the files names and that no file that could be read holds; None
            where no index chose.
        small_files: The files to carry along with the weights, ``config.json`` among them, sorted by name.
        left_out: The files that are not carried, sorted: other copies of the weights, files too big or too deep
            (a directory ends in ``/``), links to directories, things that are no files.
        quantised: Where the values of tensors come from that are presented in the place of what is stored
            (`formats.quantised.present`).
        num_activation_scales: How many tensors beside quantised weights were left aside: they are for activations.
        faults: What is wrong with quantised weights; whoever uses the tensors raises it.
    """

    catalog: Catalog
    config: dict[str, object]
    files: tuple[str, ...]
    unread: frozenset[str] | None
    small_files: tuple[SmallFile, ...]
    left_out: tuple[str, ...]
    quantised: Mapping[str, Quantised] = {}
    num_activation_scales: int = 0
    faults: tuple[Problem, ...] = ()


class _Tree(NamedTuple):
    """The names below the root that are not hidden: regular files with their sizes, links to nowhere, the rest."""

    files: dict[str, int]
    broken: set[str]
    others: list[str]

    @property
    def names(self) -> set[str]:
        return self.broken | self.files.keys()

    def top_level(self, *suffixes: str) -> list[str]:
        return sorted(name for name in self.names if "/" not in name and name.lower().endswith(suffixes))


def open_huggingface(root: Path) -> HuggingFaceCheckpoint:
    """Read what a Hugging Face checkpoint directory holds, and vouch that its weights are all there.

    Reads the names and sizes of the files, ``config.json``, the index and the headers of the safetensors files; never
    a tensor's data. Picks the weights as transformers does: ``model.safetensors``, else the files that the index
    names; without either, every ``*.safetensors`` at top level (save Mistral's own copy, ``consolidated*``, where it
    is not the only one). Where the index itself names ``model.safetensors``, the index decides.

    Args:
        root: The directory; symbolic links to files are followed, as the Hub's cache needs.

    Returns:
        The tensors, the configuration, and the other files.

    Raises:
        ShardwayError: `not-a-checkpoint`, `config-missing`, `config-invalid`, `weights-not-safetensors`,
            `index-invalid`, `index-mismatch`, `path-escapes`, `file-missing`, `file-unreadable`, `tensor-duplicate`,
            and whatever `read_safetensors` finds; the problems of all files at once.
    """
    problems = Problems()
    found = survey_huggingface(root, problems)
    problems.raise_if_any()
    return found


@collector_paused()
def survey_huggingface(root: Path, problems: Problems) -> HuggingFaceCheckpoint:
    """What `open_huggingface` finds where it would raise: all that can be read, and every problem of the rest.

    Args:
        root: The directory.
        problems: Gets what is wrong with it; nothing that is returned can be relied on when it gets anything.

    Raises:
        ShardwayError: `not-a-checkpoint`.
    """
    tree = _walk(root, problems)
    if CONFIG_FILE not in tree.names and (_is_megatron(root) or not tree.top_level(*_NOT_CARRIED)):
        raise ShardwayError(_not_a_checkpoint(root, "it has neither config.json nor weights"))
    config: dict[str, object] = {}
    index: dict[str, str] | None = None
    headers: dict[str, SafetensorsFile] = {}
    try:
        config = _read_config(root, tree)
    except ShardwayError as error:
        problems.extend(error.problems)
    try:
        written_index = _read_index(root) if INDEX_FILE in tree.names else None
        files = _choose_files(root, tree, written_index, problems)
    except ShardwayError as error:
        problems.extend(error.problems)
    else:
        index = written_index if files != (SINGLE_FILE,) or SINGLE_FILE in (written_index or {}).values() else None
        headers = _read_headers(root, files, index, problems)
        _check_duplicates(root, headers, problems)
        if index is not None:
            _check_index(root, headers, index, problems)
        elif written_index is not None:
            _check_other_index(root, headers, written_index, problems)
    small_files, left_out = _sort_out(tree, {*headers, *([INDEX_FILE] if index is not None else [])})
    problems.extend(links_out(root, [file.name for file in small_files]))
    problems.extend(missing_file(root / name) for name in sorted(tree.broken) if _is_carried(name, CONFIG_FILE))
    tensors: dict[str, StoredTensor] = {}
    for header in headers.values():
        tensors |= header.tensors
    return HuggingFaceCheckpoint(
        catalog=Catalog(root=root, tensors=tensors),
        config=config,
        files=tuple(headers),
        unread=None if index is None else frozenset(index.keys() - tensors.keys()),
        small_files=small_files,
        left_out=left_out,
    )


def weight_files(root: Path) -> tuple[str, ...]:
    """The names of the files that hold the weights, as `open_huggingface` picks them; of them nothing is read.

    Raises:
        ShardwayError: `not-a-checkpoint`, `index-invalid`, `path-escapes`, `weights-not-safetensors`, `file-missing`.
    """
    tree = _walk(root, Problems())
    return _choose_files(root, tree, _read_index(root) if INDEX_FILE in tree.names else None, Problems())


def read_companions(root: Path) -> tuple[dict[str, object], tuple[SmallFile, ...]]:
    """The configuration and the other small files of a model's directory, whether or not weights lie beside them.

    Args:
        root: A directory with ``config.json``.

    Returns:
        The content of ``config.json``, and the files to carry along, ``config.json`` among them.

    Raises:
        ShardwayError: `not-a-checkpoint`, `config-missing`, `config-invalid`, `file-unreadable`, `path-escapes`.
    """
    problems = Problems()
    tree = _walk(root, problems)
    small_files = _sort_out(tree, set())[0]
    problems.extend(links_out(root, [file.name for file in small_files]))
    problems.raise_if_any()
    return _read_config(root, tree), small_files


def read_small_files(root: Path) -> tuple[SmallFile, ...]:
    """The files of a directory that are no weights, whether or not a model is among them.

    Raises:
        ShardwayError: `not-a-checkpoint` for what is no directory, `file-unreadable`, `path-escapes`.
    """
    problems = Problems()
    tree = _walk(root, problems)
    small_files = _sort_out(tree, set())[0]
    problems.extend(links_out(root, [file.name for file in small_files]))
    problems.raise_if_any()
    return small_files


def _walk(root: Path, problems: Problems) -> _Tree:
    try:
        if not stat.S_ISDIR(root.stat().st_mode):
            raise ShardwayError(_not_a_checkpoint(root, "it is not a directory"))
    except FileNotFoundError:
        raise ShardwayError(_not_a_checkpoint(root, "it does not exist")) from None
    except NotADirectoryError:
        raise ShardwayError(_not_a_checkpoint(root, "a parent of it is not a directory")) from None
    except (OSError, ValueError) as error:
        raise ShardwayError(unreadable_file(root, error)) from error
    tree = _Tree({}, set(), [])
    _walk_into(root, "", 1, tree, problems)
    return tree


def _walk_into(root: Path, parent: str, depth: int, tree: _Tree, problems: Problems) -> None:
    try:
        with os.scandir(root / parent) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        problems.extend([unreadable_file(root / parent, error)])
        return
    if len(tree.files) + len(found) > _MAX_FILES:
        raise ShardwayError(_not_a_checkpoint(root, f"it holds more than {_MAX_FILES:,} files"))
    for entry in found:
        name = parent + entry.name
        try:
            status = entry.stat()
        except FileNotFoundError:
            tree.broken.add(name)
            continue
        except OSError as error:
            problems.extend([unreadable_file(root / name, error)])
            continue
        if stat.S_ISREG(status.st_mode):
            tree.files[name] = status.st_size
        elif stat.S_ISDIR(status.st_mode) and depth < _MAX_DEPTH and not entry.is_symlink():
            _walk_into(root, name + "/", depth + 1, tree, problems)
        else:
            tree.others.append(name + "/" * stat.S_ISDIR(status.st_mode))


def _not_a_checkpoint(root: Path, why: str) -> Problem:
    return Problem(
        code=Code.NOT_A_CHECKPOINT,
        what=f"{root} is not a Hugging Face checkpoint: {why}",
        file=root,
        cure="this is a Megatron checkpoint; convert it in the other direction"
        if _is_megatron(root)
        else "give the directory that holds config.json and the *.safetensors files",
    )


def _is_megatron(root: Path) -> bool:
    try:
        return not _MEGATRON_FILES.isdisjoint(os.listdir(root))
    except OSError:
        return False


def _read_config(root: Path, tree: _Tree) -> dict[str, object]:
    if CONFIG_FILE not in tree.names:
        what = f"{root} has no {CONFIG_FILE}"
        cure = f"put the model's {CONFIG_FILE} beside its weights; it says which architecture they are"
        raise ShardwayError(Problem(code=Code.CONFIG_MISSING, what=what, file=root / CONFIG_FILE, cure=cure))
    return _read_json(root / CONFIG_FILE, _MAX_CONFIG_BYTES, Code.CONFIG_INVALID)


def _read_index(root: Path) -> dict[str, str]:
    """The weight map, in which every file name stays inside the root."""
    path = root / INDEX_FILE
    weight_map = _read_json(path, _MAX_INDEX_BYTES, Code.INDEX_INVALID).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        what = f"{INDEX_FILE} has no weight_map that maps tensors to files"
        raise ShardwayError(Problem(code=Code.INDEX_INVALID, what=what, file=path, cure=_CURE_INDEX))
    problems = Problems()
    wrong = [tensor for tensor, file in weight_map.items() if not isinstance(file, str)]
    if wrong:
        what = f"{INDEX_FILE} maps {len(wrong)} tensors to something other than a file name: {_list(wrong)}"
        problems.add(Code.INDEX_INVALID, what, file=path, cure=_CURE_INDEX)
    for file in sorted({file for file in weight_map.values() if isinstance(file, str)}):
        if "\0" in file or "\\" in file or any(part in {"", ".", ".."} for part in file.split("/")):
            what = f"{INDEX_FILE} names the file {printable(file)!r}, which is not a plain path below the checkpoint"
            problems.add(Code.PATH_ESCAPES, what, file=path, cure="don't trust this checkpoint; fetch it elsewhere")
    problems.raise_if_any()
    return weight_map


def _read_json(path: Path, max_bytes: int, code: Code) -> dict[str, object]:
    """The JSON object in a file of at most `max_bytes`; `code` is the kind of problem if there is none."""

    def invalid(why: str) -> ShardwayError:
        what = f"{printable(path.name)} {why}"
        return ShardwayError(Problem(code=code, what=what, file=path, cure="fetch or write the file again"))

    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ShardwayError(unreadable_file(path, "it is not a regular file"))
        if status.st_size > max_bytes:
            raise invalid(f"has {status.st_size} bytes; at most {max_bytes} are accepted")
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise ShardwayError(missing_file(path)) from None
    except OSError as error:
        raise ShardwayError(unreadable_file(path, error)) from error
    except JsonInvalidError as error:
        raise invalid(str(error)) from None
    if not isinstance(value, dict):
        raise invalid(f"holds a JSON {type(value).__name__}, not an object")
    return value


def _choose_files(root: Path, tree: _Tree, index: Mapping[str, str] | None, problems: Problems) -> tuple[str, ...]:
    """The names of the files that hold the weights, sorted."""
    top = tree.top_level(".safetensors")
    indexed = set(index.values()) if index is not None else set()
    if SINGLE_FILE in top and SINGLE_FILE not in indexed:
        return (SINGLE_FILE,)
    if indexed:
        return tuple(sorted(indexed))
    if not top:
        raise ShardwayError(_no_weights(root, tree))
    files = [name for name in top if not name.startswith("consolidated")] or top
    _check_shard_numbers(root, files, problems)
    return tuple(files)


def _no_weights(root: Path, tree: _Tree) -> Problem:
    others = tree.top_level(*_OTHER_WEIGHTS)
    if others:
        return Problem(
            code=Code.WEIGHTS_NOT_SAFETENSORS,
            what=f"the weights are not in safetensors but in {_list(others)}",
            file=root,
            cure="load them with transformers and write them with save_pretrained(..., safe_serialization=True), "
            "or fetch the revision that the Hub's safetensors conversion made (refs/pr/...)",
        )
    return Problem(
        code=Code.FILE_MISSING,
        what=f"{root} has no weights",
        file=root,
        facts=(f"expected {SINGLE_FILE}, or {INDEX_FILE} with the shards that it names, or other *.safetensors",),
        cure=_CURE_DOWNLOAD,
    )


def _check_shard_numbers(root: Path, files: Sequence[str], problems: Problems) -> None:
    """Without an index, the names ``<stem>-<i>-of-<n>`` are all that tells whether a shard is missing."""
    families: dict[tuple[str, str], dict[int, str]] = {}
    for name in files:
        if match := _SHARD.fullmatch(name):
            families.setdefault((match[1], match[3]), {})[int(match[2])] = match[2]
    for (stem, total), numbers in sorted(families.items()):
        first = 0 if 0 in numbers else 1  # some writers count from zero
        expected = range(first, first + int(total))
        num_missing = len(expected) - sum(number in expected for number in numbers)
        if num_missing:
            width = len(next(iter(numbers.values())))
            names = (
                f"{stem}-{number:0{width}d}-of-{total}.safetensors" for number in expected if number not in numbers
            )
            listed = [name for name, _ in zip(names, range(_MAX_LISTED), strict=False)]
            problems.add(
                Code.FILE_MISSING,
                f"{num_missing} of {int(total)} shards are missing: {_list(listed, num_missing)}",
                file=root / listed[0],
                facts=(f"there is no {INDEX_FILE}, so the names of the shards present were counted",),
                cure=_CURE_DOWNLOAD,
            )


def _read_headers(
    root: Path, files: Sequence[str], index: Mapping[str, str] | None, problems: Problems
) -> dict[str, SafetensorsFile]:
    num_indexed: dict[str, int] = {}
    for file in (index or {}).values():
        num_indexed[file] = num_indexed.get(file, 0) + 1
    headers: dict[str, SafetensorsFile] = {}
    for file in files:
        try:
            headers[file] = read_safetensors(root / file, file=file)
        except ShardwayError as error:
            for problem in error.problems:
                if problem.code is Code.FILE_MISSING and index is not None:
                    fact = f"{INDEX_FILE} places {num_indexed[file]} of {len(index)} tensors in it"
                    problem = problem._replace(facts=(fact,), cure=problem.cure or _CURE_DOWNLOAD)
                problems.extend([problem])
    return headers


def _check_duplicates(root: Path, headers: Mapping[str, SafetensorsFile], problems: Problems) -> None:
    owners: dict[str, str] = {}
    repeated: dict[tuple[str, str], list[str]] = {}
    for file, header in headers.items():
        for name in header.tensors:
            owner = owners.setdefault(name, file)
            if owner != file:
                repeated.setdefault((owner, file), []).append(name)
    for (owner, file), names in repeated.items():
        problems.add(
            Code.TENSOR_DUPLICATE,
            f"{len(names)} tensors are both in {printable(owner)} and in {printable(file)}: {_list(names)}",
            tensor=names[0],
            file=root / file,
            cure="remove the file that is a leftover; every tensor may be stored once",
        )


def _check_index(
    root: Path, headers: Mapping[str, SafetensorsFile], index: Mapping[str, str], problems: Problems
) -> None:
    """Check that each shard holds exactly the tensors that the index places in it."""
    expected: dict[str, set[str]] = {}
    for name, file in index.items():
        expected.setdefault(file, set()).add(name)
    for file, header in headers.items():
        missing = expected[file] - header.tensors.keys()
        # A tensor that the file has and the index places in another file which has it too is a duplicate, said above.
        extra = [
            name
            for name in header.tensors.keys() - expected[file]
            if name not in index or index[name] not in headers or name not in headers[index[name]].tensors
        ]
        _report_mismatch(root / file, file, missing, extra, problems)


def _check_other_index(
    root: Path, headers: Mapping[str, SafetensorsFile], index: Mapping[str, str], problems: Problems
) -> None:
    """Check that an index beside ``model.safetensors`` speaks of the same tensors."""
    for file, header in headers.items():
        missing, extra = index.keys() - header.tensors.keys(), header.tensors.keys() - index.keys()
        _report_mismatch(root / file, file, missing, extra, problems)


def _report_mismatch(path: Path, file: str, missing: Iterable[str], extra: Iterable[str], problems: Problems) -> None:
    missing, extra = sorted(missing), sorted(extra)
    facts = []
    if missing:
        facts.append(f"in the index but not in the file: {len(missing)} tensors: {_list(missing)}")
    if extra:
        facts.append(f"in the file but not so in the index: {len(extra)} tensors: {_list(extra)}")
    if facts:
        what = f"{INDEX_FILE} and {printable(file)} disagree about the tensors in it"
        problems.add(Code.INDEX_MISMATCH, what, tensor=(missing + extra)[0], file=path, facts=facts, cure=_CURE_INDEX)


def _sort_out(tree: _Tree, used: set[str]) -> tuple[tuple[SmallFile, ...], tuple[str, ...]]:
    """Every file that is not `used` for the weights: those to carry along, and the names of the rest."""
    small_files: list[SmallFile] = []
    left_out = [*tree.others, *(name for name in tree.broken if not _is_carried(name))]
    for name, num_bytes in sorted(tree.files.items()):
        if name in used:
            continue
        if num_bytes <= _MAX_SMALL_FILE_BYTES and _is_carried(name):
            small_files.append(SmallFile(name=name, num_bytes=num_bytes))
        else:
            left_out.append(name)
    return tuple(small_files), tuple(sorted(left_out))


def _is_carried(name: str, *exceptions: str) -> bool:
    return not name.lower().endswith(_NOT_CARRIED) and name not in exceptions


def _list(names: Sequence[str], num_names: int | None = None) -> str:
    """The first few names, and how many more there are."""
    listed = ", ".join(printable(name) for name in names[:_MAX_LISTED])
    num_more = (len(names) if num_names is None else num_names) - min(len(names), _MAX_LISTED)
    return f"{listed} and {num_more} more" if num_more else listed
