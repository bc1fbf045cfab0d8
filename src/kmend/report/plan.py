"""A plan as text for people and as the values of its JSON document (schema 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kmend.core.errors import Refusal
from kmend.core.live import tasks
from kmend.core.plan import Forecast, FuncStack, Inside, Leaves, Plan, StackEntry, Verdict
from kmend.report.live import Group, blocker_document, group_line, kernel_document, numbers_text, same

#: People's text names so many groups of equal tasks and func stacks; the JSON document has all.
SHOWN = 25
_WORDS = {
    Verdict.LOADS: "would load",
    Verdict.STALLS: "would load, but its transition is not seen to end",
    Verdict.REFUSED: "would be refused",
}
_LEAVES = {
    Leaves.ITSELF: "by itself",
    Leaves.SIGNAL: "when interrupted",
    Leaves.EVENT: "only when what it waits for comes",
    Leaves.NEVER: "never: it is the thread's main function",
}


def succeeded(plan: Plan) -> bool:
    """Whether `kmend plan` ends with status 0: it would load, and its transition end."""
    return plan.verdict is Verdict.LOADS


# -- document --------------------------------------------------------------------------------------


def to_document(plan: Plan) -> dict[str, object]:
    """The JSON document."""
    return {
        "schema": 1,
        "verb": "plan",
        "name": plan.name,
        "file": plan.file,
        "sha256": plan.sha256,
        "result": plan.verdict.value,
        "kernel": kernel_document(plan.kernel),
        "replace": plan.replace,
        "checks": [{"name": row.name, "passed": row.passed, "text": row.text} for row in plan.checks],
        "refused": [_refusal(row) for row in plan.refused],
        "warnings": [_refusal(row) for row in plan.warnings],
        "func_stacks": [
            {
                "object": row.object,
                "function": row.function,
                "sympos": row.sympos,
                "before": [_entry(one) for one in row.before],
                "during": [_entry(one) for one in row.during],
                "after": [_entry(one) for one in row.after],
            }
            for row in plan.stacks
        ],
        "replaced": list(plan.replaced),
        "nops": [{"object": owner, "function": name} for owner, name in plan.nops],
        "callbacks": [
            {"kind": row.kind, "object": row.object, "function": row.function, "when": row.when}
            for row in plan.callbacks
        ],
        "late_objects": list(plan.late),
        "model": {"line": plan.model, "errno": plan.number, "log": list(plan.log)},
        "transition": _forecast(plan.forecast),
    }


def _refusal(row: Refusal) -> dict[str, str]:
    return {"rule": row.rule, "what": row.what, "why": row.why, "next_step": row.next_step}


def _entry(row: StackEntry) -> dict[str, object]:
    return {"patch": row.patch, "nop": row.nop}


def _forecast(row: Forecast | None) -> dict[str, object] | None:
    if row is None:
        return None
    return {
        "seconds_alone": None if row.alone is None else round(row.alone, 1),
        "seconds_with_kmend_load": None if row.woken is None else round(row.woken, 1),
        "why": row.why,
        "helps": list(row.helps),
        "looks": [
            {
                "seconds": one.seconds,
                "tasks": one.tasks,
                "inside": one.inside,
                "running": one.running,
                "unreadable": one.unreadable,
            }
            for one in row.looks
        ],
        "inside": [
            {
                **blocker_document(one.blocker),
                "seen": one.seen,
                "leaves": one.leaves.value,
                "certain": one.certain,
            }
            for one in row.inside
        ],
    }


# -- text ------------------------------------------------------------------------------------------


def to_text(plan: Plan) -> str:
    """The verdict first, then its reasons, then what would happen, then what was not looked at."""
    lines = [f"{plan.name}: {_WORDS[plan.verdict]} on {plan.kernel.release}"]
    for kind, rows in (("refused", plan.refused), ("warning", plan.warnings)):
        for row in rows:
            lines += _lines_of(kind, row)
    lines += _stacks(plan.stacks, bool(plan.number))
    if plan.replaced:
        lines.append(f"replaced: {', '.join(plan.replaced)} (none of their callbacks runs)")
    if plan.nops:
        lines.append(
            f"nops, which take back what this patch has not got: {', '.join(name for _, name in plan.nops)}"
        )
    if plan.late:
        lines.append(f"not loaded, patched when they come: {', '.join(plan.late)}")
    if plan.callbacks:
        lines.append("callbacks, in this order:")
        for at, call in enumerate(plan.callbacks, 1):
            lines.append(f"  {at}. {call.kind} of {call.object}: {call.function}() {call.when}")
    elif not plan.number and plan.stacks:
        lines.append("callbacks: none")
    if plan.log:
        lines += ["the kernel would say:", *(f"  {text}" for text in plan.log)]
    if plan.forecast is not None:
        lines += _transition(plan.forecast, bool(plan.number))
    lines.append("looked at:")
    lines += [f"  {row.name}: {row.text}" for row in plan.checks if row.passed]
    rows_not = [f"  {row.name}: {row.text}" for row in plan.checks if row.passed is None]
    if rows_not:
        lines += ["not looked at:", *rows_not]
    return "\n".join(lines)


def _lines_of(kind: str, row: Refusal) -> Iterator[str]:
    yield f"{kind}  {row.rule}: {row.what}"
    for label, text in (("why", row.why), ("next", row.next_step)):
        if text:
            indented = text.replace("\n", "\n          ")
            yield f"    {label + ':':5} {indented}"


def _stacks(rows: Sequence[FuncStack], refused: bool) -> Iterator[str]:
    if not rows:
        return
    yield "func stacks, top first" + (" (unchanged):" if refused else ", before -> after:")
    for row in rows[:SHOWN]:
        position = f",{row.sympos}" if row.sympos > 1 else ""
        name = f"{row.object}:{row.function}{position}"
        after = "" if refused else f" -> {_chain(row.after)}"
        yield f"  {name}: {_chain(row.before)}{after}"
    if len(rows) > SHOWN:
        yield f"  … and {len(rows) - SHOWN} more"


def _chain(rows: Sequence[StackEntry]) -> str:
    return ", ".join([*(row.patch + (" (nop)" if row.nop else "") for row in rows), "original"])


def _transition(row: Forecast, refused: bool) -> Iterator[str]:
    if refused:
        yield "tasks inside of its functions now:"
    else:
        yield f"transition: {_seconds(row)}"
        yield f"  {row.why}"
    groups: dict[tuple[object, ...], list[Inside]] = {}
    for one in row.inside:
        groups.setdefault((same(one.blocker), one.seen, one.leaves, one.certain), []).append(one)
    shown = list(groups.values())[:SHOWN]
    for group in shown:
        rows = Group(tuple(one.blocker for one in group))
        yield f"  {_inside(rows, group[0], len(row.looks))}"
        if len(group) > 1:
            yield from (f"    {line}" for line in numbers_text(rows))
    if len(groups) > SHOWN:
        yield f"  … and {tasks(len(row.inside) - sum(map(len, shown)))} more (--json has all)"
    for text in row.helps:
        yield f"  helps: {text}"


def _seconds(row: Forecast) -> str:
    if row.woken is None and row.alone is None:
        return "no end in sight"
    alone = "no end in sight" if row.alone is None else f"about {row.alone:.0f} s"
    woken = "no end in sight" if row.woken is None else f"about {row.woken:.0f} s"
    return f"{woken} with kmend load, {alone} by the kernel alone"


def _inside(group: Group, row: Inside, looks: int) -> str:
    code = f" [{row.blocker.object}]" if row.blocker.object else ""
    certain = "" if row.certain else " (perhaps one that changes)"
    return (
        f"{group_line(group)}{code}{certain}, at {row.seen} of {looks} looks; leaves: {_LEAVES[row.leaves]}"
    )
