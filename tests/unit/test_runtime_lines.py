"""Livepatches as each line of kernels shows them: whole trees, read, and what `status` and `list` say.

What came when (Documentation/ABI/testing/sysfs-kernel-livepatch): ``function,sympos`` 4.5, ``transition``
and ``patch_state`` 4.12, ``force`` and ``signal`` 4.15, no ``signal`` and no disabled patches 5.1,
``patched`` 6.1, ``replace`` 6.11, ``stack_order`` 6.14.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kmend.cli import main, status
from kmend.core.live import LiveFunction, LiveObject, LivePatch, Phase
from kmend.runtime import observe, place, tasks
from kmend.runtime.patches import read_left, read_patches
from kmend.runtime.place import Place

F = "cmdline_proc_show"
Say = Callable[[], tuple[str, str]]


@pytest.fixture
def kernel(tmp_path: Path) -> Place:
    """A machine with livepatch support and no patch."""
    roots = Place(tmp_path / "sys", tmp_path / "proc", tmp_path / "dev", tmp_path / "run")
    for folder in (roots.livepatch, roots.modules, roots.run, roots.proc / "self"):
        folder.mkdir(parents=True)
    (roots.proc / "modules").touch()
    return roots


@pytest.fixture
def say(
    kernel: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Say:
    """The text of ``kmend status`` about patches, and that of ``kmend list``."""

    def texts() -> tuple[str, str]:
        monkeypatch.setattr(place, "Place", lambda: kernel)
        monkeypatch.setenv("KMEND_STATE", str(tmp_path / "state"))
        assert main(["list"]) == 0
        seen = observe.observe(kernel, tmp_path / "state")
        return "\n".join(status.lines(seen)), capsys.readouterr().out

    return texts


def add(kernel: Place, name: str, *shown: str) -> None:
    """A patch. Of what is shown ``a=b`` is a file with its contents, the rest are folders."""
    folder = kernel.livepatch / name
    for row in shown:
        path, is_file, contents = row.partition("=")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if is_file:
            (folder / path).write_text(f"{contents}\n")
        else:
            (folder / path).mkdir(parents=True)
    add_module(kernel, name)


def add_module(kernel: Place, name: str, references: int = 1) -> None:
    """The newest is the first in ``/proc/modules``."""
    module = kernel.module(name)
    (module / "holders").mkdir(parents=True)
    for key, value in (("initstate", "live"), ("refcnt", references), ("taint", "OEK")):
        (module / key).write_text(f"{value}\n")
    modules = kernel.proc / "modules"
    modules.write_text(f"{name} 16384 {references} - Live 0x0 (OEK)\n" + modules.read_text())


def read(kernel: Place) -> tuple[LivePatch, ...]:
    """Without the modules, which are the same in all lines."""
    return tuple(replace(row, module=None) for row in read_patches(kernel))


def vmlinux(patched: bool | None, *functions: LiveFunction) -> tuple[LiveObject, ...]:
    return (LiveObject("vmlinux", patched, functions),)


def columns(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


HEAD = ["ORDER", "NAME", "PHASE", "REPLACE", "FUNCTIONS", "OBJECTS", "CVES", "TITLE"]


def test_linux_4_4(kernel: Place, say: Say) -> None:
    """Functions by their plain names; no transition; a patch is in force as soon as it is enabled."""
    add(kernel, "one", "enabled=1", f"vmlinux/{F}", "vmlinux/meminfo_proc_show")
    add(kernel, "another", "enabled=1", f"vmlinux/{F}", "ext4/ext4_file_open")
    assert read(kernel) == (
        LivePatch(
            "one",
            Phase.ENABLED,
            None,
            1,
            False,
            vmlinux(None, LiveFunction(F, 0, "another"), LiveFunction("meminfo_proc_show", 0)),
            None,
        ),
        LivePatch(
            "another",
            Phase.ENABLED,
            None,
            2,
            False,
            (
                LiveObject("ext4", None, (LiveFunction("ext4_file_open", 0),)),
                *vmlinux(None, LiveFunction(F, 0)),
            ),
            None,
        ),
    )
    assert not tasks.supported(kernel)
    text, table = say()
    assert "#2 another: enabled\n     ext4: ext4_file_open\n     vmlinux: cmdline_proc_show\n" in text
    assert (
        "#1 one: enabled\n     vmlinux: cmdline_proc_show, meminfo_proc_show\n"
        "       shadowed by another: cmdline_proc_show"
    ) in text
    assert columns(table) == [
        HEAD,
        ["2", "another", "enabled", "-", "2", "ext4,vmlinux", "-", "-"],
        ["1", "one", "enabled", "-", "2", "vmlinux", "-", "-"],
    ]


def test_linux_4_12(kernel: Place, say: Say) -> None:
    """A transition, which nothing but time and the tasks themselves bring to its end."""
    add(kernel, "one", "enabled=1", "transition=1", f"vmlinux/{F},1", "vmlinux/c_start,3")
    (kernel.proc / "self/patch_state").write_text("1\n")
    objects = vmlinux(None, LiveFunction("c_start", 3), LiveFunction(F, 1))
    assert read(kernel) == (LivePatch("one", Phase.PATCHING, None, 1, False, objects, None),)
    text, table = say()
    assert "patching one: all 0 tasks have switched" in text
    assert "#1 one: patching\n     vmlinux: c_start,3, cmdline_proc_show" in text
    assert columns(table)[1] == ["1", "one", "patching", "-", "2", "vmlinux", "-", "-"]


def test_linux_5_0(kernel: Place, say: Say) -> None:
    """A patch that is disabled stays where it is; what is above or below it is in force."""
    files = ("transition=0", "force=", "signal=")
    add(kernel, "one", "enabled=1", *files, f"vmlinux/{F},1")
    add(kernel, "two", "enabled=0", *files, f"vmlinux/{F},1")
    (kernel.proc / "self/patch_state").write_text("-1\n")
    objects = vmlinux(None, LiveFunction(F, 1))
    assert read(kernel) == (
        LivePatch("one", Phase.ENABLED, None, 1, False, objects, None),
        LivePatch("two", Phase.DISABLED, None, 2, False, objects, None),
    )
    assert read_left(kernel, read_patches(kernel)) == ()
    text, table = say()
    assert "#2 two: disabled\n     vmlinux: cmdline_proc_show\n#1 one: enabled\n" in text
    assert "shadowed" not in text
    assert columns(table)[1:] == [
        ["2", "two", "disabled", "-", "1", "vmlinux", "-", "-"],
        ["1", "one", "enabled", "-", "1", "vmlinux", "-", "-"],
    ]


def test_linux_6_1(kernel: Place, say: Say) -> None:
    """A patch that is disabled goes, and leaves its module; objects say whether they are patched."""
    add(
        kernel,
        "one",
        *("enabled=1", "transition=0", "force="),
        *("vmlinux/patched=1", f"vmlinux/{F},1", "ext4/patched=0", "ext4/ext4_file_open,1"),
    )
    add_module(kernel, "old", references=0)
    (kernel.proc / "self/patch_state").write_text("-1\n")
    objects = (
        LiveObject("ext4", False, (LiveFunction("ext4_file_open", 1),)),
        LiveObject("vmlinux", True, (LiveFunction(F, 1),)),
    )
    assert read(kernel) == (LivePatch("one", Phase.ENABLED, None, 1, False, objects, None),)
    assert [(row.name, row.phase) for row in read_left(kernel, read_patches(kernel))] == [("old", Phase.LEFT)]
    text, table = say()
    assert "#1 one: enabled\n     ext4 (not loaded): ext4_file_open\n     vmlinux: cmdline_proc_show" in text
    assert "remove it with: kmend unload old" in text
    assert columns(table)[1:] == [
        ["1", "one", "enabled", "-", "2", "ext4,vmlinux", "-", "-"],
        ["-", "old", "left", "behind", "-", "-", "-", "-", "-"],
    ]


def test_linux_6_14(kernel: Place, say: Say) -> None:
    """The kernel says itself which is above which, and what replaces; whatever the order of the modules."""
    files = ("enabled=1", "transition=0", "force=", "vmlinux/patched=1", f"vmlinux/{F},1")
    add(kernel, "later", *files, "replace=0", "stack_order=2")
    add(kernel, "base", *files, "replace=1", "stack_order=1")
    (kernel.proc / "self/patch_state").write_text("-1\n")
    base = LivePatch("base", Phase.ENABLED, True, 1, True, vmlinux(True, LiveFunction(F, 1, "later")), None)
    later = LivePatch("later", Phase.ENABLED, False, 2, True, vmlinux(True, LiveFunction(F, 1)), None)
    assert read(kernel) == (base, later)
    text, table = say()
    assert text.index("#2 later: enabled\n") < text.index("#1 base: enabled, replaces all below\n")
    assert columns(table)[1:] == [
        ["2", "later", "enabled", "no", "1", "vmlinux", "-", "-"],
        ["1", "base", "enabled", "yes", "1", "vmlinux", "-", "-"],
    ]
