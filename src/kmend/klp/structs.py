"""The livepatch core's structures and global variables (``include/linux/livepatch.h``).

These are the only mutable values of the package: like the kernel's own, they are changed in place by the
functions named after the kernel's. What came out of a run is a frozen value: :mod:`kmend.klp.outcome`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, IntEnum

from kmend.core.errors import Failed
from kmend.klp.line import LINE_6_1, Line

ENOENT, EAGAIN, ENOMEM, EACCES, EBUSY, EEXIST, ENODEV, EINVAL = 2, 11, 12, 13, 16, 17, 19, 22
ENOEXEC, EADDRINUSE = 8, 98
#: Ticks of the clock in a second: CONFIG_HZ of Debian's kernels.
HZ = 250
#: The module loader's longest name with its terminating zero (``include/linux/moduleparam.h``, x86-64).
MODULE_NAME_LEN = 56
#: The longest symbol name with its terminating zero (``include/linux/kallsyms.h``).
KSYM_NAME_LEN = 512
TAINT_LIVEPATCH = 15
TEXT_BASE = 0xFFFFFFFF81000000
FUNCTION_SIZE = 0x100


class KernelHang(Failed):
    """What the scenario asks for would hang the kernel for good (a lock taken twice by one task)."""


class PatchState(IntEnum):
    """``task->patch_state`` and ``klp_target_state``; see :attr:`kmend.klp.line.Line.state_names`."""

    UNDEFINED = -1
    UNPATCHED = 0
    PATCHED = 1


# The three states by short names: transition.c compares them for every task.
UNDEFINED, UNPATCHED, PATCHED = PatchState.UNDEFINED, PatchState.UNPATCHED, PatchState.PATCHED


class ModuleState(Enum):
    """``enum module_state`` (``include/linux/module.h``)."""

    LIVE = "LIVE"
    COMING = "COMING"
    GOING = "GOING"
    UNFORMED = "UNFORMED"


class Level(IntEnum):
    """``include/linux/kern_levels.h``."""

    ERR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6
    DEBUG = 7


@dataclass(frozen=True, slots=True)
class Message:
    """A line of the kernel log. ``at`` in ticks of the clock (:data:`HZ`); ``text`` with its prefix."""

    at: int
    level: Level
    text: str


@dataclass(frozen=True, slots=True)
class Function:
    """Machine code at an address: an original function, or the replacement that a patch brings.

    ``module`` is None for vmlinux. ``ftrace``: the function has an ftrace entry.
    """

    name: str
    module: str | None
    addr: int
    size: int = FUNCTION_SIZE
    ftrace: bool = True

    @property
    def version(self) -> str:
        """``original``, or the name of the patch that the code belongs to, as callers can tell them apart."""
        return self.module or "vmlinux"


@dataclass(slots=True, eq=False)
class Func:
    """``struct klp_func``. ``old_func`` is None as long as the object is not loaded."""

    old_name: str
    new_func: Function | None = None
    old_sympos: int = 0
    old_func: Function | None = None
    nop: bool = False
    patched: bool = False
    transition: bool = False
    in_sysfs: bool = False
    #: The patch that the func belongs to: reached through the kobjects' parents in the kernel.
    patch: Patch | None = None

    @property
    def old_addr(self) -> int:
        """The address of the original function, 0 when its object is not loaded."""
        return self.old_func.addr if self.old_func else 0

    @property
    def sysfs_name(self) -> str:
        """``klp_init_func()``: sympos 0 is shown as 1."""
        return f"{self.old_name},{self.old_sympos or 1}"


@dataclass(slots=True, eq=False)
class Callbacks:
    """``struct klp_callbacks``. A callback is given the kernel and the object; pre_patch returns an errno."""

    pre_patch: Callable[[Kernel, Object], int] | None = None
    post_patch: Callable[[Kernel, Object], None] | None = None
    pre_unpatch: Callable[[Kernel, Object], None] | None = None
    post_unpatch: Callable[[Kernel, Object], None] | None = None
    post_unpatch_enabled: bool = False


@dataclass(slots=True, eq=False)
class Object:
    """``struct klp_object``. ``name`` is None for vmlinux.

    ``relocs`` are the livepatch relocations of the section ``.klp.rela.NAME``: the symbols (object, name,
    sympos) that they refer to. ``funcs`` is the dynamic list (``func_list``), nops included.
    """

    name: str | None
    funcs: list[Func] = field(default_factory=list)
    callbacks: Callbacks = field(default_factory=Callbacks)
    relocs: tuple[tuple[str, str, int], ...] = ()
    mod: Module | None = None
    dynamic: bool = False
    patched: bool = False
    relocs_written: bool = False
    in_sysfs: bool = False
    patch: Patch | None = None

    @property
    def loaded(self) -> bool:
        """``klp_is_object_loaded()``."""
        return self.name is None or self.mod is not None

    @property
    def sysfs_name(self) -> str:
        """The folder's name: ``vmlinux`` for the kernel itself."""
        return self.name or "vmlinux"


@dataclass(slots=True, eq=False)
class State:
    """``struct klp_state``: a change of the system's state that outlives single patches."""

    id: int
    version: int = 0
    data: object = None


@dataclass(slots=True, eq=False)
class Patch:
    """``struct klp_patch``. ``objs`` is the dynamic list (``obj_list``)."""

    mod: Module
    objs: list[Object]
    replace: bool = False
    states: tuple[State, ...] = ()
    enabled: bool = False
    forced: bool = False
    in_sysfs: bool = False

    @property
    def name(self) -> str:
        """The patch is named after its module."""
        return self.mod.name


@dataclass(slots=True, eq=False)
class Ops:
    """``struct klp_ops``: one ftrace handler per original function, shared by all patches of it.

    The top of ``func_stack`` (index 0) is the func of the patch that was enabled last.
    """

    old_func: Function
    func_stack: list[Func] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Module:
    """``struct module`` as far as livepatching looks at it.

    ``refcnt`` counts the references beyond the base one; a module whose ``refcnt`` is not 0 cannot go.
    """

    name: str
    symbols: tuple[Function, ...] = ()
    livepatch: bool = False
    init: Callable[[Kernel, Module], int] | None = None
    exit: Callable[[Kernel, Module], None] | None = None
    parameters: dict[str, object] = field(default_factory=dict)
    state: ModuleState = ModuleState.UNFORMED
    refcnt: int = 0
    klp_alive: bool = False


class Kind(Enum):
    """What a task is: a user task, a kernel thread, or the idle task of a CPU."""

    USER = "user"
    KTHREAD = "kthread"
    IDLE = "idle"


class Sleep(Enum):
    """``task->__state``: runnable, asleep so that a signal wakes it, or asleep until an event."""

    RUNNING = "running"
    INTERRUPTIBLE = "interruptible"
    UNINTERRUPTIBLE = "uninterruptible"


class Wake(Enum):
    """What a sleeper's code does when it is woken before the event that it waits for.

    ``RETURN``: leaves its functions (a system call ends with EINTR). ``RESTART``: leaves them and enters
    them again (most system calls; a kernel thread's loop). ``STAY``: goes back to sleep where it is.
    """

    RETURN = "return"
    RESTART = "restart"
    STAY = "stay"


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame of a task's kernel stack: ``code`` is what runs, called by the name of ``function``."""

    function: Function
    code: Function
    #: The return address in the frame's code that a stack trace shows.
    address: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", self.code.addr + 1)


@dataclass(slots=True, eq=False)
class Task:
    """``struct task_struct`` as far as livepatching looks at it; the outermost frame comes first.

    ``cpu`` is the CPU that the task runs on at this moment, None when it is scheduled out.
    """

    pid: int
    comm: str
    kind: Kind = Kind.USER
    patch_state: int = UNDEFINED
    tif_patch_pending: bool = False
    tif_notify_signal: bool = False
    stack: list[Frame] = field(default_factory=list)
    reliable: bool = True
    cpu: int | None = None
    sleep: Sleep = Sleep.RUNNING
    wake: Wake = Wake.RESTART
    woken: bool = False
    in_kernel: bool = False
    #: of an idle task: whether its CPU is online
    online: bool = True


class WorkKind(Enum):
    """The works that the livepatch core schedules."""

    TRANSITION = "klp_transition_work"
    FREE = "free_work"


@dataclass(frozen=True, slots=True)
class Work:
    """A work that a worker runs when the clock has reached ``due``."""

    due: int
    kind: WorkKind
    patch: Patch | None = None


#: klp_ftrace_handler(): what the current task is to run instead of the original; None: the original.
Handler = Callable[["Kernel", Ops, Task], "Function | None"]
#: Functions whose pr_debug() lines are shown, as ``kernel/livepatch/`` has them.
DEBUG_FUNCTIONS = frozenset(
    {
        "klp_complete_transition",
        "klp_cancel_transition",
        "klp_try_switch_task",
        "klp_init_transition",
        "klp_reverse_transition",
    }
)


@dataclass(slots=True, eq=False)
class Kernel:
    """The kernel's global variables.

    ``klp_ops`` is the kernel's list of the same name, keyed by the original function's address (which
    ``klp_find_ops()`` compares). ``kallsyms`` holds the symbols of vmlinux (key None) and of each module in
    the order of their addresses: that is what ``sympos`` counts. ``ipmodify`` are the addresses of functions
    that some other ftrace user redirects. ``debug`` names the functions whose pr_debug() lines are shown.

    ``point``, where set, is called at each place where another CPU may see an intermediate state; the
    explorer uses it.
    """

    line: Line = LINE_6_1
    handler: Handler | None = None
    klp_patches: list[Patch] = field(default_factory=list)
    klp_transition_patch: Patch | None = None
    klp_target_state: int = UNDEFINED
    klp_signals_cnt: int = 0
    klp_ops: dict[int, Ops] = field(default_factory=dict)
    klp_shadow_hash: list[list[Shadow]] = field(default_factory=list)
    klp_shadow_locked: bool = False
    klp_mutex: bool = False
    klp_cond_resched: bool = False
    kobjects: list[Patch] = field(default_factory=list)
    modules: dict[str, Module] = field(default_factory=dict)
    kallsyms: dict[str | None, list[Function]] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)
    idle: list[Task] = field(default_factory=list)
    current: Task | None = None
    ftrace_enabled: bool = True
    ipmodify: set[int] = field(default_factory=set)
    freed: set[int] = field(default_factory=set)
    taint: int = 0
    jiffies: int = 0
    works: list[Work] = field(default_factory=list)
    log: list[Message] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    debug: frozenset[str] = frozenset()
    point: Callable[[str], None] | None = None
    next_text: int = TEXT_BASE

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold ``klp_mutex``.

        Raises:
            KernelHang: the mutex is held already (a callback that enables or disables a patch).
        """
        if self.klp_mutex:
            raise KernelHang(
                "the kernel hangs: klp_mutex is taken twice",
                why="callbacks run with klp_mutex held (kernel/livepatch/core.c)",
                next_step="do not enable, disable, load or unload from a callback",
                rule="klp-hang",
            )
        self.klp_mutex = True
        try:
            yield
        finally:
            self.klp_mutex = False

    def text(
        self, name: str, module: str | None, *, size: int = FUNCTION_SIZE, ftrace: bool = True
    ) -> Function:
        """New machine code at an address that nothing had before; not in ``kallsyms`` yet."""
        addr = self.next_text
        self.next_text += size
        return Function(name, module, addr, size, ftrace)

    def printk(self, level: Level, text: str) -> None:
        """Append to the log."""
        self.log.append(Message(self.jiffies, level, text))

    def pr_debug(self, function: str, text: str) -> None:
        """``pr_debug()`` of ``kernel/livepatch/``: shown when dynamic debug is on for that function."""
        if function in self.debug:
            self.printk(Level.DEBUG, f"livepatch: {text}")

    def pr_notice(self, text: str) -> None:
        """``pr_notice()`` of ``kernel/livepatch/``."""
        self.printk(Level.NOTICE, f"livepatch: {text}")

    def pr_warn(self, text: str) -> None:
        """``pr_warn()`` of ``kernel/livepatch/``."""
        self.printk(Level.WARNING, f"livepatch: {text}")

    def pr_err(self, text: str) -> None:
        """``pr_err()`` of ``kernel/livepatch/``."""
        self.printk(Level.ERR, f"livepatch: {text}")

    def warn_on(self, where: str) -> None:
        """``WARN_ON()``: a condition that the kernel's authors hold to be impossible."""
        self.warned.append(where)
        self.printk(Level.WARNING, f"WARNING: {where}")

    def schedule(self, kind: WorkKind, delay: int = 0, patch: Patch | None = None) -> None:
        """``schedule_work()`` and, with a delay in ticks, ``schedule_delayed_work()``.

        A delayed work that is pending already stays as it is (``queue_delayed_work_on()``).
        """
        if kind is WorkKind.TRANSITION and any(work.kind is kind for work in self.works):
            return
        self.works.append(Work(self.jiffies + delay, kind, patch))


@dataclass(slots=True, eq=False)
class Shadow:
    """``struct klp_shadow``: a variable attached to the object at address ``obj`` under ``id``.

    ``data`` stands for the area of ``size`` bytes, which is zeroed when allocated.
    """

    obj: int
    id: int
    size: int
    data: object = 0
