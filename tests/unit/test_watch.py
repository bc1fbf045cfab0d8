"""The live view: what it keeps from look to look, what it draws in any window, and how it ends."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import shutil
import signal
import struct
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from kmend.cli import watching
from kmend.cli.context import Context, Quiet
from kmend.core.config import Config
from kmend.core.live import (
    Blocker,
    Cause,
    Frame,
    KernelState,
    LiveFunction,
    LiveModule,
    LiveObject,
    LivePatch,
    Phase,
    Task,
    Transition,
)
from kmend.core.taint import decode
from kmend.report import watch
from kmend.runtime import journal
from kmend.runtime.journal import Journal, Record
from kmend.runtime.place import Place

KERNEL = KernelState(
    "6.1.0-55-amd64", "#1 SMP", "ab" * 20, "b", True, 36864, decode(36864), False, "", False, True
)
STACK = (Frame("schedule", 9), Frame("nap", 1), Frame("do_syscall_64", 5, "m"))
WAKE = "an interruption lets it leave the function and restart its system call"


def blocker(pid: int, name: str = "sleep", stack: tuple[Frame, ...] | None = STACK) -> Blocker:
    task = Task(pid, pid, name, name, "S", False, 0, stack, pids=(pid,))
    return Blocker(task, Cause.IN_FUNCTION, "nap", "vmlinux", "sleeps inside nap()", WAKE, True)


def patch(name: str = "fix", phase: Phase = Phase.ENABLED) -> LivePatch:
    rows = (LiveObject("vmlinux", True, (LiveFunction("nap", 1),)),)
    module = LiveModule(name, 1, "live", "OEK", (), {"title": "a [bold]title[/bold] of it"})
    return LivePatch(name, phase, True, 1, False, rows, module)


def look(left: int, at: float = 1e9, *, phase: Phase = Phase.PATCHING, name: str = "sleep") -> watch.View:
    rows = tuple(blocker(pid, name) for pid in range(100, 100 + left))
    return watch.View(
        time=at,
        machine="host",
        kernel=KERNEL,
        patches=(patch(phase=phase),),
        left=(),
        transition=Transition("fix", phase, 1, 90, left, rows),
        acting=None,
        busy=False,
        troubles=(),
        boot=(),
        recent=(),
        cves={"fix": ("CVE-2024-1234",)},
    )


def still(at: float, phase: Phase = Phase.ENABLED) -> watch.View:
    return replace(look(0, at, phase=phase), transition=None)


def drawn(
    view: watch.View, history: watch.History, width: int = 120, height: int = 40, selected: int = 0
) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, force_terminal=True, color_system=None)
    console.print(watch.screen(view, history, width, height, selected), end="")
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())


def watched(*views: watch.View) -> watch.History:
    history = watch.History()
    for view in views:
        history.note(view)
    return history


ACTING = watch.Acting(
    "load",
    "fix",
    "admin",
    812,
    1e9 - 1,
    (watch.Done(1e9, "interrupted 2 tasks", frozenset({100, 101})),),
    60.0,
    "reverse",
)


def test_a_stall_with_everything_about_it() -> None:
    views = [replace(look(24, 1e9 + at / 2), acting=ACTING, busy=True) for at in range(10)]
    shown = drawn(views[-1], watched(*views))
    for words in (
        "host   6.1.0-55-amd64",
        "patching fix",
        "24 of 90 tasks left, watched for 4 s",
        "73 %",
        "████",
        "kmend load fix of admin (process 812), 6 s ago; waits for up to 60 s, then it goes back",
        "1.0 s  interrupted 2 tasks",
        "24 tasks left",
        "nap()",
        "interrupted 4 s ago",
        "not interrupted yet",
        "100 (sleep)",
        "helps: an interruption lets it",
        "nap+0x1 ← here",
        "do_syscall_64+0x5 [m]",
        "4 s",
    ):
        assert words in shown, words


def test_who_waits_for_the_kernel_says_so() -> None:
    view = replace(look(3), acting=replace(ACTING, steps=(), wakes=False), busy=True)
    assert "left to the kernel's signal" in drawn(view, watched(view))
    view = replace(view, acting=replace(ACTING, steps=()))
    assert "about to be interrupted" in drawn(view, watched(view))


def test_who_would_help_when_nobody_acts() -> None:
    assert "nothing: no kmend acts" in drawn(look(3), watched(look(3)))
    assert "its journal cannot be read" in drawn(replace(look(3), busy=True), watched(look(3)))


def test_the_selected_task_is_shown_whole() -> None:
    view = look(60)
    shown = drawn(view, watched(view), selected=59)
    assert "159 (sleep)" in shown
    assert " 159 " in shown.partition("PID")[2]
    assert drawn(view, watched(view), selected=10**6) == shown


def test_without_a_transition() -> None:
    history = watched(look(24, 1e9), look(3, 1e9 + 2), still(1e9 + 3))
    view = replace(
        still(1e9 + 4),
        troubles=("an action did not end",),
        boot=("loaded at boot: fix",),
        recent=(watch.Done(1e9, "load fix: fix is in force [done]"),),
    )
    history.note(view)
    shown = drawn(view, history)
    for words in (
        "livepatches, top first",
        "CVE-2024-1234",
        "a [bold]title[/bold] of it",
        "enabled replaces",
        "taint 36864 (OK):",
        "    O  a module built outside",
        "an action did not end",
        "loaded at boot: fix",
        "patching fix is complete after 3.0 s of watching; 24 tasks at most were left",
        "01:46:40  load fix: fix is in force [done]",
    ):
        assert words in shown, words
    assert "no livepatch is loaded" in drawn(replace(view, patches=()), history)


def test_how_a_transition_ended() -> None:
    back = look(5, phase=Phase.UNPATCHING)
    cases = [
        (watched(look(5), still(1e9 + 1)), "patching fix is complete"),
        (watched(look(5), replace(still(1e9 + 1), patches=())), "patching fix did not come to its end"),
        (watched(back, replace(still(1e9), patches=())), "unpatching fix is complete"),
        (watched(look(5), look(4, 1e9 + 1, phase=Phase.UNPATCHING)), "patching fix was turned round"),
    ]
    for history, words in cases:
        assert history.ended is not None
        assert history.ended.text.startswith(words)


def test_tasks_that_come_and_go_are_timed_anew() -> None:
    history = watched(look(2, 1e9), look(1, 1e9 + 5), look(2, 1e9 + 7))
    assert [history.seen(blocker(pid)) for pid in (100, 101, 999)] == [7.0, 0.0, 0.0]


def test_hours_of_watching_stay_small() -> None:
    history = watch.History()
    for at in range(50_000):
        history.note(look(1 if at % 100 else 2, 1e9 + at))
    assert len(history.samples) <= 20_001
    assert history.samples[0][0] == 0.0
    assert history.samples[-1][0] == 49_999.0


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 5000)), max_size=30),
    st.integers(0, 80),
    st.integers(0, 9),
)
def test_a_chart_shows_each_number_that_is_not_zero(
    rows: list[tuple[float, int]], width: int, height: int
) -> None:
    samples = sorted(rows)
    found = watch.chart(samples, 100.0, width, height)
    assert len(found) == height
    assert all(len(line) == width for line in found)
    if width and height and samples:
        whole = "".join(found)
        assert bool(whole.strip()) == any(left for _, left in samples)
        assert ("█" in found[0]) == any(left for _, left in samples)  # the highest reaches the top


NAMES = st.text(alphabet=st.characters(), max_size=15)


@settings(deadline=None)
@given(st.integers(1, 160), st.integers(1, 60), st.integers(0, 70), NAMES, st.integers(0, 80), st.booleans())
def test_any_window_and_any_name(
    width: int, height: int, left: int, name: str, selected: int, acts: bool
) -> None:
    view = replace(look(left, name=name), acting=ACTING if acts else None)
    for one in (view, replace(view, transition=None)):
        shown = drawn(one, watched(view, one), width, height, selected).splitlines()
        assert len(shown) <= height
        assert "\x1b" not in "".join(shown)
        assert "Layout(" not in "".join(shown)


@pytest.mark.parametrize("stack", [None, ()])
def test_a_stack_that_cannot_be_seen(stack: tuple[Frame, ...] | None) -> None:
    view = look(1)
    assert view.transition is not None
    rows = (blocker(100, "[red]x", stack),)
    view = replace(view, transition=replace(view.transition, blockers=rows))
    shown = drawn(view, watched(view))
    assert ("cannot be read" if stack is None else "it runs") in shown
    assert "100 ([red]x)" in shown  # no markup


def record(event: str, text: str, number: str = "a", **detail: object) -> Record:
    return Record(5.0, event, number, "b", "load", "fix", text, "", 812, "admin", detail)


def test_the_one_who_acts_is_found_in_the_journal() -> None:
    rows = (
        record("begin", "old", "z"),
        record("begin", "from", wait=60, on_stall="reverse"),
        record("step", "took it"),
        record("step", "interrupted 2", tids=[7, 8]),
        record("step", "of another", "z"),
    )
    found = watching.acting(rows, "b")
    assert found is not None
    assert (found.verb, found.pid, found.wait, found.on_stall) == ("load", 812, 60.0, "reverse")
    assert [(step.text, step.tids) for step in found.steps] == [
        ("took it", frozenset()),
        ("interrupted 2", frozenset({7, 8})),
    ]
    assert watching.acting(rows, "another boot") is None


# -- on a real terminal ------------------------------------------------------------------------------

PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
import test_watch
from pathlib import Path
from kmend.cli import main, status, watching
from kmend.core.errors import Unable
looks = [0]
def look(self):
    looks[0] += 1
    if {fails!r} and looks[0] > 2:
        raise Unable("it is gone", why="no more livepatches", rule="no-livepatch")
    left = 24 if looks[0] < 1000 else 0
    return None, test_watch.look(left)
watching.Looker.look = look
watching.Looker.pulse = lambda self: ()
status.observe = lambda *a, **k: None
status.chosen = lambda *a: None
sys.exit(main(["status", "--watch", "--interval", "0.05"]))
"""


COLOURS = re.compile(rb"\x1b\[[0-9;]*m")


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, pid: int, fd: int) -> None:
        self.pid, self.fd, self.data = pid, fd, b""

    def wait(self, words: bytes, limit: float = 60.0) -> bytes:
        """Read until the words have come; what came since the last call."""
        end = time.monotonic() + limit
        new = b""
        while words not in new and words not in COLOURS.sub(b"", new):
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{words!r} did not come: {new[-2000:]!r}"
            try:
                data = os.read(self.fd, 1 << 16)
            except OSError:
                data = b""
            assert data, f"it ended without {words!r}: {new[-2000:]!r}"
            new += data
            self.data += data
        return new

    def size(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def end(self, limit: float = 60.0) -> int:
        """Its exit status; what it still writes is read."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            ready, _, _ = select.select([self.fd], [], [], 0.05)
            if ready:
                with contextlib.suppress(OSError):
                    self.data += os.read(self.fd, 1 << 16)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                with contextlib.suppress(OSError):
                    while chunk := os.read(self.fd, 1 << 16):
                        self.data += chunk
                return os.waitstatus_to_exitcode(status)
        raise AssertionError("it did not end")


@pytest.fixture
def started() -> Iterator[object]:
    made: list[Terminal] = []

    def start(term: str = "xterm-256color", *, fails: bool = False) -> Terminal:
        folder = str(Path(__file__).parent)
        pid, fd = pty.fork()
        if pid == 0:
            program = PROGRAM.format(folder=folder, fails=fails)
            # an exported size, of another window, does not count
            env = {**os.environ, "TERM": term, "COLUMNS": "61", "LINES": "7"}
            os.execve(sys.executable, [sys.executable, "-c", program], env)
        made.append(Terminal(pid, fd))
        made[-1].size(30, 110)
        return made[-1]

    yield start
    for one in made:
        if one.pid:
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)
        os.close(one.fd)


ENTER, LEAVE, CURSOR = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"


def test_keys_sizes_and_the_end(started) -> None:  # type: ignore[no-untyped-def]  # a function of a fixture
    terminal = started()
    assert ENTER in terminal.wait(b"24 of 90")
    terminal.wait(b"100 (sleep)")
    os.write(terminal.fd, b"\x1b[B")
    terminal.wait(b"101 (sleep)")
    os.write(terminal.fd, b"G")
    terminal.wait(b"123 (sleep)")
    terminal.size(12, 40)
    terminal.wait(b"\x1b")
    terminal.size(50, 150)
    terminal.wait(b"do_syscall_64+0x5")
    os.write(terminal.fd, b"q")
    assert terminal.end() == 0
    assert terminal.data.rindex(LEAVE) > terminal.data.rindex(ENTER)
    assert terminal.data.rindex(CURSOR) > terminal.data.rindex(b"\x1b[?25l")


def test_control_c_leaves_the_terminal_as_it_was(started) -> None:  # type: ignore[no-untyped-def]  # as above
    terminal = started()
    before = termios.tcgetattr(terminal.fd)
    terminal.wait(b"24 of 90")
    assert termios.tcgetattr(terminal.fd)[3] != before[3]  # keys come at once
    os.write(terminal.fd, b"\x03")
    assert terminal.end() == 130
    assert termios.tcgetattr(terminal.fd)[3] == before[3]
    assert terminal.data.rindex(LEAVE) > terminal.data.rindex(ENTER)
    assert b"Traceback" not in terminal.data


def test_control_z_gives_the_screen_back_meanwhile(started) -> None:  # type: ignore[no-untyped-def]  # as above
    terminal = started()
    terminal.wait(b"24 of 90")
    os.write(terminal.fd, b"\x1a")
    terminal.wait(LEAVE)
    _, status = os.waitpid(terminal.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    os.kill(terminal.pid, signal.SIGCONT)
    terminal.wait(ENTER)
    os.write(terminal.fd, b"q")
    assert terminal.end() == 0


def test_an_error_is_told_on_the_screen_before(started) -> None:  # type: ignore[no-untyped-def]  # as above
    terminal = started(fails=True)
    assert terminal.end() == 3
    assert terminal.data.rindex(b"it is gone") > terminal.data.rindex(LEAVE)


# -- without a screen --------------------------------------------------------------------------------


def machine(root: Path) -> Place:
    """Files of a kernel with one patch in transition, and no task that could be asked."""
    place = Place(root / "sys", root / "proc", root / "dev", root / "run")
    files = {
        "sys/kernel/livepatch/fix/enabled": "1\n",
        "sys/kernel/livepatch/fix/transition": "1\n",
        "sys/kernel/livepatch/fix/vmlinux/nap,1/x": "",
        "proc/sys/kernel/osrelease": "6.1.0\n",
        "proc/sys/kernel/random/boot_id": "b\n",
        "proc/sys/kernel/tainted": "0\n",
        "proc/modules": "fix 1 1 - Live 0x0\n",
        "proc/self/patch_state": "1\n",
        "run/x": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return place


def looker(root: Path) -> watching.Looker:
    context = Context(Config(root, root / "state", 1, ""), Quiet())
    return watching.Looker(machine(root), context, None)


def test_that_a_transition_ends_is_seen_between_two_looks(tmp_path: Path) -> None:
    found = looker(tmp_path)
    before = found.pulse()
    assert before == (("fix", True, True),)
    folder = tmp_path / "sys/kernel/livepatch/fix"
    (folder / "transition").write_text("0\n")
    assert found.pulse() != before
    (folder / "enabled").unlink()
    assert found.pulse() == (("fix", None, False),)


def test_a_look_at_a_machine_of_files(tmp_path: Path) -> None:
    found = looker(tmp_path)
    _, view = found.look()
    assert view.transition is not None
    assert (view.transition.patch, view.transition.left, view.acting) == ("fix", 0, None)
    assert "every task has switched" in drawn(view, watched(view))
    by = journal.Who("root", "admin", 812, "kmend load fix.ko")
    action = Journal(tmp_path / "state", "b").begin("load", "fix", by, "from fix.ko", {"wait": 60.0})
    action.step("interrupted 1 task", tids=[7])
    with journal.acting(found.place, "load fix"):
        _, view = found.look()
    assert view.acting is not None
    assert (view.acting.user, view.acting.wait, view.acting.steps[0].tids) == ("admin", 60.0, frozenset({7}))
    _, view = found.look()  # its kmend was killed
    assert view.acting is None
    assert "was killed" in " ".join(view.troubles)
    shutil.rmtree(tmp_path / "sys/kernel/livepatch/fix")
    _, view = found.look()
    assert (view.patches, view.transition) == ((), None)
    assert "interrupted 1 task" in drawn(view, watched(view))


def test_where_no_screen_can_be_drawn_each_change_is_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = looker(tmp_path)
    looks = [0]
    real = watching.Looker.look

    def look(self: watching.Looker) -> object:
        looks[0] += 1
        if looks[0] == 3:
            (tmp_path / "sys/kernel/livepatch/fix/transition").write_text("0\n")
        if looks[0] == 6:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(watching.Looker, "look", look)
    with pytest.raises(KeyboardInterrupt):
        watching.blocks(found, 0.01, Context(Config(tmp_path, tmp_path, 1, ""), Quiet()))
    shown = capsys.readouterr().out
    assert shown.count("6.1.0") == 2  # five looks, one change
    assert shown.index("patching fix") < shown.index("#1 fix: enabled")
    assert "\x1b" not in shown


@pytest.mark.parametrize("term", ["dumb", "", "unknown"])
def test_a_terminal_that_cannot_move_its_cursor(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert watching.fancy()
    monkeypatch.setenv("TERM", term)
    assert not watching.fancy()
