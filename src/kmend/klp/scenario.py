"""Scenarios as values: what is loaded, what tasks do, in which order.

:func:`run` executes a scenario on the model. Nothing in a :class:`Scenario` or an :class:`Outcome` is
particular to the model, so that a guest can execute the same value with modules built from its declarations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import assert_never

from kmend.core.errors import UsageError
from kmend.klp import sysfs
from kmend.klp.core import klp_enable_patch
from kmend.klp.line import LINE_6_1, Feature, Line
from kmend.klp.module import delete_module, load_module
from kmend.klp.outcome import StateView, view
from kmend.klp.sched import (
    advance,
    block,
    call,
    exit_to_user_mode,
    fork,
    new_kernel_tasks,
    resume,
    ret,
    seconds,
)
from kmend.klp.shadow import (
    klp_shadow_alloc,
    klp_shadow_free,
    klp_shadow_free_all,
    klp_shadow_get,
    klp_shadow_get_or_alloc,
)
from kmend.klp.structs import (
    DEBUG_FUNCTIONS,
    EBUSY,
    ENOENT,
    Callbacks,
    Func,
    Function,
    Kernel,
    Kind,
    Level,
    Module,
    ModuleState,
    Object,
    Patch,
    Shadow,
    Sleep,
    State,
    Task,
    Wake,
)


class CallbackKind(Enum):
    """The four callbacks of an object."""

    PRE_PATCH = "pre_patch"
    POST_PATCH = "post_patch"
    PRE_UNPATCH = "pre_unpatch"
    POST_UNPATCH = "post_unpatch"


ALL_CALLBACKS = tuple(CallbackKind)
#: Where the objects of a scenario lie that get shadow variables: somewhere in the direct map.
OBJECTS = 0xFFFF888004000000


@dataclass(frozen=True, slots=True)
class FuncDecl:
    """A function that a patch replaces; the replacement tells callers the patch's name."""

    old_name: str
    old_sympos: int = 0


@dataclass(frozen=True, slots=True)
class ObjectDecl:
    """A patch's object. ``callbacks`` print a line each; pre_patch returns ``pre_patch_ret``.

    ``symbols`` are what the replacements use of the object through livepatch symbols.
    """

    name: str | None
    funcs: tuple[FuncDecl, ...] = ()
    callbacks: tuple[CallbackKind, ...] = ()
    pre_patch_ret: int = 0
    symbols: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PatchDecl:
    """A livepatch module; ``states`` are (id, version)."""

    name: str
    objs: tuple[ObjectDecl, ...]
    replace: bool = False
    states: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ModuleDecl:
    """An ordinary module with functions that patches may replace, and symbols that they may use."""

    name: str
    functions: tuple[str, ...] = ()
    symbols: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskDecl:
    """A task of the scenario, in user space (a kernel thread: in its loop) at the beginning."""

    name: str
    kind: Kind = Kind.USER


@dataclass(frozen=True, slots=True)
class Load:
    """``insmod``: a patch or an ordinary module by name. Result: 0 or a negative errno."""

    module: str


@dataclass(frozen=True, slots=True)
class Unload:
    """``rmmod``. Result: 0 or a negative errno."""

    module: str


@dataclass(frozen=True, slots=True)
class Write:
    """``echo VALUE > /sys/kernel/livepatch/PATCH/ATTRIBUTE``. Result: 0 or a negative errno."""

    patch: str
    attribute: str
    value: str


@dataclass(frozen=True, slots=True)
class Call:
    """A task makes a system call that calls the function once. Result: whose code ran."""

    task: str
    function: str


@dataclass(frozen=True, slots=True)
class Enter:
    """A task calls the function and falls asleep inside. Result: whose code it is in."""

    task: str
    function: str
    sleep: Sleep = Sleep.INTERRUPTIBLE
    wake: Wake = Wake.RESTART


@dataclass(frozen=True, slots=True)
class Leave:
    """What the task waits for happens: it returns to user space. Result: whose code it was in."""

    task: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Let so many seconds pass."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Settle:
    """Wait until no transition is going on. Result: ``done``, or ``stuck`` after so many seconds."""

    limit: float = 60.0


class ShadowCall(Enum):
    """The functions of the shadow variable API."""

    GET = "klp_shadow_get"
    ALLOC = "klp_shadow_alloc"
    GET_OR_ALLOC = "klp_shadow_get_or_alloc"
    FREE = "klp_shadow_free"
    FREE_ALL = "klp_shadow_free_all"


@dataclass(frozen=True, slots=True)
class ShadowStep:
    """Patched code uses a shadow variable of the object (by a name of the scenario's choice).

    ``value`` is what a constructor stores; it fails with ``ctor_ret``. Result: the variable's value, or
    ``NULL``; of the two that free, how many destructors ran.
    """

    call: ShadowCall
    obj: str
    id: int
    value: int = 0
    ctor_ret: int = 0


Step = Load | Unload | Write | Call | Enter | Leave | Wait | Settle | ShadowStep
#: An errno (0 or negative), or a word.
Result = int | str


@dataclass(frozen=True, slots=True)
class Scenario:
    """A scenario. ``functions`` are those of vmlinux that calls and patches name."""

    name: str
    functions: tuple[str, ...]
    patches: tuple[PatchDecl, ...]
    steps: tuple[Step, ...]
    modules: tuple[ModuleDecl, ...] = ()
    tasks: tuple[TaskDecl, ...] = ()
    cpus: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it: a result per step, the log, the state at the end."""

    results: tuple[Result, ...]
    log: tuple[str, ...]
    final: StateView
    warned: tuple[str, ...] = ()


Observer = Callable[[Kernel, "Step | None", "Result | None"], None]


@dataclass(slots=True)
class Machine:
    """A scenario's kernel while it runs: one :meth:`execute` per step."""

    scenario: Scenario
    line: Line = LINE_6_1
    debug: frozenset[str] = DEBUG_FUNCTIONS - {"klp_try_switch_task"}
    k: Kernel = field(init=False)
    _tasks: dict[str, Task] = field(init=False, default_factory=dict)
    _objects: dict[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.k = Kernel(self.line, debug=self.debug)
        self.k.kallsyms[None] = [self.k.text(name, None) for name in self.scenario.functions]
        new_kernel_tasks(self.k, self.scenario.cpus)
        for pid, decl in enumerate(self.scenario.tasks, start=100):
            self._tasks[decl.name] = fork(self.k, None, pid, decl.name, decl.kind)

    def execute(self, step: Step) -> Result:
        """One step; errors of the kernel are results.

        Raises:
            UsageError: the step names a task, patch, module or function that the scenario does not declare,
                or asks a task for what it cannot do now (enter while it sleeps, leave while it does not).
        """
        result = self.perform(step)
        advance(self.k, 0)
        return result

    def perform(self, step: Step) -> Result:
        """:meth:`execute` without letting the works run that the step has scheduled."""
        k = self.k
        match step:
            case Load(name):
                return load_module(k, self.module(name))
            case Unload(name):
                return delete_module(k, name)
            case Write(patch, attribute, value):
                return sysfs.write(k, f"{patch}/{attribute}", value)
            case Call(name, function):
                return self._call(self.task(name), function)
            case Enter(name, function, sleep, wake):
                return self._enter(self.task(name), function, sleep, wake)
            case Leave(name):
                return self._leave(self.task(name))
            case Wait(count):
                advance(k, seconds(count))
                return 0
            case Settle(limit):
                done = advance(k, seconds(limit), lambda: k.klp_transition_patch is None)
                return "done" if done else "stuck"
            case ShadowStep():
                return self._shadow(step)
            case _ as unreachable:
                assert_never(unreachable)

    def _shadow(self, step: ShadowStep) -> Result:
        """A call of the shadow variable API."""
        k = self.k
        obj = self._objects.setdefault(step.obj, OBJECTS + 0x40 * len(self._objects))
        freed: list[Shadow] = []

        def ctor(_obj: int, shadow: Shadow, data: object) -> int:
            shadow.data = data
            return step.ctor_ret

        def dtor(_obj: int, shadow: Shadow) -> None:
            freed.append(shadow)

        found: Shadow | None = None
        match step.call:
            case ShadowCall.GET:
                found = klp_shadow_get(k, obj, step.id)
            case ShadowCall.ALLOC:
                found = klp_shadow_alloc(k, obj, step.id, 8, ctor, step.value)
            case ShadowCall.GET_OR_ALLOC:
                found = klp_shadow_get_or_alloc(k, obj, step.id, 8, ctor, step.value)
            case ShadowCall.FREE:
                klp_shadow_free(k, obj, step.id, dtor)
                return len(freed)
            case ShadowCall.FREE_ALL:
                klp_shadow_free_all(k, step.id, dtor)
                return len(freed)
        return str(found.data) if found else "NULL"

    def object_name(self, obj: int) -> str:
        """The scenario's name of an object with shadow variables."""
        return next(name for name, address in self._objects.items() if address == obj)

    def task(self, name: str) -> Task:
        """The task of that name."""
        if name not in self._tasks:
            raise _undeclared("task", name)
        return self._tasks[name]

    def function(self, name: str) -> Function | None:
        """The function of that name in vmlinux or a loaded module; None while its module is not loaded."""
        for symbols in self.k.kallsyms.values():
            for symbol in symbols:
                if symbol.name == name and not self._is_patch(symbol.module):
                    return symbol
        if not any(name in decl.functions for decl in self.scenario.modules):
            raise _undeclared("function", name)
        return None

    def _is_patch(self, module: str | None) -> bool:
        return any(decl.name == module for decl in self.scenario.patches)

    def _call(self, task: Task, name: str) -> Result:
        function = self.function(name)
        if function is None:
            return -ENOENT
        if task.stack:
            return -EBUSY
        code = call(self.k, task, function)
        ret(task)
        if task.kind is Kind.USER:
            exit_to_user_mode(self.k, task)
        return code.version

    def _enter(self, task: Task, name: str, sleep: Sleep, wake: Wake) -> Result:
        function = self.function(name)
        if function is None:
            return -ENOENT
        if task.stack:
            return -EBUSY
        code = call(self.k, task, function)
        block(task, sleep, wake)
        return code.version

    def _leave(self, task: Task) -> Result:
        if not task.stack:
            return -ENOENT
        version = task.stack[-1].code.version
        task.stack.clear()
        resume(task)
        if task.kind is Kind.USER:
            exit_to_user_mode(self.k, task)
        return version

    def module(self, name: str) -> Module:
        """A fresh module of that name, as it comes from its file."""
        for patch in self.scenario.patches:
            if patch.name == name:
                return patch_module(self.k, patch)
        for decl in self.scenario.modules:
            if decl.name == name:
                names = (*decl.functions, *decl.symbols)
                symbols = tuple(self.k.text(symbol, name) for symbol in names)
                return Module(name, symbols, exit=_nothing)
        raise _undeclared("module", name)


def _undeclared(kind: str, name: str) -> UsageError:
    return UsageError(
        f"the scenario has no {kind} {name}",
        next_step=f"declare the {kind}, or mend the step that names it",
        rule="klp-scenario",
    )


def _nothing(_k: Kernel, _mod: Module) -> None:
    """An exit function with nothing to do."""


def patch_module(k: Kernel, decl: PatchDecl) -> Module:
    """The livepatch module of a declaration; its init function calls ``klp_enable_patch()``.

    It is one of kmend's: for a kernel that does not clear what it has relocated for a module that goes, a
    post-unpatch callback does (``kmend_forget()`` in ``src/kmend/module/glue.c``).
    """
    symbols: list[Function] = []
    forgets = not k.line.has(Feature.CLEAR_RELOCS) and any(obj.symbols for obj in decl.objs)
    objs = []
    for obj in decl.objs:
        funcs = []
        for func in obj.funcs:
            code = k.text(f"new_{func.old_name}", decl.name)
            symbols.append(code)
            funcs.append(Func(func.old_name, code, func.old_sympos))
        relocs = tuple((obj.name or "vmlinux", name, 0) for name in obj.symbols)
        callbacks = _callbacks(decl.name, obj)
        if forgets and obj.name is not None:
            callbacks.post_unpatch = _forget(callbacks.post_unpatch)
        objs.append(Object(obj.name, funcs, callbacks, relocs))
    mod = Module(decl.name, tuple(symbols), livepatch=True, exit=_nothing)
    states = tuple(State(id_, version) for id_, version in decl.states)
    patch = Patch(mod, objs, decl.replace, states)
    mod.init = lambda kernel, _mod: klp_enable_patch(kernel, patch)
    return mod


def _forget(then: Callable[[Kernel, Object], None] | None) -> Callable[[Kernel, Object], None]:
    """``kmend_forget()``: the author's callback, and zeros in place of what was relocated for the module."""

    def callback(k: Kernel, obj: Object) -> None:
        if then is not None:
            then(k, obj)
        if obj.mod is not None and obj.mod.state is not ModuleState.LIVE:
            obj.relocs_written = False

    return callback


def _callbacks(patch: str, decl: ObjectDecl) -> Callbacks:
    """Callbacks that say who they are, each in one line."""
    where = decl.name or "vmlinux"

    def said(kind: CallbackKind) -> Callable[[Kernel, Object], None] | None:
        if kind not in decl.callbacks:
            return None

        def callback(k: Kernel, _obj: Object) -> None:
            k.printk(Level.INFO, f"{patch}: {kind.value}_callback: {where}")

        return callback

    def pre_patch(k: Kernel, obj: Object) -> int:
        if first is not None:
            first(k, obj)
        return decl.pre_patch_ret

    first = said(CallbackKind.PRE_PATCH)
    return Callbacks(
        pre_patch if first or decl.pre_patch_ret else None,
        said(CallbackKind.POST_PATCH),
        said(CallbackKind.PRE_UNPATCH),
        said(CallbackKind.POST_UNPATCH),
    )


def run(scenario: Scenario, line: Line = LINE_6_1, observe: Observer | None = None) -> Outcome:
    """Run a scenario on the model. ``observe`` is called at the beginning (with None) and after each step.

    Raises:
        UsageError: see :meth:`Machine.execute`.
        KernelHang: the scenario would hang the kernel.
    """
    machine = Machine(scenario, line)
    if observe:
        observe(machine.k, None, None)
    results = []
    for step in scenario.steps:
        results.append(machine.execute(step))
        if observe:
            observe(machine.k, step, results[-1])
    return Outcome(
        tuple(results),
        tuple(message.text for message in machine.k.log),
        view(machine.k),
        tuple(machine.k.warned),
    )
