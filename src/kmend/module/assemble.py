"""Patched functions, descriptors and the glue to one livepatch module.

A small relocatable linker: pieces of the patched objects are laid into output sections,
every relocation is decided by :class:`kmend.diff.select.Linker` and
:mod:`kmend.module.resolve`, and goes either into an ordinary ``.rela`` section or, for a
livepatch symbol, into ``.klp.rela.OBJECT.SECTION``
(Documentation/livepatch/module-elf-format.rst).

The kernel applies ``.klp.rela.vmlinux.*`` while it loads the module, before jump labels,
static calls and alternatives are processed, and ``.klp.rela.MODULE.*`` when that module is
there (kernel/livepatch/core.c, klp_apply_section_relocs; since commit 7c8e2bdd5f0d
"livepatch: Apply vmlinux-specific KLP relocations early", 5.8). A table that is processed
while loading must therefore not depend on a module's symbols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kmend.core.errors import Failed, Refusal, Refused
from kmend.core.target import VMLINUX
from kmend.diff.select import Link, Linker, LinkKind, Selection
from kmend.diff.special import NO_PROBES, ORC, ORC_IP, PER_CPU, TABLE, Entry, SpecialSections
from kmend.diff.twins import section_class
from kmend.diff.unit import Part, PartKind, UnitObject, base_name
from kmend.elf.model import (
    SHF_ALLOC,
    SHF_EXECINSTR,
    SHF_WRITE,
    SHT_NOBITS,
    SHT_PROGBITS,
    STB_LOCAL,
    STT_FUNC,
    STT_OBJECT,
    ElfFile,
    Reloc,
    Section,
)
from kmend.elf.reader import slice_relocs
from kmend.elf.writer import OutReloc, OutSymbol
from kmend.module.layout import Layout
from kmend.module.output import (
    EARLY,
    PATCH,
    Assembled,
    FuncEntry,
    ModuleSpec,
    ObjectEntry,
    Out,
    Output,
    bad_states,
    second_callback,
)
from kmend.module.resolve import Livepatched, Resolution, Shared


@dataclass(frozen=True, slots=True)
class UnitPatch:
    """One unit's share: the object it belongs to (``vmlinux`` or a module) and what was selected.

    ``outer`` and ``externs`` say how each name of the selection is reached; ``sympos`` has the position of
    each replaced function by its key in the original object.
    """

    owner: str
    unit: str
    selection: Selection
    outer: Mapping[str, Resolution]
    externs: Mapping[str, Resolution]
    sympos: Mapping[str, int]


def assemble(
    spec: ModuleSpec,
    units: Sequence[UnitPatch],
    glue: ElfFile,
    layout: Layout,
    crcs: Mapping[str, int],
) -> Assembled:
    """Build the module.

    ``glue`` is ``glue.c`` compiled for the target; ``crcs`` are the CRCs of the exported symbols that the
    glue itself uses, and ``module_layout``'s.

    Raises:
        Refused: (``late-module-key``, ``late-module-alternative``) something is needed while the module is
            loaded that only a module has which may come later.
        Failed: an internal inconsistency.
    """
    return _Assembler(spec, units, glue, layout, crcs).run()


def _altered(special: SpecialSections, key: str) -> list[tuple[int, int]]:
    """Stretches of a function, from its start, that the kernel overwrites while it loads the module.

    ``struct alt_instr`` ends with ``u8 instrlen, replacementlen``; ``struct paravirt_patch_site`` is
    ``u8 *instr; u8 type, len``. A relocation that is applied later would spoil what was put there.
    """
    alternatives = special.entries(key, ".altinstructions")
    paravirt = special.entries(key, ".parainstructions")
    return [(e.owner_offset, e.owner_offset + e.data[-2]) for e in alternatives] + [
        (e.owner_offset, e.owner_offset + e.data[9]) for e in paravirt
    ]


class _Assembler(Output):
    def __init__(
        self,
        spec: ModuleSpec,
        units: Sequence[UnitPatch],
        glue: ElfFile,
        layout: Layout,
        crcs: Mapping[str, int],
    ) -> None:
        super().__init__(spec, glue, layout, crcs)
        self.units = units
        self.parts: dict[tuple[int, str], tuple[Out, OutSymbol]] = {}
        self.satellites: dict[tuple[int, int, int], int] = {}
        self.refusals: list[Refusal] = []
        self.warnings: dict[tuple[str, str], Refusal] = {}
        #: new global functions and variables of one unit that another unit refers to, by object and name:
        #: each module of the kernel may have a global name of its own
        self.shared: dict[tuple[str, str], tuple[int, str]] = {}

    def run(self) -> Assembled:
        for number, unit in enumerate(self.units):
            self._place_parts(number, unit)
        for number, unit in enumerate(self.units):
            for key in unit.selection.included:
                self._fill_part(number, unit, key)
            self._fill_special(number, unit)
        objects = self._objects()
        states = tuple(row for unit in self.units for row in unit.selection.states)
        self.refusals += bad_states(states)
        if self.refusals:
            raise Refused(self.refusals)
        glue = self._place_glue()
        self._descriptors(objects, states)
        self._join(glue, self._from_glue)
        self._information()
        self._versions()
        return Assembled(self._bytes(), tuple(self.warnings.values()))

    # -- functions and variables -----------------------------------------------

    def _place_parts(self, number: int, unit: UnitPatch) -> None:
        new = unit.selection.diff.new
        for key in unit.selection.included:
            part = new.parts[key]
            section = new.section_of(part)
            name = section_class(new, part)
            if part.kind is PartKind.FUNCTION:
                name = ".text.unlikely" if ".cold" in part.name or "unlikely" in section.name else ".text"
                name = NO_PROBES if section.name.startswith(NO_PROBES) else name
            elif name.startswith(".rodata"):
                name = ".rodata"
            elif name.startswith(PER_CPU):
                name = PER_CPU
            if section.type == SHT_NOBITS and name in self.out and self.out[name].type != SHT_NOBITS:
                name = ".bss"
            out = self._section(
                name,
                section.type if section.type == SHT_NOBITS else SHT_PROGBITS,
                section.flags & (SHF_ALLOC | SHF_WRITE | SHF_EXECINSTR),
            )
            pad = new.padding(part)
            at = out.add(pad + new.code(part), 16 if part.kind is PartKind.FUNCTION else section.align)
            at += len(pad)
            symbol = self._symbol(
                part.name,
                out.section,
                value=at,
                size=part.size,
                type=STT_FUNC if part.kind is PartKind.FUNCTION else STT_OBJECT,
                bind=STB_LOCAL,
            )
            self.parts[number, key] = (out, symbol)
            if not part.local and key not in unit.selection.diff.twins.original:
                self.shared[unit.owner, part.name] = (number, key)

    def _fill_part(self, number: int, unit: UnitPatch, key: str) -> None:
        linker = Linker(unit.selection.diff)
        new = unit.selection.diff.new
        part = new.parts[key]
        out, symbol = self.parts[number, key]
        section = new.section_of(part)
        altered = _altered(unit.selection.diff.new_special, key)
        for reloc in new.relocs(part):
            link = linker.of_code(part, section, reloc)
            at = symbol.value + reloc.offset - part.start
            within = any(low <= reloc.offset - part.start < high for low, high in altered)
            if within and self._is_late(unit, link):
                self._refuse_late("late-module-alternative", part, link)
                continue
            self._relocate(number, unit, out, at, reloc, link, part, section)

    def _relocate(
        self,
        number: int,
        unit: UnitPatch,
        out: Out,
        at: int,
        reloc: Reloc,
        link: Link,
        part: Part,
        section: Section,
    ) -> None:
        new = unit.selection.diff.new
        obj: str | None = None
        addend = link.ref.addend
        match link.kind:
            case LinkKind.LOCAL:
                symbol = self.parts[number, link.name][1]
            case LinkKind.OUTER:
                symbol, obj = self._reach(unit.outer[link.name])
            case LinkKind.EXTERN:
                if link.name == PATCH:
                    symbol = self.patch
                elif (brought := self._brought(unit, link.name)) is not None:
                    symbol = self.parts[brought][1]
                else:
                    symbol, obj = self._reach(unit.externs[link.name])
            case LinkKind.STRING | LinkKind.CONST:
                symbol, place = self._literal(link, new.elf.sections[link.ref.section].entry_size)
                addend = place - new.tail(section, reloc)
            case LinkKind.EMPTY:
                # Only its address counts; eight bytes of our own keep it apart from everything else.
                out_bss = self._section(".bss", SHT_NOBITS, SHF_ALLOC | SHF_WRITE)
                key = (number, link.ref.section, 0)
                if key not in self.satellites:
                    self.satellites[key] = out_bss.add(bytes(8), 8)
                symbol, addend = out_bss.symbol, self.satellites[key] + addend
            case LinkKind.SATELLITE:
                start, end = unit.selection.diff.new_special.aux_block(link.ref.addend)
                place = self._satellite(number, unit, part, link.ref.section, start, end - start)
                symbol = self.out[link.name].symbol
                addend = place - new.tail(section, reloc)
        row = OutReloc(at, reloc.type, symbol, addend)
        if obj is not None and obj != VMLINUX:
            # klp_apply_object_relocs() looks only at sections named after an object that the patch
            # changes: what ext4 takes from jbd2 must stand in .klp.rela.ext4.*, where it is resolved
            # when ext4 (and so jbd2, which it depends on) is there.
            obj = unit.owner
        (out.plain if obj is None else out.klp.setdefault(obj, [])).append(row)

    def _literal(self, link: Link, width: int) -> tuple[OutSymbol, int]:
        """Where a string or constant of the module lies: section symbol and offset."""
        constant = link.kind is LinkKind.CONST
        out = self._section(".rodata.cst" if constant else ".rodata.str", SHT_PROGBITS, SHF_ALLOC)
        content = link.ref.content
        inside = link.ref.addend % len(content) if constant else 0
        key = (b"c" if constant else b"s%d" % width) + content
        if key not in self.strings:
            self.strings[key] = out.add(content, len(content) if constant else width)
        return out.symbol, self.strings[key] + inside

    def _satellite(
        self, number: int, unit: UnitPatch, owner: Part, index: int, start: int, length: int
    ) -> int:
        """Carry replacement code over; returns its offset in the output section of the same name."""
        new = unit.selection.diff.new
        section = new.elf.sections[index]
        key = (number, index, start)
        if key in self.satellites:
            return self.satellites[key]
        out = self._section(section.name, SHT_PROGBITS, SHF_ALLOC | SHF_EXECINSTR)
        at = self.satellites[key] = out.add(section.data[start : start + length], 1)
        tables = unit.selection.diff.new_special.tables_about(index, start, start + length)
        if tables:
            self.refusals.append(
                Refusal(
                    "special-section",
                    owner.name,
                    f"{', '.join(tables)} speak of the code that an alternative puts into it",
                    "report the function: kmend does not carry such entries over",
                )
            )
        linker = Linker(unit.selection.diff)
        for reloc in slice_relocs(section.relocs, start, start + length):
            link = linker.of_satellite(owner, section, reloc)
            if section.name == ".altinstr_replacement" and self._is_late(unit, link):
                self._refuse_late("late-module-alternative", owner, link)
                continue
            self._relocate(number, unit, out, at + reloc.offset - start, reloc, link, owner, section)
        return at

    # -- special sections ----------------------------------------------------------

    def _brought(self, unit: UnitPatch, name: str) -> tuple[int, str] | None:
        """The new global of that name which another unit of the patch brings along; None: there is none."""
        own = self.shared.get((unit.owner, name))
        if own is not None:
            return own
        found = unit.externs.get(name)
        return self.shared[found.obj, name] if isinstance(found, Shared) else None

    def _is_late(self, unit: UnitPatch, link: Link) -> bool:
        """Whether the link leads to a symbol of a module, which may be loaded after us."""
        resolution: Resolution | None = None
        if link.kind is LinkKind.OUTER:
            resolution = unit.outer[link.name]
        elif link.kind is LinkKind.EXTERN and link.name != PATCH and self._brought(unit, link.name) is None:
            resolution = unit.externs[link.name]
        return isinstance(resolution, Livepatched) and resolution.obj != VMLINUX

    def _refuse_late(self, rule: str, owner: Part, link: Link) -> None:
        """docs/special-sections.md says why neither can wait for the module."""
        key = f"write static_key_enabled(&{base_name(link.name)}) in the changed function, in place of "
        key += "static_branch_likely() or static_branch_unlikely(): it reads the key when the code runs"
        self.refusals.append(
            Refusal(
                rule,
                owner.name,
                f"its code is prepared while the patch is loaded, with {link.name}, which belongs to a "
                "module that may be loaded later",
                key if rule == "late-module-key" else "leave the change to the next reboot",
            )
        )

    def _fill_special(self, number: int, unit: UnitPatch) -> None:
        diff = unit.selection.diff
        new = diff.new
        for name in TABLE:
            for key in unit.selection.included:
                for entry in diff.new_special.entries(key, name):
                    self._entry(number, unit, new, name, entry)

    def _entry(self, number: int, unit: UnitPatch, new: UnitObject, name: str, entry: Entry) -> None:
        linker = Linker(unit.selection.diff)
        owner = new.parts[entry.owner]
        source = new.elf.sections[entry.section]
        links = [(reloc, linker.of_entry(entry, reloc)) for reloc in entry.relocs]
        if name in EARLY and self._late_entry(unit, owner, name, links):
            return
        if name == ".call_sites" and self._late_call(unit, owner, entry):
            return
        out = self._section(name, SHT_PROGBITS, source.flags & (SHF_ALLOC | SHF_WRITE), source.align)
        at = out.add(entry.data, 1)
        if name == ORC_IP:
            orc = new.elf.section(ORC)
            if orc is None:
                raise Failed(f"{new.name} has no {ORC}", rule="internal")
            self._section(ORC, SHT_PROGBITS, orc.flags & (SHF_ALLOC | SHF_WRITE), orc.align).add(entry.orc, 1)
        for place, (reloc, link) in enumerate(links):
            if name == ".altinstructions" and place == 1:
                spot = unit.selection.diff.new_special.replacement(entry)
                offset = 0
                body = self._section(".altinstr_replacement", SHT_PROGBITS, SHF_ALLOC | SHF_EXECINSTR)
                if spot is not None:
                    offset = self._satellite(number, unit, owner, *spot)
                elif not body.size:
                    body.add(b"\x90", 1)  # nothing to put in, but the section has to exist
                out.plain.append(OutReloc(at + reloc.offset, reloc.type, body.symbol, offset))
                continue
            self._relocate(number, unit, out, at + reloc.offset, reloc, link, owner, source)

    def _late_entry(self, unit: UnitPatch, owner: Part, name: str, links: list[tuple[Reloc, Link]]) -> bool:
        """Whether the entry is left out because it would need a module that may come later."""
        late = [link for _, link in links[1:] if self._is_late(unit, link)]
        if not late:
            return False
        key = late[0].name
        if name == ".static_call_sites":
            # The call goes through the module's own trampoline, which static_call_update() keeps right.
            return True
        if name == "__jump_table" and key.startswith("__tracepoint_"):
            self.warnings.setdefault(
                ("tracepoint-silent", key),
                Refusal(
                    "tracepoint-silent",
                    f"{key.removeprefix('__tracepoint_')} in {owner.name}",
                    f"the tracepoint belongs to {unit.owner}, which may be loaded after the patch; it stays "
                    "off inside the replaced function",
                    "trace another function if you need the event while the patch is loaded",
                ),
            )
            return True
        self._refuse_late(
            "late-module-key" if name == "__jump_table" else "late-module-alternative", owner, late[0]
        )
        return True

    def _late_call(self, unit: UnitPatch, owner: Part, entry: Entry) -> bool:
        """Whether a call leads into a module that may come later.

        Call depth tracking leads calls to the accounting in front of the function while the module is loaded
        (arch/x86/kernel/callthunks.c, patch_call). Such a call has no target yet: the kernel would look in
        the wrong place, and warn. Left out, the call is not counted.
        """
        new = unit.selection.diff.new
        place = owner.start + entry.owner_offset + 1  # behind the opcode E8
        section = new.section_of(owner)
        linker = Linker(unit.selection.diff)
        return any(
            reloc.offset == place and self._is_late(unit, linker.of_code(owner, section, reloc))
            for reloc in new.relocs(owner)
        )

    # -- descriptors ------------------------------------------------------------------

    def _objects(self) -> dict[str, ObjectEntry]:
        """The rows of every object that the patch changes."""
        objects: dict[str, ObjectEntry] = {}
        for number, unit in enumerate(self.units):
            if unit.owner != VMLINUX and unit.selection.included:
                # Also one that brings something new alone: its relocations are applied with its object.
                objects.setdefault(unit.owner, ObjectEntry())
            for row in unit.selection.changed:
                part = unit.selection.diff.old.parts[row.original]
                replacement = self.parts[number, row.key][1]
                entry = objects.setdefault(unit.owner, ObjectEntry())
                entry.funcs.append(FuncEntry(part.name, unit.sympos[row.original], replacement))
            for kind, key in unit.selection.callbacks:
                entry = objects.setdefault(unit.owner, ObjectEntry())
                if kind in entry.callbacks:
                    self.refusals.append(second_callback(unit.owner, kind, entry.callbacks[kind].name, key))
                entry.callbacks[kind] = self.parts[number, key][1]
        return objects
