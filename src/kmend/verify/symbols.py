"""Which symbol of the running kernel is meant: exports, objects, ``sympos``.

``sympos`` is the position among the symbols of one name in the order in which the kernel
walks the object's kallsyms, from 1; 0 says that there is only one
(kernel/livepatch/core.c, klp_find_object_symbol). For vmlinux that is the order of
kallsyms, for a module the order of its symbol table (kernel/module/kallsyms.c,
add_kallsyms keeps it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from kmend.core.errors import Refusal
from kmend.core.target import VMLINUX
from kmend.diff.select import Selection, is_init
from kmend.diff.special import SpecialSections
from kmend.diff.twins import section_class
from kmend.diff.unit import Part, PartKind, RefKind, UnitObject
from kmend.elf.model import STB_LOCAL, STT_FILE, STT_SECTION
from kmend.module.resolve import Exported, Livepatched, Resolution, Shared
from kmend.verify.provenance import (
    Binary,
    Findings,
    Mismatch,
    ModuleBinary,
    SymbolTableLike,
    VmlinuxBinary,
)


class ExportRow(Protocol):
    """A row of Module.symvers."""

    @property
    def name(self) -> str: ...
    @property
    def crc(self) -> int: ...
    @property
    def owner(self) -> str: ...
    @property
    def namespace(self) -> str: ...


class ExportTable(Protocol):
    def get(self, name: str) -> ExportRow | None: ...


class TypedSymbol(Protocol):
    @property
    def address(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...


class KernelSymbols(SymbolTableLike, Protocol):
    def named(self, name: str) -> tuple[TypedSymbol, ...]: ...


@dataclass(frozen=True, slots=True)
class World:
    """What the target consists of: ``module`` parses one, ``dependencies`` are all that it needs."""

    symbols: KernelSymbols
    vmlinux: VmlinuxBinary
    exports: ExportTable
    module: Callable[[str], UnitObject]
    dependencies: Callable[[str], tuple[str, ...]]

    def in_reach(self, owner: str) -> tuple[str, ...]:
        """The objects whose global symbols an object's code can mean, nearest first.

        The kernel links a module against itself, vmlinux, and the modules that are loaded before it.
        """
        return (owner,) if owner == VMLINUX else (owner, VMLINUX, *self.dependencies(owner))

    def in_init(self, address: int) -> bool:
        """Whether an address of vmlinux lies in memory that is given back after the start."""
        return in_vmlinux_init(self.symbols, address)


@dataclass(slots=True)
class Proof:
    """The outcome of :func:`prove` for one unit."""

    outer: dict[str, Resolution] = field(default_factory=dict)
    externs: dict[str, Resolution] = field(default_factory=dict)
    sympos: dict[str, int] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    functions: int = 0
    identical: int = 0
    compared_bytes: int = 0
    masked_bytes: int = 0
    #: functions whose code differs from the target's in bytes, by key: worth a second look without
    #: -ffunction-sections, which lets the assembler choose shorter jumps
    mismatches: dict[str, Mismatch] = field(default_factory=dict)


class Prover:
    """Proves one unit against the target."""

    def __init__(self, world: World, owner: str, old: UnitObject, special: SpecialSections) -> None:
        self.world, self.owner, self.old, self.special = world, owner, old, special
        self.binary: Binary = world.vmlinux if owner == VMLINUX else ModuleBinary(world.module(owner), owner)
        self.proof = Proof()
        #: key of an original part -> its one place in the target
        self.known: dict[str, int] = {}
        self._tried: dict[str, Mismatch | None] = {}
        self.promoted: dict[str, Callable[[], Resolution | None]] = {}
        self.elsewhere: dict[str, str] = {}

    def prove(
        self,
        selection: Selection,
        shared: frozenset[str] = frozenset(),
        promoted: Mapping[str, Callable[[], Resolution | None]] | None = None,
        elsewhere: Mapping[str, str] | None = None,
    ) -> Proof:
        """Compare what is replaced, and find everything that the module reaches.

        ``shared`` are new global symbols that another unit of the patch brings along for the same object.
        ``promoted`` are functions and variables of other units in reach that the patch makes global:
        each with how to reach what the running kernel has as a static one. ``elsewhere`` are new global
        symbols that units of other objects in reach (:meth:`World.in_reach`) bring along: name and object.
        """
        self.promoted = dict(promoted or {})
        self.elsewhere = dict(elsewhere or {})
        for row in selection.changed:
            part = self.old.parts[row.original]
            if is_init(self.old.section_of(part)):
                continue  # refused when it was selected
            self.proof.functions += 1
            mismatch = self.function(part)
            if mismatch is None:
                self.proof.identical += 1
                self.proof.sympos[part.key] = self.sympos(part, self.known[part.key])
        for key in selection.outer:
            self._outer(self.old.parts[key])
        for name in selection.externs:
            if name not in shared:
                self._extern(name)
        self._defined_elsewhere(selection)
        return self.proof

    # -- functions ---------------------------------------------------------------

    def function(self, part: Part) -> Mismatch | None:
        """Find the function's place in the target; a failure is recorded as a refusal once.

        Every candidate of that name is compared. One match is the answer; several are
        narrowed by what proved neighbours refer to and by where they lie.
        """
        if part.key in self._tried:
            return self._tried[part.key]
        mismatch = self._tried[part.key] = self._function(part)
        if mismatch is not None:
            self.proof.mismatches[part.key] = mismatch
        return mismatch

    def _function(self, part: Part) -> Mismatch | None:
        places = self.binary.places(part)
        if not places:
            return Mismatch(
                part.name,
                0,
                part.name,
                "nothing of that name",
                f"{self.owner} has no symbol {part.name}",
            )
        matches: list[tuple[int, Findings]] = []
        first: Mismatch | None = None
        for place in places:
            findings = Findings()
            mismatch = self.binary.compare(self.old, self.special, part, place, findings)
            if mismatch is None:
                matches.append((place, findings))
            elif first is None or mismatch.offset > first.offset:
                first = mismatch
        if not matches:
            return first
        if len(matches) > 1:
            known = self.known.get(part.key) or self._witness(part)
            if known is not None:
                matches = [m for m in matches if m[0] == known]
            else:
                matches = self._between_neighbours(part, matches)
            if len(matches) != 1:
                self._ambiguous(part.name, len(places))
                return Mismatch(part.name, 0, part.name, part.name, "several functions match equally well")
        place, findings = matches[0]
        self.known[part.key] = place
        self.proof.compared_bytes += findings.compared
        self.proof.masked_bytes += findings.masked
        for key, seen in findings.parts.items():
            if len(seen) == 1:
                self.known.setdefault(key, next(iter(seen)))
        return None

    def _witness(self, part: Part) -> int | None:
        """The place of a part as a proved function with a unique name refers to it."""
        for function in self.old.functions():
            if function.key == part.key or is_init(self.old.section_of(function)):
                continue
            section = self.old.section_of(function)
            refers = any(
                (ref := self.old.ref(section, reloc)).kind is RefKind.PART and ref.name == part.key
                for reloc in self.old.relocs(function)
            )
            if refers and len(self.binary.places(function)) == 1:
                findings = Findings()
                place = self.binary.places(function)[0]
                if self.binary.compare(self.old, self.special, function, place, findings) is None:
                    seen = findings.parts.get(part.key, set())
                    if len(seen) == 1:
                        return next(iter(seen))
        return None

    def _between_neighbours(
        self, part: Part, matches: list[tuple[int, Findings]]
    ) -> list[tuple[int, Findings]]:
        """Those matches that lie where the unit lies: the linker puts a unit's code in one piece.

        The piece is bounded by the unit's functions of the same section (without what
        ``-ffunction-sections`` adds to its name) that have a unique name in the object and are proved.
        """
        places = []
        here = section_class(self.old, part)
        for other in self.old.functions():
            candidates = self.binary.places(other)
            if other.key == part.key or len(candidates) != 1 or section_class(self.old, other) != here:
                continue
            if self.binary.compare(self.old, self.special, other, candidates[0], Findings()) is None:
                places.append(self.binary.position(candidates[0]))
        if len(places) < 2:
            return matches
        low, high = min(places), max(places)
        return [m for m in matches if low < self.binary.position(m[0]) < high]

    # -- names ---------------------------------------------------------------------

    def sympos(self, part: Part, place: int) -> int:
        """0 when the name is unique in the object, else the position of ``place`` from 1.

        Where none holds both while the object is loaded and afterwards, a refusal is recorded.
        """
        return self._position(part.name, place) or 0

    def _all_places(self, name: str) -> list[int]:
        """Every symbol of the name that the kernel would count, in its order."""
        if isinstance(self.binary, ModuleBinary):
            return module_places(self.binary.module, name)
        return [s.address for s in self.world.symbols.named(name)]

    def _ambiguous(self, name: str, count: int) -> None:
        self._refuse(
            "ambiguous-symbol",
            name,
            f"{self.owner} has {count} symbols of this name and nothing tells which one the unit means",
            "leave the change to the next reboot, or report the unit",
        )

    def _refuse(self, rule: str, what: str, why: str, next_step: str) -> None:
        row = Refusal(rule, what, why, next_step)
        if row not in self.proof.refusals:
            self.proof.refusals.append(row)

    def _missing(self, name: str) -> None:
        self._refuse(
            "symbol-missing",
            name,
            f"patched code of {self.owner} needs it, but neither the kernel nor a module that {self.owner} "
            "depends on has it",
            "check that the patch belongs to this kernel version",
        )

    def _defined_elsewhere(self, selection: Selection) -> None:
        """A new global function or variable whose name another unit of the object has already.

        A strong definition takes the place of a weak one, or the patch moves it between files: in both cases
        the code outside of this unit would go on with what the running kernel has.
        """
        diff = selection.diff
        for key in (*diff.new_functions, *diff.new_data):
            part = diff.new.parts[key]
            if part.local or part.name in self.old.parts or part.name in self.old.aliases:
                continue
            if self._globals(part.name):
                self._refuse(
                    "defined-elsewhere",
                    part.name,
                    f"the patch defines it in this unit, but {self.owner} has it from another one already: "
                    "unpatched code would go on using that",
                    "change the function where it is defined now",
                )

    def _globals(self, name: str) -> list[int]:
        """The places of global (or weak) symbols of that name in the object."""
        if isinstance(self.binary, ModuleBinary):
            return module_places(self.binary.module, name, only_global=True)
        return [s.address for s in self.world.symbols.named(name) if is_global(s)]

    def _position(self, name: str, place: int, module: UnitObject | None = None) -> int | None:
        """``sympos`` of a symbol, by address in vmlinux and by index in a module; None: refused, and why."""
        if module is None and not isinstance(self.binary, ModuleBinary):
            if self.world.in_init(place):
                self._gone(name)
                return None
            places = [s.address for s in self.world.symbols.named(name)]
            return 0 if len(places) == 1 else places.index(place) + 1
        if module is None:
            assert isinstance(self.binary, ModuleBinary)
            module = self.binary.module
        if module_init(module, place):
            self._gone(name)
            return None
        position = module_position(module, name, place)
        if position is None:
            self._ambiguous(name, len(module_places(module, name)))
        return position

    def _gone(self, name: str) -> None:
        self._refuse(
            "init-reference",
            name,
            "patched code needs it, but it stands in init memory, which is gone once the kernel or the "
            "module is up",
            "leave the change to the next reboot",
        )

    def _outer(self, part: Part) -> None:
        """A function or variable of the original object that stays where it is."""
        if part.key in self.proof.outer:
            return
        export = self.world.exports.get(part.name) if not part.local else None
        if export is not None and export.owner == VMLINUX == self.owner:
            self.proof.outer[part.key] = Exported(export.name, export.crc, export.namespace)
            return
        places = self._all_places(part.name)
        if not places:
            self._missing(part.name)
            return
        found = self.known.get(part.key)
        if (
            found is None
            and len(places) > 1
            and part.kind is PartKind.FUNCTION
            and self.function(part) is None
        ):
            found = self.known.get(part.key)
        if found is None:
            found = self._witness(part)
        # A name that is there once may still be another unit's: what refers to it must agree.
        place = places[0] if found is None and len(places) == 1 else found
        if place is None or place not in places:
            self._ambiguous(part.name, len(places))
            return
        position = self._position(part.name, place)
        if position is not None:
            self.proof.outer[part.key] = Livepatched(self.owner, part.name, position)

    def reach(self, part: Part) -> Resolution | None:
        """How another unit of the object gets at a part of the original that stays where it is."""
        self._outer(part)
        return self.proof.outer.get(part.key)

    def _extern(self, name: str) -> None:
        """A symbol of another unit."""
        if isinstance(self.binary, ModuleBinary):
            own = self._globals(name)
            if own:
                position = self._position(name, own[0])
                if position is not None:
                    self.proof.externs[name] = Livepatched(self.owner, name, position)
                return
        if name in self.promoted:
            found = self.promoted[name]()
            if found is not None:
                self.proof.externs[name] = found
            return
        if name in self.elsewhere:
            self.proof.externs[name] = Shared(self.elsewhere[name], name)
            return
        export = self.world.exports.get(name)
        if export is not None and export.owner == VMLINUX:
            self.proof.externs[name] = Exported(name, export.crc, export.namespace)
            return
        if export is not None and self.owner != VMLINUX:
            self._from_module(name, export.owner)
            return
        self._from_vmlinux(name)

    def _from_module(self, name: str, provider: str) -> None:
        if provider not in self.world.dependencies(self.owner):
            self._refuse(
                "new-dependency",
                name,
                f"{provider} exports it, which {self.owner} does not depend on: it may not be loaded",
                f"load {provider} by other means and leave the change to the next reboot",
            )
            return
        module = self.world.module(provider)
        exported = module_places(module, name, only_global=True)
        if len(exported) != 1:
            self._missing(name)
            return
        position = self._position(name, exported[0], module)
        if position is not None:
            self.proof.externs[name] = Livepatched(provider, name, position)

    def _from_vmlinux(self, name: str) -> None:
        rows = self.world.symbols.named(name)
        chosen = [i for i, s in enumerate(rows) if is_global(s)]
        if not chosen:
            # A static one of another unit, even if it is the only one, is not what ``extern`` means.
            self._missing(name)
        elif len(chosen) > 1:
            self._ambiguous(name, len(rows))
        elif self.world.in_init(rows[chosen[0]].address):
            self._gone(name)
        else:
            position = 0 if len(rows) == 1 else chosen[0] + 1
            self.proof.externs[name] = Livepatched(VMLINUX, name, position)


def is_global(symbol: TypedSymbol) -> bool:
    """Whether a row of kallsyms is a global or a weak symbol (``nm``'s letters)."""
    return symbol.type.isupper() or symbol.type in "vw"


def in_vmlinux_init(symbols: KernelSymbols, address: int) -> bool:
    """Whether the address lies in the memory that free_initmem() gives back (arch/x86/mm/init.c)."""
    begin, end = symbols.named("__init_begin"), symbols.named("__init_end")
    return len(begin) == len(end) == 1 and begin[0].address <= address < end[0].address


def module_init(module: UnitObject, index: int) -> bool:
    """Whether a module's symbol goes with its init memory (module_init_layout_section in module/main.c)."""
    return module.elf.sections[module.elf.symbols[index].section].name.startswith(".init")


def module_position(module: UnitObject, name: str, index: int) -> int | None:
    """``sympos`` of a module's symbol, which must hold at both times at which the kernel may look for it.

    While the module is being loaded its whole symbol table counts; once it is up, only what is outside of
    init (kernel/module/kallsyms.c, add_kallsyms). None: the two positions differ.
    """
    everyone = module_places(module, name)
    if len(everyone) == 1:
        return 0
    lasting = [place for place in everyone if not module_init(module, place)]
    position = everyone.index(index) + 1
    return position if index in lasting and lasting.index(index) + 1 == position else None


def module_places(module: UnitObject, name: str, *, only_global: bool = False) -> list[int]:
    """Indices of a module's symbols of that name, in order, that count while the module is being loaded.

    Later only those outside of init do, see :func:`module_position`.
    """
    out = []
    for symbol in module.elf.symbols:
        if symbol.name != name or not symbol.defined or symbol.type in (STT_SECTION, STT_FILE):
            continue
        if only_global and symbol.bind == STB_LOCAL:
            continue
        if module.elf.sections[symbol.section].alloc:
            out.append(symbol.index)
    return out


def crcs_of(names: Iterable[str], exports: ExportTable) -> dict[str, int]:
    """The CRCs of exported symbols; names that vmlinux does not export are left out."""
    out = {}
    for name in names:
        row = exports.get(name)
        if row is not None:
            out[name] = row.crc
    return out
