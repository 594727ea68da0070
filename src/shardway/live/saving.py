"""What a live save is made of: who saves what to where, what each rank writes, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from shardway.core.errors import Code, Problem, ShardwayError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape
    from shardway.live.records import ObjectShard, Shard
    from shardway.live.written import WriterResult

    Report = Callable[[int], None]

FILES_PER_ASSIGNMENT = 1000


class SaveIncomplete(ShardwayError):  # noqa: N818 - the name is public
    """Nobody who came holds some part of the model: nothing was published."""


class SaveFailed(ShardwayError):  # noqa: N818
    """The save ended in an error that every participant raises alike: nothing was published."""


class Superseded(Exception):  # noqa: N818 - not an error: the save has ended, this work is no longer wanted
    """Raised inside an action by its `report`: stop, the outcome is decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """How long to wait and how to share the work; the same on every rank.

    Attributes:
        fully_parallel: Spread bytes evenly over the replicas that arrived; otherwise the lowest replica writes.
        validate: Compare what the ranks say about path, configuration, shapes and dtypes. Coverage is always proved.
        deadline_s: Seconds that a part of the model may be missing, or a writer make no progress.
        grace_s: Seconds to wait for more replicas, to share the work, when the model is already complete.
        silence_s: Seconds without a sign of life after which another rank takes over from a coordinator;
            None: a quarter of the deadline, between 5 and 60 seconds.
    """

    fully_parallel: bool = True
    validate: bool = True
    deadline_s: float = 600.0
    grace_s: float = 1.0
    silence_s: float | None = None

    @property
    def silence(self) -> float:
        """`silence_s`, or its default; never longer than the deadline."""
        chosen = min(60.0, max(5.0, self.deadline_s / 4)) if self.silence_s is None else self.silence_s
        return min(chosen, self.deadline_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveIdentity:
    """What is being saved where. Ranks with equal identities meet; others never see each other.

    Attributes:
        destination: Absolute, normalised path or URL of the checkpoint's root.
        iteration: The training iteration.
        token: Anything that further tells saves apart, such as a job id where the store outlives the job.
    """

    destination: str
    iteration: int
    token: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """What a checkpoint must contain to be whole.

    With `tensors`, the save starts when everything in it, and the whole of everything that anyone brought, is held by
    those who came. Without, when the `participants` have come; without either, this rank alone.

    Attributes:
        tensors: Data type (None: any) and global shape of each tensor on disk; None when only the ranks know.
        objects: Keys of objects that must be held as well.
        resizable: Keys whose first axis may have another extent than `tensors` says (a padded vocabulary).
        participants: The ranks that must come when `tensors` is None; else the ranks whose arrival ends the grace.
        places: What to call a rank in an error, such as ``"pipeline stage 3"``.
    """

    tensors: Mapping[str, tuple[DType | None, Shape]] | None = None
    objects: frozenset[str] = frozenset()
    resizable: frozenset[str] = frozenset()
    participants: tuple[int, ...] | None = None
    places: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What this rank writes, to files that nobody else ever writes.

    Attributes:
        staging: A name that is unique to this attempt and the same on all ranks: it names the staging directory.
        first_file: Number of the rank's first file (``__<rank>_<first_file>.distcp``); a rank that is asked again gets
            a higher one. Up to `FILES_PER_ASSIGNMENT` files may be made.
        shards: Which of its shards to write.
        objects: Which of its objects to write.
        num_bytes: Bytes of tensor elements and objects.
    """

    staging: str
    first_file: int
    shards: tuple[Shard, ...]
    objects: tuple[ObjectShard, ...]
    num_bytes: int


class SaveActions(Protocol):
    """What the protocol asks its rank to do; each call runs in a thread of its own, one `write` at a time.

    `staging` names the attempt. Any of them may raise: the save is then abandoned, and every rank raises that error
    with the number of the rank that failed. They call `report` with the bytes done since the last call. It raises
    `Superseded` when the save has ended without that work, which is to be passed on.
    """

    def prepare(self, staging: str) -> None:
        """*Coordinator.* Create the staging directory, which may be there already. Nobody else ever creates it."""

    def write(self, assignment: Assignment, report: Report) -> WriterResult:
        """*Writers.* Create, fill and sync files of one's own; may be called again when another writer is lost.

        An absent staging directory is an error: creating it would bring back what others have abandoned.
        """

    def publish(self, staging: str, tag: str, results: Sequence[WriterResult], report: Report) -> None:
        """*Coordinator, perhaps two at once with different tags.* Write and sync the rest under names with `tag`."""

    def finish(self, staging: str, tag: str, report: Report) -> None:
        """*Anyone, perhaps two at once, after the decision for `tag`.* Put the checkpoint in its place.

        Having been done already, by this rank or another one, is success.
        """

    def abandon(self, staging: str) -> None:
        """*Everyone, when nothing is published.* Remove the staging directory if it is there; never raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOutcome:
    """How a save that was published went; the same on every rank but for `wrote_bytes`.

    Attributes:
        staging: Name of the attempt.
        arrived: Ranks that had arrived when the last work was assigned, ascending.
        lost: Ranks that were given work and were lost, ascending.
        coordinator: The rank that decided.
        num_files: Files that the ranks wrote.
        num_bytes: Bytes in these files.
        wrote_bytes: Bytes that this rank wrote, whether or not they are part of the checkpoint.
    """

    staging: str
    arrived: tuple[int, ...]
    lost: tuple[int, ...]
    coordinator: int
    num_files: int
    num_bytes: int
    wrote_bytes: int


def error_of(problems: Sequence[Problem]) -> ShardwayError:
    """The exception for the problems that a save ended with."""
    kind = SaveIncomplete if problems[0].code is Code.SAVE_INCOMPLETE else SaveFailed
    return kind(problems)
