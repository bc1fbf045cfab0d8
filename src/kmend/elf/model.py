"""An ELF64 relocatable file as values, and the names of its numbers.

Numbers from the System V ABI and its x86-64 supplement; the livepatch ones from
``include/uapi/linux/elf.h`` (``SHF_RELA_LIVEPATCH``, ``SHN_LIVEPATCH``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

SHT_NULL = 0
SHT_PROGBITS = 1
SHT_SYMTAB = 2
SHT_STRTAB = 3
SHT_RELA = 4
SHT_NOTE = 7
SHT_NOBITS = 8
SHT_REL = 9
SHT_GROUP = 17
SHT_SYMTAB_SHNDX = 18

SHF_WRITE = 0x1
SHF_ALLOC = 0x2
SHF_EXECINSTR = 0x4
SHF_MERGE = 0x10
SHF_STRINGS = 0x20
SHF_INFO_LINK = 0x40
SHF_LINK_ORDER = 0x80
SHF_RELA_LIVEPATCH = 0x00100000

SHN_UNDEF = 0
SHN_LORESERVE = 0xFF00
SHN_LIVEPATCH = 0xFF20
SHN_ABS = 0xFFF1
SHN_COMMON = 0xFFF2
SHN_XINDEX = 0xFFFF

STB_LOCAL = 0
STB_GLOBAL = 1
STB_WEAK = 2

STT_NOTYPE = 0
STT_OBJECT = 1
STT_FUNC = 2
STT_SECTION = 3
STT_FILE = 4
STT_TLS = 6

EM_X86_64 = 62
ET_REL = 1
ET_EXEC = 2
ET_DYN = 3


@dataclass(frozen=True, slots=True)
class Symbol:
    """A row of the symbol table. ``section`` is the section's index, or one of the ``SHN_`` numbers."""

    index: int
    name: str
    value: int
    size: int
    type: int
    bind: int
    other: int
    section: int

    @property
    def defined(self) -> bool:
        """Whether it stands in a section of this file."""
        return SHN_UNDEF < self.section < SHN_LORESERVE

    @property
    def is_local(self) -> bool:
        return self.bind == STB_LOCAL


@dataclass(frozen=True, slots=True)
class Reloc:
    """A row of a ``.rela`` section: ``offset`` into what it patches, ``symbol`` by index."""

    offset: int
    type: int
    symbol: int
    addend: int


@dataclass(frozen=True, slots=True)
class Section:
    """A section with its contents (empty for ``SHT_NOBITS``) and the relocations that patch it, by offset."""

    index: int
    name: str
    type: int
    flags: int
    address: int
    size: int
    link: int
    info: int
    align: int
    entry_size: int
    data: bytes = field(repr=False)
    relocs: tuple[Reloc, ...] = field(default=(), repr=False)
    #: index of the ``.rela`` section that ``relocs`` came from; 0: none
    rela_index: int = 0
    rela_flags: int = 0

    @property
    def alloc(self) -> bool:
        return bool(self.flags & SHF_ALLOC)

    @property
    def executable(self) -> bool:
        return bool(self.flags & SHF_EXECINSTR)

    @property
    def writable(self) -> bool:
        return bool(self.flags & SHF_WRITE)

    @property
    def strings(self) -> bool:
        """A mergeable section of NUL-terminated strings."""
        return self.flags & (SHF_MERGE | SHF_STRINGS) == SHF_MERGE | SHF_STRINGS


@dataclass(frozen=True, slots=True)
class ElfFile:
    """A parsed file: ``sections[0]`` is the null section, ``symbols[0]`` the null symbol."""

    machine: int
    type: int
    flags: int
    sections: tuple[Section, ...]
    symbols: tuple[Symbol, ...]

    def section(self, name: str) -> Section | None:
        """The first section of that name."""
        for section in self.sections:
            if section.name == name:
                return section
        return None
