"""The running kernel: which build it is, what it has been through, what it allows."""

from __future__ import annotations

import errno
import os
import struct

from kmend.core.live import KernelState
from kmend.core.taint import decode
from kmend.runtime.place import Place, data, flag, is_folder, optional

#: ``NT_GNU_BUILD_ID`` of the note's owner ``GNU`` (include/linux/buildid.h).
NT_GNU_BUILD_ID = 3


def read_kernel(place: Place) -> KernelState:
    """Everything that this user may know of it. Never raises."""
    taint = optional(place.proc / "sys/kernel/tainted")
    number = int(taint) if taint is not None and taint.isdigit() else None
    name = os.uname()
    ftrace, dead = _ftrace(place)
    return KernelState(
        release=optional(place.proc / "sys/kernel/osrelease") or name.release,
        version=optional(place.proc / "sys/kernel/version") or name.version,
        build_id=build_id(_notes(place)),
        boot_id=optional(place.proc / "sys/kernel/random/boot_id") or "",
        livepatch=is_folder(place.livepatch),
        taint=number,
        taints=decode(number or 0),
        signatures_enforced=flag(place.sys / "module/module/parameters/sig_enforce"),
        lockdown=_lockdown(place),
        modules_disabled=flag(place.proc / "sys/kernel/modules_disabled"),
        ftrace_enabled=ftrace,
        ftrace_dead=dead,
    )


def _ftrace(place: Place) -> tuple[bool | None, bool]:
    """Whether ftrace is on, and whether it has shut itself down.

    After ``ftrace_kill()`` its sysctl answers ENODEV (``ftrace_enable_sysctl()``, kernel/trace/ftrace.c).
    """
    path = place.proc / "sys/kernel/ftrace_enabled"
    try:
        path.read_bytes()
    except OSError as error:
        return (False, True) if error.errno == errno.ENODEV else (None, False)
    return flag(path), False


def _notes(place: Place) -> bytes:
    """``/sys/kernel/notes``: the image's ELF notes, readable for everyone (kernel/ksysfs.c)."""
    return data(place.sys / "kernel/notes") or b""


def build_id(notes: bytes) -> str:
    """The GNU build id among ELF notes, as hexadecimal digits; '' when there is none."""
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        name = notes[at + 12 : at + 12 + name_size]
        at += 12 + (name_size + 3) // 4 * 4
        if kind == NT_GNU_BUILD_ID and name == b"GNU\0":
            return notes[at : at + size].hex()
        at += (size + 3) // 4 * 4
    return ""


def _lockdown(place: Place) -> str:
    """``none``, ``integrity`` or ``confidentiality``: the word in brackets; '' when the LSM is not there."""
    shown = optional(place.sys / "kernel/security/lockdown") or ""
    return shown.partition("[")[2].partition("]")[0]
