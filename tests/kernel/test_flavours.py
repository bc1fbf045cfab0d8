"""Other flavours than the plain one: the same proof and the same trial.

A cloud kernel in the normal run; the real-time kernels, 250 MB and 2 GB of disk each, with ``-m slow``.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from kmend.cli import main
from kmend.core.config import Config
from kmend.core.progress import Silent
from kmend.core.target import Linkage, Release, Target, Unit
from kmend.diff.select import is_init
from kmend.diff.special import SpecialSections
from kmend.diff.unit import UnitObject
from kmend.kernel import compile as compiling
from kmend.kernel import kbuild, store
from kmend.verify.symbols import Prover
from kmend.view import TargetView

pytestmark = [pytest.mark.target, pytest.mark.lab]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CLOUD = "6.1.0-56-cloud-amd64"
#: The newest real-time kernels whose source package lies in every mirror.
REALTIME = ("6.1.0-53-rt-amd64", "6.12.107+deb12-rt-amd64")
FLAVOURS = [CLOUD, *(pytest.param(release, marks=pytest.mark.slow) for release in REALTIME)]
#: Where the real-time patches change most.
RT_UNITS = ("kernel/locking/rtmutex_api.c", "kernel/locking/spinlock_rt.c", "kernel/printk/printk.c")
UNITS = 8


@pytest.fixture(scope="module", params=FLAVOURS)
def flavour(config: Config, request: pytest.FixtureRequest) -> Target:
    return store.fetch(config, Release(request.param), Silent())


def prover(
    config: Config, target: Target, view: TargetView, unit: Unit, *flags: str
) -> tuple[Prover, UnitObject]:
    command = kbuild.commands(target, [unit])[unit]
    made = compiling.original(config, target, unit, command, extra_flags=flags)
    parsed = UnitObject.parse(made.path.read_bytes(), unit.obj)
    return Prover(view.world(), unit.owner, parsed, SpecialSections(parsed)), parsed


def test_random_units_are_the_shipped_code(
    config: Config, flavour: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every function of them, but for a weak one, which another file's takes the place of."""
    view = TargetView(config, flavour)
    unit_map = kbuild.unit_map(flavour)
    units = [u for u in unit_map.all_units() if u.source.endswith(".c") and u.linkage is not Linkage.LIBRARY]
    chosen = random.Random(1).sample(units, UNITS)
    if "-rt-" in flavour.release:
        chosen += [unit for unit in units if unit.source in RT_UNITS]
        assert len(chosen) == UNITS + len(RT_UNITS)
    functions, differ = 0, []
    for unit in chosen:
        first, parsed = prover(config, flavour, view, unit, *compiling.SPLIT_SECTIONS)
        again: tuple[Prover, UnitObject] | None = None
        for part in parsed.functions():
            if is_init(parsed.section_of(part)):
                continue
            functions += 1
            if first.function(part) is None:
                continue
            # docs/decisions/0005: as the kernel itself was compiled
            again = again or prover(config, flavour, view, unit)
            if again[0].function(again[1].parts[part.name]) is not None:
                differ.append(f"{unit.obj} {part.name}")
    with capsys.disabled():
        print(f"\n{flavour.release}: {functions} functions of {len(chosen)} units, {len(differ)} differ")
    assert functions > 50
    assert differ == []


def test_a_change_is_built_and_tried(
    flavour: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cloud kernel has no 9p: its guests get drivers built from its source."""
    status = main(["build", str(EXAMPLES / "cmdline.patch"), "--kernel", flavour.release, "-o", str(tmp_path),
                   "--json", "--quiet"])  # fmt: skip
    built = json.loads(capsys.readouterr().out)
    assert (status, built["result"]) == (0, "built")
    assert built["verified"]["identical"] == built["verified"]["functions"] == 1
    status = main(["try", built["module"], "--run", str(EXAMPLES / "cmdline-check.sh"), "--json", "--quiet"])
    verdict = json.loads(capsys.readouterr().out)
    assert (status, verdict["result"]) == (0, "passed")
    assert "kmend=1" in verdict["patched"]["runs"][0]["stdout"]
    assert verdict["patched"]["oopses"] == []
    assert verdict["patches"][0]["gone"] is True
    drivers = flavour.folder / "lab-drivers"
    made = sorted(path.name for path in drivers.glob("*.ko"))
    assert made == (["9p.ko", "9pnet.ko", "9pnet_virtio.ko"] if "-cloud-" in flavour.release else [])


def test_a_real_time_kernel_says_so(flavour: Target) -> None:
    rt = "-rt-" in flavour.release
    assert ("PREEMPT_RT" in flavour.version.split()) is rt
    names = [row["name"] for row in store.record_of(flavour)["packages"]]  # type: ignore[attr-defined]  # JSON
    assert any(name.endswith(".debian.tar.xz") for name in names) is rt
    assert (flavour.source / "localversion-rt").exists() is rt
    release = flavour.source / "include/generated/utsrelease.h"
    assert f'"{flavour.release}"' in release.read_text()
