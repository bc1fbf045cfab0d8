"""All interleavings of two patches with one and two tasks, and the faults that such a search must find."""

from __future__ import annotations

import pytest

from kmend.klp.explore import (
    Act,
    Choose,
    Move,
    Report,
    Setup,
    Universe,
    choose,
    explore,
    in_turn,
    nested,
)
from kmend.klp.line import LINE_6_1, LINE_6_12, Line
from kmend.klp.scenario import FuncDecl, Load, ObjectDecl, PatchDecl, Scenario, Step, Unload, Write
from kmend.klp.structs import Func, Function

BOTH = (ObjectDecl(None, (FuncDecl("f"), FuncDecl("g"))),)
ONLY_F = (ObjectDecl(None, (FuncDecl("f"),)),)
STACKED = Scenario("two patches", ("f", "g"), (PatchDecl("p1", BOTH), PatchDecl("p2", BOTH)), ())
REPLACED = Scenario(
    "a patch and its replacement",
    ("f", "g"),
    (PatchDecl("p1", BOTH), PatchDecl("p2", ONLY_F, replace=True)),
    (),
)
STACK_AND_BACK = (
    Load("p1"),
    Load("p2"),
    Write("p2", "enabled", "0"),
    Write("p1", "enabled", "0"),
    Unload("p2"),
    Unload("p1"),
)
REPLACE_AND_BACK = (Load("p1"), Load("p2"), Unload("p1"), Write("p2", "enabled", "0"), Unload("p2"))
REVERSE_TWICE = (Load("p1"), Write("p1", "enabled", "0"), Write("p1", "enabled", "1"), Unload("p1"))


def universe(*states: tuple[str, str]) -> Universe:
    """The versions of f and g in each whole state of the machine."""
    return Universe(tuple((("f", f), ("g", g)) for f, g in states))


WHOLE = universe(("vmlinux", "vmlinux"), ("p1", "p1"), ("p2", "p2"))
WHOLE_REPLACED = universe(("vmlinux", "vmlinux"), ("p1", "p1"), ("p2", "vmlinux"))
SLEEPER = nested("f", "g")


def ignore_transition(func: Func, _transition: bool, _state: int, _below: Func | None) -> Function | None:
    """The seeded bug: the handler takes the top func whatever the task's state."""
    return None if func.nop else func.new_func


def look(
    scenario: Scenario,
    control: tuple[Step, ...],
    universe_: Universe,
    tasks: int = 1,
    *,
    line: Line = LINE_6_1,
    program: tuple[Move, ...] = SLEEPER,
    decide: Choose = choose,
    per_call: bool = False,
    waits: bool = True,
) -> Report:
    setup = Setup(scenario, control, (program,) * tasks, universe_, line, decide, per_call, waits)
    return explore(setup)


@pytest.mark.parametrize("line", [LINE_6_1, LINE_6_12], ids=["6.1", "6.12"])
@pytest.mark.parametrize(
    ("scenario", "control", "whole", "least"),
    [
        (STACKED, STACK_AND_BACK, WHOLE, 2500),
        (REPLACED, REPLACE_AND_BACK, WHOLE_REPLACED, 1500),
        (STACKED, REVERSE_TWICE, WHOLE, 800),
    ],
    ids=["stack", "replace", "reverse"],
)
def test_one_task_and_two_patches(
    scenario: Scenario, control: tuple[Step, ...], whole: Universe, least: int, line: Line
) -> None:
    report = look(scenario, control, whole, line=line)
    assert report.violations == ()
    assert report.complete
    assert report.states > least


def test_two_tasks_and_two_patches(capsys: pytest.CaptureFixture[str]) -> None:
    report = look(STACKED, STACK_AND_BACK[:3], WHOLE, 2)
    with capsys.disabled():
        print(f"\n2 tasks, 2 patches: {report.states} states, {report.steps} steps, all invariants hold")
    assert report.violations == ()
    assert report.complete
    assert report.states > 15000


def test_a_handler_that_ignores_transition_is_found() -> None:
    report = look(STACKED, (Load("p1"),), WHOLE, decide=ignore_transition)
    assert len(report.violations) == 1
    assert "mixes {'f': 'vmlinux', 'g': 'p1'}" in report.violations[0].what
    assert any("reads its state 0: p1" in step for step in report.violations[0].schedule)
    # it also lets a task enter code whose module may go at once
    report = look(
        STACKED, (*STACK_AND_BACK[:1], *STACK_AND_BACK[3:4], Unload("p1")), WHOLE, decide=ignore_transition
    )
    assert report.violations


def test_without_the_kernels_waits_a_task_enters_code_that_is_gone() -> None:
    """klp_synchronize_transition() and unregister_ftrace_function() wait for CPUs inside of the handler."""
    report = look(STACKED, STACK_AND_BACK, WHOLE, waits=False)
    assert [violation.what for violation in report.violations] == ["t1 runs new_f of a module that is gone"]


def test_forcing_breaks_the_consistency_and_nothing_else() -> None:
    control = (Load("p1"), Write("p1", "force", "1"))
    report = look(STACKED, control, WHOLE)
    assert "mixes" in report.violations[0].what
    anything = Universe((tuple((f, v) for f in "fg" for v in ("vmlinux", "p1", "p2")),))
    for back in ((Write("p1", "enabled", "0"), Unload("p1")), (Load("p2"), Unload("p1"))):
        report = look(REPLACED, (*control, *back), anything)
        assert report.violations == ()
        assert report.complete


def test_a_call_that_sleeps_between_two_functions_may_see_both_versions() -> None:
    """The kernel promises the stack, not the system call: the author of a patch has to know.

    A task that sleeps where no function of the patch is on its stack is switched there.
    """
    sleeps = in_turn("f", "g", sleep_between=True)
    report = look(STACKED, (Load("p1"),), WHOLE, program=sleeps, per_call=True)
    assert "mixes {'f': 'vmlinux', 'g': 'p1'}" in report.violations[0].what
    stays = in_turn("f", "g", sleep_between=False)
    report = look(STACKED, STACK_AND_BACK, WHOLE, program=stays, per_call=True)
    assert report.violations == ()
    assert report.complete


def test_a_search_that_is_cut_short_says_so() -> None:
    setup = Setup(STACKED, STACK_AND_BACK, (SLEEPER,) * 2, WHOLE)
    report = explore(setup, limit=500)
    assert not report.complete
    assert report.violations == ()
    assert 500 <= report.states < 1000


def test_programs_read_as_they_are_meant() -> None:
    assert [move.act for move in SLEEPER] == [
        Act.CALL,
        Act.SLEEP,
        Act.CALL,
        Act.RETURN,
        Act.RETURN,
        Act.EXIT,
    ]
