"""What a conversion reports when it is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class ConversionReport(NamedTuple):
    """What a conversion did.

    Attributes:
        source: What was read.
        destination: What was written: the checkpoint's root, or the Hugging Face directory.
        architecture: Hugging Face class.
        family: Name of the model family.
        layout: ``stacked`` or ``per-layer``.
        iteration: Name of the iteration folder on the Megatron side, such as ``iter_0000000`` or ``release``.
        num_tensors: Tensors on the Hugging Face side.
        num_parameters: Their elements.
        num_bytes: Bytes of tensors that were moved.
        dtypes: Hugging Face tensors by dtype.
        num_files: Large files that were written.
        seconds: Wall-clock time from the call to its return.
        reused: Whether the destination was found complete, or another process made it, and nothing was done.
        resumed: Large files that an earlier run, which was killed, had finished, and that were found whole.
        verified: Whether the result was read back and compared with the source.
        notes: What a user should know about the result, one sentence each.
        dequantised: Of an import: number of tensors whose values were computed from quantised ones, by scheme.
        requantised: Of an export: number of tensors that were quantised (`num_tensors`), that give every bit back
            (`num_exact`), the largest difference (`max_abs_error`) and in which tensor it is (`largest`); None where
            none was.
        left_out: For an export, everything in the checkpoint that is no weight: keys of tensors, of objects, and of
            the common state.
    """

    source: str
    destination: str
    architecture: str
    family: str
    layout: str
    iteration: str
    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtypes: dict[str, int]
    num_files: int
    seconds: float
    reused: bool
    resumed: int
    verified: bool
    notes: tuple[str, ...]
    dequantised: Mapping[str, int]
    requantised: Mapping[str, int | float | str] | None = None
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The report as JSON-ready data."""
        import copy

        return copy.deepcopy(self._asdict())
