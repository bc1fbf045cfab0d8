"""Tasks: system calls, sleeping, waking, and the clock that drives the retries of a transition.

This file stands for the rest of the kernel: the entry code (``kernel/entry/common.c``), the idle loop
(``kernel/sched/idle.c``) and the workqueue's worker.
"""

from __future__ import annotations

from collections.abc import Callable

from kmend.klp.core import run_works
from kmend.klp.patch import redirect
from kmend.klp.structs import HZ, Frame, Function, Kernel, Kind, Sleep, Task, Wake
from kmend.klp.transition import klp_copy_process, klp_sched_try_switch, klp_update_patch_state


def new_kernel_tasks(k: Kernel, cpus: int = 1) -> None:
    """The idle tasks of a machine at rest: each runs on its CPU, save the first one.

    CPU 0 is where whatever asks for a transition, or retries it, runs at that moment.
    """
    k.idle.extend(Task(0, f"swapper/{cpu}", Kind.IDLE, cpu=cpu or None) for cpu in range(cpus))


def fork(k: Kernel, parent: Task | None, pid: int, comm: str, kind: Kind = Kind.USER) -> Task:
    """A new task, in the state of its parent (None: of a task that is where the transition is going)."""
    task = Task(pid, comm, kind)
    if parent is not None:
        klp_copy_process(parent, task)
    elif k.klp_transition_patch is not None:
        task.patch_state = k.klp_target_state
    k.tasks.append(task)
    return task


def exit_task(k: Kernel, task: Task) -> None:
    """The task is gone; nobody waits for it any more."""
    k.tasks.remove(task)


def call(k: Kernel, task: Task, function: Function) -> Function:
    """The task calls a function: what ftrace makes of it is entered. Returns the code that runs."""
    code = redirect(k, function, task)
    task.stack.append(Frame(function, code))
    return code


def ret(task: Task) -> None:
    """The task returns from the innermost function."""
    task.stack.pop()


def block(task: Task, sleep: Sleep, wake: Wake = Wake.RESTART) -> None:
    """The task goes to sleep where it is; ``wake`` says what its code does when it is woken early."""
    task.sleep, task.wake, task.cpu = sleep, wake, None


def resume(task: Task) -> None:
    """What the task waits for has happened."""
    task.sleep = Sleep.RUNNING
    task.woken = False


def exit_to_user_mode(k: Kernel, task: Task) -> None:
    """The task leaves the kernel: a safe place to switch (``exit_to_user_mode_loop()``)."""
    klp_update_patch_state(k, task)
    task.tif_notify_signal = False


def cond_resched(k: Kernel, task: Task) -> None:
    """The task offers to yield; since 6.4 it may switch there during a transition."""
    if k.klp_cond_resched:
        klp_sched_try_switch(k, task)


def settle(k: Kernel) -> None:
    """Let everything happen that needs no time: works that are due, woken tasks, idle CPUs, user tasks."""
    while True:
        ran = run_works(k)
        for task in k.idle:
            if task.woken:
                task.woken = False
                klp_update_patch_state(k, task)
                ran = True
        for task in k.tasks:
            if task.woken:
                task.woken = False
                woken_early(k, task)
                ran = True
            elif task.kind is Kind.USER and task.tif_patch_pending and not task.stack:
                # in user space: the next interrupt that returns there switches it
                exit_to_user_mode(k, task)
        if not ran:
            return


def woken_early(k: Kernel, task: Task) -> None:
    """A sleeper was woken by the livepatch core, not by what it waits for."""
    if task.wake is Wake.STAY:
        return
    calls = [frame.function for frame in task.stack]
    task.stack.clear()
    if task.kind is Kind.USER:
        exit_to_user_mode(k, task)
    if task.wake is Wake.RESTART:
        for function in calls:
            call(k, task, function)
    else:
        resume(task)


def advance(k: Kernel, ticks: int, until: Callable[[], bool] | None = None) -> bool:
    """Let time pass, up to ``ticks`` of the clock; whether ``until`` became true (then time stops there)."""
    end = k.jiffies + ticks
    settle(k)
    while True:
        if until is not None and until():
            return True
        due = min((work.due for work in k.works), default=end + 1)
        if due > end:
            k.jiffies = end
            return until is not None and until()
        k.jiffies = max(k.jiffies, due)
        settle(k)


def seconds(count: float) -> int:
    """Seconds as ticks of the clock."""
    return round(count * HZ)
