"""Objects that somebody wrote by hand to a module: whole, as modpost and ld would join them.

Where :mod:`kmend.module.assemble` picks parts, here every loaded section goes in. What is added is what a
module needs and C cannot say: ``__this_module``, vermagic and versions (scripts/mod/modpost.c), livepatch
symbols in place of ordinary ones that vmlinux does not export, and, unless the code has a ``module_init`` of
its own, the descriptors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from kmend.core.errors import Failed, Refusal, Refused
from kmend.core.target import VMLINUX
from kmend.diff.declared import is_declaration
from kmend.elf.model import SHN_COMMON, SHN_UNDEF, STT_FILE, STT_FUNC, STT_SECTION, ElfFile, Reloc, Symbol
from kmend.elf.reader import slice_relocs
from kmend.elf.writer import OutSymbol
from kmend.module.descriptor import ObjectSpec
from kmend.module.layout import Layout, modinfo
from kmend.module.output import (
    EARLY,
    PATCH,
    Assembled,
    FuncEntry,
    ModuleSpec,
    ObjectEntry,
    Out,
    Output,
    Placed,
    bad_states,
)
from kmend.module.resolve import Livepatched, Resolution

#: What the glue or this file makes. objtool's list of ENDBR that may be sealed is made from one unit: it
#: knows nothing of the pointers in our descriptors.
_LEAVE = (".modinfo", "__versions", ".gnu.linkonce.this_module", ".ibt_endbr_seal")
#: Rows of ``.modinfo`` that are not the author's to choose.
_OURS = frozenset({"name", "depends", "vermagic", "retpoline", "intree", "srcversion", "scmversion"})
#: What ``module_init`` and ``module_exit`` define (include/linux/module.h).
INIT, EXIT = "init_module", "cleanup_module"
ENABLE = "klp_enable_patch"


@dataclass(frozen=True, slots=True)
class HandUnit:
    """A compiled file: its name for messages, and its contents."""

    name: str
    elf: ElfFile


@dataclass(frozen=True, slots=True)
class Needs:
    """What a set of objects brings and wants. ``undefined`` are names that none of them defines."""

    own_init: bool
    enables: bool
    undefined: tuple[str, ...]


def needs(units: Sequence[HandUnit]) -> Needs:
    """Look at the symbols of all objects together.

    Raises:
        Refused: ``duplicate-definition``: two of them define one global name; ``common-symbol``.
    """
    defined: dict[str, str] = {}
    wanted: dict[str, None] = {}
    refusals = []
    for unit in units:
        used = {reloc.symbol for section in unit.elf.sections if section.alloc for reloc in section.relocs}
        for symbol in unit.elf.symbols[1:]:
            if symbol.type in (STT_SECTION, STT_FILE):
                continue
            if symbol.section == SHN_COMMON:
                refusals.append(
                    Refusal(
                        "common-symbol",
                        symbol.name,
                        f"{unit.name} was compiled with -fcommon, which kernel modules are not",
                        "take the flag out of cflags",
                    )
                )
            elif symbol.section == SHN_UNDEF:
                if symbol.index in used:
                    wanted[symbol.name] = None
            elif not symbol.is_local:
                if symbol.name in defined:
                    refusals.append(
                        Refusal(
                            "duplicate-definition",
                            symbol.name,
                            f"both {defined[symbol.name]} and {unit.name} define it",
                            "make one of them static, or name it otherwise",
                        )
                    )
                defined[symbol.name] = unit.name
    if refusals:
        raise Refused(refusals)
    ours = {"__this_module", PATCH}
    undefined = tuple(name for name in wanted if name not in defined and name not in ours)
    return Needs(INIT in defined, ENABLE in wanted, undefined)


@dataclass(frozen=True, slots=True)
class HandPlan:
    """How the objects become a module.

    ``objects`` are empty for a module with its own ``module_init``; ``reach`` has every undefined name;
    ``carriers`` says, for a module whose symbols are used, which patched object must be there for them
    (klp_apply_object_relocs looks only at sections named after an object of the patch).
    """

    objects: tuple[ObjectSpec, ...]
    states: tuple[tuple[int, int], ...]
    own_init: bool
    livepatch: bool
    reach: Mapping[str, Resolution]
    carriers: Mapping[str, str]


def link(
    spec: ModuleSpec,
    units: Sequence[HandUnit],
    plan: HandPlan,
    glue: ElfFile,
    layout: Layout,
    crcs: Mapping[str, int],
) -> Assembled:
    """Build the module; ``glue`` is the one for a module with (or without) its own ``module_init``.

    Raises:
        Refused: (``new-func-missing``) a function that the descriptor names is not there;
            (``late-module-key``, ``late-module-alternative``) something is needed while the module is
            loaded that only a module has which may come later; (``hand-export``, ``bad-state``).
        Failed: an internal inconsistency.
    """
    return _Linker(spec, units, plan, glue, layout, crcs).run()


class _Linker(Output):
    def __init__(
        self,
        spec: ModuleSpec,
        units: Sequence[HandUnit],
        plan: HandPlan,
        glue: ElfFile,
        layout: Layout,
        crcs: Mapping[str, int],
    ) -> None:
        super().__init__(spec, glue, layout, crcs)
        self.units: Sequence[HandUnit] = units
        self.plan = plan
        self.globals: dict[str, OutSymbol] = {}
        #: functions by name, for the descriptor: static ones too where the name is there once
        self.functions: dict[str, list[OutSymbol]] = {}
        self.refusals: dict[tuple[str, str], Refusal] = {}
        self.warnings: dict[str, Refusal] = {}

    def refuse(self, rule: str, what: str, why: str, next_step: str) -> None:
        self.refusals.setdefault((rule, what), Refusal(rule, what, why, next_step))

    def run(self) -> Assembled:
        self.units = [HandUnit(unit.name, self._without_late(unit.elf)) for unit in self.units]
        placed = [self._unit(unit) for unit in self.units]
        glue = self._place_glue()
        objects = self._objects()
        for refusal in bad_states(self.plan.states):
            self.refuse(refusal.rule, refusal.what, refusal.why, refusal.next_step)
        for unit, rows in zip(self.units, placed, strict=True):
            self._check_altered(unit, rows)
            self._join(rows, self._from_outside)
        if self.refusals:
            raise Refused(list(self.refusals.values()))
        if not self.plan.own_init:
            self._descriptors(objects, self.plan.states)
        self._join(glue, self._for_glue)
        self._information(self._modinfo())
        self._versions()
        return Assembled(self._bytes(), tuple(self.warnings.values()))

    def _is_late(self, symbol: Symbol) -> bool:
        """Whether the symbol is one of a module, which may be loaded after us."""
        resolution = self.plan.reach.get(symbol.name) if symbol.section == SHN_UNDEF else None
        return isinstance(resolution, Livepatched) and resolution.obj != VMLINUX

    def _without_late(self, elf: ElfFile) -> ElfFile:
        """The object without those entries of tables that may be left out when they need a later module.

        A static call goes on through its trampoline, which static_call_update() keeps right (kernel/
        static_call_inline.c). A tracepoint without its entry in ``__jump_table`` stays off.
        """
        sections = list(elf.sections)
        lay = self.layout
        sizes = {"__jump_table": lay.jump_table, ".static_call_sites": lay.static_call_site}
        for index, section in enumerate(sections):
            entry = sizes.get(section.name)
            if entry is None:
                continue
            kept: list[tuple[int, tuple[Reloc, ...]]] = []
            for at in range(0, section.size, entry):
                rows = slice_relocs(section.relocs, at, at + entry)
                late = [s for r in rows[1:] if self._is_late(s := elf.symbols[r.symbol])]
                if late and section.name == "__jump_table":
                    name = late[0].name.removeprefix("__tracepoint_")
                    if name == late[0].name:
                        late = []  # any other key: refused when its relocation is made
                    else:
                        self._silent(name)
                if not late:
                    kept.append((at, rows))
            sections[index] = replace(
                section,
                data=b"".join(section.data[at : at + entry] for at, _ in kept),
                size=entry * len(kept),
                relocs=tuple(
                    Reloc(r.offset - at + number * entry, r.type, r.symbol, r.addend)
                    for number, (at, rows) in enumerate(kept)
                    for r in rows
                ),
            )
        return replace(elf, sections=tuple(sections))

    def _silent(self, name: str) -> None:
        self.warnings.setdefault(
            name,
            Refusal(
                "tracepoint-silent",
                name,
                "the tracepoint belongs to a module that may be loaded after the patch; it stays off in the "
                "code of the patch",
                "trace another function if you need the event while the patch is loaded",
            ),
        )

    def _unit(self, unit: HandUnit) -> Placed:
        names = {section.name for section in unit.elf.sections}
        for name in sorted(names):
            if name.startswith(("___ksymtab", "__ksymtab", "___kcrctab", "__kcrctab", ".export_symbol")):
                self.refuse(
                    "hand-export",
                    unit.name,
                    f"it exports symbols (section {name}); a livepatch that others depend on cannot go again",
                    "take EXPORT_SYMBOL out",
                )
        placed = self._place(unit.elf, {*_LEAVE, *filter(is_declaration, names)})
        for symbol in unit.elf.symbols:
            out = placed.symbols.get(symbol.index)
            if out is None or not symbol.name:
                continue
            if not symbol.is_local:
                self.globals[symbol.name] = out
            if symbol.type == STT_FUNC:
                self.functions.setdefault(symbol.name, []).append(out)
        return placed

    def _objects(self) -> dict[str, ObjectEntry]:
        objects: dict[str, ObjectEntry] = {}
        for spec in self.plan.objects:
            entry = objects.setdefault(spec.name, ObjectEntry())
            for func in spec.funcs:
                if (new := self._function(func.new_func, f"to replace {func.old_name}")) is not None:
                    entry.funcs.append(FuncEntry(func.old_name, func.sympos, new))
            for kind, name in spec.callbacks:
                if (new := self._function(name, f"as {kind.words} callback of {spec.name}")) is not None:
                    entry.callbacks[kind] = new
        return objects

    def _function(self, name: str, what_for: str) -> OutSymbol | None:
        if name in self.globals and name in self.functions:
            return self.globals[name]
        found = self.functions.get(name, [])
        if len(found) == 1:
            return found[0]
        self.refuse(
            "new-func-missing",
            name,
            f"the descriptor names it {what_for}, but "
            + (
                "several files have a static function of that name"
                if found
                else "no file defines such a function (the compiler drops a static one that nothing uses)"
            ),
            "define it, and not as static",
        )
        return None

    # -- relocations ---------------------------------------------------------------------

    def _from_outside(self, symbol: Symbol, out: Out) -> tuple[OutSymbol, str | None] | None:
        """The output symbol for an undefined one of the author's objects."""
        if symbol.name == PATCH and not self.plan.own_init:
            return self.patch, None
        if symbol.name == "__this_module":
            return self._this_module(), None
        if symbol.name in self.globals:
            return self.globals[symbol.name], None
        resolution = self.plan.reach.get(symbol.name)
        if resolution is None:
            raise Failed(f"nobody has resolved {symbol.name}", rule="internal")
        found, obj = self._reach(resolution)
        if obj is None or obj == VMLINUX:
            return found, obj
        if out.name in EARLY or out.name == ".altinstr_replacement":
            self._late(
                "late-module-key" if out.name == "__jump_table" else "late-module-alternative", symbol.name
            )
        return found, self.plan.carriers[obj]

    def _late(self, rule: str, name: str) -> None:
        self.refuse(
            rule,
            name,
            "it is needed while the module is loaded, but belongs to a module that may be loaded later",
            "do without the static key or alternative there",
        )

    def _check_altered(self, unit: HandUnit, placed: Placed) -> None:
        """Refuse late relocations inside code that the kernel rewrites while it loads the module."""
        stretches = list(_altered(unit.elf, self.layout.alt_instr))
        for index in placed.where:
            spots = [(low, high) for section, low, high in stretches if section == index]
            for reloc in unit.elf.sections[index].relocs if spots else ():
                name = unit.elf.symbols[reloc.symbol].name
                resolution = self.plan.reach.get(name)
                obj = getattr(resolution, "obj", VMLINUX)
                if obj != VMLINUX and any(low <= reloc.offset < high for low, high in spots):
                    self._late("late-module-alternative", name)

    def _for_glue(self, symbol: Symbol, out: Out) -> tuple[OutSymbol, str | None] | None:
        if symbol.name in (INIT, EXIT) and self.plan.own_init:
            own = self.globals.get(symbol.name)
            return None if own is None else (own, None)  # struct module may have neither
        return self._from_glue(symbol, out)

    # -- what the module says of itself ----------------------------------------------------

    def _modinfo(self) -> list[tuple[str, str]]:
        rows = [row for unit in self.units for row in modinfo(unit.elf) if row[0] not in _OURS]
        keys = {key for key, _ in rows}
        if self.plan.livepatch and "livepatch" not in keys:
            rows.insert(0, ("livepatch", "Y"))
        if "license" not in keys and not self.plan.own_init:
            rows.append(("license", "GPL"))
        namespaces = {value for key, value in rows if key == "import_ns"}
        self.namespaces -= namespaces
        return rows


def _altered(elf: ElfFile, size: int) -> Iterator[tuple[int, int, int]]:
    """Section and stretch of code of every alternative and paravirt site.

    ``struct alt_instr`` begins with the place and ends with ``u8 instrlen, replacementlen``; ``struct
    paravirt_patch_site`` is ``u8 *instr; u8 type, len`` in 16 bytes (arch/x86/include/asm).
    """
    for name, entry, length_at in ((".altinstructions", size, size - 2), (".parainstructions", 16, 9)):
        section = elf.section(name)
        if section is None:
            continue
        firsts = {reloc.offset: reloc for reloc in section.relocs}
        for at in range(0, section.size - entry + 1, entry):
            reloc = firsts.get(at)
            if reloc is not None:
                symbol = elf.symbols[reloc.symbol]
                start = symbol.value + reloc.addend
                yield symbol.section, start, start + section.data[at + length_at]
