"""Patches by hand of a module that is not one of the kernel's own: its file stands in for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmend.core.config import Config
from kmend.core.errors import UsageError
from kmend.core.progress import Silent
from kmend.core.report import BuildReport, Outcome
from kmend.core.target import Target
from kmend.elf.model import SHN_LIVEPATCH
from kmend.elf.reader import read
from kmend.handmade import ModuleRequest, build_module
from kmend.view import TargetView

pytestmark = pytest.mark.target

OWN = """
#include <linux/module.h>
int level = 3;
noinline int measure(int by);
noinline int measure(int by) { return READ_ONCE(level) + by; }
static int get(char *buffer, const struct kernel_param *kp) { return sprintf(buffer, "%d\\n", measure(1)); }
static const struct kernel_param_ops ops = { .get = get };
module_param_cb(measured, &ops, NULL, 0444);
static int __init start(void) { return 0; }
static void __exit end(void) { }
module_init(start);
module_exit(end);
MODULE_LICENSE("GPL");
"""
PATCH = """
extern int level;
int livepatch_measure(int by) { return *(volatile int *)&level - by; }
"""


def made(folder: Path, name: str, code: str, toml: str, target: Target, config: Config) -> BuildReport:
    place = folder / name
    place.mkdir(exist_ok=True)
    (place / f"{name}.c").write_text(code)
    (place / "kmend.toml").write_text(toml)
    return build_module(ModuleRequest(place, target.release, folder / "out"), config, Silent())


def describing(name: str, file: str) -> str:
    return f'[[object]]\nname = "{name}"\nfile = "{file}"\n[[object.func]]\nold_name = "measure"\n'


def test_the_file_stands_in_for_the_module(
    target_56: Target, target_612: Target, config: Config, tmp_path: Path
) -> None:
    assert made(tmp_path, "gauge", OWN, "", target_56, config).result is Outcome.BUILT
    report = made(tmp_path, "fix", PATCH, describing("gauge", "../out/gauge.ko"), target_56, config)
    assert (report.result, report.refused) == (Outcome.BUILT, ())
    assert [row.rule for row in report.warnings] == ["foreign-object"]
    assert [(o.name, [f.name for f in o.functions]) for o in report.objects] == [("gauge", ["measure"])]
    data = Path(report.module or "").read_bytes()
    used = [s.name for s in read(data, "fix.ko").symbols if s.section == SHN_LIVEPATCH]
    assert ".klp.sym.gauge.level,0" in used

    # without the file nothing is known, and nothing guessed
    bare = made(tmp_path, "bare", PATCH, describing("gauge", ""), target_56, config)
    assert [row.rule for row in bare.refused] == ["unknown-module"]
    wrong = describing("gauge", "../out/gauge.ko").replace("measure", "mesure")
    assert made(tmp_path, "wrong", PATCH.replace("measure", "mesure"), wrong, target_56, config).refused
    for name, file, target, why in (
        ("gouge", "../out/gauge.ko", target_56, "it is the module 'gauge'"),
        ("gauge", "../out/gauge.ko", target_612, "vermagic"),
        ("gauge", "../out/absent.ko", target_56, "No such file"),
        ("gauge", "kmend.toml", target_56, "ELF"),
    ):
        with pytest.raises(UsageError) as error:
            made(tmp_path, "other", PATCH, describing(name, file), target, config)
        assert error.value.rule == "object-file"
        assert why in error.value.why

    # a check that has no such file says that it cannot tell, and objects to nothing
    checked = TargetView(config, target_56).check(data, "fix")
    assert checked.refusals == ()
    assert [row.rule for row in checked.warnings] == ["unknown-object"]
