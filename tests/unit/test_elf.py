"""The ELF reader and writer, against readelf and pyelftools."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import SymbolTableSection
from hypothesis import given, settings
from hypothesis import strategies as st

from kmend.core.errors import Failed, KmendError, UsageError
from kmend.core.run import run
from kmend.elf.model import (
    SHF_ALLOC,
    SHF_EXECINSTR,
    SHF_WRITE,
    SHN_UNDEF,
    SHT_NOBITS,
    SHT_PROGBITS,
    STB_GLOBAL,
    STB_LOCAL,
    STT_FUNC,
    STT_SECTION,
    ElfFile,
)
from kmend.elf.reader import read, slice_relocs
from kmend.elf.writer import OutReloc, OutSection, OutSymbol, write
from kmend.elf.x86_64 import R_32S, R_64, R_PC32, R_PLT32, row, target_of

SOURCE = """
#include <stddef.h>
extern int outside(const char *);
static int counter = 3;
int table[4] = { 1, 2, 3, 4 };
static int *pointer = &table[2];
__attribute__((noinline)) static int inner(int x) { return outside("text") + counter + x; }
int outer(int x) { return inner(x) + *pointer; }
"""


@pytest.fixture(scope="module")
def object_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elf")
    (folder / "a.c").write_text(SOURCE)
    flags = ["-O2", "-ffunction-sections", "-fdata-sections", "-mcmodel=kernel", "-fno-pie"]
    run(["gcc", *flags, "-c", folder / "a.c", "-o", folder / "a.o"])
    return folder / "a.o"


def test_reader_agrees_with_pyelftools(object_file: Path) -> None:
    data = object_file.read_bytes()
    ours, theirs = read(data), ELFFile(io.BytesIO(data))
    assert [s.name for s in ours.sections] == [s.name for s in theirs.iter_sections()]
    for mine, other in zip(ours.sections, theirs.iter_sections(), strict=True):
        header = other.header
        assert (mine.size, mine.flags, mine.align, mine.link, mine.info) == (
            header.sh_size,
            header.sh_flags,
            header.sh_addralign,
            header.sh_link,
            header.sh_info,
        )
        if isinstance(other, SymbolTableSection):
            rows = [(s.name, s["st_value"], s["st_size"]) for s in other.iter_symbols()]
            assert [("" if s.type == STT_SECTION else s.name, s.value, s.size) for s in ours.symbols] == rows
        if isinstance(other, RelocationSection):
            patched = ours.sections[header.sh_info]
            wanted = sorted(
                (r["r_offset"], r["r_info_type"], r["r_info_sym"], r["r_addend"])
                for r in other.iter_relocations()
            )
            assert sorted((r.offset, r.type, r.symbol, r.addend) for r in patched.relocs) == wanted


def rewritten(elf: ElfFile) -> bytes:
    """The file written anew from its values."""
    sections = {}
    for s in elf.sections[1:]:
        if s.type in (SHT_PROGBITS, SHT_NOBITS, 7, 14, 15):
            sections[s.index] = OutSection(s.name, s.type, s.flags, s.align, s.data, s.size, s.entry_size)
    symbols = {
        s.index: OutSymbol(s.name, sections.get(s.section, s.section), s.value, s.size, s.type, s.bind)
        for s in elf.symbols[1:]
        if s.section in sections or not s.defined
    }
    for index, out in sections.items():
        source = elf.sections[index]
        if source.relocs:
            out.relas.append(
                (
                    f".rela{source.name}",
                    0,
                    [OutReloc(r.offset, r.type, symbols[r.symbol], r.addend) for r in source.relocs],
                )
            )
    return write(sections.values(), symbols.values())


def test_write_read_write_is_stable_and_readelf_is_content(object_file: Path, tmp_path: Path) -> None:
    first = rewritten(read(object_file.read_bytes()))
    second = rewritten(read(first))
    assert first == second
    (tmp_path / "b.o").write_bytes(first)
    seen = run(["readelf", "-aW", tmp_path / "b.o"])
    assert not seen.errors
    before = run(["objdump", "-drw", "--no-show-raw-insn", object_file]).text.splitlines()[3:]
    after = run(["objdump", "-drw", "--no-show-raw-insn", tmp_path / "b.o"]).text.splitlines()[3:]
    assert [line for line in before if line] == [line for line in after if line]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.binary(min_size=16, max_size=80),
            st.integers(0, 4),
            st.lists(
                st.tuples(
                    st.integers(0, 8),
                    st.sampled_from([R_64, R_PC32, R_PLT32, R_32S]),
                    st.integers(-(2**31), 2**31),
                ),
                max_size=4,
            ),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_what_is_written_is_read_back(rows: list[tuple[bytes, int, list[tuple[int, int, int]]]]) -> None:
    sections, symbols = [], []
    for number, (data, align, relocs) in enumerate(rows):
        section = OutSection(f".text.f{number}", SHT_PROGBITS, SHF_ALLOC | SHF_EXECINSTR, 1 << align, data)
        local = OutSymbol(f"f{number}", section, 0, len(data), STT_FUNC, STB_LOCAL)
        outer = OutSymbol(f"u{number}", SHN_UNDEF, bind=STB_GLOBAL)
        sections.append(section)
        symbols += [outer, local]
        if relocs:
            section.relas.append(
                (f".rela.text.f{number}", 0, [OutReloc(o, t, outer, a) for o, t, a in relocs])
            )
    elf = read(write(sections, symbols))
    for number, (data, align, relocs) in enumerate(rows):
        found = elf.section(f".text.f{number}")
        assert found is not None
        assert (found.data, found.align, found.flags) == (data, 1 << align, SHF_ALLOC | SHF_EXECINSTR)
        assert sorted((r.offset, r.type, r.addend) for r in found.relocs) == sorted(relocs)
        assert {elf.symbols[r.symbol].name for r in found.relocs} <= {f"u{number}"}
    binds = [s.bind for s in elf.symbols]
    assert binds == sorted(binds), "local symbols come first"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_end_in_our_own_errors(object_file: Path, data: st.DataObject) -> None:
    raw = bytearray(object_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    for text in (bytes(raw), bytes(raw[:cut])):
        try:
            elf = read(text)
        except KmendError as error:
            assert error.what
        else:
            assert elf.sections[0].type == 0


@pytest.mark.parametrize(
    ("data", "word"),
    [(b"", "empty"), (b"#!/bin/sh\n", "header"), (b"\x7fELF" + bytes(60), "x86-64"), (b"\x7fELF", "header")],
)
def test_what_is_no_object_is_named(data: bytes, word: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(data, "thing.o")
    assert "thing.o" in caught.value.what
    assert word in caught.value.why


def test_unknown_relocation_types_are_refused() -> None:
    with pytest.raises(Failed):
        row(9)  # R_X86_64_GOTPCREL: no module may use it


@given(
    st.sampled_from([R_64, R_PC32, R_PLT32, R_32S]),
    st.integers(-(2**30), 2**30),
    st.integers(-64, 64),
    st.integers(-(2**20), 2**20),
)
def test_target_of_undoes_the_relocation(kind: int, distance: int, addend: int, offset: int) -> None:
    base = 0xFFFFFFFF81000000
    symbol, place = base + distance, base + offset
    entry = row(kind)
    value = symbol + addend - (place if entry.relative else 0)
    field = (value & (2 ** (8 * entry.size) - 1)).to_bytes(entry.size, "little")
    if not entry.relative and entry.size == 4 and not 2**63 <= value & (2**64 - 1) >= 0xFFFFFFFF80000000:
        return  # would overflow, which the linker refuses
    assert target_of(field, entry, place, addend) == symbol


def test_slicing_relocations(object_file: Path) -> None:
    for section in read(object_file.read_bytes()).sections:
        for start in range(0, section.size, 3):
            want = tuple(r for r in section.relocs if start <= r.offset < start + 7)
            assert slice_relocs(section.relocs, start, start + 7) == want


def test_bss_takes_no_room_in_the_file() -> None:
    section = OutSection(".bss", SHT_NOBITS, SHF_ALLOC | SHF_WRITE, 32, b"", 1 << 20)
    data = write([section], [])
    assert len(data) < 1000
    found = read(data).section(".bss")
    assert found is not None
    assert found.size == 1 << 20
