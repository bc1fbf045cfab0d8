"""A trial as a JSON document (schema 1) and as text for people."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from kmend.core.kmsg import KernelMessage, KernelReport
from kmend.core.taint import decode
from kmend.core.trial import Outcome, PatchTrial, Phase, ScriptRun, Side, SysfsPatch, TrialReport

SCHEMA = 1
#: People's text shows so many of a stream's last lines; the JSON document and --keep have all.
SHOWN_LINES = 40
#: People's text shows so many lines of an oops, without registers and what the stack only may hold.
SHOWN_OOPS = 40
_NOISE = re.compile(r"^(?:R[A-Z0-9]{2}: |[CDEFG]S: |CR\d: |PKRU: |Code: |#PF: |PGD | \? )")

_PHASES = {
    Phase.STOCK: "stock kernel",
    Phase.PATCHED: "patch loaded",
    Phase.RESTORED: "patch taken back",
}


def to_document(report: TrialReport) -> dict[str, object]:
    """The report as the values of its JSON document."""
    return {
        "schema": SCHEMA,
        "verb": "try",
        "result": report.outcome.value,
        "why": report.why,
        "next_step": report.next_step,
        "kernel": {"release": report.release, "accel": report.accel},
        "patches": [
            {
                "name": patch.name,
                "file": patch.file,
                "loaded": patch.loaded,
                "transition_complete": patch.complete,
                "transition_seconds": patch.transition,
                "take_back_transition_seconds": patch.take_back_transition,
                "gone": patch.gone,
                "unpatching_complete": patch.unpatched,
                "problem": patch.problem,
            }
            for patch in report.patches
        ],
        "stock": _side_document(report.stock) if report.stock else None,
        "patched": _side_document(report.patched),
        "artefacts": report.artefacts,
        "timings": _rounded(report.timings),
    }


def _side_document(side: Side) -> dict[str, object]:
    return {
        "runs": [
            {
                "phase": run.phase.value,
                "status": run.status,
                "stdout": run.stdout,
                "stderr": run.stderr,
                "note": run.note,
                "seconds": round(run.seconds, 3),
            }
            for run in side.runs
        ],
        "sysfs": [
            {
                "name": patch.name,
                "enabled": patch.enabled,
                "transition": patch.transition,
                "replace": patch.replace,
                "objects": [
                    {"name": row.name, "patched": row.patched, "functions": list(row.functions)}
                    for row in patch.objects
                ],
            }
            for patch in side.sysfs
        ],
        "messages": {
            "livepatch": [_message_text(row) for row in side.messages if row.livepatch],
            "all": [
                {"seconds": row.seconds, "level": row.level, "text": row.text, "user": row.user}
                for row in side.messages
            ],
        },
        "oopses": [_report_document(row) for row in side.oopses],
        "warnings": [_report_document(row) for row in side.warnings],
        "taint": {
            "before": side.taint_before,
            "after": side.taint_after,
            "flags": [
                {"bit": flag.bit, "letter": flag.letter, "meaning": flag.meaning}
                for flag in decode(side.taint_after or 0)
            ],
        },
        "lost": side.lost,
        "console": list(side.console),
        "timings": _rounded(side.timings),
    }


def _report_document(report: KernelReport) -> dict[str, str]:
    return {"headline": report.headline, "where": report.where, "text": "\n".join(report.lines)}


def to_text(report: TrialReport) -> str:
    """The report as people read it: the verdict first, then both sides, then the evidence."""
    lines = [f"{report.outcome.value}: {report.why}"]
    if report.next_step:
        lines.append(f"  next: {report.next_step}")
    lines += ["", f"{report.release} in the lab ({report.accel})"]
    lines += _table(_rows(report))
    for patch in report.patches:
        lines += ["", *_patch(patch, report.patched.sysfs)]
    if flags := decode(report.patched.taint_after or 0):
        lines += ["", f"taint with the patch: {report.patched.taint_after}, that is"]
        lines += [f"  bit {flag.bit:2} {flag.letter}  {flag.meaning}" for flag in flags]
    for side in (report.stock, report.patched):
        if side is not None:
            lines += _evidence(side, "stock kernel" if side is report.stock else "patched kernel")
    lines += ["", "seconds: " + _timings(report)]
    if report.artefacts:
        lines.append(f"kept: {report.artefacts}")
    return "\n".join(lines)


def _rows(report: TrialReport) -> Iterator[tuple[str, str, str, str]]:
    yield ("", "script", "kernel", "taint")
    for side, name in ((report.stock, "stock"), (report.patched, "patched")):
        if side is None:
            continue
        taint = "" if side.taint_after is None else _letters(side.taint_after)
        yield (name, _how(side.runs[0]) if side.runs else "not run", _health(side), taint)
        for run in side.runs[1:]:
            yield (_PHASES[run.phase], _how(run), "", "")


def _how(run: ScriptRun) -> str:
    if run.note:
        return run.note
    return f"status {run.status} in {run.seconds:.1f} s"


def _health(side: Side) -> str:
    if side.oopses:
        return "oops" + (f" in {side.oopses[0].where}" if side.oopses[0].where else "")
    if side.lost:
        return "lost"
    return f"{len(side.warnings)} warning(s)" if side.warnings else "well"


def _letters(taint: int) -> str:
    return "".join(flag.letter for flag in decode(taint)) or "none"


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    table = list(rows)
    widths = [max(len(row[at]) for row in table) for at in range(len(table[0]))]
    return [
        ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in table
    ]


def _patch(patch: PatchTrial, sysfs: tuple[SysfsPatch, ...]) -> list[str]:
    facts = []
    if patch.loaded:
        facts.append("loaded")
    if patch.complete:
        took = "" if patch.transition is None else f" in {patch.transition:.3f} s"
        facts.append(f"transition complete{took}")
    if patch.gone:
        took = "" if patch.take_back_transition is None else f" in {patch.take_back_transition:.3f} s"
        facts.append(f"taken back{took}, gone from sysfs")
    if patch.unpatched:
        facts.append('"unpatching complete" in the log')
    if patch.problem:
        facts.append(patch.problem)
    lines = [f"patch {patch.name}: {', '.join(facts) or 'not loaded'}"]
    for shown in sysfs:
        if shown.name == patch.name:
            for row in shown.objects:
                state = "patched" if row.patched else "not patched (not loaded)"
                lines.append(f"  {row.name}: {state}: {' '.join(row.functions)}")
    return lines


def _evidence(side: Side, name: str) -> Iterator[str]:
    for run in side.runs:
        for stream, text in (("output", run.stdout), ("errors", run.stderr)):
            if text.strip():
                yield from ("", f"{stream} of the script, {_PHASES[run.phase]}:")
                yield from _indented(text.rstrip("\n").splitlines(), SHOWN_LINES, last=True)
    for oops in side.oopses:
        yield from ("", f"oops on the {name}:")
        yield from _indented(_readable(oops.lines), SHOWN_OOPS, last=False)
    for warning in side.warnings:
        yield from ("", f"warning on the {name}:")
        yield from _indented(_readable(warning.lines), SHOWN_OOPS, last=False)
    if messages := [_message_text(row) for row in side.messages if row.livepatch]:
        yield from ("", f"livepatch messages of the {name}:")
        yield from _indented(messages, SHOWN_LINES, last=True)
    if side.lost:
        yield from ("", f"the {name} was lost: {side.lost}; the console's last lines:")
        yield from _indented(side.console, SHOWN_LINES, last=True)


def _readable(lines: Iterable[str]) -> list[str]:
    return [line for line in lines if not _NOISE.match(line)]


def _indented(lines: Iterable[str], limit: int, *, last: bool) -> Iterator[str]:
    rows = list(lines)
    left_out = len(rows) - limit
    if left_out > 0:
        rows = rows[-limit:] if last else rows[:limit]
    if left_out > 0 and last:
        yield f"  … {left_out} lines before"
    yield from (f"  {row}" for row in rows)
    if left_out > 0 and not last:
        yield f"  … {left_out} more lines"


def _message_text(message: KernelMessage) -> str:
    return f"[{message.seconds:12.6f}] {message.text}"


def _timings(report: TrialReport) -> str:
    named = {
        **report.timings,
        **{f"patched {name}": seconds for name, seconds in report.patched.timings.items()},
    }
    return ", ".join(f"{name} {seconds:.2f}" for name, seconds in named.items())


def _rounded(timings: Mapping[str, float]) -> dict[str, float]:
    return {name: round(seconds, 3) for name, seconds in timings.items()}


def succeeded(report: TrialReport) -> bool:
    """Whether `kmend try` ends with status 0."""
    return report.outcome is Outcome.PASSED
