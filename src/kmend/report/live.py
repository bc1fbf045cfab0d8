"""What runs, as text for people and as the values of a JSON document (schema 1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
)

#: So many blockers `kmend status` shows; `kmend blockers` shows all, with their stacks.
SHOWN_BLOCKERS = 8
#: So many functions of one object fit into a line.
SHOWN_FUNCTIONS = 12


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
        yield f"  taint {kernel.taint} ({letters}): " + "; ".join(flag.meaning for flag in kernel.taints)
    limits = []
    if kernel.signatures_enforced:
        limits.append("modules must be signed")
    if kernel.lockdown not in ("", "none"):
        limits.append(f"lockdown: {kernel.lockdown}")
    if kernel.modules_disabled:
        limits.append("no more modules can be loaded in this boot")
    if kernel.ftrace_enabled is False:
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
    if patch.module and patch.module.references is not None and patch.phase is Phase.LEFT:
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
        yield from (f"     {line}" for line in _origin(patch.module))
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


def _origin(module: LiveModule) -> Iterator[str]:
    note = module.note
    if title := note.get("title"):
        yield f"title: {title}"
    if origin := note.get("origin"):
        yield f"origin: {origin}"
    if note:
        yield f"built by kmend {note.get('kmend', '?')} for {note.get('kernel', '?')}"


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
    for blocker in row.blockers[:SHOWN_BLOCKERS]:
        yield "  " + blocker_line(blocker)
    more = row.left - min(len(row.blockers), SHOWN_BLOCKERS)
    if more > 0:
        yield f"  … and {more} more (kmend blockers)"


def blocker_line(row: Blocker) -> str:
    """A blocker in one line."""
    return f"{task_name(row)} {row.why}"


def task_name(row: Blocker) -> str:
    """``pid (name)``, with the thread and the number in its own PID namespace where they differ."""
    task = row.task
    thread = f" thread {task.tid}" if task.tid != task.pid else ""
    name = task.name if task.name == task.process or not task.process else f"{task.process}/{task.name}"
    inner = f", {task.pids[-1]} in its namespace" if len(task.pids) > 1 else ""
    return f"{task.pid}{thread} ({name}{inner})"


def blockers_text(row: Transition) -> Iterator[str]:
    """Every blocker with its stack and what would help."""
    yield from list(transition_text(row))[:1]
    for blocker in row.blockers:
        yield f"{blocker_line(blocker)}  [{blocker.task.state}]"
        yield f"  helps: {blocker.remedy}"
        if blocker.task.stack is None:
            yield "  its stack cannot be read"
        for frame in blocker.task.stack or ():
            mark = " <- here" if blocker.function and frame.function == blocker.function else ""
            yield f"    {frame}{mark}"
    more = row.left - len(row.blockers)
    if more > 0:
        yield f"… and {more} more"


def log_line(row: LogEntry) -> str:
    """A line of the log with its time of day (UTC)."""
    when = datetime.fromtimestamp(row.time, tz=UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    return f"{when}  {row.source:6}  {row.text}"


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
