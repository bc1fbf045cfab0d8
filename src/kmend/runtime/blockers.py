"""What a transition waits for, and what would help: one sentence for each task.

The rule is the kernel's own (``klp_check_stack_func()``, ``kernel/livepatch/transition.c``): a sleeping task
cannot switch while a function that is about to change is on its stack. For patching that is the code which
runs now (the original, or that of the patch below on the ``func_stack``); for unpatching it is the
patch's own code. A task that runs is never switched from outside; it switches by itself when it
returns to user space, a kernel thread only when it sleeps outside of the functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import assert_never

from kmend.core.live import Blocker, Cause, LivePatch, Phase, Task, Transition
from kmend.runtime import restart
from kmend.runtime.frames import Seeker, Watched
from kmend.runtime.place import Place
from kmend.runtime.tasks import read_task, sweep

#: ``KLP_UNPATCHED`` and ``KLP_PATCHED`` (include/linux/livepatch.h).
UNPATCHED, PATCHED = 0, 1
#: So many blockers are looked at in full; the others are counted. A stall has one cause, seldom a thousand.
SHOWN = 200

#: What a task waits for, by the function that waits: first match of any frame wins.
_WAITS = (
    (("wait_for_vfork_done",), "its vfork child to call exec or to end"),
    (("io_schedule", "folio_wait_bit", "wait_on_page_bit", "__wait_on_buffer", "blk_"), "a disk"),
    (("rpc_wait_bit_killable", "nfs_", "nfs4_", "__rpc_execute"), "an NFS server"),
    (("fuse_", "request_wait_answer"), "a FUSE file system's program"),
    (("jbd2_", "wait_transaction_locked"), "the file system's journal"),
    (("__mutex_lock", "mutex_lock"), "a mutex"),
    (("rwsem_down_", "down_read", "down_write"), "a semaphore"),
    (("synchronize_rcu", "wait_rcu_gp", "__wait_rcu_gp"), "a grace period of RCU"),
    (("kthread_stop", "flush_work", "__flush_work"), "other work of the kernel to end"),
    (("wait_for_completion", "__wait_for_common"), "a completion"),
    (("msleep", "schedule_timeout_uninterruptible", "usleep_range"), "its sleep to end"),
)
#: Where a vfork parent waits; the functions of waiting itself are not on a stack that /proc shows
#: (``in_sched_functions()``), and wait_for_vfork_done() may be inlined (kernel/fork.c).
_VFORK = ("kernel_clone", "_do_fork", "do_fork", "wait_for_vfork_done")
_IO_URING = (
    "io_cqring_wait",
    "__do_sys_io_uring_enter",
    "__x64_sys_io_uring_enter",
    "__se_sys_io_uring_enter",
)
_FREEZERS = ("__refrigerator", "do_freezer_trap")


@dataclass(slots=True)
class Explainer:
    """Explains the tasks of one transition; looks addresses up once, when a name alone does not tell."""

    place: Place
    patch: LivePatch
    seeker: Seeker
    unpatching: bool
    _with_aliases: Seeker | None = field(default=None)

    @classmethod
    def of(cls, place: Place, patch: LivePatch, patches: Sequence[LivePatch]) -> Explainer:
        """For a patch in transition; ``patches`` are all, from the bottom of the stack to the top."""
        return cls(place, patch, seeker(patch, patches), patch.phase is Phase.UNPATCHING)

    @property
    def knows_aliases(self) -> bool:
        """Whether all symbols have been read for the other names of the functions."""
        return self._with_aliases is not None

    def read_aliases(self) -> None:
        """Read all symbols for the other names of the functions, once; it takes a while."""
        if self._with_aliases is None:
            self._with_aliases = self.seeker.with_aliases(self.place)

    def undecided(self, row: Blocker) -> bool:
        """Whether the functions' other names, which have not been read yet, may put this task into one."""
        return self._with_aliases is None and not row.function and _may_be_inside(row.task)

    def explain(self, task: Task, *, aliases: bool = True) -> Blocker:
        """Why this task has not switched, and what helps. ``aliases``: read all symbols if that may tell."""
        row = self._hit(task, aliases)
        function, where = (row.name, row.object) if row else ("", "")
        cause = _cause(task, row is not None)
        # there alone the kernel's own restart does not come to help
        ring = cause is Cause.IO_URING and not task.io_worker
        unseen = ring and restart.waits_untimed(self.place, task.pid, task.tid)
        why, remedy = _words(task, cause, f"{function}()" if function else "", self.unpatching, unseen)
        wakeable = unseen or (cause is Cause.IN_FUNCTION and row is not None)
        return Blocker(task, cause, function, where, why, remedy, wakeable)

    def _hit(self, task: Task, aliases: bool) -> Watched | None:
        """The code that changes in which the task is."""
        stack = task.stack or ()
        hit = self.seeker.find(stack)
        if hit is None and _may_be_inside(task):
            if aliases:
                self.read_aliases()
            hit = self._with_aliases.find(stack) if self._with_aliases is not None else None
        return hit[0] if hit is not None else None


def _may_be_inside(task: Task) -> bool:
    return bool(task.stack) and task.state != "R"


def seeker(patch: LivePatch, patches: Sequence[LivePatch]) -> Seeker:
    """What no stack may hold for this transition, as far as names tell.

    A replacement may have any name. So when a patch is taken back, each frame in its own module holds that
    up; when one comes over another, each frame in the other's module that is not of a function which stays.
    """
    rows = watched(patch, patches)
    if patch.phase is Phase.UNPATCHING:
        return Seeker(rows, {patch.name: frozenset()})
    changing = {(row.code, row.name) for row in rows}
    foreign = {
        other.name: frozenset(
            f.name for obj in other.objects for f in obj.functions if (other.name, f.name) not in changing
        )
        for other in patches
        if any(row.code == other.name for row in rows)
    }
    return Seeker(rows, foreign)


def watched(patch: LivePatch, patches: Sequence[LivePatch]) -> tuple[Watched, ...]:
    """The code that no stack may hold for this transition."""
    rows = []
    below = [row for row in patches if row.order < patch.order and row.phase is not Phase.DISABLED]
    for obj in patch.objects:
        for function in obj.functions:
            code = obj.name
            if patch.phase is Phase.UNPATCHING:
                code = patch.name
            else:
                for other in below:  # the last one that has it is the one whose code runs now
                    for theirs in other.objects:
                        if theirs.name == obj.name and any(
                            (f.name, f.sympos) == (function.name, function.sympos) for f in theirs.functions
                        ):
                            code = other.name
            rows.append(Watched(function.name, obj.name, code))
    return tuple(rows)


def look(place: Place, patch: LivePatch, patches: Sequence[LivePatch], limit: int = SHOWN) -> Transition:
    """Look at a transition under way: how many tasks are left, and why each of the first ``limit``."""
    target = UNPATCHED if patch.phase is Phase.UNPATCHING else PATCHED
    seen = sweep(place, target)
    explainer = Explainer.of(place, patch, patches)
    return Transition(
        patch=patch.name,
        phase=patch.phase,
        target=target,
        tasks=seen.tasks,
        left=len(seen.pending),
        blockers=explained(place, explainer, seen.pending[:limit]),
        unreadable=seen.unreadable,
    )


def explained(
    place: Place,
    explainer: Explainer,
    pending: Sequence[tuple[int, int]],
    brief: Callable[[int], bool] = lambda _tid: False,
    *,
    aliases: bool = True,
) -> tuple[Blocker, ...]:
    """These (process, thread) numbers with their reasons; what has ended is left out.

    ``brief`` says of which threads no more is read than :func:`read_task` does then; ``aliases``: see
    :meth:`Explainer.explain`.
    """
    found = []
    for pid, tid in pending:
        task = read_task(place, pid, tid, brief=brief(tid))
        if task is not None:
            found.append(explainer.explain(task, aliases=aliases))
    return tuple(found)


def _cause(task: Task, in_function: bool) -> Cause:
    names = {frame.function for frame in task.stack or ()}
    if task.kthread:
        return Cause.KTHREAD_RUNNING if task.state == "R" else Cause.KTHREAD
    if task.state in "ZX":
        return Cause.ENDED
    if task.state == "t" or task.tracer:
        return Cause.TRACED
    if task.state == "T":
        return Cause.STOPPED
    if names & set(_FREEZERS):
        return Cause.FROZEN
    if task.state == "S" and task.stack and task.stack[0].function == "get_signal":
        # do_freezer_trap() is inlined there; who else waits right there is stopped (T, t)
        return Cause.FROZEN
    if task.state == "R":
        return Cause.RUNNING
    if task.state == "D":
        # what waits deeper inside of it is about to make a process, and waits for something else
        innermost = task.stack[0].function if task.stack else ""
        return Cause.VFORK if innermost in _VFORK else Cause.UNINTERRUPTIBLE
    if task.io_worker or names & set(_IO_URING):
        return Cause.IO_URING
    if in_function:
        return Cause.IN_FUNCTION
    if task.stack:
        return Cause.UNRELIABLE
    return Cause.UNKNOWN


def waits_for(task: Task) -> str:
    """What a sleeping task waits for, as far as its stack tells; '' when it does not."""
    function = min((frame.function for frame in task.stack or ()), key=_rank, default="")
    if _rank(function) < len(_WAITS):
        return f"{_WAITS[_rank(function)][1]} ({function})"
    return f"{task.wchan}()" if task.wchan else ""


@lru_cache(4096)
def _rank(function: str) -> int:
    """The first row of :data:`_WAITS` that the function is of, or their number: stacks hold the same few
    functions over and over."""
    return next((at for at, (words, _) in enumerate(_WAITS) if function.startswith(words)), len(_WAITS))


def _words(task: Task, cause: Cause, function: str, unpatching: bool, unseen: bool) -> tuple[str, str]:
    """The two sentences: why it waits, what helps."""
    inside = (f" inside {function}" + (" of the patch" if unpatching else "")) if function else ""
    waits = waits_for(task)
    if waits == function:
        waits = ""
    waiting = f", waiting for {waits}" if waits else ""
    match cause:
        case Cause.IN_FUNCTION:
            return (
                f"sleeps{inside}{waiting}",
                "an interruption lets it leave the function and restart its system call",
            )
        case Cause.RUNNING:
            return (
                "runs on a processor",
                "it switches by itself when it next returns to user space",
            )
        case Cause.VFORK:
            return (
                f"waits{inside} until {_vfork_child(task)} calls exec or ends",
                "no signal helps; it goes on when the child does",
            )
        case Cause.UNINTERRUPTIBLE:
            return (
                f"sleeps uninterruptibly{inside}{waiting}",
                "no signal reaches it; it goes on when what it waits for comes",
            )
        case Cause.IO_URING if task.io_worker:
            # io_fixup_restart_res(), io_uring/rw.c: a request is not begun anew
            return (
                f"carries out what its process has asked of io_uring{inside}{waiting}",
                "the kernel's own signal, which comes after 15 s, ends the request with EINTR, and so would "
                "an interruption (allow that with --interrupt-io-uring)",
            )
        case Cause.IO_URING:
            return (
                f"waits in io_uring_enter(){inside}",
                "the kernel's own signals never free it; an interruption does, and its call is begun anew"
                if unseen
                else "the kernel's own signals never free it; an interruption does, but its call, which has "
                "a timeout or has submitted something, then returns early: EINTR, or what it has submitted "
                "(allow that with --interrupt-io-uring)",
            )
        case Cause.KTHREAD:
            how = "sleeps uninterruptibly" if task.state == "D" else "sleeps"
            return (
                f"a kernel thread that {how}{inside}{waiting}",
                "it goes on when its work does; the kernel wakes it every 15 s if it sleeps interruptibly",
            )
        case Cause.KTHREAD_RUNNING:
            return (
                "a kernel thread that runs on a processor",
                "it switches when it sleeps outside of the patched functions",
            )
        case Cause.TRACED:
            by = f"process {task.tracer}" if task.tracer else "a debugger"
            stopped = ", which has stopped it" if task.state == "t" else ""
            return f"is traced by {by}{stopped}{inside}", "let the debugger continue or detach"
        case Cause.STOPPED:
            return f"is stopped{inside}", f"kill -CONT {task.pid} lets it go on"
        case Cause.FROZEN:
            return f"is frozen by its cgroup{inside}", "thaw its cgroup"
        case Cause.ENDED:
            # no stack counts as one without patched functions (stack_trace_save_tsk_reliable())
            return "has ended, and waits for its parent to ask", "it switches at the kernel's next look"
        case Cause.UNRELIABLE:
            where = f"; it is in {task.stack[0]}" if task.stack else ""
            return (
                f"sleeps, and no patched function is seen on its stack{where}",
                "the kernel looks again every second; if it finds the stack unreliable, only waking the task "
                "helps",
            )
        case Cause.UNKNOWN:
            return (
                "its stack cannot be read",
                "run kmend as root to see it; the kernel looks again every second",
            )
        case _:
            assert_never(cause)


def _vfork_child(task: Task) -> str:
    match task.children:
        case ():
            return "its vfork child"
        case (child,):
            return f"its vfork child {child}"
        case several:
            return f"its vfork child (one of {', '.join(map(str, several))})"
