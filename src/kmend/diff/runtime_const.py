"""Runtime constants: code that the kernel completes when it starts, in the form that a module has.

Since 6.11 the address of a table, or a limit, may stand in the code itself (e3c92e81711d "runtime
constants: add x86 architecture support"):

    movabs $0x0123456789abcdef,%rdx        runtime_ptr_USER_PTR_MAX: .long  place of the constant - .

``runtime_const_init()`` puts the value of the variable ``USER_PTR_MAX`` there while the kernel starts,
and only in what was linked into it: no module is ever completed like that. Modules read the variable
itself instead (arch/x86/include/asm/uaccess_64.h, ``#ifdef MODULE``), which never changes after the
kernel's start. A replaced function stands in a module, so both objects of a unit are given this form
before they are compared:

    mov    USER_PTR_MAX(%rip),%rdx
    nopl   (%rax)

Neither instruction touches the flags; together they are as long as the one in whose place they stand.
The proof against the kernel's image is made with the original object as it was compiled: on disk the
image has the number of above. ``runtime_shift_…`` (a shift by an immediate, three bytes) has no such
form and stays: code that has it is refused (:func:`kmend.diff.select.select`).
"""

from __future__ import annotations

from dataclasses import replace

from kmend.diff.unit import UnitObject
from kmend.elf.model import (
    SHF_ALLOC,
    SHN_UNDEF,
    STB_GLOBAL,
    STT_NOTYPE,
    STT_OBJECT,
    ElfFile,
    Reloc,
    Section,
    Symbol,
)
from kmend.elf.x86_64 import R_PC32

#: Sections of this name list the places of the constant that the rest of the name says.
PREFIX = "runtime_ptr_"
#: What the compiler is told to put there (arch/x86/include/asm/runtime-const.h).
_PLACEHOLDER = 0x0123456789ABCDEF.to_bytes(8, "little")
_NOP3 = bytes.fromhex("0f1f00")


def module_form(unit: UnitObject) -> UnitObject:
    """The object with every runtime constant read from its variable; the same object when it has none.

    A table with an entry that is not of the form above is left as it is, and so is the code it speaks of.
    """
    tables = [s for s in unit.elf.sections if s.name.startswith(PREFIX) and s.alloc and s.size]
    elf = unit.elf
    for table in tables:
        elf = _without(elf, table) or elf
    return unit if elf is unit.elf else UnitObject(elf, unit.name)


def _without(elf: ElfFile, table: Section) -> ElfFile | None:
    """The object without one of its tables; None where it has another form."""
    variable = _variable(elf, table.name.removeprefix(PREFIX))
    places = _places(elf, table)
    if variable is None or places is None:
        return None
    symbols = elf.symbols if variable.index < len(elf.symbols) else (*elf.symbols, variable)
    sections = list(elf.sections)
    for index, offsets in places.items():
        section = sections[index]
        code, rows = bytearray(section.data), list(section.relocs)
        for offset in offsets:
            loading = _loading(code[offset - 2 : offset + 8])
            if loading is None or any(offset - 2 <= r.offset < offset + 8 for r in rows):
                return None
            code[offset - 2 : offset + 8] = loading
            rows.append(Reloc(offset + 1, R_PC32, variable.index, -4))
        rows.sort(key=lambda row: row.offset)
        sections[index] = replace(section, data=bytes(code), relocs=tuple(rows))
    sections[table.index] = replace(table, flags=table.flags & ~SHF_ALLOC, relocs=())
    return replace(elf, sections=tuple(sections), symbols=symbols)


def _variable(elf: ElfFile, name: str) -> Symbol | None:
    """The variable of that name: the object's own, or another's; None: the object has several."""
    found = [s for s in elf.symbols if s.name == name]
    if not found:
        return Symbol(len(elf.symbols), name, 0, 0, STT_NOTYPE, STB_GLOBAL, 0, SHN_UNDEF)
    own = len(found) == 1 and (found[0].section == SHN_UNDEF or found[0].type == STT_OBJECT)
    return found[0] if own else None


def _places(elf: ElfFile, table: Section) -> dict[int, list[int]] | None:
    """Where the constants stand that a table lists: by section, offsets. None: it has another form."""
    out: dict[int, list[int]] = {}
    if table.data.strip(b"\0") or table.size != 4 * len(table.relocs):
        return None
    for number, reloc in enumerate(table.relocs):
        symbol = elf.symbols[reloc.symbol]
        if reloc.type != R_PC32 or reloc.offset != 4 * number or not symbol.defined:
            return None
        offset = symbol.value + reloc.addend
        section = elf.sections[symbol.section]
        if not section.executable or not 2 <= offset <= section.size - 8:
            return None
        out.setdefault(section.index, []).append(offset)
    return out


def _loading(code: bytes | bytearray) -> bytes | None:
    """``mov variable(%rip),%reg`` and a NOP for ``movabs $placeholder,%reg``; None for any other code.

    REX.W (with B for r8 to r15) B8+reg imm64 becomes REX.W (with R) 8B 00reg101 disp32.
    """
    if code[0] not in (0x48, 0x49) or code[1] & 0xF8 != 0xB8 or code[2:] != _PLACEHOLDER:
        return None
    rex = 0x4C if code[0] == 0x49 else 0x48
    return bytes((rex, 0x8B, (code[1] & 7) << 3 | 5, 0, 0, 0, 0)) + _NOP3
