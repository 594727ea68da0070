"""Pushing: a Hugging Face directory that was exported goes to the Hub."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardway import __version__
from shardway.core.errors import ShardwayError
from shardway.formats.huggingface import open_huggingface
from shardway.formats.iterations import find_iteration
from shardway.formats.record import read_record
from shardway.hub.card import model_card
from shardway.hub.client import check_reachable, upload
from shardway.hub.names import check_repository

if TYPE_CHECKING:
    from shardway.formats.huggingface import HuggingFaceCheckpoint

_CARD = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """What was pushed.

    Attributes:
        folder: The directory.
        repository: ``org/name``.
        revision: The branch.
        url: Page of the repository.
        commit: The commit that holds all of it.
    """

    folder: str
    repository: str
    revision: str
    url: str
    commit: str

    def to_dict(self) -> dict[str, object]:
        """The report as JSON-ready data."""
        return asdict(self)


def check_push(repository: str) -> None:
    """Find out, before hours of work, whether a push could begin: the extra, the name, offline mode.

    Raises:
        ShardwayError: `extra-missing`, `option-invalid`, `hub-offline`.
    """
    check_repository(repository)
    check_reachable()


def push_hf(
    folder: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    source: str | Path | None = None,
    show_progress: bool = True,
) -> PushReport:
    """Upload a Hugging Face directory to the Hub; the directory stays, and is only read.

    Where neither it nor the repository has a README.md, one is added that says what the model is and who made it. The
    token is the one that `hf auth login` stored, or HF_TOKEN.

    Args:
        folder: The directory, whole; hidden files are left out.
        repository: ``org/name``; made where it does not exist.
        private: Whether a repository that is made can be seen by its owners alone; by default as they have chosen.
        revision: Branch, made where it does not exist; by default ``main``.
        source: The Megatron checkpoint that it was exported from, for what the model card says.
        show_progress: Whether huggingface_hub may draw its progress bars on standard error.

    Returns:
        What was pushed.

    Raises:
        ShardwayError: What is wrong with the directory; `extra-missing`, `option-invalid`, `hub-offline`,
            `hub-not-found`, `hub-refused`, `hub-unreachable`. Some of it may be there then; the same call goes on.
    """
    check_push(repository)
    root = Path(folder)
    checkpoint = open_huggingface(root)
    card = None if (root / _CARD).exists() else _card(checkpoint, repository, source)
    done = upload(root, repository, private=private, revision=revision, card=card, show_progress=show_progress)
    return PushReport(
        folder=str(folder), repository=repository, revision=revision or "main", url=done.url, commit=done.sha
    )


def _card(checkpoint: HuggingFaceCheckpoint, repository: str, source: str | Path | None) -> bytes:
    came_from = None
    if source is not None:
        try:
            record = read_record(find_iteration(Path(source)))
            came_from = None if record is None else record.source
        except (ShardwayError, OSError):
            came_from = None  # a card without a line is no reason to fail
    dtypes = sorted({tensor.dtype.name for tensor in checkpoint.catalog.tensors.values()})
    listed = checkpoint.config.get("architectures")
    return model_card(
        repository,
        source=came_from,
        facts={
            "architecture": str(listed[0]) if isinstance(listed, list) and listed else "unknown",
            "parameters": f"{checkpoint.catalog.num_elements:,}",
            "tensors": f"{len(checkpoint.catalog.tensors):,} ({', '.join(dtypes)})",
        },
        written_by=f"shardway {__version__}",
    )
