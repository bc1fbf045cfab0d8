"""Did the layout of a structure change? Types of the two objects, from the BTF that gcc wrote (``-gbtf``).

A live patch meets data that the old code laid out. A field added, moved or resized, or an enumerator
that means another number, makes new code read old data wrongly; no comparison of functions would see
it, since the new functions are consistent among themselves.

Format: Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from kmend.core.errors import Failed, Refusal
from kmend.elf.model import ElfFile

_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_MAGIC = 0xEB9F

_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM, _FWD, _TYPEDEF = range(1, 9)
_VOLATILE, _CONST, _RESTRICT, _FUNC, _PROTO, _VAR, _DATASEC, _FLOAT = range(9, 17)
_DECL_TAG, _TYPE_TAG, _ENUM64 = 17, 18, 19
#: Bytes behind the common part of a type: fixed, and for each of its vlen entries.
_TAIL = {
    _INT: (4, 0),
    _ARRAY: (12, 0),
    _STRUCT: (0, 12),
    _UNION: (0, 12),
    _ENUM: (0, 8),
    _PROTO: (0, 8),
    _VAR: (4, 0),
    _DATASEC: (0, 12),
    _DECL_TAG: (4, 0),
    _ENUM64: (0, 12),
}
_SHELLS = (_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG)


@dataclass(frozen=True, slots=True)
class Member:
    """A field: ``offset`` and ``bits`` in bits (``bits`` 0: no bit-field); ``type`` is a text that is equal
    for types of equal layout."""

    name: str
    offset: int
    bits: int
    type: str


@dataclass(frozen=True, slots=True)
class Layout:
    """A structure, union or enumeration (whose members have their value as ``offset``); ``size`` in bytes."""

    kind: str
    size: int
    members: tuple[Member, ...]


class Types:
    """The named types of one object."""

    def __init__(self, data: bytes, where: str) -> None:
        self._where = where
        try:
            magic, _, _, length, type_at, type_len, text_at, text_len = _HEADER.unpack_from(data)
            if magic != _MAGIC:
                raise ValueError("no BTF magic number")
            if length + max(type_at + type_len, text_at + text_len) > len(data):
                raise ValueError("it is truncated")
            self._text = data[length + text_at : length + text_at + text_len]
            self._rows = list(self._read(data[length + type_at : length + type_at + type_len]))
        except (ValueError, struct.error) as error:
            raise Failed(f"{where}: the types cannot be read", why=str(error), rule="bad-btf") from error

    @classmethod
    def of(cls, elf: ElfFile, where: str) -> Types | None:
        """The types of an object; None when it was compiled without ``-gbtf``."""
        section = elf.section(".BTF")
        return None if section is None else cls(section.data, where)

    def _read(self, data: bytes) -> Iterator[tuple[int, int, int, int, bytes]]:
        yield (0, 0, 0, 0, b"")  # type 0 is void
        at = 0
        while at < len(data):
            name, info, size = _TYPE.unpack_from(data, at)
            kind, vlen = info >> 24 & 31, info & 0xFFFF
            fixed, each = _TAIL.get(kind, (0, 0))
            end = at + _TYPE.size + fixed + each * vlen
            yield (kind, name, size, info, data[at + _TYPE.size : end])
            at = end

    def _name(self, offset: int) -> str:
        return self._text[offset : self._text.find(b"\0", offset)].decode(errors="replace")

    def _describe(self, index: int, depth: int = 0) -> str:
        """A text for a field's type: what matters for layout and nothing else."""
        kind, name, size, _, tail = self._rows[index]
        while kind in _SHELLS:
            index = size
            kind, name, size, _, tail = self._rows[index]
        if kind in (_PTR, _FUNC, _PROTO):
            return "pointer"
        if kind == _ARRAY:
            element, _, count = struct.unpack("<III", tail)
            return f"{self._describe(element, depth)}[{count}]"
        if kind in (_STRUCT, _UNION):
            if name:
                return f"{'struct' if kind == _STRUCT else 'union'} {self._name(name)}"
            if depth > 40:
                raise Failed(f"{self._where}: types are nested without end", rule="bad-btf")
            layout = self._layout(index, depth + 1)
            inner = ";".join(f"{m.offset}:{m.bits}:{m.name}:{m.type}" for m in layout.members)
            return f"{layout.kind} of {size} bytes {{{inner}}}"
        if kind in (_INT, _ENUM, _ENUM64, _FLOAT):
            return f"{'float' if kind == _FLOAT else 'integer'} of {size} bytes"
        return f"{self._name(name)} (kind {kind})" if name else "void"

    def _layout(self, index: int, depth: int = 0) -> Layout:
        kind, _, size, info, tail = self._rows[index]
        if kind in (_ENUM, _ENUM64):
            step = "<Ii" if kind == _ENUM else "<IiI"
            return Layout(
                "enum",
                size,
                tuple(
                    Member(self._name(row[0]), row[1] + (row[2] << 32 if len(row) > 2 else 0), 0, "")
                    for row in struct.iter_unpack(step, tail)
                ),
            )
        members = []
        for name, member, offset in struct.iter_unpack("<III", tail):
            bits = offset >> 24 if info >> 31 else 0
            place = offset & 0xFFFFFF if info >> 31 else offset
            members.append(Member(self._name(name), place, bits, self._describe(member, depth)))
        return Layout("struct" if kind == _STRUCT else "union", size, tuple(members))

    @cached_property
    def named(self) -> dict[str, int]:
        """``struct x`` / ``union x`` / ``enum x`` (or the typedef of one without a name) -> type number.

        A name that stands for two types in one unit (``struct`` local to two functions) keeps the first.
        """
        out: dict[str, int] = {}
        words = {_STRUCT: "struct", _UNION: "union", _ENUM: "enum", _ENUM64: "enum"}
        for index, (kind, name, size, _, tail) in enumerate(self._rows):
            if kind in words and name and tail:
                out.setdefault(f"{words[kind]} {self._name(name)}", index)
            elif kind == _TYPEDEF and size < len(self._rows):
                inner = self._rows[size]
                if inner[0] in words and not inner[1] and inner[4]:
                    out.setdefault(self._name(name), size)
        return out

    @cached_property
    def enumerators(self) -> dict[str, int]:
        """Every enumerator, of enumerations with a name or without."""
        return {
            member.name: member.offset
            for index, row in enumerate(self._rows)
            if row[0] in (_ENUM, _ENUM64)
            for member in self._layout(index).members
        }

    def layout(self, name: str) -> Layout:
        """The layout of a named type (a key of :attr:`named`)."""
        return self._layout(self.named[name])


def changed_layouts(old: Types, new: Types) -> tuple[Refusal, ...]:
    """A refusal for each type that both objects have and lay out differently, naming the first field."""
    out = []
    for name in old.named:
        if name not in new.named or name.startswith("enum "):
            continue
        before, after = old.layout(name), new.layout(name)
        what = None if before == after or before.kind == "enum" else _field(before, after)
        if what is not None:
            out.append(
                Refusal(
                    "layout-changed",
                    name,
                    f"{what}; objects that exist already have the old layout",
                    "keep new data in a shadow variable (Documentation/livepatch/shadow-vars.rst)",
                )
            )
    values = new.enumerators
    for name, value in old.enumerators.items():
        if values.get(name, value) != value:
            out.append(
                Refusal(
                    "enum-changed",
                    name,
                    f"it was {value} and is {values[name]}; what the running kernel has stored would mean "
                    "something else",
                    "keep the old values and add new ones at free numbers",
                )
            )
    return tuple(out)


def _place(member: Member) -> str:
    return f"bit {member.offset}" if member.bits or member.offset % 8 else f"byte {member.offset // 8}"


def _field(before: Layout, after: Layout) -> str | None:
    names = {m.name for m in before.members}
    added = next((m.name for m in after.members if m.name and m.name not in names), "")
    if added and len(after.members) > len(before.members):
        return f"the field {added} is new"
    left = list(after.members)
    for member in before.members:
        same = next((m for m in left if m.name == member.name and m.name), None)
        same = same or next((m for m in left if (m.name, m.offset) == (member.name, member.offset)), None)
        if same is None:
            place = (member.offset, member.bits, member.type)
            same = next((m for m in left if (m.offset, m.bits, m.type) == place), None)
            if same is None:
                return f"the field {member.name or 'without a name'} is gone"
        left.remove(same)
        if (same.offset, same.bits) != (member.offset, member.bits):
            was, now = _place(member), _place(same)
            if was == now:
                return f"the bit-field {member.name} was {member.bits} and is {same.bits} bits wide"
            return f"the field {member.name} was at {was} and is at {now}"
        if same.type != member.type:
            return (
                f"the field {member.name or 'without a name'} was {member.type[:60]} and is {same.type[:60]}"
            )
    if left:
        return f"the field {left[0].name or 'without a name'} is new"
    if before.size != after.size:
        return f"its size was {before.size} and is {after.size} bytes"
    return None
