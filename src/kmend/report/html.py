"""What an acting verb did, as one HTML file that needs nothing beside it.

No script, nothing from elsewhere (the page forbids itself both), readable in light and dark, and on paper.
Everything that comes from the machine is escaped by the template: whoever may run a program chooses its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kmend import __version__
from kmend.core.errors import Refusal
from kmend.core.live import ActionReport, Check, Followed, Occasion, Phase, Result, Transition, printable
from kmend.core.report import BuildReport
from kmend.report import live
from kmend.report.action import left, succeeded
from kmend.report.build import verified_line
from kmend.report.plot import Plot, plot

TEMPLATE = Path(__file__).with_name("action.html")
#: So many groups of blockers are shown with their stacks; a stall has one cause, seldom fifty.
SHOWN_GROUPS = 50


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the log: seconds since the action began, who says it, the number of its mark in the plot."""

    seconds: float
    time: str
    source: str
    text: str
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Stack:
    """A group of equal blockers. ``frames`` are (text, whether it is the patched function)."""

    line: str
    state: str
    pids: str
    remedy: str
    frames: tuple[tuple[str, bool], ...] | None


@dataclass(frozen=True, slots=True)
class Look:
    """One look at what held a transition up."""

    title: str
    text: str
    stacks: tuple[Stack, ...]
    more: int


@dataclass(frozen=True, slots=True)
class Action:
    """One action as the template shows it."""

    report: ActionReport
    good: bool
    title: str
    log: tuple[Line, ...]
    plot: Plot | None
    unwatched: str
    looks: tuple[Look, ...]
    cves: tuple[str, ...]
    note: tuple[tuple[str, str], ...]
    build: BuildReport | None
    verified: str
    refused: tuple[Refusal, ...]
    warnings: tuple[Refusal, ...]
    checks: tuple[Check, ...]


def page(occasion: Occasion, reports: Sequence[ActionReport], builds: Sequence[BuildReport | None]) -> str:
    """The whole file; ``builds`` has the build report of each action's patch where it is known."""
    # only who asks for a page waits until the template engine is loaded
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 - as said above

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["lines"] = _lines
    actions = [_action(occasion, row, build) for row, build in zip(reports, builds, strict=True)]
    good = all(row.good for row in actions)
    return environment.from_string(TEMPLATE.read_text()).render(
        occasion=occasion,
        actions=actions,
        good=good,
        title=printable(f"kmend {occasion.verb} {' '.join(row.patch for row in reports)}".strip()),
        began=live.moment(occasion.began),
        took=occasion.ended - occasion.began,
        kernel=list(live.kernel_text(occasion.kernel)) if occasion.kernel else [],
        version=__version__,
    )


def _lines(text: str) -> str:
    """Text of several lines without anything else that is not printable."""
    return "\n".join(printable(line) for line in text.splitlines())


def _action(occasion: Occasion, report: ActionReport, build: BuildReport | None) -> Action:
    note = report.note
    fields = [(key, note[key]) for key in ("title", "origin") if note.get(key)]
    if note:
        fields.append(("built", f"by kmend {note.get('kmend', '?')} for {note.get('kernel', '?')}"))
    cves = live.cves_of(report.note) or live.cves_of({"cves": list(build.cves) if build else []})
    return Action(
        report=report,
        good=succeeded(report),
        title="left as it is" if left(report) else _TITLES[report.result],
        log=_log(occasion, report),
        plot=plot(report),
        unwatched=_unwatched(report),
        looks=tuple(look for row in report.followed for look in _looks(row)),
        cves=cves,
        note=tuple((key, printable(str(value))) for key, value in fields),
        build=build,
        verified=verified_line(build.verified) if build is not None and build.verified.functions else "",
        refused=report.refused,
        warnings=report.warnings,
        checks=report.checks,
    )


_TITLES = {
    Result.DONE: "done",
    Result.PENDING: "begun",
    Result.REVERSED: "taken back",
    Result.STALLED: "stalled",
    Result.FAILED: "failed",
    Result.REFUSED: "refused",
}


def _unwatched(report: ActionReport) -> str:
    """Why there is no plot."""
    if not report.followed:
        return "No transition was followed."
    if report.followed[-1].last is not None or report.followed[-1].goal is None:
        return ""  # a single look: its blockers are shown
    return "Every task had switched before the first look at them."


def _log(occasion: Occasion, report: ActionReport) -> tuple[Line, ...]:
    """kmend's steps and the kernel's words by time."""
    start = occasion.boot + report.began

    def clock(seconds: float) -> str:
        return live.moment(start + seconds).partition(" ")[2]

    rows = [
        Line(step.seconds, clock(step.seconds), "kmend", printable(step.text), at)
        for at, step in enumerate(report.steps, 1)
    ]
    for message in report.messages:
        seconds = message.seconds + report.drift - report.began
        rows.append(Line(seconds, clock(seconds), "kernel", printable(message.text)))
    return tuple(sorted(rows, key=lambda row: row.seconds))


def _looks(row: Followed) -> list[Look]:
    word = "unpatching" if row.goal is Phase.UNPATCHING else "patching"
    found = []
    if row.first is not None:
        found.append(_look(f"At the first look ({word})", row.first))
    if row.last is not None and row.last is not row.first:
        found.append(_look(f"At the last look ({word})", row.last))
    return found


def _look(title: str, row: Transition) -> Look:
    groups = live.grouped(row.blockers)
    shown = groups[:SHOWN_GROUPS]
    return Look(
        title,
        next(live.transition_text(row)),
        tuple(_stack(group) for group in shown),
        row.left - sum(len(group.rows) for group in shown),
    )


def _stack(group: live.Group) -> Stack:
    first = group.first
    frames = first.task.stack
    return Stack(
        live.group_line(group),
        first.task.state,
        ", ".join(live.numbers_of(group)) if len(group.rows) > 1 else "",
        first.remedy,
        None
        if frames is None
        else tuple((str(one), bool(first.function) and one.function == first.function) for one in frames),
    )
