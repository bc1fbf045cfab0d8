"""One object file seen as functions and data, with every relocation resolved to what it means.

The objects are compiled with ``-ffunction-sections -fdata-sections``: nearly every
function and variable has a section to itself, and a relocation against a section
names exactly one of them. Where several share a section (``.init.text``,
``.data..read_mostly``, string literals) the exact place is worked out, which for a
PC-relative operand needs the end of its instruction:

    cmpl   $0x0,0x0(%rip)      R_X86_64_PC32  .bss-0x5     -> .bss+0
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from enum import Enum

from kmend.core.errors import Failed
from kmend.diff.declared import is_declaration
from kmend.elf.model import (
    SHF_MERGE,
    SHN_ABS,
    SHN_COMMON,
    SHN_UNDEF,
    SHT_NOBITS,
    STT_FUNC,
    STT_NOTYPE,
    STT_OBJECT,
    STT_SECTION,
    STT_TLS,
    ElfFile,
    Reloc,
    Section,
    Symbol,
)
from kmend.elf.reader import read, slice_relocs
from kmend.elf.x86_64 import R_NONE, row
from kmend.insn.decode import ends

#: GCC's names for clones of a function (gcc/symtab.cc, clone_function_name).
CLONE = re.compile(r"\.(?:isra|constprop|part|cold|lto_priv|localalias)(?:\.\d+)?")
#: objtool's names for the padding in front of functions.
PADDING = "__pfx_"
#: GCC's numbering of static local variables.
NUMBER = re.compile(r"\.\d+$")


class PartKind(Enum):
    FUNCTION = "function"
    DATA = "data"


@dataclass(frozen=True, slots=True)
class Part:
    """A function or a variable: ``size`` bytes at ``start`` in section number ``section``.

    ``key`` is the name, made unique with ``#2`` … where a linked object holds several
    local symbols of one name.
    """

    key: str
    name: str
    kind: PartKind
    section: int
    start: int
    size: int
    symbol: int
    local: bool
    #: bytes in front of the function that go with it (``__pfx_NAME``, with ``CONFIG_FUNCTION_PADDING``)
    pad: int = 0

    @property
    def end(self) -> int:
        return self.start + self.size


class RefKind(Enum):
    """What a relocation points at."""

    PART = "part"  # a function or variable of this object
    EXTERN = "extern"  # an undefined symbol, or an absolute one
    STRING = "string"  # a string literal, of characters of any width
    CONST = "const"  # an anonymous mergeable constant
    EMPTY = "empty"  # a variable of size 0: an address and nothing else (lock_class_key without lockdep)
    OPAQUE = "opaque"  # anything else: section and offset


@dataclass(frozen=True, slots=True)
class Ref:
    """A relocation's meaning.

    PART and EXTERN: ``name`` is the key or the symbol's name, ``addend`` what is added to its
    address as the relocation's formula says (so with the -4 of a call). EMPTY: ``name`` is the
    variable's. Others: ``section`` and the exact ``addend`` into it; ``content`` is the string with its
    NUL, or the constant.
    """

    kind: RefKind
    name: str
    addend: int
    section: int = 0
    content: bytes = b""


#: Bytes that no character exceeds (gcc: 1, 2 or 4).
_WIDEST = 8


def _string(section: Section, start: int) -> bytes | None:
    """The string literal at ``start`` with its NUL, which is as wide as the section's entries.

    ``L"SecureBoot"`` of the EFI code stands in ``.rodata.str2.2``: two bytes for each character.
    """
    width = max(section.entry_size, 1)
    if not 0 <= start < section.size or width > _WIDEST:
        return None
    end = section.data.find(bytes(width), start)
    while end >= 0 and (end - start) % width:
        end = section.data.find(bytes(width), end + 1)
    return section.data[start : end + width] if end >= 0 else None


def base_name(name: str) -> str:
    """The name in the source: without clone suffixes and static-local numbers."""
    return NUMBER.sub("", CLONE.sub("", name))


class UnitObject:
    """A parsed object. Read-only after construction."""

    def __init__(self, elf: ElfFile, name: str) -> None:
        self.elf = elf
        self.name = name
        self.parts: dict[str, Part] = {}
        #: other names of a part's very address (``__x64_sys_x`` and ``__se_sys_x``): name -> key
        self.aliases: dict[str, str] = {}
        self._by_section: dict[int, list[Part]] = {}
        self._starts: dict[int, list[int]] = {}
        self._by_symbol: dict[int, Part] = {}
        self._empty: dict[int, str] = {}
        self._ends: dict[str, dict[int, int]] = {}
        self._refs: dict[tuple[int, Reloc], Ref] = {}
        self._collect()

    @classmethod
    def parse(cls, data: bytes, name: str) -> UnitObject:
        """Raises UsageError (rule ``bad-elf``) when ``data`` is no x86-64 ELF file."""
        return cls(read(data, name), name)

    def _collect(self) -> None:
        seen: dict[tuple[int, int, PartKind], Part] = {}
        counts: dict[str, int] = {}
        # objtool names the padding in front of a function (tools/objtool/check.c, add_prefix_symbol, since
        # 9f2899fe36a6 "objtool: Add option to generate prefix symbols", 6.2). It is part of the function:
        # call depth tracking writes code there (arch/x86/kernel/callthunks.c).
        pads = {
            (s.section, s.value + s.size): s.size
            for s in self.elf.symbols
            if s.type == STT_FUNC and s.name.startswith(PADDING)
        }
        for symbol in self.elf.symbols:
            if not symbol.defined or symbol.type not in (STT_FUNC, STT_OBJECT):
                continue
            if symbol.type == STT_FUNC and symbol.name.startswith(PADDING):
                continue
            section = self.elf.sections[symbol.section]
            if symbol.size == 0:
                if section.size == 0 and symbol.type == STT_OBJECT:
                    self._empty[section.index] = symbol.name
                continue
            if not section.alloc or section.name.startswith(".discard"):
                continue  # the linker throws it away (scripts/module.lds.S, DISCARDS)
            if is_declaration(section.name):
                continue  # said to kmend, not to the kernel
            if symbol.value + symbol.size > section.size or not symbol.name:
                why = "reaches beyond its section" if symbol.name else "has no name"
                raise Failed(
                    f"{self.name}: a symbol in {section.name} {why}",
                    why=f"symbol {symbol.index} {symbol.name}".rstrip(),
                    next_step="compile the object again",
                    rule="bad-elf",
                )
            kind = PartKind.FUNCTION if symbol.type == STT_FUNC else PartKind.DATA
            if kind is PartKind.FUNCTION and section.type == SHT_NOBITS:
                raise Failed(
                    f"{self.name}: the function {symbol.name} has no code",
                    why=f"its section {section.name} has no contents: a file of debug information alone?",
                    next_step="name the object itself",
                    rule="bad-elf",
                )
            place = (symbol.section, symbol.value, kind)
            if place in seen:
                self.aliases[symbol.name] = seen[place].key
                self._by_symbol[symbol.index] = seen[place]
                continue
            key = symbol.name
            while key in self.parts:  # assembler code may name a symbol x#2 itself
                counts[symbol.name] = counts.get(symbol.name, 1) + 1
                key = f"{symbol.name}#{counts[symbol.name]}"
            part = Part(
                key,
                symbol.name,
                kind,
                symbol.section,
                symbol.value,
                symbol.size,
                symbol.index,
                symbol.is_local,
                pads.get((symbol.section, symbol.value), 0) if kind is PartKind.FUNCTION else 0,
            )
            seen[place] = part
            self.parts[key] = part
            self._by_symbol[symbol.index] = part
            self._by_section.setdefault(symbol.section, []).append(part)
        for index, parts in self._by_section.items():
            parts.sort(key=lambda p: p.start)
            self._starts[index] = [p.start - p.pad for p in parts]

    # -- what lies where -------------------------------------------------

    def functions(self) -> list[Part]:
        return [p for p in self.parts.values() if p.kind is PartKind.FUNCTION]

    def variables(self) -> list[Part]:
        return [p for p in self.parts.values() if p.kind is PartKind.DATA]

    def section_of(self, part: Part) -> Section:
        return self.elf.sections[part.section]

    def parts_in(self, section: int) -> list[Part]:
        """The parts of a section in order of address."""
        return self._by_section.get(section, [])

    def covering(self, section: int, offset: int) -> Part | None:
        """The part that the byte at ``offset`` of a section belongs to."""
        starts = self._starts.get(section)
        if not starts:
            return None
        at = bisect_right(starts, offset) - 1
        if at < 0:
            return None
        part = self._by_section[section][at]
        return part if offset < part.end else None

    def alone(self, part: Part) -> bool:
        """Whether the part has its section to itself."""
        return len(self._by_section[part.section]) == 1 and part.start == part.pad

    def padding(self, part: Part) -> bytes:
        """The bytes in front of a function that go with it; empty for most kernels."""
        return self.section_of(part).data[part.start - part.pad : part.start]

    def code(self, part: Part) -> bytes:
        """The part's bytes (zeros for ``.bss``)."""
        section = self.section_of(part)
        if section.type == SHT_NOBITS:
            return bytes(part.size)
        return section.data[part.start : part.end]

    def relocs(self, part: Part) -> tuple[Reloc, ...]:
        """The relocations inside the part; their offsets count from the section's start.

        Without ``R_X86_64_NONE``, to which objtool sets those of the jumps that it turns into NOPs.
        """
        rows = slice_relocs(self.section_of(part).relocs, part.start, part.end)
        return tuple(r for r in rows if r.type != R_NONE) if any(r.type == R_NONE for r in rows) else rows

    # -- what a relocation means -----------------------------------------

    def ref(self, section: Section, reloc: Reloc) -> Ref:
        """The meaning of a relocation of ``section``.

        Raises:
            Failed: (rule ``relocation-type``, ``bad-elf``) it cannot be understood.
        """
        key = (section.index, reloc)
        found = self._refs.get(key)
        if found is None:
            found = self._refs[key] = self._resolve(section, reloc)
        return found

    def _resolve(self, section: Section, reloc: Reloc) -> Ref:
        symbol = self.elf.symbols[reloc.symbol]
        part = self._by_symbol.get(symbol.index)
        if part is not None:
            return Ref(RefKind.PART, part.key, reloc.addend)
        if symbol.section in (SHN_UNDEF, SHN_ABS, SHN_COMMON) or not symbol.defined:
            return Ref(RefKind.EXTERN, symbol.name, reloc.addend)
        target = self.elf.sections[symbol.section]
        if symbol.type not in (STT_SECTION, STT_NOTYPE, STT_OBJECT, STT_FUNC, STT_TLS):
            raise Failed(f"{self.name}: a relocation names {symbol.name}", rule="bad-elf")
        if not symbol.is_local and symbol.type == STT_NOTYPE:
            return Ref(RefKind.EXTERN, symbol.name, reloc.addend, section=target.index)
        return self._into(section, reloc, target, symbol)

    def _into(self, section: Section, reloc: Reloc, target: Section, symbol: Symbol) -> Ref:
        """A reference to a place in ``target`` that no function or variable symbol names directly."""
        raw = symbol.value + reloc.addend
        if target.index in self._empty:
            return Ref(RefKind.EMPTY, self._empty[target.index], raw, target.index)
        inside = self._by_section.get(target.index, [])
        whole = len(inside) == 1 and inside[0].start == inside[0].pad and inside[0].end == target.size
        if whole and not target.flags & SHF_MERGE:
            return Ref(RefKind.PART, inside[0].key, raw - inside[0].start)
        exact = raw + self.tail(section, reloc)
        part = self.covering(target.index, exact)
        if part is None and inside and exact == target.size == inside[-1].end:
            part = inside[-1]  # the end of the last variable; nothing else can be meant
        if part is not None and not target.strings:
            return Ref(RefKind.PART, part.key, raw - part.start)
        if target.strings:
            content = _string(target, exact)
            if content is None:
                raise Failed(
                    f"{self.name}: a reference into {target.name} lies outside of it", rule="bad-elf"
                )
            return Ref(RefKind.STRING, target.name, exact, target.index, content)
        if target.flags & SHF_MERGE and target.entry_size and not target.relocs:
            low = exact - exact % target.entry_size
            return Ref(
                RefKind.CONST, target.name, exact, target.index, target.data[low : low + target.entry_size]
            )
        return Ref(RefKind.OPAQUE, target.name, exact, target.index)

    def by_place(self, reloc: Reloc) -> bool:
        """Whether only an offset into a section of several variables or functions says what is meant."""
        symbol = self.elf.symbols[reloc.symbol]
        return (
            symbol.defined and symbol.index not in self._by_symbol and len(self.parts_in(symbol.section)) > 1
        )

    def tail(self, section: Section, reloc: Reloc) -> int:
        """How many bytes a PC-relative operand's formula falls short of the address it means.

        In code the processor counts from the end of the instruction, so the distance from the
        field to that end; in data tables (``.long x - .``) and for absolute fields 0.
        """
        if not row(reloc.type).relative or not section.executable:
            return 0
        part = self.covering(section.index, reloc.offset)
        start = part.start if part else 0
        key = part.key if part else f"section {section.index}"
        if key not in self._ends:
            end = part.end if part else section.size
            self._ends[key] = ends(section.data[start:end])
        end_of = self._ends[key].get(reloc.offset - start)
        if end_of is None:
            raise Failed(
                f"{self.name}: the code at {section.name}+{reloc.offset:#x} cannot be decoded",
                rule="undecodable",
            )
        return end_of - (reloc.offset - start)
