"""Which tasks are inside of functions that are about to change, before anything is loaded.

The same question that the kernel asks of each task in a transition (``klp_check_stack_func()``,
kernel/livepatch/transition.c), asked of ``/proc/PID/task/TID/stack``: a few looks, because a task that
sleeps there now may be gone a moment later, and one that comes and goes holds nothing up for long.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kmend.core.live import Blocker, Cause, LivePatch, Task
from kmend.core.plan import Inside, Leaves, Look
from kmend.runtime.blockers import Explainer
from kmend.runtime.frames import Seeker, Watched
from kmend.runtime.place import Place, optional
from kmend.runtime.tasks import PF_KTHREAD, parse_stack, read_task, threads

#: The looks are spread over so many seconds: about the time between two retries of the kernel.
SPAN = 1.0
#: What a kernel thread's main function returns to (kernel/kthread.c, arch/x86/entry).
_BELOW_MAIN = ("kthread", "ret_from_fork", "ret_from_fork_asm")


@dataclass(frozen=True, slots=True)
class Looks:
    """What all looks found. ``busy`` are kernel threads that ran on a processor at every one of them."""

    looks: tuple[Look, ...]
    inside: tuple[Inside, ...]
    busy: tuple[tuple[int, str], ...]


@dataclass(slots=True)
class _Trace:
    """What is known of one thread over the looks."""

    pid: int
    seen: list[int]
    last: tuple[Watched, int, bool] | None = None
    task: Task | None = None


def looks(
    place: Place,
    seeker: Seeker,
    patch: LivePatch,
    number: int,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Looks:
    """Look ``number`` times at all tasks, spread over :data:`SPAN` seconds. Our own threads are left out.

    ``patch`` is the one to come, on top of all others.

    Raises:
        Unable: (rule ``no-proc``) there is no ``/proc``.
    """
    found: dict[int, _Trace] = {}
    rows: list[Look] = []
    busy: set[int] | None = None
    pattern = seeker.pattern()
    began = clock()
    for at in range(number):
        due = began + SPAN * at / max(number - 1, 1)
        if clock() < due:
            sleep(due - clock())
        start = clock()
        row, running = _look(place, seeker, pattern, found, at)
        rows.append(replace(row, seconds=round(start - began, 3)))
        busy = set(running) if busy is None else busy & set(running)
    inside = tuple(
        one
        for tid, trace in sorted(found.items())
        if (one := _judged(place, seeker, patch, tid, trace, number))
    )
    return Looks(tuple(rows), inside, tuple(_kthreads(place, busy or set())))


def _look(
    place: Place, seeker: Seeker, pattern: re.Pattern[str] | None, found: dict[int, _Trace], at: int
) -> tuple[Look, list[int]]:
    """One look; fills ``found``. Returns also the threads that show no stack because they run."""
    own = os.getpid()
    tasks = inside = unreadable = 0
    running: list[int] = []
    for pid, tid in threads(place):
        if pid == own:
            continue
        text = optional(f"{place.proc}/{pid}/task/{tid}/stack")
        if text is None:
            # it ended meanwhile, or this user may not read it
            unreadable += os.path.exists(f"{place.proc}/{pid}/task/{tid}/stack")  # noqa: PTH110 - per thread
            continue
        tasks += 1
        if not text:
            running.append(tid)
            continue
        if pattern is None or not pattern.search(text):
            continue
        hit = seeker.find(parse_stack(text))
        if hit is None:
            continue
        inside += 1
        trace = found.setdefault(tid, _Trace(pid, []))
        trace.seen.append(at)
        trace.last = hit
        task = read_task(place, pid, tid)
        # what was read a moment later may be another place; the frame that was seen counts
        trace.task = replace(task, stack=parse_stack(text)) if task is not None else trace.task
    return Look(0.0, tasks, inside, len(running), unreadable), running


def _judged(
    place: Place, seeker: Seeker, patch: LivePatch, tid: int, trace: _Trace, number: int
) -> Inside | None:
    """What a task that was seen inside means for the transition; None: it has ended."""
    if (
        trace.task is None
        or trace.last is None
        or optional(f"{place.proc}/{trace.pid}/task/{tid}/stat") is None
    ):
        return None
    row, at, certain = trace.last
    # uncertain: a row of its own, so that it is named as it was seen
    known = seeker if certain else replace(seeker, watched=(*seeker.watched, row))
    explainer = Explainer(place, patch, known, unpatching=False)
    blocker = explainer.explain(trace.task)
    left = trace.seen[-1] < number - 1 or any(
        b - a > 1 for a, b in zip(trace.seen, trace.seen[1:], strict=False)
    )
    leaves = Leaves.ITSELF if left else _leaves(blocker, at)
    return Inside(blocker, len(trace.seen), leaves, certain)


def _leaves(blocker: Blocker, at: int) -> Leaves:
    """For a task that was still inside at the last look; ``at`` is the frame's place in its stack."""
    task = blocker.task
    below = [frame.function for frame in (task.stack or ())[at + 1 :]]
    if task.kthread:
        return Leaves.NEVER if below[:1] and below[0] in _BELOW_MAIN else Leaves.EVENT
    match blocker.cause:
        case Cause.IN_FUNCTION:
            return Leaves.SIGNAL
        case Cause.IO_URING if blocker.wakeable:  # by kmend, not by the kernel's own signals
            return Leaves.SIGNAL
        case Cause.RUNNING:
            return Leaves.ITSELF
        case _:
            return Leaves.EVENT


def _kthreads(place: Place, tids: set[int]) -> Iterator[tuple[int, str]]:
    """Those that are kernel threads and really run; a thread that is just ending shows no stack either."""
    for tid in sorted(tids):
        head, _, rest = (optional(place.proc / str(tid) / "stat") or "").rpartition(")")
        fields = rest.split()
        if len(fields) > 6 and fields[0] == "R" and int(fields[6]) & PF_KTHREAD:
            yield tid, head.partition("(")[2]
