"""Values to the bytes of a relocatable file.

The caller names sections and symbols by handle; indices, string tables and the
order that ELF asks for (local symbols first) are worked out here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kmend.core.errors import UsageError
from kmend.elf.model import (
    EM_X86_64,
    ET_REL,
    SHF_ALLOC,
    SHF_INFO_LINK,
    SHF_LINK_ORDER,
    SHT_GROUP,
    SHT_NOBITS,
    SHT_RELA,
    SHT_STRTAB,
    SHT_SYMTAB,
    SHT_SYMTAB_SHNDX,
    STB_LOCAL,
    STT_SECTION,
    ElfFile,
)
from kmend.elf.reader import _EHDR, _RELA, _SHDR, _SYM


@dataclass(eq=False, slots=True)
class OutSymbol:
    """A symbol to be written. ``section`` is a section of the output, or an ``SHN_`` number."""

    name: str
    section: OutSection | int
    value: int = 0
    size: int = 0
    type: int = 0
    bind: int = STB_LOCAL
    #: ``st_other``: the visibility
    other: int = 0


@dataclass(frozen=True, slots=True)
class OutReloc:
    """A row of a relocation section; ``symbol`` None: it names none (``R_X86_64_NONE``)."""

    offset: int
    type: int
    symbol: OutSymbol | None
    addend: int


@dataclass(eq=False, slots=True)
class OutSection:
    """A section to be written; ``size`` counts only for ``SHT_NOBITS``.

    ``relas`` are the relocation sections that patch it: (name, extra flags, rows).
    """

    name: str
    type: int
    flags: int
    align: int
    data: bytes = b""
    size: int = 0
    entry_size: int = 0
    relas: list[tuple[str, int, list[OutReloc]]] = field(default_factory=list)
    #: the section that it is about (``SHF_LINK_ORDER``)
    link: OutSection | None = None
    #: ``sh_addr``: means nothing in a relocatable file, but ``ld -r`` leaves some
    address: int = 0


@dataclass(frozen=True, slots=True)
class _Row:
    """A section's header, all but its place in the file, and its contents."""

    name: str
    type: int
    flags: int
    data: bytes
    size: int
    link: int = 0
    info: int = 0
    align: int = 1
    entry_size: int = 0
    address: int = 0


class _Strings:
    def __init__(self) -> None:
        self.data = bytearray(b"\0")
        self.seen: dict[str, int] = {"": 0}

    def add(self, text: str) -> int:
        if text not in self.seen:
            self.seen[text] = len(self.data)
            self.data += text.encode("utf-8", "surrogateescape") + b"\0"
        return self.seen[text]


def write(sections: Iterable[OutSection], symbols: Iterable[OutSymbol], *, flags: int = 0) -> bytes:
    """The file's bytes: header, contents in the order given, relocations, symbol table, headers.

    Section symbols are made by the caller like any other symbol. Relocation rows are
    sorted by offset. The same input gives the same bytes.
    """
    body = list(sections)
    index: dict[OutSection, int] = {section: i for i, section in enumerate(body, 1)}
    ordered = sorted(symbols, key=lambda s: s.bind != STB_LOCAL)
    first_global = 1 + sum(s.bind == STB_LOCAL for s in ordered)
    number: dict[OutSymbol, int] = {symbol: i for i, symbol in enumerate(ordered, 1)}
    names, labels = _Strings(), _Strings()
    rows = [
        _Row(
            section.name,
            section.type,
            section.flags,
            section.data,
            section.size if section.type == SHT_NOBITS else len(section.data),
            link=index[section.link] if section.link is not None else 0,
            align=section.align,
            entry_size=section.entry_size,
            address=section.address,
        )
        for section in body
    ]
    relas = [(section, rela) for section in body for rela in section.relas]
    symtab_index = 1 + len(body) + len(relas)
    for section, (name, extra, relocs) in relas:
        data = b"".join(
            _RELA.pack(r.offset, (number[r.symbol] << 32 if r.symbol else 0) | r.type, r.addend)
            for r in sorted(relocs, key=lambda r: r.offset)
        )
        rows.append(
            _Row(
                name,
                SHT_RELA,
                SHF_INFO_LINK | extra,
                data,
                len(data),
                link=symtab_index,
                info=index[section],
                align=8,
                entry_size=_RELA.size,
            )
        )
    table = bytearray(_SYM.size)
    for symbol in ordered:
        place = index[symbol.section] if isinstance(symbol.section, OutSection) else symbol.section
        label = 0 if symbol.type == STT_SECTION else labels.add(symbol.name)
        table += _SYM.pack(
            label, symbol.bind << 4 | symbol.type, symbol.other, place, symbol.value, symbol.size
        )
    rows.append(
        _Row(
            ".symtab",
            SHT_SYMTAB,
            0,
            bytes(table),
            len(table),
            link=symtab_index + 1,
            info=first_global,
            align=8,
            entry_size=_SYM.size,
        )
    )
    rows.append(_Row(".strtab", SHT_STRTAB, 0, bytes(labels.data), len(labels.data)))
    for row in rows:
        names.add(row.name)
    names.add(".shstrtab")
    rows.append(_Row(".shstrtab", SHT_STRTAB, 0, bytes(names.data), len(names.data)))
    out = bytearray(_EHDR.size)
    headers = bytearray(_SHDR.size)
    for row in rows:
        out += bytes(-len(out) % max(row.align, 1))
        headers += _SHDR.pack(
            names.add(row.name),
            row.type,
            row.flags,
            row.address,
            len(out),
            row.size,
            row.link,
            row.info,
            row.align,
            row.entry_size,
        )
        out += row.data
    out += bytes(-len(out) % 8)
    _EHDR.pack_into(
        out,
        0,
        b"\x7fELF\x02\x01\x01" + bytes(9),
        ET_REL,
        EM_X86_64,
        1,
        0,
        0,
        len(out),
        flags,
        _EHDR.size,
        0,
        0,
        _SHDR.size,
        1 + len(rows),
        len(rows),
    )
    return bytes(out + headers)


def rewrite(elf: ElfFile) -> bytes:
    """A relocatable file that was read, written anew: the same sections, symbols and relocations.

    What only describes the file is laid out by :func:`write`: its tables of names and symbols stand at its
    end, and each relocation section behind the contents. Written, read and written again it is the same to
    the byte, which is what reader and writer are held to.

    Raises:
        UsageError: as :func:`taken_apart`.
    """
    return write(*taken_apart(elf), flags=elf.flags)


def taken_apart(elf: ElfFile) -> tuple[list[OutSection], list[OutSymbol]]:
    """A relocatable file that was read, as what :func:`write` takes; the order is the file's.

    Raises:
        UsageError: (rule ``bad-elf``) it is no relocatable file, or one with section groups (which the
            kernel's build has none of).
    """
    if elf.type != ET_REL or any(section.type == SHT_GROUP for section in elf.sections):
        raise UsageError(
            "the file cannot be written anew",
            why="it is no relocatable file" if elf.type != ET_REL else "it has section groups",
            next_step="name an object or a module of the kernel's",
            rule="bad-elf",
        )
    tables = {SHT_SYMTAB, SHT_SYMTAB_SHNDX}
    sections: dict[int, OutSection] = {}
    for s in elf.sections[1:]:
        names = s.type == SHT_STRTAB and not s.flags & SHF_ALLOC
        if s.type in tables or names or (s.type == SHT_RELA and s.info):
            continue
        sections[s.index] = OutSection(s.name, s.type, s.flags, s.align, s.data, s.size, s.entry_size)
    for index, out in sections.items():
        out.address = elf.sections[index].address
        if elf.sections[index].flags & SHF_LINK_ORDER:
            out.link = sections.get(elf.sections[index].link)
    symbols = [
        OutSymbol(
            "" if s.type == STT_SECTION else s.name,
            sections[s.section] if s.defined else s.section,
            s.value,
            s.size,
            s.type,
            s.bind,
            s.other,
        )
        for s in elf.symbols[1:]
        if not s.defined or s.section in sections
    ]
    kept = (s.index for s in elf.symbols[1:] if not s.defined or s.section in sections)
    of_index: dict[int, OutSymbol | None] = {0: None, **dict(zip(kept, symbols, strict=True))}
    for rela in elf.sections[1:]:
        if rela.type != SHT_RELA or not rela.info or rela.info not in sections:
            continue
        rows = [
            OutReloc(offset, info & 0xFFFFFFFF, of_index[info >> 32], addend)
            for offset, info, addend in _RELA.iter_unpack(rela.data)
        ]
        sections[rela.info].relas.append((rela.name, rela.flags & ~SHF_INFO_LINK, rows))
    return list(sections.values()), symbols
