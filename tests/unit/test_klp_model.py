"""What the model answers where a real kernel's answer is known (measured, or read in its source)."""

from __future__ import annotations

import dataclasses

import pytest

from kmend.core.errors import UsageError
from kmend.klp import sysfs
from kmend.klp.core import klp_enable_patch
from kmend.klp.ftrace import set_ftrace_enabled
from kmend.klp.line import DIFFERENCES, LINE_6_1, LINE_6_12, Feature, Line, line
from kmend.klp.module import delete_module, load_module
from kmend.klp.outcome import view
from kmend.klp.scenario import (
    ALL_CALLBACKS,
    Call,
    CallbackKind,
    Enter,
    FuncDecl,
    Leave,
    Load,
    Machine,
    ModuleDecl,
    ObjectDecl,
    Outcome,
    PatchDecl,
    Result,
    Scenario,
    Settle,
    Step,
    TaskDecl,
    Unload,
    Wait,
    Write,
    run,
)
from kmend.klp.sched import advance, call, cond_resched, fork, ret, seconds
from kmend.klp.shadow import klp_shadow_alloc, klp_shadow_get_or_alloc
from kmend.klp.state import klp_get_prev_state
from kmend.klp.structs import (
    DEBUG_FUNCTIONS,
    HZ,
    UNDEFINED,
    Callbacks,
    Frame,
    Func,
    Kernel,
    KernelHang,
    Kind,
    Module,
    Object,
    Patch,
    Shadow,
    Sleep,
    Wake,
)
from kmend.klp.transition import klp_copy_process, round_jiffies_relative

F = (ObjectDecl(None, (FuncDecl("f"),)),)
LATE = (ObjectDecl(None, (FuncDecl("f"),), ALL_CALLBACKS), ObjectDecl("m", (FuncDecl("mf"),), ALL_CALLBACKS))
EEXIST, EBUSY, EINVAL, EAGAIN, ENOENT = -17, -16, -22, -11, -2


def scenario(
    *steps: Step,
    patches: tuple[PatchDecl, ...] = (PatchDecl("p1", F), PatchDecl("p2", F)),
    tasks: tuple[TaskDecl, ...] = (TaskDecl("a"), TaskDecl("b")),
    cpus: int = 1,
) -> Scenario:
    modules = (ModuleDecl("m", ("mf",)), ModuleDecl("other"))
    return Scenario("test", ("f", "g"), patches, steps, modules, tasks, cpus)


def play(*steps: Step, line: Line = LINE_6_1, **more: object) -> Outcome:
    outcome = run(scenario(*steps, **more), line)  # type: ignore[arg-type]  # what scenario() takes
    assert outcome.warned == ()
    return outcome


def machine(**more: object) -> Machine:
    return Machine(scenario(**more), debug=DEBUG_FUNCTIONS)  # type: ignore[arg-type]  # as above


def says(outcome: Outcome) -> list[str]:
    """The log without pr_debug lines, as a kernel without dynamic debug prints it."""
    quiet = ("initializing", "completing", "canceling", "reversing")
    return [
        text.removeprefix("livepatch: ") for text in outcome.log if not any(word in text for word in quiet)
    ]


SLEEPS = Enter("a", "f", wake=Wake.STAY)


@pytest.mark.parametrize(
    ("steps", "results"),
    [
        ((Load("p1"), Load("p1")), (0, EEXIST)),
        ((SLEEPS, Load("p1"), Load("p2")), ("vmlinux", 0, EBUSY)),
        ((Load("p2"), SLEEPS, Load("p1"), Write("p2", "enabled", "0")), (0, "p2", 0, EBUSY)),
        ((Load("p1"), Write("p1", "enabled", "1")), (0, EINVAL)),
        ((Load("p1"), Write("p1", "enabled", "maybe")), (0, EINVAL)),
        ((Load("p1"), Write("p1", "force", "1")), (0, EINVAL)),
        ((Load("p1"), Write("p1", "force", "0")), (0, 0)),
        ((Load("p1"), Write("p1", "transition", "0")), (0, -13)),
        ((Write("p1", "enabled", "0"),), (ENOENT,)),
        ((Load("p1"), Unload("p1")), (0, EAGAIN)),
        ((SLEEPS, Load("p1"), Unload("p1")), ("vmlinux", 0, EAGAIN)),
        ((Unload("p1"),), (ENOENT,)),
        ((Load("p1"), Write("p1", "enabled", "0"), Write("p1", "enabled", "1")), (0, 0, ENOENT)),
        ((Call("a", "mf"), Load("m"), Call("a", "mf")), (ENOENT, 0, "m")),
        ((SLEEPS, Enter("a", "g"), Call("a", "g"), Leave("b")), ("vmlinux", EBUSY, EBUSY, ENOENT)),
    ],
)
def test_what_the_kernel_answers(steps: tuple[Step, ...], results: tuple[Result, ...]) -> None:
    assert play(*steps).results == results


def test_a_patch_from_load_to_unload() -> None:
    outcome = play(
        Load("p1"), Call("a", "f"), Write("p1", "enabled", "0"), Settle(), Call("a", "f"), Unload("p1")
    )
    assert outcome.results == (0, "p1", 0, "done", "vmlinux", 0)
    assert says(outcome) == [
        "enabling patch 'p1'",
        "'p1': starting patching transition",
        "'p1': patching complete",
        "'p1': starting unpatching transition",
        "'p1': unpatching complete",
    ]
    assert view(Machine(scenario()).k) == outcome.final


@pytest.mark.parametrize("force_at", ["patching", "unpatching", "replacing"])
def test_what_forcing_leaves_behind(force_at: str) -> None:
    """Forced patching leaves a removable module; forced unpatching and replacing pin one for good."""
    replacing = PatchDecl("p2", F, replace=True)
    match force_at:
        case "patching":
            steps: tuple[Step, ...] = (SLEEPS, Load("p1"), Write("p1", "force", "1"), Settle())
            steps += (Write("p1", "enabled", "0"), Settle(), Unload("p1"))
            expected = 0
        case "unpatching":
            steps = (
                Load("p1"),
                SLEEPS,
                Write("p1", "enabled", "0"),
                Write("p1", "force", "1"),
                Settle(),
                Unload("p1"),
            )
            expected = EAGAIN
        case _:
            steps = (Load("p1"), SLEEPS, Load("p2"), Write("p2", "force", "1"), Settle(), Unload("p1"))
            expected = EAGAIN
    outcome = play(*steps, patches=(PatchDecl("p1", F), replacing))
    assert outcome.results[-1] == expected
    assert "done" in outcome.results
    assert "forcing remaining tasks to the patched state" in says(outcome)


@pytest.mark.parametrize(
    ("obj", "errno", "text"),
    [
        ((FuncDecl("absent"),), EINVAL, "symbol 'absent' not found in symbol table"),
        ((FuncDecl("twice"),), EINVAL, "unresolvable ambiguity for symbol 'twice' in object '(null)'"),
        (
            (FuncDecl("twice", 3),),
            EINVAL,
            "symbol position 3 for symbol 'twice' in object 'vmlinux' not found",
        ),
        ((FuncDecl("twice", 2),), 0, "'p1': patching complete"),
        ((FuncDecl("notrace"),), EINVAL, "failed to find location for function 'notrace'"),
        ((FuncDecl("busy"),), EBUSY, "failed to register ftrace handler for function 'busy' (-16)"),
        ((FuncDecl("f"), FuncDecl("f", 1)), EEXIST, None),
    ],
)
def test_functions_that_cannot_be_patched(obj: tuple[FuncDecl, ...], errno: int, text: str | None) -> None:
    decl = PatchDecl("p1", (ObjectDecl(None, obj),))
    m = machine(patches=(decl,))
    symbols = m.k.kallsyms[None]
    symbols += [m.k.text("twice", None), m.k.text("twice", None), m.k.text("notrace", None, ftrace=False)]
    symbols.append(m.k.text("busy", None))
    m.k.ipmodify.add(symbols[-1].addr)
    before = view(m.k)
    assert m.execute(Load("p1")) == errno
    log = [message.text for message in m.k.log]
    if text is None:
        assert log == ["sysfs: cannot create duplicate filename '/kernel/livepatch/p1/vmlinux/f,1'"]
    else:
        assert f"livepatch: {text}" in log
    if errno:
        assert view(m.k) == before, "a load that fails leaves nothing behind"
        assert m.k.taint == 1 << 15, "but the taint"
    elif obj[0].old_sympos == 2:
        (ops,) = m.k.klp_ops.values()
        assert ops.old_func is symbols[-3], "the second of that name"
    if text and "location" in text:
        assert log[-6:] == [
            "livepatch: failed to find location for function 'notrace'",
            "livepatch: failed to patch object 'vmlinux'",
            "livepatch: failed to enable patch 'p1'",
            "livepatch: 'p1': canceling patching transition, going to unpatch",
            "livepatch: 'p1': completing unpatching transition",
            "livepatch: 'p1': unpatching complete",
        ]


def test_an_object_whose_second_function_fails_is_unpatched_again() -> None:
    m = machine(patches=(PatchDecl("p1", (ObjectDecl(None, (FuncDecl("f"), FuncDecl("notrace"))),)),))
    m.k.kallsyms[None].append(m.k.text("notrace", None, ftrace=False))
    assert m.execute(Load("p1")) == EINVAL
    assert m.k.klp_ops == {}
    assert m.execute(Call("a", "f")) == "vmlinux"


def test_a_module_without_the_livepatch_mark() -> None:
    k = Kernel()
    mod = Module("plain")
    patch = Patch(mod, [Object(None, [])])
    mod.init = lambda kernel, _mod: klp_enable_patch(kernel, patch)
    assert load_module(k, mod) == EINVAL
    assert k.log[-1].text == "livepatch: module plain is not marked as a livepatch module"
    assert k.modules == {}


def test_ftrace_cannot_be_switched_off_under_a_patch() -> None:
    m = machine()
    assert set_ftrace_enabled(m.k, False) == 0
    assert m.execute(Load("p1")) == EBUSY
    assert set_ftrace_enabled(m.k, True) == 0
    assert m.execute(Load("p1")) == 0
    assert set_ftrace_enabled(m.k, False) == EBUSY


# transitions and time


def length(*steps: Step, cpus: int = 1, tasks: tuple[TaskDecl, ...] = (TaskDecl("a"),)) -> float | None:
    """Seconds from "starting" to "complete" after the steps; None: not within 60 seconds."""
    m = machine(cpus=cpus, tasks=tasks)
    for step in steps:
        m.execute(step)
    began = m.k.jiffies
    assert m.execute(Load("p1")) == 0
    done = m.execute(Settle(limit=60))
    return (m.k.jiffies - began) / HZ if done == "done" else None


KTHREAD = (TaskDecl("kthread", Kind.KTHREAD),)


@pytest.mark.parametrize(
    ("steps", "cpus", "tasks", "low", "high"),
    [
        ((), 1, (TaskDecl("a"),), 0.0, 0.001),
        ((), 2, (TaskDecl("a"),), 0.5, 1.8),
        ((Enter("a", "f"),), 1, (TaskDecl("a"),), 15.0, 16.3),
        ((Enter("a", "f", wake=Wake.RETURN),), 1, (TaskDecl("a"),), 15.0, 16.3),
        ((Enter("a", "g"),), 1, (TaskDecl("a"),), 0.0, 0.001),
        ((Enter("kthread", "f", wake=Wake.RETURN),), 1, KTHREAD, 15.0, 16.5),
    ],
    ids=["idle-smp-1", "idle-smp-2", "restarted", "interrupted", "elsewhere", "kthread-that-leaves"],
)
def test_transitions_last_as_measured(
    steps: tuple[Step, ...], cpus: int, tasks: tuple[TaskDecl, ...], low: float, high: float
) -> None:
    took = length(*steps, cpus=cpus, tasks=tasks)
    assert took is not None
    assert low <= took <= high


@pytest.mark.parametrize(
    ("enter", "tasks"),
    [
        (Enter("a", "f", Sleep.UNINTERRUPTIBLE), (TaskDecl("a"),)),
        (Enter("a", "f", wake=Wake.STAY), (TaskDecl("a"),)),
        (Enter("kthread", "f", wake=Wake.RESTART), KTHREAD),
    ],
    ids=["uninterruptible", "vfork-parent", "kthread-that-comes-back-at-once"],
)
def test_sleepers_that_no_signal_moves(enter: Enter, tasks: tuple[TaskDecl, ...]) -> None:
    assert length(enter, tasks=tasks) is None


def test_fake_signals_come_at_the_fifteenth_retry_and_are_said_once() -> None:
    m = machine()
    m.execute(SLEEPS)
    m.execute(Load("p1"))
    m.execute(Wait(14.9))
    assert not any("signaling" in message.text for message in m.k.log)
    m.execute(Wait(31))
    (signal,) = [message for message in m.k.log if "signaling remaining tasks" in message.text]
    assert 15 * HZ <= signal.at <= 15.3 * HZ
    assert m.execute(Leave("a")) == "vmlinux"
    assert m.execute(Settle()) == "done"


def test_every_retry_says_who_holds_the_transition_up() -> None:
    m = machine(cpus=2)
    m.execute(SLEEPS)
    runner = fork(m.k, None, 300, "hog", Kind.KTHREAD)
    runner.cpu = 1
    broken = fork(m.k, None, 301, "jit")
    broken.reliable = False
    broken.stack = [Frame(m.k.kallsyms[None][1], m.k.kallsyms[None][1])]
    m.execute(Load("p1"))
    tries = [message.text for message in m.k.log if "klp_try_switch_task" in message.text]
    assert tries == [
        "livepatch: klp_try_switch_task: a:100 is sleeping on function f",
        "livepatch: klp_try_switch_task: hog:300 is running",
        "livepatch: klp_try_switch_task: jit:301 has an unreliable stack",
        "livepatch: klp_try_switch_task: swapper/1:0 is running",
    ]


def test_a_stack_that_fills_the_buffer_is_unreliable() -> None:
    """stack_trace_consume_entry() stops when the last of 100 entries is stored."""
    for depth, switched in ((99, True), (100, False)):
        m = machine()
        g = m.k.kallsyms[None][1]
        task = m.task("a")
        task.stack = [Frame(g, g)] * depth
        m.execute(Load("p1"))
        assert (m.k.klp_transition_patch is None) == switched


def test_a_cpu_that_is_offline_holds_nothing_up() -> None:
    m = machine(cpus=3)
    for idle in m.k.idle[1:]:
        idle.online = False
    m.execute(Load("p1"))
    assert m.k.klp_transition_patch is None


def test_a_child_starts_in_its_parents_state() -> None:
    m = machine()
    m.execute(SLEEPS)
    m.execute(Load("p1"))
    parent = m.task("a")
    child = fork(m.k, parent, 400, "child")
    assert (child.patch_state, child.tif_patch_pending) == (0, True)
    parent.tif_patch_pending = False
    klp_copy_process(parent, child)
    assert not child.tif_patch_pending


def test_cond_resched_switches_since_6_4_only_during_a_transition() -> None:
    for kernel, switched in ((LINE_6_1, False), (LINE_6_12, True)):
        m = Machine(scenario(cpus=2), kernel)
        runner = fork(m.k, None, 300, "hog", Kind.KTHREAD)
        runner.cpu = 0
        m.execute(Load("p1"))
        assert runner.patch_state == 0
        assert m.k.klp_cond_resched == switched
        cond_resched(m.k, runner)
        assert (runner.patch_state == 1) == switched
        runner.cpu = None
        assert m.execute(Settle(limit=3)) == "done"
        assert not m.k.klp_cond_resched


@pytest.mark.parametrize(
    ("now", "delay"), [(0, HZ), (10, HZ), (HZ // 4 - 1, HZ), (HZ // 4, HZ), (HZ - 1, HZ), (5, 3)]
)
def test_retries_fall_on_whole_seconds(now: int, delay: int) -> None:
    due = now + round_jiffies_relative(now, delay)
    assert due > now
    assert due % HZ == 0 or due == now + delay
    assert abs(due - (now + delay)) <= HZ


# modules that come and go


def test_a_module_that_comes_late_is_patched_and_reverted() -> None:
    outcome = play(
        Load("p1"),
        Call("a", "mf"),
        Load("m"),
        Call("a", "mf"),
        Unload("m"),
        patches=(PatchDecl("p1", LATE),),
    )
    assert outcome.results == (0, ENOENT, 0, "p1", 0)
    assert says(outcome)[4:] == [
        "'p1': patching complete",
        "applying patch 'p1' to loading module 'm'",
        "p1: pre_patch_callback: m",
        "p1: post_patch_callback: m",
        "p1: pre_unpatch_callback: m",
        "reverting patch 'p1' on unloading module 'm'",
        "p1: post_unpatch_callback: m",
    ]
    assert ("p1/m/patched", "0") in outcome.final.sysfs


def test_a_module_that_comes_during_a_transition_gets_old_and_new_code_like_the_rest() -> None:
    outcome = play(SLEEPS, Load("p1"), Load("m"), Call("b", "mf"), patches=(PatchDecl("p1", LATE),))
    assert outcome.results[-1] == "p1", "b is patched already"
    assert "p1: post_patch_callback: m" not in outcome.log, "it runs when the transition ends"
    (stack,) = [stack for stack in outcome.final.stacks if stack.function == "mf"]
    assert stack.funcs[0].transition


def test_a_module_that_one_patch_fails_on_is_refused_and_freed_of_the_others() -> None:
    failing = ObjectDecl("m", (FuncDecl("mf"),), ALL_CALLBACKS, pre_patch_ret=-19)
    lacking = ObjectDecl("m", (FuncDecl("not_there"),), ALL_CALLBACKS)
    for decl, errno, text in (
        (failing, -19, "pre-patch callback failed for object 'm'"),
        (lacking, EINVAL, "failed to initialize patch 'p2' for module 'm' (-22)"),
    ):
        outcome = play(
            Load("p1"), Load("p2"), Load("m"), patches=(PatchDecl("p1", LATE), PatchDecl("p2", (decl,)))
        )
        assert outcome.results == (0, 0, errno)
        assert text in says(outcome)
        assert says(outcome)[-4:] == [
            "patch 'p2' failed for module 'm', refusing to load module 'm'",
            "p1: pre_unpatch_callback: m",
            "reverting patch 'p1' on unloading module 'm'",
            "p1: post_unpatch_callback: m",
        ]
        assert "m" not in [module.name for module in outcome.final.modules]
        assert "mf" not in [stack.function for stack in outcome.final.stacks]


@pytest.mark.parametrize(("kernel", "second"), [(LINE_6_1, -8), (LINE_6_12, 0)])
def test_relocations_of_a_module_that_comes_again(kernel: Line, second: int) -> None:
    m = Machine(scenario(patches=(PatchDecl("p1", LATE),)), kernel)
    assert m.execute(Load("p1")) == 0
    (patch,) = m.k.klp_patches
    patch.objs[1].relocs = (("m", "mf", 0),)
    assert m.execute(Load("m")) == 0
    assert m.execute(Unload("m")) == 0
    assert m.execute(Load("m")) == second
    assert any("existing value is nonzero" in message.text for message in m.k.log) == bool(second)


@pytest.mark.parametrize("kernel", [LINE_6_1, LINE_6_12])
@pytest.mark.parametrize(("pre_patch_ret", "answers"), [(0, (0, 0, 0)), (-19, (-19, -2, -8))])
def test_a_module_that_kmend_builds_clears_them_when_its_object_goes(
    kernel: Line, pre_patch_ret: int, answers: tuple[int, ...]
) -> None:
    """Not when its own callback sends the object away: the kernel calls no callback of it then."""
    objs = (LATE[0], ObjectDecl("m", (FuncDecl("mf"),), ALL_CALLBACKS, pre_patch_ret, ("mark",)))
    modules = (ModuleDecl("m", ("mf",), ("mark",)),)
    m = Machine(dataclasses.replace(scenario(patches=(PatchDecl("p1", objs),)), modules=modules), kernel)
    assert m.execute(Load("p1")) == 0
    assert tuple(m.execute(step) for step in (Load("m"), Unload("m"), Load("m"))) == answers


def test_relocations_that_cannot_be_resolved_refuse_the_module() -> None:
    for reloc, text in (
        (("vmlinux", "g", 0), "invalid access to vmlinux symbol 'g' from module-specific"),
        (("m", "absent", 0), "symbol 'absent' not found in symbol table"),
    ):
        m = machine(patches=(PatchDecl("p1", LATE),))
        m.execute(Load("p1"))
        m.k.klp_patches[0].objs[1].relocs = (reloc,)
        assert m.execute(Load("m")) == EINVAL
        assert any(text in message.text for message in m.k.log)


# replace, states


def test_replacing_runs_no_callback_of_the_replaced_and_gives_functions_back() -> None:
    old = PatchDecl("p1", (ObjectDecl(None, (FuncDecl("f"), FuncDecl("g")), ALL_CALLBACKS),))
    new = PatchDecl("p2", F, replace=True)
    outcome = play(
        Load("p1"), Load("p2"), Call("a", "f"), Call("a", "g"), Wait(0.1), Unload("p1"), patches=(old, new)
    )
    assert outcome.results == (0, 0, "p2", "vmlinux", 0, 0)
    assert not any("unpatch_callback" in text for text in outcome.log)
    assert outcome.final.patches == ("p2",)


def test_nops_are_there_during_the_transition_only() -> None:
    old = PatchDecl("p1", (*F, ObjectDecl("m", (FuncDecl("mf"),))))
    new = PatchDecl("p2", F, replace=True)
    m = machine(patches=(old, new))
    m.execute(Load("m"))
    m.execute(Load("p1"))
    m.execute(SLEEPS)
    m.execute(Load("p2"))
    (nop,) = [stack.funcs for stack in view(m.k).stacks if stack.function == "mf"]
    assert [(func.patch, func.nop) for func in nop] == [("p2", True), ("p1", False)]
    assert "p2/m/mf,1" in sysfs.view(m.k)
    m.execute(Leave("a"))
    m.execute(Settle())
    assert [stack.function for stack in view(m.k).stacks] == ["f"]
    assert "p2/m" not in sysfs.view(m.k)


def test_states_decide_which_patch_may_follow() -> None:
    for states, replace, allowed in (
        (((1, 2),), True, True),
        (((1, 1),), True, False),
        ((), True, False),
        ((), False, True),
        (((1, 1),), False, False),
    ):
        outcome = play(
            Load("p1"),
            Load("p2"),
            patches=(PatchDecl("p1", F, states=((1, 2),)), PatchDecl("p2", F, replace, states)),
        )
        assert (outcome.results[1] == 0) == allowed
        text = "Livepatch patch (p2) is not compatible with the already installed livepatches."
        assert (text in says(outcome)) != allowed


def test_previous_states_are_only_known_in_a_transition() -> None:
    k = Kernel()
    assert klp_get_prev_state(k, 1) is None
    assert k.warned == ["klp_get_prev_state: no transition"]


def test_callbacks_of_a_reversed_transition() -> None:
    decl = PatchDecl("p1", (ObjectDecl(None, (FuncDecl("f"),), ALL_CALLBACKS),))
    outcome = play(SLEEPS, Load("p1"), Write("p1", "enabled", "0"), Settle(), patches=(decl,))
    assert [text for text in outcome.log if "callback" in text] == [
        "p1: pre_patch_callback: vmlinux",
        "p1: post_unpatch_callback: vmlinux",
    ]
    assert "livepatch: 'p1': reversing transition from patching to unpatching" in outcome.log


def test_a_failing_pre_patch_callback_is_the_only_one_that_runs() -> None:
    decl = PatchDecl("p1", (ObjectDecl(None, (FuncDecl("f"),), ALL_CALLBACKS, pre_patch_ret=-19),))
    outcome = play(Load("p1"), Call("a", "f"), patches=(decl,))
    assert outcome.results == (-19, "vmlinux")
    assert [text for text in outcome.log if "callback" in text] == [
        "p1: pre_patch_callback: vmlinux",
        "livepatch: pre-patch callback failed for object 'vmlinux'",
    ]


def test_an_object_without_some_callbacks() -> None:
    decl = PatchDecl("p1", (ObjectDecl(None, (FuncDecl("f"),), (CallbackKind.POST_PATCH,)),))
    outcome = play(Load("p1"), Write("p1", "enabled", "0"), Settle(), patches=(decl,))
    assert [text for text in outcome.log if "callback" in text] == ["p1: post_patch_callback: vmlinux"]


def test_a_callback_that_enables_a_patch_hangs_the_kernel() -> None:
    k = Kernel()
    inner = Patch(Module("inner", livepatch=True), [Object(None, [])])
    mod = Module("outer", livepatch=True)
    outer = Patch(
        mod, [Object(None, [], Callbacks(pre_patch=lambda kernel, _obj: klp_enable_patch(kernel, inner)))]
    )
    mod.init = lambda kernel, _mod: klp_enable_patch(kernel, outer)
    with pytest.raises(KernelHang) as caught:
        load_module(k, mod)
    assert caught.value.rule == "klp-hang"


def test_a_constructor_that_allocates_hangs_the_kernel() -> None:
    k = Kernel()

    def ctor(obj: int, _shadow: Shadow, _data: object) -> int:
        klp_shadow_alloc(k, obj, 2, 8)
        return 0

    with pytest.raises(KernelHang):
        klp_shadow_get_or_alloc(k, 0xFFFF888000000000, 1, 8, ctor)
    assert klp_shadow_alloc(k, 0xFFFF888000000000, 2, 8), "the lock was given back"


# sysfs


def test_sysfs_of_both_lines() -> None:
    for kernel in (LINE_6_1, LINE_6_12):
        m = Machine(scenario(patches=(PatchDecl("p1", LATE, replace=True),)), kernel)
        m.execute(Load("p1"))
        shown = sysfs.view(m.k)
        assert shown["p1"].rights == "drwxr-xr-x"
        assert (shown["p1/enabled"].rights, shown["p1/enabled"].value) == ("-rw-r--r--", "1")
        assert (shown["p1/force"].rights, shown["p1/force"].value) == ("--w-------", None)
        assert ("p1/replace" in shown) == kernel.has(Feature.REPLACE_ATTRIBUTE)
        assert shown["p1/m/patched"].value == "0"
        assert {"p1/vmlinux/f,1", "p1/m/mf,1"} <= set(shown)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, True) for text in ("1", "yes\n", "on", "On", "t", "1x")),
        *((text, False) for text in ("0\n", "No", "off", "false")),
        *((text, None) for text in ("", "2", "o", "\n", " 1")),
    ],
)
def test_kstrtobool(text: str, value: bool | None) -> None:
    assert sysfs.kstrtobool(text) is value


def test_the_folder_goes_after_the_transition_with_a_work() -> None:
    m = machine()
    m.execute(Load("p1"))
    assert m.perform(Write("p1", "enabled", "0")) == 0
    assert set(sysfs.view(m.k)) == {"p1", "p1/enabled", "p1/transition", "p1/force"}
    assert delete_module(m.k, "p1") == EAGAIN
    advance(m.k, 0)
    assert sysfs.view(m.k) == {}
    assert delete_module(m.k, "p1") == 0


# lines, scenarios


def test_lines_are_the_rows_of_a_table() -> None:
    assert LINE_6_1.features == frozenset()
    assert LINE_6_12.features == frozenset(Feature)
    assert line(6, 10).has(Feature.STATE_NAMES)
    assert not line(6, 10).has(Feature.REPLACE_ATTRIBUTE)
    assert LINE_6_12.state_names[0] == "KLP_TRANSITION_IDLE"
    assert LINE_6_1.state_names[0] == "KLP_UNDEFINED"
    assert all(len(row.commit) == 12 and row.effect for row in DIFFERENCES)


def test_scenarios_that_name_what_they_do_not_declare() -> None:
    for step in (Load("nobody"), Call("nobody", "f"), Call("a", "nothing")):
        with pytest.raises(UsageError) as caught:
            play(step)
        assert caught.value.rule == "klp-scenario"


def test_the_handler_at_the_edges() -> None:
    """An empty stack and a task without a state cannot be; the kernel warns."""
    m = machine()
    m.execute(Load("p1"))
    (ops,) = m.k.klp_ops.values()
    task = m.task("a")
    ops.func_stack[0].transition = True
    assert task.patch_state == UNDEFINED
    code = call(m.k, task, ops.old_func)
    assert code.module == "p1"
    assert m.k.warned == ["klp_ftrace_handler: patch_state undefined"]
    ret(task)
    ops.func_stack.clear()
    assert call(m.k, task, ops.old_func) is ops.old_func
    assert seconds(2) == 2 * HZ
    assert Func("f", old_func=ops.old_func).old_addr == ops.old_func.addr


def test_a_module_without_an_exit_function_stays() -> None:
    k = Kernel()
    assert load_module(k, Module("permanent", init=lambda _k, _mod: 0)) == 0
    assert delete_module(k, "permanent") == EBUSY
    assert load_module(k, Module("permanent")) == EEXIST
