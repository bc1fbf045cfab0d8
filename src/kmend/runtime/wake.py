"""Interrupting tasks for a moment, so that they leave the function in which they sleep.

A task that is seized and interrupted (ptrace(2)) goes the way that it goes for the kernel's own fake signal
(``klp_send_signals()``, kernel/livepatch/transition.c): its system call ends early, the kernel stops it
on its way to user space and lets it go; most system calls are then restarted unseen. Of all ways that
were measured this is the gentlest: no process sees a signal, a stop or a changed state. Some of the calls to
which the kernel's own signal gives EINTR are begun anew instead (:mod:`kmend.runtime.restart`).

What could go wrong, and why it does not:

- A task that sleeps uninterruptibly does not stop. It is waited for with a deadline, and the end of the
  seizing thread lets go of it (``exit_ptrace()``, kernel/ptrace.c).
- A signal that arrives just then stops the task before it is delivered. It is let go with that very signal.
- kmend is killed meanwhile: the kernel lets go of everything that it had seized.
- A thread's number may belong to another thread by now: that one is interrupted in its place, unseen.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kmend.runtime import restart, syscalls

#: So many are held at once: none for longer than it takes to let go of the others.
BATCH = 32
#: Seconds that a batch may take to stop; an interruptible sleeper needs well under a millisecond.
LIMIT = 0.5
#: Seconds between two looks at those that have not stopped.
_PAUSE = 0.0005

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

    def work() -> None:
        _interrupt_all(todo, limit, woken, syscalls.ptrace, os.waitpid)

    # what a thread has seized is let go at its end: a task that never stops is not held beyond this
    thread = threading.Thread(target=work, name="kmend-wake", daemon=True)
    thread.start()
    thread.join()
    return woken


def _interrupt_all(tids: Sequence[int], limit: float, woken: Woken, ptrace: Ptrace, waitpid: Waitpid) -> None:
    for at in range(0, len(tids), BATCH):
        _batch(tids[at : at + BATCH], limit, woken, ptrace, waitpid)


def _batch(tids: Sequence[int], limit: float, woken: Woken, ptrace: Ptrace, waitpid: Waitpid) -> None:
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
        held = [tid for tid in held if not _let_go(tid, ptrace, waitpid, woken)]
        if held and time.monotonic() >= deadline:
            for tid in held:
                woken.failed[tid] = f"it did not stop within {limit:g} s: it sleeps uninterruptibly"
            return
        if held:
            time.sleep(_PAUSE)


def _let_go(tid: int, ptrace: Ptrace, waitpid: Waitpid, woken: Woken) -> bool:
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
        if status >> 16 == _EVENT_STOP and restart.begin_anew(tid):
            woken.restarted.append(tid)
        ptrace(syscalls.PTRACE_DETACH, tid, deliver)
    woken.interrupted.append(tid)
    return True
