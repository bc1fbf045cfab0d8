"""The values of a live kernel: its livepatches, the tasks of a transition, and what holds them up.

``kmend.runtime`` reads them from ``/sys`` and ``/proc``; ``kmend.report.live`` renders them. The words are
the kernel's own (``Documentation/livepatch/livepatch.rst``, ``kernel/livepatch/transition.c``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from kmend.core.errors import Refusal
from kmend.core.kmsg import KernelMessage
from kmend.core.taint import TaintFlag
from kmend.core.target import VMLINUX


def tasks(number: int) -> str:
    """``1 task``, ``2 tasks``."""
    return f"{number} task" if number == 1 else f"{number} tasks"


def printable(text: str) -> str:
    """The text with every character that could steer a terminal written out (``\\x1b``, ``\\u202e``).

    Whoever may run a program chooses its name: ``prctl(PR_SET_NAME)`` takes any bytes, and
    ``/proc/PID/stat`` shows them as they are (fs/proc/array.c, proc_task_name()).
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


class Phase(Enum):
    """Where a patch stands.

    ``COMING``: its module is still being loaded and its symbols are being looked up; ``enabled`` and
    ``transition`` are 0 then, as for a disabled patch. ``DISABLED`` only stays on kernels before 5.1:
    later ones remove the sysfs folder with the end of unpatching. ``LEFT``: no patch any more, but the module
    of one is still loaded (after unpatching, or replaced).
    """

    COMING = "coming"
    ENABLED = "enabled"
    PATCHING = "patching"
    UNPATCHING = "unpatching"
    DISABLED = "disabled"
    LEFT = "left behind"

    @property
    def moving(self) -> bool:
        """Whether a transition is under way."""
        return self in (Phase.PATCHING, Phase.UNPATCHING)


@dataclass(frozen=True, slots=True)
class LiveFunction:
    """``NAME,SYMPOS`` of sysfs, where a ``sympos`` of 0 is shown as 1.

    ``shadowed_by`` names the patch higher on the ``func_stack`` whose code runs instead, '' for none.
    """

    name: str
    sympos: int
    shadowed_by: str = ""


@dataclass(frozen=True, slots=True)
class LiveObject:
    """``vmlinux`` or a module. ``patched`` is None where the kernel does not show it (before 6.1)."""

    name: str
    patched: bool | None
    functions: tuple[LiveFunction, ...]


@dataclass(frozen=True, slots=True)
class LiveModule:
    """``/sys/module/NAME``: references (None: not shown), ``initstate``, taint letters, holders.

    ``note`` is what kmend wrote into the module when it built it (empty for others' modules);
    ``identity`` is the contents of its build id and kmend notes, equal for equal files ('' without notes).
    """

    name: str
    references: int | None
    initstate: str
    taint: str
    holders: tuple[str, ...]
    note: Mapping[str, object] = field(default_factory=dict)
    identity: str = ""


@dataclass(frozen=True, slots=True)
class LivePatch:
    """One livepatch of the running kernel.

    ``replace`` is None where neither sysfs (since 6.11) nor kmend's journal tells. ``order`` counts from 1 at
    the bottom of the stack; ``order_shown``: the kernel itself says so (since 6.14), else it is computed
    from the order in which the modules were loaded. ``forced``: kmend or the kernel log know that a
    transition of it was forced; ``pinned_by``: the patch whose forced transition keeps this one's module
    until the next boot ('': none).
    """

    name: str
    phase: Phase
    replace: bool | None
    order: int
    order_shown: bool
    objects: tuple[LiveObject, ...]
    module: LiveModule | None
    forced: bool = False
    pinned_by: str = ""

    @property
    def functions(self) -> int:
        """How many functions it lists."""
        return sum(len(row.functions) for row in self.objects)


@dataclass(frozen=True, slots=True)
class Frame:
    """A line of ``/proc/PID/stack``; ``module`` is '' for the kernel image."""

    function: str
    offset: int
    module: str = ""

    @property
    def object(self) -> str:
        """The livepatch word for where the code lies."""
        return self.module or VMLINUX

    def __str__(self) -> str:
        return f"{self.function}+{self.offset:#x}" + (f" [{self.module}]" if self.module else "")


@dataclass(frozen=True, slots=True)
class Task:
    """A thread as ``/proc`` shows it. ``state`` is the letter of ``/proc/PID/stat``.

    ``stack`` is None when it could not be read. ``tracer`` is 0 when nobody traces it. ``pids`` are its
    numbers from our PID namespace inwards (one: it is in ours). ``children`` are its child processes.
    ``io_worker``: the kernel made it to carry out what its process has asked of io_uring.
    """

    pid: int
    tid: int
    name: str
    process: str
    state: str
    kthread: bool
    patch_state: int
    stack: tuple[Frame, ...] | None
    wchan: str = ""
    tracer: int = 0
    pids: tuple[int, ...] = ()
    children: tuple[int, ...] = ()
    system_call: int | None = None
    io_worker: bool = False


class Cause(Enum):
    """Why a task has not switched yet. The value is the word in JSON."""

    IN_FUNCTION = "in-function"
    RUNNING = "running"
    VFORK = "vfork-parent"
    IO_URING = "io-uring"
    UNINTERRUPTIBLE = "uninterruptible"
    KTHREAD = "kthread"
    KTHREAD_RUNNING = "kthread-running"
    TRACED = "traced"
    STOPPED = "stopped"
    FROZEN = "frozen"
    ENDED = "ended"
    UNRELIABLE = "unreliable"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Blocker:
    """A task that holds a transition up.

    ``function`` is the patched function on its stack ('' when none is found there); ``object`` where that
    lies. ``why`` and ``remedy`` are sentences. ``wakeable``: interrupting it for a moment lets it leave the
    function, with no other effect than the kernel's own fake signal would have after 15 s.
    """

    task: Task
    cause: Cause
    function: str
    object: str
    why: str
    remedy: str
    wakeable: bool


@dataclass(frozen=True, slots=True)
class Transition:
    """A transition under way, as one look at ``/proc`` shows it.

    ``target`` is the ``patch_state`` that tasks are to reach. ``tasks`` is how many tasks there are,
    ``left`` how many have not reached it. Idle tasks have no entry in ``/proc``: a transition with nothing
    ``left`` waits for them, or is being completed. ``unreadable`` counts tasks that could not be asked.
    """

    patch: str
    phase: Phase
    target: int
    tasks: int
    left: int
    blockers: tuple[Blocker, ...]
    unreadable: int = 0


@dataclass(frozen=True, slots=True)
class KernelState:
    """The running kernel. Values that the kernel does not show, or not to this user, are None or ''.

    ``ftrace_dead``: ftrace has shut itself down after a fault (``ftrace_kill()``), until the next boot.
    """

    release: str
    version: str
    build_id: str
    boot_id: str
    livepatch: bool
    taint: int | None
    taints: tuple[TaintFlag, ...]
    signatures_enforced: bool | None
    lockdown: str
    modules_disabled: bool | None
    ftrace_enabled: bool | None
    ftrace_dead: bool = False


@dataclass(frozen=True, slots=True)
class LogEntry:
    """A line of `kmend log`. ``time`` is seconds since the epoch; ``source`` is ``kernel`` or ``kmend``.

    ``record`` is a line of the journal, or where a boot begins (``event``: ``boot``); of a kernel's line it
    has the boot.
    """

    time: float
    source: str
    text: str
    message: KernelMessage | None = None
    record: Mapping[str, object] | None = None


# -- acting ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at before acting.

    ``passed`` is None when it could not be looked at; ``text`` says what was found, or why not.
    ``refusal`` is set when it stands in the way.
    """

    name: str
    passed: bool | None
    text: str
    refusal: Refusal | None = None


class End(Enum):
    """How following a transition ended.

    ``COMPLETE``: it reached what was asked for. ``REVERSED``: somebody turned it round meanwhile.
    ``GONE``: the patch went away meanwhile. ``STALLED``: the limit was reached with tasks left.
    """

    COMPLETE = "complete"
    REVERSED = "reversed"
    GONE = "gone"
    STALLED = "stalled"


@dataclass(frozen=True, slots=True)
class Step:
    """Something that was done; ``seconds`` since following (or the action) began.

    ``tids`` are the threads that it was done to.
    """

    seconds: float
    text: str
    tids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """How many tasks were left at a moment."""

    seconds: float
    left: int
    tasks: int


@dataclass(frozen=True, slots=True)
class Followed:
    """A transition as it was followed. ``woken`` are the threads that were interrupted.

    ``first`` is the first look that found tasks left, before anything was done about them; ``last`` is the
    last look, None when it found none: at a stall, what holds it up. ``began``: when following began, in
    seconds since the action did; ``goal``: where it was followed to.
    """

    end: End
    seconds: float
    samples: tuple[Sample, ...] = ()
    steps: tuple[Step, ...] = ()
    woken: tuple[int, ...] = ()
    first: Transition | None = None
    last: Transition | None = None
    began: float = 0.0
    goal: Phase | None = None


class Result(Enum):
    """How an action ended. ``PENDING``: the transition goes on and was not waited for."""

    DONE = "done"
    PENDING = "pending"
    REVERSED = "reversed"
    STALLED = "stalled"
    FAILED = "failed"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class ActionReport:
    """Everything that an acting verb has to tell. ``why`` is one sentence.

    ``followed`` has each transition that was followed (the patch's, then that of taking it back after a
    stall). ``replaced`` are the patches that a cumulative one replaced, ``removed`` the modules that were
    unloaded. ``messages`` is what the kernel said meanwhile about livepatching.

    ``callbacks`` are those that the kernel called, in their order; None: which the patch has is not known.

    ``file`` and ``sha256`` are the module's, '' when it was loaded before; ``note`` is what kmend wrote into
    it. ``began`` is when the action began (CLOCK_MONOTONIC); steps count from there. ``drift`` is what has to
    be added to the kernel's times to get that clock (:func:`kmend.runtime.klog.drift`).
    """

    verb: str
    patch: str
    result: Result
    why: str
    next_step: str = ""
    checks: tuple[Check, ...] = ()
    steps: tuple[Step, ...] = ()
    followed: tuple[Followed, ...] = ()
    replaced: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    refused: tuple[Refusal, ...] = ()
    warnings: tuple[Refusal, ...] = ()
    messages: tuple[KernelMessage, ...] = ()
    seconds: float = 0.0
    file: str = ""
    sha256: str = ""
    note: Mapping[str, object] = field(default_factory=dict)
    began: float = 0.0
    drift: float = 0.0
    callbacks: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Occasion:
    """By whom, when, where and in which words something was asked for.

    Times are seconds since the epoch; ``boot`` is when the clock of the kernel's log was 0. ``kernel`` is
    None when it could not be looked at.
    """

    verb: str
    command: str
    user: str
    machine: str
    kernel: KernelState | None
    began: float
    ended: float
    boot: float
