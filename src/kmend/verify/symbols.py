"""Which symbol of the running kernel is meant: exports, objects, ``sympos``.

``sympos`` is the position among the symbols of one name in the order in which the kernel
walks the object's kallsyms, from 1; 0 says that there is only one
(kernel/livepatch/core.c, klp_find_object_symbol). For vmlinux that is the order of
kallsyms, for a module the order of its symbol table (kernel/module/kallsyms.c,
add_kallsyms keeps it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from kmend.core.errors import Refusal
from kmend.core.target import VMLINUX
from kmend.diff.select import Selection, is_init
from kmend.diff.special import SpecialSections
from kmend.diff.twins import section_class
from kmend.diff.unit import Part, PartKind, RefKind, UnitObject
from kmend.elf.model import STB_LOCAL, STT_FILE, STT_SECTION
from kmend.module.resolve import Exported, Livepatched, Resolution
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

    def prove(self, selection: Selection, shared: frozenset[str] = frozenset()) -> Proof:
        """Compare what is replaced, and find everything that the module reaches.

        ``shared`` are new global symbols that another unit of the patch brings along.
        """
        for row in selection.changed:
            part = self.old.parts[row.original]
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
        """0 when the name is unique in the object, else the position of ``place`` from 1."""
        places = self._all_places(part.name)
        return 0 if len(places) == 1 else places.index(place) + 1

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

    def _outer(self, part: Part) -> None:
        """A function or variable of the original object that stays where it is."""
        export = self.world.exports.get(part.name) if not part.local else None
        if export is not None and export.owner == VMLINUX == self.owner:
            self.proof.outer[part.key] = Exported(export.name, export.crc, export.namespace)
            return
        places = self._all_places(part.name)
        if not places:
            self._missing(part.name)
            return
        place: int | None = places[0]
        if len(places) > 1:
            place = self.known.get(part.key)
            if place is None and part.kind is PartKind.FUNCTION and self.function(part) is None:
                place = self.known.get(part.key)
            if place is None:
                place = self._witness(part)
            if place is None or place not in places:
                self._ambiguous(part.name, len(places))
                return
        elif part.key in self.known and self.known[part.key] != place:
            self._ambiguous(part.name, len(places))
            return
        position = 0 if len(places) == 1 else places.index(place if place is not None else 0) + 1
        self.proof.outer[part.key] = Livepatched(self.owner, part.name, position)

    def _extern(self, name: str) -> None:
        """A symbol of another unit."""
        if isinstance(self.binary, ModuleBinary):
            own = module_places(self.binary.module, name, only_global=True)
            if own:
                everyone = module_places(self.binary.module, name)
                position = 0 if len(everyone) == 1 else everyone.index(own[0]) + 1
                self.proof.externs[name] = Livepatched(self.owner, name, position)
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
        places = module_places(self.world.module(provider), name)
        exported = module_places(self.world.module(provider), name, only_global=True)
        if len(exported) != 1:
            self._missing(name)
            return
        position = 0 if len(places) == 1 else places.index(exported[0]) + 1
        self.proof.externs[name] = Livepatched(provider, name, position)

    def _from_vmlinux(self, name: str) -> None:
        rows = self.world.symbols.named(name)
        chosen = [i for i, s in enumerate(rows) if s.type.isupper() or s.type in "vw"]
        if not rows:
            self._missing(name)
        elif len(rows) == 1:
            self.proof.externs[name] = Livepatched(VMLINUX, name, 0)
        elif len(chosen) == 1:
            self.proof.externs[name] = Livepatched(VMLINUX, name, chosen[0] + 1)
        else:
            self._ambiguous(name, len(rows))


def module_places(module: UnitObject, name: str, *, only_global: bool = False) -> list[int]:
    """Indices of a module's symbols of that name which its kallsyms keep, in order.

    kernel/module/kallsyms.c, is_core_symbol: defined in a loaded section outside of init. While the module
    is being loaded its init symbols count as well.
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
