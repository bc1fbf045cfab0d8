"""What an acting verb did, as text for people and as the values of its JSON document (schema 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kmend.core.errors import Refusal
from kmend.core.live import ActionReport, Check, Followed, Result, printable
from kmend.report.live import transition_document


def succeeded(report: ActionReport) -> bool:
    """Whether the verb ends with status 0: what was asked for is done, or begun if that was all."""
    return report.result is Result.DONE or (report.result is Result.PENDING and not left(report))


def left(report: ActionReport) -> bool:
    """Whether a transition that was followed goes on, because somebody said so when asked at a stall."""
    return report.result is Result.PENDING and bool(report.followed)


def to_document(verb: str, reports: Sequence[ActionReport]) -> dict[str, object]:
    """The JSON document of a verb that acted on one patch or on several."""
    worst = next((row.result for row in reports if not succeeded(row)), None)
    if worst is None:
        pending = any(row.result is Result.PENDING for row in reports)
        worst = Result.PENDING if pending else Result.DONE
    return {
        "schema": 1,
        "verb": verb,
        "result": worst.value,
        "actions": [_document(row) for row in reports],
    }


def _document(report: ActionReport) -> dict[str, object]:
    return {
        "patch": report.patch,
        "result": report.result.value,
        "why": report.why,
        "next_step": report.next_step,
        "checks": [{"name": row.name, "passed": row.passed, "text": row.text} for row in report.checks],
        "steps": [row.text for row in report.steps],
        "timeline": [
            {"seconds": row.seconds, "text": row.text, "tids": list(row.tids)} for row in report.steps
        ],
        "transitions": [_followed(row) for row in report.followed],
        "replaced": list(report.replaced),
        "removed": list(report.removed),
        "callbacks": None if report.callbacks is None else list(report.callbacks),
        "refused": [_refusal(row) for row in report.refused],
        "warnings": [_refusal(row) for row in report.warnings],
        "messages": [{"seconds": row.seconds, "text": row.text} for row in report.messages],
        "seconds": round(report.seconds, 3),
        "file": report.file or None,
        "sha256": report.sha256 or None,
        "note": dict(report.note),
    }


def _refusal(row: Refusal) -> dict[str, str]:
    return {"rule": row.rule, "what": row.what, "why": row.why, "next_step": row.next_step}


def _followed(row: Followed) -> dict[str, object]:
    return {
        "end": row.end.value,
        "direction": row.goal.value if row.goal is not None else None,
        "began": row.began,
        "seconds": round(row.seconds, 3),
        "samples": [[one.seconds, one.left, one.tasks] for one in row.samples],
        "steps": [{"seconds": one.seconds, "text": one.text} for one in row.steps],
        "woken": list(row.woken),
        "at_first": transition_document(row.first),
        "left": transition_document(row.last),
    }


def to_text(report: ActionReport) -> str:
    """The report for people: the outcome first, then what was done, then what could not be looked at."""
    lines = []
    if report.why not in [row.what for row in report.refused]:
        lines.append(f"{report.patch}: {report.why}" if report.patch not in report.why else report.why)
    for row in report.refused:
        lines += _lines_of("refused", row)
    timed = any(row.seconds for row in report.steps)
    lines += [(f"  {row.seconds:5.1f} s  " if timed else "  ") + row.text for row in report.steps]
    lines += _not_looked(report.checks)
    if report.replaced:
        lines.append(f"  replaced: {', '.join(report.replaced)}")
    if report.callbacks:
        lines.append(f"  callbacks called: {', '.join(report.callbacks)}")
    elif report.callbacks is None and report.messages:
        lines.append("  which callbacks the kernel called is not known")
    for row in report.warnings:
        lines += _lines_of("warning", row)
    if report.messages and not succeeded(report):
        lines.append("  the kernel said:")
        lines += [f"    [{row.seconds:12.6f}] {printable(row.text)}" for row in report.messages]
    if report.next_step:
        lines.append(f"  next: {report.next_step}")
    return "\n".join(lines)


def _lines_of(kind: str, row: Refusal) -> Iterator[str]:
    yield f"{kind}  {row.rule}: {row.what}"
    for label, text in (("why", row.why), ("next", row.next_step)):
        if text:
            indented = text.replace("\n", "\n          ")
            yield f"    {label + ':':5} {indented}"


def _not_looked(checks: Sequence[Check]) -> Iterator[str]:
    for row in checks:
        if row.passed is None:
            yield f"  not checked: {row.name}: {row.text}"
