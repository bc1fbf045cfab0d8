"""Reading a live kernel's files: trees as the kernel shows them, odd ones, and files that vanish."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from kmend.core.errors import KmendError, Refused, Unable
from kmend.core.live import Cause, Frame, LiveFunction, LiveObject, LivePatch, Phase, Task
from kmend.report import live as rendering
from kmend.runtime import blockers, journal, klog
from kmend.runtime.blockers import Explainer
from kmend.runtime.journal import Journal, Who, acting
from kmend.runtime.kernel_state import build_id, read_kernel
from kmend.runtime.observe import observe
from kmend.runtime.patches import parse_note, read_left, read_module, read_patches
from kmend.runtime.place import Place, text
from kmend.runtime.tasks import parse_stack, read_task, sweep

ME = Who("root", "admin", 4711, "kmend load x.ko")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty machine with livepatch support."""
    roots = Place(tmp_path / "sys", tmp_path / "proc", tmp_path / "dev", tmp_path / "run")
    roots.livepatch.mkdir(parents=True)
    (roots.sys / "module").mkdir()
    roots.run.mkdir()
    write(roots.proc / "sys/kernel/osrelease", "6.1.0-55-amd64")
    write(roots.proc / "sys/kernel/random/boot_id", "b00t")
    write(roots.proc / "sys/kernel/tainted", "36864")
    write(roots.proc / "modules", "")
    return roots


def write(path: Path, contents: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(contents + "\n")


def add_patch(place: Place, name: str, functions: list[str], enabled: int = 1, transition: int = 0) -> None:
    """A patch as sysfs shows it; the newest module is the first in /proc/modules."""
    folder = place.livepatch / name
    write(folder / "enabled", str(enabled))
    write(folder / "transition", str(transition))
    write(folder / "vmlinux/patched", "1")
    for function in functions:
        (folder / "vmlinux" / function).mkdir()
    add_module(place, name)


def add_module(place: Place, name: str, taint: str = "OEK", references: int = 1) -> None:
    write(place.module(name) / "initstate", "live")
    write(place.module(name) / "refcnt", str(references))
    write(place.module(name) / "taint", taint)
    (place.module(name) / "holders").mkdir()
    modules = place.proc / "modules"
    modules.write_text(f"{name} 16384 1 - Live 0x0 (OEK)\n" + modules.read_text())


def add_task(place: Place, pid: int, name: str, patch_state: int, stack: str = "", **more: str) -> None:
    folder = place.proc / str(pid) / "task" / str(pid)
    state, flags = more.pop("state", "S"), more.pop("flags", "4194304")
    write(folder / "stat", f"{pid} ({name}) {state} 1 1 1 0 -1 {flags} 0 0")
    write(folder / "patch_state", str(patch_state))
    write(folder / "stack", stack)
    write(folder / "status", f"Name:\t{name}\nTracerPid:\t{more.pop('tracer', '0')}\nNSpid:\t{pid}")
    write(place.proc / str(pid) / "comm", name)
    for key, value in more.items():
        write(folder / key, value)


def test_patches_are_stacked_in_the_order_in_which_their_modules_came(place: Place) -> None:
    add_patch(place, "zeta", ["a,1", "b,2"])
    add_patch(place, "alpha", ["a,1"])
    lower, upper = read_patches(place)
    assert (lower.name, lower.order, upper.name, upper.order) == ("zeta", 1, "alpha", 2)
    assert lower.objects[0].functions == (LiveFunction("a", 1, "alpha"), LiveFunction("b", 2))
    assert upper.objects[0].functions == (LiveFunction("a", 1),)
    assert not upper.order_shown


def test_the_kernels_own_stack_order_counts_where_it_is_shown(place: Place) -> None:
    add_patch(place, "first", ["a,1"])
    add_patch(place, "second", ["a,1"])
    write(place.livepatch / "first/stack_order", "2")
    write(place.livepatch / "second/stack_order", "1")
    write(place.livepatch / "first/replace", "1")
    rows = read_patches(place, {"second": True})
    assert [(row.name, row.order_shown, row.replace) for row in rows] == [
        ("second", True, True),
        ("first", True, True),
    ]


@pytest.mark.parametrize(
    ("enabled", "transition", "initstate", "phase"),
    [
        (1, 0, "live", Phase.ENABLED),
        (1, 1, "coming", Phase.PATCHING),
        (0, 1, "live", Phase.UNPATCHING),
        (0, 0, "live", Phase.DISABLED),
        (0, 0, "coming", Phase.COMING),
    ],
)
def test_phases(place: Place, enabled: int, transition: int, initstate: str, phase: Phase) -> None:
    add_patch(place, "one", ["a,1"], enabled, transition)
    write(place.module("one") / "initstate", initstate)
    assert read_patches(place)[0].phase is phase


def test_what_vanishes_or_is_odd_is_left_out(place: Place) -> None:
    add_patch(place, "stays", ["a,1", ",1", "b,x"])
    (place.livepatch / "went").mkdir()  # its files are gone already
    write(place.livepatch / "stray-file", "1")
    rows = read_patches(place)
    assert [row.name for row in rows] == ["stays"]
    assert [f.name for f in rows[0].objects[0].functions] == ["a"]
    assert text(place.sys / "not/there") is None


def test_modules_that_a_patch_left_behind_are_found(place: Place) -> None:
    add_patch(place, "enabled", ["a,1"])
    add_module(place, "replaced", references=0)
    add_module(place, "driver", taint="OE")
    left = read_left(place, read_patches(place))
    assert [(row.name, row.phase, row.module and row.module.references) for row in left] == [
        ("replaced", Phase.LEFT, 0)
    ]


def test_the_note_of_kmend_is_read_from_the_loaded_module(place: Place) -> None:
    add_patch(place, "built", ["a,1"])
    body = json.dumps({"kmend": "0.1", "title": "a fix"}).encode()
    note = struct.pack("<III", 6, len(body), 1) + b"kmend\0\0\0" + body
    path = place.module("built") / "notes/.note.kmend"
    path.parent.mkdir()
    path.write_bytes(note)
    module = read_module(place, "built")
    assert module is not None
    assert module.note["title"] == "a fix"
    assert len(module.identity) == 64
    path.write_bytes(note.replace(b"fix", b"fox"))
    other = read_module(place, "built")
    assert other is not None
    assert other.identity != module.identity
    assert parse_note(b"short") == {}
    assert parse_note(struct.pack("<III", 4, 3, 1) + b"GNU\0" + b"{{{") == {}


def test_only_tasks_that_have_not_switched_are_pending(place: Place) -> None:
    add_task(place, 10, "done", 1)
    add_task(place, 11, "waits", 0)
    add_task(place, 12, "none", -1)
    (place.proc / "13").mkdir()  # ended while it was looked at
    (place.proc / "13/task").mkdir()
    seen = sweep(place, 1)
    assert (seen.tasks, seen.pending, seen.unreadable) == (3, ((11, 11),), 0)
    assert sweep(place, 0).pending == ((10, 10),)
    assert read_task(place, 13, 13) is None


def test_a_name_with_parentheses_does_not_confuse(place: Place) -> None:
    add_task(place, 20, "a) R (b", 0, state="D")
    task = read_task(place, 20, 20)
    assert task is not None
    assert (task.name, task.state, task.kthread) == ("a) R (b", "D", False)


def test_stacks_of_old_and_new_kernels() -> None:
    shown = "[<0>] pipe_read+0x2a/0x3b0\n[<ffffffff8110>] fix_read+0x1/0x2 [fix]\n[<0>] 0xffffffff\n"
    assert parse_stack(shown) == (Frame("pipe_read", 0x2A), Frame("fix_read", 1, "fix"))
    assert parse_stack("") == ()


def patch(name: str, phase: Phase, order: int, *functions: str) -> LivePatch:
    rows = tuple(LiveFunction(f, 1) for f in functions)
    return LivePatch(name, phase, None, order, False, (LiveObject("vmlinux", True, rows),), None)


def task(*stack: str, state: str = "S", kthread: bool = False, tracer: int = 0) -> Task:
    frames = parse_stack("\n".join(f"[<0>] {line}" for line in stack))
    return Task(5, 5, "t", "t", state, kthread, 0, frames, tracer=tracer)


READ = "pipe_read+0x1/0x9"


@pytest.mark.parametrize(
    ("who", "cause", "function", "wakeable"),
    [
        (task(READ), Cause.IN_FUNCTION, "pipe_read", True),
        (task("vfs_read+0x1/0x2"), Cause.UNRELIABLE, "", False),
        (task(READ, state="D"), Cause.UNINTERRUPTIBLE, "pipe_read", False),
        (task(READ, state="R"), Cause.RUNNING, "pipe_read", False),
        (task(READ, state="T"), Cause.STOPPED, "pipe_read", False),
        (task(READ, state="t", tracer=9), Cause.TRACED, "pipe_read", False),
        (task(READ, kthread=True), Cause.KTHREAD, "pipe_read", False),
        (task(READ, kthread=True, state="R"), Cause.KTHREAD_RUNNING, "pipe_read", False),
        (task("io_cqring_wait+0x1/0x2", READ), Cause.IO_URING, "pipe_read", False),
        (replace(task(READ), io_worker=True), Cause.IO_URING, "pipe_read", False),
        (task("do_freezer_trap+0x1/0x2", READ), Cause.FROZEN, "pipe_read", False),
        (task("kernel_clone+0x1/0x2", READ, state="D"), Cause.VFORK, "pipe_read", False),
        (
            task("percpu_down_write+0x1/0x2", "kernel_clone+0x1/0x2", READ, state="D"),
            Cause.UNINTERRUPTIBLE,
            "pipe_read",
            False,
        ),
        (task("get_signal+0x1/0x2", READ), Cause.FROZEN, "pipe_read", False),
        (task(state="Z"), Cause.ENDED, "", False),
        (task(), Cause.UNKNOWN, "", False),
    ],
)
def test_every_cause_is_told_apart(
    place: Place, who: Task, cause: Cause, function: str, wakeable: bool
) -> None:
    one = patch("fix", Phase.PATCHING, 1, "pipe_read")
    found = Explainer.of(place, one, [one]).explain(who)
    assert (found.cause, found.function, found.wakeable) == (cause, function, wakeable)
    assert found.why
    assert found.remedy


def test_with_a_patch_below_it_is_that_patchs_code_which_holds_up(place: Place) -> None:
    lower, upper = patch("old", Phase.ENABLED, 1, "f"), patch("new", Phase.PATCHING, 2, "f")
    explain = Explainer.of(place, upper, [lower, upper]).explain
    assert explain(task("f+0x1/0x2 [old]")).function == "f"
    assert explain(task("f+0x1/0x2")).function == ""


def test_unpatching_waits_for_the_patchs_own_code(place: Place) -> None:
    one = patch("fix", Phase.UNPATCHING, 1, "f")
    explain = Explainer.of(place, one, [one]).explain
    assert explain(task("inner+0x1/0x2", "f+0x1/0x2 [fix]")).function == "f"
    assert explain(task("livepatch_f+0x1/0x2 [fix]")).function == "livepatch_f"
    assert explain(task("f+0x1/0x2")).function == ""


def test_an_alias_on_the_stack_is_the_same_function(place: Place) -> None:
    write(
        place.proc / "kallsyms",
        "ffffffff81000010 T __x64_sys_getppid\nffffffff81000010 t __do_sys_getppid\n"
        "ffffffff81000020 t other\nffffffffc0000010 t __do_sys_getppid\t[module]",
    )
    one = patch("fix", Phase.PATCHING, 1, "__x64_sys_getppid")
    explain = Explainer.of(place, one, [one]).explain
    assert explain(task("__do_sys_getppid+0x5/0x20")).function == "__x64_sys_getppid"
    assert explain(task("other+0x5/0x20")).function == ""
    write(place.proc / "kallsyms", "0 T __x64_sys_getppid\n0 t __do_sys_getppid")  # kptr_restrict
    assert Explainer.of(place, one, [one]).explain(task("__do_sys_getppid+0x5/0x20")).function == ""


def test_a_transition_with_its_blockers_in_text_and_json(place: Place, tmp_path: Path) -> None:
    add_patch(place, "fix", ["pipe_read,1"], 1, 1)
    add_task(place, 30, "reader", 0, "[<0>] pipe_read+0x1/0x9")
    add_task(place, 31, "other", 1)
    write(place.proc / "self/patch_state", "1")
    seen = observe(place, tmp_path / "state")
    assert seen.transition is not None
    assert (seen.transition.left, seen.transition.tasks) == (1, 2)
    lines = list(rendering.blockers_text(seen.transition))
    assert lines[0] == "patching fix: 1 of 2 tasks left"
    assert "30 (reader) sleeps inside pipe_read()" in lines[1]
    document = rendering.transition_document(seen.transition)
    assert document is not None
    assert json.loads(json.dumps(document))["blockers"][0]["stack"] == ["pipe_read+0x1"]
    assert [flag.letter for flag in seen.kernel.taints] == ["O", "K"]


def test_a_kernel_without_livepatch(tmp_path: Path) -> None:
    (tmp_path / "sys/kernel").mkdir(parents=True)
    with pytest.raises(Unable) as error:
        observe(Place(tmp_path / "sys", tmp_path / "proc", tmp_path, tmp_path), tmp_path)
    assert error.value.rule == "no-livepatch"
    assert error.value.exit_status == 3


def test_the_build_id_is_found_among_other_notes(place: Place) -> None:
    xen = struct.pack("<III", 4, 5, 3) + b"Xen\0" + b"12345\0\0\0"
    gnu = struct.pack("<III", 4, 20, 3) + b"GNU\0" + bytes(range(20))
    assert build_id(xen + gnu) == bytes(range(20)).hex()
    assert build_id(xen) == ""
    assert build_id(b"\1") == ""
    write(place.sys / "kernel/security/lockdown", "none [integrity] confidentiality")
    assert read_kernel(place).lockdown == "integrity"


def test_a_kernel_record() -> None:
    row = klog.parse_record("4,339,5140900,-;livepatch: a\\x0ab\n SUBSYSTEM=acpi\n")
    assert row is not None
    assert (row.number, row.message.seconds, row.message.level) == (339, 5.1409, 4)
    assert row.message.text == "livepatch: a\nb"
    assert not row.message.user
    assert klog.parse_record("nonsense") is None
    told = klog.parse_record("12,1,2,-;livepatch: not the kernel's word")
    assert told is not None
    assert klog.concerning([row, told]) == (row,)


# -- journal ---------------------------------------------------------------------------------------


def test_a_killed_action_is_found_by_the_next(place: Place, tmp_path: Path) -> None:
    book = Journal(tmp_path / "state", "b00t")
    done = book.begin("load", "one", ME, "from one.ko", {"replace": True})
    done.end("done", "patched")
    done.end("failed", "a second end is not written")
    book.begin("load", "two", ME, "from two.ko", {})
    Journal(tmp_path / "state", "former boot").begin("load", "three", ME, "", {})
    records = book.records()
    assert [row.patch for row in journal.unfinished(records, "b00t")] == ["two"]
    assert journal.replacing(records, "b00t") == {"one": True}
    assert [row.event for row in records if row.patch == "one"] == ["begin", "end"]
    assert records[0].user == "admin"
    seen = observe(place, tmp_path / "state")
    assert [row.patch for row in seen.unfinished] == ["two"]
    with acting(place, "load two"):  # somebody acts: it may be that very action
        assert observe(place, tmp_path / "state").unfinished == ()
        mine = observe(place, tmp_path / "state", holding=True)
        assert [row.patch for row in mine.unfinished] == ["two"]


def test_a_journal_that_was_read_is_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    original = journal._parsed

    def counted(line: str) -> journal.Record | None:
        parsed.append(line)
        return original(line)

    monkeypatch.setattr(journal, "_parsed", counted)
    book = Journal(tmp_path, "b")
    for name in ("one", "two"):
        book.begin("load", name, ME, "", {})
        assert [row.patch for row in book.records()][-1] == name
    assert len(parsed) == 2
    with book.path.open("ab") as file:
        file.write(b'{"schema":1,"torn')
    assert [row.patch for row in book.records()] == ["one", "two"]
    # another file of that name, be it longer, is read from its beginning
    moved = book.path.rename(tmp_path / "log.1")
    for name in ("a", "b", "c"):
        book.begin("load", name, ME, "", {})
    assert [row.patch for row in Journal(tmp_path, "b").records()] == ["a", "b", "c"]
    moved.rename(book.path)
    book.begin("load", "three", ME, "", {})
    assert [row.patch for row in book.records()] == ["one", "two", "three"]


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    book = Journal(tmp_path, "b")
    book.begin("load", "one", ME, "", {})
    with book.path.open("ab") as file:
        file.write(b'{"schema": 1, "time": 17')
    book.begin("load", "two", ME, "", {})
    assert [row.patch for row in book.records()] == ["one", "two"]
    assert book.path.read_bytes().count(b"\n") == 3


def test_a_journal_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    book = Journal(tmp_path / "file", "b")
    book.begin("unload", "one", ME, "", {}).end("done", "")
    assert "file" in book.trouble
    assert book.records() == ()


def test_only_one_acts_at_a_time(place: Place) -> None:
    with acting(place, "load one"):
        assert not journal.is_free(place)
        with pytest.raises(Refused) as error, acting(place, "unload two"):
            pass
        assert error.value.rule == "busy"
        assert f"load one, process {os.getpid()}" in error.value.what
    assert journal.is_free(place)
    with acting(place, "again"):
        pass


def test_a_lock_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(KmendError) as error, acting(Place(run=tmp_path / "absent"), "load"):
        pass
    assert error.value.rule == "unwritable"


def test_waits_are_named_by_the_stack() -> None:
    assert blockers.waits_for(task("io_schedule+0x1/0x2")) == "a disk (io_schedule)"
    assert blockers.waits_for(task("x+0x1/0x2")) == ""
