"""``kernel/livepatch/transition.c``: the consistency model.

A transition gives every task its own moment to go from old code to new. No task is switched while a
function that changes is on its stack.
"""

from __future__ import annotations

from kmend.klp.free import (
    klp_discard_nops,
    klp_free_patch_async,
    klp_free_replaced_patches_async,
    klp_unpatch_replaced_patches,
)
from kmend.klp.line import Feature
from kmend.klp.patch import klp_find_ops, klp_unpatch_objects
from kmend.klp.structs import (
    EADDRINUSE,
    EAGAIN,
    EBUSY,
    EINVAL,
    HZ,
    PATCHED,
    UNDEFINED,
    UNPATCHED,
    Frame,
    Func,
    Kernel,
    Kind,
    Object,
    Patch,
    Sleep,
    Task,
    WorkKind,
)

#: A stack of that many entries or more is not walked to its end.
MAX_STACK_ENTRIES = 100
#: Retries before the remaining tasks are signalled, and again after each further so many.
SIGNALS_TIMEOUT = 15


def klp_pre_patch_callback(k: Kernel, obj: Object) -> int:
    """Run before an object is patched; an error ends the patching, and then post_unpatch is not called."""
    callbacks = obj.callbacks
    ret = callbacks.pre_patch(k, obj) if callbacks.pre_patch else 0
    callbacks.post_unpatch_enabled = not ret
    return ret


def klp_post_patch_callback(k: Kernel, obj: Object) -> None:
    """Run when all tasks use the new code."""
    if obj.callbacks.post_patch:
        obj.callbacks.post_patch(k, obj)


def klp_pre_unpatch_callback(k: Kernel, obj: Object) -> None:
    """Run before unpatching starts; not in a transition that was reversed, nor for replaced patches."""
    if obj.callbacks.pre_unpatch:
        obj.callbacks.pre_unpatch(k, obj)


def klp_post_unpatch_callback(k: Kernel, obj: Object) -> None:
    """Run when no task uses the new code, if pre_patch had run without an error."""
    if obj.callbacks.post_unpatch_enabled and obj.callbacks.post_unpatch:
        obj.callbacks.post_unpatch(k, obj)
    obj.callbacks.post_unpatch_enabled = False


def _words(state: int) -> str:
    return "patching" if state == PATCHED else "unpatching"


def _transition_patch(k: Kernel) -> Patch:
    """The patch in transition, where the kernel would follow a NULL pointer if there were none."""
    assert k.klp_transition_patch is not None, "the callers hold that a transition is going on"
    return k.klp_transition_patch


def klp_synchronize_transition(k: Kernel) -> None:
    """Wait until every CPU has left the handler and ``klp_update_patch_state()`` that it may have been in."""
    if k.point:
        k.point("klp_synchronize_transition")


def klp_complete_transition(k: Kernel) -> None:
    """All tasks are in the target state: take down what is no longer needed and run the post callbacks."""
    patch = _transition_patch(k)
    target = k.klp_target_state
    k.pr_debug("klp_complete_transition", f"'{patch.name}': completing {_words(target)} transition")
    if patch.replace and target == PATCHED:
        klp_unpatch_replaced_patches(k, patch)
        klp_discard_nops(k)
    if target == UNPATCHED:
        klp_unpatch_objects(k, patch)
        # else the handler may see a func of this patch with func.transition cleared, and choose it
        klp_synchronize_transition(k)
    for obj in patch.objs:
        for func in obj.funcs:
            func.transition = False
            if k.point:
                k.point("klp_complete_transition: func->transition")
    if target == PATCHED:
        # else the handler may see func.transition set and a task's state undefined
        klp_synchronize_transition(k)
    for tasks in (k.tasks, k.idle):
        for task in tasks:
            if task.tif_patch_pending:
                k.warn_on("klp_complete_transition: TIF_PATCH_PENDING")
            task.patch_state = UNDEFINED
    if k.point:
        k.point("klp_complete_transition: patch_state")
    for obj in patch.objs:
        if not obj.loaded:
            continue
        if target == PATCHED:
            klp_post_patch_callback(k, obj)
        elif target == UNPATCHED:
            klp_post_unpatch_callback(k, obj)
    k.pr_notice(f"'{patch.name}': {_words(target)} complete")
    k.klp_target_state = UNDEFINED
    k.klp_transition_patch = None


def klp_cancel_transition(k: Kernel) -> None:
    """Undo a transition that was initialised and never started."""
    if k.klp_target_state != PATCHED:
        return k.warn_on("klp_cancel_transition: target state")
    name = _transition_patch(k).name
    k.pr_debug("klp_cancel_transition", f"'{name}': canceling patching transition, going to unpatch")
    k.klp_target_state = UNPATCHED
    klp_complete_transition(k)
    return None


def klp_update_patch_state(k: Kernel, task: Task) -> None:
    """Switch a task that is at a safe place: on its way to user space, or in the idle loop."""
    if task.tif_patch_pending:
        task.tif_patch_pending = False
        task.patch_state = k.klp_target_state


def stack_trace_save_tsk_reliable(task: Task) -> list[Frame] | None:
    """The frames of a task that does not run; None: the stack cannot be relied on.

    Unreliable are stacks with code unknown to the unwinder (``arch/x86/kernel/stacktrace.c``) and those that
    fill the buffer (``stack_trace_consume_entry()`` in ``kernel/stacktrace.c`` stops at the last entry).
    """
    if not task.reliable or len(task.stack) >= MAX_STACK_ENTRIES:
        return None
    return task.stack


def klp_check_stack_func(k: Kernel, func: Func, entries: list[Frame]) -> int:
    """-EAGAIN when the stack shows the function that this func takes over from, or is to give up."""
    if k.klp_target_state == UNPATCHED:
        code = func.new_func
    else:
        ops = klp_find_ops(k, func.old_func)
        if ops is None:
            k.warn_on("klp_check_stack_func: no ops")
            return -EINVAL
        if len(ops.func_stack) == 1:
            code = func.old_func
        else:
            code = ops.func_stack[ops.func_stack.index(func) + 1].new_func
    if code is None:
        k.warn_on("klp_check_stack_func: no code")
        return -EINVAL
    low, high = code.addr, code.addr + code.size
    for frame in entries:
        if low <= frame.address < high:
            return -EAGAIN
    return 0


def klp_check_stack(k: Kernel, task: Task) -> tuple[int, str]:
    """0 when no function that changes is on the task's stack; else the reason and the function's name."""
    entries = stack_trace_save_tsk_reliable(task)
    if entries is None:
        return -EINVAL, ""
    if entries:
        for obj in _transition_patch(k).objs:
            if not obj.patched:
                continue
            for func in obj.funcs:
                if klp_check_stack_func(k, func, entries):
                    return -EADDRINUSE, func.old_name
    return 0, ""


def klp_check_and_switch_task(k: Kernel, task: Task) -> tuple[int, str]:
    """Switch a task that does not run and whose stack is free of functions that change."""
    if task.cpu is not None and task is not k.current:
        return -EBUSY, ""
    ret, old_name = klp_check_stack(k, task)
    if ret:
        return ret, old_name
    task.tif_patch_pending = False
    task.patch_state = k.klp_target_state
    if k.point:
        k.point("klp_check_and_switch_task")
    return 0, ""


def klp_try_switch_task(k: Kernel, task: Task) -> bool:
    """Whether the task is in the target state now."""
    if task.patch_state == k.klp_target_state:
        return True
    ret, old_name = klp_check_and_switch_task(k, task)
    if not ret:
        return True
    who = f"{task.comm}:{task.pid}"
    text = {
        -EBUSY: f"{who} is running",
        -EINVAL: f"{who} has an unreliable stack",
        -EADDRINUSE: f"{who} is sleeping on function {old_name}",
    }[ret]
    k.pr_debug("klp_try_switch_task", f"klp_try_switch_task: {text}")
    return False


def klp_sched_try_switch(k: Kernel, current: Task) -> None:
    """``__klp_sched_try_switch()``, which ``cond_resched()`` calls during a transition since 6.4."""
    if current.tif_patch_pending:
        previous, k.current = k.current, current
        klp_try_switch_task(k, current)
        k.current = previous


def wake_up(task: Task) -> bool:
    """``wake_up_state(task, TASK_INTERRUPTIBLE)``: whether the task was asleep so that this wakes it."""
    if task.sleep is not Sleep.INTERRUPTIBLE or task.woken:
        return False
    task.woken = True
    return True


def klp_send_signals(k: Kernel) -> None:
    """Wake kernel threads, and send user tasks a signal that none of them ever sees, so that they move on."""
    if k.klp_signals_cnt == SIGNALS_TIMEOUT:
        k.pr_notice("signaling remaining tasks")
    for task in k.tasks:
        if not task.tif_patch_pending:
            continue
        if task.kind is Kind.USER:
            task.tif_notify_signal = True
        wake_up(task)


def round_jiffies_relative(now: int, delay: int) -> int:
    """The delay in ticks that ends near a whole second (``kernel/time/timer.c``, on CPU 0)."""
    due = now + delay
    rem = due % HZ
    due = due - rem if rem < HZ // 4 else due - rem + HZ
    return due - now if due > now else delay


def klp_try_complete_transition(k: Kernel) -> None:
    """Try to switch all tasks; when some are left come again in about a second, else complete."""
    target = k.klp_target_state
    if target == UNDEFINED:
        k.warn_on("klp_try_complete_transition: target state")
    complete = True
    for task in k.tasks:
        # klp_try_switch_task() asks the same first; asked here, most tasks cost no call
        if task.patch_state != target and not klp_try_switch_task(k, task):
            complete = False
    for task in k.idle:
        if task.online:
            if task.patch_state != target and not klp_try_switch_task(k, task):
                complete = False
                task.woken = True  # wake_up_if_idle(): the idle loop switches itself
        elif task.patch_state != target:
            task.tif_patch_pending = False
            task.patch_state = target
    if not complete:
        if k.klp_signals_cnt and not k.klp_signals_cnt % SIGNALS_TIMEOUT:
            klp_send_signals(k)
        k.klp_signals_cnt += 1
        k.schedule(WorkKind.TRANSITION, round_jiffies_relative(k.jiffies, HZ))
        return
    k.klp_cond_resched = False
    patch = _transition_patch(k)
    klp_complete_transition(k)
    if not patch.enabled:
        klp_free_patch_async(k, patch)
    elif patch.replace:
        klp_free_replaced_patches_async(k, patch)


def klp_start_transition(k: Kernel) -> None:
    """Ask every task to switch: from now on they may do so by themselves."""
    target = k.klp_target_state
    if target == UNDEFINED:
        k.warn_on("klp_start_transition: target state")
    k.pr_notice(f"'{_transition_patch(k).name}': starting {_words(target)} transition")
    for tasks in (k.tasks, k.idle):
        for task in tasks:
            if task.patch_state != target:
                task.tif_patch_pending = True
                if k.point:
                    k.point("klp_start_transition: TIF_PATCH_PENDING")
    if k.line.has(Feature.COND_RESCHED):
        k.klp_cond_resched = True
    k.klp_signals_cnt = 0


def klp_init_transition(k: Kernel, patch: Patch, state: int) -> None:
    """Put all tasks into the state to leave, and mark all funcs of the patch as being in transition."""
    if k.klp_target_state != UNDEFINED:
        k.warn_on("klp_init_transition: target state")
    k.klp_transition_patch = patch
    k.klp_target_state = state
    initial = UNPATCHED if state == PATCHED else PATCHED
    k.pr_debug("klp_init_transition", f"'{patch.name}': initializing {_words(state)} transition")
    for tasks in (k.tasks, k.idle):
        for task in tasks:
            if task.patch_state != UNDEFINED:
                k.warn_on("klp_init_transition: patch_state")
            task.patch_state = initial
    if k.point:
        k.point("klp_init_transition: patch_state")
    for obj in patch.objs:
        for func in obj.funcs:
            func.transition = True
            if k.point:
                k.point("klp_init_transition: func->transition")


def klp_reverse_transition(k: Kernel) -> None:
    """Turn a transition round. The work that retries it brings the reversed one to its end as well."""
    patch = _transition_patch(k)
    words = "patching to unpatching" if k.klp_target_state == PATCHED else "unpatching to patching"
    k.pr_debug("klp_reverse_transition", f"'{patch.name}': reversing transition from {words}")
    reverse_last = k.line.has(Feature.REVERSE_LAST)
    if not reverse_last:
        _turn(k, patch)
    for tasks in (k.tasks, k.idle):
        for task in tasks:
            task.tif_patch_pending = False
            if k.point:
                k.point("klp_reverse_transition: TIF_PATCH_PENDING")
    klp_synchronize_transition(k)
    if reverse_last:
        _turn(k, patch)
    klp_start_transition(k)


def _turn(k: Kernel, patch: Patch) -> None:
    patch.enabled = not patch.enabled
    k.klp_target_state = UNPATCHED if k.klp_target_state == PATCHED else PATCHED


def klp_copy_process(parent: Task, child: Task) -> None:
    """A new task starts in its parent's state, with its parent's request to switch."""
    child.tif_patch_pending = parent.tif_patch_pending
    child.patch_state = parent.patch_state


def klp_force_transition(k: Kernel) -> None:
    """Put all tasks into the target state whatever they are doing; the next retry completes the transition.

    Modules whose code a task may still be in are never to be removed: the patch itself when it was being
    taken back, all older ones when it was replacing them.
    """
    k.pr_warn("forcing remaining tasks to the patched state")
    for tasks in (k.tasks, k.idle):
        for task in tasks:
            klp_update_patch_state(k, task)
    patch = _transition_patch(k)
    if k.klp_target_state == UNPATCHED:
        patch.forced = True
    elif patch.replace:
        for other in k.klp_patches:
            if other is not patch:
                other.forced = True


def klp_transition_work_fn(k: Kernel) -> None:
    """The delayed work that retries a transition."""
    with k.lock():
        if k.klp_transition_patch is not None:
            klp_try_complete_transition(k)
