"""What the live verbs print, and what their flags mean."""

from __future__ import annotations

import argparse
import errno
import io
from dataclasses import replace
from pathlib import Path

import pytest

from kmend.action import Choice, OnStall
from kmend.cli import acting, main, status
from kmend.cli.context import Context, Quiet
from kmend.core.config import Config
from kmend.core.errors import Refusal, UsageError
from kmend.core.kmsg import KernelMessage
from kmend.core.live import (
    ActionReport,
    Blocker,
    Cause,
    Frame,
    KernelState,
    LiveFunction,
    LiveModule,
    LiveObject,
    LivePatch,
    LogEntry,
    Phase,
    Result,
    Task,
    Transition,
    printable,
)
from kmend.core.taint import decode
from kmend.report import live
from kmend.runtime import kernel_state
from kmend.runtime.journal import Record
from kmend.runtime.observe import Seen
from kmend.runtime.place import Place

KERNEL = KernelState(
    "6.1.0", "#1", "ab" * 20, "b", True, 36864, decode(36864), True, "integrity", False, False
)
READER = Task(30, 31, "worker", "reader", "S", False, 0, (Frame("pipe_read", 1),), pids=(30, 7))
BLOCKER = Blocker(
    READER, Cause.IN_FUNCTION, "pipe_read", "vmlinux", "sleeps inside pipe_read()", "wake it", True
)
MOVING = Transition("fix", Phase.PATCHING, 1, 50, 12, (BLOCKER,))


def patch(name: str, phase: Phase, *, forced: bool = False) -> LivePatch:
    rows = (LiveFunction("f", 1, "upper"), LiveFunction("g", 2))
    module = LiveModule(name, 0, "live", "OEK", (), {"title": "a fix", "kmend": "0.1", "kernel": "6.1.0"})
    pinned_by = "fix" if name == "pinned" else ""
    return LivePatch(
        name, phase, True, 1, False, (LiveObject("vmlinux", True, rows),), module, forced, pinned_by
    )


def text(seen: Seen) -> str:
    return "\n".join(status.lines(seen))


def test_everything_amiss_is_in_the_status() -> None:
    killed = Record(1.0, "begin", "x", "b", "load", "fix", "", "", 4711, "admin", {})
    seen = Seen(
        KERNEL,
        (patch("fix", Phase.PATCHING, forced=True),),
        (patch("old", Phase.LEFT), patch("pinned", Phase.LEFT)),
        MOVING,
        (killed,),
        False,
        ("a note",),
    )
    shown = text(seen)
    for words in (
        "taint 36864 (OK)",
        "modules must be signed; lockdown: integrity; ftrace is off",
        "patching fix: 12 of 50 tasks left",
        "30 thread 31 (reader/worker, 7 in its namespace) sleeps inside pipe_read()",
        "… and 11 more (kmend blockers)",
        "#1 fix: patching, replaces all below, FORCED",
        "vmlinux: f, g,2",
        "shadowed by upper: f",
        "title: a fix",
        "remove it with: kmend unload old",
        "its module is kept until the next boot by the forced transition of fix",
        "nothing removes it before the next boot",
        "`kmend load fix` of admin (process 4711) was killed",
        "note: a note",
    ):
        assert words in shown, words


def test_patches_under_an_ftrace_that_died_are_not_called_in_force() -> None:
    enabled = (patch("fix", Phase.ENABLED),)
    words = "MAY NOT BE IN FORCE"
    assert words in text(Seen(replace(KERNEL, ftrace_dead=True), enabled, (), None, (), False))
    assert words not in text(Seen(KERNEL, enabled, (), None, (), False))


def test_an_ftrace_that_died_is_told_by_its_sysctl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After ftrace_kill() it answers ENODEV."""

    def read(path: Path) -> bytes:
        raise OSError(errno.ENODEV, "no such device", path)

    monkeypatch.setattr(Path, "read_bytes", read)
    place = Place(tmp_path / "sys", tmp_path / "proc", tmp_path / "dev", tmp_path / "run")
    assert kernel_state._ftrace(place) == (False, True)


def test_an_empty_machine() -> None:
    assert "no livepatch is loaded" in text(Seen(KERNEL, (), (), None, (), True))


def test_how_long_a_blocker_has_been_seen() -> None:
    began: dict[int, float] = {99: 0.0}
    seen = Seen(KERNEL, (), (), MOVING, (), False)
    assert "0 s  30 thread 31" in "\n".join(status.waiting(seen, began))
    assert began.keys() == {31}  # who went is forgotten


def test_blockers_with_their_stacks() -> None:
    shown = "\n".join(live.blockers_text(MOVING))
    assert "pipe_read+0x1 <- here" in shown
    assert "helps: wake it" in shown
    assert "… and 11 more" in shown


def test_a_line_of_the_log() -> None:
    row = LogEntry(0.5, "kernel", "livepatch: x", KernelMessage(0.5, 5, "livepatch: x"))
    assert live.log_line(row) == "1970-01-01 00:00:00.500  kernel  livepatch: x"
    assert live.log_document(row)["seconds"] == 0.5


def flags(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    acting.add_flags(parser)
    return parser.parse_args(words)


def test_flags_of_a_transition(monkeypatch: pytest.MonkeyPatch) -> None:
    how = acting.following(flags("--wait", "5", "--no-wake", "--on-stall", "wait"))
    assert (how.wait, how.patience.limit, how.patience.wake) == (True, 5.0, False)
    assert how.on_stall is OnStall.WAIT
    assert acting.following(flags("--no-wait", "--interrupt-io-uring")).patience.io_uring
    with pytest.raises(UsageError, match="one patch"):
        acting.following(flags("--no-wait"), 2)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(UsageError):
        acting.following(flags("--on-stall", "ask"))
    with pytest.raises(SystemExit):
        flags("--wait", "soon")


def context(*, json: bool = False) -> Context:
    return Context(Config(Path("/none"), Path("/none"), 1, ""), Quiet(), json=json)


@pytest.mark.parametrize(
    ("typed", "choice"),
    [("r\n", Choice.REVERSE), ("what\nw\n", Choice.WAIT), ("Leave\n", Choice.LEAVE), ("", Choice.REVERSE)],
)
def test_the_question_at_a_stall(
    typed: str, choice: Choice, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert acting.asker(context())(MOVING) is choice
    assert "pipe_read" in capsys.readouterr().err


def test_several_actions_end_at_the_first_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    row = Refusal("busy", "another kmend acts", "why", "next")
    reports = {
        "a": ActionReport("load", "a", Result.DONE, "a is in force"),
        "b": ActionReport("load", "b", Result.REFUSED, "b was not loaded", refused=(row,)),
    }
    assert acting.each("load", ["a", "b", "c"], lambda name: reports[name], context()) == 1
    shown = capsys.readouterr()
    assert "a is in force" in shown.out
    assert "refused  busy: another kmend acts" in shown.err


@pytest.mark.parametrize(
    "words",
    [["unload"], ["unload", "--all", "x"], ["status", "--watch", "--json"], ["force"], ["load"], ["enable"]],
)
def test_wrong_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "kmend:" in capsys.readouterr().err


def sleeper(pid: int, **other: object) -> Blocker:
    task = Task(pid, pid, "sleep", "sleep", "S", False, 0, (Frame("nap", pid), Frame("call", 2)), pids=(pid,))
    row = Blocker(task, Cause.IN_FUNCTION, "nap", "vmlinux", "sleeps inside nap()", "wake it", True)
    return replace(row, **other)  # type: ignore[arg-type]  # any of its fields


def test_equal_blockers_are_shown_once_with_all_their_numbers() -> None:
    rows = (*(sleeper(pid) for pid in range(100, 120)), BLOCKER, sleeper(120, why="waits", function=""))
    shown = list(live.blockers_text(Transition("fix", Phase.PATCHING, 1, 50, 22, rows)))
    assert shown[1] == "20 tasks (sleep) sleep inside nap()  [S]"
    assert " ".join(line.strip() for line in shown[2:4]) == "pids: " + ", ".join(map(str, range(100, 120)))
    assert [line for line in shown if "nap+" in line] == ["    nap+0x64 <- here", "    nap+0x78"]
    assert "120 (sleep) waits  [S]" in shown
    status_lines = list(live.transition_text(Transition("fix", Phase.PATCHING, 1, 50, 25, rows)))
    assert status_lines[1:] == [
        "  20 tasks (sleep) sleep inside nap()",
        "  30 thread 31 (reader/worker, 7 in its namespace) sleeps inside pipe_read()",
        "  120 (sleep) waits",
        "  … and 3 more (kmend blockers)",
    ]


@pytest.mark.parametrize(
    ("one", "several"),
    [
        ("waits until its child ends", "wait until its child ends"),
        ("is frozen by its cgroup", "are frozen by its cgroup"),
        ("a kernel thread that sleeps uninterruptibly", "kernel threads that sleep uninterruptibly"),
        ("does something new", "each does something new"),
    ],
)
def test_sentences_of_several_tasks(one: str, several: str) -> None:
    assert live.plural(one) == several


def test_what_is_shown_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2J\u202eb\n") == r"a\x1b[2J\u202eb\n"
    assert printable("grün ☂") == "grün ☂"
    note = {"title": "\x1b]0;x\x07", "cves": ["CVE-2024-1234"], "empty": ""}
    assert list(live.note_text(note)) == [r"title: \x1b]0;x\x07", "cves: CVE-2024-1234"]
