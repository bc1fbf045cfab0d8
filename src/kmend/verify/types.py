"""Did the layout of a structure change? Types of the two objects, from the BTF that gcc wrote (``-gbtf``).

A live patch meets data that the old code laid out. A field added, moved or resized, or an enumerator
that means another number, makes new code read old data wrongly; no comparison of functions would see
it, since the new functions are consistent among themselves.

Format: Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import hashlib
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
#: How many functions a message names.
_SHOWN = 4
_SHELLS = (_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG)
#: Kinds whose third word is a type's number.
_LEADS = (_PTR, *_SHELLS, _FUNC, _VAR, _DECL_TAG)
#: How deeply types may be nested in one another without a name.
_DEEPEST = 200
#: Characters of a type's description beyond which a digest stands for it.
_LONGEST = 4096


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


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter, or with the name ``return`` what a function returns.

    ``type`` is a text that is equal for types that a caller hands over in the same way: size for numbers,
    what it points at for a pointer. A parameter that stands for ``...`` has the type ``...``.
    """

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Prototype:
    """What a caller of a function has to know."""

    returns: Parameter
    parameters: tuple[Parameter, ...]


class Types:
    """The named types of one object."""

    def __init__(self, data: bytes, where: str) -> None:
        self._where = where
        self._texts: dict[int, str] = {}
        try:
            magic, _, _, length, type_at, type_len, text_at, text_len = _HEADER.unpack_from(data)
            if magic != _MAGIC:
                raise ValueError("no BTF magic number")
            if length + max(type_at + type_len, text_at + text_len) > len(data):
                raise ValueError("it is truncated")
            self._text = data[length + text_at : length + text_at + text_len]
            self._rows = list(self._read(data[length + type_at : length + type_at + type_len]))
            self._check()
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

    def _check(self) -> None:
        """Everything that a type leads to is there, and no type is a part of itself.

        Raises:
            ValueError: it is not so; what comes later relies on it.
        """
        count, room = len(self._rows), len(self._text)
        inner: dict[int, tuple[int, ...]] = {}
        for index, (kind, name, size, info, tail) in enumerate(self._rows):
            fixed, each = _TAIL.get(kind, (0, 0))
            if kind > _ENUM64 or len(tail) != fixed + each * (info & 0xFFFF) or name > room:
                raise ValueError(f"type {index} is damaged")
            leads: tuple[int, ...] = ()
            if kind in _LEADS:
                leads = (size,)
            elif kind == _ARRAY:
                leads = struct.unpack("<III", tail)[:1]
            elif kind in (_STRUCT, _UNION):
                leads = struct.unpack(f"<{len(tail) // 4}I", tail)[1::3]
            elif kind == _PROTO:
                leads = (size, *struct.unpack(f"<{len(tail) // 4}I", tail)[1::2])
            if leads and max(leads) >= count:
                raise ValueError(f"type {index} leads to a type that does not exist")
            if kind == _FUNC and self._rows[size][0] != _PROTO:
                raise ValueError(f"function {index} leads to a type that is no prototype")
            if kind in _SHELLS or kind == _ARRAY or (kind in (_STRUCT, _UNION) and not name):
                inner[index] = leads
        self._check_depth(inner)

    @staticmethod
    def _check_depth(inner: dict[int, tuple[int, ...]]) -> None:
        """``inner``: what is described together with a type; a C compiler nests to some tens."""
        height: dict[int, int] = {}
        for start, first in inner.items():
            path = [(start, iter(first))]
            open_ = {start}
            while path:
                index, rest = path[-1]
                child = next((c for c in rest if c in inner and c not in height), None)
                if child is None:
                    height[index] = 1 + max((height.get(c, 0) for c in inner[index]), default=0)
                    open_.discard(index)
                    path.pop()
                elif child in open_:
                    raise ValueError(f"type {child} is a part of itself")
                elif len(path) > _DEEPEST:
                    raise ValueError(f"type {start} is nested too deeply")
                else:
                    open_.add(child)
                    path.append((child, iter(inner[child])))
        if max(height.values(), default=0) > _DEEPEST:
            raise ValueError("types are nested too deeply")

    def _name(self, offset: int) -> str:
        return self._text[offset : self._text.find(b"\0", offset)].decode(errors="replace")

    def _describe(self, index: int, depth: int = 0) -> str:
        """A text for a field's type: what matters for layout and nothing else.

        Made once for each type; the digest of a text stands for a very long one, since a type without a name
        is described in full at each place that it is used at.
        """
        text = self._texts.get(index)
        if text is None:
            text = self._description(index, depth)
            if len(text) > _LONGEST:
                text = f"{text[:60]}… {hashlib.sha256(text.encode()).hexdigest()}"
            self._texts[index] = text
        return text

    def _description(self, index: int, depth: int) -> str:
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

    @cached_property
    def functions(self) -> dict[str, int]:
        """Function -> type number of its prototype: those that the object defines or refers to.

        gcc 12 names the parameters of a function that is defined, and of no other; where a name stands
        there twice the definition counts.
        """
        out: dict[str, int] = {}
        for kind, name, proto, _, _ in self._rows:
            if kind != _FUNC or not name or proto >= len(self._rows):
                continue
            text = self._name(name)
            if text not in out or struct.unpack("<I", self._rows[proto][4][:4] or bytes(4)) != (0,):
                out[text] = proto
        return out

    def prototype(self, name: str) -> Prototype:
        """The prototype of a function (a key of :attr:`functions`)."""
        _, _, returns, _, tail = self._rows[self.functions[name]]
        rows = [(self._name(text), index) for text, index in struct.iter_unpack("<II", tail)]
        parameters = [Parameter(text, self._handed(index) if index else "...") for text, index in rows]
        return Prototype(Parameter("return", self._handed(returns)), tuple(parameters))

    def taking(self, name: str) -> tuple[str, ...]:
        """The functions defined in the unit that have a parameter which points at the type (a key of
        :attr:`named`), in the order of the types."""
        wanted = f"{name} *"
        out = []
        for function in self.functions:
            parameters = self.prototype(function).parameters
            if any(p.name and p.type == wanted for p in parameters):
                out.append(function)
        return tuple(out)

    def _handed(self, index: int) -> str:
        """A text for a parameter's type: :meth:`_describe`, and what a pointer points at by its name."""
        kind, _, inner, _, _ = self._shelled(index)
        if kind != _PTR:
            return self._describe(index)
        kind, name, _, info, _ = self._shelled(inner)
        if kind in (_STRUCT, _UNION, _FWD) and name:
            union = kind == _UNION or (kind == _FWD and info >> 31)
            return f"{'union' if union else 'struct'} {self._name(name)} *"
        if kind in (_INT, _ENUM, _ENUM64, _FLOAT):
            return f"pointer to {self._describe(inner)}"
        return "pointer to a pointer" if kind == _PTR else "pointer"

    def _shelled(self, index: int) -> tuple[int, int, int, int, bytes]:
        row = self._rows[index]
        while row[0] in _SHELLS:
            row = self._rows[row[2]]
        return row

    def layout(self, name: str) -> Layout:
        """The layout of a named type (a key of :attr:`named`)."""
        return self._layout(self.named[name])


def _users(types: Types, name: str) -> str:
    """The functions of the unit that are handed such an object, in words."""
    names = types.taking(name)
    if not names:
        return ""
    more = len(names) - _SHOWN
    return f"; in this file {', '.join(names[:_SHOWN])}{f' and {more} more' if more > 0 else ''} take one"


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
                    f"{what}; objects that exist already have the old layout{_users(new, name)}",
                    "leave the structure as it is and keep new data in a shadow variable: "
                    "klp_shadow_get_or_alloc() where it is written, klp_shadow_get() where it is read, "
                    "klp_shadow_free() where the object goes (Documentation/livepatch/shadow-vars.rst)",
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
