"""Scenarios that show one thing each, with words to every step. They are run, not told: see :func:`play`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from kmend.klp.line import LINE_6_1, Line
from kmend.klp.outcome import StateView, view
from kmend.klp.scenario import (
    ALL_CALLBACKS,
    Call,
    Enter,
    FuncDecl,
    Leave,
    Load,
    Machine,
    ModuleDecl,
    ObjectDecl,
    PatchDecl,
    Result,
    Scenario,
    Settle,
    ShadowCall,
    ShadowStep,
    Step,
    TaskDecl,
    Unload,
    Wait,
    Write,
)
from kmend.klp.shadow import klp_shadows
from kmend.klp.structs import HZ, Sleep, Wake


@dataclass(frozen=True, slots=True)
class Part:
    """A step and what is to be seen in it."""

    step: Step
    words: str


@dataclass(frozen=True, slots=True)
class Demo:
    """A scenario with words. ``parts`` are its steps."""

    name: str
    title: str
    patches: tuple[PatchDecl, ...]
    parts: tuple[Part, ...]
    functions: tuple[str, ...] = ("f", "g")
    modules: tuple[ModuleDecl, ...] = ()
    tasks: tuple[TaskDecl, ...] = (TaskDecl("a"), TaskDecl("b"))

    @property
    def scenario(self) -> Scenario:
        """The scenario alone."""
        steps = tuple(part.step for part in self.parts)
        return Scenario(self.name, self.functions, self.patches, steps, self.modules, self.tasks)


@dataclass(frozen=True, slots=True)
class Moment:
    """The machine after something happened. ``seconds`` since the beginning; ``log``: the lines since then.

    ``shadows`` are (object, id, value) of the shadow variables that exist.
    """

    seconds: float
    what: str
    words: str
    result: str
    state: StateView
    log: tuple[str, ...]
    shadows: tuple[tuple[str, int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Timeline:
    """A demo that was played on a kernel line; the first moment is the one before any step."""

    demo: Demo
    line: Line
    moments: tuple[Moment, ...]


F = (ObjectDecl(None, (FuncDecl("f"),)),)
FG = (ObjectDecl(None, (FuncDecl("f"), FuncDecl("g"))),)
WITH_M = (ObjectDecl(None, (FuncDecl("f"),)), ObjectDecl("m", (FuncDecl("mf"),)))

DEMOS = (
    Demo(
        "simple",
        "A patch is loaded, used, and taken back",
        (PatchDecl("p1", F),),
        (
            Part(Enter("b", "g"), "b waits inside g, which the patch does not touch."),
            Part(Call("a", "f"), "Before the patch, f is the original."),
            Part(
                Load("p1"),
                "No stack shows f: every task is switched at once, and the transition ends within the load.",
            ),
            Part(Call("a", "f"), "The ftrace handler sends the call to the top of f's stack: p1."),
            Part(Write("p1", "enabled", "0"), "Taking it back is a transition as well."),
            Part(Call("a", "f"), "f is the original again, and its ftrace handler is gone."),
            Part(Unload("p1"), "Nobody refers to the module any more."),
        ),
    ),
    Demo(
        "sleeper",
        "A task asleep in the function holds the transition up, until the kernel signals it",
        (PatchDecl("p1", F),),
        (
            Part(Enter("a", "f"), "a sleeps inside of f, in the old code."),
            Part(Load("p1"), "f is on a's stack: a stays unpatched. b is switched."),
            Part(Call("b", "f"), "b runs the new code …"),
            Part(Enter("b", "f", wake=Wake.STAY), "… and sleeps in it: old and new code side by side."),
            Part(
                Settle(),
                "Every second the kernel looks again. The fifteenth time it sends a signal that no program "
                "sees: a leaves f, is switched on its way out, and enters f again: the new one.",
            ),
        ),
    ),
    Demo(
        "late-module",
        "A module that is loaded after the patch is patched before it runs",
        (PatchDecl("p1", WITH_M),),
        (
            Part(Load("p1"), "The patch has functions for the module m, which is not there: they wait."),
            Part(Load("m"), "klp_module_coming() applies the patch before m's init function runs."),
            Part(Call("a", "mf"), "m's function is replaced from its first call on."),
            Part(Unload("m"), "When m goes, its part of the patch is taken off; the rest stays."),
            Part(Enter("a", "f", wake=Wake.STAY), "a sleeps in p1's f …"),
            Part(Write("p1", "enabled", "0"), "… so taking the patch back has to wait."),
            Part(Load("m"), "m comes in the middle of that transition, and takes part in it."),
            Part(Call("b", "mf"), "b is back on old code already, in m too."),
            Part(Leave("a"), "a leaves the new f and is switched."),
            Part(Settle(), "At the next look all are switched."),
        ),
        modules=(ModuleDecl("m", ("mf",)),),
    ),
    Demo(
        "replace",
        "An atomic replace: the new patch takes the place of all older ones",
        (PatchDecl("p1", FG), PatchDecl("p2", F, replace=True)),
        (
            Part(Load("p1"), "p1 changes f and g."),
            Part(Enter("a", "g", wake=Wake.STAY), "a sleeps in p1's g."),
            Part(Load("p2"), "p2 changes only f. For g the kernel adds a nop: it goes back to the original."),
            Part(Call("b", "g"), "b, switched: the nop leads to the original …"),
            Part(Call("b", "f"), "… and f is p2's."),
            Part(Leave("a"), "a, unpatched in this transition, had p1's code; it leaves."),
            Part(Settle(), "p1 and the nop are taken off the stacks. None of p1's callbacks would run."),
            Part(Unload("p1"), "The replaced module can go."),
        ),
    ),
    Demo(
        "reverse",
        "A transition that is stuck is turned round",
        (PatchDecl("p1", F),),
        (
            Part(Enter("a", "f", Sleep.UNINTERRUPTIBLE), "a sleeps in f; no signal wakes it."),
            Part(Load("p1"), "a holds the transition up."),
            Part(Call("b", "f"), "b runs the new code."),
            Part(Wait(20), "The kernel's signals do not help."),
            Part(
                Write("p1", "enabled", "0"),
                "Reversed: now b has to go back, and a is where it should be already.",
            ),
            Part(Call("b", "f"), "b is switched on its way to user space, and runs the original."),
            Part(Settle(), "The retry that was due finds all tasks unpatched."),
            Part(Unload("p1"), "As if nothing had been."),
        ),
    ),
    Demo(
        "force",
        "Forcing ends a transition and gives up its guarantee, and sometimes a module's removal",
        (PatchDecl("p1", F),),
        (
            Part(Enter("a", "f", Sleep.UNINTERRUPTIBLE), "a sleeps in the old f and cannot be woken."),
            Part(Load("p1"), "The transition waits for a."),
            Part(Write("p1", "force", "1"), "a counts as patched now, with the old f still on its stack."),
            Part(Settle(), "The next retry ends the transition: a runs old code for as long as it sleeps."),
            Part(Leave("a"), "a leaves the old code at last."),
            Part(Enter("a", "f", Sleep.UNINTERRUPTIBLE), "Now it sleeps in the new f."),
            Part(Write("p1", "enabled", "0"), "Taking the patch back waits for a again."),
            Part(Write("p1", "force", "1"), "Forced again: a is still inside of the module's code."),
            Part(Settle(), "The patch is gone from sysfs."),
            Part(Unload("p1"), "But the module must never go: it is pinned until the next boot."),
        ),
    ),
    Demo(
        "shadow",
        "Shadow variables: new data for objects that exist",
        (PatchDecl("p1", F),),
        (
            Part(Load("p1"), "The new f keeps one more value per object; the structure cannot grow."),
            Part(
                ShadowStep(ShadowCall.GET, "sk1", 1),
                "sk1 was made by old code: it has no variable, and new code must cope with NULL.",
            ),
            Part(ShadowStep(ShadowCall.GET_OR_ALLOC, "sk1", 1, 7), "It gets one; the constructor stores 7."),
            Part(
                ShadowStep(ShadowCall.GET_OR_ALLOC, "sk1", 1, 9),
                "The one that is there comes back: 7.",
            ),
            Part(ShadowStep(ShadowCall.ALLOC, "sk1", 1, 9), "klp_shadow_alloc() makes no second one."),
            Part(ShadowStep(ShadowCall.ALLOC, "sk2", 1, 8, -22), "A constructor that fails leaves nothing."),
            Part(ShadowStep(ShadowCall.ALLOC, "sk2", 1, 8), "Another object has its own."),
            Part(ShadowStep(ShadowCall.FREE, "sk1", 1), "When sk1 is freed, so must be its variable."),
            Part(ShadowStep(ShadowCall.FREE_ALL, "", 1), "Before the patch goes, all of the id go."),
            Part(Write("p1", "enabled", "0"), "The kernel would not have freed them by itself."),
        ),
        tasks=(),
    ),
    Demo(
        "callbacks",
        "Which callbacks run, and when",
        (
            PatchDecl(
                "p1",
                (
                    ObjectDecl(None, (FuncDecl("f"),), ALL_CALLBACKS),
                    ObjectDecl("m", (FuncDecl("mf"),), ALL_CALLBACKS),
                ),
            ),
            PatchDecl("p2", (ObjectDecl(None, (FuncDecl("f"),), ALL_CALLBACKS, pre_patch_ret=-19),)),
        ),
        (
            Part(Load("p1"), "pre_patch before, post_patch after the transition; m is not there."),
            Part(Load("m"), "For a module that comes late both run before its init function."),
            Part(Unload("m"), "And both others when it goes."),
            Part(Load("p2"), "A pre_patch callback that fails ends the load; no other one runs."),
            Part(Enter("a", "f", wake=Wake.STAY), "a sleeps in p1's f."),
            Part(Write("p1", "enabled", "0"), "pre_unpatch runs; then the transition waits for a."),
            Part(Write("p1", "enabled", "1"), "Reversed: a's state is what it should be."),
            Part(Settle(), "post_patch runs once more, and no pre_patch: the author must expect that."),
        ),
        modules=(ModuleDecl("m", ("mf",)),),
    ),
)
BY_NAME = {demo.name: demo for demo in DEMOS}


def describe(step: Step) -> str:
    """A step as one would type or say it."""
    match step:
        case Load(module):
            return f"insmod {module}"
        case Unload(module):
            return f"rmmod {module}"
        case Write(patch, attribute, value):
            return f"echo {value} > {patch}/{attribute}"
        case Call(task, function):
            return f"{task} calls {function}"
        case Enter(task, function):
            return f"{task} sleeps in {function}"
        case Leave(task):
            return f"{task} wakes up and leaves"
        case Wait(seconds):
            return f"{seconds:g} seconds pass"
        case Settle():
            return "time passes"
        case ShadowStep(call, obj, id_):
            return f"{call.value} ({', '.join(part for part in (obj, str(id_)) if part)})"


def outcome(demo: Demo, step: Step, result: Result) -> str:
    """A result in words: '' where success says it all."""
    patched = any(result == patch.name for patch in demo.patches)
    if isinstance(result, int):
        if isinstance(step, ShadowStep):
            return f"{result} freed"
        return "" if not result else f"error: {os.strerror(-result)}"
    match step:
        case Call() | Enter():
            return f"runs {f'the code of {result}' if patched else 'the original'}"
        case Leave():
            return f"was in {f'the code of {result}' if patched else 'the original'}"
        case _:
            return result


class Note(Protocol):
    """Records a moment."""

    def __call__(self, what: str, words: str = "", result: str = "") -> None: ...


def play(demo: Demo, line: Line = LINE_6_1) -> Timeline:
    """Run a demo; while time passes, every change that the kernel makes by itself is a moment of its own."""
    machine = Machine(demo.scenario, line)
    moments: list[Moment] = []
    logged = 0

    def note(what: str, words: str = "", result: str = "") -> None:
        nonlocal logged
        k = machine.k
        log = tuple(message.text for message in k.log[logged:])
        logged = len(k.log)
        shadows = tuple(
            sorted((machine.object_name(row.obj), row.id, str(row.data)) for row in klp_shadows(k))
        )
        moments.append(Moment(k.jiffies / HZ, what, words, result, view(k), log, shadows))

    note("at rest")
    for part in demo.parts:
        match part.step:
            case Wait() | Settle():
                _pass(machine, part, moments, note)
            case step:
                result = machine.execute(step)
                note(describe(step), part.words, outcome(demo, step, result))
    return Timeline(demo, line, tuple(moments))


def _pass(machine: Machine, part: Part, moments: list[Moment], note: Note) -> None:
    """Let time pass in slices from one work of the kernel to the next."""
    k = machine.k
    step = part.step
    limit = step.seconds if isinstance(step, Wait) else step.limit if isinstance(step, Settle) else 0
    end = k.jiffies + round(limit * HZ)
    before = len(moments)
    words = part.words
    while k.jiffies < end:
        if isinstance(step, Settle) and k.klp_transition_patch is None:
            break
        due = min([work.due for work in k.works if work.due > k.jiffies], default=end)
        lines = len(k.log)
        machine.execute(Wait((min(due, end) - k.jiffies) / HZ))
        if view(k) != moments[-1].state or len(k.log) != lines:
            said = k.log[-1].text.rpartition(": ")[2] if len(k.log) != lines else ""
            note("time passes", words, said)
            words = ""
    if len(moments) == before:
        note(describe(step), words)
