"""The ELF writer and reader: any file that can be written is read as meant, and written again alike."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmend.core.errors import Failed, UsageError
from kmend.diff.twins import match
from kmend.diff.unit import UnitObject
from kmend.elf.model import (
    SHF_ALLOC,
    SHF_EXECINSTR,
    SHF_LINK_ORDER,
    SHF_MERGE,
    SHF_RELA_LIVEPATCH,
    SHF_STRINGS,
    SHF_WRITE,
    SHN_ABS,
    SHN_COMMON,
    SHN_LIVEPATCH,
    SHN_UNDEF,
    SHN_XINDEX,
    SHT_NOBITS,
    SHT_NOTE,
    SHT_PROGBITS,
    STB_GLOBAL,
    STB_LOCAL,
    STB_WEAK,
    STT_FILE,
    STT_FUNC,
    STT_NOTYPE,
    STT_OBJECT,
    STT_SECTION,
    STT_TLS,
)
from kmend.elf.reader import MAX_NOBITS, read
from kmend.elf.writer import OutReloc, OutSection, OutSymbol, rewrite, write
from kmend.elf.x86_64 import ROWS

NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FFF), max_size=24)
KINDS = st.sampled_from([SHT_PROGBITS, SHT_PROGBITS, SHT_NOBITS, SHT_NOTE, 14, 15])
FLAGS = st.sampled_from(
    [
        0,
        SHF_ALLOC,
        SHF_ALLOC | SHF_WRITE,
        SHF_ALLOC | SHF_EXECINSTR,
        SHF_ALLOC | SHF_MERGE,
        SHF_ALLOC | SHF_MERGE | SHF_STRINGS,
    ]
)


@dataclass(frozen=True)
class Plan:
    """A file as it was asked for."""

    sections: list[OutSection]
    symbols: list[OutSymbol]
    flags: int


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any relocatable file: sections of every kind, symbols of every kind, several relocation sections."""
    sections: list[OutSection] = []
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(KINDS)
        section = OutSection(
            draw(NAMES),
            kind,
            draw(FLAGS),
            1 << draw(st.integers(0, 6)),
            b"" if kind == SHT_NOBITS else draw(st.binary(max_size=60)),
            draw(st.integers(0, MAX_NOBITS)) if kind == SHT_NOBITS else 0,
            draw(st.sampled_from([0, 1, 2, 8, 16, 2**40])),
            address=draw(st.integers(0, 2**64 - 1)),
        )
        if draw(st.booleans()) and sections:
            section.flags |= SHF_LINK_ORDER
            section.link = draw(st.sampled_from(sections))
        sections.append(section)
    places: list[OutSection | int] = [SHN_UNDEF, SHN_ABS, SHN_COMMON, SHN_LIVEPATCH, *sections]
    symbols = [
        OutSymbol(
            draw(NAMES),
            draw(st.sampled_from(places)),
            draw(st.integers(0, 2**64 - 1)),
            draw(st.integers(0, 2**64 - 1)),
            draw(st.sampled_from([STT_NOTYPE, STT_OBJECT, STT_FUNC, STT_FILE, STT_TLS])),
            draw(st.sampled_from([STB_LOCAL, STB_LOCAL, STB_GLOBAL, STB_WEAK])),
            draw(st.integers(0, 3)),
        )
        for _ in range(draw(st.integers(0, 8)))
    ]
    symbols += [OutSymbol("", section, type=STT_SECTION) for section in sections if draw(st.booleans())]
    for section in sections:
        for number in range(draw(st.integers(0, 2)) if symbols else 0):
            rows = draw(
                st.lists(
                    st.builds(
                        OutReloc,
                        st.integers(0, 2**40),
                        st.sampled_from(sorted(ROWS)),
                        st.one_of(st.none(), st.sampled_from(symbols)),
                        st.integers(-(2**63), 2**63 - 1),
                    ),
                    max_size=5,
                )
            )
            extra = SHF_RELA_LIVEPATCH | SHF_ALLOC if number else 0
            section.relas.append((f".rela{number}{section.name}", extra, rows))
    return Plan(sections, symbols, draw(st.integers(0, 2**32 - 1)))


@settings(max_examples=200, deadline=None)
@given(plans())
def test_any_file_is_read_as_it_was_written(plan: Plan) -> None:
    data = write(plan.sections, plan.symbols, flags=plan.flags)
    elf = read(data)
    assert elf.flags == plan.flags
    found = elf.sections[1 : 1 + len(plan.sections)]
    index = {section: i for i, section in enumerate(plan.sections, 1)}
    for want, got in zip(plan.sections, found, strict=True):
        assert (got.name, got.type, got.flags, got.align) == (want.name, want.type, want.flags, want.align)
        assert (got.data, got.entry_size, got.address) == (want.data, want.entry_size, want.address)
        assert got.size == (want.size if want.type == SHT_NOBITS else len(want.data))
        assert got.link == (index[want.link] if want.link else 0)
    ordered = sorted(plan.symbols, key=lambda s: s.bind != STB_LOCAL)
    assert len(elf.symbols) == 1 + len(ordered)
    number: dict[OutSymbol | None, int] = {None: 0, **{symbol: i for i, symbol in enumerate(ordered, 1)}}
    for symbol, seen in zip(ordered, elf.symbols[1:], strict=True):
        section = symbol.section
        place = index[section] if isinstance(section, OutSection) else section
        name = section.name if symbol.type == STT_SECTION and isinstance(section, OutSection) else symbol.name
        assert (seen.name, seen.value, seen.size, seen.section) == (name, symbol.value, symbol.size, place)
        assert (seen.type, seen.bind, seen.other) == (symbol.type, symbol.bind, symbol.other)
    for want, got in zip(plan.sections, found, strict=True):
        rows = sorted(
            (r.offset, r.type, number[r.symbol], r.addend) for _, _, some in want.relas for r in some
        )
        assert sorted((r.offset, r.type, r.symbol, r.addend) for r in got.relocs) == rows
        assert [r.offset for r in got.relocs] == sorted(r.offset for r in got.relocs)
        names = [(name, extra) for name, extra, _ in want.relas]
        relas = [s for s in elf.sections if s.type == 4 and s.info == got.index]
        assert [(s.name, s.flags & ~0x40) for s in relas] == names


@settings(max_examples=150, deadline=None)
@given(plans())
def test_the_second_writing_is_the_first_to_the_byte(plan: Plan) -> None:
    data = write(plan.sections, plan.symbols, flags=plan.flags)
    assert write(plan.sections, plan.symbols, flags=plan.flags) == data
    again = rewrite(read(data))
    assert rewrite(read(again)) == again
    assert read(again) == read(data)


# -- files that are none --------------------------------------------------------------------------------


def small() -> bytearray:
    """A file of two sections, one with contents and one without."""
    text = OutSection(".text.f", SHT_PROGBITS, SHF_ALLOC | SHF_EXECINSTR, 16, b"\x90" * 15 + b"\xc3")
    bss = OutSection(".bss.v", SHT_NOBITS, SHF_ALLOC | SHF_WRITE, 8, size=64)
    symbols = [
        OutSymbol("f", text, 0, 16, STT_FUNC, STB_GLOBAL),
        OutSymbol("v", bss, 0, 64, STT_OBJECT, STB_GLOBAL),
    ]
    return bytearray(write([text, bss], symbols))


def header(data: bytearray, index: int) -> int:
    """Where a section's header begins."""
    return int(struct.unpack_from("<Q", data, 40)[0]) + 64 * index


def damaged(index: int, field: int, value: int) -> bytes:
    data = small()
    struct.pack_into("<Q", data, header(data, index) + field, value)
    return bytes(data)


def symbol_row(data: bytearray) -> int:
    """Where the first real symbol begins: .symtab is the third section."""
    return int(struct.unpack_from("<Q", data, header(data, 3) + 24)[0]) + 24


def bad(data: bytes) -> str:
    with pytest.raises(UsageError) as caught:
        read(data)
    assert caught.value.rule == "bad-elf"
    return caught.value.why


def test_sections_upon_each_other_are_refused() -> None:
    # .symtab, .strtab and .shstrtab all claim the whole file: read, they would take three times its room
    data = small()
    for index in (3, 4, 5):
        struct.pack_into("<QQ", data, header(data, index) + 24, 0, len(data) // 24 * 24)
    assert "upon each other" in bad(bytes(data))


def test_a_bss_of_terabytes_is_refused() -> None:
    assert "claims" in bad(damaged(2, 32, 1 << 40))
    assert read(damaged(2, 32, MAX_NOBITS)).sections[2].size == MAX_NOBITS


def test_a_null_section_has_no_contents() -> None:
    # the null section's size may hold the number of sections (e_shnum 0)
    assert read(damaged(0, 32, 6)).sections[0].size == 0


def test_a_symbol_in_a_section_that_is_not_there_is_refused() -> None:
    data = small()
    struct.pack_into("<H", data, symbol_row(data) + 6, 77)
    assert "does not exist" in bad(bytes(data))
    struct.pack_into("<H", data, symbol_row(data) + 6, SHN_XINDEX)
    assert "section index is missing" in bad(bytes(data))
    # .shstrtab becomes the table of wide indices: whatever it says is no section of six
    struct.pack_into("<I", data, header(data, 5) + 4, 18)
    struct.pack_into("<I", data, header(data, 5) + 40, 3)
    assert "does not exist" in bad(bytes(data))


def test_a_variable_without_a_name_is_refused() -> None:
    data = small()
    struct.pack_into("<I", data, symbol_row(data), 0)
    with pytest.raises(Failed) as caught:
        UnitObject.parse(bytes(data), "x.o")
    assert caught.value.rule == "bad-elf"


@pytest.mark.parametrize("width", [9, 1 << 20, 1 << 62])
def test_characters_of_any_width_are_refused(width: int) -> None:
    text = OutSection(".text.f", SHT_PROGBITS, SHF_ALLOC | SHF_EXECINSTR, 16, bytes(16))
    flags = SHF_ALLOC | SHF_MERGE | SHF_STRINGS
    strings = OutSection(".rodata.str1.1", SHT_PROGBITS, flags, 1, b"text\0", entry_size=width)
    local = OutSymbol("", strings, type=STT_SECTION)
    text.relas.append((".rela.text.f", 0, [OutReloc(4, 11, local, 0)]))
    unit = UnitObject.parse(write([text, strings], [local]), "x.o")
    with pytest.raises(Failed) as caught:
        unit.ref(unit.elf.sections[1], unit.elf.sections[1].relocs[0])
    assert caught.value.rule == "bad-elf"


def test_symbols_that_are_called_like_keys_do_not_hide_each_other() -> None:
    names = ["a", "a#2", "a", "a", "a#b.1", "a#b.2", "x." + "9" * 5000, "x." + "9" * 4999 + "8"]
    sections = [OutSection(f".data.{i}", SHT_PROGBITS, SHF_ALLOC | SHF_WRITE, 4, bytes(4)) for i in range(8)]
    symbols = [OutSymbol(n, s, 0, 4, STT_OBJECT) for n, s in zip(names, sections, strict=True)]
    unit = UnitObject.parse(write(sections, symbols), "x.o")
    assert len(unit.parts) == len(names)
    assert set(match(unit, unit).original) == set(unit.parts)


def test_a_function_without_code_is_refused() -> None:
    text = OutSection(".text.f", SHT_NOBITS, SHF_ALLOC | SHF_EXECINSTR, 16, size=16)
    with pytest.raises(Failed) as caught:
        UnitObject.parse(write([text], [OutSymbol("f", text, 0, 16, STT_FUNC, STB_GLOBAL)]), "x.o")
    assert caught.value.rule == "bad-elf"
