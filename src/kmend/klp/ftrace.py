"""What the livepatch core asks of ftrace (``kernel/trace/ftrace.c``), and what ftrace answers."""

from __future__ import annotations

from kmend.klp.structs import EBUSY, Function, Kernel


def ftrace_location(function: Function) -> int:
    """The address of the function's ftrace entry; 0: it has none (notrace, data, assembler)."""
    return function.addr if function.ftrace else 0


def register_ftrace_function(k: Kernel, function: Function) -> int:
    """Attach a handler that may change the instruction pointer (``IPMODIFY``) and must stay (``PERMANENT``).

    Returns -EBUSY when ftrace is switched off (``__register_ftrace_function()``) or another user redirects
    the function (``__ftrace_hash_update_ipmodify()``: a second livepatch core, a kprobe with a post handler).
    """
    if not k.ftrace_enabled:
        return -EBUSY
    if function.addr in k.ipmodify:
        return -EBUSY
    k.ipmodify.add(function.addr)
    return 0


def unregister_ftrace_function(k: Kernel, function: Function) -> int:
    """Take the handler away; when this returns no CPU is inside of it."""
    if k.point:
        k.point("unregister_ftrace_function")
    k.ipmodify.discard(function.addr)
    return 0


def set_ftrace_enabled(k: Kernel, value: bool) -> int:
    """Write ``kernel.ftrace_enabled`` (``ftrace_enable_sysctl()``).

    Returns -EBUSY when it is to be switched off while a permanent handler, that is any live patch, is there.
    """
    if not value and k.klp_ops:
        return -EBUSY
    k.ftrace_enabled = value
    return 0
