"""What conversions of values lost: counted as bytes pass, reported when all have."""

from __future__ import annotations

from collections import Counter


class Losses:
    """Counts of lost values by Hugging Face tensor, as one thread met them.

    Attributes:
        overflowed: Finite values that a cast made infinite.
        rounded: Values that a shift rounded, so that the way back doesn't give them.
    """

    def __init__(self) -> None:
        self.overflowed: Counter[str] = Counter()
        self.rounded: Counter[str] = Counter()

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
