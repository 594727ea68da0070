"""Numbers and tables as a person reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def human_bytes(num_bytes: float) -> str:
    """Bytes in thousands, as ``cp`` benchmarks and disks count them: ``2.48 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def human_count(count: float) -> str:
    """A number of parameters: ``1.24 B``."""
    for unit in ("", " k", " M", " B"):
        if abs(count) < 1000:
            return f"{count:.0f}" if not unit else f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} T"


def plural(count: int, noun: str) -> str:
    """A count and its noun: ``1 file``, ``2,000 tensors``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def harmless(text: str) -> str:
    """The text with escapes for what can't be printed, such as the codes that a terminal obeys; lines stay lines."""
    return "".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns as wide as their widest cell, safe to print; numbers are right-aligned, empty columns out."""
    columns = [[name, *(harmless(row[k]) for row in rows)] for k, name in enumerate(header)]
    columns = [column for column in columns if any(column[1:]) or (column[0] and not rows)]
    shown = []
    for name, *cells in columns:
        width = max(map(len, (name, *cells)))
        right = all(cell.replace(",", "").replace(".", "").replace("-", "").isdigit() for cell in cells if cell)
        shown.append([cell.rjust(width) if right else cell.ljust(width) for cell in (name, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*shown, strict=True))
