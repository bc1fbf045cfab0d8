"""Every rule that a finished module must pass, for ``kmend check`` and at the end of each build.

The rules read the module's bytes anew and know nothing of how it was made: a mistake of the
assembler is found here. Each refusal names the rule and the kernel code that would object.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

from kmend.core.errors import Refusal, UsageError
from kmend.core.target import VMLINUX
from kmend.diff.special import ORC, ORC_IP
from kmend.diff.unit import UnitObject
from kmend.elf.model import (
    SHF_ALLOC,
    SHF_RELA_LIVEPATCH,
    SHN_LIVEPATCH,
    SHN_UNDEF,
    SHT_RELA,
    STT_FUNC,
    ElfFile,
    Section,
)
from kmend.elf.x86_64 import ROWS
from kmend.module.describe import KLP_RELA, KLP_SYMBOL, Description, describe
from kmend.module.layout import Layout, modinfo
from kmend.verify.symbols import (
    ExportTable,
    KernelSymbols,
    in_vmlinux_init,
    module_init,
    module_places,
    module_position,
)

#: Tables that the kernel works through while it loads the module, before any other module is known.
EARLY = (
    "__jump_table",
    ".static_call_sites",
    ".altinstructions",
    ".altinstr_replacement",
    ".parainstructions",
)

#: CONFIG_FUNCTION_PADDING_BYTES on x86-64 (arch/x86/Kconfig).
PADDING_BYTES = 16


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What the rules need to know of the target.

    ``traceable`` says whether ftrace has an entry for the symbol at that place of the object (an address
    in vmlinux, a symbol index in a module). ``module`` is None-able: a module that the target lacks.
    """

    release: str
    vermagic: str
    layout: Layout
    exports: ExportTable
    symbols: KernelSymbols
    module: Callable[[str], UnitObject | None]
    traceable: Callable[[str, int], bool]


@dataclass(frozen=True, slots=True)
class Checked:
    """The outcome: what the module is, every objection, and how many things were looked at.

    ``warnings`` name what could not be looked at.
    """

    description: Description
    refusals: tuple[Refusal, ...]
    checked: dict[str, int]
    warnings: tuple[Refusal, ...] = ()


def check(elf: ElfFile, facts: TargetFacts, name: str = "the module") -> Checked:
    """Hold a module against a target.

    Raises:
        UsageError: it is no livepatch module at all.
    """
    description = describe(elf, facts.layout, name)
    checker = _Checker(elf, facts, description)
    return Checked(description, tuple(checker.run()), checker.counts, tuple(checker.warnings))


def check_ordinary(elf: ElfFile, facts: TargetFacts, name: str = "the module") -> Checked:
    """Hold a module that is no livepatch against a target: what is asked of every module.

    Raises:
        UsageError: it is no module.
    """
    info = tuple(modinfo(elf))
    values = dict(info)
    if elf.section(".gnu.linkonce.this_module") is None:
        raise UsageError(f"{name} is no kernel module", rule="not-a-module")
    description = Description(values.get("name", ""), values.get("vermagic", ""), info, None, None, None)
    checker = _Checker(elf, facts, description)
    return Checked(description, tuple(checker.run()), checker.counts, tuple(checker.warnings))


class _Checker:
    def __init__(self, elf: ElfFile, facts: TargetFacts, description: Description) -> None:
        self.elf, self.facts, self.description = elf, facts, description
        self.counts: dict[str, int] = {}
        self.warnings: list[Refusal] = []

    def _count(self, what: str, number: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + number

    def run(self) -> Iterator[Refusal]:
        yield from self._vermagic()
        yield from self._sections()
        yield from self._versions()
        yield from self._relocations()
        yield from self._klp_sections()
        yield from self._klp_symbols()
        yield from self._functions()
        yield from self._unwind()

    def _vermagic(self) -> Iterator[Refusal]:
        """kernel/module/main.c, check_modinfo."""
        self._count("vermagic")
        if self.description.vermagic != self.facts.vermagic:
            yield Refusal(
                "vermagic",
                self.description.vermagic.strip() or "no vermagic",
                f"the target's modules say {self.facts.vermagic.strip()!r}",
                f"build the patch for {self.facts.release}",
            )
        license_ = dict(self.description.info).get("license", "")
        if not license_.startswith("GPL"):
            yield Refusal(
                "license",
                license_ or "no licence",
                "klp_enable_patch() is exported to GPL modules only",
                "declare a GPL-compatible licence",
            )

    def _sections(self) -> Iterator[Refusal]:
        """One name, one section: the kernel makes a sysfs file of each (kernel/module/sysfs.c)."""
        seen: set[str] = set()
        for section in self.elf.sections[1:]:
            if not section.flags & SHF_ALLOC or section.type == SHT_RELA:
                continue
            self._count("sections")
            if section.name in seen:
                yield Refusal("duplicate-section", section.name, "it is there twice", "report the module")
            seen.add(section.name)

    def _versions(self) -> Iterator[Refusal]:
        """kernel/module/version.c, check_version: a CRC for each symbol, and the right one."""
        table = self.elf.section("__versions")
        lay = self.facts.layout
        rows: dict[str, int] = {}
        for at in range(0, len(table.data) if table else 0, lay.version_size):
            row = table.data[at : at + lay.version_size] if table else b""
            rows[row[lay.version_name :].partition(b"\0")[0].decode(errors="replace")] = int.from_bytes(
                row[:8], "little"
            )
        wanted = [s.name for s in self.elf.symbols if s.section == SHN_UNDEF and s.name]
        # modules that must be there before this one is loaded; kmend builds none that needs any
        depends = dict(self.description.info).get("depends", "").replace("-", "_").split(",")
        for name in ["module_layout", *wanted]:
            self._count("exports")
            export = self.facts.exports.get(name)
            if export is None or export.owner not in (VMLINUX, *depends):
                yield Refusal(
                    "not-exported",
                    name,
                    "the module needs it as an ordinary symbol, but neither the kernel image nor a module "
                    "that it depends on exports it",
                    "build the patch anew for this kernel",
                )
            elif rows.get(name) != export.crc:
                yield Refusal(
                    "symbol-version",
                    name,
                    f"the module has the CRC {rows.get(name, 0):#010x}, the kernel {export.crc:#010x}",
                    "build the patch anew for this kernel",
                )

    def _relocations(self) -> Iterator[Refusal]:
        """arch/x86/kernel/module.c: known types, inside the section, onto zeros."""
        for section in self.elf.sections:
            for reloc in section.relocs:
                self._count("relocations")
                kind = ROWS.get(reloc.type)
                if kind is None or reloc.offset + kind.size > section.size:
                    yield Refusal(
                        "relocation-type",
                        f"{section.name}+{reloc.offset:#x}",
                        f"type {reloc.type} is unknown to the module loader, or outside of the section",
                        "report the module",
                    )
                elif any(section.data[reloc.offset : reloc.offset + kind.size]):
                    yield Refusal(
                        "relocation-field",
                        f"{section.name}+{reloc.offset:#x}",
                        "the loader refuses a field that is not zero (x86: Invalid relocation target)",
                        "report the module",
                    )

    def _relas(self) -> Iterator[tuple[Section, Section]]:
        for rela in self.elf.sections:
            if rela.type == SHT_RELA and 0 < rela.info < len(self.elf.sections):
                yield rela, self.elf.sections[rela.info]

    def _klp_sections(self) -> Iterator[Refusal]:
        """kernel/livepatch/core.c, klp_resolve_symbols and klp_apply_section_relocs."""
        # The relocations of vmlinux are applied while the module is loaded, those of another object when
        # that object is patched (klp_init_object_loaded).
        objects = {VMLINUX, *(row.name for row in self.description.objects or ())}
        for rela, target in self._relas():
            named = KLP_RELA.match(rela.name)
            marked = bool(rela.flags & SHF_RELA_LIVEPATCH)
            rows = [
                self.elf.symbols[int.from_bytes(rela.data[at + 12 : at + 16], "little")]
                for at in range(0, len(rela.data), 24)
            ]
            livepatch = [s for s in rows if s.section == SHN_LIVEPATCH]
            if not marked and not named:
                if livepatch:
                    yield self._bad_rela(rela, f"it names {livepatch[0].name} but is no livepatch section")
                continue
            self._count("livepatch relocations", len(rows))
            if not marked or named is None or named[2] != target.name or not rela.flags & SHF_ALLOC:
                yield self._bad_rela(rela, f"its name or flags do not fit the section {target.name}")
                continue
            if len(livepatch) != len(rows):
                yield self._bad_rela(rela, "it names an ordinary symbol")
            obj = named[1]
            if obj not in objects:
                yield self._bad_rela(
                    rela, f"the patch changes nothing in {obj}, so the kernel would never apply it"
                )
            if obj != VMLINUX and target.name in EARLY:
                yield self._bad_rela(
                    rela, f"{target.name} is used while the patch is loaded, when {obj} may be absent"
                )
            for symbol in livepatch:
                parts = KLP_SYMBOL.match(symbol.name)
                if parts and parts[1] == VMLINUX and obj != VMLINUX:
                    yield self._bad_rela(
                        rela, f"a section of {obj} may not name {symbol.name}: the kernel refuses it"
                    )

    @staticmethod
    def _bad_rela(rela: Section, why: str) -> Refusal:
        return Refusal("klp-relocation", rela.name, why, "report the module")

    def _places(self, obj: str, name: str) -> list[int] | None:
        """All places of a name in an object, in ``sympos`` order; None when the target lacks the object."""
        if obj == VMLINUX:
            return [s.address for s in self.facts.symbols.named(name)]
        module = self.facts.module(obj)
        return None if module is None else module_places(module, name)

    def _at_sympos(self, obj: str, name: str, sympos: int) -> tuple[int | None, str]:
        """The place meant, or why there is none (klp_find_object_symbol)."""
        places = self._places(obj, name)
        if places is None:
            return None, f"the kernel has no module {obj}"
        if not places:
            return None, f"{obj} has no symbol of this name"
        if sympos == 0 and len(places) > 1:
            return None, f"{obj} has {len(places)} symbols of this name and sympos is 0"
        if sympos > len(places):
            return None, f"{obj} has only {len(places)} symbols of this name, sympos is {sympos}"
        place = places[max(sympos, 1) - 1]
        if obj == VMLINUX:
            if in_vmlinux_init(self.facts.symbols, place):
                return None, "it stands in init memory, which is gone"
            return place, ""
        module = self.facts.module(obj)
        # of a name that there is once, the kernel takes 1 as well as 0
        position = None if module is None else module_position(module, name, place)
        if module is not None and (
            module_init(module, place) or position is None or max(position, 1) != max(sympos, 1)
        ):
            return None, f"its position is another one once {obj} has given its init memory back"
        return place, ""

    def _foreign(self, obj: str) -> bool:
        """Whether the patch changes a module that is not one of the target's.

        The kernel looks its symbols up when it is there, and refuses then (klp_init_object_loaded);
        the running kernel's are looked up before a load.
        """
        named = any(row.name == obj for row in self.description.objects or ())
        return obj != VMLINUX and named and self.facts.module(obj) is None

    def _klp_symbols(self) -> Iterator[Refusal]:
        for symbol in self.elf.symbols:
            if symbol.section != SHN_LIVEPATCH:
                continue
            self._count("livepatch symbols")
            parts = KLP_SYMBOL.match(symbol.name)
            if parts is None:
                yield Refusal(
                    "klp-symbol",
                    symbol.name,
                    "it is not of the form .klp.sym.OBJ.NAME,POS",
                    "report the module",
                )
                continue
            if self._foreign(parts[1]):
                continue  # _functions() warns that nothing can be told of that object
            _, why = self._at_sympos(parts[1], parts[2], int(parts[3]))
            if why:
                yield Refusal("klp-symbol", parts[2], why, "build the patch anew for this kernel")

    def _functions(self) -> Iterator[Refusal]:
        objects = self.description.objects
        if objects is None:
            return
        if not objects:
            yield Refusal("no-functions", self.description.name, "it replaces nothing", "report the module")
        own = {s.name for s in self.elf.symbols if s.type == STT_FUNC and s.defined}
        for obj in objects:
            seen: set[int] = set()
            if self._foreign(obj.name):
                self.warnings.append(
                    Refusal(
                        "unknown-object",
                        obj.name,
                        "the target has no such module: whether it has what is replaced and used is unknown",
                        "if it is no module of the kernel's own, try the patch together with it",
                    )
                )
                continue
            for func in obj.funcs:
                self._count("functions")
                place, why = self._at_sympos(obj.name, func.old_name, func.sympos)
                if place is None:
                    yield Refusal("old-function", func.old_name, why, "build the patch anew for this kernel")
                    continue
                if place in seen:
                    yield Refusal(
                        "old-function", func.old_name, "it is listed twice", "list each function once"
                    )
                seen.add(place)
                if not self.facts.traceable(obj.name, place):
                    yield Refusal(
                        "no-ftrace-entry",
                        func.old_name,
                        f"the target's {obj.name} has no ftrace entry for it: loading would fail with EINVAL",
                        "patch a traceable caller instead",
                    )
                if func.new_func not in own:
                    yield Refusal(
                        "new-function",
                        func.old_name,
                        f"{func.new_func} is no function of the module",
                        "report it",
                    )

    def _unwind(self) -> Iterator[Refusal]:
        """Every function needs ORC data, else its tasks' stacks are unreliable and no transition ends.

        What counts is the last entry at or before the function (arch/x86/kernel/unwind_orc.c, orc_find):
        objtool leaves out an entry that says the same as the one before. Zeros mark the end of code.
        """
        orc = self.elf.section(ORC)
        places: dict[int, list[tuple[int, bool]]] = {}
        for section in self.elf.sections:
            if section.name != ORC_IP or orc is None or not section.relocs:
                continue
            size = orc.size // max(1, section.size // 4)
            for reloc in section.relocs:
                symbol = self.elf.symbols[reloc.symbol]
                entry = orc.data[reloc.offset // 4 * size :][:size]
                row = (symbol.value + reloc.addend, any(entry))
                places.setdefault(symbol.section, []).append(row)
        for rows in places.values():
            rows.sort()
        for symbol in self.elf.symbols:
            if symbol.type != STT_FUNC or not symbol.defined or symbol.size == 0:
                continue
            self._count("unwind")
            rows = places.get(symbol.section, [])
            at = bisect_right(rows, (symbol.value, True)) - 1
            if at < 0 or not rows[at][1]:
                yield Refusal(
                    "no-unwind-data",
                    symbol.name,
                    "no ORC entry is about it: the kernel could not read the stacks of tasks inside it",
                    "report the module",
                )


def mcount_sites(module: UnitObject) -> frozenset[int]:
    """Symbol indices of a module's functions that ``__mcount_loc`` lists (with or without ENDBR before)."""
    sites: set[tuple[int, int]] = set()
    for section in module.elf.sections:
        if section.name == "__mcount_loc":
            for reloc in section.relocs:
                symbol = module.elf.symbols[reloc.symbol]
                sites.add((symbol.section, symbol.value + reloc.addend))
    return frozenset(
        s.index
        for s in module.elf.symbols
        if s.type == STT_FUNC and s.defined and _near(sites, s.section, s.value)
    )


def _near(sites: Container[tuple[int, int]], section: int, value: int) -> bool:
    """``call __fentry__`` is a function's first instruction, or follows a 4-byte ENDBR64 (ftrace.c)."""
    return (section, value) in sites or (section, value + 4) in sites
