"""Provenance: is a function, as rebuilt from the original source, the one in the target?

Byte for byte. What a linked image holds in place of a relocation is not skipped: from the
bytes there and the relocation's formula the address meant follows, and the target must have
the very symbol there (or the very string) that the relocation names. The only bytes that may
differ otherwise are those that the build of the kernel itself rewrote after compiling, each
justified by an entry of a special section:

``__jump_table`` (late objtool, tools/objtool/check.c ``handle_jump_alt`` with
``--hacks=jump_label``): a 2 or 5 byte ``jmp`` at the entry's code address became a NOP of the
same length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from kmend.core.errors import Failed, Refusal
from kmend.diff.special import SpecialSections
from kmend.diff.unit import Part, PartKind, Ref, RefKind, UnitObject, base_name
from kmend.elf.model import Reloc, Section
from kmend.elf.reader import slice_relocs
from kmend.elf.x86_64 import row, target_of
from kmend.insn.decode import containing

#: What objtool writes over a jump-label site: the CPU's recommended NOPs (arch/x86/include/asm/nops.h).
_NOPS = {2: bytes.fromhex("6690"), 5: bytes.fromhex("0f1f440000")}


class Image(Protocol):
    """The bytes of a linked image by address."""

    def read(self, address: int, size: int) -> bytes:
        """Raises KmendError outside of what is loaded."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first difference: where in the function, and both sides' instructions (or the two symbols)."""

    function: str
    offset: int
    ours: str
    theirs: str
    why: str

    def refusal(self, where: str) -> Refusal:
        return Refusal(
            "provenance",
            f"{self.function}+{self.offset:#x}",
            f"{self.why}\n    rebuilt: {self.ours}\n    {where}: {self.theirs}",
            "the source, the configuration or the compiler is not the one that this kernel was built with; "
            "fetch the target anew (kmend kernel fetch)",
        )


@dataclass(slots=True)
class Findings:
    """What one comparison showed besides success: the place of each symbol that the code refers to."""

    #: key of a part of the original object -> places (addresses, or keys of parts of a module)
    parts: dict[str, set[int]] = field(default_factory=dict)
    compared: int = 0
    masked: int = 0


class Binary(Protocol):
    """One side of the comparison: the target's vmlinux or a module, in which places are numbers."""

    where: str

    def places(self, part: Part) -> tuple[int, ...]:
        """All places where a function or variable of that name lies, in ``sympos`` order."""

    def position(self, place: int) -> tuple[int, int]:
        """The order of places in the object: section and offset (vmlinux: 0 and the address)."""

    def compare(
        self, unit: UnitObject, special: SpecialSections, part: Part, place: int, findings: Findings
    ) -> Mismatch | None:
        """Compare a function with what lies at ``place``; fills ``findings`` on the way."""


# ---------------------------------------------------------------------------------------------


class SymbolLike(Protocol):
    @property
    def address(self) -> int: ...
    @property
    def name(self) -> str: ...


class SymbolTableLike(Protocol):
    def named(self, name: str) -> tuple[SymbolLike, ...]: ...
    def at(self, address: int) -> tuple[SymbolLike, ...]: ...


class VmlinuxBinary:
    """The target's vmlinux; places are link-time addresses."""

    where = "vmlinux"

    def __init__(self, image: Image, symbols: SymbolTableLike) -> None:
        self.image = image
        self.symbols = symbols

    def places(self, part: Part) -> tuple[int, ...]:
        return tuple(s.address for s in self.symbols.named(part.name))

    def position(self, place: int) -> tuple[int, int]:
        return (0, place)

    def compare(
        self, unit: UnitObject, special: SpecialSections, part: Part, place: int, findings: Findings
    ) -> Mismatch | None:
        return _LinkedComparison(self, unit, special, findings).part(part, place)


class _LinkedComparison:
    def __init__(
        self, binary: VmlinuxBinary, unit: UnitObject, special: SpecialSections, findings: Findings
    ) -> None:
        self.binary, self.unit, self.special, self.findings = binary, unit, special, findings
        self.seen: dict[str, int] = {}

    def part(self, part: Part, address: int) -> Mismatch | None:
        """The function and, where it jumps there, its cold part."""
        self.seen[part.key] = address
        section = self.unit.section_of(part)
        return self._range(part, section, part.start, part.size, address)

    def _range(self, part: Part, section: Section, start: int, size: int, address: int) -> Mismatch | None:
        ours = section.data[start : start + size]
        try:
            theirs = self.binary.image.read(address, size)
        except Failed as error:
            return Mismatch(
                part.name, 0, f"{size} bytes", error.what, "the image ends before the function does"
            )
        relocs = slice_relocs(section.relocs, start, start + size)
        covered = bytearray(size)
        for reloc in relocs:
            at = reloc.offset - start
            for i in range(at, min(at + row(reloc.type).size, size)):
                covered[i] = 1
        rewritten = _rewritten(self.special, part, section, start, ours, theirs)
        self.findings.compared += size
        self.findings.masked += len(rewritten)
        for i in range(size):
            if ours[i] != theirs[i] and not covered[i] and i not in rewritten:
                return _at(part, i, ours, theirs, address, "the bytes differ")
        for reloc in relocs:
            if reloc.offset - start in rewritten:
                continue
            mismatch = self._reloc(part, section, reloc, address + reloc.offset - start, ours, theirs, start)
            if mismatch is not None:
                return mismatch
        return None

    def _reloc(
        self,
        part: Part,
        section: Section,
        reloc: Reloc,
        place: int,
        ours: bytes,
        theirs: bytes,
        start: int,
    ) -> Mismatch | None:
        kind = row(reloc.type)
        at = reloc.offset - start
        value = theirs[at : at + kind.size]
        ref = self.unit.ref(section, reloc)
        why = self._meaning(section, reloc, ref, value, place)
        if why is None:
            return None
        return _at(part, at, ours, theirs, place - at, why)

    def _meaning(self, section: Section, reloc: Reloc, ref: Ref, value: bytes, place: int) -> str | None:
        """Why the linked ``value`` does not mean what the relocation says; None when it does."""
        kind = row(reloc.type)
        match ref.kind:
            case RefKind.PART:
                target = target_of(value, kind, place, ref.addend)
                return self._part_at(self.unit.parts[ref.name], target)
            case RefKind.EXTERN:
                target = target_of(value, kind, place, ref.addend)
                names = [s.name for s in self.binary.symbols.at(target)]
                if ref.name in names:
                    return None
                return f"it should refer to {ref.name}, but leads to {_place(names, target)}"
            case RefKind.STRING | RefKind.CONST:
                target = target_of(value, kind, place, -self.unit.tail(section, reloc))
                content = ref.content
                if ref.kind is RefKind.CONST:
                    target -= ref.addend % len(content)
                if self._bytes(target, len(content)) == content:
                    return None
                return f"it should refer to {content[:40]!r}, but at {target:#x} lies something else"
            case RefKind.EMPTY:
                target = target_of(value, kind, place, ref.addend)
                names = [s.name for s in self.binary.symbols.at(target)]
                if base_name(ref.name) in map(base_name, names):
                    return None
                return f"it should refer to {ref.name}, but leads to {_place(names, target)}"
            case RefKind.OPAQUE:
                target = target_of(value, kind, place, -self.unit.tail(section, reloc))
                return self._satellite(ref, target)

    def _bytes(self, address: int, size: int) -> bytes | None:
        try:
            return self.binary.image.read(address, size)
        except Failed:
            return None

    def _part_at(self, target: Part, address: int) -> str | None:
        known = self.seen.get(target.key)
        if known is not None:
            if known == address:
                return None
            return f"it should refer to {target.name} at {known:#x}, but leads to {address:#x}"
        names = [s.name for s in self.binary.symbols.at(address)]
        if target.name not in names:
            return f"it should refer to {target.name}, but leads to {_place(names, address)}"
        self.findings.parts.setdefault(target.key, set()).add(address)
        if target.kind is PartKind.FUNCTION and ".cold" in target.name:
            mismatch = self.part(target, address)
            if mismatch is not None:
                return f"its cold part differs: {mismatch.why} ({mismatch.ours} / {mismatch.theirs})"
        return None

    def _satellite(self, ref: Ref, address: int) -> str | None:
        section = self.unit.elf.sections[ref.section]
        if section.name != ".altinstr_aux":
            return f"it refers to {section.name}+{ref.addend:#x}, where no symbol says what lies there"
        start, end = self.special.aux_block(ref.addend)
        ours = section.data[start:end]
        theirs = self._bytes(address, end - start)
        if theirs is None:
            return f"it leads to {address:#x}, where nothing lies"
        relocs = slice_relocs(section.relocs, start, end)
        covered = {i for r in relocs for i in range(r.offset - start, r.offset - start + row(r.type).size)}
        if any(ours[i] != theirs[i] for i in range(len(ours)) if i not in covered):
            return f"its block in .altinstr_aux differs from what lies at {address:#x}"
        for reloc in relocs:
            at = reloc.offset - start
            value = theirs[at : at + row(reloc.type).size]
            why = self._meaning(section, reloc, self.unit.ref(section, reloc), value, address + at)
            if why is not None:
                return why
        return None


# ---------------------------------------------------------------------------------------------


class ModuleBinary:
    """A module of the target, not yet relocated; places are indices of its symbol table."""

    def __init__(self, module: UnitObject, name: str) -> None:
        self.module = module
        self.where = name
        self._by_name: dict[str, list[Part]] = {}
        for part in module.parts.values():
            self._by_name.setdefault(part.name, []).append(part)
        self._by_symbol = {part.symbol: part for part in module.parts.values()}

    def places(self, part: Part) -> tuple[int, ...]:
        found = self._by_name.get(part.name, [])
        return tuple(p.symbol for p in sorted(found, key=lambda p: p.symbol))

    def position(self, place: int) -> tuple[int, int]:
        part = self._by_symbol[place]
        return (part.section, part.start)

    def compare(
        self, unit: UnitObject, special: SpecialSections, part: Part, place: int, findings: Findings
    ) -> Mismatch | None:
        return _RelocatableComparison(self, unit, special, findings).part(part, self._by_symbol[place])


class _RelocatableComparison:
    def __init__(
        self, binary: ModuleBinary, unit: UnitObject, special: SpecialSections, findings: Findings
    ) -> None:
        self.binary, self.unit, self.special, self.findings = binary, unit, special, findings
        self.module = binary.module
        self.seen: dict[str, str] = {}

    def part(self, ours: Part, theirs: Part) -> Mismatch | None:
        self.seen[ours.key] = theirs.key
        if ours.size != theirs.size:
            return Mismatch(
                ours.name,
                0,
                f"{ours.size} bytes",
                f"{theirs.size} bytes",
                "the function is not of the same size",
            )
        return self._range(
            ours,
            self.unit.section_of(ours),
            ours.start,
            self.module.section_of(theirs),
            theirs.start,
            ours.size,
        )

    def _range(
        self, part: Part, section: Section, start: int, other: Section, other_start: int, size: int
    ) -> Mismatch | None:
        code = section.data[start : start + size]
        image = other.data[other_start : other_start + size]
        self.findings.compared += size
        theirs = {
            r.offset - other_start: r for r in slice_relocs(other.relocs, other_start, other_start + size)
        }
        rewritten = _rewritten(self.special, part, section, start, code, image)
        self.findings.masked += len(rewritten)
        mine = {
            r.offset - start: r
            for r in slice_relocs(section.relocs, start, start + size)
            if r.offset - start not in rewritten
        }
        # Between functions of one section the assembler resolved the operand itself.
        resolved = {i for at, x in mine.items() if at not in theirs for i in range(at, at + row(x.type).size)}
        for i in range(size):
            if code[i] != image[i] and i not in rewritten and i not in resolved:
                return _at(part, i, code, image, other_start, "the bytes differ")
        for at in sorted(mine.keys() | theirs.keys()):
            x, y = mine.get(at), theirs.get(at)
            if x is None or (y is not None and x.type != y.type):
                return _at(part, at, code, image, other_start, "the relocations differ")
            if y is None:
                why = self._resolved(section, x, other, other_start + at)
            else:
                why = self._meaning(section, x, other, y)
            if why is not None:
                return _at(part, at, code, image, other_start, why)
        return None

    def _resolved(self, section: Section, x: Reloc, other: Section, place: int) -> str | None:
        """An operand that needs no relocation in the module, as its target stands in the same section."""
        kind, ref = row(x.type), self.unit.ref(section, x)
        if not kind.relative or ref.kind is not RefKind.PART:
            return f"it should refer to {ref.name or 'other data'}, but has no relocation"
        start = target_of(other.data[place : place + kind.size], kind, place, ref.addend)
        for theirs in self.module.parts_in(other.index):
            if theirs.start == start:
                return self._part_at(self.unit.parts[ref.name], theirs)
        return f"it should refer to {ref.name}, but leads to {other.name}+{start:#x}"

    def _meaning(self, section: Section, x: Reloc, other: Section, y: Reloc) -> str | None:
        a, b = self.unit.ref(section, x), self.module.ref(other, y)
        match a.kind:
            case RefKind.EMPTY:
                return self._empty(a, other, y)
            case RefKind.PART:
                beside = self._beside(a, y)
                if beside is not None:
                    return self._part_at(self.unit.parts[a.name], beside)
                if b.kind is not RefKind.PART or a.addend != b.addend:
                    return f"it should refer to {a.name}{a.addend:+#x}, but refers to {b.name}{b.addend:+#x}"
                return self._part_at(self.unit.parts[a.name], self.module.parts[b.name])
            case RefKind.EXTERN:
                name = self.module.parts[b.name].name if b.kind is RefKind.PART else b.name
                names = {name} | (
                    {n for n, key in self.module.aliases.items() if key == b.name}
                    if b.kind is RefKind.PART
                    else set()
                )
                if b.kind in (RefKind.PART, RefKind.EXTERN) and a.name in names and a.addend == b.addend:
                    return None
                return f"it should refer to {a.name}{a.addend:+#x}, but refers to {name}{b.addend:+#x}"
            case RefKind.STRING:
                if b.kind is RefKind.STRING and a.content == b.content:
                    return None
                return f"it should refer to {a.content[:40]!r}, but refers to {b.content[:40]!r}"
            case RefKind.CONST:
                size = len(a.content)
                if b.kind is RefKind.CONST and a.content == b.content and a.addend % size == b.addend % size:
                    return None
                return f"it should refer to the constant {a.content.hex()}"
            case RefKind.OPAQUE:
                return self._satellite(a, b)

    def _beside(self, a: Ref, y: Reloc) -> Part | None:
        """The module's variable meant by an operand that lies behind its end (``table + ARRAY_SIZE``).

        The module's relocation counts from the section, so the place looks like the next variable's.
        """
        symbol = self.module.elf.symbols[y.symbol]
        ours = self.unit.parts[a.name]
        if not symbol.defined or ours.kind is not PartKind.DATA:
            return None
        for theirs in self.module.parts_in(symbol.section):
            if theirs.name == ours.name and theirs.start + a.addend == symbol.value + y.addend:
                return theirs
        return None

    def _empty(self, a: Ref, other: Section, y: Reloc) -> str | None:
        symbol = self.module.elf.symbols[y.symbol]
        place = symbol.value + y.addend + self.module.tail(other, y)
        for known in self.module.elf.symbols:
            if (known.section, known.value) == (symbol.section, place) and base_name(known.name) == base_name(
                a.name
            ):
                return None
        return f"it should refer to {a.name}, but refers to {symbol.name}{y.addend:+#x}"

    def _part_at(self, ours: Part, theirs: Part) -> str | None:
        known = self.seen.get(ours.key)
        if known is not None:
            if known == theirs.key:
                return None
            return f"it should refer to itself, but refers to {theirs.name}"
        aliases = {n for n, key in self.module.aliases.items() if key == theirs.key}
        if ours.name != theirs.name and ours.name not in aliases:
            return f"it should refer to {ours.name}, but refers to {theirs.name}"
        self.findings.parts.setdefault(ours.key, set()).add(theirs.symbol)
        if ours.kind is PartKind.FUNCTION and ".cold" in ours.name:
            mismatch = self.part(ours, theirs)
            if mismatch is not None:
                return f"its cold part differs: {mismatch.why} ({mismatch.ours} / {mismatch.theirs})"
        return None

    def _satellite(self, a: Ref, b: Ref) -> str | None:
        mine, theirs = self.unit.elf.sections[a.section], self.module.elf.sections[b.section]
        if b.kind is not RefKind.OPAQUE or mine.name != theirs.name or mine.name != ".altinstr_aux":
            return f"it refers to {mine.name}+{a.addend:#x}, where no symbol says what lies there"
        start, end = self.special.aux_block(a.addend)
        size = end - start
        if mine.data[start:end] != theirs.data[b.addend : b.addend + size]:
            return "its block in .altinstr_aux differs"
        for x, y in _zip(
            slice_relocs(mine.relocs, start, end), slice_relocs(theirs.relocs, b.addend, b.addend + size)
        ):
            if x is None or y is None or x.offset - start != y.offset - b.addend or x.type != y.type:
                return "the relocations of its block in .altinstr_aux differ"
            why = self._meaning(mine, x, theirs, y)
            if why is not None:
                return why
        return None


# ---------------------------------------------------------------------------------------------


def _rewritten(
    special: SpecialSections, part: Part, section: Section, start: int, ours: bytes, theirs: bytes
) -> frozenset[int]:
    """Offsets that the kernel's own build rewrote after compiling, by ``__jump_table`` entries."""
    out: set[int] = set()
    if section.index != part.section:
        return frozenset()
    for entry in special.entries(part.key, "__jump_table"):
        at = entry.owner_offset + part.start - start
        length = {0xEB: 2, 0xE9: 5}.get(ours[at]) if 0 <= at < len(ours) else None
        if length and theirs[at : at + length] == _NOPS[length]:
            out.update(range(at, at + length))
    return frozenset(out)


def _zip(mine: tuple[Reloc, ...], theirs: tuple[Reloc, ...]) -> Iterator[tuple[Reloc | None, Reloc | None]]:
    for i in range(max(len(mine), len(theirs))):
        yield (mine[i] if i < len(mine) else None, theirs[i] if i < len(theirs) else None)


def _place(names: list[str], address: int) -> str:
    return f"{names[0]} ({address:#x})" if names else f"{address:#x}, where no symbol begins"


def _at(part: Part, offset: int, ours: bytes, theirs: bytes, address: int, why: str) -> Mismatch:
    a, b = containing(ours, offset, address=address), containing(theirs, offset, address=address)
    return Mismatch(
        part.name,
        offset,
        a.text if a else f".byte {ours[offset]:#04x}",
        b.text if b else f".byte {theirs[offset]:#04x}",
        why,
    )
