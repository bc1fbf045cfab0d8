"""Bytes to :class:`~kmend.elf.model.ElfFile`.

pyelftools serves as the oracle in the tests; it is too slow for the hot path (a
unit has thousands of symbols and relocations, and a build reads several units).
"""

from __future__ import annotations

import struct
from bisect import bisect_left

from kmend.core.errors import UsageError
from kmend.elf.model import (
    EM_X86_64,
    SHN_LORESERVE,
    SHN_XINDEX,
    SHT_NOBITS,
    SHT_NULL,
    SHT_REL,
    SHT_RELA,
    SHT_SYMTAB,
    SHT_SYMTAB_SHNDX,
    ElfFile,
    Reloc,
    Section,
    Symbol,
)

#: No section without contents may claim more: the code model that the kernel and its modules are compiled
#: with (``-mcmodel=kernel``) reaches no further than 2 GB.
MAX_NOBITS = 1 << 31

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_SYM = struct.Struct("<IBBHQQ")
_RELA = struct.Struct("<QQq")


def _bad(name: str, why: str) -> UsageError:
    return UsageError(
        f"{name} is no usable ELF file",
        why=why,
        next_step="name a complete x86-64 ELF file (an object or a module)",
        rule="bad-elf",
    )


def _text(table: bytes, offset: int, name: str) -> str:
    if offset >= len(table):
        if offset == 0:
            return ""
        raise _bad(name, f"a name lies at {offset}, outside of its string table")
    end = table.find(b"\0", offset)
    if end < 0:
        raise _bad(name, "a string table has no end")
    return table[offset:end].decode("utf-8", "surrogateescape")


def read(data: bytes, name: str = "the file") -> ElfFile:
    """Parse a little-endian x86-64 ELF64 file with section headers; ``name`` is for messages only.

    Every offset and count is checked against the file's size before it is used; sections may not lie upon
    each other, so that what is read never takes more room than the file.

    Raises:
        UsageError: (rule ``bad-elf``) not such a file, truncated, or inconsistent.
    """
    if len(data) < _EHDR.size or data[:4] != b"\x7fELF":
        raise _bad(name, "it does not begin with an ELF header" if data else "it is empty")
    ident, e_type, machine, _, _, _, shoff, flags, ehsize, _, _, shentsize, shnum, shstrndx = (
        _EHDR.unpack_from(data)
    )
    if ident[4] != 2 or ident[5] != 1 or machine != EM_X86_64 or ehsize != _EHDR.size:
        raise _bad(name, f"it is not a little-endian 64-bit x86-64 file (machine {machine})")
    if shoff == 0 or shentsize != _SHDR.size or shoff + _SHDR.size > len(data):
        raise _bad(name, "its section headers are missing or lie outside of it: truncated?")
    first = _SHDR.unpack_from(data, shoff)
    if shnum == 0:
        shnum = first[5]
    if shstrndx == SHN_XINDEX:
        shstrndx = first[6]
    if shoff + shnum * _SHDR.size > len(data) or not 0 < shstrndx < shnum:
        raise _bad(name, "its section headers lie outside of it: truncated?")
    rows = list(_SHDR.iter_unpack(data[shoff : shoff + shnum * _SHDR.size]))
    if rows[0][1] != SHT_NULL:
        raise _bad(name, "its first section is not the null section")
    if len(rows) > SHN_LORESERVE:
        raise _bad(name, f"it has {len(rows)} sections; files with more than {SHN_LORESERVE} are not read")
    contents: list[bytes] = []
    room = len(data)
    for row in rows:
        kind, offset, size = row[1], row[4], row[5]
        if kind in (SHT_NULL, SHT_NOBITS):
            if size > MAX_NOBITS and kind == SHT_NOBITS:
                raise _bad(name, f"a section without contents claims {size} bytes")
            contents.append(b"")
            continue
        if offset + size > len(data):
            raise _bad(name, "a section's contents lie outside of it: truncated?")
        room -= size
        if room < 0:
            raise _bad(name, "its sections lie upon each other")
        contents.append(data[offset : offset + size])
    names = [_text(contents[shstrndx], row[0], name) for row in rows]
    symbols = _symbols(name, rows, contents, names)
    relocs, rela_of = _relocs(name, rows, contents, names, len(symbols))
    sections = tuple(
        Section(
            index=i,
            name=names[i],
            type=row[1],
            flags=row[2],
            address=row[3],
            size=row[5] if row[1] == SHT_NOBITS else len(contents[i]),
            link=row[6],
            info=row[7],
            align=row[8],
            entry_size=row[9],
            data=contents[i],
            relocs=relocs.get(i, ()),
            rela_index=rela_of.get(i, 0),
            rela_flags=rows[rela_of[i]][2] if i in rela_of else 0,
        )
        for i, row in enumerate(rows)
    )
    return ElfFile(machine=machine, type=e_type, flags=flags, sections=sections, symbols=symbols)


def _symbols(
    name: str, rows: list[tuple[int, ...]], contents: list[bytes], names: list[str]
) -> tuple[Symbol, ...]:
    tables = [i for i, row in enumerate(rows) if row[1] == SHT_SYMTAB]
    if not tables:
        return ()
    if len(tables) > 1:
        raise _bad(name, "it has several symbol tables")
    index = tables[0]
    strings = rows[index][6]
    if strings >= len(rows) or len(contents[index]) % _SYM.size:
        raise _bad(name, "its symbol table is damaged")
    table = contents[strings]
    wide: list[int] = []
    for i, row in enumerate(rows):
        if row[1] == SHT_SYMTAB_SHNDX and row[6] == index:
            wide = [n for (n,) in struct.iter_unpack("<I", contents[i][: len(contents[i]) // 4 * 4])]
    out = []
    for i, (st_name, info, other, shndx, value, size) in enumerate(_SYM.iter_unpack(contents[index])):
        section = shndx
        if shndx == SHN_XINDEX:
            if i >= len(wide):
                raise _bad(name, "a symbol's section index is missing")
            section = wide[i]
        kind = info & 15
        if (shndx < SHN_LORESERVE or shndx == SHN_XINDEX) and section >= len(rows):
            raise _bad(name, f"symbol {i} stands in section {section}, which does not exist")
        label = names[section] if kind == 3 and section < len(rows) else _text(table, st_name, name)
        out.append(Symbol(i, label, value, size, kind, info >> 4, other, section))
    return tuple(out)


def _relocs(
    name: str,
    rows: list[tuple[int, ...]],
    contents: list[bytes],
    names: list[str],
    symbols: int,
) -> tuple[dict[int, tuple[Reloc, ...]], dict[int, int]]:
    relocs: dict[int, tuple[Reloc, ...]] = {}
    rela_of: dict[int, int] = {}
    for i, row in enumerate(rows):
        if row[1] == SHT_REL:
            raise _bad(name, f"{names[i]} has relocations without addends, which x86-64 does not use")
        if row[1] != SHT_RELA or row[7] == 0:
            continue
        target = row[7]
        if target >= len(rows) or len(contents[i]) % _RELA.size:
            raise _bad(name, f"{names[i]} is damaged")
        out = []
        for offset, info, addend in _RELA.iter_unpack(contents[i]):
            if info >> 32 >= symbols:
                raise _bad(name, f"{names[i]} names a symbol that does not exist")
            out.append(Reloc(offset, info & 0xFFFFFFFF, info >> 32, addend))
        if any(out[k].offset > out[k + 1].offset for k in range(len(out) - 1)):
            out.sort(key=lambda r: r.offset)
        # A module may carry ordinary and livepatch relocations for one section.
        merged = sorted((*relocs.get(target, ()), *out), key=lambda r: r.offset) if target in relocs else out
        relocs[target] = tuple(merged)
        rela_of.setdefault(target, i)
    return relocs, rela_of


def slice_relocs(relocs: tuple[Reloc, ...], start: int, end: int) -> tuple[Reloc, ...]:
    """The relocations with ``start <= offset < end``; ``relocs`` is in order of offset."""
    low = bisect_left(relocs, start, key=lambda r: r.offset)
    high = bisect_left(relocs, end, key=lambda r: r.offset)
    return relocs[low:high]
