"""Who calls whom inside one object, and who takes whose address.

Only what relocations say: with ``-ffunction-sections`` every call to another function carries one, also
to a static one. Calls through pointers are not followed. The ``.cold`` part of a function counts as a
piece of the function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from kmend.diff.compare import cold_parent
from kmend.diff.select import is_branch
from kmend.diff.special import DISPENSABLE, SATELLITES, TABLE
from kmend.diff.unit import Part, PartKind, RefKind, UnitObject, base_name

#: Tables that name a function without calling it: what is read at start, by kprobes or by the loader.
#: (include/asm-generic/vmlinux.lds.h: initcalls, KPROBE_BLACKLIST, ERROR_INJECT_WHITELIST, EXPORT_SYMBOL)
_NO_CALLERS = (
    *(".discard", ".initcall", "_kprobe_blacklist", "_error_injection_whitelist", ".con_initcall"),
    *("__ksymtab", "___ksymtab", "__kcrctab", ".export_symbol", ".BTF", ".exitcall", ".orc", "__tracepoints"),
    *(".note", ".debug", ".stab", ".gnu", ".comment"),
)


@dataclass(frozen=True, slots=True)
class Call:
    """A direct call, or a jump that ends the caller: ``offset`` counts from the beginning of ``part``.

    ``part`` is the caller's own part or its ``.cold`` part. ``callee`` is a key of the object when
    ``inside``, else the symbol's name.
    """

    part: str
    offset: int
    callee: str
    inside: bool


@dataclass(frozen=True, slots=True)
class Route:
    """How a function comes to a call: through ``via`` (names, the nearest first) to ``callee``."""

    via: tuple[str, ...]
    callee: str


class CallGraph:
    """The direct calls of one object. Read-only after construction."""

    def __init__(self, unit: UnitObject) -> None:
        self.unit = unit
        self._calls: dict[str, tuple[Call, ...]] = {}
        self._pieces: dict[str, tuple[Part, ...]] = {}

    def pieces(self, key: str) -> tuple[Part, ...]:
        """The function's part and its ``.cold`` parts."""
        if key not in self._pieces:
            part = self.unit.parts[key]
            self._pieces[key] = (part, *self._cold.get(key, ()))
        return self._pieces[key]

    @cached_property
    def _cold(self) -> Mapping[str, list[Part]]:
        found: dict[str, list[Part]] = {}
        for part in self.unit.functions():
            parent = cold_parent(self.unit, part)
            if parent is not None:
                found.setdefault(parent.key, []).append(part)
        return found

    @cached_property
    def functions(self) -> tuple[str, ...]:
        """Keys of the functions, without ``.cold`` parts."""
        return tuple(p.key for p in self.unit.functions() if cold_parent(self.unit, p) is None)

    def calls(self, key: str) -> tuple[Call, ...]:
        """The direct calls of a function in order of address, those of its ``.cold`` parts last."""
        found = self._calls.get(key)
        if found is None:
            found = self._calls[key] = tuple(self._find(key))
        return found

    def _find(self, key: str) -> Iterator[Call]:
        unit = self.unit
        for part in self.pieces(key):
            section = unit.section_of(part)
            for reloc in unit.relocs(part):
                if not is_branch(section, reloc):
                    continue
                ref = unit.ref(section, reloc)
                at = reloc.offset - part.start
                if ref.kind is RefKind.EXTERN:
                    yield Call(part.key, at, ref.name, False)
                elif ref.kind is RefKind.PART:
                    target = unit.parts[ref.name]
                    parent = cold_parent(unit, target)
                    callee = parent.key if parent else target.key
                    if target.kind is PartKind.FUNCTION and callee != key:
                        yield Call(part.key, at, callee, True)

    @cached_property
    def callers(self) -> Mapping[str, tuple[str, ...]]:
        """For each function of the object the functions of the object that call it directly."""
        found: dict[str, dict[str, None]] = {}
        for key in self.functions:
            for call in self.calls(key):
                if call.inside:
                    found.setdefault(call.callee, {})[key] = None
        return {key: tuple(names) for key, names in found.items()}

    def pointed(self, key: str) -> tuple[tuple[str, str], ...]:
        """Pointers to a function that a function makes: (the pointer's target, the register it is put in).

        The register is known for ``mov $function,%rdi`` and ``lea function(%rip),%rdi``, else empty.
        """
        unit = self.unit
        found: dict[tuple[str, str], None] = {}
        for part in self.pieces(key):
            section = unit.section_of(part)
            for reloc in unit.relocs(part):
                if is_branch(section, reloc):
                    continue
                ref = unit.ref(section, reloc)
                if ref.kind is not RefKind.PART or unit.parts[ref.name].kind is not PartKind.FUNCTION:
                    continue
                if ref.name == key or unit.parts[ref.name] in self.pieces(key):
                    continue
                before = section.data[max(reloc.offset - 3, 0) : reloc.offset]
                found[ref.name, "rdi" if before in _INTO_RDI else ""] = None
        return tuple(found)

    @cached_property
    def addresses(self) -> Mapping[str, tuple[str, ...]]:
        """For each function whose address is kept or handed out, by whom: functions and variables, by name.

        Tables that name a function and lead to no call of it do not count.
        """
        unit = self.unit
        found: dict[str, dict[str, None]] = {}
        special = TABLE.keys() | SATELLITES | DISPENSABLE
        for section in unit.elf.sections:
            if not section.relocs or not section.alloc or section.name in special:
                continue
            if section.name.startswith(_NO_CALLERS):
                continue
            for reloc in section.relocs:
                if is_branch(section, reloc):
                    continue
                ref = unit.ref(section, reloc)
                if ref.kind is not RefKind.PART or unit.parts[ref.name].kind is not PartKind.FUNCTION:
                    continue
                user = unit.covering(section.index, reloc.offset)
                target = cold_parent(unit, unit.parts[ref.name]) or unit.parts[ref.name]
                if user is not None and (cold_parent(unit, user) or user).key == target.key:
                    continue
                found.setdefault(target.key, {})[user.name if user else section.name] = None
        return {key: tuple(names) for key, names in found.items()}

    def routes(self, key: str, wanted: frozenset[str]) -> tuple[Route, ...]:
        """The shortest way to each of the ``wanted`` symbols that a function reaches by direct calls."""
        found: dict[str, Route] = {}
        seen = {key}
        level: list[tuple[str, tuple[str, ...]]] = [(key, ())]
        while level:
            deeper: list[tuple[str, tuple[str, ...]]] = []
            for function, via in level:
                for call in self.calls(function):
                    name = self.unit.parts[call.callee].name if call.inside else call.callee
                    if name in wanted:
                        found.setdefault(name, Route(via, name))
                    elif call.inside and call.callee not in seen:
                        seen.add(call.callee)
                        deeper.append((call.callee, (*via, base_name(name))))
            level = deeper
        return tuple(found.values())


_INTO_RDI = (b"\x48\xc7\xc7", b"\x48\x8d\x3d")
