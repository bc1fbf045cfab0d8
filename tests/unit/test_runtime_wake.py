"""Waking holds nobody for longer than it says: with real tasks on this machine's own kernel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kmend.runtime import syscalls, wake
from kmend.runtime.wake import Woken


def can_trace() -> bool:
    with subprocess.Popen(["sleep", "5"]) as child:
        woken = wake.interrupt([child.pid])
        child.kill()
    return not woken.failed


#: A parent that waits in vfork() sleeps uninterruptibly until its child, whose number it tells first, ends.
VFORK = """
import ctypes, os, signal
reading, writing = os.pipe()
libc = ctypes.CDLL(None)
if libc.syscall(56, 0x4000 | signal.SIGCHLD, 0, 0, 0, 0) == 0:  # clone() with CLONE_VFORK, the memory copied
    print(os.getpid(), flush=True)
    signal.pause()
    os._exit(0)
os.wait()
"""
needs_vfork = pytest.mark.skipif(
    not can_trace() or os.uname().machine != "x86_64", reason="this user may not trace other processes"
)


def field_of(pid: int, name: str) -> str:
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(row.partition(":")[2].split()[0] for row in rows if row.startswith(f"{name}:"))


def wait_until(what: Callable[[], bool], limit: float = 10.0) -> None:
    end = time.monotonic() + limit
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def vfork_parent() -> Iterator[int]:
    """A task in uninterruptible sleep."""
    with subprocess.Popen([sys.executable, "-c", VFORK], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            wait_until(lambda: field_of(parent.pid, "State") == "D")
            yield parent.pid
        finally:
            os.kill(child, signal.SIGKILL)


@needs_vfork
def test_what_does_not_stop_is_let_go_with_its_own_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not with the last one, seconds later."""
    monkeypatch.setattr(wake, "BATCH", 1)
    with vfork_parent() as first, vfork_parent() as second:
        woken = Woken()
        waking = threading.Thread(target=lambda: woken.failed.update(wake.interrupt([first, second]).failed))
        waking.start()
        wait_until(lambda: field_of(first, "TracerPid") != "0")
        wait_until(lambda: field_of(second, "TracerPid") != "0")
        assert field_of(first, "TracerPid") == "0"
        waking.join()
        assert field_of(second, "TracerPid") == "0"
        assert woken.failed.keys() == {first, second}


#: Its first thread executes another program, when it is told to; its second sleeps.
EXECUTES = """
import os, sys, threading, time
second = threading.Thread(target=time.sleep, args=(60,), daemon=True)
second.start()
print(second.native_id, flush=True)
sys.stdin.readline()
os.execv("/bin/sleep", ["sleep", "60"])
"""
#: Seizes a thread and does nothing more about it: not even its end is taken note of.
SEIZES = """
import sys, time
from kmend.runtime import syscalls
print(syscalls.ptrace(syscalls.PTRACE_SEIZE, int(sys.argv[1])), flush=True)
time.sleep(60)
"""


@needs_vfork
def test_a_task_that_cannot_be_seized_holds_up_nobody() -> None:
    """execve() waits for the end of another thread, and PTRACE_SEIZE for execve(): as long as it takes."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen([sys.executable, "-c", EXECUTES], **pipes) as stuck,
        subprocess.Popen(["sleep", "60"]) as before,
        subprocess.Popen(["sleep", "60"]) as after,
    ):
        assert stuck.stdout is not None and stuck.stdin is not None
        second = stuck.stdout.readline().strip()
        with subprocess.Popen([sys.executable, "-c", SEIZES, second], **pipes) as tracer:
            assert tracer.stdout is not None
            assert tracer.stdout.readline() == "0\n"
            stuck.stdin.write("now\n")
            stuck.stdin.flush()
            wait_until(lambda: Path(f"/proc/{stuck.pid}/task/{second}/stat").read_text().split()[2] == "Z")
            began = time.monotonic()
            woken = wake.interrupt([before.pid, stuck.pid, after.pid])
            assert time.monotonic() - began < wake.LIMIT + wake.SILENCE + 3.0
            assert woken.failed.keys() == {stuck.pid}
            assert "executing another program" in woken.failed[stuck.pid]
            assert sorted(woken.interrupted) == sorted([before.pid, after.pid])
            assert {field_of(pid, "TracerPid") for pid in (before.pid, stuck.pid, after.pid)} == {"0"}
            tracer.kill()
        wait_until(lambda: field_of(stuck.pid, "Name") == "sleep")
        for child in (stuck, before, after):
            child.kill()


@needs_vfork
def test_a_killed_kmend_takes_its_helper_with_it() -> None:
    with (
        vfork_parent() as held,
        subprocess.Popen([sys.executable, "-c", WAKER, str(held), "30"], stdout=subprocess.PIPE) as waker,
    ):
        wait_until(lambda: field_of(held, "TracerPid") not in ("0", str(waker.pid)))
        waker.kill()
        wait_until(lambda: field_of(held, "TracerPid") == "0", 5)


@needs_vfork
def test_a_signal_outlives_the_helper_that_holds_its_task() -> None:
    """It stops the task before it is delivered; whoever waits for the stop and dies would take it along."""
    with subprocess.Popen(["sleep", "60"]) as child:
        holder = os.fork()
        if holder == 0:
            syscalls.ptrace(syscalls.PTRACE_SEIZE, child.pid)
            os.kill(child.pid, signal.SIGTERM)
            while wake._stopped(child.pid) is None:
                time.sleep(0.001)
            os._exit(0)  # as if it were killed here
        os.waitpid(holder, 0)
        assert child.wait(10) == -signal.SIGTERM


#: Wakes, with a thread beside that no mask of ours reaches, as a progress display's; says when it is through.
WAKER = """
import sys, threading, time
from kmend.runtime import wake
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("begins", flush=True)
wake.interrupt([int(sys.argv[1])], float(sys.argv[2]))
print("goes on", flush=True)
"""


@needs_vfork
@pytest.mark.parametrize("number", [signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU])
def test_kmend_is_not_stopped_while_it_holds_others(number: signal.Signals) -> None:
    with vfork_parent() as held:
        waker = subprocess.Popen(
            [sys.executable, "-c", WAKER, str(held), "1"],
            stdout=subprocess.PIPE,
            text=True,
            # a group of its own: signals of the terminal do not stop one that no shell looks after
            process_group=0,
        )
        with waker:
            try:
                assert waker.stdout is not None
                wait_until(lambda: field_of(held, "TracerPid") != "0")
                os.kill(waker.pid, number)
                time.sleep(0.1)
                assert field_of(waker.pid, "State") != "T"
                assert field_of(held, "TracerPid") != "0"
                _, status = os.waitpid(waker.pid, os.WUNTRACED)
                assert os.WIFSTOPPED(status)
                assert os.WSTOPSIG(status) == number
                assert field_of(held, "TracerPid") == "0"
                os.kill(waker.pid, signal.SIGCONT)
                assert waker.stdout.read() == "begins\ngoes on\n"
            finally:
                waker.kill()
