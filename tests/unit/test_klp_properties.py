"""Properties of the livepatch model, held against random sequences of what an administrator and tasks do."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kmend.klp import explore, sysfs
from kmend.klp.line import LINES
from kmend.klp.module import delete_module
from kmend.klp.outcome import view
from kmend.klp.patch import klp_ftrace_handler, redirect
from kmend.klp.scenario import (
    Enter,
    FuncDecl,
    Load,
    Machine,
    ModuleDecl,
    ObjectDecl,
    PatchDecl,
    Scenario,
    Settle,
    TaskDecl,
    Unload,
    Wait,
    Write,
)
from kmend.klp.sched import block, call, cond_resched, exit_to_user_mode, resume, ret
from kmend.klp.shadow import (
    klp_shadow_alloc,
    klp_shadow_free,
    klp_shadow_free_all,
    klp_shadow_get,
    klp_shadow_get_or_alloc,
    klp_shadows,
)
from kmend.klp.structs import (
    PATCHED,
    UNDEFINED,
    UNPATCHED,
    Func,
    Function,
    Handler,
    Kernel,
    Kind,
    Ops,
    Patch,
    Shadow,
    Sleep,
    Task,
    Wake,
)

FUNCTIONS = ("f", "g", "h")
MODULES = {"m": ("mf", "mg")}
TASKS = ("a", "b", "kthread")
EVERYTHING: dict[str | None, tuple[str, ...]] = {None: FUNCTIONS}
EVERYTHING.update(MODULES)


@st.composite
def patch_decls(draw: st.DrawFn) -> tuple[PatchDecl, ...]:
    """Four patches of random functions of vmlinux and of a module; half of them replace."""
    decls = []
    for i in range(4):
        objs = []
        for name, functions in EVERYTHING.items():
            chosen = draw(st.lists(st.sampled_from(functions), unique=True, max_size=len(functions)))
            if chosen:
                objs.append(ObjectDecl(name, tuple(FuncDecl(function) for function in chosen)))
        if not objs:
            objs.append(ObjectDecl(None, (FuncDecl("f"),)))
        decls.append(PatchDecl(f"p{i}", tuple(objs), replace=draw(st.booleans())))
    return tuple(decls)


#: A busy machine must not fail a test.
STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Livepatching(RuleBasedStateMachine):
    """Patches and modules come and go while tasks call functions, nest and sleep in them."""

    handler: ClassVar[Handler | None] = None
    forces: ClassVar[bool] = False

    @initialize(patches=patch_decls(), line=st.sampled_from(sorted(LINES)))
    def start(self, patches: tuple[PatchDecl, ...], line: str) -> None:
        modules = tuple(ModuleDecl(name, functions) for name, functions in MODULES.items())
        tasks = tuple(TaskDecl(name, Kind.KTHREAD if name == "kthread" else Kind.USER) for name in TASKS)
        scenario = Scenario("random", FUNCTIONS, patches, (), modules, tasks, cpus=2)
        self.machine = Machine(scenario, LINES[line])
        self.k: Kernel = self.machine.k
        self.k.handler = type(self).handler
        self.tasks = [self.machine.task(name) for name in TASKS]
        self.changes = {
            decl.name: {func.old_name for obj in decl.objs for func in obj.funcs} for decl in patches
        }
        self.was_forced = False
        #: of every patch that was ever enabled: function to its code, and to the code that it took over from
        self.new: dict[Patch, dict[int, int]] = {}
        self.old: dict[Patch, dict[int, int]] = {}

    # what an administrator does

    @rule(i=st.integers(0, 3))
    def load(self, i: int) -> None:
        busy = self.k.klp_transition_patch is not None
        there = f"p{i}" in self.k.modules
        result = self.machine.execute(Load(f"p{i}"))
        assert result == (-17 if there else -16 if busy else 0)

    @rule(i=st.integers(0, 3))
    def disable(self, i: int) -> None:
        self.machine.execute(Write(f"p{i}", "enabled", "0"))

    @rule(i=st.integers(0, 3))
    def reverse(self, i: int) -> None:
        patch = self.k.klp_transition_patch
        result = self.machine.execute(Write(f"p{i}", "enabled", "1"))
        if patch is None or patch.name != f"p{i}":
            assert result != 0, "a patch that is not in transition cannot be enabled"

    @rule(i=st.integers(0, 3))
    def unload(self, i: int) -> None:
        self.machine.execute(Unload(f"p{i}"))

    @rule()
    def load_module(self) -> None:
        self.machine.execute(Load("m"))

    @rule()
    def unload_module(self) -> None:
        in_use = any(frame.function.module == "m" for task in self.tasks for frame in task.stack)
        if not in_use:  # whoever may be in a module's code holds a reference to it
            self.machine.execute(Unload("m"))

    @precondition(lambda self: self.forces)
    @rule(i=st.integers(0, 3))
    def force(self, i: int) -> None:
        if self.machine.execute(Write(f"p{i}", "force", "1")) == 0:
            self.was_forced = True

    @rule(seconds=st.sampled_from((0.1, 1, 5, 40)))
    def wait(self, seconds: float) -> None:
        self.machine.execute(Wait(seconds))

    # what tasks do

    @rule(i=st.integers(0, 2), name=st.sampled_from([*FUNCTIONS, *MODULES["m"]]))
    def enter(self, i: int, name: str) -> None:
        task, function = self.tasks[i], self.machine.function(name)
        if function is None or len(task.stack) == 4:
            return
        expected = self.expected(function, task)
        code = call(self.k, task, function)
        assert code is function if expected is None else code.module == expected
        block(task, Sleep.INTERRUPTIBLE, Wake.STAY)

    @rule(i=st.integers(0, 2))
    def leave(self, i: int) -> None:
        task = self.tasks[i]
        if not task.stack:
            return
        ret(task)
        resume(task)
        if not task.stack and task.kind is Kind.USER:
            exit_to_user_mode(self.k, task)

    @rule(i=st.integers(0, 2))
    def yields(self, i: int) -> None:
        cond_resched(self.k, self.tasks[i])

    @rule(i=st.integers(0, 2), wake=st.sampled_from(Wake), sleep=st.sampled_from([*Sleep]))
    def sleeps_otherwise(self, i: int, wake: Wake, sleep: Sleep) -> None:
        if self.tasks[i].stack:
            block(self.tasks[i], sleep, wake)

    def expected(self, function: Function, task: Task) -> str | None:
        """The patch whose version must run, from the list of patches alone; None: the original."""
        owners = [
            patch
            for patch in self.k.klp_patches
            for obj in patch.objs
            if obj.name == function.module and obj.loaded
            for func in obj.funcs
            if func.old_name == function.name
        ]
        moving = self.k.klp_transition_patch
        if moving in owners and task.patch_state == UNPATCHED:
            owners.remove(moving)
        if not owners:
            return None
        return owners[-1].name if function.name in self.changes[owners[-1].name] else None

    # what always holds

    @invariant()
    def the_kernel_never_warns(self) -> None:
        assert self.k.warned == []

    @invariant()
    def nobody_runs_code_that_is_gone(self) -> None:
        for task in self.tasks:
            for frame in task.stack:
                assert frame.code.addr not in self.k.freed

    @invariant()
    def no_stack_mixes_old_and_new_code(self) -> None:
        """Of one patch. A newer one may take over one of its functions while a task is in another."""
        self._learn()
        if self.was_forced:
            return
        for patch, new in self.new.items():
            old = self.old[patch]
            for task in self.tasks:
                frames = [(frame.function.addr, frame.code.addr) for frame in task.stack]
                in_new = [row for row in frames if row in new.items()]
                in_old = [row for row in frames if row in old.items()]
                assert not (in_new and in_old), f"{task.comm} is in both of {patch.name}: {task.stack}"

    def _learn(self) -> None:
        """Which code each func stands for, and which it took over from, when it is first seen."""
        for addr, ops in self.k.klp_ops.items():
            codes = [func.new_func.addr for func in ops.func_stack if func.new_func]
            assert len(codes) == len(ops.func_stack)
            for func, code, below in zip(ops.func_stack, codes, [*codes[1:], addr], strict=True):
                assert func.patch
                self.new.setdefault(func.patch, {}).setdefault(addr, code)
                self.old.setdefault(func.patch, {}).setdefault(addr, below)

    @invariant()
    def without_a_transition_nothing_is_in_transition(self) -> None:
        if self.k.klp_transition_patch is not None:
            return
        for task in (*self.k.tasks, *self.k.idle):
            assert task.patch_state == UNDEFINED
            assert not task.tif_patch_pending
        for ops in self.k.klp_ops.values():
            assert ops.func_stack
            assert not any(func.transition or func.nop for func in ops.func_stack)

    @invariant()
    def the_last_replacing_patch_is_the_oldest(self) -> None:
        if self.k.klp_transition_patch is None:
            for patch in self.k.klp_patches[1:]:
                assert not patch.replace, "patches older than a replacing one are gone"

    @invariant()
    def func_stacks_are_the_list_of_patches(self) -> None:
        for ops in self.k.klp_ops.values():
            order = [self.k.klp_patches.index(func.patch) for func in ops.func_stack if func.patch]
            assert order == sorted(order, reverse=True)
            assert len(order) == len(ops.func_stack) == len(set(order))

    def teardown(self) -> None:
        """Liveness: when everybody leaves, every transition ends, every patch can be taken back."""
        if not hasattr(self, "k"):
            return
        for task in self.tasks:
            task.stack.clear()
            resume(task)
            if task.kind is Kind.USER:
                exit_to_user_mode(self.k, task)
        assert self.machine.execute(Settle(limit=3)) == "done"
        for patch in reversed(list(self.k.klp_patches)):
            assert self.machine.execute(Write(patch.name, "enabled", "0")) == 0
            assert self.machine.execute(Settle(limit=3)) == "done"
        assert self.k.klp_patches == []
        assert self.k.klp_ops == {}
        assert sysfs.view(self.k) == {}
        for name in list(self.k.modules):
            result = delete_module(self.k, name)
            assert result == 0 or (self.was_forced and result == -11)


class Forced(Livepatching):
    """The same with an administrator who forces transitions: old and new code may mix, nothing else may."""

    forces = True


def ignore_transition(_k: Kernel, ops: Ops, _current: Task) -> Function | None:
    """A wrong handler: it takes the top func whatever the task's state."""
    func = ops.func_stack[0]
    return None if func.nop else func.new_func


class Seeded(Livepatching):
    handler: ClassVar[Handler | None] = ignore_transition


LOOK = settings(STEADY, max_examples=150, stateful_step_count=40)
#: Ends with the first failure, as it was found.
FIRST = settings(LOOK, max_examples=300, report_multiple_bugs=False, phases=[Phase.generate])
TestLivepatching = Livepatching.TestCase
TestLivepatching.settings = LOOK
TestForced = Forced.TestCase
TestForced.settings = LOOK


def test_a_handler_that_ignores_transition_is_found() -> None:
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Seeded, settings=FIRST)


@STEADY
@given(
    transition=st.booleans(),
    state=st.sampled_from((UNPATCHED, PATCHED)),
    nops=st.lists(st.booleans(), min_size=1, max_size=3),
)
def test_the_explorers_handler_decides_as_the_models(transition: bool, state: int, nops: list[bool]) -> None:
    k = Kernel()
    old = k.text("f", None)
    stack = [Func("f", k.text("new_f", f"p{i}"), old_func=old, nop=nop) for i, nop in enumerate(nops)]
    stack[0].transition = transition
    ops, task = Ops(old, stack), Task(1, "t", patch_state=state)
    below = stack[1] if len(stack) > 1 else None
    assert klp_ftrace_handler(k, ops, task) is explore.choose(stack[0], transition, state, below)
    k.klp_ops[old.addr] = ops
    assert redirect(k, old, task) is (klp_ftrace_handler(k, ops, task) or old)


@STEADY
@given(patches=patch_decls(), sleeper=st.sampled_from(FUNCTIONS), line=st.sampled_from(sorted(LINES)))
def test_enabling_and_reversing_leaves_nothing_behind(
    patches: tuple[PatchDecl, ...], sleeper: str, line: str
) -> None:
    machine = Machine(Scenario("reverse", FUNCTIONS, patches, (), tasks=(TaskDecl("a"),)), LINES[line])
    assert machine.execute(Load("p0")) == 0
    assert machine.execute(Settle()) == "done"
    machine.execute(Enter("a", sleeper, wake=Wake.STAY))
    before = view(machine.k)
    assert machine.execute(Load("p1")) == 0
    if machine.k.klp_transition_patch is None:
        assert machine.execute(Write("p1", "enabled", "1")) == -22
        return
    assert machine.execute(Write("p1", "enabled", "0")) == 0
    assert machine.execute(Settle(limit=3)) == "done"
    assert machine.execute(Unload("p1")) == 0
    assert view(machine.k) == before


@STEADY
@given(patches=patch_decls(), order=st.permutations(range(3)))
def test_a_replacing_patch_is_left_alone(patches: tuple[PatchDecl, ...], order: list[int]) -> None:
    last = PatchDecl("p3", patches[3].objs, replace=True)
    machine = Machine(Scenario("replace", FUNCTIONS, (*patches[:3], last), ()))
    for i in (*order, 3):
        assert machine.execute(Load(f"p{i}")) == 0
        assert machine.execute(Settle(limit=3)) == "done"
    assert view(machine.k).patches == ("p3",)
    for stack in view(machine.k).stacks:
        assert [func.patch for func in stack.funcs] == ["p3"]
    assert all(machine.execute(Unload(f"p{i}")) == 0 for i in order if f"p{i}" in machine.k.modules)


class ShadowVariables(RuleBasedStateMachine):
    """The hash against a dictionary."""

    objects = st.integers(1, 6).map(lambda i: 0xFFFF888000000000 + i * 0x40)
    ids = st.integers(0, 3)

    def __init__(self) -> None:
        super().__init__()
        self.k = Kernel()
        self.known: dict[tuple[int, int], Shadow] = {}

    @rule(obj=objects, id_=ids, fails=st.booleans(), get=st.booleans())
    def alloc(self, obj: int, id_: int, fails: bool, get: bool) -> None:
        built: list[int] = []

        def ctor(_obj: int, shadow: Shadow, data: object) -> int:
            built.append(shadow.id)
            shadow.data = data
            return -22 if fails else 0

        there = self.known.get((obj, id_))
        function = klp_shadow_get_or_alloc if get else klp_shadow_alloc
        shadow = function(self.k, obj, id_, 8, ctor, 7)
        if there is not None:
            assert shadow is (there if get else None)
            assert built == []
        elif fails:
            assert shadow is None
            assert f"({-22})" in self.k.log[-1].text
        else:
            assert shadow is not None
            assert (shadow.data, built) == (7, [id_])
            self.known[obj, id_] = shadow

    @rule(obj=objects, id_=ids)
    def free(self, obj: int, id_: int) -> None:
        gone: list[Shadow] = []
        klp_shadow_free(self.k, obj, id_, lambda _obj, shadow: gone.append(shadow))
        there = self.known.pop((obj, id_), None)
        assert gone == ([there] if there else [])

    @rule(id_=ids)
    def free_all(self, id_: int) -> None:
        gone: list[int] = []
        klp_shadow_free_all(self.k, id_, lambda obj, _shadow: gone.append(obj))
        assert sorted(gone) == sorted(obj for obj, other in self.known if other == id_)
        self.known = {key: value for key, value in self.known.items() if key[1] != id_}

    @invariant()
    def one_variable_for_each_object_and_id(self) -> None:
        found = klp_shadows(self.k)
        assert {(shadow.obj, shadow.id) for shadow in found} == set(self.known)
        assert len(found) == len(self.known)
        for key, shadow in self.known.items():
            assert klp_shadow_get(self.k, *key) is shadow


TestShadowVariables = ShadowVariables.TestCase
TestShadowVariables.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
