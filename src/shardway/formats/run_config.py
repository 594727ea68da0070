"""run_config.yaml, as Megatron Bridge leaves it in an iteration folder: read as data, within bounds, and written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError
from shardway.formats.small_files import read_small_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import yaml

RUN_CONFIG = "run_config.yaml"
_MAX_BYTES = 16 * 2**20  # the largest seen have 40 kB; a config of a searched model is kept inside of it
_MAX_DEPTH = 32
_MAX_NODES = 200_000


def run_config_yaml(document: Mapping[str, object]) -> bytes:
    """The file's bytes for a tree of dicts, lists, strings, numbers, booleans and None."""
    import yaml  # start-up is faster without it

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return yaml.dump(dict(document), Dumper=dumper, encoding="utf-8", sort_keys=True, allow_unicode=True)


def read_run_config(folder: Path) -> dict[str, object] | None:
    """The content of an iteration folder's run_config.yaml; None where there is none.

    Tags are refused, and so are aliases, by which a small file can stand for a tree of any size; nothing is ever
    constructed but dicts, lists, strings, numbers, booleans and None.

    Raises:
        ShardwayError: `config-invalid` for what is no YAML mapping of that kind, `file-unreadable`.
    """
    path = folder / RUN_CONFIG
    if not path.is_file():
        return None
    data = read_small_file(path, _MAX_BYTES)
    import yaml

    try:
        _check_events(yaml.parse(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), path)
        document = yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - a safe loader
    except (yaml.YAMLError, ValueError, RecursionError, UnicodeError, OverflowError) as error:
        raise _invalid(path, f"it is no YAML: {str(error)[:200]}") from None
    if not isinstance(document, dict):
        raise _invalid(path, f"it holds a {type(document).__name__}, not a mapping")
    return document


def _check_events(events: Iterable[yaml.Event], path: Path) -> None:
    """Bound what the loader will build, before it builds it, and find keys that a mapping has twice."""
    import yaml

    open_collections: list[_Mapping | None] = []
    nodes = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _invalid(path, "it has anchors or aliases")
        if isinstance(event, yaml.CollectionEndEvent):
            open_collections.pop()
        if not isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
            continue
        nodes += 1
        if event.tag not in (None, "!"):
            raise _invalid(path, f"it has the tag {str(event.tag)[:80]!r}")
        scalar = event.value if isinstance(event, yaml.ScalarEvent) else None
        inside = open_collections[-1] if open_collections else None
        if inside is not None and inside.takes(scalar):
            raise _invalid(path, f"it gives the key {str(scalar)[:80]!r} twice")
        if isinstance(event, yaml.CollectionStartEvent):
            open_collections.append(_Mapping() if isinstance(event, yaml.MappingStartEvent) else None)
        if len(open_collections) > _MAX_DEPTH or nodes > _MAX_NODES:
            raise _invalid(path, f"it is nested deeper than {_MAX_DEPTH} or has more than {_MAX_NODES:,} values")


class _Mapping:
    """A mapping that is being read: keys and values come in turn."""

    def __init__(self) -> None:
        self._keys: set[str] = set()
        self._at_key = False

    def takes(self, scalar: str | None) -> bool:
        """Count the next node; True where it is a key that was there before."""
        self._at_key = not self._at_key
        if not self._at_key or scalar is None:
            return False
        known = scalar in self._keys
        self._keys.add(scalar)
        return known


def _invalid(path: Path, why: str) -> ShardwayError:
    return ShardwayError(
        Problem(
            code=Code.CONFIG_INVALID,
            what=f"{RUN_CONFIG} can't be understood: {why}",
            file=path,
            cure="pass --hf DIR, a directory with the model's config.json",
        )
    )
