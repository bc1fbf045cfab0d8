"""``kernel/livepatch/patch.c``: func stacks, the ftrace handler, patching and unpatching of objects."""

from __future__ import annotations

from kmend.klp.ftrace import ftrace_location, register_ftrace_function, unregister_ftrace_function
from kmend.klp.structs import (
    EINVAL,
    UNDEFINED,
    UNPATCHED,
    Func,
    Function,
    Kernel,
    Object,
    Ops,
    Patch,
    Task,
)


def klp_find_ops(k: Kernel, old_func: Function | None) -> Ops | None:
    """The handler's data of an original function, None when no patch redirects it."""
    return k.klp_ops.get(old_func.addr) if old_func else None


def klp_ftrace_handler(k: Kernel, ops: Ops, current: Task) -> Function | None:
    """What the current task runs where it called ``ops.old_func``; None: the original.

    Only the top of the stack is asked whether it is in transition. A task that is not patched yet (or not
    any more) then takes the next one below, whatever state that one is in.
    """
    if not ops.func_stack:
        k.warn_on("klp_ftrace_handler: empty func_stack")
        return None
    func = ops.func_stack[0]
    if func.transition:
        patch_state = current.patch_state
        if patch_state == UNDEFINED:
            k.warn_on("klp_ftrace_handler: patch_state undefined")
        if patch_state == UNPATCHED:
            if len(ops.func_stack) == 1:
                return None
            func = ops.func_stack[1]
    if func.nop:
        return None
    return func.new_func


def redirect(k: Kernel, function: Function, current: Task) -> Function:
    """The code that runs when ``current`` calls ``function``: ftrace and its handler decide."""
    ops = k.klp_ops.get(function.addr)
    if ops is None:
        return function
    return (k.handler or klp_ftrace_handler)(k, ops, current) or function


def klp_unpatch_func(k: Kernel, func: Func) -> None:
    """Take a func off its stack; with the last one the ftrace handler goes."""
    if not func.patched:
        return k.warn_on("klp_unpatch_func: not patched")
    ops = klp_find_ops(k, func.old_func)
    if func.old_func is None or ops is None:
        return k.warn_on("klp_unpatch_func: no ops")
    if len(ops.func_stack) == 1:
        unregister_ftrace_function(k, func.old_func)
        ops.func_stack.remove(func)
        del k.klp_ops[func.old_func.addr]
    else:
        ops.func_stack.remove(func)
    func.patched = False
    if k.point:
        k.point("klp_unpatch_func")
    return None


def klp_patch_func(k: Kernel, func: Func) -> int:
    """Put a func on top of its function's stack; the first one brings the ftrace handler."""
    if func.old_func is None or func.patched:
        k.warn_on("klp_patch_func: no old_func or patched already")
        return -EINVAL
    ops = klp_find_ops(k, func.old_func)
    if ops is None:
        if not ftrace_location(func.old_func):
            k.pr_err(f"failed to find location for function '{func.old_name}'")
            return -EINVAL
        ret = register_ftrace_function(k, func.old_func)
        if ret:
            k.pr_err(f"failed to register ftrace handler for function '{func.old_name}' ({ret})")
            return ret
        k.klp_ops[func.old_func.addr] = Ops(func.old_func, [func])
    else:
        ops.func_stack.insert(0, func)
    func.patched = True
    if k.point:
        k.point("klp_patch_func")
    return 0


def _unpatch_object(k: Kernel, obj: Object, *, nops_only: bool) -> None:
    """``__klp_unpatch_object()``."""
    for func in obj.funcs:
        if nops_only and not func.nop:
            continue
        if func.patched:
            klp_unpatch_func(k, func)
    if obj.dynamic or not nops_only:
        obj.patched = False


def klp_unpatch_object(k: Kernel, obj: Object) -> None:
    """Take all funcs of an object off their stacks."""
    _unpatch_object(k, obj, nops_only=False)


def klp_patch_object(k: Kernel, obj: Object) -> int:
    """Put all funcs of a loaded object on their stacks, or none."""
    if obj.patched:
        k.warn_on("klp_patch_object: patched already")
        return -EINVAL
    for func in obj.funcs:
        ret = klp_patch_func(k, func)
        if ret:
            klp_unpatch_object(k, obj)
            return ret
    obj.patched = True
    return 0


def klp_unpatch_objects(k: Kernel, patch: Patch) -> None:
    """Unpatch every object of a patch."""
    for obj in patch.objs:
        if obj.patched:
            _unpatch_object(k, obj, nops_only=False)


def klp_unpatch_objects_dynamic(k: Kernel, patch: Patch) -> None:
    """Take the nops of a patch off their stacks."""
    for obj in patch.objs:
        if obj.patched:
            _unpatch_object(k, obj, nops_only=True)
