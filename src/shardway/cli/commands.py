"""One function per command: calls the API and prints its report."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from shardway.cli.progress import progress_display
from shardway.cli.text import harmless, human_bytes, human_count, plural, table
from shardway.core.errors import Code, Problem, ShardwayError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from shardway.convert.planning import PlanReport
    from shardway.convert.pushing import PushReport
    from shardway.convert.report import ConversionReport
    from shardway.verification.inspection import InspectReport
    from shardway.verification.report import Difference

_MOST_PROBLEMS = 50
_MOST_DIFFERENCES = 100


def run(chosen: argparse.Namespace) -> int:
    """Run the command that was chosen; return its exit status."""
    return {
        "import": _import,
        "export": _export,
        "migrate": _migrate,
        "verify": _verify,
        "inspect": _inspect,
        "plan": _plan,
        "clean": _clean,
        "families": _families,
    }[chosen.command](chosen)


def print_error(error: ShardwayError, *, as_json: bool) -> None:
    """Print an error's problems: as text on standard error, and as JSON on standard output where asked for."""
    if as_json:
        print(json.dumps({"error": [_problem(problem) for problem in error.problems]}, indent=2))
    print(problem_text(error.problems), file=sys.stderr)


def problem_text(problems: tuple[Problem, ...]) -> str:
    """Problems as text, at most 50 of them, and how many more there are."""
    lines = [str(problem) for problem in problems[:_MOST_PROBLEMS]]
    if len(problems) > 1:
        lines.insert(0, f"{len(problems)} problems:")
    if len(problems) > _MOST_PROBLEMS:
        lines.append(f"... and {len(problems) - _MOST_PROBLEMS} more (--json lists all)")
    return harmless("\n".join(lines))


def _import(chosen: argparse.Namespace) -> int:
    from shardway.convert.importing import import_hf

    with progress_display(quiet=chosen.quiet) as progress:
        report = import_hf(
            chosen.source,
            chosen.destination,
            dtype=chosen.dtype,
            layout=chosen.layout,
            spec=chosen.spec,
            target=chosen.target,
            bridge_version=chosen.bridge_version,
            iteration=chosen.iteration,
            release=chosen.release,
            if_exists=chosen.if_exists,
            workers=chosen.workers,
            max_file_size=chosen.max_file_size,
            fsync=not chosen.no_fsync,
            chunk_for=chosen.chunk_for,
            verify=chosen.verify,
            revision=chosen.revision,
            keep_source=not chosen.no_keep_source,
            progress=progress,
        )
    _print_conversion("imported", report, chosen)
    return 0


def _export(chosen: argparse.Namespace) -> int:
    from shardway.convert.exporting import export_hf

    if chosen.push is not None:
        from shardway.convert.pushing import check_push

        check_push(chosen.push)
    elif chosen.private or chosen.revision is not None:
        raise ShardwayError(Problem(code=Code.OPTION_INVALID, what="--private and --revision go with --push"))
    with progress_display(quiet=chosen.quiet) as progress:
        report = export_hf(
            chosen.source,
            chosen.destination,
            hf=chosen.hf,
            dtype=chosen.dtype,
            weights=chosen.weights,
            quantize=chosen.quantize,
            max_shard_size=chosen.max_shard_size,
            if_exists=chosen.if_exists,
            workers=chosen.workers,
            fsync=not chosen.no_fsync,
            verify=chosen.verify,
            progress=progress,
        )
    pushed = _push(chosen) if chosen.push is not None else None
    _print_conversion("exported", report, chosen, {} if pushed is None else {"pushed": pushed.to_dict()})
    if pushed is not None and not chosen.json and not chosen.quiet:
        print(f"  pushed to {pushed.url}, branch {pushed.revision}, commit {pushed.commit[:12]}")
    return 0


def _migrate(chosen: argparse.Namespace) -> int:
    from shardway.convert.migrating import migrate

    with progress_display(quiet=chosen.quiet) as progress:
        report = migrate(
            chosen.source,
            chosen.destination,
            to=chosen.to,
            layout=chosen.layout,
            chunk_for=chosen.chunk_for,
            if_exists=chosen.if_exists,
            workers=chosen.workers,
            max_file_size=chosen.max_file_size,
            fsync=not chosen.no_fsync,
            verify=chosen.verify,
            progress=progress,
        )
    if chosen.json:
        print(json.dumps(report.to_dict(), indent=2))
    elif report.reused and not chosen.quiet:
        print(f"reused {report.destination}/{report.iteration}: complete, and made from the same source")
    elif not chosen.quiet:
        rate = human_bytes(report.num_bytes / max(report.seconds, 1e-9))
        print(
            f"migrated to {report.form}: {plural(report.num_tensors, 'tensor')}, {human_bytes(report.num_bytes)} "
            f"in {report.seconds:.2f} s ({rate}/s)"
        )
        checked = f", {report.num_digests:,} recorded digests checked" if report.num_digests else ""
        checked += ", read back and compared" if report.verified else ""
        cut = f", chunks for {report.chunk_for}" if report.chunk_for else ""
        print(
            f"  {report.destination}/{report.iteration}: {plural(report.num_files, 'file')}, {report.layout} layout"
            f"{cut}{checked}"
        )
        for note in report.notes:
            print(f"  note: {harmless(note)}")
    return 0


def _push(chosen: argparse.Namespace) -> PushReport:
    """Push what was exported; an error says that the export itself is done."""
    from shardway.convert.pushing import push_hf

    try:
        return push_hf(
            chosen.destination,
            chosen.push,
            private=chosen.private or None,
            revision=chosen.revision,
            source=chosen.source,
            show_progress=not chosen.quiet,
        )
    except ShardwayError as error:
        done = f"the export is whole, at {chosen.destination}; with --if-exists reuse only the push is done again"
        raise ShardwayError(problem._replace(facts=(*problem.facts, done)) for problem in error.problems) from error


def _print_conversion(
    verb: str, report: ConversionReport, chosen: argparse.Namespace, more: Mapping[str, object] | None = None
) -> None:
    if chosen.json:
        print(json.dumps({**report.to_dict(), **(more or {})}, indent=2))
    if chosen.json or chosen.quiet:
        return
    folder = f"/{report.iteration}" if verb == "imported" else ""
    if report.reused:
        print(f"reused {report.destination}{folder}: complete, and made from the same source")
        return
    rate = human_bytes(report.num_bytes / max(report.seconds, 1e-9))
    moved = f"{human_count(report.num_parameters)} parameters, {human_bytes(report.num_bytes)}"
    print(
        f"{verb} {report.architecture}: {plural(report.num_tensors, 'tensor')}, {moved} "
        f"in {report.seconds:.2f} s ({rate}/s)"
    )
    checked = ", read back and compared" if report.verified else ""
    print(f"  {report.destination}{folder}: {plural(report.num_files, 'file')}, {report.layout} layout{checked}")
    if report.resumed:
        print(f"  {plural(report.resumed, 'file')} of an earlier run that was killed were found whole and kept")
    for note in report.notes:
        print(f"  note: {harmless(note)}")


def _verify(chosen: argparse.Namespace) -> int:
    from shardway.verification.pair import verify

    with progress_display(quiet=chosen.quiet) as progress:
        report = verify(chosen.a, chosen.b, workers=chosen.workers, revision=chosen.revision, progress=progress)
    if chosen.json:
        print(json.dumps(report.to_dict(), indent=2))
    elif report.equal and report.b is None and not chosen.quiet:
        print(
            f"undamaged: {plural(report.num_tensors, 'tensor')}, {human_bytes(report.num_bytes)} in all files, "
            f"{report.num_digests:,} recorded digests checked ({report.seconds:.2f} s)"
        )
    elif report.equal and not chosen.quiet:
        digests = f", {report.num_digests:,} recorded digests checked" if report.num_digests else ""
        computed = "".join(f", {count:,} dequantised from {scheme}" for scheme, count in report.dequantised.items())
        print(
            f"equal: {plural(report.num_tensors, 'tensor')}{computed}, {human_bytes(report.num_bytes)}, "
            f"bit for bit{digests} "
            f"({report.seconds:.2f} s)"
        )
    if not report.equal and not chosen.json:
        shown = report.differences[:_MOST_DIFFERENCES]
        columns = ("tensor", "what", "detail", "first at", "elements", "max abs", "file")
        print(table(columns, [_row(each) for each in shown]))
        if len(report.differences) > len(shown):
            print(f"... and {len(report.differences) - len(shown)} more (--json lists all)")
        if report.b is None:
            print(f"damaged: {plural(len(report.differences), 'place')} not as recorded")
        else:
            count = plural(len(report.differences), "difference")
            print(f"different: {count} in {report.num_tensors:,} tensors compared")
    return 0 if report.equal else 1


def _row(difference: Difference) -> tuple[str, ...]:
    return (
        difference.tensor,
        difference.kind,
        difference.detail,
        "" if difference.first_index is None else str(list(difference.first_index)),
        "" if difference.num_elements is None else f"{difference.num_elements:,}",
        "" if difference.max_abs is None else f"{difference.max_abs:.6g}",
        difference.file or "",
    )


def _inspect(chosen: argparse.Namespace) -> int:
    from shardway.verification.inspection import inspect

    with progress_display(quiet=chosen.quiet) as progress:
        report = inspect(
            chosen.path, digest=chosen.digest, workers=chosen.workers, revision=chosen.revision, progress=progress
        )
    if chosen.json:
        print(json.dumps(report.to_dict(), indent=2))
    elif not chosen.quiet:
        _print_inspection(report, tensors=chosen.tensors or chosen.digest)
    return 0


def _print_inspection(report: InspectReport, *, tensors: bool) -> None:
    facts: dict[str, str | None] = {
        "path": report.path,
        "kind": report.kind,
        "architecture": report.architecture,
        "layout": report.layout,
        "iteration": None if report.iteration is None else str(report.iteration),
        "form": report.form,
        "written by": report.written_by,
        "parameters": f"{report.num_parameters:,} ({human_count(report.num_parameters)})",
        "tensors": f"{len(report.tensors):,} ({', '.join(f'{n:,} {dtype}' for dtype, n in report.dtypes.items())})",
        "tensor bytes": f"{report.num_bytes:,} ({human_bytes(report.num_bytes)})",
        "quantised": ", ".join(f"{n:,} {scheme}" for scheme, n in report.quantised.items()) or None,
        "other objects": f"{len(report.objects):,}" if report.objects else None,
        "training state": f"{len(report.training_state):,} entries" if report.training_state else None,
        "files": f"{len(report.files):,} ({human_bytes(sum(report.files.values()))})",
    }
    print(harmless("\n".join(f"{name:<15}{value}" for name, value in facts.items() if value is not None)))
    if tensors:
        rows = [
            (name, str(list(each.shape)), each.dtype, str(each.num_chunks), *([each.sha256] if each.sha256 else []))
            for name, each in report.tensors.items()
        ]
        digest = ("sha256",) if rows and len(rows[0]) > 4 else ()
        print()
        print(table(("tensor", "shape", "dtype", "chunks", *digest), rows))


def _plan(chosen: argparse.Namespace) -> int:
    from shardway.convert.planning import plan

    report = plan(
        chosen.source,
        hf=chosen.hf,
        dtype=chosen.dtype,
        weights=chosen.weights,
        layout=chosen.layout,
        max_file_size=chosen.max_file_size,
        max_shard_size=chosen.max_shard_size,
        chunk_for=chosen.chunk_for,
        quantize=chosen.quantize,
        revision=chosen.revision,
    )
    if chosen.json:
        print(json.dumps(report.to_dict(), indent=2))
    elif report.feasible and not chosen.quiet:
        _print_plan(report)
    if not report.feasible and not chosen.json:
        print(problem_text(report.problems), file=sys.stderr)
    return 0 if report.feasible else 1


def _print_plan(report: PlanReport) -> None:
    print(f"{report.direction} of {report.source}: {report.architecture} ({report.family}), {report.layout} layout")
    print(f"{plural(report.num_tensors, 'tensor')}, {human_count(report.num_parameters)} parameters; each claimed once")
    for verb, files in (("reads", report.reads), ("writes", report.writes)):
        print(f"{verb} {plural(len(files), 'file')}, {human_bytes(sum(files.values()))}")
        print(table(("", "file", "bytes"), [("", name, f"{num_bytes:,}") for name, num_bytes in files.items()]))
    print(f"disk needed: {human_bytes(report.disk_bytes)}")
    for note in report.notes:
        print(f"note: {harmless(note)}")


def _clean(chosen: argparse.Namespace) -> int:
    from shardway.run.cleaning import clean

    with progress_display(quiet=chosen.quiet) as progress:
        report = clean(chosen.path, progress=progress)
    if chosen.json:
        print(json.dumps(report.to_dict(), indent=2))
    elif not chosen.quiet:
        for each in report.restored:
            print(f"put back {each}: it had been put aside to be replaced")
        for left in report.removed:
            print(f"removed {left.path} ({human_bytes(left.num_bytes)}): {left.why}")
        for left in report.kept:
            print(f"kept {left.path} ({human_bytes(left.num_bytes)}): {left.why}")
        if not (report.restored or report.removed or report.kept):
            print(f"nothing was left of {chosen.path}")
    return 0


def _families(chosen: argparse.Namespace) -> int:
    from shardway.families.registry import families

    rows = sorted((architecture, family.name) for family in families() for architecture in family.architectures)
    if chosen.json:
        print(json.dumps([{"architecture": architecture, "family": family} for architecture, family in rows], indent=2))
    else:
        print(table(("architecture", "family"), rows))
    return 0


def _problem(problem: Problem) -> Mapping[str, object]:
    return {
        "code": problem.code.value,
        "what": problem.what,
        "tensor": problem.tensor,
        "file": None if problem.file is None else str(problem.file),
        "facts": list(problem.facts),
        "cure": problem.cure,
    }
