"""Sections whose entries belong to functions: one table.

Each entry of such a section names the code that it is about in its first field. An
entry goes into the livepatch module exactly when the function that owns it goes, and
the entries are part of what is compared: a WARN() that moved to another line, or an
exception fixup that changed, changes the function.

Sizes are the target's where they are given (its headers, see ``module/layout.py``);
without a target the size that fits every entry is found, or the section is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kmend.core.errors import Failed
from kmend.diff.unit import PartKind, RefKind, UnitObject
from kmend.elf.model import Reloc, Section


@dataclass(frozen=True, slots=True)
class SpecialRow:
    """A special section.

    ``sizes``: the entry sizes known for it, in bytes. ``compared``: whether an entry is part of the
    function's meaning (ORC follows from the code, and is not). ``source``: where the kernel defines it.
    """

    name: str
    sizes: tuple[int, ...]
    compared: bool
    source: str


#: Order: as the kernel's module loader looks at them does not matter; entries keep their order.
TABLE: dict[str, SpecialRow] = {
    entry.name: entry
    for entry in (
        SpecialRow("__mcount_loc", (8,), True, "include/asm-generic/vmlinux.lds.h, gcc -mrecord-mcount"),
        SpecialRow("__ex_table", (12,), True, "arch/x86/include/asm/extable.h, struct exception_table_entry"),
        SpecialRow("__bug_table", (12, 8), True, "include/asm-generic/bug.h, struct bug_entry"),
        SpecialRow(".smp_locks", (4,), True, "arch/x86/include/asm/alternative.h, LOCK_PREFIX"),
        SpecialRow(
            ".altinstructions", (12, 14), True, "arch/x86/include/asm/alternative.h, struct alt_instr"
        ),
        SpecialRow(
            ".parainstructions", (16,), True, "arch/x86/include/asm/paravirt_types.h, paravirt_patch_site"
        ),
        SpecialRow(".retpoline_sites", (4,), True, "tools/objtool/check.c, create_retpoline_sites_sections"),
        SpecialRow(".return_sites", (4,), True, "tools/objtool/check.c, create_return_sites_sections"),
        SpecialRow(".call_sites", (4,), True, "tools/objtool/check.c, create_direct_call_sections"),
        SpecialRow("__jump_table", (16,), True, "include/linux/jump_label.h, struct jump_entry"),
        SpecialRow(
            ".static_call_sites", (8,), True, "include/linux/static_call_types.h, struct static_call_site"
        ),
        SpecialRow(".orc_unwind_ip", (4,), False, "arch/x86/include/asm/orc_types.h"),
        # What may be probed, or made to fail: it holds for the function that takes the place of another, too.
        SpecialRow("_kprobe_blacklist", (8,), True, "include/asm-generic/kprobes.h, NOKPROBE_SYMBOL"),
        SpecialRow(
            "_error_injection_whitelist",
            (16,),
            True,
            "include/asm-generic/error-injection.h, struct error_injection_entry",
        ),
    )
}
#: Runs parallel to ``.orc_unwind_ip``, one ``struct orc_entry`` for each of its entries.
ORC = ".orc_unwind"
ORC_IP = ".orc_unwind_ip"
#: Every per-CPU variable stands in a section that begins so (include/linux/percpu-defs.h). A module has one
#: of this very name (kernel/module/main.c, find_pcpusec); what the endings say (``..read_mostly``) is for the
#: linker of vmlinux.
PER_CPU = ".data..percpu"
#: Functions that no kprobe may be set on stand here (``__kprobes``); a module has one as well.
NO_PROBES = ".kprobes.text"
#: Code that the above refer to and that belongs to no function symbol.
SATELLITES = frozenset({".altinstr_replacement", ".altinstr_aux"})
#: Tables about functions that a module can do without. ``.ibt_endbr_seal`` says whose ENDBR may be erased,
#: which objtool can only know of the whole link; ``__patchable_function_entries`` where gcc put padding,
#: which x86's ftrace does not use.
DISPENSABLE = frozenset({".ibt_endbr_seal", "__patchable_function_entries"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry; its relocations count from its own start, ``owner_offset`` from the owner's."""

    section: int
    offset: int
    data: bytes
    relocs: tuple[Reloc, ...]
    owner: str
    owner_offset: int
    orc: bytes = b""


class SpecialSections:
    """All entries of an object, by the key of the owning part."""

    def __init__(self, unit: UnitObject, sizes: Mapping[str, int] | None = None) -> None:
        self.unit = unit
        self.by_owner: dict[str, dict[str, list[Entry]]] = {}
        #: entries that no function symbol owns: (section name, section name of the code)
        self.orphans: list[tuple[str, str]] = []
        #: where the code lies that they are about: section number, offset and the table's name
        self._loose: list[tuple[int, int, str]] = []
        for section in unit.elf.sections:
            table_row = TABLE.get(section.name)
            if table_row is None or section.size == 0:
                continue
            self._split(section, table_row, (sizes or {}).get(section.name))

    def entries(self, owner: str, section: str) -> list[Entry]:
        return self.by_owner.get(owner, {}).get(section, [])

    def _entry_size(self, section: Section, table_row: SpecialRow, given: int | None) -> int:
        starts = {r.offset for r in section.relocs}
        for size in (given,) if given else table_row.sizes:
            if section.size % size == 0 and all(at in starts for at in range(0, section.size, size)):
                return size
        raise Failed(
            f"{self.unit.name}: the section {section.name} is not understood",
            why=f"its {section.size} bytes are no table of {given or table_row.sizes}-byte entries "
            f"that each begin with a relocation ({table_row.source})",
            next_step="report the unit: this kernel lays the section out in a way kmend does not know",
            rule="special-section",
        )

    def _split(self, section: Section, table_row: SpecialRow, given: int | None) -> None:
        size = self._entry_size(section, table_row, given)
        orc, orc_size = b"", 0
        if section.name == ORC_IP:
            orc_section = self.unit.elf.section(ORC)
            count = section.size // size
            if orc_section is None or orc_section.size % count:
                raise Failed(f"{self.unit.name}: {ORC} does not match {ORC_IP}", rule="special-section")
            orc, orc_size = orc_section.data, orc_section.size // count
        symbols = self.unit.elf.symbols
        at = 0
        relocs = section.relocs
        for number, offset in enumerate(range(0, section.size, size)):
            mine: list[Reloc] = []
            while at < len(relocs) and relocs[at].offset < offset + size:
                reloc = relocs[at]
                mine.append(Reloc(reloc.offset - offset, reloc.type, reloc.symbol, reloc.addend))
                at += 1
            first = mine[0]
            symbol = symbols[first.symbol]
            owner = None
            if symbol.defined:
                place = symbol.value + first.addend
                owner = self.unit.covering(symbol.section, place)
                if owner is None:
                    # ORC ends a section with an entry at its very end; it belongs to what stands before.
                    parts = self.unit.parts_in(symbol.section)
                    if parts and place >= parts[-1].end:
                        owner = parts[-1]
            if owner is None or owner.kind is not PartKind.FUNCTION:
                where = self.unit.elf.sections[symbol.section].name if symbol.defined else symbol.name
                self.orphans.append((section.name, where))
                if symbol.defined and section.name != ORC_IP:
                    self._loose.append((symbol.section, symbol.value + first.addend, section.name))
                continue
            entry = Entry(
                section.index,
                offset,
                section.data[offset : offset + size],
                tuple(mine),
                owner.key,
                symbol.value + first.addend - owner.start,
                orc[number * orc_size : (number + 1) * orc_size],
            )
            self.by_owner.setdefault(owner.key, {}).setdefault(section.name, []).append(entry)

    # -- satellites ------------------------------------------------------

    def tables_about(self, section: int, start: int, end: int) -> tuple[str, ...]:
        """Tables that have entries about a stretch of code which belongs to no function symbol.

        ORC does not count: a replacement runs where it is copied to, under its function's ORC data.
        """
        names = {name for at, place, name in self._loose if at == section and start <= place < end}
        return tuple(sorted(names))

    def replacement(self, entry: Entry) -> tuple[int, int, int] | None:
        """Section, offset and length of the code that an ``.altinstructions`` entry puts in (None: length 0).

        ``struct alt_instr`` ends with ``u8 instrlen; u8 replacementlen`` in every version since 4.0.
        """
        length = entry.data[-1]
        if length == 0 or len(entry.relocs) < 2:
            return None
        reloc = entry.relocs[1]
        symbol = self.unit.elf.symbols[reloc.symbol]
        if not symbol.defined:
            raise Failed(
                f"{self.unit.name}: an alternative's replacement is not in the object", rule="special-section"
            )
        return symbol.section, symbol.value + reloc.addend, length

    def aux_block(self, offset: int) -> tuple[int, int]:
        """Start and end of the ``.altinstr_aux`` block that begins at ``offset``.

        ``static_cpu_has()`` (arch/x86/include/asm/cpufeature.h) jumps to the beginning of a block; the
        next one begins where the next such jump leads.
        """
        aux = self.unit.elf.section(".altinstr_aux")
        if aux is None:
            raise Failed(f"{self.unit.name}: .altinstr_aux is missing", rule="special-section")
        starts = sorted(self._aux_starts() | {aux.size})
        if offset not in starts:
            raise Failed(
                f"{self.unit.name}: no block begins at .altinstr_aux+{offset:#x}", rule="special-section"
            )
        return offset, starts[starts.index(offset) + 1]

    def _aux_starts(self) -> set[int]:
        out = set()
        for section in self.unit.elf.sections:
            if not section.executable or section.name in SATELLITES:
                continue
            for reloc in section.relocs:
                symbol = self.unit.elf.symbols[reloc.symbol]
                if symbol.defined and self.unit.elf.sections[symbol.section].name == ".altinstr_aux":
                    ref = self.unit.ref(section, reloc)
                    if ref.kind is RefKind.OPAQUE:
                        out.add(ref.addend)
        replacement = self.unit.elf.section(".altinstr_replacement")
        if replacement is not None:
            for reloc in replacement.relocs:
                symbol = self.unit.elf.symbols[reloc.symbol]
                if symbol.defined and self.unit.elf.sections[symbol.section].name == ".altinstr_aux":
                    out.add(symbol.value + reloc.addend + self.unit.tail(replacement, reloc))
        return out
