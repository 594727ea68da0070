"""What conversions of values lost: counted as bytes pass, reported when all have."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple


class Exactness(NamedTuple):
    """How well quantised tensors give their values back.

    Attributes:
        num_tensors: How many were quantised.
        num_exact: How many of them give every bit back.
        max_abs_error: Largest absolute difference of a value and what comes back for it.
        largest: The tensor in which that is; empty where all are exact.
    """

    num_tensors: int = 0
    num_exact: int = 0
    max_abs_error: float = 0.0
    largest: str = ""

    def plus(self, tensor: str, *, exact: bool, error: float) -> Exactness:
        """This and one more tensor, of which values come back with `error` at most."""
        larger = error > self.max_abs_error
        return Exactness(
            num_tensors=self.num_tensors + 1,
            num_exact=self.num_exact + exact,
            max_abs_error=error if larger else self.max_abs_error,
            largest=tensor if larger else self.largest,
        )


class Losses:
    """Counts of lost values by Hugging Face tensor, as one thread met them.

    Attributes:
        overflowed: Finite values that a cast made infinite.
        rounded: Values that a shift rounded, so that the way back doesn't give them.
        exactness: How well what was quantised gives its values back.
    """

    def __init__(self) -> None:
        self.overflowed: Counter[str] = Counter()
        self.rounded: Counter[str] = Counter()
        self.exactness = Exactness()

    def add(self, other: Losses) -> None:
        """Count what another thread met."""
        self.overflowed.update(other.overflowed)
        self.rounded.update(other.rounded)


def rounding_notes(losses: Losses) -> list[str]:
    """What a user should know about values that were rounded, one sentence each."""
    return [
        f"{count} values of {tensor} were rounded; an export gives them back only to the nearest"
        for tensor, count in sorted(losses.rounded.items())
    ]


def exactness_notes(found: Exactness) -> list[str]:
    """What a user should know about tensors that were quantised, one sentence each."""
    if not found.num_tensors:
        return []
    note = f"{found.num_tensors} tensors were quantised to fp8-block; {found.num_exact} of them give every bit back"
    if found.max_abs_error:
        note += f", the others differ by at most {found.max_abs_error:.3g} ({found.largest})"
    return [note]
