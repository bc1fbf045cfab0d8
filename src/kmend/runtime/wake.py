"""Interrupting tasks for a moment, so that they leave the function in which they sleep.

A task that is seized and interrupted (ptrace(2)) goes the way that it goes for the kernel's own fake signal
(``klp_send_signals()``, kernel/livepatch/transition.c): its system call ends early, the kernel stops it
on its way to user space and lets it go; most system calls are then restarted unseen. Of all ways that
were measured this is the gentlest: no process sees a signal, a stop or a changed state. Some of the calls to
which the kernel's own signal gives EINTR are begun anew instead (:mod:`kmend.runtime.restart`).

What could go wrong, and why it does not:

- A task that sleeps uninterruptibly does not stop. It is waited for with a deadline, and the end of the
  seizing thread, one for each batch, lets go of it (``exit_ptrace()``, kernel/ptrace.c).
- A signal that arrives just then stops the task before it is delivered. It is let go with that very signal.
- kmend is killed meanwhile: the kernel lets go of everything that it had seized.
- kmend itself is stopped (Ctrl-Z): what it holds would be stopped for as long. While it holds something it
  keeps these signals back, and gives in to them afterwards. SIGSTOP cannot be kept back, nor can the freezing
  of its cgroup: then the tasks of one batch stay as they are until kmend goes on, or is killed.
- A thread's number may belong to another thread by now: that one is interrupted in its place, unseen.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from kmend.runtime import restart, syscalls

#: So many are seized at once. One that stops is let go of when it is looked at next, after the others of its
#: batch; one that does not stop stays seized until the batch's deadline.
BATCH = 32
#: Seconds that a batch may take to stop; an interruptible sleeper needs well under a millisecond.
LIMIT = 0.5
#: Seconds between two looks at those that have not stopped.
_PAUSE = 0.0005
#: Seconds to wait for the kernel's part of a thread's end; it takes microseconds.
_END = 1.0
#: What the terminal, or a shell's user, stops a program with.
_STOPPING = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)

Ptrace = Callable[[int, int, int], int]
Waitpid = Callable[[int, int], tuple[int, int]]
#: ``waitpid(2)``'s status of a seized thread that stops for us (``PTRACE_EVENT_STOP``), shifted by 16.
_EVENT_STOP = 128


@dataclass(slots=True)
class Woken:
    """``interrupted`` have been through the kernel's exit path (or have ended); ``failed`` says why not.

    ``restarted`` are those of the first whose system call would have returned EINTR, and was begun anew.
    """

    interrupted: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    restarted: list[int] = field(default_factory=list)


def interrupt(tids: Iterable[int], limit: float = LIMIT) -> Woken:
    """Interrupt each thread once. ``limit`` is for each batch, in seconds. Never raises for a task."""
    woken = Woken()
    todo = list(tids)
    for at in range(0, len(todo), BATCH):
        with _unstopped():
            _in_a_thread(todo[at : at + BATCH], limit, woken)
    return woken


def _in_a_thread(tids: Sequence[int], limit: float, woken: Woken) -> None:
    """What a thread has seized is let go at its end: a task that never stops is not held beyond this."""

    def work() -> None:
        _interrupt_all(tids, limit, woken, syscalls.ptrace, os.waitpid)

    thread = threading.Thread(target=work, name="kmend-wake", daemon=True)
    thread.start()
    try:
        thread.join()
    finally:  # Ctrl-C: a moment, and nothing is held any more
        thread.join(limit + _END)
        # Python is done with a thread before the kernel is
        shown, deadline = Path(f"/proc/self/task/{thread.native_id}"), time.monotonic() + _END
        while shown.exists() and time.monotonic() < deadline:
            time.sleep(_PAUSE)


@contextmanager
def _unstopped() -> Iterator[None]:
    """Keep signals back that would stop kmend, and give in to them at the end.

    A new thread inherits the mask. One that ran before (a progress display's) has not got it and may take the
    signal for all of kmend: so it finds a handler in place of the default. Only the main thread can set one.
    """
    kept: set[int] = set()

    def keep(number: int, _frame: FrameType | None) -> None:
        kept.add(number)

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    handled = []
    try:
        if threading.current_thread() is threading.main_thread():
            handled = [row for row in _STOPPING if signal.getsignal(row) is signal.SIG_DFL]
        for row in handled:
            signal.signal(row, keep)
        yield
    finally:
        for row in handled:
            signal.signal(row, signal.SIG_DFL)
        for number in kept:
            os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _interrupt_all(tids: Sequence[int], limit: float, woken: Woken, ptrace: Ptrace, waitpid: Waitpid) -> None:
    # looks into tasks' memory, which may take its time: before anything is held
    foretold = {tid: restart.foretell(f"/proc/{tid}") for tid in tids}
    held: list[int] = []
    for tid in tids:
        number = ptrace(syscalls.PTRACE_SEIZE, tid, 0)
        if number == 0:
            number = ptrace(syscalls.PTRACE_INTERRUPT, tid, 0)
            held.append(tid)
        if number == errno.ESRCH:  # it has ended; one that was seized is waited for all the same
            if tid not in held:
                woken.interrupted.append(tid)
        elif number == errno.EPERM and tid not in held:
            woken.failed[tid] = "it is traced already, or the kernel does not let it be traced"
        elif number and tid not in held:
            woken.failed[tid] = os.strerror(number)
    deadline = time.monotonic() + limit
    while held:
        held = [tid for tid in held if not _let_go(tid, foretold[tid], ptrace, waitpid, woken)]
        if held and time.monotonic() >= deadline:
            for tid in held:
                woken.failed[tid] = f"it did not stop within {limit:g} s: it sleeps uninterruptibly"
            return
        if held:
            time.sleep(_PAUSE)


def _let_go(tid: int, foretold: restart.Call | None, ptrace: Ptrace, waitpid: Waitpid, woken: Woken) -> bool:
    """Let go of a thread that has stopped; whether nothing more is to be done about it."""
    try:
        found, status = waitpid(tid, os.WNOHANG | syscalls.WALL)
    except ChildProcessError:  # no longer ours: it has ended
        woken.interrupted.append(tid)
        return True
    if found == 0:
        return False
    if os.WIFSTOPPED(status):
        # a stop of our making, or a group's stop, has an event; else a signal is about to be delivered
        deliver = os.WSTOPSIG(status) if status >> 16 == 0 else 0
        if status >> 16 == _EVENT_STOP and restart.begin_anew(tid, foretold):
            woken.restarted.append(tid)
        ptrace(syscalls.PTRACE_DETACH, tid, deliver)
    woken.interrupted.append(tid)
    return True
