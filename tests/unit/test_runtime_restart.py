"""System calls that are begun anew unseen: which, and that nobody can tell, on this machine's own kernel."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from kmend.runtime import restart, syscalls, wake
from kmend.runtime.place import Place
from kmend.runtime.restart import Call, unseen

FOREVER = 0xFFFFFFFF
EXT_ARG = 8


def nothing(_address: int) -> int | None:
    return None


@pytest.mark.parametrize(
    ("number", "arguments", "expected"),
    [
        (232, (3, 1, 1, FOREVER, 0, 0), True),  # epoll_wait
        (232, (3, 1, 1, 0xFFFFFFFF_00000000 | FOREVER, 0, 0), True),
        (232, (3, 1, 1, 1000, 0, 0), False),
        (232, (3, 1, 1, 0, 0, 0), False),
        (281, (3, 1, 1, FOREVER, 0, 8), True),  # epoll_pwait
        (441, (3, 1, 1, 0, 0, 8), True),  # epoll_pwait2
        (441, (3, 1, 1, 0x7FFF0000, 0, 8), False),
        (65, (3, 1, 1, 0, 0, 0), True),  # semop
        (220, (3, 1, 1, 0x7FFF0000, 0, 0), False),  # semtimedop
        (128, (1, 1, 0, 8, 0, 0), True),  # rt_sigtimedwait
        (128, (1, 1, 0x7FFF0000, 8, 0, 0), False),
        (208, (1, 1, 1, 1, 0, 0), True),  # io_getevents
        (208, (1, 1, 1, 1, 0x7FFF0000, 0), False),
        (426, (3, 0, 1, 1, 0, 0), True),  # io_uring_enter
        (426, (3, 1, 1, 1, 0, 0), False),  # submits: it would submit twice
        (426, (3, 0, 1, 1 | EXT_ARG, 0x1000, 24), False),  # its timeout cannot be read
        (7, (1, 1, FOREVER, 0, 0, 0), False),  # poll: the kernel restarts it itself
    ],
)
def test_which_calls(number: int, arguments: tuple[int, ...], expected: bool) -> None:
    assert unseen(Call(number, arguments), nothing) is expected


@pytest.mark.parametrize(
    ("size_and_wait", "timeout", "expected"),
    [(8, 0, True), (8, 0x1000, False), (8 | 5 << 32, 0, False), (None, 0, False), (8, None, False)],
)
def test_an_io_uring_wait_with_an_extended_argument(
    size_and_wait: int | None, timeout: int | None, expected: bool
) -> None:
    memory = {0x1008: size_and_wait, 0x1010: timeout}
    call = Call(426, (3, 0, 1, 1 | EXT_ARG, 0x1000, 24))
    assert unseen(call, memory.__getitem__) is expected


PAGE = os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize(
    ("there", "expected"), [((True, True), True), ((False, True), False), ((True, False), False)]
)
def test_of_a_page_that_is_not_there_nothing_is_read(
    tmp_path: Path, there: tuple[bool, bool], expected: bool
) -> None:
    """The extended argument lies across two pages, and names no timeout."""
    place = Place(tmp_path / "sys", tmp_path, tmp_path / "dev", tmp_path / "run")
    argument = 8 * PAGE - 12  # its second and third word are looked at
    task = tmp_path / "5/task/5"
    task.mkdir(parents=True)
    call = " ".join(map(hex, (3, 0, 1, 1 | EXT_ARG, argument, 24, 0x7FFF00001000, 0x7FFF00002000)))
    (task / "syscall").write_text(f"426 {call}\n")
    (task / "mem").write_bytes(bytes(16 * PAGE))
    words = [1 << 63 if row else 1 << 62 for row in there]
    (task / "pagemap").write_bytes(bytes(8 * 7) + struct.pack("<2Q", *words) + bytes(64))
    assert restart.waits_untimed(place, 5, 5) is (expected and os.uname().machine == "x86_64")
    (task / "pagemap").unlink()
    assert not restart.waits_untimed(place, 5, 5)


def test_reading_memory_brings_no_page() -> None:
    """Of our own process, as the kernel shows it: before and after the page is touched."""
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        assert restart.read_word("/proc/self", address + 8) is None
        area[8:16] = b"\x15" + bytes(7)
        assert restart.read_word("/proc/self", address + 8) == 0x15


def test_memory_is_not_asked_while_a_thread_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extended argument is known from before, or the call returns EINTR as ever."""
    call = Call(426, (3, 0, 1, 1 | EXT_ARG, 0x1000, 24))
    registers = dict(zip(restart._ARGUMENTS, call.arguments, strict=True))
    registers |= {80: -errno.EINTR & 0xFFFFFFFFFFFFFFFF, 120: 426, 136: 0x33}
    written: list[int] = []
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="x86_64"))
    monkeypatch.setattr(syscalls, "peek_user", lambda _tid, offset: registers[offset])

    def poke_user(_tid: int, _offset: int, value: int) -> int:
        written.append(value)
        return 0

    monkeypatch.setattr(syscalls, "poke_user", poke_user)
    assert not restart.begin_anew(5)
    assert not restart.begin_anew(5, Call(426, (4, *call.arguments[1:])))  # it was in another one
    assert written == []
    assert restart.begin_anew(5, call)
    assert written == [-restart.ERESTARTNOHAND & 0xFFFFFFFFFFFFFFFF]


CHILD = """
import ctypes, os, select, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
libc = ctypes.CDLL(None, use_errno=True)
reading, writing = os.pipe()
poll = select.epoll()
poll.register(reading, select.EPOLLIN)
row = ctypes.create_string_buffer(12)
print(writing, flush=True)
found = libc.epoll_wait(poll.fileno(), row, 1, int(sys.argv[1]))
print(found, ctypes.get_errno() if found < 0 else 0, flush=True)
"""


def waiting(timeout: int) -> tuple[subprocess.Popen[str], int]:
    """A process that sleeps in epoll_wait(), and the other end of the pipe that it waits for."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(timeout)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    writing = int(child.stdout.readline())
    until = time.monotonic() + 10
    while not Path(f"/proc/{child.pid}/syscall").read_text().startswith("232 "):
        assert time.monotonic() < until
        time.sleep(0.01)
    return child, writing


def can_trace() -> bool:
    with subprocess.Popen(["sleep", "5"]) as child:
        woken = wake.interrupt([child.pid])
        child.kill()
    return not woken.failed


needs_ptrace = pytest.mark.skipif(
    not can_trace() or os.uname().machine != "x86_64", reason="this user may not trace other processes"
)


@needs_ptrace
def test_a_wait_without_a_timeout_does_not_notice() -> None:
    child, writing = waiting(-1)
    with child:
        assert restart.waits_untimed(Place(), child.pid, child.pid)
        for _ in range(5):
            woken = wake.interrupt([child.pid])
            assert (woken.interrupted, woken.restarted) == ([child.pid], [child.pid])
            time.sleep(0.01)
        assert child.poll() is None
        Path(f"/proc/{child.pid}/fd/{writing}").write_bytes(b"x")
        assert child.stdout is not None
        assert child.stdout.read() == "1 0\n"


@needs_ptrace
def test_a_wait_with_a_timeout_returns_as_under_the_kernels_own_signal() -> None:
    child, _ = waiting(20000)
    with child:
        assert not restart.waits_untimed(Place(), child.pid, child.pid)
        woken = wake.interrupt([child.pid])
        assert (woken.interrupted, woken.restarted) == ([child.pid], [])
        assert child.stdout is not None
        assert child.stdout.read() == "-1 4\n"


@needs_ptrace
def test_a_real_signal_gets_through_afterwards() -> None:
    child, _ = waiting(-1)
    with child:
        assert wake.interrupt([child.pid]).restarted == [child.pid]
        os.kill(child.pid, signal.SIGUSR1)
        assert child.stdout is not None
        assert child.stdout.read() == "-1 4\n"
