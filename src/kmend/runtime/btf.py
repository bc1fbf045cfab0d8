"""``/sys/kernel/btf/vmlinux``: how the running kernel lays out a few of its structures.

Format: Documentation/bpf/btf.rst. Of its 130,000 types only those that are asked for are looked into.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from kmend.core.errors import Unable
from kmend.runtime.place import Place, data

_HEADER = struct.Struct("<HBBIIIII")
_MAGIC = 0xEB9F
_STRUCT = 4
#: Bytes behind a type's 12: fixed, and for each of its members, by kind (BTF_KIND_*).
_TAIL = {
    **dict.fromkeys((2, 7, 8, 9, 10, 11, 12, 16, 18), (0, 0)),
    **{1: (4, 0), 3: (12, 0), 4: (0, 12), 5: (0, 12), 6: (0, 8), 13: (0, 8), 14: (4, 0), 15: (0, 12)},
    **{17: (4, 0), 19: (0, 12)},
}


@dataclass(frozen=True, slots=True)
class Structure:
    """``size`` and the members' offsets, in bytes."""

    size: int
    members: dict[str, int]


def structures(place: Place, names: Iterable[str]) -> dict[str, Structure]:
    """The structures of these names, as far as the kernel has them.

    Raises:
        Unable: (rule ``no-btf``) the kernel shows no BTF, or one of an unknown form.
    """
    path = place.sys / "kernel/btf/vmlinux"
    blob = data(path)
    if blob is None:
        raise Unable(f"{path} is not there", why="the kernel shows no BTF", rule="no-btf")
    try:
        return parse(blob, names)
    except (struct.error, KeyError, IndexError) as error:
        raise Unable(f"{path} cannot be read", why=f"unknown form: {error}", rule="no-btf") from error


def parse(blob: bytes, names: Iterable[str]) -> dict[str, Structure]:
    """As :func:`structures`, from the file's bytes.

    Raises:
        struct.error, KeyError, IndexError: it is damaged or of a later form.
    """
    magic, _, _, head, type_at, type_size, text_at, text_size = _HEADER.unpack_from(blob)
    if magic != _MAGIC:
        raise KeyError("magic")
    text = blob[head + text_at : head + text_at + text_size]
    wanted = {at + 1: name for name in names if (at := text.find(f"\0{name}\0".encode())) >= 0}
    found: dict[str, Structure] = {}
    at, end = head + type_at, head + type_at + type_size
    unpack = struct.Struct("<III").unpack_from
    while at < end:
        name, info, size = unpack(blob, at)
        kind, count = info >> 24 & 0x1F, info & 0xFFFF
        fixed, each = _TAIL[kind]
        if kind == _STRUCT and name in wanted:
            members = {}
            bitfields = info >> 31
            for row in range(count):
                label, _, offset = unpack(blob, at + 12 + 12 * row)
                word = text[label : text.index(b"\0", label)].decode(errors="replace")
                members[word] = (offset & 0xFFFFFF if bitfields else offset) // 8
            found[wanted[name]] = Structure(size, members)
        at += 12 + fixed + each * count
    return found
