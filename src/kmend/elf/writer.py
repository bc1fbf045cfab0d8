"""Values to the bytes of a relocatable file.

The caller names sections and symbols by handle; indices, string tables and the
order that ELF asks for (local symbols first) are worked out here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kmend.elf.model import (
    EM_X86_64,
    ET_REL,
    SHF_INFO_LINK,
    SHT_NOBITS,
    SHT_RELA,
    SHT_STRTAB,
    SHT_SYMTAB,
    STB_LOCAL,
    STT_SECTION,
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


@dataclass(frozen=True, slots=True)
class OutReloc:
    offset: int
    type: int
    symbol: OutSymbol
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
    rows: list[tuple[str, int, int, bytes, int, int, int, int, int]] = []
    for section in body:
        size = section.size if section.type == SHT_NOBITS else len(section.data)
        rows.append(
            (
                section.name,
                section.type,
                section.flags,
                section.data,
                size,
                0,
                0,
                section.align,
                section.entry_size,
            )
        )
    relas = [(section, rela) for section in body for rela in section.relas]
    symtab_index = 1 + len(body) + len(relas)
    for section, (name, extra, relocs) in relas:
        data = b"".join(
            _RELA.pack(r.offset, number[r.symbol] << 32 | r.type, r.addend)
            for r in sorted(relocs, key=lambda r: r.offset)
        )
        rows.append(
            (
                name,
                SHT_RELA,
                SHF_INFO_LINK | extra,
                data,
                len(data),
                symtab_index,
                index[section],
                8,
                _RELA.size,
            )
        )
    table = bytearray(_SYM.size)
    for symbol in ordered:
        place = index[symbol.section] if isinstance(symbol.section, OutSection) else symbol.section
        label = 0 if symbol.type == STT_SECTION else labels.add(symbol.name)
        table += _SYM.pack(label, symbol.bind << 4 | symbol.type, 0, place, symbol.value, symbol.size)
    rows.append(
        (".symtab", SHT_SYMTAB, 0, bytes(table), len(table), symtab_index + 1, first_global, 8, _SYM.size)
    )
    rows.append((".strtab", SHT_STRTAB, 0, bytes(labels.data), len(labels.data), 0, 0, 1, 0))
    for row in rows:
        names.add(row[0])
    names.add(".shstrtab")
    rows.append((".shstrtab", SHT_STRTAB, 0, bytes(names.data), len(names.data), 0, 0, 1, 0))
    out = bytearray(_EHDR.size)
    headers = bytearray(_SHDR.size)
    for name, kind, sh_flags, data, size, link, info, align, entry_size in rows:
        out += bytes(-len(out) % max(align, 1))
        headers += _SHDR.pack(
            names.add(name), kind, sh_flags, 0, len(out), size, link, info, align, entry_size
        )
        out += data
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
