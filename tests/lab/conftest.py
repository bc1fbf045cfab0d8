"""Livepatch modules written by hand and compiled against the target's tree: kmend's builder has no part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kmend.core.config import Config
from kmend.core.run import run
from kmend.core.target import Target
from kmend.lab.kernel import LabKernel
from kmend.lab.trial import TrialRequest

FRAME = """
#include <linux/delay.h>
#include <linux/fs.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>
{code}
static struct klp_func funcs[] = {{ {{ .old_name = "{old}", .new_func = replacement }}, {{ }} }};
static struct klp_object objs[] = {{ {{ {object} .funcs = funcs }}, {{ }} }};
static struct klp_patch patch = {{ .mod = THIS_MODULE, .objs = objs }};
static int __init start(void) {{ return klp_enable_patch(&patch); }}
static void __exit end(void) {{ }}
module_init(start);
module_exit(end);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
"""
SHOW = "static int replacement(struct seq_file *m, void *v) {{ {body} return 0; }}"
#: module, patched function, its object, the replacement
MODULES = {
    "lab_cmdline": ("cmdline_proc_show", "", SHOW.format(body='seq_puts(m, "from the patch kmend=1\\n");')),
    "lab_oops": ("cmdline_proc_show", "", SHOW.format(body="*(volatile int *)8 = 1;")),
    "lab_panic": ("cmdline_proc_show", "", SHOW.format(body='panic("from the patch");')),
    "lab_sleep": ("cmdline_proc_show", "", SHOW.format(body="ssleep(1000);")),
    "lab_absent": ("no_such_function", "", SHOW.format(body="")),
    "lab_ext4": (
        "ext4_sync_fs",
        '.name = "ext4",',
        "static int replacement(struct super_block *sb, int wait)"
        ' { pr_info("kmend: patched sync\\n"); return 0; }',
    ),
}


@pytest.fixture(scope="session")
def modules(target_55: Target, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The modules above by name, built once. ``make M=`` writes nothing into the target's tree."""
    folder = tmp_path_factory.mktemp("modules")
    for name, (old, object_, code) in MODULES.items():
        (folder / f"{name}.c").write_text(FRAME.format(code=code, old=old, object=object_))
    (folder / "Makefile").write_text("obj-m := " + " ".join(f"{name}.o" for name in MODULES) + "\n")
    run(
        ["make", "-s", "-C", target_55.source, f"M={folder}", f"CC={target_55.compiler}", "modules"],
        timeout=120,
    )
    return {name: folder / f"{name}.ko" for name in MODULES}


@pytest.fixture(scope="session")
def kernel_55(target_55: Target) -> LabKernel:
    return LabKernel.of(target_55)


Request = Callable[..., TrialRequest]


@pytest.fixture
def request_55(kernel_55: LabKernel, modules: dict[str, Path], config: Config, tmp_path: Path) -> Request:
    """A trial's request from module names and a script's text."""

    def make(*names: str, script: str | None = None, **more: object) -> TrialRequest:
        path = None
        if script is not None:
            path = tmp_path / "script.sh"
            path.write_text(f"#!/bin/sh\n{script}\n")
        fields: dict[str, object] = {
            "cache": config.lab,
            "script": path,
            "vmlinux": kernel_55.vmlinux,
            **more,
        }
        return TrialRequest(
            kernel_55.release,
            kernel_55.vmlinuz,
            kernel_55.modules,
            tuple(modules[name] for name in names),
            **fields,  # type: ignore[arg-type]  # tests pass what the field wants
        )

    return make
