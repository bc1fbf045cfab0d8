"""Planning a load: the tables as the kernel prints them, stacks, the model of a machine from its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmend.core.live import Cause, Frame, KernelState, LiveFunction, LiveObject, LivePatch, Phase
from kmend.core.plan import Leaves, Plan, StackEntry, Verdict
from kmend.core.progress import Silent
from kmend.diff.declared import CallbackKind
from kmend.elf.model import ElfFile
from kmend.examine import Examined
from kmend.module.describe import Description, FuncRow, ObjectFuncs
from kmend.plan import Planner
from kmend.report import plan as rendering
from kmend.runtime import probes
from kmend.runtime.frames import Seeker, Watched
from kmend.runtime.inside import looks
from kmend.runtime.observe import Seen
from kmend.runtime.place import Place
from kmend.runtime.preflight import ModuleFile
from kmend.runtime.symbols import SymbolTable

KSYMS = """\
ffffffff81000000 T _text
ffffffff81001000 t alpha
ffffffff81002000 t beta
ffffffff81003000 t twin
ffffffff81004000 t twin
ffffffff81005000 T __do_sys_call
ffffffff81005000 T __x64_sys_call
ffffffff81006000 t end
ffffffffc0001000 t in_module\t[mod]
ffffffffc0002000 t older_alpha\t[older]
"""
AVAILABLE = "alpha\nbeta\ntwin\ntwin\n__do_sys_call\nin_module [mod]\n"


def write(path: Path, contents: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(contents)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A machine with symbols, tracefs and debugfs; nothing is traced or probed."""
    roots = Place(tmp_path / "sys", tmp_path / "proc", tmp_path / "dev", tmp_path / "run")
    write(roots.proc / "kallsyms", KSYMS)
    write(roots.sys / "kernel/tracing/enabled_functions", "")
    write(roots.sys / "kernel/tracing/available_filter_functions", AVAILABLE)
    write(roots.sys / "kernel/debug/kprobes/list", "")
    write(roots.module("mod") / "initstate", "live\n")
    return roots


def add_task(place: Place, pid: int, name: str, stack: str, state: str = "S", flags: int = 0x400000) -> None:
    folder = place.proc / str(pid) / "task" / str(pid)
    write(folder / "stat", f"{pid} ({name}) {state} 1 1 1 0 -1 {flags} 0 0\n")
    write(place.proc / str(pid) / "stat", f"{pid} ({name}) {state} 1 1 1 0 -1 {flags} 0 0\n")
    write(folder / "stack", stack)
    write(place.proc / str(pid) / "comm", name + "\n")


def frames(*words: str) -> str:
    """A stack as /proc shows it, innermost first."""
    rows = []
    for word in words:
        name, _, module = word.partition(" ")
        rows.append(f"[<0>] {name}+0x10/0x80" + (f" {module}" if module else ""))
    return "".join(f"{row}\n" for row in rows)


def live(name: str, *functions: str, phase: Phase = Phase.ENABLED, order: int = 1) -> LivePatch:
    rows = tuple(LiveFunction(word, 1) for word in functions)
    return LivePatch(name, phase, False, order, False, (LiveObject("vmlinux", True, rows),), None)


# -- the kernel's tables ---------------------------------------------------------------------------


def test_ftrace_users_as_both_lines_of_kernels_print_them(place: Place) -> None:
    write(
        place.sys / "kernel/tracing/enabled_functions",
        "alpha (1) R I  \ttramp: 0xffffffffc02a7000 (klp_ftrace_handler+0x0/0x160) ->arch_ops+0x0/0x10\n"
        "in_module [mod] (2)    \n"
        "beta (1)     D    \n\tdirect-->bpf_trampoline_6442_1+0x0/0x5b\n"
        "twin (1) R I   O M \tops: klp_x+0x0/0x1 (klp_ftrace_handler+0x0/0x1)\n",
    )
    alpha, module, beta, twin = probes.read_traced(place) or ()
    assert (alpha.function, alpha.object, alpha.users) == ("alpha", "vmlinux", 1)
    assert alpha.flags == {"R", "I"}
    assert "klp_ftrace_handler" in alpha.called
    assert (module.function, module.object, module.users) == ("in_module", "mod", 2)
    assert module.flags == set()
    assert (beta.flags, beta.direct) == (frozenset("D"), "bpf_trampoline_6442_1")
    assert twin.flags == {"R", "I", "O", "M"}


def test_kprobes_as_the_kernel_lists_them(place: Place) -> None:
    write(
        place.sys / "kernel/debug/kprobes/list",
        "ffffffff81001000  k  alpha+0x0    [FTRACE]\n"
        "ffffffff81002014  r  beta+0x14    [OPTIMIZED]\n"
        "ffffffffc0001000  k  in_module+0x0  mod [DISABLED][FTRACE]\n"
        "0000000000000000  k  gone+0x0  old [GONE]\n"
        "ffffffff81003000  k  twin+0x0/0x80 \n",
    )
    rows = probes.read_probes(place) or ()
    assert [(r.function, r.offset, r.object, r.returning, r.disabled, r.ftrace) for r in rows] == [
        ("alpha", 0, "vmlinux", False, False, True),
        ("beta", 0x14, "vmlinux", True, False, False),
        ("in_module", 0, "mod", False, True, True),
        ("twin", 0, "vmlinux", False, False, False),
    ]


def test_bytes_that_kprobes_replace_are_found_by_address(place: Place) -> None:
    """Whatever name of the function the kernel prints: __x64_sys_getppid() is __do_sys_getppid() there."""
    write(
        place.sys / "kernel/debug/kprobes/list",
        "ffffffff81001010  k  __do_sys_getppid+0x10    \n"
        "ffffffff81001020  k  __do_sys_getppid+0x20    [OPTIMIZED]\n"
        "ffffffff81001030  k  __do_sys_getppid+0x30    [DISABLED]\n"
        "ffffffff8100103e  r  __do_sys_getppid+0x3e    [OPTIMIZED]\n"
        "ffffffff81002000  k  __x64_sys_getppid+0x0    \n"
        "0000000000000000  k  hidden+0x0    \n",
    )
    rows = probes.read_probes(place) or ()
    assert probes.replaced(rows, 0xFFFFFFFF81001000, 0x40) == {0x10, *range(0x20, 0x25), 0x3E, 0x3F}
    assert probes.replaced(rows, 0xFFFFFFFF81003000, 0x40) == set()


def hooks(
    place: Place, *functions: tuple[str, str, int], patches: tuple[LivePatch, ...] = ()
) -> probes.Hooks:
    table = SymbolTable(place)
    return probes.look(place, probes.entries(table, functions, patches), table)


def rules(found: probes.Hooks) -> tuple[list[str], list[str]]:
    return (
        [row.refusal.rule for row in found.checks if row.refusal is not None],
        [row.rule for row in found.warnings],
    )


ALPHA = ("vmlinux", "alpha", 0)


@pytest.mark.parametrize(
    ("enabled", "kprobes", "share", "refused", "warned"),
    [
        ("", "", True, [], []),
        ("alpha (1) R I  \n", "", True, ["ftrace-conflict"], []),
        ("alpha (1)      \n", "ffffffff81001000  k  alpha+0x0    [FTRACE]\n", True, [], []),
        (
            "alpha (1) R I  \n",
            "ffffffff81001000  k  alpha+0x0    [FTRACE]\n",
            True,
            ["ftrace-conflict"],
            [],
        ),
        ("", "ffffffff81001010  k  alpha+0x10    \n", True, [], ["probe-bypassed"]),
        ("", "ffffffff81001000  k  alpha+0x0    [DISABLED][FTRACE]\n", True, [], ["probe-disabled"]),
        ("alpha (1)     D\n\tdirect-->bpf_trampoline_1_1+0x0/0x5\n", "", True, [], ["bpf-trampoline"]),
        ("alpha (1)     D\n\tdirect-->bpf_trampoline_1_1+0x0/0x5\n", "", False, ["ftrace-conflict"], []),
        ("alpha (1)     D\n\tdirect-->my_tramp+0x0/0x5 [x]\n", "", True, ["ftrace-conflict"], []),
        ("beta (1) R I  \n", "ffffffff81002000  k  beta+0x0    [FTRACE]\n", True, [], []),
    ],
)
def test_what_excludes_a_livepatch(
    place: Place, enabled: str, kprobes: str, share: bool, refused: list[str], warned: list[str]
) -> None:
    write(place.sys / "kernel/tracing/enabled_functions", enabled)
    write(place.sys / "kernel/debug/kprobes/list", kprobes)
    if share:
        write(place.proc / "kallsyms", KSYMS + "ffffffff81007000 t bpf_tramp_ftrace_ops_func\n")
    found = hooks(place, ALPHA)
    assert rules(found) == (refused, warned)
    assert found.excluded == ({0xFFFFFFFF81001000} if refused else set())


def test_a_function_that_is_livepatched_already_excludes_nobody(place: Place) -> None:
    write(place.sys / "kernel/tracing/enabled_functions", "alpha (1) R I  \n")
    assert rules(hooks(place, ALPHA, patches=(live("older", "alpha"),))) == ([], [])


def test_of_namesakes_the_table_does_not_tell_which(place: Place) -> None:
    write(place.sys / "kernel/tracing/enabled_functions", "twin (1) R I  \n")
    assert rules(hooks(place, ("vmlinux", "twin", 2))) == ([], ["ftrace-ambiguous"])


def test_entries_are_known_by_the_first_alias(place: Place) -> None:
    assert rules(hooks(place, ("vmlinux", "__x64_sys_call", 0))) == ([], [])
    assert rules(hooks(place, ("vmlinux", "end", 0))) == (["no-ftrace-entry"], [])
    assert hooks(place, ("vmlinux", "end", 0)).entryless == {0xFFFFFFFF81006000}


def test_what_cannot_be_seen_is_said(tmp_path: Path) -> None:
    empty = Place(tmp_path / "sys", tmp_path / "proc")
    write(empty.proc / "kallsyms", KSYMS)
    found = hooks(empty, ALPHA)
    assert {row.name: row.passed for row in found.checks} == {
        "ftrace entries": None,
        "redirections": None,
        "probes": None,
    }


# -- looks -----------------------------------------------------------------------------------------

SEEKER = Seeker((Watched("alpha", "vmlinux", "vmlinux"),), {"older": frozenset({"beta"})})


def test_code_of_a_patch_whose_names_are_not_known_may_change() -> None:
    assert SEEKER.find((Frame("x", 1), Frame("alpha", 1), Frame("y", 1))) == (SEEKER.watched[0], 1, True)
    assert SEEKER.find((Frame("alpha", 1, "mod"),)) is None
    assert SEEKER.find((Frame("beta", 1, "older"),)) is None
    row, at, certain = SEEKER.find((Frame("x", 1), Frame("older_alpha", 1, "older"))) or (None, -1, True)
    assert row is not None
    assert (row.name, row.code, at, certain) == ("older_alpha", "older", 1, False)


def test_who_stays_and_who_comes_and_goes(place: Place) -> None:
    add_task(place, 10, "sleeper", frames("alpha", "do_syscall_64"))
    add_task(place, 11, "worker", frames("schedule", "alpha", "kthread", "ret_from_fork"), flags=0x200000)
    add_task(place, 12, "helper", frames("alpha", "process_one_work", "kthread"), flags=0x200000)
    add_task(place, 13, "disk", frames("io_schedule", "alpha"), state="D")
    add_task(place, 14, "visitor", frames("alpha"))
    add_task(place, 15, "elsewhere", frames("beta"))
    add_task(place, 16, "busy", "", state="R", flags=0x200000)
    add_task(place, 17, "gone", frames("alpha"))
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        write(place.proc / "14/task/14/stack", frames("beta"))
        (place.proc / "17/task/17/stat").unlink(missing_ok=True)

    found = looks(place, SEEKER, live("new", "alpha"), 3, clock=lambda: now[0], sleep=sleep)
    assert {row.blocker.task.name: (row.leaves, row.seen) for row in found.inside} == {
        "sleeper": (Leaves.SIGNAL, 3),
        "worker": (Leaves.NEVER, 3),
        "helper": (Leaves.EVENT, 3),
        "disk": (Leaves.EVENT, 3),
        "visitor": (Leaves.ITSELF, 1),
    }
    assert [(row.seconds, row.inside, row.running) for row in found.looks] == [
        (0.0, 6, 1),
        (0.5, 5, 1),
        (1.0, 5, 1),
    ]
    assert found.busy == ((16, "busy"),)
    causes = {row.blocker.task.name: row.blocker.cause for row in found.inside}
    assert (causes["sleeper"], causes["disk"]) == (Cause.IN_FUNCTION, Cause.UNINTERRUPTIBLE)


# -- the whole plan --------------------------------------------------------------------------------


def examined(
    *objects: ObjectFuncs, patches: tuple[LivePatch, ...] = (), replace: bool = False, ftrace: bool = True
) -> Examined:
    kernel = KernelState("6.1.0-55-amd64", "#1", "ab", "b", True, 0, (), False, "none", False, ftrace)
    file = ModuleFile("new.ko", "new", "6.1.0-55-amd64 SMP", "", (), False, "", "", None, replace)
    description = Description("new", "6.1.0-55-amd64 SMP", (), replace, objects or None, None)
    elf = ElfFile(62, 1, 0, (), ())
    return Examined(file, description, elf, Seen(kernel, patches, (), None, (), False), ())


def funcs(owner: str, *names: str, callbacks: tuple[CallbackKind, ...] = ()) -> ObjectFuncs:
    rows = tuple(FuncRow(name, 0, f"new_{name}") for name in names)
    return ObjectFuncs(owner, rows, tuple((kind, f"on_{kind.value}") for kind in callbacks))


def planned(place: Place, found: Examined) -> Plan:
    return Planner(place, Silent(), found, samples=1).plan()


def entry(*names: str) -> tuple[StackEntry, ...]:
    return tuple(StackEntry(name.removesuffix("*"), name.endswith("*")) for name in names)


def test_a_replacing_patch_with_callbacks_and_an_object_that_is_not_there(place: Place) -> None:
    both = (CallbackKind.PRE_PATCH, CallbackKind.POST_PATCH, CallbackKind.POST_UNPATCH)
    found = planned(
        place,
        examined(
            funcs("vmlinux", "alpha", callbacks=both),
            funcs("mod", "in_module", callbacks=both),
            funcs("absent", "x", callbacks=both),
            patches=(live("older", "alpha", "beta"),),
            replace=True,
        ),
    )
    assert (found.verdict, found.refused, found.number) == (Verdict.LOADS, (), 0)
    assert {row.function: (row.before, row.during, row.after) for row in found.stacks} == {
        "alpha": (entry("older"), entry("new", "older"), entry("new")),
        "beta": (entry("older"), entry("new*", "older"), ()),
        "in_module": ((), entry("new"), entry("new")),
    }
    assert (found.replaced, found.nops, found.late) == (("older",), (("vmlinux", "beta"),), ("absent",))
    assert [(row.kind, row.object) for row in found.callbacks] == [
        ("pre_patch", "vmlinux"),
        ("pre_patch", "mod"),
        ("post_patch", "vmlinux"),
        ("post_patch", "mod"),
    ]
    assert found.log[-1] == "livepatch: 'new': patching complete"
    text = rendering.to_text(found)
    assert "vmlinux:beta: older, original -> original" in text
    assert "1. pre_patch of vmlinux: on_pre_patch()" in text


def test_a_patch_on_top_of_another_leaves_it_there(place: Place) -> None:
    found = planned(place, examined(funcs("vmlinux", "alpha"), patches=(live("older", "alpha"),)))
    (row,) = found.stacks
    assert (row.before, row.after) == (entry("older"), entry("new", "older"))
    assert (found.replaced, found.nops) == ((), ())


@pytest.mark.parametrize(
    ("objects", "ftrace", "rule"),
    [
        ((funcs("vmlinux", "nowhere"),), True, "old-function"),
        ((funcs("vmlinux", "twin"),), True, "ambiguous-symbol"),
        ((funcs("vmlinux", "end"),), True, "no-ftrace-entry"),
        ((funcs("vmlinux", "alpha", "alpha"),), True, "function-twice"),
        ((funcs("vmlinux", "alpha"),), False, "ftrace-conflict"),
        ((), True, "unreadable-descriptors"),
    ],
)
def test_the_models_refusals_have_the_rules_of_the_kernels_own(
    place: Place, objects: tuple[ObjectFuncs, ...], ftrace: bool, rule: str
) -> None:
    found = planned(place, examined(*objects, ftrace=ftrace))
    assert (found.verdict, [row.rule for row in found.refused]) == (Verdict.REFUSED, [rule])
    assert not rendering.succeeded(found)
    assert all(row.before == row.after for row in found.stacks)


def test_another_transition_is_busy(place: Place) -> None:
    moving = live("older", "alpha", phase=Phase.PATCHING)
    found = planned(place, examined(funcs("vmlinux", "beta"), patches=(moving,)))
    assert (found.number, found.verdict) == (16, Verdict.REFUSED)
    assert [row.rule for row in found.refused] == ["transition-running"]


def test_how_long_it_takes(place: Place) -> None:
    found = planned(place, examined(funcs("vmlinux", "alpha")))
    assert found.forecast is not None
    assert found.forecast.woken is not None
    assert found.forecast.woken < 3
    add_task(place, 10, "sleeper", frames("alpha"))
    found = planned(place, examined(funcs("vmlinux", "alpha")))
    assert found.forecast is not None
    assert found.forecast.alone == pytest.approx(16, abs=1.5)
    assert found.forecast.woken is not None
    assert found.forecast.woken < 3
    assert found.verdict is Verdict.LOADS
    add_task(place, 11, "disk", frames("alpha"), state="D")
    found = planned(place, examined(funcs("vmlinux", "alpha")))
    assert found.forecast is not None
    assert (found.forecast.alone, found.forecast.woken) == (None, None)
    assert (found.verdict, [row.rule for row in found.warnings]) == (
        Verdict.STALLS,
        ["transition-would-stall"],
    )
    assert "11 (disk)" in found.warnings[0].why
    document = rendering.to_document(found)
    assert document["result"] == "would-stall"
    assert "no end in sight" in rendering.to_text(found)


def test_tasks_in_the_code_below_are_inside_too(place: Place) -> None:
    """A nop takes the older patch's function back: whoever is in that one holds it up."""
    add_task(place, 10, "in_older", frames("beta [older]"))
    add_task(place, 11, "in_image", frames("beta"))
    one = examined(funcs("vmlinux", "alpha"), patches=(live("older", "beta"),), replace=True)
    found = planned(place, one)
    assert found.forecast is not None
    assert [row.blocker.task.name for row in found.forecast.inside] == ["in_older"]
    assert found.forecast.alone == pytest.approx(16, abs=1.5)


def test_a_kernel_thread_that_always_runs_is_named(place: Place) -> None:
    add_task(place, 16, "busy", "", state="R", flags=0x200000)
    found = planned(place, examined(funcs("vmlinux", "alpha")))
    assert [row.rule for row in found.warnings] == ["thread-running"]
    assert "16 (busy)" in found.warnings[0].what
