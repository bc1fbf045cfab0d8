"""The safety analysis on real kernel code: threads, waiting system calls, callers in the image."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmend.core.config import Config
from kmend.core.errors import Refusal
from kmend.core.target import Target
from kmend.diff.compare import compare
from kmend.diff.select import select
from kmend.diff.unit import RefKind, UnitObject
from kmend.kernel import compile as compiling
from kmend.kernel import kbuild, overlay
from kmend.verify.callers import TargetCallers
from kmend.verify.safety import Review, ReviewUnit, review
from kmend.view import TargetView

pytestmark = pytest.mark.target


def changed(
    config: Config, target: Target, folder: Path, source: str, *edits: tuple[str, str]
) -> tuple[Review, set[str]]:
    """The review of one unit of the kernel with some text replaced; and which functions changed."""
    text = (target.source / source).read_text()
    for before, after in edits:
        assert text.count(before) == 1, (before, text.count(before))
        text = text.replace(before, after)
    (unit,) = kbuild.unit_map(target).units(source)
    command = kbuild.commands(target, [unit])[unit]
    tree = overlay.make_overlay(
        target.source, {source: text.encode()}, folder / "tree", also=[command.source]
    )
    flags = compiling.SPLIT_WITH_TYPES
    old = compiling.original(config, target, unit, command, extra_flags=flags)
    new = compiling.compile_unit(target, unit, command, tree=tree, out=folder / "out", extra_flags=flags)
    was, becomes = (UnitObject.parse(made.path.read_bytes(), unit.obj) for made in (old, new))
    selection = select(compare(was, becomes))
    names = {was.parts[row.original].name for row in selection.changed}
    return review([ReviewUnit(unit.owner, selection)]), names


def rows(found: tuple[Refusal, ...], rule: str) -> dict[str, str]:
    return {row.what: row.why for row in found if row.rule == rule}


@pytest.mark.parametrize(
    ("source", "edit", "name", "word"),
    [
        (
            "fs/jbd2/journal.c",
            ("\tjournal->j_task = current;\n", "\tjournal->j_task = current;\n\tcond_resched();\n"),
            "kjournald2",
            "started by jbd2_journal_load()",
        ),
        (
            "mm/vmscan.c",
            ("\ttsk->flags |= PF_MEMALLOC | PF_KSWAPD;\n", "\ttsk->flags |= PF_MEMALLOC | PF_KTHREAD;\n"),
            "kswapd",
            "started by kswapd_run()",
        ),
        (
            "kernel/kthread.c",
            ('\tset_task_comm(tsk, "kthreadd");\n', '\tset_task_comm(tsk, "kthreaddd");\n'),
            "kthreadd",
            "never returns",
        ),
    ],
)  # fmt: skip
def test_threads_of_the_kernel_never_leave(
    config: Config,
    target_56: Target,
    tmp_path: Path,
    source: str,
    edit: tuple[str, str],
    name: str,
    word: str,
) -> None:
    found, names = changed(config, target_56, tmp_path, source, edit)
    assert name in names
    refused = rows(found.refusals, "never-leaves")
    assert word in refused[name]
    assert set(refused) == {name}


def test_a_thread_is_known_in_the_6_12_line_too(config: Config, target_612: Target, tmp_path: Path) -> None:
    edit = ("\tjournal->j_task = current;\n", "\tjournal->j_task = current; cond_resched();\n")
    found, names = changed(config, target_612, tmp_path, "fs/jbd2/journal.c", edit)
    assert names == {"kjournald2"}
    assert set(rows(found.refusals, "never-leaves")) == names


def test_a_function_that_a_thread_calls_leaves(config: Config, target_56: Target, tmp_path: Path) -> None:
    """balance_pgdat() loops and asks kthread_should_stop() in its loop, but comes back to kswapd()."""
    edit = ("\n\tcount_vm_event(PAGEOUTRUN);\n", "\n\tcond_resched();\n\tcount_vm_event(PAGEOUTRUN);\n")
    found, names = changed(config, target_56, tmp_path, "mm/vmscan.c", edit)
    assert "balance_pgdat" in names
    assert found.refusals == ()


def test_a_thread_that_ends_leaves(config: Config, target_56: Target, tmp_path: Path) -> None:
    """do_exit() waits in a loop for a core dump and never returns: do_task_dead() ends the thread."""
    edit = ("\texit_signals(tsk);", "\tcond_resched();\n\texit_signals(tsk);")
    found, names = changed(config, target_56, tmp_path, "kernel/exit.c", edit)
    assert "do_exit" in names
    assert found.refusals == ()


def test_a_waiting_system_call_is_told(config: Config, target_56: Target, tmp_path: Path) -> None:
    edit = ("\tlockdep_assert_irqs_enabled();\n\n\tif (timeout", "\tcond_resched();\n\n\tif (timeout")
    found, names = changed(config, target_56, tmp_path, "fs/eventpoll.c", edit)
    assert names
    assert found.refusals == ()
    sleeps = rows(found.warnings, "may-sleep")
    assert set(sleeps) == names
    assert all("schedule_hrtimeout_range()" in why for why in sleeps.values())


def test_an_ordinary_fix_is_quiet(config: Config, target_56: Target, tmp_path: Path) -> None:
    edit = (
        "\tseq_puts(m, saved_command_line);\n",
        "\tseq_puts(m, saved_command_line);\n\tseq_putc(m, 'x');\n",
    )
    found, names = changed(config, target_56, tmp_path, "fs/proc/cmdline.c", edit)
    assert names == {"cmdline_proc_show"}
    assert found == Review()


@pytest.mark.parametrize("release", ["target_56", "target_612"])
def test_callers_in_the_image_are_those_that_relocations_name(
    config: Config, release: str, request: pytest.FixtureRequest
) -> None:
    """What the units' own relocations say is the oracle for what is read from the linked image."""
    target: Target = request.getfixturevalue(release)
    view = TargetView(config, target)
    callers = TargetCallers(view.image, view.symbols, view.optional_module)
    (unit,) = kbuild.unit_map(target).units("fs/read_write.c")
    command = kbuild.commands(target, [unit])[unit]
    made = compiling.original(config, target, unit, command)
    parsed = UnitObject.parse(made.path.read_bytes(), unit.obj)
    expected = set()
    for part in parsed.functions():
        for reloc in parsed.relocs(part):
            ref = parsed.ref(parsed.section_of(part), reloc)
            if ref.kind is RefKind.PART and ref.name == "vfs_read":
                expected.add(part.name)
    assert expected
    reached = callers.outside("vmlinux", "vfs_read")
    assert reached is not None
    named = {alias for name in reached.calls for alias in (name, *_aliases(view, name))}
    assert expected <= named
    assert reached.holders == ()
    # the table of sequence files' operations holds this one by its address, in many other units
    seq = callers.outside("vmlinux", "seq_lseek")
    assert seq is not None
    assert len(seq.holders) > 100
    ext4 = callers.outside("ext4", "ext4_file_getattr")
    assert ext4 is not None
    assert ext4.holders == ("ext4_file_inode_operations",)


def _aliases(view: TargetView, name: str) -> list[str]:
    return [row.name for symbol in view.symbols.named(name) for row in view.symbols.at(symbol.address)]
