"""A model card's first lines, for a repository that has none."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_SOURCE = re.compile(r"hub:([^@\s]+)@([0-9a-f]+)")


def model_card(name: str, *, source: str | None, facts: Mapping[str, str], written_by: str) -> bytes:
    """README.md of a model that was exported.

    Args:
        name: ``org/name`` of its repository.
        source: What the checkpoint that it was exported from says about where its weights came from first.
        facts: What there is to say about it.
        written_by: Who exported it.
    """
    base = _SOURCE.fullmatch(source or "")
    head = ["---", "library_name: transformers", "tags:", "- safetensors"]
    if base is not None:
        head.append(f"base_model: {base[1]}")
    body = [f"# {name.partition('/')[2]}", ""]
    body += [f"Exported from a Megatron-Core checkpoint by {written_by}.", ""]
    body += [f"* {what}: {value}" for what, value in facts.items()]
    if base is not None:
        body.append(f"* base model: [{base[1]}](https://huggingface.co/{base[1]}), commit `{base[2]}`")
    return "\n".join([*head, "---", "", *body, ""]).encode()
