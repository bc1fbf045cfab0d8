"""Random livepatch scenarios, run on the model and in a guest on the real kernel, and compared.

All modules are kmend's (``kmend module``): two ordinary ones with the functions to be patched, and a
livepatch for each declaration that a scenario draws, its descriptors made from a ``kmend.toml``.
After each step both sides wait until no transition is going on, or only tasks that the scenario has put to
sleep hold it up; what is compared does not depend on how fast the guest is.
"""

from __future__ import annotations

import hashlib
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kmend.core.config import Config
from kmend.core.progress import Silent
from kmend.core.report import Outcome
from kmend.core.target import Target
from kmend.handmade import ModuleRequest, build_module
from kmend.klp import sysfs
from kmend.klp.line import Line
from kmend.klp.outcome import view
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
    Scenario,
    Step,
    TaskDecl,
    Unload,
    Wait,
    Write,
)
from kmend.klp.sched import advance, seconds
from kmend.klp.structs import Function, Handler, Kernel, Ops, Sleep, Task, Wake
from kmend.lab.guest import Guest

SOURCES = Path(__file__).parent / "klp"
FUNCTIONS = {
    None: ("cmdline_proc_show", "version_proc_show"),
    "kd_base": ("kd_f", "kd_g"),
    "kd_late": ("kd_m", "kd_n"),
}
#: What the replacements use of a module that nothing exports: livepatch symbols.
SYMBOLS = {"kd_base": ("kd_sleep",), "kd_late": ("kd_late_mark",)}
#: The modules that every scenario has.
MODULES = tuple(ModuleDecl(name, FUNCTIONS[name], SYMBOLS[name]) for name in SYMBOLS)
FILES = {"cmdline_proc_show": "/proc/cmdline", "version_proc_show": "/proc/version"}
PATCHES = ("p1", "p2", "p3")
#: How many different declarations there are of each, so that a long run does not build a module per scenario.
POOL = 24
#: Each function keeps code of its own, and stays on the stack of what it calls.
CFLAGS = ("-fno-ipa-icf", "-fno-optimize-sibling-calls")
TASKS = ("a", "b", "c")
#: What insmod, rmmod and the shell print for an errno.
ERRORS = {
    "nonexistent directory": -2,
    "No such file or directory": -2,
    "Resource temporarily unavailable": -11,
    "Device or resource busy": -16,
    "File exists": -17,
    "Invalid module format": -8,
    "No such device": -19,
    "Invalid parameters": -22,
    "Invalid argument": -22,
}
#: Lines of the log that both sides have; the others are the module loader's.
OURS = re.compile(r"^(livepatch|p[123]): ")
NOT_OURS = re.compile("taint|verification|out-of-tree")

STEPS, PREPARE, REPORT = ((SOURCES / f"{name}.sh").read_text() for name in ("steps", "prepare", "report"))


@dataclass(frozen=True, slots=True)
class Observed:
    """What one side did: a result per step, log, sysfs paths with values, func stacks, modules."""

    results: tuple[str, ...]
    log: tuple[str, ...]
    sysfs: tuple[str, ...]
    stacks: tuple[str, ...]
    modules: tuple[str, ...]

    def differences(self, other: Observed) -> list[str]:
        """The fields in which the two differ, each with both values."""
        return [
            f"{name}:\n    model  {getattr(self, name)}\n    kernel {getattr(other, name)}"
            for name in ("results", "log", "sysfs", "stacks", "modules")
            if getattr(self, name) != getattr(other, name)
        ]


class Modules:
    """The modules of a kernel, each built by kmend when it is first asked for."""

    def __init__(self, target: Target, config: Config, folder: Path) -> None:
        self.target, self.config, self.folder = target, config, folder
        self.made: dict[str, Path] = {}

    def ground(self, name: str) -> Path:
        """``kd_base`` or ``kd_late``, an ordinary module."""
        if name not in self.made:
            words = ", ".join(f'"{flag}"' for flag in (*CFLAGS, "-iquote", "kernel/livepatch"))
            self.made[name] = self._build(name, name, f"{name}.c", f"cflags = [{words}]\n")
        return self.made[name]

    def patch(self, decl: PatchDecl) -> Path:
        """The livepatch of a declaration."""
        text = descriptor(decl, {name: self.ground(name) for name in SYMBOLS})
        key = f"{decl.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if key not in self.made:
            self.made[key] = self._build(key, decl.name, "kd_patch.c", text)
        return self.made[key]

    def _build(self, key: str, name: str, source: str, text: str) -> Path:
        folder = self.folder / key
        folder.mkdir(parents=True)
        for file in ("kd.h", source):
            shutil.copy(SOURCES / file, folder / file)
        (folder / "kmend.toml").write_text(text)
        request = ModuleRequest(folder, self.target.release, folder / "out", name)
        report = build_module(request, self.config, Silent())
        assert report.result is Outcome.BUILT, (text, report.refused)
        return Path(report.module or "")


def descriptor(decl: PatchDecl, files: dict[str, Path]) -> str:
    """The ``kmend.toml`` of a declaration; ``files`` are the modules that are not the kernel's own."""
    cflags = [*CFLAGS, *(f"-DWITH_{obj.name.upper()}" for obj in decl.objs if obj.name)]
    if any(obj.callbacks for obj in decl.objs):
        returns = {obj.name or "vmlinux": obj.pre_patch_ret for obj in decl.objs}
        cflags += [f"-DRET_{name.upper()}={returns.get(name, 0)}" for name in ("vmlinux", *SYMBOLS)]
    words = ", ".join(f'"{flag}"' for flag in cflags)
    lines = [f'name = "{decl.name}"', f"replace = {str(decl.replace).lower()}", f"cflags = [{words}]"]
    for obj in decl.objs:
        name = obj.name or "vmlinux"
        lines += ["[[object]]", f'name = "{name}"']
        if obj.name:
            lines.append(f'file = "{files[obj.name]}"')
        if obj.callbacks:
            called = ", ".join(f'{kind.value} = "{name}_{kind.value}"' for kind in obj.callbacks)
            lines.append(f"callbacks = {{ {called} }}")
        lines += [f'[[object.func]]\nold_name = "{func.old_name}"' for func in obj.funcs]
    lines += [f"[[state]]\nid = {id_}\nversion = {version}" for id_, version in decl.states]
    return "\n".join(lines) + "\n"


def random_patch(name: str, number: int) -> PatchDecl:
    """A declaration of the pool: functions of up to three objects, callbacks, states, replace or not."""
    rng = random.Random(f"{name} {number}")
    objs = []
    for module, functions in FUNCTIONS.items():
        chosen = rng.sample(functions, rng.choice((0, 1, 1, 2)))
        fails = -19 if rng.random() < 0.06 else 0
        if chosen:
            objs.append((module, tuple(FuncDecl(function) for function in sorted(chosen)), fails))
    if not objs:
        objs = [("kd_base", (FuncDecl("kd_f"),), 0)]
    callbacks = ALL_CALLBACKS if rng.random() < 0.6 else ()
    states = ((1, rng.randint(1, 2)),) if rng.random() < 0.25 else ()
    decls = tuple(
        ObjectDecl(module, funcs, callbacks, fails if callbacks else 0, SYMBOLS.get(module or "", ()))
        for module, funcs, fails in objs
    )
    return PatchDecl(name, decls, rng.random() < 0.35, states)


def random_scenario(seed: int) -> Scenario:
    """The scenario of a seed: three patches of the pool and 6 to 11 steps."""
    rng = random.Random(seed)
    return Scenario(
        f"seed {seed}",
        FUNCTIONS[None],
        tuple(random_patch(name, rng.randrange(POOL)) for name in PATCHES),
        tuple(_steps(rng)),
        MODULES,
        tuple(TaskDecl(name) for name in TASKS),
    )


def _steps(rng: random.Random) -> list[Step]:
    """Random steps that a real machine can take: nobody removes a module that a task is in.

    Mostly steps that make sense (a patch that is loaded is disabled), some that do not.
    """
    steps: list[Step] = []
    inside: dict[str, str] = {}
    loaded: list[str] = []
    late = False
    while len(steps) < 11:
        there = [name for name in PATCHES if name in loaded] if rng.random() < 0.93 else list(PATCHES)
        absent = [name for name in PATCHES if name not in loaded] if rng.random() < 0.93 else list(PATCHES)
        awake = [task for task in TASKS if task not in inside]
        known = [FUNCTIONS[None], FUNCTIONS["kd_base"]] + [FUNCTIONS["kd_late"]] * (
            late or rng.random() < 0.05
        )
        match rng.choices(range(8), (26, 20, 9, 8, 16, 16, 9, 4))[0]:
            case 0 if absent:
                chosen = rng.choice(absent)
                steps.append(Load(chosen))
                loaded.append(chosen)
            case 1 if there:
                steps.append(Write(rng.choice(there), "enabled", rng.choice("00001")))
            case 2 if not any(function in FUNCTIONS["kd_late"] for function in inside.values()):
                late = not late
                steps.append(Load("kd_late") if late else Unload("kd_late"))
            case 3 if there:
                name = rng.choice(there)
                steps.append(Unload(name))
                if any(isinstance(step, Write) and step.patch == name for step in steps) and name in loaded:
                    loaded.remove(name)
            case 4 if awake:
                steps.append(Call(rng.choice(awake), rng.choice(rng.choice(known))))
            case 5 if awake:
                task, function = rng.choice(awake), rng.choice(rng.choice(known[1:]))
                inside[task] = function
                deep = rng.random() < 0.5
                sleep = Sleep.UNINTERRUPTIBLE if deep else Sleep.INTERRUPTIBLE
                steps.append(Enter(task, function, sleep, Wake.STAY if deep else Wake.RESTART))
            case 6 if inside:
                task = rng.choice(sorted(inside))
                steps.append(Leave(task))
                del inside[task]
            case 7 if there and inside:
                steps.append(Write(rng.choice(there), "force", "1"))
    return steps


def quiesce(machine: Machine, *, hold: bool) -> None:
    """Until no transition is going on, or the only tasks behind are asleep in a function of the scenario.

    ``hold``: only after a retry, because a transition that is reversed looks at no stack at once.
    """
    k = machine.k
    for _ in range(10):
        if k.klp_transition_patch is None:
            break
        behind = [task for task in k.tasks if task.patch_state != k.klp_target_state]
        if behind and all(task.stack for task in behind):
            if not hold:
                break
            hold = False
            advance(k, seconds(2.5))
            continue
        advance(k, seconds(1.2))
    advance(k, 0)


def on_model(scenario: Scenario, line: Line, handler: Handler | None = None) -> Observed:
    """Run a scenario on the model (with another handler, to show that a wrong one is found)."""
    machine = Machine(scenario, line)
    machine.k.handler = handler
    machine.execute(Load("kd_base"))
    results = []
    for step in scenario.steps:
        results.append(str(machine.execute(step)))
        turned = isinstance(step, Write) and step.attribute == "enabled" and results[-1] == "0"
        quiesce(machine, hold=turned)
    k = machine.k
    assert k.warned == [], k.warned
    shown = [f"{sysfs.ROOT}"]
    for path, entry in sysfs.view(k).items():
        value = "" if entry.rights.startswith("d") else f" {entry.value or '-'}"
        shown.append(f"{sysfs.ROOT}/{path}{value}")
    final = view(k)
    stacks = []
    for stack in final.stacks:
        funcs = [f"{func.patch}:{func.nop:d}:{func.transition:d}" for func in stack.funcs]
        stacks.append(" ".join([stack.function, *funcs]))
    modules = [f"{m.name} {m.refcnt}" for m in final.modules if m.name != "kd_base"]
    return Observed(
        tuple(results),
        tuple(text for text in (message.text for message in k.log) if OURS.match(text)),
        tuple(sorted(shown)),
        tuple(sorted(stacks)),
        tuple(sorted(modules)),
    )


def ignore_transition(_k: Kernel, ops: Ops, _current: Task) -> Function | None:
    """A wrong handler, which the runs have to tell from the kernel's: the top func for every task."""
    func = ops.func_stack[0]
    return None if func.nop else func.new_func


def command(step: Step, files: dict[str, str]) -> str:
    """A step as the guest's shell takes it; ``files`` are the modules' places there."""
    match step:
        case Load(name):
            return f"load {files[name]}"
        case Unload(name):
            return f"unload {name}"
        case Write(patch, attribute, value):
            return f"put {patch}/{attribute} {value}"
        case Call(_, function):
            return f"callf {FILES.get(function, f'/proc/kd/{function}.0')}"
        case Enter(task, function, sleep):
            slot = TASKS.index(task)
            how = 1 + 2 * slot + (sleep is Sleep.UNINTERRUPTIBLE)
            return f"enter {slot} /proc/kd/{function}.{how}"
        case Leave(task):
            return f"leave {TASKS.index(task)}"
        case Wait(count):
            return f"sleep {count}; echo 'R 0'"
        case _:
            raise NotImplementedError(step)


class Ground:
    """A guest that is ready for scenarios; a fresh one when a scenario leaves something behind."""

    def __init__(self, target: Target, lab: Path, modules: Modules) -> None:
        self.target, self.lab, self.modules = target, lab, modules
        self.guest: Guest | None = None
        self.there: set[str] = set()
        self.starts = self.runs = 0

    def __enter__(self) -> Ground:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    def drop(self) -> None:
        """Let the present guest go."""
        if self.guest is not None:
            self.guest.close()
            self.guest = None

    def ready(self) -> Guest:
        """The guest, started when there is none."""
        if self.guest is None:
            guest = Guest.of(self.target, self.lab)
            guest.__enter__()
            self.guest = guest
            self.starts += 1
            self.there.clear()
            for name in SYMBOLS:
                guest.put(f"/root/{name}.ko", self.modules.ground(name).read_bytes())
            guest.run(PREPARE, check=True, timeout=60)
        return self.guest

    def _files(self, guest: Guest, scenario: Scenario) -> dict[str, str]:
        """Bring the scenario's modules into the guest."""
        files = {name: f"/root/{name}.ko" for name in SYMBOLS}
        for decl in scenario.patches:
            path = self.modules.patch(decl)
            files[decl.name] = f"/root/{path.parent.parent.name}.ko"
            if files[decl.name] not in self.there:
                guest.put(files[decl.name], path.read_bytes())
                self.there.add(files[decl.name])
        return files

    def run(self, scenario: Scenario) -> Observed:
        """Run a scenario on the real kernel.

        Raises:
            KernelOops, LostGuest: the kernel did not survive it.
        """
        guest = self.ready()
        files = self._files(guest, scenario)
        self.runs += 1
        first, last = f"kd: begin {self.runs}", f"kd: end {self.runs}"
        steps = "\n".join(f"{command(step, files)}\nquiesce\nhold=" for step in scenario.steps)
        script = f"echo '{first}' >/dev/kmsg\n{STEPS}\n{steps}\necho '{last}' >/dev/kmsg\n{REPORT}"
        done = guest.run(script, timeout=300)
        lines = done.text.splitlines()
        log = between([message.text for message in guest.dmesg()], first, last)
        if "DIRTY" in lines:
            self.drop()
        results = [errno(line[2:]) for line in lines if line.startswith("R ")]
        return Observed(
            tuple(results),
            tuple(text for text in log if OURS.match(text) and not NOT_OURS.search(text)),
            tuple(sorted(between(lines, "SYSFS", "STACKS"))),
            tuple(sorted(between(lines, "STACKS", "MODULES"))),
            tuple(sorted(between(lines, "MODULES", "END"))),
        )


def between(lines: Sequence[str], first: str, last: str) -> Sequence[str]:
    """The lines after one and before another."""
    return lines[lines.index(first) + 1 : lines.index(last)]


def errno(text: str) -> str:
    """A result as the model writes it."""
    for words, number in ERRORS.items():
        if words in text:
            return str(number)
    return "vmlinux" if text.startswith(("BOOT_IMAGE", "console=", "Linux")) else text


def smaller(scenario: Scenario) -> list[Scenario]:
    """Scenarios with one step less."""
    return [
        replace(scenario, steps=scenario.steps[:i] + scenario.steps[i + 1 :])
        for i in range(len(scenario.steps))
    ]


def shrink(ground: Ground, scenario: Scenario, line: Line) -> tuple[Scenario, list[str]]:
    """The smallest scenario found that still differs, and in what."""
    found = on_model(scenario, line).differences(ground.run(scenario))
    going = True
    while going:
        going = False
        for less in smaller(scenario):
            different = on_model(less, line).differences(ground.run(less))
            if different:
                scenario, found, going = less, different, True
                break
    return scenario, found
