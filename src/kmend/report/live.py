"""What runs, as text for people and as the values of a JSON document (schema 1)."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from kmend.core.live import (
    Blocker,
    KernelState,
    LiveModule,
    LiveObject,
    LivePatch,
    LogEntry,
    Phase,
    Transition,
    printable,
    tasks,
)

#: So many groups of blockers `kmend status` shows; `kmend blockers` shows all, with their stacks.
SHOWN_BLOCKERS = 8
#: So many functions of one object fit into a line.
SHOWN_FUNCTIONS = 12
#: So many different names of the tasks of one group.
SHOWN_NAMES = 4
_CVE = re.compile(r"CVE-[0-9]{4}-[0-9]{4,7}")
#: How the sentences of ``runtime.blockers`` begin, and what that is of several tasks.
_PLURALS = (
    ("sleeps", "sleep"),
    ("waits", "wait"),
    ("runs on a processor", "run on processors"),
    ("is ", "are "),
    ("a kernel thread that sleeps", "kernel threads that sleep"),
    ("a kernel thread that runs on a processor", "kernel threads that run on processors"),
    ("its stack cannot", "their stacks cannot"),
)


# -- documents -------------------------------------------------------------------------------------


def kernel_document(kernel: KernelState) -> dict[str, object]:
    """The running kernel."""
    return {
        "release": kernel.release,
        "version": kernel.version,
        "build_id": kernel.build_id,
        "boot_id": kernel.boot_id,
        "taint": kernel.taint,
        "taint_flags": [
            {"bit": flag.bit, "letter": flag.letter, "meaning": flag.meaning} for flag in kernel.taints
        ],
        "signatures_enforced": kernel.signatures_enforced,
        "lockdown": kernel.lockdown,
        "modules_disabled": kernel.modules_disabled,
        "ftrace_enabled": kernel.ftrace_enabled,
        "ftrace_dead": kernel.ftrace_dead,
    }


def patch_document(patch: LivePatch) -> dict[str, object]:
    """A patch."""
    return {
        "name": patch.name,
        "phase": patch.phase.value,
        "enabled": patch.phase in (Phase.ENABLED, Phase.PATCHING),
        "transition": patch.phase.moving,
        "replace": patch.replace,
        "order": patch.order,
        "order_from": "kernel" if patch.order_shown else "computed",
        "forced": patch.forced,
        "pinned_by": patch.pinned_by or None,
        "objects": [object_document(row) for row in patch.objects],
        "module": module_document(patch.module),
    }


def object_document(row: LiveObject) -> dict[str, object]:
    """An object of a patch."""
    return {
        "name": row.name,
        "patched": row.patched,
        "functions": [
            {"name": f.name, "sympos": f.sympos, "shadowed_by": f.shadowed_by or None} for f in row.functions
        ],
    }


def module_document(module: LiveModule | None) -> dict[str, object] | None:
    """A module."""
    if module is None:
        return None
    return {
        "references": module.references,
        "initstate": module.initstate,
        "taint": module.taint,
        "holders": list(module.holders),
        "note": dict(module.note),
    }


def transition_document(row: Transition | None) -> dict[str, object] | None:
    """A transition with its blockers."""
    if row is None:
        return None
    return {
        "patch": row.patch,
        "direction": row.phase.value,
        "target": row.target,
        "tasks": row.tasks,
        "left": row.left,
        "unreadable": row.unreadable,
        "blockers": [blocker_document(one) for one in row.blockers],
    }


def blocker_document(row: Blocker) -> dict[str, object]:
    """A task that holds a transition up."""
    task = row.task
    return {
        "pid": task.pid,
        "tid": task.tid,
        "name": task.name,
        "process": task.process,
        "state": task.state,
        "kthread": task.kthread,
        "patch_state": task.patch_state,
        "cause": row.cause.value,
        "function": row.function or None,
        "object": row.object or None,
        "why": row.why,
        "remedy": row.remedy,
        "wakeable": row.wakeable,
        "tracer": task.tracer or None,
        "pids": list(task.pids),
        "children": list(task.children),
        "system_call": task.system_call,
        "stack": None if task.stack is None else [str(frame) for frame in task.stack],
    }


def log_document(row: LogEntry) -> dict[str, object]:
    """A line of the log."""
    document: dict[str, object] = {"time": row.time, "source": row.source, "text": row.text}
    if row.message is not None:
        document["seconds"] = row.message.seconds
        document["level"] = row.message.level
    if row.record is not None:
        document["record"] = dict(row.record)
    return document


# -- text ------------------------------------------------------------------------------------------


def kernel_text(kernel: KernelState) -> Iterator[str]:
    """The kernel in a few lines."""
    build = f", build id {kernel.build_id[:12]}…" if kernel.build_id else ""
    yield f"{kernel.release} {kernel.version}{build}"
    if kernel.taint:
        letters = "".join(flag.letter for flag in kernel.taints)
        yield f"  taint {kernel.taint} ({letters}):"
        yield from (f"    {flag.letter}  {flag.meaning}" for flag in kernel.taints)
    limits = []
    if kernel.signatures_enforced:
        limits.append("modules must be signed")
    if kernel.lockdown not in ("", "none"):
        limits.append(f"lockdown: {kernel.lockdown}")
    if kernel.modules_disabled:
        limits.append("no more modules can be loaded in this boot")
    if kernel.ftrace_dead:
        limits.append("ftrace has shut itself down: nothing can be patched before the next boot")
    elif kernel.ftrace_enabled is False:
        limits.append("ftrace is off (kernel.ftrace_enabled=0): nothing can be patched")
    if limits:
        yield "  " + "; ".join(limits)


def patch_line(patch: LivePatch) -> str:
    """A patch in one line."""
    facts = [patch.phase.value]
    if patch.replace:
        facts.append("replaces all below")
    if patch.forced:
        facts.append("FORCED: tasks may still run code of the other side")
    if patch.pinned_by:
        facts.append(f"its module is kept until the next boot by the forced transition of {patch.pinned_by}")
    elif patch.module and patch.module.references is not None and patch.phase is Phase.LEFT:
        facts.append(
            "its module is loaded and unused"
            if patch.module.references == 0
            else f"its module has {patch.module.references} references"
        )
    return f"{patch.name}: {', '.join(facts)}"


def patch_text(patch: LivePatch, *, every: bool = False) -> Iterator[str]:
    """A patch with its objects and functions (``every``: however many), and where it comes from."""
    order = f"#{patch.order}" if patch.order else "  "
    yield f"{order} {patch_line(patch)}"
    if patch.module is not None and not every:
        yield from (f"     {line}" for line in _origin(patch.module.note))
    for obj in patch.objects:
        state = "" if obj.patched is not False else " (not loaded)"
        names = [f.name if f.sympos <= 1 else f"{f.name},{f.sympos}" for f in obj.functions]
        shown = len(names) if every else SHOWN_FUNCTIONS
        more = len(names) - shown
        listed = ", ".join(names[:shown]) + (f", {more} more" if more > 0 else "")
        yield f"     {obj.name}{state}: {listed or 'no functions'}"
        over = dict.fromkeys(f.shadowed_by for f in obj.functions if f.shadowed_by)
        for other in over:
            hidden = [f.name for f in obj.functions if f.shadowed_by == other]
            yield f"       shadowed by {other}: {', '.join(hidden[:shown])}"


def _origin(note: Mapping[str, object]) -> Iterator[str]:
    if title := note.get("title"):
        yield printable(f"title: {title}")
    if cves := cves_of(note):
        yield f"mentions {', '.join(cves)}"
    if origin := note.get("origin"):
        yield printable(f"origin: {origin}")
    if note:
        yield printable(f"built by kmend {note.get('kmend', '?')} for {note.get('kernel', '?')}")


def cves_of(note: Mapping[str, object]) -> tuple[str, ...]:
    """The CVE names in a module's note, as far as they look like such."""
    named = note.get("cves")
    rows = named if isinstance(named, list) else []
    return tuple(name for name in rows if isinstance(name, str) and _CVE.fullmatch(name))


def transition_text(row: Transition) -> Iterator[str]:
    """A transition and the first of what it waits for."""
    word = "patching" if row.phase is Phase.PATCHING else "unpatching"
    if row.left:
        yield f"{word} {row.patch}: {row.left} of {row.tasks} tasks left"
    else:
        yield (
            f"{word} {row.patch}: all {row.tasks} tasks have switched; the kernel waits for idle "
            "processors or is finishing"
        )
    groups = grouped(row.blockers)
    for group in groups[:SHOWN_BLOCKERS]:
        yield "  " + group_line(group)
    more = row.left - sum(len(group.rows) for group in groups[:SHOWN_BLOCKERS])
    if more > 0:
        yield f"  … and {more} more (kmend blockers)"


def blocker_line(row: Blocker) -> str:
    """A blocker in one line."""
    return f"{task_name(row)} {row.why}"


@dataclass(frozen=True, slots=True)
class Group:
    """Blockers of which the same can be said: same cause, function, sentences and functions on the stack."""

    rows: tuple[Blocker, ...]

    @property
    def first(self) -> Blocker:
        """One for all."""
        return self.rows[0]


def same(row: Blocker) -> tuple[object, ...]:
    """What two blockers must have in common to be shown as one group."""
    stack = row.task.stack
    return (
        row.cause,
        row.function,
        row.object,
        row.why,
        row.remedy,
        row.task.state,
        None if stack is None else tuple((frame.function, frame.module) for frame in stack),
    )


def grouped(rows: Iterable[Blocker]) -> tuple[Group, ...]:
    """Equal blockers together, in the order of the first of each."""
    found: dict[tuple[object, ...], list[Blocker]] = {}
    for row in rows:
        found.setdefault(same(row), []).append(row)
    return tuple(Group(tuple(group)) for group in found.values())


def group_line(group: Group) -> str:
    """A group in one line: one task by its name, several by their number."""
    if len(group.rows) == 1:
        return blocker_line(group.first)
    return f"{group_name(group)} {plural(group.first.why)}"


def group_name(group: Group) -> str:
    """``20 tasks (sleep)``; of many names the first few."""
    names = list(dict.fromkeys(printable(row.task.name) for row in group.rows))
    more = ", …" if len(names) > SHOWN_NAMES else ""
    return f"{tasks(len(group.rows))} ({', '.join(names[:SHOWN_NAMES])}{more})"


def plural(why: str) -> str:
    """A blocker's sentence, said of several tasks."""
    for one, several in _PLURALS:
        if why.startswith(one):
            return several + why.removeprefix(one)
    return f"each {why}"


def numbers_of(group: Group) -> list[str]:
    """The number of each task of a group; ``process/thread`` where the two differ."""
    return [
        (f"{task.pid}/{task.tid}" if task.tid != task.pid else str(task.pid))
        + (f" ({task.pids[-1]} in its namespace)" if len(task.pids) > 1 else "")
        for task in (row.task for row in group.rows)
    ]


def numbers_text(group: Group) -> list[str]:
    """All numbers of a group's tasks as lines of text."""
    words = ", ".join(numbers_of(group))
    return textwrap.wrap(words, 100, initial_indent="pids: ", subsequent_indent="      ")


def task_name(row: Blocker) -> str:
    """``pid (name)``, with the thread and the number in its own PID namespace where they differ."""
    task = row.task
    thread = f" thread {task.tid}" if task.tid != task.pid else ""
    name = task.name if task.name == task.process or not task.process else f"{task.process}/{task.name}"
    inner = f", {task.pids[-1]} in its namespace" if len(task.pids) > 1 else ""
    return f"{task.pid}{thread} ({printable(name)}{inner})"


def blockers_text(row: Transition) -> Iterator[str]:
    """Every blocker with its stack and what would help."""
    yield from list(transition_text(row))[:1]
    for group in grouped(row.blockers):
        blocker = group.first
        yield f"{group_line(group)}  [{blocker.task.state}]"
        if len(group.rows) > 1:
            yield from (f"  {line}" for line in numbers_text(group))
        yield f"  helps: {blocker.remedy}"
        if blocker.task.stack is None:
            yield "  its stack cannot be read"
        for frame in blocker.task.stack or ():
            mark = " <- here" if blocker.function and frame.function == blocker.function else ""
            yield f"    {frame}{mark}"
    more = row.left - len(row.blockers)
    if more > 0:
        yield f"… and {more} more"


def moment(time: float) -> str:
    """Seconds since the epoch as date and time of day (UTC), to the millisecond."""
    try:
        return datetime.fromtimestamp(time, tz=UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    except (ValueError, OverflowError, OSError):  # a clock or a file that is out of its mind
        return f"@{time}"


def note_text(note: Mapping[str, object]) -> Iterator[str]:
    """What kmend wrote into a module, field by field."""
    for key, value in note.items():
        if value:
            words = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield printable(f"{key}: {words}")


def log_line(row: LogEntry) -> str:
    """A line of the log with its time of day (UTC)."""
    return f"{moment(row.time)}  {row.source:6}  {printable(row.text)}"


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns, each as wide as its widest cell."""
    cells = [tuple(row) for row in rows]
    if not cells:
        return []
    widths = [max(len(row[at]) for row in cells) for at in range(len(cells[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
