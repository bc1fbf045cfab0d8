"""A build report as a JSON document (schema 1), back from one, and as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from kmend.core.errors import Failed, Refusal
from kmend.core.report import BuildReport, FunctionRow, KernelId, ObjectRow, Outcome, Verified

SCHEMA = 1

T = TypeVar("T")

#: How a report's first line reads.
HEADLINES = {
    Outcome.BUILT: "built",
    Outcome.REFUSED: "refused: nothing was built",
    Outcome.NOTHING_CHANGED: "nothing changed: the patch makes the same code",
    Outcome.FAILED: "failed",
}

#: How many reasons of one rule are shown in full, and how many more by name.
IN_FULL = 4
BY_NAME = 12


def to_document(report: BuildReport) -> dict[str, object]:
    """The report as the values of its JSON document, keys in the order of the contract."""
    return {
        "schema": SCHEMA,
        "name": report.name,
        "result": report.result.value,
        "kernel": {
            "release": report.kernel.release,
            "version": report.kernel.version,
            "build_id": report.kernel.build_id,
        },
        "module": report.module,
        "sha256": report.sha256,
        "objects": [
            {
                "name": row.name,
                "functions": [
                    {"name": f.name, "sympos": f.sympos, "status": f.status, "why": f.why}
                    for f in row.functions
                ],
            }
            for row in report.objects
        ],
        "refused": refusals_to_rows(report.refused),
        "warnings": refusals_to_rows(report.warnings),
        "verified": {
            "functions": report.verified.functions,
            "identical": report.verified.identical,
            "skipped": list(report.verified.skipped),
        },
        "timings": {name: round(seconds, 3) for name, seconds in report.timings.items()},
        "cves": list(report.cves),
        "digest": report.digest,
    }


def refusals_to_rows(refusals: Iterable[Refusal]) -> list[dict[str, str]]:
    """Refusals or warnings as rows of a document."""
    return [
        {"rule": row.rule, "what": row.what, "why": row.why, "next_step": row.next_step} for row in refusals
    ]


def from_document(document: object) -> BuildReport:
    """The report that a document holds; the inverse of :func:`to_document` (but for timings' rounding).

    Raises:
        Failed: ``report-damaged``: it is no build report of schema 1, or a field lacks or has another type.
    """
    top = _Reader(document, "the report")
    if top.get("schema", int) != SCHEMA:
        raise _damaged(f"schema is {top.get('schema', int)}, this kmend reads schema {SCHEMA}")
    kernel, verified = top.inner("kernel"), top.inner("verified")
    try:
        result = Outcome(top.get("result", str))
    except ValueError as error:
        raise _damaged(str(error)) from error
    return BuildReport(
        name=top.get("name", str),
        result=result,
        kernel=KernelId(kernel.get("release", str), kernel.get("version", str), kernel.get("build_id", str)),
        module=top.optional("module"),
        sha256=top.optional("sha256"),
        objects=tuple(
            ObjectRow(
                row.get("name", str),
                tuple(
                    FunctionRow(
                        f.get("name", str), f.get("sympos", int), f.get("status", str), f.get("why", str)
                    )
                    for f in row.rows("functions")
                ),
            )
            for row in top.rows("objects")
        ),
        refused=_refusals(top.rows("refused")),
        warnings=_refusals(top.rows("warnings")),
        verified=Verified(
            verified.get("functions", int),
            verified.get("identical", int),
            tuple(str(name) for name in verified.get("skipped", list)),
        ),
        timings=_timings(top.get("timings", dict)),
        cves=tuple(str(name) for name in top.added("cves", list, [])),
        digest=top.added("digest", str, ""),
    )


def _refusals(rows: Iterable[_Reader]) -> tuple[Refusal, ...]:
    return tuple(
        Refusal(row.get("rule", str), row.get("what", str), row.get("why", str), row.get("next_step", str))
        for row in rows
    )


def _timings(values: Mapping[object, object]) -> dict[str, float]:
    timings = {}
    for name, seconds in values.items():
        if not isinstance(seconds, int | float):
            raise _damaged(f"the timing of {name} is no number")
        timings[str(name)] = float(seconds)
    return timings


class _Reader:
    """Typed access to a JSON object that somebody else may have written."""

    def __init__(self, value: object, place: str) -> None:
        if not isinstance(value, Mapping):
            raise _damaged(f"{place} is not an object")
        self._value = value
        self._place = place

    def get(self, key: str, kind: type[T]) -> T:
        value = self._value.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise _damaged(f"{key!r} of {self._place} is not of type {kind.__name__}")
        return value

    def added(self, key: str, kind: type[T], default: T) -> T:
        """A field that reports of older versions have not."""
        return default if key not in self._value else self.get(key, kind)

    def optional(self, key: str) -> str | None:
        return None if self._value.get(key) is None else self.get(key, str)

    def inner(self, key: str) -> _Reader:
        return _Reader(self._value.get(key), f"{key!r}")

    def rows(self, key: str) -> list[_Reader]:
        return [_Reader(row, f"a row of {key!r}") for row in self.get(key, list)]


def _damaged(why: str) -> Failed:
    return Failed(
        "the build report cannot be read",
        why=why,
        next_step="build the module again",
        rule="report-damaged",
    )


def to_text(report: BuildReport) -> str:
    """The report for people: what changed, where, why, what was verified, what each stage took."""
    lines = [f"{report.name}: {HEADLINES[report.result]}"]
    if report.kernel.release:
        lines.append(f"kernel   {report.kernel.release}  {report.kernel.version}".rstrip())
    if report.module:
        lines.append(f"module   {report.module}")
    if report.cves:
        lines.append(f"mentions {', '.join(report.cves)}")
    if rows := rows_text(report):
        lines += ["", *rows]
    verdict = "failed" if report.result is Outcome.FAILED else "refused"
    for title, reasons in ((verdict, report.refused), ("warning", report.warnings)):
        lines += grouped(title, reasons)
    if report.verified.functions:
        lines += ["", verified_line(report.verified)]
    if report.units.considered:
        counts = report.units
        lines.append(
            f"units    {counts.considered} considered, {counts.compiled} compiled, {counts.changed} changed"
        )
    if report.timings:
        lines += ["", timings_line(report.timings)]
    return "\n".join(lines) + "\n"


def rows_text(report: BuildReport) -> list[str]:
    """Objects and functions as a table; nothing when there are none."""
    rows = [
        (row.name, function.name + (f" (sympos {function.sympos})" if function.sympos > 1 else ""),
         function.status, function.why)
        for row in report.objects
        for function in row.functions
    ]  # fmt: skip
    return columns([("object", "function", "status", "why"), *rows]) if rows else []


def grouped(title: str, reasons: Iterable[Refusal]) -> list[str]:
    """All reasons; of each rule the first few in full and the others by name (JSON has them all)."""
    lines: list[str] = []
    by_rule: dict[str, list[Refusal]] = {}
    for reason in reasons:
        by_rule.setdefault(reason.rule, []).append(reason)
    for rule, group in by_rule.items():
        for reason in group[:IN_FULL]:
            lines += ["", *reason_lines(title, reason)]
        left = [reason.what for reason in group[IN_FULL:]]
        if left:
            names = ", ".join(left[:BY_NAME]) + (", …" if len(left) > BY_NAME else "")
            lines += ["", f"{title} ({rule}): {len(left)} more of the kind: {names}"]
    return lines


def reason_lines(title: str, reason: Refusal) -> list[str]:
    """One refusal or warning as indented text."""
    lines = [f"{title} ({reason.rule}): {reason.what}"]
    for label, text in (("why", reason.why), ("next", reason.next_step)):
        if text:
            first, *rest = text.rstrip().split("\n")
            lines.append(f"  {label + ':':5} {first}")
            lines += [f"        {line}" for line in rest]
    return lines


def verified_line(verified: Verified) -> str:
    """How many functions were held against the target's own bytes."""
    text = f"verified {verified.identical} of {verified.functions} functions equal the kernel's own bytes"
    if verified.skipped:
        text += f"; passed over: {', '.join(verified.skipped)}"
    return text


def timings_line(timings: Mapping[str, float]) -> str:
    """Wall seconds per stage, the total last."""
    parts = [f"{name} {seconds:.1f} s" for name, seconds in timings.items() if name != "total"]
    if "total" in timings:
        parts.append(f"total {timings['total']:.1f} s")
    return "took     " + ", ".join(parts)


def columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as text, each column as wide as its widest cell; no blanks at line ends."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
