"""A small exhaustive search: all interleavings of the livepatch core with tasks that run meanwhile.

The core's functions are executed as they are. At each place where another CPU could see an intermediate
state they call ``Kernel.point``; there the explorer lets any task take a step before the core goes on. Tasks
take the handler's reads one by one (as ``klp_ftrace_handler()`` does), and so ``klp_update_patch_state()``.
The two waits of the kernel (``klp_synchronize_transition()``, the end of ``unregister_ftrace_function()``)
hold the core up while a task is inside of one of them.

Each step is assumed to be seen by all CPUs in order: the kernel's memory barriers are taken for granted.

The search replays a schedule from the beginning for each new state, breadth first: the schedule of a
violation is a shortest one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum

from kmend.klp.core import run_works
from kmend.klp.line import LINE_6_1, Line
from kmend.klp.scenario import Machine, Scenario, Step
from kmend.klp.structs import (
    UNDEFINED,
    UNPATCHED,
    Frame,
    Func,
    Function,
    Ops,
    Sleep,
    Task,
    Wake,
    WorkKind,
)

#: What the handler makes of what it read: the top func, whether that one is in transition, the task's
#: state, and the func below (None: there is none). None: the original function runs.
Choose = Callable[[Func, bool, int, Func | None], Function | None]


def choose(func: Func, transition: bool, patch_state: int, below: Func | None) -> Function | None:
    """The decision of ``klp_ftrace_handler()`` from the values that it has read."""
    if transition and patch_state == UNPATCHED:
        if below is None:
            return None
        func = below
    return None if func.nop else func.new_func


class Act(Enum):
    """The steps of a task's program; CALL names a function."""

    CALL = "calls"
    SLEEP = "falls asleep"
    RETURN = "returns"
    EXIT = "leaves the kernel"


@dataclass(frozen=True, slots=True)
class Move:
    """A step of a program."""

    act: Act
    function: str = ""


def nested(outer: str, inner: str) -> tuple[Move, ...]:
    """A system call: ``outer`` sleeps, then calls ``inner``."""
    return (
        Move(Act.CALL, outer),
        Move(Act.SLEEP),
        Move(Act.CALL, inner),
        Move(Act.RETURN),
        Move(Act.RETURN),
        Move(Act.EXIT),
    )


def in_turn(first: str, second: str, *, sleep_between: bool) -> tuple[Move, ...]:
    """A system call that calls two functions one after the other, and may sleep between the two."""
    between = (Move(Act.SLEEP),) if sleep_between else ()
    return (
        Move(Act.CALL, first),
        Move(Act.RETURN),
        *between,
        Move(Act.CALL, second),
        Move(Act.RETURN),
        Move(Act.EXIT),
    )


@dataclass(frozen=True, slots=True)
class Universe:
    """What the explorer holds a task to: which versions of functions belong together.

    ``allowed`` has an entry per state of the machine that is whole: function to version (``vmlinux`` or the
    name of a patch).
    """

    allowed: tuple[tuple[tuple[str, str], ...], ...]

    def holds(self, versions: dict[str, str]) -> bool:
        """Whether there is one state of the machine in which all these versions occur."""
        wanted = versions.items()
        return any(all(row in state for row in wanted) for state in self.allowed)


@dataclass(frozen=True, slots=True)
class Setup:
    """What is explored.

    ``control`` are the administrator's steps, each tried once and in order, while works run at any moment in
    between. ``programs`` is one system call per task, which the task repeats for ever. ``per_call``: versions
    are compared over a whole system call, not only over the functions that are on the stack together.
    ``waits``: False leaves the core's waits for other CPUs out (to show that they are needed).
    """

    scenario: Scenario
    control: tuple[Step, ...]
    programs: tuple[tuple[Move, ...], ...]
    universe: Universe
    line: Line = LINE_6_1
    choose: Choose = choose
    per_call: bool = False
    waits: bool = True


@dataclass(frozen=True, slots=True)
class Violation:
    """What went wrong and the steps that lead there."""

    what: str
    schedule: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a search. ``complete``: all states were visited."""

    states: int
    steps: int
    complete: bool
    violations: tuple[Violation, ...]


@dataclass(slots=True)
class Runner:
    """A task between two steps: where in its program it is, and what the handler has read so far."""

    task: Task
    program: tuple[Move, ...]
    cpu: int
    at: int = 0
    read: tuple[object, ...] = ()
    seen: dict[str, str] = field(default_factory=dict)

    @property
    def critical(self) -> bool:
        """Inside of the handler or of ``klp_update_patch_state()``, with preemption disabled."""
        return bool(self.read)


class _Seen(Exception):
    """This state has been visited before."""


class _Wrong(Exception):
    """An invariant does not hold."""


@dataclass(slots=True)
class _Run:
    """One execution along a schedule: the choices already made, then new ones."""

    setup: Setup
    prefix: tuple[int, ...]
    visited: set[object]
    record: bool = False
    machine: Machine = field(init=False)
    runners: list[Runner] = field(init=False)
    functions: dict[str, Function] = field(init=False)
    taken: int = 0
    step: int = 0
    points: int = 0
    label: str = ""
    trail: list[str] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        setup = self.setup
        self.machine = Machine(setup.scenario, setup.line, debug=frozenset())
        k = self.machine.k
        k.idle.clear()
        k.point = self.point
        self.functions = {f.name: f for f in k.kallsyms[None]}
        self.runners = []
        for cpu, program in enumerate(setup.programs, start=1):
            task = Task(cpu, f"t{cpu}")
            k.tasks.append(task)
            self.runners.append(Runner(task, program, cpu))

    def execute(self) -> None:
        """Run to the end of the schedule and then on, until a state that is known.

        Raises:
            _Seen, _Wrong.
        """
        k = self.machine.k
        while True:
            works = sorted({work.kind.name for work in k.works})
            control = [*works, *(["step"] if self.step < len(self.setup.control) else [])]
            choice = self.decide(control)
            if choice is None:
                continue
            self.points = 0
            if choice == "step":
                step = self.setup.control[self.step]
                self.note(f"administrator: {step}")
                self.step += 1
                self.machine.perform(step)
            else:
                self.note(f"worker: {choice}")
                due = [work for work in k.works if work.kind.name == choice]
                rest = [work for work in k.works if work.kind.name != choice]
                k.jiffies = max(k.jiffies, *(work.due for work in due))
                k.works = due
                run_works(k)
                k.works = rest + k.works
            self.points = 0
            self.label = ""
            self.check()

    def note(self, text: str) -> None:
        """A line of the schedule, kept when this is the run that shows a violation."""
        if self.record:
            self.trail.append(text)

    def point(self, label: str) -> None:
        """The core is at a point that others may see: let tasks go first, as the schedule says."""
        self.points += 1
        self.label = label
        waits = label in ("klp_synchronize_transition", "unregister_ftrace_function")
        if waits and not self.setup.waits:
            return
        while True:
            held = waits and any(runner.critical for runner in self.runners)
            if self.decide([] if held else [label]) is not None:
                return

    def decide(self, control: list[str]) -> str | None:
        """Take the schedule's next choice: one of ``control``, or a task's step (then None)."""
        options = len(control) + len(self.runners)
        if self.taken < len(self.prefix):
            choice = self.prefix[self.taken]
        else:
            key = self.key()
            if key in self.visited:
                raise _Seen
            self.visited.add(key)
            self.branches.append(options)
            choice = 0
        self.taken += 1
        if choice < len(control):
            return control[choice]
        self.move(self.runners[choice - len(control)])
        self.check()
        return None

    def move(self, runner: Runner) -> None:
        """One step of a task."""
        task, move = runner.task, runner.program[runner.at]
        if not runner.at and not runner.read:
            runner.seen = {}
        # whatever a task does, it does on its CPU; it enters the kernel and wakes up with what it does next
        task.sleep, task.woken, task.cpu = Sleep.RUNNING, False, runner.cpu
        match move.act:
            case Act.SLEEP:
                task.sleep, task.wake, task.cpu = Sleep.INTERRUPTIBLE, Wake.STAY, None
            case Act.RETURN:
                task.stack.pop()
            case Act.CALL:
                if not self.call(runner, self.functions[move.function]):
                    return
                if self.setup.per_call:
                    runner.seen[move.function] = task.stack[-1].code.version
            case Act.EXIT:
                if not self.leave(runner):
                    return
        if self.record:
            self.note(f"{task.comm} {move.act.value} {move.function}".rstrip())
        runner.at = (runner.at + 1) % len(runner.program)

    def call(self, runner: Runner, function: Function) -> bool:
        """A read of the handler; True when it has decided and the task is in the function."""
        k, task = self.machine.k, runner.task
        match runner.read:
            case ():
                ops = k.klp_ops.get(function.addr)
                if ops is None:
                    task.stack.append(Frame(function, function))
                    return True
                func = ops.func_stack[0]
                runner.read = (ops, func, self.below(ops, func))
                if self.record:
                    self.note(f"{task.comm} in the handler of {function.name}: reads the func_stack")
                return False
            case (Ops(), Func() as func, _):
                runner.read = (*runner.read, func.transition)
                if self.record:
                    self.note(f"{task.comm} reads func->transition {func.transition:d}")
                return False
            case (Ops() as ops, Func() as func, (Func() | None) as below, bool() as transition):
                if transition and task.patch_state == UNDEFINED:
                    raise _Wrong("the handler sees a func in transition and a task without a state")
                if func in ops.func_stack:
                    below = self.below(ops, func)
                code = self.setup.choose(func, transition, int(task.patch_state), below) or function
                task.stack.append(Frame(function, code))
                runner.read = ()
                if self.record:
                    self.note(f"{task.comm} reads its state {int(task.patch_state)}: {code.version}")
                return True
            case _:
                raise AssertionError(f"reads that no step leaves behind: {runner.read}")

    @staticmethod
    def below(ops: Ops, func: Func) -> Func | None:
        """The next func on the stack."""
        at = ops.func_stack.index(func) + 1
        return ops.func_stack[at] if at < len(ops.func_stack) else None

    def leave(self, runner: Runner) -> bool:
        """``klp_update_patch_state()`` in two steps: test and clear the flag, then take the target state."""
        task = runner.task
        if runner.read:
            task.patch_state = self.machine.k.klp_target_state
            runner.read = ()
            task.cpu = None
            return True
        if task.tif_patch_pending:
            task.tif_patch_pending = False
            runner.read = ("klp_update_patch_state",)
            return False
        task.cpu = None
        return True

    def check(self) -> None:
        """The invariants, after every step. Those of a schedule that was run before have been checked.

        Raises:
            _Wrong: one does not hold.
        """
        if self.taken < len(self.prefix):
            return
        k = self.machine.k
        if k.warned:
            raise _Wrong(f"the kernel warns: {k.warned[0]}")
        for runner in self.runners:
            for frame in runner.task.stack:
                if frame.code.addr in k.freed:
                    raise _Wrong(f"{runner.task.comm} runs {frame.code.name} of a module that is gone")
            versions = {frame.function.name: frame.code.version for frame in runner.task.stack}
            if self.setup.per_call:
                versions = runner.seen
            if not self.setup.universe.holds(versions):
                raise _Wrong(f"{runner.task.comm} mixes {versions}")
        if k.klp_transition_patch is None and not self.points:
            for task in k.tasks:
                if task.patch_state != UNDEFINED or task.tif_patch_pending:
                    raise _Wrong(f"{task.comm} has a state, and no transition is going on")
            for ops in k.klp_ops.values():
                if any(func.transition or func.nop for func in ops.func_stack):
                    raise _Wrong(f"{ops.old_func.name} is in transition, and no transition is going on")

    def key(self) -> object:
        """The state as a value: everything that decides what can happen from here on."""
        k = self.machine.k
        return (
            self.step,
            self.points,
            self.label,
            int(k.klp_target_state),
            k.klp_transition_patch and k.klp_transition_patch.name,
            k.klp_cond_resched,
            tuple((p.name, p.enabled, p.forced) for p in k.klp_patches),
            tuple((m.name, m.refcnt) for m in k.modules.values()),
            tuple((w.kind is WorkKind.FREE, w.patch.name if w.patch else "") for w in k.works),
            tuple(
                (ops.old_func.name, tuple((f.patch and f.patch.name, f.transition) for f in ops.func_stack))
                for ops in k.klp_ops.values()
            ),
            tuple(
                (
                    r.at,
                    int(r.task.patch_state),
                    r.task.tif_patch_pending,
                    tuple((f.function.name, f.code.addr in k.freed, f.code.version) for f in r.task.stack),
                    tuple(_name(value) for value in r.read),
                    tuple(sorted(r.seen.items())),
                )
                for r in self.runners
            ),
        )


def _name(value: object) -> object:
    """What a task has read, without addresses."""
    if isinstance(value, Ops):
        return value.old_func.name
    if isinstance(value, Func):
        return (value.patch and value.patch.name, value.old_name, value.patched)
    return value


def _trail(setup: Setup, schedule: tuple[int, ...]) -> tuple[str, ...]:
    """The steps of a schedule that ends in a violation, in words."""
    run = _Run(setup, schedule, set(), record=True)
    with suppress(_Wrong, _Seen):
        run.execute()
    return tuple(run.trail)


def explore(setup: Setup, *, limit: int = 1_000_000, stop_at: int = 1) -> Report:
    """Visit all states that can be reached, up to ``limit`` states or ``stop_at`` violations."""
    visited: set[object] = set()
    queue: deque[tuple[int, ...]] = deque([()])
    violations: list[Violation] = []
    steps = 0
    while queue and len(visited) < limit and len(violations) < stop_at:
        prefix = queue.popleft()
        run = _Run(setup, prefix, visited)
        try:
            run.execute()
        except _Seen:
            pass
        except _Wrong as wrong:
            violations.append(Violation(str(wrong), _trail(setup, prefix + (0,) * (run.taken - len(prefix)))))
        steps += run.taken
        for depth, options in enumerate(run.branches):
            taken = prefix + (0,) * depth
            queue.extend((*taken, other) for other in range(1, options))
    return Report(len(visited), steps, not queue, tuple(violations))
