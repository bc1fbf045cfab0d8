"""System calls that were interrupted and can be begun anew, so that the process does not see it.

Most system calls that a fake signal interrupts are restarted by the kernel itself. A few return EINTR
instead, because a restart would begin their timeout anew: ``epoll_wait()``, ``semop()``,
``rt_sigtimedwait()``, ``io_getevents()``, ``io_uring_enter()``. They do so also when no timeout was given.
Such a call, while its thread is held on its way to user space, can be told to restart: its return value in
the saved registers is changed from ``-EINTR`` to ``-ERESTARTNOHAND``, the kernel's own word for "restart,
unless a signal handler runs now" (``arch_do_signal_or_restart()``, ``handle_signal()``:
arch/x86/kernel/signal.c). If a real signal has come as well, its handler runs and the call returns EINTR, as
it would have without us.

Only calls are restarted that have done nothing yet and that have no timeout; only on x86-64, and only those
of 64-bit programs (a 32-bit program's registers are numbered otherwise).

The timeout of an ``io_uring_enter()`` may lie in the task's memory. Reading that would wait, without limit,
for a page which is not there and which another process has to bring (FUSE, userfaultfd), and any user can
arrange that. So only pages that are present are read (``/proc/PID/pagemap``); of others it cannot be told.
What is left is a race, a page that goes between the two looks, and a task whose ``mmap_lock`` somebody holds
for good: then kmend waits. Nothing is held meanwhile: all memory is read before anything is seized.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kmend.runtime import syscalls
from kmend.runtime.place import Place, optional

#: ``include/linux/errno.h``: restart if no handler.
ERESTARTNOHAND = 514
#: ``__USER_CS`` (arch/x86/include/asm/segment.h): what 64-bit code runs in.
_USER_CS = 0x33
#: Offsets in ``struct user_regs_struct`` (arch/x86/include/asm/user_64.h), in bytes.
_AX, _ORIG_AX, _CS = 80, 120, 136
#: rdi, rsi, rdx, r10, r8, r9: the arguments of a system call in their order.
_ARGUMENTS = (112, 104, 96, 56, 72, 64)
#: ``include/uapi/linux/io_uring.h``: the fifth argument is a structure, which may name a timeout.
_EXT_ARG = 1 << 3
#: ``io_uring_enter()`` in all tables of system calls that are younger than Linux 5.1.
IO_URING_ENTER = 426

_WORD = (1 << 64) - 1
#: Reads eight bytes of the thread's memory; None: not readable, or not without waiting.
Reader = Callable[[int], int | None]
#: ``PM_PRESENT`` (fs/proc/task_mmu.c): bit 63 of a page's eight bytes in ``/proc/PID/pagemap``.
_PRESENT = 1 << 63


@dataclass(frozen=True, slots=True)
class Call:
    """A system call by number, with its six arguments as the registers hold them."""

    number: int
    arguments: tuple[int, ...]


def _negative(value: int) -> bool:
    """Of an ``int``: the upper half of the register says nothing."""
    return bool(value & 0x80000000)


def _io_uring(arguments: tuple[int, ...], read: Reader) -> bool:
    """Nothing is submitted, so nothing has been; no timeout, and no shortest wait (``min_wait_usec``)."""
    if arguments[1] & 0xFFFFFFFF:
        return False
    if not arguments[3] & _EXT_ARG:
        return True
    # struct io_uring_getevents_arg: sigmask, sigmask_sz and min_wait_usec, ts
    size_and_wait, timeout = read(arguments[4] + 8), read(arguments[4] + 16)
    return timeout == 0 and size_and_wait is not None and size_and_wait >> 32 == 0


#: By number (arch/x86/entry/syscalls/syscall_64.tbl): whether a call with these arguments has no timeout.
_UNTIMED: Mapping[int, Callable[[tuple[int, ...], Reader], bool]] = {
    65: lambda _args, _read: True,  # semop
    128: lambda args, _read: args[2] == 0,  # rt_sigtimedwait
    208: lambda args, _read: args[4] == 0,  # io_getevents
    220: lambda args, _read: args[3] == 0,  # semtimedop
    232: lambda args, _read: _negative(args[3]),  # epoll_wait
    281: lambda args, _read: _negative(args[3]),  # epoll_pwait
    333: lambda args, _read: args[4] == 0,  # io_pgetevents
    441: lambda args, _read: args[3] == 0,  # epoll_pwait2
    IO_URING_ENTER: _io_uring,
}


def unseen(call: Call, read: Reader) -> bool:
    """Whether such a call, if it returned EINTR because of us, could be begun anew."""
    judge = _UNTIMED.get(call.number)
    return judge is not None and judge(call.arguments, read)


def waits_untimed(place: Place, pid: int, tid: int) -> bool:
    """Whether a sleeping thread is in a call that could be begun anew; False also when that is not known."""
    return foretell(f"{place.proc}/{pid}/task/{tid}") is not None


def foretell(folder: str) -> Call | None:
    """The call in which a sleeping thread is, if it could be begun anew; None also when that is not known.

    ``folder`` is the thread's in ``/proc``. For :func:`begin_anew`, which reads no memory.
    """
    call = _sleeps_in(folder)
    return call if call is not None and unseen(call, lambda address: read_word(folder, address)) else None


def _sleeps_in(folder: str) -> Call | None:
    if os.uname().machine != "x86_64":
        return None
    # number, six arguments, stack pointer, instruction pointer (fs/proc/base.c, proc_pid_syscall())
    words = (optional(f"{folder}/syscall") or "").split()
    if len(words) != 9:
        return None
    try:
        number, (*arguments, stack, _) = int(words[0]), [int(word, 16) for word in words[1:]]
    except ValueError:
        return None
    if not stack >> 32:  # perhaps a 32-bit program, to whom these numbers mean something else
        return None
    return Call(number, tuple(arguments))


def read_word(folder: str, address: int) -> int | None:
    """Eight bytes of a thread's memory, if they are there; None: not, or not readable by this user."""
    page = os.sysconf("SC_PAGESIZE")
    first, last = address // page, (address + 7) // page
    pages = _read(f"{folder}/pagemap", 8 * first, 8 * (last - first + 1))
    if pages is None or not all(row & _PRESENT for row in memoryview(pages).cast("Q")):
        return None
    word = _read(f"{folder}/mem", address, 8)
    return int.from_bytes(word, "little") if word is not None else None


def _read(path: str, at: int, size: int) -> bytes | None:
    """So many bytes of a file; None: it has fewer there, or may not be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.pread(fd, size, at)
    except (OSError, OverflowError):
        return None
    finally:
        os.close(fd)
    return found if len(found) == size else None


def begin_anew(tid: int, foretold: Call | None = None) -> bool:
    """For a thread that we hold on its way out of a system call: restart the call if it returns EINTR and
    nobody can tell. Returns whether it will be restarted.

    ``foretold`` is what :func:`foretell` said before it was held: the thread's memory is not read here.
    """
    if os.uname().machine != "x86_64":
        return False
    result, number = syscalls.peek_user(tid, _AX), syscalls.peek_user(tid, _ORIG_AX)
    # orig_ax is -1 outside of system calls, and in a handler that a signal has just been given to
    if result != -errno.EINTR & _WORD or number is None or number not in _UNTIMED:
        return False
    if syscalls.peek_user(tid, _CS) != _USER_CS:
        return False
    arguments = []
    for offset in _ARGUMENTS:
        value = syscalls.peek_user(tid, offset)
        if value is None:
            return False
        arguments.append(value)
    call = Call(number, tuple(arguments))
    if call != foretold and not unseen(call, lambda _address: None):
        return False
    return syscalls.poke_user(tid, _AX, -ERESTARTNOHAND & _WORD) == 0
