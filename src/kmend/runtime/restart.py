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
#: Reads eight bytes of the thread's memory; None: not readable.
Reader = Callable[[int], int | None]


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
    if os.uname().machine != "x86_64":
        return False
    # number, six arguments, stack pointer, instruction pointer (fs/proc/base.c, proc_pid_syscall())
    words = (optional(f"{place.proc}/{pid}/task/{tid}/syscall") or "").split()
    if len(words) != 9:
        return False
    try:
        number, (*arguments, stack, _) = int(words[0]), [int(word, 16) for word in words[1:]]
    except ValueError:
        return False
    if not stack >> 32:  # perhaps a 32-bit program, to whom these numbers mean something else
        return False

    def read(address: int) -> int | None:
        try:
            fd = os.open(f"{place.proc}/{pid}/task/{tid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            found = os.pread(fd, 8, address)
        except (OSError, OverflowError):
            return None
        finally:
            os.close(fd)
        return int.from_bytes(found, "little") if len(found) == 8 else None

    return unseen(Call(number, tuple(arguments)), read)


def begin_anew(tid: int) -> bool:
    """For a thread that we hold on its way out of a system call: restart the call if it returns EINTR and
    nobody can tell. Returns whether it will be restarted."""
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
    if not unseen(Call(number, tuple(arguments)), lambda at: syscalls.peek_data(tid, at)):
        return False
    return syscalls.poke_user(tid, _AX, -ERESTARTNOHAND & _WORD) == 0
