"""Why a save ends without a checkpoint, in words: problems that every participant raises alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardway.core.errors import Code, Problem, ShardwayError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from shardway.core.dtypes import DType
    from shardway.core.tensors import Shape
    from shardway.live.coverage import Conflict, Gap
    from shardway.live.messages import Arrival

_SHOWN = 8


def ranks_text(ranks: Iterable[int]) -> str:
    """Ranks as people write them: ``0-5, 7``."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def seconds_text(seconds: float) -> str:
    """A duration, exact enough to recognise an option by."""
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def _who(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(set(ranks)) == 1 else 'ranks'} {ranks_text(ranks)}"


def incomplete(
    gaps: Sequence[Gap],
    num_keys: int,
    *,
    arrived: Sequence[int],
    absent: Sequence[int],
    died: Sequence[int],
    places: Mapping[int, str],
    here: str,
    elsewhere: Mapping[int, str],
    deadline_s: float,
) -> list[Problem]:
    """Parts of the model are missing at the deadline.

    Args:
        gaps: What is missing; may be empty when it is only known that ranks are.
        num_keys: How many tensors and objects there should be.
        arrived: Ranks that came.
        absent: Ranks that were needed or hoped for and didn't.
        died: Ranks that came and are known to be dead.
        places: What to call a rank.
        here: What this save is: path and iteration.
        elsewhere: What absent ranks are saving instead, where they say.
        deadline_s: How long they were waited for.
    """
    there = f"Arrived: {_who(arrived)}." if arrived else "Nobody arrived who is still alive."
    missing = f" Never arrived: {_named(absent, places)}." if absent else ""
    missing += f" Died: {ranks_text(died)}." if died else ""
    tail = f"{there}{missing} Waited {seconds_text(deadline_s)}."
    if gaps:
        names = ", ".join(gap.key for gap in gaps[:2]) + (", …" if len(gaps) > 2 else "")
        noun = "tensor has" if num_keys == 1 else "tensors have"
        what = f"{len(gaps)} of {num_keys} {noun} no holder ({names}). {tail}"
    else:
        what = f"the participants are not complete. {tail}"
    facts = [str(gap) for gap in gaps[:_SHOWN]]
    if len(gaps) > _SHOWN:
        facts.append(f"… and {len(gaps) - _SHOWN} more")
    problems = [
        Problem(
            code=Code.SAVE_INCOMPLETE,
            what=what,
            tensor=gaps[0].key if gaps else None,
            facts=tuple(facts),
            cure="let every rank that holds a part of the model call save, or raise distributed_timeout_minutes",
        )
    ]
    if elsewhere:
        there_facts = [f"rank {rank} saving {what}" for rank, what in sorted(elsewhere.items())[:_SHOWN]]
        problems.append(
            Problem(
                code=Code.SAVE_DISAGREES,
                what=f"{_who(list(elsewhere))} did not come because of another save",
                facts=(f"{_who(arrived)} saving {here}", *there_facts),
                cure="give the same path and iteration on all ranks",
            )
        )
    return problems


def _named(ranks: Sequence[int], places: Mapping[int, str]) -> str:
    groups: dict[str, list[int]] = {}
    for rank in ranks:
        groups.setdefault(places.get(rank, ""), []).append(rank)
    return "; ".join(ranks_text(group) + (f" ({place})" if place else "") for place, group in groups.items())


def disagreements(arrivals: Sequence[Arrival]) -> list[Problem]:
    """Options and settings that are not the same on all who arrived: both sides with their ranks."""
    problems = []
    names = sorted({name for arrival in arrivals for name in arrival.agreement})
    for name in names:
        sides: dict[str, list[int]] = {}
        for arrival in arrivals:
            sides.setdefault(arrival.agreement.get(name, "(not given)"), []).append(arrival.rank)
        if len(sides) > 1:
            problems.append(
                Problem(
                    code=Code.SAVE_DISAGREES,
                    what=f"ranks disagree about {name}",
                    facts=tuple(f"{_who(ranks)}: {said}" for said, ranks in sorted(sides.items())[:_SHOWN]),
                    cure=f"give the same {name} on all ranks",
                )
            )
    return problems


def conflicts(found: Sequence[Conflict], ranks_of: Sequence[Sequence[int]]) -> list[Problem]:
    """Tensors that ranks describe differently; `ranks_of` are the ranks of each table, in the order of adding."""
    problems = []
    for key, first, said, second, says in found[:_SHOWN]:
        source = "the model's configuration" if first < 0 else _who(ranks_of[first])
        problems.append(
            Problem(
                code=Code.SAVE_DISAGREES,
                what=f"ranks disagree about {key}" if first >= 0 else f"{key} is not what the configuration says",
                tensor=key,
                facts=(f"{source}: {_kind(said)}", f"{_who(ranks_of[second])}: {_kind(says)}"),
                cure="save the same model on all ranks",
            )
        )
    if len(found) > _SHOWN:
        more = f"ranks disagree about {len(found) - _SHOWN} more tensors"
        problems.append(Problem(code=Code.SAVE_DISAGREES, what=more))
    return problems


def _kind(said: tuple[DType | None, Shape]) -> str:
    dtype, shape = said
    return f"{'any type' if dtype is None else dtype.name} of shape {list(shape)}"


def rank_lost(ranks: Sequence[int], keys: Sequence[str], deadline_s: float) -> list[Problem]:
    """Writers were lost, and nobody else who came holds what they were writing."""
    return [
        Problem(
            code=Code.SAVE_RANK_LOST,
            what=f"{_who(ranks)} died or made no progress for {seconds_text(deadline_s)} while writing, and nobody "
            f"else who came holds {len(keys)} of {'its' if len(set(ranks)) == 1 else 'their'} tensors",
            tensor=keys[0] if keys else None,
            facts=tuple(sorted(keys)[:_SHOWN]),
            cure="look at the log of the lost rank; save again",
        )
    ]


def rank_failed(rank: int, error: BaseException, doing: str) -> tuple[Problem, ...]:
    """What a rank could not do, told to all the others."""
    if isinstance(error, ShardwayError):
        return tuple(
            Problem(
                code=each.code,
                what=f"rank {rank}: {each.what}",
                tensor=each.tensor,
                file=each.file,
                facts=each.facts,
                cure=each.cure,
            )
            for each in error.problems
        )
    file = error.filename if isinstance(error, OSError) else None
    text = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return (
        Problem(
            code=Code.SAVE_RANK_FAILED,
            what=f"rank {rank} failed to {doing}: {text}",
            file=file if isinstance(file, str) else None,
            cure=f"look at the log of rank {rank}",
        ),
    )


def stuck(rank: int, doing: str, deadline_s: float) -> list[Problem]:
    """The coordinator's own work makes no progress."""
    what = f"rank {rank} made no progress for {seconds_text(deadline_s)} when it was to {doing}"
    return [Problem(code=Code.SAVE_RANK_LOST, what=what, cure="see whether the filesystem answers; save again")]


def unfinished(staging: str, problems: Sequence[Problem]) -> list[Problem]:
    """The checkpoint is whole, but could not be renamed into place."""
    told = f"the checkpoint is complete in its staging directory ({staging}), but could not be put in place"
    first = problems[0]
    return [
        Problem(
            code=first.code,
            what=f"{first.what}",
            file=first.file,
            facts=(*first.facts, told),
            cure=first.cure or "rename it by hand, or save again",
        ),
        *problems[1:],
    ]
