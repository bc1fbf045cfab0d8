"""The system calls that Python does not offer: modules and ptrace, through the C library.

Each function returns 0, or the error number with which the kernel refused.
"""

from __future__ import annotations

import ctypes
import os
import signal
from functools import cache

from kmend.core.errors import Unable

#: arch/x86/entry/syscalls/syscall_64.tbl; include/uapi/asm-generic/unistd.h for the others.
_NUMBERS = {"x86_64": (313, 176), "aarch64": (273, 106), "riscv64": (273, 106), "s390x": (344, 129)}

#: include/uapi/linux/ptrace.h
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_DETACH = 17
_PTRACE_PEEKUSER, _PTRACE_POKEUSER = 3, 6
#: include/uapi/linux/prctl.h
_PR_SET_PDEATHSIG = 1
#: ``waitpid(2)``: also for threads that are no children (include/uapi/linux/wait.h).
WALL = 0x40000000


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    library.ptrace.restype = ctypes.c_long
    library.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    return library


def _number(which: int) -> int:
    machine = os.uname().machine
    try:
        return _NUMBERS[machine][which]
    except KeyError:
        raise Unable(
            f"kmend cannot load modules on {machine}",
            why="it does not know this machine's system call numbers",
            next_step="use insmod and rmmod",
            rule="machine",
        ) from None


def finit_module(fd: int, parameters: str) -> int:
    """Load the module in an open file; returns when its init function has. Flags: none, nothing is forced."""
    words = ctypes.c_char_p(os.fsencode(parameters))
    if _libc().syscall(ctypes.c_long(_number(0)), ctypes.c_long(fd), words, ctypes.c_long(0)) == 0:
        return 0
    return ctypes.get_errno()


def delete_module(name: str) -> int:
    """Unload a module; EWOULDBLOCK when it is in use. Never by force."""
    flags = ctypes.c_long(os.O_NONBLOCK)
    if _libc().syscall(ctypes.c_long(_number(1)), ctypes.c_char_p(os.fsencode(name)), flags) == 0:
        return 0
    return ctypes.get_errno()


def ptrace(request: int, tid: int, data: int = 0) -> int:
    """``ptrace(2)`` with address 0."""
    if _libc().ptrace(request, tid, None, ctypes.c_void_p(data)) == 0:
        return 0
    return ctypes.get_errno()


def die_with_parent() -> int:
    """``prctl(PR_SET_PDEATHSIG, SIGKILL)``: this process is killed when the thread that forked it ends."""
    if _libc().prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL)) == 0:
        return 0
    return ctypes.get_errno()


def peek_user(tid: int, offset: int) -> int | None:
    """A word (64 bits, unsigned) of a stopped thread's ``struct user``; None: it is not ours, or gone."""
    # the library's function returns the word itself: only errno tells -1 from a failure
    ctypes.set_errno(0)
    word = int(_libc().ptrace(_PTRACE_PEEKUSER, tid, ctypes.c_void_p(offset), None))
    return None if word == -1 and ctypes.get_errno() else word & ((1 << 64) - 1)


def poke_user(tid: int, offset: int, value: int) -> int:
    """Write a word of a stopped thread's ``struct user``."""
    if _libc().ptrace(_PTRACE_POKEUSER, tid, ctypes.c_void_p(offset), ctypes.c_void_p(value)) == 0:
        return 0
    return ctypes.get_errno()
