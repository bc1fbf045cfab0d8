"""The modules of the kernel's livepatch selftests, as their C sources have them.

The sources are ``lib/livepatch/*.c`` in 6.1 and ``tools/testing/selftests/livepatch/test_modules/*.c`` in
6.12 (the same text). Each is described by its objects, functions, callbacks and what its code prints;
``test_klp_selftests.py`` holds names and messages against the C text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kmend.klp.core import klp_enable_patch
from kmend.klp.sched import block, call, ret
from kmend.klp.shadow import (
    Ctor,
    Dtor,
    klp_shadow_alloc,
    klp_shadow_free,
    klp_shadow_free_all,
    klp_shadow_get,
    klp_shadow_get_or_alloc,
)
from kmend.klp.state import klp_get_prev_state, klp_get_state
from kmend.klp.structs import (
    EINVAL,
    ENOMEM,
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

LIVE_PATCHED = "this has been live patched"
#: module_state[] of the modules with callbacks
STATE_TEXT = {
    ModuleState.LIVE: "[MODULE_STATE_LIVE] Normal state",
    ModuleState.COMING: "[MODULE_STATE_COMING] Full formed, running module_init",
    ModuleState.GOING: "[MODULE_STATE_GOING] Going away",
    ModuleState.UNFORMED: "[MODULE_STATE_UNFORMED] Still setting it up",
}
CALLBACKS = ("pre_patch", "post_patch", "pre_unpatch", "post_unpatch")


@dataclass(frozen=True, slots=True)
class ObjectRow:
    """An entry of ``objs[]``: object, (function, replacement) pairs, whether it has the four callbacks."""

    name: str | None
    funcs: tuple[tuple[str, str], ...] = ()
    callbacks: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A livepatch module: ``objs[]``, ``states[]``, ``replace`` (None: a parameter), its callbacks.

    ``loglevel``: the callbacks keep ``console_loglevel``: 1 as test_klp_state.c does, 2 as test_klp_state2.c.
    ``shows``: replacement functions that print one line into a file of /proc.
    """

    objects: tuple[ObjectRow, ...]
    states: tuple[tuple[int, int], ...] = ()
    replace: bool | None = False
    pre_patch_ret: bool = False
    loglevel: int = 0
    shows: tuple[str, ...] = ()


STATE_OBJECTS = (ObjectRow(None, callbacks=True),)
LIVEPATCHES = {
    "test_klp_livepatch": Row(
        (ObjectRow(None, (("cmdline_proc_show", "livepatch_cmdline_proc_show"),)),),
        shows=("livepatch_cmdline_proc_show",),
    ),
    "test_klp_atomic_replace": Row(
        (ObjectRow(None, (("meminfo_proc_show", "livepatch_meminfo_proc_show"),)),),
        replace=None,
        shows=("livepatch_meminfo_proc_show",),
    ),
    "test_klp_callbacks_demo": Row(
        (
            ObjectRow(None, callbacks=True),
            ObjectRow("test_klp_callbacks_mod", callbacks=True),
            ObjectRow(
                "test_klp_callbacks_busy", (("busymod_work_func", "patched_work_func"),), callbacks=True
            ),
        ),
        pre_patch_ret=True,
    ),
    "test_klp_callbacks_demo2": Row((ObjectRow(None, callbacks=True),), replace=None),
    "test_klp_state": Row(STATE_OBJECTS, ((1, 1),), replace=True, loglevel=1),
    "test_klp_state2": Row(STATE_OBJECTS, ((1, 2),), replace=True, loglevel=2),
    "test_klp_state3": Row(STATE_OBJECTS, ((1, 2),), replace=True, loglevel=2),
    "test_klp_syscall": Row((ObjectRow(None, (("__x64_sys_getpid", "lp_sys_getpid"),)),)),
}
#: Modules that are not livepatches, and the function that one of them has to be patched.
PLAIN = {
    "test_klp_callbacks_mod": (),
    "test_klp_callbacks_busy": ("busymod_work_func",),
    "test_klp_shadow_vars": (),
}
#: Functions of vmlinux that the livepatches name.
VMLINUX = ("cmdline_proc_show", "meminfo_proc_show", "__x64_sys_getpid")


@dataclass
class World:
    """The machine of a selftest: the kernel and what the test modules keep in their own memory."""

    k: Kernel
    hammers: list[Task] = field(default_factory=list)
    kworker: Task | None = None
    console_loglevel: int = 7
    #: test_klp_syscall's npids_pending and klp_pids[]
    waiting: list[int] = field(default_factory=list)

    def info(self, module: str, text: str) -> None:
        """``pr_info()`` of a test module: pr_fmt puts its name in front."""
        self.k.printk(Level.INFO, f"{module}: {text}")

    def build(self, name: str, parameters: dict[str, str]) -> Module:
        """A module as ``insmod`` hands it to the kernel."""
        if name in LIVEPATCHES:
            return self._livepatch(name, LIVEPATCHES[name], parameters)
        match name:
            case "test_klp_callbacks_mod":
                return Module(
                    name,
                    init=lambda _k, _mod: self._begins(name),
                    exit=lambda _k, _mod: self.info(name, "test_klp_callbacks_mod_exit"),
                )
            case "test_klp_callbacks_busy":
                return self._busy(name, parameters)
            case "test_klp_shadow_vars":
                return Module(name, init=lambda _k, _mod: ShadowTest(self, name).run(), exit=_nothing)
            case _:
                raise KeyError(name)

    def _begins(self, name: str) -> int:
        self.info(name, "test_klp_callbacks_mod_init")
        return 0

    def _livepatch(self, name: str, row: Row, parameters: dict[str, str]) -> Module:
        symbols: list[Function] = []
        objects = []
        mod = Module(name, livepatch=True, exit=_nothing)
        mod.parameters = (
            {"pre_patch_ret": int(parameters.get("pre_patch_ret", "0"))} if row.pre_patch_ret else {}
        )
        for part in row.objects:
            funcs = []
            for old_name, new_name in part.funcs:
                symbols.append(self.k.text(new_name, name))
                funcs.append(Func(old_name, symbols[-1]))
            objects.append(
                Object(part.name, funcs, self._callbacks(mod, row) if part.callbacks else Callbacks())
            )
        mod.symbols = tuple(symbols)
        replace = bool(int(parameters.get("replace", "0"))) if row.replace is None else row.replace
        patch = Patch(mod, objects, replace, tuple(State(*state) for state in row.states))

        def init(k: Kernel, _mod: Module) -> int:
            if "klp_pids" in parameters:
                self.waiting = [int(pid) for pid in parameters["klp_pids"].split(",")]
            return klp_enable_patch(k, patch)

        mod.init = init
        return mod

    def _callbacks(self, mod: Module, row: Row) -> Callbacks:
        log_level = {0: None, 1: LogLevel(self, mod, migrates=False), 2: LogLevel(self, mod, migrates=True)}[
            row.loglevel
        ]

        def said(kind: str, obj: Object) -> None:
            where = f"{obj.mod.name} -> {STATE_TEXT[obj.mod.state]}" if obj.mod else "vmlinux"
            self.info(mod.name, f"{kind}_callback: {where}")

        def pre_patch(_k: Kernel, obj: Object) -> int:
            said("pre_patch", obj)
            if log_level:
                return log_level.allocate(obj)
            return int(str(mod.parameters.get("pre_patch_ret", 0)))

        def then(kind: str, more: Callable[[Object], None] | None) -> Callable[[Kernel, Object], None]:
            def callback(_k: Kernel, obj: Object) -> None:
                said(kind, obj)
                if more:
                    more(obj)

            return callback

        return Callbacks(
            pre_patch,
            then("post_patch", log_level.fix if log_level else None),
            then("pre_unpatch", log_level.restore if log_level else None),
            then("post_unpatch", log_level.free if log_level else None),
        )

    def _busy(self, name: str, parameters: dict[str, str]) -> Module:
        """A worker that sits in ``busymod_work_func()`` as long as the parameter says."""
        work_func = self.k.text("busymod_work_func", name)
        blocks = parameters.get("block_transition", "N") == "Y"

        def leave() -> None:
            assert self.kworker
            self.info(name, "busymod_work_func exit")
            ret(self.kworker)
            self.kworker.sleep = Sleep.RUNNING

        def init(k: Kernel, _mod: Module) -> int:
            self.info(name, "test_klp_callbacks_busy_init")
            self.kworker = Task(50, "kworker/0:1", Kind.KTHREAD)
            k.tasks.append(self.kworker)
            call(k, self.kworker, work_func)
            self.info(name, "busymod_work_func enter")
            if blocks:
                # msleep(20) in a loop: uninterruptible, and always in the function
                block(self.kworker, Sleep.UNINTERRUPTIBLE, Wake.STAY)
            else:
                leave()
            return 0

        def leave_and_exit(k: Kernel, _mod: Module) -> None:
            if self.kworker and self.kworker.stack:
                leave()
            self.info(name, "test_klp_callbacks_busy_exit")

        return Module(name, (work_func,), init=init, exit=leave_and_exit)

    def show(self, function: str, stock: str) -> str:
        """What reading a file of /proc prints: its show function is called, by way of ftrace."""
        (original,) = [f for f in self.k.kallsyms[None] if f.name == function]
        reader = Task(60, "cat")
        reader.patch_state = self.k.klp_target_state
        code = call(self.k, reader, original)
        ret(reader)
        if code is original:
            return stock
        assert code.module and code.name in LIVEPATCHES[code.module].shows
        return f"{code.module}: {LIVE_PATCHED}\n"

    def hammer(self) -> None:
        """Each background process calls getpid once (it does so all the time)."""
        (original,) = [f for f in self.k.kallsyms[None] if f.name == "__x64_sys_getpid"]
        for task in self.hammers:
            code = call(self.k, task, original)
            ret(task)
            if code.name == "lp_sys_getpid" and task.pid in self.waiting:
                self.waiting.remove(task.pid)


@dataclass
class LogLevel:
    """The callbacks of test_klp_state.c and, where it ``migrates``, test_klp_state2.c."""

    world: World
    mod: Module
    migrates: bool

    def _states(self, obj: Object) -> tuple[State | None, State | None]:
        assert obj.patch
        return klp_get_state(obj.patch, 1), klp_get_prev_state(self.world.k, 1) if self.migrates else None

    def _say(self, text: str) -> None:
        self.world.info(self.mod.name, text)

    def allocate(self, obj: Object) -> int:
        state, previous = self._states(obj)
        if previous:
            self._say("allocate_loglevel_state: space to store console_loglevel already allocated")
            return 0
        if not state:
            return -EINVAL
        state.data = [0]
        self._say("allocate_loglevel_state: allocating space to store console_loglevel")
        return 0

    def fix(self, obj: Object) -> None:
        state, previous = self._states(obj)
        if not state:
            return
        if previous:
            self._say("fix_console_loglevel: taking over the console_loglevel change")
            state.data = previous.data
            return
        self._say("fix_console_loglevel: fixing console_loglevel")
        assert isinstance(state.data, list)
        state.data[0] = self.world.console_loglevel
        self.world.console_loglevel = 15

    def restore(self, obj: Object) -> None:
        state, previous = self._states(obj)
        if previous:
            self._say(
                "restore_console_loglevel: passing the console_loglevel change back to the old livepatch"
            )
            return
        if not state:
            return
        self._say("restore_console_loglevel: restoring console_loglevel")
        assert isinstance(state.data, list)
        self.world.console_loglevel = state.data[0]

    def free(self, obj: Object) -> None:
        state, previous = self._states(obj)
        if previous:
            self._say("free_loglevel_state: keeping space to store console_loglevel")
            return
        if not state:
            return
        self._say("free_loglevel_state: freeing space for the stored console_loglevel")
        state.data = None


class ShadowTest:
    """``test_klp_shadow_vars_init()``: what it does and prints, pass by pass."""

    OBJECTS = 3
    ID1 = 0x1234
    ID2 = 0x1235

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.ids: dict[object, int] = {}
        self.ctor: Ctor = self._ctor
        self.dtor: Dtor = self._dtor

    def say(self, text: str) -> None:
        self.world.info(self.name, text)

    def ptr(self, pointer: object) -> str:
        """``ptr_id()``: a number for each pointer in the order of their first appearance."""
        return f"PTR{self.ids.setdefault(pointer, len(self.ids))}"

    def get(self, obj: int, id_: int) -> Shadow | None:
        sv = klp_shadow_get(self.world.k, obj, id_)
        # the order in which a C compiler evaluates arguments: gcc on x86-64 goes from the last to the first
        result = self.ptr(sv), self.ptr(obj)
        self.say(f"klp_shadow_get(obj={result[1]}, id={id_:#x}) = {result[0]}")
        return sv

    def alloc(self, obj: int, id_: int, var: str, *, get: bool) -> Shadow | None:
        function = klp_shadow_get_or_alloc if get else klp_shadow_alloc
        sv = function(self.world.k, obj, id_, 8, self.ctor, var)
        parts = [self.ptr(sv), self.ptr(var), self.ptr("ctor"), self.ptr(obj)]
        self.say(
            f"klp_shadow_{'get_or_alloc' if get else 'alloc'}(obj={parts[3]}, id={id_:#x}, size=8, "
            f"gfp_flags=GFP_KERNEL), ctor={parts[2]}, ctor_data={parts[1]} = {parts[0]}"
        )
        return sv

    def free(self, obj: int, id_: int) -> None:
        klp_shadow_free(self.world.k, obj, id_, self.dtor)
        parts = [self.ptr("dtor"), self.ptr(obj)]
        self.say(f"klp_shadow_free(obj={parts[1]}, id={id_:#x}, dtor={parts[0]})")

    def free_all(self, id_: int) -> None:
        klp_shadow_free_all(self.world.k, id_)
        self.say(f"klp_shadow_free_all(id={id_:#x}, dtor={self.ptr(None)})")

    def _ctor(self, _obj: int, shadow: Shadow, ctor_data: object) -> int:
        if ctor_data is None:
            return -EINVAL
        shadow.data = ctor_data
        parts = [self.ptr(ctor_data), self.ptr(shadow)]
        self.say(f"shadow_ctor: {parts[1]} -> {parts[0]}")
        return 0

    def _dtor(self, obj: int, shadow: Shadow) -> None:
        parts = [self.ptr(shadow), self.ptr(obj)]
        self.say(f"shadow_dtor(obj={parts[1]}, shadow_data={parts[0]})")

    def expect(self, sv: Shadow | None, made: Shadow | None, field_: str) -> bool:
        """Print the line of success when the variable is the one that was made; False ends the test."""
        if sv is None:
            return False
        if sv is made and sv.data == field_:
            parts = [self.ptr(sv.data), self.ptr(sv)]
            self.say(f"  got expected {parts[1]} -> {parts[0]} result")
        return True

    def expect_null(self, sv: Shadow | None) -> None:
        if sv is None:
            self.say("  got expected NULL result")

    def run(self) -> int:
        objs = [0xFFFFC90000000000 + 0x28 * i for i in range(self.OBJECTS)]
        chars = [f"&nfields1[{i}]" for i in range(self.OBJECTS)]
        ints = [f"&nfields2[{i}]" for i in range(self.OBJECTS)]
        sv1: list[Shadow | None] = []
        sv2: list[Shadow | None] = []
        self.ptr(None)
        self.expect_null(self.get(objs[0], self.ID1))
        for i, obj in enumerate(objs):  # pass 1
            self.ptr(chars[i])
            sv1.append(self.alloc(obj, self.ID1, chars[i], get=not i % 2))
            if sv1[i] is None:
                return -ENOMEM
            self.ptr(ints[i])
            sv2.append(self.alloc(obj, self.ID2, ints[i], get=False))
            if sv2[i] is None:
                return -ENOMEM
        for i, obj in enumerate(objs):  # pass 2
            if not self.expect(self.get(obj, self.ID1), sv1[i], chars[i]):
                return -EINVAL
            if not self.expect(self.get(obj, self.ID2), sv2[i], ints[i]):
                return -EINVAL
        for i, obj in enumerate(objs):  # pass 3
            if not self.expect(self.alloc(obj, self.ID1, chars[i], get=True), sv1[i], chars[i]):
                return -EINVAL
        for obj in objs:  # pass 4
            self.free(obj, self.ID1)
            self.expect_null(self.get(obj, self.ID1))
        for i, obj in enumerate(objs):  # pass 5
            if not self.expect(self.get(obj, self.ID2), sv2[i], ints[i]):
                return -EINVAL
        self.free_all(self.ID2)  # pass 6
        for obj in objs:
            self.expect_null(self.get(obj, self.ID2))
        return 0


def _nothing(_k: Kernel, _mod: Module) -> None:
    """An exit function with nothing to do."""
