"""Acting: answers of the kernel in words, waking without loss, following, checks before a load."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import syslog
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from kmend.core.errors import Refusal, Refused, Unable
from kmend.core.kmsg import KernelMessage
from kmend.core.live import ActionReport, End, KernelState, LivePatch, Phase, Result
from kmend.core.progress import Silent
from kmend.core.taint import decode
from kmend.report.action import succeeded, to_document, to_text
from kmend.runtime import act, answers, btf, journal, kcore, preflight, syscalls, wake
from kmend.runtime.follow import Follower, Patience
from kmend.runtime.observe import Seen
from kmend.runtime.place import Place
from kmend.runtime.preflight import ModuleFile, Wanted
from kmend.runtime.symbols import SymbolTable
from kmend.runtime.wake import Woken


def write(path: Path, contents: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(contents)


def said(*texts: str) -> tuple[KernelMessage, ...]:
    return tuple(KernelMessage(1.0, 4, text) for text in texts)


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "text", "rule", "word"),
    [
        (errno.EINVAL, "livepatch: symbol 'f' not found in symbol table", "old-function", "f()"),
        (
            errno.EINVAL,
            "livepatch: unresolvable ambiguity for symbol 'c_start' in object '(null)'",
            "ambiguous-symbol",
            "c_start()",
        ),
        (
            errno.EINVAL,
            "livepatch: symbol position 9 for symbol 'f' in object 'vmlinux' not found",
            "old-function",
            "position 9",
        ),
        (
            errno.EINVAL,
            "livepatch: failed to find location for function 'f'",
            "no-ftrace-entry",
            "f()",
        ),
        (
            errno.EBUSY,
            "livepatch: failed to register ftrace handler for function 'f' (-16)",
            "ftrace-conflict",
            "f()",
        ),
        (
            errno.EAGAIN,
            "livepatch: failed to register ftrace handler for function 'f' (-11)",
            "ftrace-race",
            "BPF program",
        ),
        (
            errno.ENODEV,
            "livepatch: pre-patch callback failed for object 'ext4'",
            "pre-patch-callback",
            "ext4",
        ),
        (errno.EKEYREJECTED, "Loading of unsigned module is rejected", "unsigned", "unsigned module"),
        (
            errno.EPERM,
            "Lockdown: kmend: unsigned module loading is restricted; see man kernel_lockdown.7",
            "lockdown",
            "restricted",
        ),
        (
            errno.ENOEXEC,
            "x: version magic '6.1.0-54-amd64 SMP ' should be '6.1.0-55-amd64 SMP '",
            "vermagic",
            "6.1.0-55",
        ),
        (
            errno.EINVAL,
            "x: disagrees about version of symbol module_layout",
            "symbol-version",
            "module_layout",
        ),
        (errno.ENOENT, "x: Unknown symbol foo (err -2)", "not-exported", "foo"),
        (
            errno.EEXIST,
            "sysfs: cannot create duplicate filename '/kernel/livepatch/x/vmlinux/f,1'",
            "function-twice",
            "vmlinux/f,1",
        ),
        (
            errno.ENOEXEC,
            "module: x86/modules: Skipping invalid relocation target, existing value is nonzero for type 1, "
            "loc 00000000c0ffee00, val ffffffffc0de",
            "relocation-field",
            "type 1",
        ),
        (
            errno.ENOEXEC,
            "module: x86/modules: Invalid relocation target, existing value is nonzero for type 2, loc 1, "
            "val 2",
            "relocation-field",
            "type 2",
        ),
        (
            errno.EINVAL,
            "livepatch: Livepatch patch (x) is not compatible with the already installed livepatches.",
            "incompatible-states",
            "states",
        ),
        (errno.EEXIST, "", "already-loaded", "EEXIST"),
        (errno.EBUSY, "", "transition-running", "EBUSY"),
        (errno.ENOMEM, "", "out-of-memory", "ENOMEM"),
        (errno.EBADMSG, "", "unsigned", "EBADMSG"),
        (errno.EIO, "something else", "kernel-refused", "something else"),
    ],
)
def test_every_answer_of_the_kernel_has_its_sentence(number: int, text: str, rule: str, word: str) -> None:
    row = answers.explain("x was not loaded", number, said(text) if text else (), "x")
    assert row.rule == rule
    assert word in f"{row.what} {row.why}"
    assert row.next_step
    assert errno.errorcode[number] in f"{row.what} {row.why}"


def test_what_the_kernel_says_of_another_module_is_not_the_reason() -> None:
    log = said("nouveau: Unknown symbol drm_foo (err -2)", "y: version magic 'a' should be 'b'")
    assert answers.explain("x", errno.EBUSY, log, "x").rule == "transition-running"
    assert answers.explain("x", errno.EBUSY, (*log, *said("x: Unknown symbol f (err -2)")), "x").rule == (
        "not-exported"
    )


def test_the_cause_counts_and_not_its_consequences() -> None:
    log = said(
        "livepatch: enabling patch 'x'",
        "livepatch: failed to find location for function 'f'",
        "livepatch: failed to patch object 'vmlinux'",
        "livepatch: failed to enable patch 'x'",
    )
    assert answers.explain("x", errno.EINVAL, log).rule == "no-ftrace-entry"
    user = (KernelMessage(1.0, 4, "livepatch: symbol 'f' not found in symbol table", user=True),)
    assert answers.explain("x", errno.EINVAL, user).rule == "kernel-refused"


# -- waking ----------------------------------------------------------------------------------------

SLEEPER = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: print("signal", flush=True))
print("ready", flush=True)
start = time.monotonic()
time.sleep(2)
print("slept", round(time.monotonic() - start, 1) >= 2, flush=True)
"""


def sleeper() -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def can_trace() -> bool:
    with subprocess.Popen(["sleep", "5"]) as child:
        woken = wake.interrupt([child.pid])
        child.kill()
    return not woken.failed


needs_ptrace = pytest.mark.skipif(not can_trace(), reason="this user may not trace other processes")


@needs_ptrace
def test_an_interrupted_task_does_not_notice() -> None:
    with sleeper() as child:
        time.sleep(0.2)
        for _ in range(3):
            woken = wake.interrupt([child.pid])
            assert woken.interrupted == [child.pid]
        os.kill(child.pid, signal.SIGUSR1)  # a signal of somebody else reaches it all the same
        wake.interrupt([child.pid])
        assert child.stdout is not None
        assert child.stdout.read() == "signal\nslept True\n"
        assert child.wait(5) == 0


@needs_ptrace
def test_a_stopped_task_stays_stopped_and_one_that_is_gone_is_no_error() -> None:
    with sleeper() as child:
        os.kill(child.pid, signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        wake.interrupt([child.pid])
        time.sleep(0.1)
        assert Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        child.kill()
    assert wake.interrupt([child.pid]) == Woken([child.pid], {})


def test_what_does_not_stop_is_let_go_at_the_deadline() -> None:
    calls: list[tuple[int, int, int]] = []

    def ptrace(request: int, tid: int, data: int) -> int:
        calls.append((request, tid, data))
        return errno.EPERM if tid == 3 else 0

    def waitid(tid: int) -> int | None:
        # 1: a signal is about to be delivered; 2: never stops; 4: has ended
        return {1: int(signal.SIGTERM), 2: None, 4: 0}[tid]

    board = wake.Board([1, 2, 3, 4])
    assert not wake._interrupt_all([1, 2, 3, 4], 0.02, board, ptrace, waitid)
    assert board.notes() == {
        1: wake.Said.INTERRUPTED,
        2: wake.Said.UNSTOPPED,
        3: wake.Said.REFUSED + errno.EPERM,
        4: wake.Said.INTERRUPTED,
    }
    assert (syscalls.PTRACE_DETACH, 1, signal.SIGTERM) in calls


# -- following -------------------------------------------------------------------------------------


class Kernel:
    """A patch's files as a kernel would change them over time: ``script`` at the given seconds.

    It says in its log when the patch's own files change (``None``: they go), not of a task that switches.
    """

    def __init__(self, place: Place, script: dict[float, dict[str, str] | None]) -> None:
        self.place, self.script, self.now = place, dict(sorted(script.items())), 0.0
        self.folder = place.livepatch / "fix"

    def clock(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        end = self.now + seconds
        said = [at for at, change in self.script.items() if at <= end and self._tells(change)]
        self.now = min(said, default=end)
        for at in [at for at in self.script if at <= self.now]:
            change = self.script.pop(at)
            if change is None:
                for name in ("enabled", "transition"):
                    (self.folder / name).unlink()
                continue
            for name, value in change.items():
                write(self.folder / name if "/" not in name else self.place.proc / name, value)
        return bool(said)

    @staticmethod
    def _tells(change: dict[str, str] | None) -> bool:
        return change is None or any("/" not in name for name in change)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    roots = Place(tmp_path / "sys", tmp_path / "proc", tmp_path / "dev", tmp_path / "run")
    write(roots.livepatch / "fix/enabled", "1\n")
    write(roots.livepatch / "fix/transition", "1\n")
    (roots.livepatch / "fix/vmlinux/f,1").mkdir(parents=True)
    write(roots.proc / "modules", "fix 1 1 - Live 0x0\n")
    write(roots.proc / "self/patch_state", "1\n")
    task = roots.proc / "7/task/7"
    write(task / "stat", "7 (reader) S 1 1 1 0 -1 0 0 0")
    write(task / "patch_state", "0\n")
    write(task / "stack", "[<0>] f+0x1/0x9\n")
    return roots


def follower(kernel: Kernel, goal: Phase, limit: float, woken: list[int]) -> Follower:
    def wake_up(tids: list[int]) -> Woken:
        woken.extend(tids)
        return Woken(list(tids), {})

    return Follower(
        kernel.place,
        "fix",
        goal,
        Patience(limit=limit),
        Silent(),
        wake=wake_up,
        clock=kernel.clock,
        wait=kernel.wait,
    )


def test_sleepers_are_woken_after_a_moment_and_the_end_is_seen(place: Place) -> None:
    woken: list[int] = []
    kernel = Kernel(place, {1.0: {"7/task/7/patch_state": "1\n"}, 1.4: {"transition": "0\n"}})
    found = follower(kernel, Phase.PATCHING, 60, woken).run()
    assert (found.end, woken) == (End.COMPLETE, [7])
    assert 1.3 < found.seconds < 1.6
    assert (found.samples[0].left, found.samples[-1].left) == (1, 0)
    assert Patience().before_waking <= found.steps[0].seconds < 0.5
    assert found.last is None


@pytest.mark.parametrize(
    ("goal", "change", "end"),
    [
        (Phase.PATCHING, {"enabled": "0\n"}, End.REVERSED),
        (Phase.PATCHING, None, End.GONE),
        (Phase.UNPATCHING, None, End.COMPLETE),
        (Phase.UNPATCHING, {"enabled": "1\n", "transition": "0\n"}, End.REVERSED),
    ],
)
def test_what_others_do_meanwhile_is_seen(
    place: Place, goal: Phase, change: dict[str, str] | None, end: End
) -> None:
    if goal is Phase.UNPATCHING:
        write(place.livepatch / "fix/enabled", "0\n")
    assert follower(Kernel(place, {0.5: change}), goal, 60, []).run().end is end


def test_a_stall_has_its_blockers_and_a_task_is_not_woken_over_and_over(place: Place) -> None:
    woken: list[int] = []
    found = follower(Kernel(place, {}), Phase.PATCHING, 4, woken).run()
    assert found.end is End.STALLED
    assert found.last is not None
    assert [row.task.name for row in found.last.blockers] == ["reader"]
    assert 2 <= len(woken) <= 4


def test_what_cannot_be_woken_is_told_once_while_it_is_waited_for(place: Place) -> None:
    write(place.proc / "7/task/7/stat", "7 (reader) D 1 1 1 0 -1 0 0 0")
    woken: list[int] = []
    told: list[str] = []
    one = follower(Kernel(place, {}), Phase.PATCHING, 8, woken)
    one.told = lambda step: told.append(step.text)
    found = one.run()
    assert (found.end, woken) == (End.STALLED, [])
    (step,) = found.steps
    assert 1.0 <= step.seconds < 2.0
    assert step.text.startswith("waits for 1 task: 7 (reader) sleeps uninterruptibly inside f()")
    assert (told, step.tids) == ([step.text], ())


def test_what_is_woken_at_the_limit_gets_the_kernels_next_retry(place: Place) -> None:
    """A limit that is over before anything would be woken."""
    woken: list[int] = []
    script: dict[float, dict[str, str] | None] = {
        1.0: {"7/task/7/patch_state": "1\n"},
        1.2: {"transition": "0\n"},
    }
    one = follower(Kernel(place, script), Phase.PATCHING, 0.3, woken)
    one.patience = replace(one.patience, before_waking=0.3)
    assert (one.run().end, woken) == (End.COMPLETE, [7])
    write(place.livepatch / "fix/transition", "1\n")
    write(place.proc / "7/task/7/patch_state", "0\n")
    one = follower(Kernel(place, {}), Phase.PATCHING, 0.3, woken)
    one.patience = replace(one.patience, before_waking=0.3)
    found = one.run()
    assert found.end is End.STALLED
    assert 1.7 < found.seconds < 2.2


def test_who_is_in_a_function_by_its_other_name_is_woken_after_those_whose_stacks_tell(place: Place) -> None:
    """Reading all symbols takes a while, in which the kernel's first retry may come."""
    write(place.proc / "kallsyms", "ffffffff81000010 T f\nffffffff81000010 t alias\n")
    for tid, frame in ((6, "alias"), (8, "f"), (9, "elsewhere")):
        task = place.proc / f"{tid}/task/{tid}"
        write(task / "stat", f"{tid} (reader) S 1 1 1 0 -1 0 0 0")
        write(task / "patch_state", "0\n")
        write(task / "stack", f"[<0>] {frame}+0x1/0x9\n")
    batches: list[tuple[list[int], bool]] = []

    def wake_up(tids: list[int]) -> Woken:
        batches.append((tids, one._knows_aliases()))
        return Woken(tids, {})

    one = follower(Kernel(place, {1.0: {"transition": "0\n"}}), Phase.PATCHING, 60, [])
    one.wake = wake_up
    found = one.run()
    assert batches == [([7, 8], False), ([6], True)]
    assert found.first is not None
    assert [(row.task.tid, row.function) for row in found.first.blockers] == [
        *((6, "f"), (7, "f"), (8, "f")),
        (9, ""),
    ]


def test_once_no_task_is_left_the_kernel_has_the_processor(place: Place) -> None:
    """Its retry then changes thousands of places in its own code: nothing is to get in its way."""
    write(place.proc / "7/task/7/patch_state", "1\n")
    kernel = Kernel(place, {9.0: {"transition": "0\n"}})
    waits: list[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return kernel.wait(seconds)

    one = follower(kernel, Phase.PATCHING, 60, [])
    one.wait = wait
    found = one.run()
    assert (found.end, len(waits) < 20) == (End.COMPLETE, True)
    assert [row.left for row in found.samples] == [0] * len(found.samples)
    gaps = [later.seconds - row.seconds for row, later in pairwise(found.samples)]
    assert len(gaps) == 3 and min(gaps) > 2


def test_the_kernels_word_is_followed_at_once(place: Place) -> None:
    """While it is silent there is one look in a second; its word brings closer ones."""
    kernel = Kernel(place, {5.03: {"transition": "0\n"}})
    write(place.proc / "7/task/7/patch_state", "1\n")

    def wait(seconds: float) -> bool:
        said = kernel.now < 5 < kernel.now + seconds
        kernel.wait(5.001 - kernel.now if said else seconds)
        return said

    one = follower(kernel, Phase.PATCHING, 60, [])
    one.wait = wait
    assert 5.03 <= one.run().seconds < 5.06


def test_of_a_long_wait_not_every_look_is_kept(place: Place) -> None:
    write(place.proc / "7/task/7/stat", "7 (reader) D 1 1 1 0 -1 0 0 0")
    script: dict[float, dict[str, str] | None] = {900.0: {"7/task/7/patch_state": "1\n", "transition": "0\n"}}
    found = follower(Kernel(place, script), Phase.PATCHING, math.inf, []).run()
    assert found.end is End.COMPLETE
    assert 200 < len(found.samples) < 1000
    assert [row.left for row in found.samples] == [1] * len(found.samples)
    gaps = [later.seconds - row.seconds for row, later in pairwise(found.samples)]
    assert max(gaps[:100]) < 0.4
    assert max(gaps) < 10


def test_when_all_tasks_have_switched_the_kernel_gets_more_time(place: Place) -> None:
    script: dict[float, dict[str, str] | None] = {
        1.0: {"7/task/7/patch_state": "1\n"},
        100.0: {"transition": "0\n"},
    }
    found = follower(Kernel(place, script), Phase.PATCHING, 4, []).run()
    assert found.end is End.COMPLETE
    assert found.seconds > 99
    # none is left, and none comes back: it is looked at no more often than the kernel does
    done = [row.seconds for row in found.samples if row.left == 0]
    assert len(done) > 20
    (at_the_limit,) = (later for at, later in pairwise(done) if later - at < 1.0)
    assert at_the_limit == pytest.approx(4.0, abs=0.1)
    write(place.livepatch / "fix/transition", "1\n")
    found = follower(Kernel(place, {}), Phase.PATCHING, 4, []).run()
    assert (found.end, found.last) == (End.STALLED, None)
    assert found.seconds > 299


# -- checks before a load --------------------------------------------------------------------------


def kernel(**changes: object) -> KernelState:
    fields: dict[str, object] = {
        "release": "6.1.0-55-amd64",
        "version": "#1",
        "build_id": "ab" * 20,
        "boot_id": "b",
        "livepatch": True,
        "taint": 0,
        "taints": decode(0),
        "signatures_enforced": False,
        "lockdown": "none",
        "modules_disabled": False,
        "ftrace_enabled": True,
    }
    return KernelState(**{**fields, **changes})  # type: ignore[arg-type]  # tests pass what the field wants


def module(**changes: object) -> ModuleFile:
    fields: dict[str, object] = {
        "path": "fix.ko",
        "name": "fix",
        "vermagic": "6.1.0-55-amd64 SMP preempt mod_unload modversions ",
        "build_id": "ab" * 20,
        "depends": (),
        "signed": False,
        "identity": "",
        "sha256": "",
        "wanted": (Wanted("vmlinux", "f", 0),),
        "replace": True,
    }
    return ModuleFile(**{**fields, **changes})  # type: ignore[arg-type]  # as above


def rules(
    place: Place, file: ModuleFile, state: KernelState, patches: tuple[LivePatch, ...] = ()
) -> list[str]:
    found = preflight.look(place, file, Seen(state, patches, (), None, (), False))
    return [row.refusal.rule for row in found if row.refusal is not None]


@pytest.fixture
def symbols(place: Place) -> Place:
    rows = ("10 t f", "20 t g", "30 t g", "40 t h\t[ext4]")
    write(place.proc / "kallsyms", "".join(f"ffffffff810000{row}\n" for row in rows))
    return place


@pytest.mark.parametrize(
    ("file", "state", "rule"),
    [
        ({}, {}, None),
        ({"vermagic": "6.1.0-54-amd64 SMP "}, {}, "vermagic"),
        ({"build_id": "cd" * 20}, {}, "other-build"),
        ({}, {"modules_disabled": True}, "modules-disabled"),
        ({}, {"signatures_enforced": True}, "unsigned"),
        ({"signed": True}, {"signatures_enforced": True}, None),
        ({}, {"lockdown": "integrity"}, "lockdown"),
        ({}, {"ftrace_enabled": False}, "ftrace-off"),
        ({"depends": ("ext4",)}, {}, "missing-module"),
        ({"wanted": (Wanted("vmlinux", "absent", 0),)}, {}, "old-function"),
        ({"wanted": (Wanted("vmlinux", "g", 0),)}, {}, "ambiguous-symbol"),
        ({"wanted": (Wanted("vmlinux", "g", 2),)}, {}, None),
        ({"wanted": (Wanted("vmlinux", "g", 3),)}, {}, "old-function"),
        ({"wanted": (Wanted("ext4", "nothing", 0),)}, {}, None),  # not loaded: not looked at
    ],
)
def test_each_check_refuses_by_its_own_rule(
    symbols: Place, file: dict[str, object], state: dict[str, object], rule: str | None
) -> None:
    assert rules(symbols, module(**file), kernel(**state)) == ([rule] if rule else [])


def test_a_patch_that_moves_and_one_of_the_same_name_stand_in_the_way(symbols: Place) -> None:
    moving = LivePatch("other", Phase.PATCHING, None, 1, False, (), None)
    same = LivePatch("fix", Phase.ENABLED, None, 1, False, (), None)
    assert rules(symbols, module(), kernel(), (moving,)) == ["transition-running"]
    assert rules(symbols, module(), kernel(), (same,)) == ["already-loaded"]


def test_symbols_are_found_by_name_and_by_address(symbols: Place) -> None:
    table = SymbolTable(symbols)
    assert [row.address & 0xFF for row in table.named("g")] == [0x20, 0x30]
    assert [(row.name, row.object) for row in table.at(0xFFFFFFFF81000040)] == [("h", "ext4")]
    assert table.named("no") == ()
    starts = table.starts()
    assert [start & 0xFF for start in starts] == [0x10, 0x20, 0x30, 0x40]
    assert [table.after(start) for start in starts] == [*starts[1:], None]
    assert table.after(starts[0] + 1) == starts[1]
    # the next one may be far away, and modules' symbols come in no order
    far = ["ffffffffc0000000", "ffffffff81000fff", "ffffffff81000000", "ffffffff81001000", "ffffffff9fffffff"]
    write(symbols.proc / "kallsyms", "".join(f"{word} t f{at}\n" for at, word in enumerate(far)))
    table, ordered = SymbolTable(symbols), sorted(int(word, 16) for word in far)
    assert [table.after(start) for start in ordered] == [*ordered[1:], None]
    write(symbols.proc / "kallsyms", "0000000000000000 t f\n0000000000000000 t g\n")
    with pytest.raises(Unable) as error:
        SymbolTable(symbols)
    assert error.value.rule == "not-permitted"


def test_writing_to_a_patch_that_went_is_no_failure(place: Place) -> None:
    assert act.set_enabled(place, "absent", False, tuple) is False
    assert act.set_enabled(place, "fix", False, tuple) is True
    assert (place.livepatch / "fix/enabled").read_text().strip() == "0"
    with pytest.raises(Refused) as error:
        act.force(place, "absent", tuple)
    assert error.value.rule == "no-transition"


def test_a_patch_whose_unpatching_has_just_ended_cannot_be_turned_round(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EINVAL, while its folder is still there for a moment (enabled_store(), klp_free_patch_async())."""
    monkeypatch.setattr(act, "write_attribute", lambda *_: errno.EINVAL)
    folder = place.livepatch / "fix"
    write(folder / "enabled", "0\n")
    threading.Timer(0.1, shutil.rmtree, [folder]).start()
    assert act.set_enabled(place, "fix", True, tuple) is False
    write(folder / "enabled", "0\n")
    with pytest.raises(Refused):  # it stays, and the kernel says no
        act.set_enabled(place, "fix", True, tuple)


def test_a_name_that_is_no_text_stops_no_action(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def spoken(_level: int, line: str) -> None:
        told.append(line)
        line.encode()  # as the C library's string

    monkeypatch.setattr(syslog, "syslog", spoken)
    book = journal.Journal(tmp_path, "b")
    by = journal.Who("root", "", 1, "kmend load /root/\udcff.ko")
    book.begin("load", "fix", by, "from /root/\udcff\0.ko", {}).end("done", "")
    assert len(told) == 2
    assert [row.event for row in book.records()] == ["begin", "end"]


def test_structures_out_of_btf() -> None:
    text = b"\0klp_func\0old_name\0new_func\0int\0"
    names = ("klp_func", "old_name", "new_func", "int")
    at = {name: text.index(f"\0{name}\0".encode()) + 1 for name in names}
    types = struct.pack("<III", at["int"], 1 << 24, 4) + struct.pack("<I", 32)
    types += struct.pack("<III", at["klp_func"], 4 << 24 | 2, 24)
    types += struct.pack("<III", at["old_name"], 1, 0) + struct.pack("<III", at["new_func"], 1, 64)
    blob = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(text)) + types + text
    found = btf.parse(blob, ("klp_func", "klp_patch"))
    assert found == {"klp_func": btf.Structure(24, {"old_name": 0, "new_func": 8})}
    with pytest.raises(KeyError):
        btf.parse(b"\0" * 24, ("klp_func",))


def test_memory_by_its_segments(place: Place) -> None:
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1", 4, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 7, 120, 0xFFFFFFFF81000000, 0, 4, 4, 4096)
    path = place.proc / "kcore"
    path.write_bytes(head + segment + b"CODE")
    with kcore.RunningMemory(place) as memory:
        assert memory.read(0xFFFFFFFF81000001, 2) == b"OD"
        with pytest.raises(Unable):
            memory.read(0xFFFFFFFF81000001, 4)
    path.write_bytes(b"short")
    with pytest.raises(Unable) as error:
        kcore.RunningMemory(place)
    assert error.value.rule == "no-kcore"


def test_a_report_of_a_refusal_tells_it_once() -> None:
    row = Refusal("coming", "fix is being loaded", "why", "next")
    report = ActionReport("unload", "fix", Result.REFUSED, row.what, refused=(row,))
    assert to_text(report).count("fix is being loaded") == 1
    assert not succeeded(report)
    document = to_document("unload", [report])
    assert document["result"] == "refused"
