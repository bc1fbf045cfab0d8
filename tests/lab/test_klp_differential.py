"""Random scenarios of live patching: the model and the real kernel do the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from klp_guest import (
    FUNCTIONS,
    MODULES,
    SYMBOLS,
    TASKS,
    Ground,
    Modules,
    ignore_transition,
    on_model,
    random_scenario,
    shrink,
)

from kmend.core.config import Config
from kmend.core.target import Target
from kmend.klp.line import LINES
from kmend.klp.scenario import (
    ALL_CALLBACKS,
    Call,
    Enter,
    FuncDecl,
    Leave,
    Load,
    ObjectDecl,
    PatchDecl,
    Scenario,
    TaskDecl,
    Unload,
    Wait,
    Write,
)
from kmend.klp.structs import Sleep, Wake

pytestmark = [pytest.mark.lab, pytest.mark.target, pytest.mark.slow]


#: Seeds among which are some (9, 28, 258, 259) in which a task calls a function while it is unpatched.
#: bench/klp_differential.py runs as many as one likes.
SEEDS = {"6.1": (1, 2, 3, 9, 28, 258, 259), "6.12": (4, 9, 28, 258)}


def late(pre_patch_ret: int) -> PatchDecl:
    """A patch of a module that comes later, with livepatch relocations for it."""
    obj = ObjectDecl("kd_late", (FuncDecl("kd_m"),), ALL_CALLBACKS, pre_patch_ret, SYMBOLS["kd_late"])
    return PatchDecl("p1", (obj,))


#: A module that goes and comes again is relocated anew in both lines: by the kernel, or by kmend's callback.
AGAIN = Scenario(
    "a module comes again",
    FUNCTIONS[None],
    (late(0),),
    (
        Load("p1"),
        Load("kd_late"),
        Call("a", "kd_m"),
        Unload("kd_late"),
        Load("kd_late"),
        Call("a", "kd_m"),
        Unload("kd_late"),
    ),
    MODULES,
    tuple(TaskDecl(name) for name in TASKS),
)
#: Neither clears what was relocated for a module that a failing callback has sent away: klp_module_coming()
#: takes back the patches before the one that failed.
REFUSED = replace(
    AGAIN,
    name="a module is refused twice",
    patches=(late(-19),),
    steps=(Load("p1"), Load("kd_late"), Load("kd_late"), Write("p1", "enabled", "0"), Load("kd_late")),
)


#: A sleeper that only the kernel's signals move, and one that they do not; then the way back is forced.
SIGNALS = Scenario(
    "signals and force",
    FUNCTIONS[None],
    (
        PatchDecl(
            "p1", (ObjectDecl("kd_base", (FuncDecl("kd_f"),), ALL_CALLBACKS, symbols=SYMBOLS["kd_base"]),)
        ),
    ),
    (
        Enter("a", "kd_f"),
        Enter("b", "kd_g", Sleep.UNINTERRUPTIBLE, Wake.STAY),
        Load("p1"),
        Wait(19),
        Leave("a"),
        Enter("a", "kd_f", Sleep.UNINTERRUPTIBLE, Wake.STAY),
        Write("p1", "enabled", "0"),
        Write("p1", "force", "1"),
        Unload("p1"),
        Leave("a"),
        Leave("b"),
    ),
    MODULES,
    tuple(TaskDecl(name) for name in TASKS),
)


@pytest.mark.parametrize(("release", "line"), [("55", "6.1"), ("612", "6.12")])
def test_random_scenarios_end_as_on_the_real_kernel(
    release: str, line: str, request: pytest.FixtureRequest, config: Config, tmp_path: Path
) -> None:
    target: Target = request.getfixturevalue(f"target_{release}")
    modules = Modules(target, config, tmp_path / "modules")
    seen = []
    with Ground(target, config.lab, modules) as ground:
        for seed in SEEDS[line]:
            scenario = random_scenario(seed)
            seen.append((scenario, ground.run(scenario)))
            if on_model(scenario, LINES[line]).differences(seen[-1][1]):
                least, found = shrink(ground, scenario, LINES[line])
                pytest.fail(f"{scenario.name}, {least.patches}, {least.steps}\n" + "\n".join(found))
        again, refused = ground.run(AGAIN), ground.run(REFUSED)
        # the last one: it leaves a module behind that can never go
        signalled = ground.run(SIGNALS)
    assert again.results == ("0", "0", "p1", "0", "0", "p1", "0")
    assert on_model(AGAIN, LINES[line]).differences(again) == []
    assert refused.results == ("0", "-19", "-8", "0", "0")
    assert on_model(REFUSED, LINES[line]).differences(refused) == []
    assert "livepatch: signaling remaining tasks" in signalled.log
    assert signalled.results == ("kd_base", "kd_base", "0", "0", "p1", "p1", "0", "0", "-11", "p1", "kd_base")
    assert on_model(SIGNALS, LINES[line]).differences(signalled) == []
    assert sum(len(observed.results) for _, observed in seen) == 11 * len(SEEDS[line])
    found_out = [
        scenario.name
        for scenario, observed in seen
        if on_model(scenario, LINES[line], ignore_transition).differences(observed)
    ]
    assert found_out, "no scenario tells a handler that ignores func->transition from the kernel's"
