"""How fast the model of the livepatch core is: handler decisions, transitions, interleavings."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from time import perf_counter

from kmend.klp.explore import Setup, Universe, explore, nested
from kmend.klp.patch import klp_ftrace_handler
from kmend.klp.scenario import (
    FuncDecl,
    Load,
    Machine,
    ObjectDecl,
    PatchDecl,
    Scenario,
    Settle,
    TaskDecl,
    Unload,
    Write,
)
from kmend.klp.structs import PATCHED, UNPATCHED, Frame, Kernel, Ops, Task
from measure import show

DECISIONS = 1_000_000
TRANSITIONS = 10_000
TASKS = 1_000
BOTH = (ObjectDecl(None, (FuncDecl("f"), FuncDecl("g"))),)


def decisions() -> int:
    """The handler's answers for tasks of both states, in and out of a transition."""
    machine = Machine(Scenario("handler", ("f", "g"), (PatchDecl("p1", BOTH), PatchDecl("p2", BOTH)), ()))
    for name in ("p1", "p2"):
        if machine.execute(Load(name)):
            raise RuntimeError("the patch was refused")
    k: Kernel = machine.k
    (ops,) = [ops for ops in k.klp_ops.values() if ops.old_func.name == "f"]
    tasks = [Task(1, "a", patch_state=UNPATCHED), Task(2, "b", patch_state=PATCHED)]
    done = 0
    for transition in (False, True):
        ops.func_stack[0].transition = transition
        for task in tasks:
            done += repeat(k, ops, task, DECISIONS // 4)
    return done


def repeat(k: Kernel, ops: Ops, task: Task, count: int) -> int:
    for _ in range(count):
        klp_ftrace_handler(k, ops, task)
    return count


def transitions() -> int:
    """Enabling and disabling a patch of two functions, with 1,000 tasks asleep on stacks of two frames."""
    tasks = tuple(TaskDecl(f"t{i}") for i in range(TASKS))
    machine = Machine(
        Scenario("tasks", ("f", "g", "read", "schedule"), (PatchDecl("p1", BOTH),), (), tasks=tasks),
        debug=frozenset(),
    )
    read, schedule = (f for f in machine.k.kallsyms[None] if f.name in ("read", "schedule"))
    for task in machine.k.tasks:
        task.stack = [Frame(read, read), Frame(schedule, schedule)]
    done = 0
    while done < TRANSITIONS:
        for step, wanted in (
            (Load("p1"), 0),
            (Settle(), "done"),
            (Write("p1", "enabled", "0"), 0),
            (Settle(), "done"),
            (Unload("p1"), 0),
        ):
            if machine.execute(step) != wanted:
                raise RuntimeError(f"{step} did not go as it should")
        machine.k.log.clear()
        machine.k.freed.clear()
        done += 2
    return done


def interleavings() -> int:
    """Two tasks and two patches, each loaded and taken back."""
    states = tuple((("f", name), ("g", name)) for name in ("vmlinux", "p1", "p2"))
    report = explore(
        Setup(
            Scenario("two", ("f", "g"), (PatchDecl("p1", BOTH), PatchDecl("p2", BOTH)), ()),
            (Load("p1"), Load("p2"), Write("p2", "enabled", "0"), Write("p1", "enabled", "0")),
            (nested("f", "g"),) * 2,
            Universe(states),
        )
    )
    if report.violations or not report.complete:
        raise RuntimeError(f"the search found {report.violations}")
    return report.states


def main() -> int:
    rows = []
    work: tuple[tuple[str, Callable[[], int]], ...] = (
        ("decisions of the ftrace handler", decisions),
        (f"transitions of {TASKS} tasks", transitions),
        ("states, 2 tasks and 2 patches, all visited", interleavings),
    )
    for name, function in work:
        gc.collect()
        began = perf_counter()
        count = function()
        took = perf_counter() - began
        rows.append([name, f"{count:,}", f"{took:.1f}", f"{1e6 * took / count:.1f}"])
    show("the model of the livepatch core", ("what", "number", "seconds", "µs each"), rows, [])
    return 0


if __name__ == "__main__":
    sys.exit(main())
