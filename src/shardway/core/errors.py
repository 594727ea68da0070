"""The closed family of errors: every failure is one or more problems, each with a stable code."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class Code(enum.StrEnum):
    """Stable identifiers of problems; docs/errors.md says what each means and what to do."""

    # The Hugging Face side
    NOT_A_CHECKPOINT = "not-a-checkpoint"
    CONFIG_MISSING = "config-missing"
    CONFIG_INVALID = "config-invalid"
    ARCHITECTURE_UNSUPPORTED = "architecture-unsupported"
    WEIGHTS_NOT_SAFETENSORS = "weights-not-safetensors"
    SAFETENSORS_HEADER = "safetensors-header"
    SAFETENSORS_TRUNCATED = "safetensors-truncated"
    SAFETENSORS_OVERLAP = "safetensors-overlap"
    SAFETENSORS_GAP = "safetensors-gap"
    INDEX_INVALID = "index-invalid"
    INDEX_MISMATCH = "index-mismatch"
    FILE_MISSING = "file-missing"
    FILE_UNREADABLE = "file-unreadable"
    # Tensors of either side
    DTYPE_UNKNOWN = "dtype-unknown"
    DTYPE_UNSUPPORTED = "dtype-unsupported"
    DTYPE_MIXED = "dtype-mixed"
    CAST_OVERFLOW = "cast-overflow"
    TENSOR_MISSING = "tensor-missing"
    TENSOR_UNEXPECTED = "tensor-unexpected"
    TENSOR_DUPLICATE = "tensor-duplicate"
    SHAPE_MISMATCH = "shape-mismatch"
    TIED_WEIGHTS_DIFFER = "tied-weights-differ"
    # The Megatron side
    METADATA_MISSING = "metadata-missing"
    METADATA_INVALID = "metadata-invalid"
    BACKEND_UNSUPPORTED = "backend-unsupported"
    TRACKER_INVALID = "tracker-invalid"
    CHUNK_HOLE = "chunk-hole"
    CHUNK_OVERLAP = "chunk-overlap"
    CHUNK_OUT_OF_BOUNDS = "chunk-out-of-bounds"
    DISTCP_TRUNCATED = "distcp-truncated"
    TORCH_FILE_INVALID = "torch-file-invalid"
    PICKLE_FORBIDDEN = "pickle-forbidden"
    PICKLE_INVALID = "pickle-invalid"
    PATH_ESCAPES = "path-escapes"
    DIGEST_MISMATCH = "digest-mismatch"
    RECORD_INVALID = "record-invalid"
    RECORD_MISSING = "record-missing"
    MASTERS_MISSING = "masters-missing"
    # The destination
    DESTINATION_EXISTS = "destination-exists"
    DESTINATION_UNWRITABLE = "destination-unwritable"
    DESTINATION_INSIDE_SOURCE = "destination-inside-source"
    DESTINATION_BUSY = "destination-busy"
    LEASE_LOST = "lease-lost"
    NO_SPACE = "no-space"
    # Live saves
    SAVE_DISAGREES = "save-disagrees"
    SAVE_INCOMPLETE = "save-incomplete"
    SAVE_RANK_FAILED = "save-rank-failed"
    SAVE_RANK_LOST = "save-rank-lost"
    STORE_FAILED = "store-failed"
    # Live exports
    GATHER_FAILED = "gather-failed"
    # The Hub
    HUB_NOT_FOUND = "hub-not-found"
    HUB_REVISION_MISSING = "hub-revision-missing"
    HUB_GATED = "hub-gated"
    HUB_OFFLINE = "hub-offline"
    HUB_UNREACHABLE = "hub-unreachable"
    HUB_REFUSED = "hub-refused"
    DOWNLOAD_DAMAGED = "download-damaged"
    EXTRA_MISSING = "extra-missing"
    # While running
    IO_FAILED = "io-failed"
    SOURCE_CHANGED = "source-changed"
    VERIFY_FAILED = "verify-failed"
    INTERRUPTED = "interrupted"
    OPTION_INVALID = "option-invalid"
    COVERAGE = "coverage"


class Problem(NamedTuple):
    """One thing that is wrong: what was being done, to which tensor and file, the numbers, and the way out.

    Attributes:
        code: What kind of problem it is; stable across releases.
        what: One line that can stand alone.
        tensor: The tensor concerned, by its name in the file.
        file: The file concerned.
        facts: Further lines: expected against got, with units.
        cure: What the user can do about it.
    """

    code: Code
    what: str
    tensor: str | None = None
    file: Path | str | None = None
    facts: tuple[str, ...] = ()
    cure: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.code}: {self.what}"]
        lines += [f"  {fact}" for fact in self.facts]
        if self.file is not None:
            lines.append(f"  file {self.file}")
        if self.cure:
            lines.append(f"  {self.cure}")
        return "\n".join(lines)


class ShardwayError(Exception):
    """What every public call raises when it can't do what it promises; nothing has been published then.

    Attributes:
        problems: All the problems that were found, at least one.
    """

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @property
    def code(self) -> Code:
        """The code of the first problem."""
        return self.problems[0].code

    @property
    def codes(self) -> frozenset[Code]:
        """The codes of all problems."""
        return frozenset(problem.code for problem in self.problems)

    def __reduce__(self) -> tuple[type[ShardwayError], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


class Problems:
    """Gathers problems so that a user sees all of them at once, not the first."""

    def __init__(self) -> None:
        self._found: list[Problem] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(
        self,
        code: Code,
        what: str,
        *,
        tensor: str | None = None,
        file: Path | str | None = None,
        facts: Iterable[str] = (),
        cure: str | None = None,
    ) -> None:
        """Record one problem; the arguments are those of `Problem`."""
        self._found.append(Problem(code=code, what=what, tensor=tensor, file=file, facts=tuple(facts), cure=cure))

    def extend(self, problems: Iterable[Problem]) -> None:
        """Record several problems."""
        self._found.extend(problems)

    def raise_if_any(self) -> None:
        """Raise `ShardwayError` with everything gathered so far, or do nothing."""
        if self._found:
            raise ShardwayError(self._found)
