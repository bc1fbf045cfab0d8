"""Interrupting tasks for a moment, so that they leave the function in which they sleep.

A task that is seized and interrupted (ptrace(2)) goes the way that it goes for the kernel's own fake signal
(``klp_send_signals()``, kernel/livepatch/transition.c): its system call ends early, the kernel stops it
on its way to user space and lets it go; most system calls are then restarted unseen. Of all ways that
were measured this is the gentlest: no process sees a signal, a stop or a changed state. Some of the calls to
which the kernel's own signal gives EINTR are begun anew instead (:mod:`kmend.runtime.restart`).

A helper does it, a fork of kmend that only holds tasks and lets them go: whatever keeps it from going on, its
end lets go of all that it has seized (``exit_ptrace()``, kernel/ptrace.c). What could go wrong, and why it
does not:

- A task that sleeps uninterruptibly does not stop. It is waited for with a deadline; then the helper ends.
- Seizing may wait without limit: ``ptrace_attach()`` takes the mutex that ``execve(2)`` holds while it reads
  the new program, perhaps from a file system that does not answer, and while it waits for the other threads
  to end, of which the helper may hold one. A helper that makes no step for a while is killed (its wait can
  be), and that task is left alone.
- A signal that arrives just then stops the task before it is delivered. It is let go with that very signal;
  until then the kernel keeps it (``WNOWAIT``), so that it is not lost when the helper is killed.
- kmend is killed meanwhile: the kernel kills the helper.
- kmend itself is stopped (Ctrl-Z): it keeps these signals back while the helper works, and gives in to them
  afterwards. SIGSTOP stops kmend alone. When its cgroup is frozen, the tasks of one batch stay as they are
  until it is thawed.
- A thread's number may belong to another thread by now: that one is interrupted in its place, unseen.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import signal
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from types import FrameType
from typing import NoReturn

from kmend.runtime import restart, syscalls

#: So many are seized at once. One that stops is let go of when it is looked at next; one that does not stop
#: stays seized until the batch's deadline.
BATCH = 32
#: Seconds that a batch may take to stop; an interruptible sleeper needs well under a millisecond.
LIMIT = 0.5
#: Seconds beyond that limit without a step of the helper's, after which it is killed.
SILENCE = 1.0
#: Seconds between two looks at those that have not stopped.
_PAUSE = 0.0005
#: What the terminal, or a shell's user, stops a program with.
_STOPPING = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
#: ``waitid(2)``'s status of a seized thread that stops for us (``PTRACE_EVENT_STOP``), shifted by 8.
_EVENT_STOP = 128
#: Seconds between two looks at whether the helper still makes steps; its end is seen at once.
_TICK = 0.1
#: So many are seized before those that have stopped are let go of: more often costs more than it helps.
_FEW = 8


class Said(IntEnum):
    """What the helper has noted of a thread. Beyond these: with what error number it could not be seized."""

    NOTHING = 0
    INTERRUPTED = 1
    RESTARTED = 2
    UNSTOPPED = 3
    REFUSED = 16


class Board:
    """Memory that kmend and its helper share: no system call, so it costs nothing to note something.

    ``steps`` grows with every step of the helper's; ``at`` is the thread (its place in ``tids``) at which
    what comes next may not come back, None between two batches.
    """

    def __init__(self, tids: Sequence[int]) -> None:
        """
        Raises:
            OSError: there is no memory.
        """
        self._place = {tid: at for at, tid in enumerate(tids)}
        self._memory = mmap.mmap(-1, _HEAD.size + 2 * len(tids))

    @property
    def head(self) -> tuple[int, int | None]:
        """``steps`` and ``at``."""
        steps, at = _HEAD.unpack_from(self._memory)
        return steps, at - 1 if at else None

    def comes(self, tid: int | None) -> None:
        """What comes next is about this thread; None: a batch is over."""
        steps, _ = _HEAD.unpack_from(self._memory)
        _HEAD.pack_into(self._memory, 0, steps + 1, 0 if tid is None else self._place[tid] + 1)

    def note(self, tid: int, said: int) -> None:
        """What has become of a thread."""
        steps, at = _HEAD.unpack_from(self._memory)
        _NOTE.pack_into(self._memory, _HEAD.size + _NOTE.size * self._place[tid], said)
        _HEAD.pack_into(self._memory, 0, steps + 1, at)

    def notes(self) -> dict[int, int]:
        """What is noted of all threads."""
        rows = _NOTE.iter_unpack(self._memory[_HEAD.size :])
        return {tid: said for tid, (said,) in zip(self._place, rows, strict=True)}

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()


#: The head of the board (steps, place of the thread plus one), and what is noted of each thread.
_HEAD, _NOTE = struct.Struct("=QI"), struct.Struct("=H")
Ptrace = Callable[[int, int, int], int]
#: ``None``: it has not stopped; else how it stopped: 0 for an end, the number of an event shifted by 8 with
#: SIGTRAP or the group's signal, or the signal that is about to be delivered.
Waitid = Callable[[int], int | None]


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
    todo = list(dict.fromkeys(tids))
    with _unstopped():
        while todo:
            todo = _by_helper(todo, limit, woken)
    return woken


@contextmanager
def _unstopped() -> Iterator[None]:
    """Keep signals back that would stop kmend, and give in to them at the end.

    A new process inherits the mask. A thread that ran before (a progress display's) has not got it and may
    take the signal for all of kmend, so it finds a handler in place of the default; only the main
    thread can set one.
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


# -- kmend's side ----------------------------------------------------------------------------------


def _by_helper(tids: Sequence[int], limit: float, woken: Woken) -> list[int]:
    """Have a helper interrupt them; what is left to do for another one."""
    try:
        board = Board(tids)
    except OSError as error:
        woken.failed |= dict.fromkeys(tids, f"no helper: {error.strerror}")
        return []
    try:
        helper, end = _forked(tids, limit, board)
    except OSError as error:
        board.close()
        woken.failed |= dict.fromkeys(tids, f"no helper: {error.strerror}")
        return []
    killed = False
    try:
        killed = not _watched(end, board, limit + SILENCE)
    finally:
        os.close(end)
        # at Ctrl-C it gets the time for what it is at
        _end(helper, 0.0 if killed else limit + SILENCE)
    left = []
    for tid, said in board.notes().items():
        match said:
            case Said.NOTHING:
                left.append(tid)
            case Said.INTERRUPTED | Said.RESTARTED:
                woken.interrupted.append(tid)
                woken.restarted += [tid] if said == Said.RESTARTED else []
            case Said.UNSTOPPED:
                woken.failed[tid] = f"it did not stop within {limit:g} s: it sleeps uninterruptibly"
            case _:
                woken.failed[tid] = _refused(said - Said.REFUSED)
    _, at = board.head
    board.close()
    if killed and at is not None and tids[at] in left:
        woken.failed[tids[at]] = "it cannot be reached: its process is executing another program"
        left.remove(tids[at])
    if len(left) == len(tids):
        woken.failed |= dict.fromkeys(left, "the helper that was to interrupt it ended before")
        return []
    return left


def _refused(number: int) -> str:
    if number == errno.EPERM:
        return "it is traced already, or the kernel does not let it be traced"
    return os.strerror(number)


def _forked(tids: Sequence[int], limit: float, board: Board) -> tuple[int, int]:
    """A helper at work: its number, and a descriptor that comes to its end when the helper does.

    Raises:
        OSError: there can be none.
    """
    reading, writing = os.pipe()
    kmend = os.getpid()
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of forks where threads run; the helper takes no lock that one could hold
            warnings.simplefilter("ignore", DeprecationWarning)
            helper = os.fork()
    except OSError:
        os.close(reading)
        os.close(writing)
        raise
    if helper == 0:
        _helper(tids, limit, kmend, board)
    os.close(writing)
    return helper, reading


def _watched(end: int, board: Board, silence: float) -> bool:
    """Wait for the helper's end; False: it has made no step for so many seconds."""
    poll = select.poll()
    poll.register(end, select.POLLIN)
    steps, since = board.head[0], time.monotonic()
    while not poll.poll(_TICK * 1000):
        now = time.monotonic()
        if board.head[0] != steps:
            steps, since = board.head[0], now
        elif now - since >= silence:
            return False
    return True


def _end(helper: int, patience: float) -> None:
    """Wait for its end; kill it when that does not come within so many seconds."""
    deadline = time.monotonic() + patience
    while os.waitid(os.P_PID, helper, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() >= deadline:
            os.kill(helper, signal.SIGKILL)
            break
        time.sleep(_PAUSE)
    os.waitpid(helper, 0)


# -- the helper's side -----------------------------------------------------------------------------


def _helper(tids: Sequence[int], limit: float, kmend: int, board: Board) -> NoReturn:
    """What the helper does; it does not return. Its end lets go of everything that it has seized."""
    try:
        # kmend acts on them, and the helper soon ends
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        syscalls.die_with_parent()
        at, free = 0, os.getppid() == kmend  # else it died before it would have taken the helper with it
        while free and at < len(tids):
            free = _interrupt_all(tids[at : at + BATCH], limit, board, syscalls.ptrace, _stopped)
            board.comes(None)
            at += BATCH
    finally:
        os._exit(0)


def _interrupt_all(tids: Sequence[int], limit: float, board: Board, ptrace: Ptrace, waitid: Waitid) -> bool:
    """One batch; whether nothing is held any more."""
    # looks into tasks' memory, which may take its time: before anything is held
    foretold: dict[int, restart.Call | None] = {}
    for tid in tids:
        board.comes(tid)
        foretold[tid] = restart.foretell(f"/proc/{tid}")
    held: list[int] = []

    def let_go() -> list[int]:
        return [tid for tid in held if not _let_go(tid, foretold[tid], board, ptrace, waitid)]

    for at, tid in enumerate(tids, 1):
        board.comes(tid)
        number = ptrace(syscalls.PTRACE_SEIZE, tid, 0)
        if number == 0:
            ptrace(syscalls.PTRACE_INTERRUPT, tid, 0)  # ESRCH: it has ended, and is waited for all the same
            held.append(tid)
        elif number == errno.ESRCH:
            board.note(tid, Said.INTERRUPTED)
        else:
            board.note(tid, Said.REFUSED + number)
        if at % _FEW == 0:  # seizing the next one may take its time
            held = let_go()
    deadline = time.monotonic() + limit
    while held:
        held = let_go()
        if held and time.monotonic() >= deadline:
            for tid in held:
                board.note(tid, Said.UNSTOPPED)
            return False
        if held:
            time.sleep(_PAUSE)
    return True


def _let_go(tid: int, foretold: restart.Call | None, board: Board, ptrace: Ptrace, waitid: Waitid) -> bool:
    """Let go of a thread that has stopped; whether nothing more is to be done about it."""
    try:
        stop = waitid(tid)
    except ChildProcessError:  # no longer ours: it has ended
        stop = 0
    if stop is None:
        return False
    said = Said.INTERRUPTED
    if stop:
        # a stop of our making, or a group's stop, has an event; else a signal is about to be delivered
        event, deliver = stop >> 8, stop & 0xFF
        if event == _EVENT_STOP and restart.begin_anew(tid, foretold):
            said = Said.RESTARTED
        ptrace(syscalls.PTRACE_DETACH, tid, 0 if event else deliver)
    board.note(tid, said)
    return True


def _stopped(tid: int) -> int | None:
    """Whether a seized thread has stopped, and how (:data:`Waitid`); an end is taken note of.

    The stop stays as it is (``WNOWAIT``): a signal is gone when nobody is left who would deliver it
    (``wait_task_stopped()``, kernel/exit.c; ``ptrace_signal()``, kernel/signal.c).
    """
    flags = os.WEXITED | os.WSTOPPED | os.WNOHANG | syscalls.WALL
    found = os.waitid(os.P_PID, tid, flags | os.WNOWAIT)
    if found is None:
        return None
    if found.si_code in (os.CLD_TRAPPED, os.CLD_STOPPED):
        return found.si_status
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG | syscalls.WALL)
    return 0
