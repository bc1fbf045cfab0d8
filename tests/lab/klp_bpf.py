"""Attach a BPF program to the entry (``fentry``) or the return (``fexit``) of a function, and stay.

    klp_bpf.py fentry|fexit FUNCTION

Runs inside a guest, with the standard library alone: the program is two instructions, loaded with bpf(2).
Prints the number of its file descriptor: ``/proc/PID/fdinfo`` counts its runs (``kernel.bpf_stats_enabled``).
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
from pathlib import Path

#: include/uapi/linux/bpf.h and arch/x86/entry/syscalls/syscall_64.tbl
SYS_BPF = 321
BPF_PROG_LOAD, BPF_RAW_TRACEPOINT_OPEN = 5, 17
BPF_PROG_TYPE_TRACING = 26
ATTACH = {"fentry": 24, "fexit": 25}
BTF_KIND_FUNC = 12
#: r0 = 0; exit
CODE = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)
#: Bytes behind a BTF type's 12: fixed, and for each member, by kind (Documentation/bpf/btf.rst).
TAIL = {
    **dict.fromkeys((2, 7, 8, 9, 10, 11, 12, 16, 18), (0, 0)),
    **{1: (4, 0), 3: (12, 0), 4: (0, 12), 5: (0, 12), 6: (0, 8), 13: (0, 8), 14: (4, 0), 15: (0, 12)},
    **{17: (4, 0), 19: (0, 12)},
}

libc = ctypes.CDLL(None, use_errno=True)


def function_id(name: str) -> int:
    """The BTF id of a function of vmlinux."""
    blob = Path("/sys/kernel/btf/vmlinux").read_bytes()
    _, _, _, head, type_at, type_size, text_at, text_size = struct.unpack_from("<HBBIIIII", blob)
    text = blob[head + text_at : head + text_at + text_size]
    wanted = text.index(f"\0{name}\0".encode()) + 1
    at, end, number = head + type_at, head + type_at + type_size, 1
    unpack = struct.Struct("<II").unpack_from
    while at < end:
        label, info = unpack(blob, at)
        kind = info >> 24 & 0x1F
        if kind == BTF_KIND_FUNC and label == wanted:
            return number
        fixed, each = TAIL[kind]
        at += 12 + fixed + each * (info & 0xFFFF)
        number += 1
    raise LookupError(name)


def bpf(command: int, attr: bytes) -> int:
    data = ctypes.create_string_buffer(attr, len(attr))
    found = libc.syscall(SYS_BPF, command, data, len(attr))
    if found < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)


def load(kind: str, name: str) -> int:
    """BPF_PROG_LOAD: the program's file descriptor."""
    code, license_ = ctypes.create_string_buffer(CODE, len(CODE)), ctypes.create_string_buffer(b"GPL")
    attr = struct.pack(
        "<IIQQIIQII16sIIIIQIIQIII",
        BPF_PROG_TYPE_TRACING,
        len(CODE) // 8,
        ctypes.addressof(code),
        ctypes.addressof(license_),
        *(0, 0, 0, 0, 0),  # log_level, log_size, log_buf, kern_version, prog_flags
        b"kd",
        0,  # prog_ifindex
        ATTACH[kind],
        *(0, 0, 0, 0, 0, 0, 0),  # prog_btf_fd, func_info_…, line_info_…
        function_id(name),
        0,  # attach_btf_obj_fd: vmlinux
    )
    return bpf(BPF_PROG_LOAD, attr)


def main() -> None:
    kind, name = sys.argv[1:]
    program = load(kind, name)
    bpf(BPF_RAW_TRACEPOINT_OPEN, struct.pack("<QII", 0, program, 0))
    print(program, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
