"""What is done to the kernel, one small step each; every refusal of it becomes a sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable

from kmend.core.errors import Failed, Refusal, Refused, Unable, UsageError
from kmend.core.files import open_regular
from kmend.core.kmsg import KernelMessage
from kmend.runtime import answers, syscalls
from kmend.runtime.patches import read_module
from kmend.runtime.place import Place, optional

#: Bits of ``CapEff`` (include/uapi/linux/capability.h).
_CAPABILITIES = ((16, "CAP_SYS_MODULE"), (19, "CAP_SYS_PTRACE"), (21, "CAP_SYS_ADMIN"))
#: ``PROC_PID_INIT_INO`` and ``PROC_USER_INIT_INO`` (include/linux/proc_ns.h).
_FIRST_NAMESPACES = {"pid": 0xEFFFFFFC, "user": 0xEFFFFFFD}
#: A patch's last reference to its module is dropped from a work queue, a moment after its folder is gone.
_REFERENCE_LIMIT = 10.0
#: So many seconds a patch's folder may outlive the patch.
_FOLDER_LIMIT = 1.0

Messages = Callable[[], tuple[KernelMessage, ...]]


def require_power(place: Place, verb: str) -> None:
    """Refuse to begin what would fail half way.

    Raises:
        Unable: not root (rule ``not-root``), or root of a container alone (rule ``container``).
    """
    status = optional(place.proc / "self/status") or ""
    fields = {line.partition(":")[0]: line.partition(":")[2].strip() for line in status.splitlines()}
    effective = int(fields.get("CapEff", "0") or "0", 16)
    lacking = [name for bit, name in _CAPABILITIES if not effective >> bit & 1]
    if os.geteuid() != 0 or lacking:
        raise Unable(
            f"kmend {verb} needs root",
            why=f"this user has not got {', '.join(lacking) or 'the files of root'}",
            next_step=f"sudo kmend {verb} …",
            rule="not-root",
        )
    if len(fields.get("NSpid", "").split()) > 1 or not _in_first_namespaces(place):
        raise Unable(
            f"kmend {verb} does not work inside a container",
            why="not all tasks of the kernel can be seen from here",
            next_step="run it on the host",
            rule="container",
        )


def _in_first_namespaces(place: Place) -> bool:
    """Whether this is the kernel's first PID and user namespace, or it does not tell.

    A ``/proc`` that was mounted in a PID namespace shows that one alone (``task_state()``, fs/proc/array.c),
    but the number of the first one is always the same.
    """
    for kind, number in _FIRST_NAMESPACES.items():
        with contextlib.suppress(OSError):
            if str((place.proc / "self/ns" / kind).readlink()) != f"{kind}:[{number}]":
                return False
    return True


def insert(name: str, fd: int, parameters: str, messages: Messages) -> None:
    """Load the module in an open file.

    Raises:
        Refused: the kernel refuses; the rule and the words follow its log (:mod:`kmend.runtime.answers`).
    """
    number = syscalls.finit_module(fd, parameters)
    if number:
        raise Refused([answers.explain(f"{name} was not loaded", number, messages(), name)])


def write_attribute(place: Place, name: str, attribute: str, value: str) -> int:
    """Write to ``/sys/kernel/livepatch/NAME/ATTRIBUTE``; 0 or the error number."""
    try:
        fd = os.open(place.livepatch / name / attribute, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def set_enabled(place: Place, name: str, enabled: bool, messages: Messages) -> bool:
    """Enable, disable, or turn a running transition round. False: the patch has gone meanwhile.

    Raises:
        Refused: the kernel refuses. EINVAL, its answer when the patch is as asked for already, is none:
        whoever made it so was quicker.
    """
    number = write_attribute(place, name, "enabled", "1" if enabled else "0")
    if number in (errno.ENOENT, errno.ENODEV):
        return False
    if number == errno.EINVAL:
        # a patch that has been taken back cannot be enabled again; its folder goes a moment later, from a
        # work queue (klp_free_patch_async(), kernel/livepatch/core.c)
        deadline = time.monotonic() + _FOLDER_LIMIT
        while (place.livepatch / name).is_dir():
            if optional(place.livepatch / name / "enabled") == ("1" if enabled else "0"):
                return True
            if time.monotonic() >= deadline:
                break
            time.sleep(0.02)
        else:
            return False
    if number:
        what = f"{name} was not {'enabled' if enabled else 'disabled'}"
        raise Refused([answers.explain(what, number, messages())])
    return True


def force(place: Place, name: str, messages: Messages) -> None:
    """End a transition at once, whatever tasks are doing.

    Raises:
        Refused: the kernel refuses; EINVAL: there is no transition of this patch (rule ``no-transition``).
    """
    number = write_attribute(place, name, "force", "1")
    if number in (errno.EINVAL, errno.ENOENT, errno.ENODEV):
        raise Refused(
            [
                Refusal(
                    "no-transition",
                    f"{name} was not forced: it is in no transition",
                    "it ended a moment ago",
                    "kmend status",
                )
            ]
        )
    if number:
        raise Refused([answers.explain(f"{name} was not forced", number, messages())])


def remove(place: Place, name: str, limit: float = _REFERENCE_LIMIT) -> bool:
    """Unload a module once nothing refers to it any more; ``limit`` in seconds.

    False: somebody else was quicker.

    Raises:
        Refused: it stays in use (rule ``module-in-use``), or the kernel refuses.
    """
    deadline = time.monotonic() + limit
    while True:
        number = syscalls.delete_module(name)
        if number in (0, errno.ENOENT):
            return number == 0
        # EINTR: a signal came while it waited for another load or unload (mutex_lock_interruptible())
        if number not in (errno.EWOULDBLOCK, errno.EBUSY, errno.EINTR):
            raise Refused([answers.unexplained(f"{name} was not unloaded", number, ())])
        if time.monotonic() >= deadline:
            break
        time.sleep(0.02)
    module = read_module(place, name)
    if module is None:
        return False
    holders = f"; it is used by {', '.join(module.holders)}" if module.holders else ""
    why = (
        f"it has {module.references} references{holders}. After a forced transition a module stays until the "
        "next boot: tasks may still be in its code"
    )
    if number == errno.EBUSY and not module.references:
        why = "the kernel answers EBUSY: the module is coming or going, or it has no exit function"
    raise Refused(
        [Refusal("module-in-use", f"{name} was not unloaded", why, "leave it; it does nothing any more")]
    )


def open_module(path: str) -> int:
    """A descriptor of the module's file, which is read, checked and loaded through it alone.

    Raises:
        Failed: (rule ``unreadable``) it cannot be opened. UsageError: (rule ``not-a-file``) it is no file.
    """
    try:
        return open_regular(path)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.EINVAL):
            raise UsageError(
                f"{path} is no file",
                why=error.strerror or "",
                next_step="name a livepatch module (.ko)",
                rule="not-a-file",
            ) from error
        raise Failed(
            f"{path} cannot be read",
            why=error.strerror or str(error),
            next_step="name a livepatch module (.ko)",
            rule="unreadable",
        ) from error
