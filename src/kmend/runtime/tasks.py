"""Tasks in ``/proc``: which have not switched yet, and where they are.

A look at a machine with thousands of threads reads one small file of each (``patch_state``); the rest only
of those that a transition waits for. Tasks come and go meanwhile: what vanishes is left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from kmend.core.errors import Unable
from kmend.core.live import Frame, Task, printable
from kmend.runtime.place import Place, optional, text

#: include/linux/sched.h: the ninth field of ``/proc/PID/stat`` has the task's flags.
PF_KTHREAD = 0x00200000
PF_IO_WORKER = 0x00000010
#: ``klp_patch_state`` of a task when no transition is under way (include/linux/livepatch.h).
UNDEFINED = -1

#: ``[<0>] name+0x1c/0x90 [module]``; kernels before 4.16 show an address between the angle brackets.
_FRAME = re.compile(r"^\[<[0-9a-f]+>\] ([^\s+]+)\+0x([0-9a-f]+)/0x[0-9a-f]+(?: \[([^\]\s]+)[^\]]*\])?")


@dataclass(frozen=True, slots=True)
class Sweep:
    """One look at every task. ``pending`` are (process, thread) numbers that have not reached the target.

    ``tasks`` counts all that have a ``patch_state``, ``unreadable`` those that this user may not ask.
    """

    tasks: int
    pending: tuple[tuple[int, int], ...]
    unreadable: int


def supported(place: Place) -> bool:
    """Whether the kernel shows ``patch_state`` (since 4.12, with reliable stack traces)."""
    return (place.proc / "self/patch_state").exists() or (place.proc / "1/patch_state").exists()


def sweep(place: Place, target: int) -> Sweep:
    """Ask every task for its ``patch_state``; ``target`` is the state that it should reach."""
    total = unreadable = 0
    pending = []
    for pid, tid in threads(place):
        try:
            fd = os.open(f"{place.proc}/{pid}/task/{tid}/patch_state", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError:
            unreadable += 1
            continue
        except OSError:
            continue
        try:
            word = os.read(fd, 16)
        except OSError:  # it ended between the two calls
            continue
        finally:
            os.close(fd)
        try:
            state = int(word)
        except ValueError:
            continue
        total += 1
        if state not in (target, UNDEFINED):
            pending.append((pid, tid))
    return Sweep(total, tuple(pending), unreadable)


def threads(place: Place) -> Iterator[tuple[int, int]]:
    """Every thread as (process, thread), as far as it still is there."""
    try:
        with os.scandir(place.proc) as found:
            pids = sorted(int(entry.name) for entry in found if entry.name.isdigit())
    except OSError as error:
        raise Unable(
            f"{place.proc} cannot be read",
            why=error.strerror or str(error),
            next_step="mount -t proc proc /proc",
            rule="no-proc",
        ) from error
    for pid in pids:
        try:
            names = os.listdir(f"{place.proc}/{pid}/task")  # noqa: PTH208 - a Path for each thread costs
        except OSError:
            continue
        for name in sorted(names, key=int):
            yield pid, int(name)


def read_task(place: Place, pid: int, tid: int, *, brief: bool = False) -> Task | None:
    """Everything about one thread that explains why it waits; None: it has ended.

    ``brief``: of one that sleeps interruptibly only its name, state and stack are read, which takes a fourth
    of the time. Whether somebody traces it is not known then, nor its numbers in other PID namespaces.
    """
    folder = f"{place.proc}/{pid}/task/{tid}"  # a Path for each of 5,000 threads' files costs
    stat = optional(f"{folder}/stat")
    if stat is None:
        return None
    # the name stands in parentheses and may hold any character, these two included
    head, _, rest = stat.rpartition(")")
    fields = rest.split()
    if len(fields) < 7:
        return None
    flags = _number(fields[6])
    kthread, io_worker = bool(flags & PF_KTHREAD), bool(flags & PF_IO_WORKER)
    if brief and fields[0] == "S" and not kthread:
        name = printable(head.partition("(")[2])
        process = name if pid == tid else printable(optional(f"{place.proc}/{pid}/comm") or "")
        stack = read_stack(place, pid, tid)
        return Task(pid, tid, name, process, "S", False, UNDEFINED, stack, io_worker=io_worker)
    status = _fields(optional(f"{folder}/status") or "")
    state = optional(f"{folder}/patch_state")
    children = optional(f"{folder}/children") or ""
    call = (optional(f"{folder}/syscall") or "").partition(" ")[0]
    return Task(
        pid=pid,
        tid=tid,
        name=printable(head.partition("(")[2]),
        process=printable(optional(f"{place.proc}/{pid}/comm") or ""),
        state=fields[0],
        kthread=kthread,
        patch_state=int(state) if state is not None and state.lstrip("-").isdigit() else UNDEFINED,
        stack=read_stack(place, pid, tid),
        wchan=_wchan(optional(f"{folder}/wchan")),
        tracer=_number(status.get("TracerPid", "")),
        pids=tuple(int(word) for word in status.get("NSpid", "").split() if word.isdigit()),
        children=tuple(int(word) for word in children.split() if word.isdigit()),
        system_call=int(call) if call.isdigit() else None,
        io_worker=io_worker,
    )


def read_stack(place: Place, pid: int, tid: int) -> tuple[Frame, ...] | None:
    """The kernel stack, innermost frame first; empty for a task that runs; None: not readable."""
    try:
        lines = text(f"{place.proc}/{pid}/task/{tid}/stack")
    except Unable:
        return None
    return None if lines is None else parse_stack(lines)


def parse_stack(lines: str) -> tuple[Frame, ...]:
    """The lines of ``/proc/PID/stack``; those of another form are left out."""
    return tuple(frame for line in lines.splitlines() if (frame := _frame(line)) is not None)


@lru_cache(4096)
def _frame(line: str) -> Frame | None:
    """A line; those who wait for the same thing have the same ones."""
    match = _FRAME.match(line)
    return Frame(match[1], int(match[2], 16), match[3] or "") if match else None


def _fields(status: str) -> dict[str, str]:
    rows = (line.partition(":") for line in status.splitlines())
    return {name: value.strip() for name, _, value in rows}


def _number(word: str) -> int:
    return int(word) if word.isdigit() else 0


def _wchan(word: str | None) -> str:
    return "" if word in (None, "0") else word or ""
