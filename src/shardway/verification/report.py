"""What a verification says, of two checkpoints or of one and its record."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One way in which two checkpoints, or one and its record, differ.

    Attributes:
        tensor: Name of the tensor: as Hugging Face calls it where one side is of that kind. Empty where a file is
            damaged outside of the tensors.
        kind: ``missing`` (from one side), ``shape``, ``dtype``, ``values`` or ``damaged`` (not what was recorded).
        detail: What was found on either side.
        first_index: For values: index of the first differing element in row-major order.
        num_elements: For values: how many elements differ in their bits.
        max_abs: For values: largest absolute difference; NaN where one of two differing values is NaN.
        file: For damage: the file that it is in.
    """

    tensor: str
    kind: str
    detail: str
    first_index: tuple[int, ...] | None = None
    num_elements: int | None = None
    max_abs: float | None = None
    file: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        a: The first checkpoint.
        b: The second checkpoint; None where the first was held against its own record.
        equal: Whether every tensor is there on both sides, bit for bit the same; of one checkpoint, whether every byte
            is as it was recorded.
        num_tensors: Tensors that were compared.
        num_bytes: Bytes of tensors that were compared; of one checkpoint, bytes of all its files.
        num_digests: Recorded digests that were checked: of chunks and, for one checkpoint, of files.
        differences: Everything that differs, by tensor name.
        seconds: Wall-clock time.
        dequantised: Number of tensors whose values were computed from quantised ones to be compared, by scheme.
    """

    a: str
    b: str | None
    equal: bool
    num_tensors: int
    num_bytes: int
    num_digests: int
    differences: tuple[Difference, ...]
    seconds: float
    dequantised: dict[str, int] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """The report as JSON-ready data."""
        return dataclasses.asdict(self)
