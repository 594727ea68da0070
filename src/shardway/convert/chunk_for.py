"""The option ``--chunk-for``: for which job chunks are to be cut."""

from __future__ import annotations

import re

from shardway.convert.options import invalid_option
from shardway.families.parallel import Parallelism

_FIELD = re.compile(r"\s*(tp|etp|ep|pp)\s*=\s*([1-9]\d{0,5})\s*")


def parse_chunk_for(value: str) -> Parallelism | None:
    """The job that ``--chunk-for`` names, such as ``"tp=8,ep=8"``; None for an empty text.

    Without ``etp`` experts are divided by tensor parallelism like everything else, which is megatron-core's default.
    ``pp`` is allowed and changes nothing: layers lie apart anyway.

    Raises:
        ShardwayError: `option-invalid`.
    """
    if not value.strip():
        return None
    found: dict[str, int] = {}
    for field in value.split(","):
        match = _FIELD.fullmatch(field)
        if match is None or match[1] in found:
            raise invalid_option("chunk_for", value, "each of tp, etp, ep and pp at most once, such as tp=8,ep=8")
        found[match[1]] = int(match[2])
    tp = found.get("tp", 1)
    return Parallelism(tp=tp, etp=found.get("etp", tp), ep=found.get("ep", 1))
