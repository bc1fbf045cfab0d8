"""The layout of a livepatch's descriptors out of a kernel's own BTF: no compiler and no target needed.

A kernel with ``CONFIG_DEBUG_INFO_BTF`` shows its types as ``/sys/kernel/btf/vmlinux`` (format:
Documentation/bpf/btf.rst); the structures of ``include/linux/livepatch.h`` are among them. The 5 to 10 MB are
walked once, and only the few types that are wanted are looked at.
"""

from __future__ import annotations

import struct
from dataclasses import fields

from kmend.core.errors import Failed
from kmend.module.layout import Layout

_HEADER = struct.Struct("<HBBIIIII")
_MAGIC = 0xEB9F
_STRUCT = 4
#: Bytes behind the 12 common ones of a type: fixed, and for each of its entries (include/uapi/linux/btf.h).
_TAILS = {
    1: (4, 0),  # INT
    3: (12, 0),  # ARRAY
    _STRUCT: (0, 12),
    5: (0, 12),  # UNION
    6: (0, 8),  # ENUM
    13: (0, 8),  # FUNC_PROTO
    14: (4, 0),  # VAR
    15: (0, 12),  # DATASEC
    17: (4, 0),  # DECL_TAG
    19: (0, 12),  # ENUM64
}
_LAST_KIND = 19

#: Fields of :class:`Layout`: the structure and the member whose offset in bytes it has ('': its size).
_WANTED = {
    "patch_size": ("klp_patch", ""),
    "patch_mod": ("klp_patch", "mod"),
    "patch_objs": ("klp_patch", "objs"),
    "patch_replace": ("klp_patch", "replace"),
    "patch_states": ("klp_patch", "states"),
    "object_size": ("klp_object", ""),
    "object_name": ("klp_object", "name"),
    "object_funcs": ("klp_object", "funcs"),
    "callbacks": ("klp_object", "callbacks"),
    "func_size": ("klp_func", ""),
    "func_old_name": ("klp_func", "old_name"),
    "func_new_func": ("klp_func", "new_func"),
    "func_old_sympos": ("klp_func", "old_sympos"),
    "pre_patch": ("klp_callbacks", "pre_patch"),
    "post_patch": ("klp_callbacks", "post_patch"),
    "pre_unpatch": ("klp_callbacks", "pre_unpatch"),
    "post_unpatch": ("klp_callbacks", "post_unpatch"),
}


def descriptor_layout(data: bytes, where: str) -> Layout:
    """The layout of ``klp_patch``, ``klp_object``, ``klp_func`` and ``klp_callbacks`` in a kernel's BTF.

    All other fields are 0: with it descriptors can be read, and no module can be made.

    Raises:
        Failed: (rule ``bad-btf``) it is damaged, or has none of these structures.
    """
    try:
        found = _structures(data, {structure for structure, _ in _WANTED.values()})
    except (ValueError, struct.error) as error:
        raise Failed(f"{where}: the types cannot be read", why=str(error), rule="bad-btf") from error
    values = {field.name: 0 for field in fields(Layout)}
    for field_name, (structure, member) in _WANTED.items():
        if member not in found.get(structure, {}):
            raise Failed(
                f"{where} does not describe struct {structure}{'.' * bool(member)}{member}",
                why="the kernel's types do not say how a livepatch's descriptors are laid out",
                next_step="prepare the kernel's target (kmend kernel fetch)",
                rule="bad-btf",
            )
        values[field_name] = found[structure][member]
    return Layout(**values)


def _structures(data: bytes, names: set[str]) -> dict[str, dict[str, int]]:
    """For each structure of that name its size (key '') and its members' offsets in bytes."""
    magic, _, _, length, type_at, type_size, text_at, text_size = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError("no BTF magic number")
    texts = data[length + text_at : length + text_at + text_size]
    if length + max(type_at + type_size, text_at + text_size) > len(data):
        raise ValueError("it is truncated")
    wanted = {}
    for name in names:
        at = texts.find(b"\0" + name.encode() + b"\0")
        if at >= 0:
            wanted[at + 1] = name
    out: dict[str, dict[str, int]] = {}
    at, end = length + type_at, length + type_at + type_size
    head = struct.Struct("<III").unpack_from
    while at < end:
        name, info, size = head(data, at)
        kind, count = info >> 24 & 31, info & 0xFFFF
        if not 0 < kind <= _LAST_KIND:
            raise ValueError(f"a type of the unknown kind {kind}")
        fixed, each = _TAILS.get(kind, (0, 0))
        if kind == _STRUCT and name in wanted and count:
            members = {"": size}
            for row in range(count):
                member, _, place = head(data, at + 12 + 12 * row)
                # with the kind flag the upper byte is the size of a bit-field
                bits = place & 0xFFFFFF if info >> 31 else place
                members[texts[member : texts.find(b"\0", member)].decode(errors="replace")] = bits // 8
            out.setdefault(wanted[name], members)
        at += 12 + fixed + each * count
    return out
