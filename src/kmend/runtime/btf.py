"""``/sys/kernel/btf/vmlinux``: how the running kernel lays out a few of its structures.

Format: Documentation/bpf/btf.rst. Of its 130,000 types only those that are asked for are looked into.
"""

from __future__ import annotations

import contextlib
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
    except (struct.error, KeyError, IndexError, ValueError) as error:
        raise Unable(f"{path} cannot be read", why=f"unknown form: {error}", rule="no-btf") from error


def parse(blob: bytes, names: Iterable[str]) -> dict[str, Structure]:
    """As :func:`structures`, from the file's bytes.

    Raises:
        struct.error, LookupError, ValueError: it is damaged or of a later form.
    """
    magic, _, _, head, type_at, type_size, text_at, text_size = _HEADER.unpack_from(blob)
    if magic != _MAGIC:
        raise KeyError("magic")
    text = blob[head + text_at : head + text_at + text_size]
    wanted = {at + 1: name for name in names if (at := text.find(f"\0{name}\0".encode())) >= 0}
    quick = _found_by_bytes(blob[head + type_at : head + type_at + type_size], text, wanted)
    if quick is not None:
        return quick
    found: dict[str, Structure] = {}
    at, end = head + type_at, head + type_at + type_size
    unpack = struct.Struct("<III").unpack_from
    while at < end:
        name, info, _ = unpack(blob, at)
        kind, count = info >> 24 & 0x1F, info & 0xFFFF
        fixed, each = _TAIL[kind]
        if kind == _STRUCT and name in wanted:
            found[wanted[name]] = _structure(blob, at, text)
        at += 12 + fixed + each * count
    return found


def _structure(blob: bytes, at: int, text: bytes) -> Structure:
    """The structure whose description begins at ``at``."""
    _, info, size = struct.unpack_from("<III", blob, at)
    members = {}
    for row in range(info & 0xFFFF):
        label, _, offset = struct.unpack_from("<III", blob, at + 12 + 12 * row)
        if label and text[label - 1] != 0:
            raise KeyError("no name begins there")
        word = text[label : text.index(b"\0", label)].decode(errors="replace")
        members[word] = (offset & 0xFFFFFF if info >> 31 else offset) // 8
    return Structure(size, members)


def _found_by_bytes(types: bytes, text: bytes, wanted: dict[int, str]) -> dict[str, Structure] | None:
    """Each structure by the bytes of its name's number, where exactly one place can be its description.

    Stepping over 130,000 types takes a second on a slow machine. None: some name is not found so simply.
    """
    found = {}
    for number, name in wanted.items():
        needle = struct.pack("<I", number)
        places = []
        at = types.find(needle)
        while at >= 0:
            if at % 4 == 0 and len(types) >= at + 12:
                _, info, _ = struct.unpack_from("<III", types, at)
                if info >> 24 & 0x1F == _STRUCT and info & 0xFFFF and not info & 0x60FF0000:
                    # any of these: another number that looks like it
                    with contextlib.suppress(struct.error, KeyError, IndexError, ValueError):
                        places.append(_structure(types, at, text))
            at = types.find(needle, at + 1)
        if len(places) != 1:
            return None
        found[name] = places[0]
    return found
