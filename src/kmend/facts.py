"""What the rules of `kmend check` need to know of the kernel, from the machine that runs it.

A server that only loads patches has no target in kmend's cache and no compiler. It has:

    /proc/kallsyms                 symbols of vmlinux, where they run, in the order of ``sympos``
    /boot/vmlinuz-RELEASE          exports with their CRCs, vermagic, what ftrace can redirect
    /lib/modules/RELEASE           the same of modules, and their symbols
    /sys/kernel/btf/vmlinux        layout of the structures

Each is read when a rule asks for it. What cannot be had is an :class:`Unknown`; a refusal that rests on one
is none.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from kmend.core.errors import KmendError, Refusal, Unable
from kmend.core.live import Check
from kmend.core.target import VMLINUX
from kmend.diff.unit import UnitObject
from kmend.elf.model import ElfFile
from kmend.kernel import symvers
from kmend.kernel.vmlinux import Image
from kmend.module.describe import KLP_SYMBOL, Description, descriptors, klp_symbols
from kmend.module.layout import Layout, modinfo
from kmend.running import Linked, OwnFiles, is_loaded_from
from kmend.runtime.place import Place, optional
from kmend.runtime.symbols import RunningSymbol, SymbolTable
from kmend.verify.rules import Checked, TargetFacts, check, mcount_sites

#: The longest vermagic that is looked for (VERMAGIC_STRING, include/linux/vermagic.h), in bytes.
_VERMAGIC = 256
NAME = "rules of kmend check"


@dataclass(frozen=True, slots=True)
class Unknown:
    """A fact that this machine does not tell, and why.

    ``rules`` are those that rest on it, for the symbols ``names`` only where that is not None. ``counted``
    are the words of :attr:`kmend.verify.rules.Checked.checked` for what was not, or not all, looked at.
    """

    what: str
    why: str
    rules: frozenset[str] = frozenset()
    names: frozenset[str] | None = None
    counted: tuple[str, ...] = ()

    def covers(self, refusal: Refusal) -> bool:
        """Whether the refusal rests on it."""
        return refusal.rule in self.rules and (self.names is None or refusal.what in self.names)


class RunningFacts:
    """Facts of the kernel that runs, for one module that is to be checked."""

    def __init__(
        self,
        place: Place,
        release: str,
        files: OwnFiles,
        layout: Layout,
        table: SymbolTable | None,
        module: ElfFile,
    ) -> None:
        """``layout`` and ``table`` are the running kernel's; None: it shows this user no symbols."""
        self._place, self._release, self._files = place, release, files
        self._layout, self._table, self._elf = layout, table, module
        self._named: dict[str, tuple[RunningSymbol, ...]] = {}
        self._units: dict[str, UnitObject | None] = {}
        self._sites: dict[str, frozenset[int]] = {}
        self._unknown: dict[str, Unknown] = {}

    @property
    def unknown(self) -> tuple[Unknown, ...]:
        """What was asked for and could not be had."""
        return tuple(self._unknown.values())

    def check(self, name: str) -> Checked:
        """Hold the module against every rule whose facts are known; :attr:`unknown` are the others'.

        Raises:
            UsageError: it is no livepatch module.
        """
        checked = check(self._elf, self.target(), name)
        counts = dict(checked.checked)
        for word in (word for row in self.unknown for word in row.counted):
            counts.pop(word, None)
        refusals = [row for row in checked.refusals if not any(one.covers(row) for one in self.unknown)]
        return replace(checked, refusals=tuple(refusals), checked=counts)

    def target(self) -> TargetFacts:
        """The facts as the rules ask for them."""
        vermagic, exports = self.vermagic(), self.exports()
        if not self._layout.version_size:
            exports = None
            self._not_had(_EXPORTS, "the kernel's BTF has no struct modversion_info")
        return TargetFacts(
            self._release,
            vermagic,
            replace(self._layout, version_size=self._layout.version_size or 1),  # a step
            exports or NoExports(),
            self,
            self.module,
            self.traceable,
        )

    def _not_had(self, fact: Unknown, why: str | KmendError) -> None:
        if isinstance(why, KmendError):
            why = f"{why.what}: {why.why}" if why.why else why.what
        self._unknown[fact.what] = replace(fact, why=why)

    # -- vmlinux ------------------------------------------------------------------------------------

    @cached_property
    def _linked(self) -> tuple[Image, Linked]:
        """
        Raises:
            KmendError: there is no image, or no telling where the kernel lies.
        """
        if self._table is None:
            raise Unable(_NO_SYMBOLS, rule="not-permitted")
        image = self._files.image()
        return image, Linked(self._table, image)

    def vermagic(self) -> str:
        """What the kernel compares a module's with (``vermagic[]``, kernel/module/main.c); '': unknown."""
        try:
            image, linked = self._linked
            place = linked("vermagic")
            if place is None:
                raise Unable("its place in the image is not known", rule="no-image")
            text, end, _ = image.read(place, _VERMAGIC).partition(b"\0")
            if not end or not text.startswith(self._release.encode() + b" "):
                raise Unable("it is not where the kernel's symbols say", rule="no-image")
            return text.decode(errors="replace")
        except KmendError as error:
            self._not_had(Unknown("vermagic", "", frozenset({"vermagic"}), counted=("vermagic",)), error)
            return ""

    def exports(self) -> OwnExports | None:
        """What the kernel exports; None where unknown."""
        try:
            return OwnExports(symvers.ImageExports(self._files.image()), self._elf, self.module)
        except KmendError as error:
            self._not_had(_EXPORTS, error)
            return None

    def named(self, name: str) -> tuple[RunningSymbol, ...]:
        """Symbols of vmlinux in ``sympos`` order: /proc/kallsyms is in that of the kernel's own table."""
        if self._table is None:
            names = self._names_in(VMLINUX)
            for obj in descriptors(self._elf, self._layout)[1] or ():
                names |= {row.old_name for row in obj.funcs if obj.name == VMLINUX}
            fact = Unknown("symbols of vmlinux", "", _BY_SYMBOL, names, ("livepatch symbols", "functions"))
            self._not_had(fact, _NO_SYMBOLS)
            return ()
        if name not in self._named:
            self._named[name] = tuple(row for row in self._table.named(name) if row.object == VMLINUX)
        return self._named[name]

    def at(self, address: int) -> tuple[RunningSymbol, ...]:
        """Symbols of vmlinux that begin at a run-time address."""
        return tuple(row for row in self._table.at(address) if row.object == VMLINUX) if self._table else ()

    # -- modules ------------------------------------------------------------------------------------

    def module(self, name: str) -> UnitObject | None:
        """A module by its file, which must be what is loaded, if it is; None where unknown."""
        if name not in self._units:
            try:
                self._units[name] = self._unit(name)
            except KmendError as error:
                self._units[name] = None
                rules, names = frozenset({"klp-symbol"}), self._names_in(name)
                self._not_had(Unknown(name, "", rules, names, ("livepatch symbols",)), error)
        return self._units[name]

    def _unit(self, name: str) -> UnitObject:
        file = self._files.module(name)
        if file is None:
            raise Unable("its file is not below /lib/modules, or cannot be read", rule="unknown-module")
        if is_loaded_from(self._place, name, file) is False:
            raise Unable("the loaded module is not the one of its file", rule="unknown-module")
        return UnitObject(file, f"{name}.ko")

    def _names_in(self, obj: str) -> frozenset[str]:
        """The symbols of an object that the module looks up."""
        parts = (KLP_SYMBOL.match(symbol.name) for symbol in klp_symbols(self._elf))
        return frozenset(row[2] for row in parts if row is not None and row[1] == obj)

    # -- both ---------------------------------------------------------------------------------------

    def traceable(self, obj: str, place: int) -> bool:
        """Whether ftrace can redirect what lies at the address (in a module: is the symbol of that index)."""
        if obj != VMLINUX:
            unit = self.module(obj)
            if unit is not None and obj not in self._sites:
                self._sites[obj] = mcount_sites(unit)
            return unit is None or place in self._sites[obj]
        try:
            distance = self._linked[1].distance
            if obj not in self._sites:
                self._sites[obj] = self._vmlinux_sites()
        except KmendError as error:
            self._not_had(Unknown("ftrace entries of vmlinux", ""), error)
            return True
        # behind an ENDBR64, as kmend.verify.rules.mcount_sites() has it
        return any(place - distance + offset in self._sites[obj] for offset in (0, 4))

    def _vmlinux_sites(self) -> frozenset[int]:
        image, linked = self._linked
        start, stop = linked("__start_mcount_loc"), linked("__stop_mcount_loc")
        if start is None or stop is None:
            raise Unable("the image has no table of ftrace sites", rule="no-ftrace")
        return frozenset(array("Q", image.read(start, stop - start)))


_NO_SYMBOLS = "the kernel shows this user no symbols"
_EXPORTS = Unknown("exports", "", frozenset({"not-exported", "symbol-version"}), counted=("exports",))
#: Rules about where vmlinux has a symbol.
_BY_SYMBOL = frozenset({"klp-symbol", "old-function"})


class OwnExports:
    """What vmlinux and the modules that a module needs export."""

    def __init__(
        self, vmlinux: symvers.ImageExports, needing: ElfFile, module: Callable[[str], UnitObject | None]
    ) -> None:
        depends = dict(modinfo(needing)).get("depends", "")
        self._vmlinux, self._module = vmlinux, module
        self._depends = [symvers.module_name(name) for name in depends.split(",") if name]

    def get(self, name: str) -> symvers.Export | None:
        """The export of that name, or None."""
        return self._vmlinux.get(name) or next(
            (found for owner in self._depends if (found := self._of(owner).get(name))), None
        )

    def _of(self, owner: str) -> dict[str, symvers.Export]:
        unit = self._module(owner)
        return symvers.of_module(unit.elf, owner) if unit is not None else {}


class NoExports:
    """In the place of exports that are not known."""

    def get(self, _name: str) -> None:
        """None."""


def checks(
    checked: Checked, unknown: Iterable[Unknown], told: Container[tuple[str, str]], where: str
) -> Iterator[Check]:
    """The rules as rows of a load's checks.

    ``told`` are refusals that other rows name, as :func:`named_by_others` has them; ``where`` says what the
    module was held against.
    """
    number = sum(checked.checked.values())
    left = [row for row in checked.refusals if (row.rule, row.what) not in told]
    for refusal in left:
        yield Check(NAME, False, refusal.what, refusal)
    if not left:
        objections = "the same objections" if checked.refusals else "no objection"
        yield Check(NAME, not checked.refusals, f"{number} things looked at in {where}, {objections}")
    for row in unknown:
        yield Check(f"{NAME}: {row.what}", None, row.why)


def named_by_others(
    place: Place, table: SymbolTable | None, description: Description, refused: Container[str]
) -> frozenset[tuple[str, str]]:
    """Rule and subject of those refusals that a load's other checks make of the running kernel itself.

    ``refused`` are the rules by which :mod:`kmend.runtime.preflight` has refused: another release, functions
    that are not where they are expected or cannot be redirected. The model of :mod:`kmend.plan` finds those
    that are listed twice.
    """
    found = {("vermagic", description.vermagic.strip() or "no vermagic")} if "vermagic" in refused else set()
    seen: set[tuple[str, str, int]] = set()
    for obj in description.objects or ():
        here = obj.name == VMLINUX or optional(place.module(obj.name) / "initstate") is not None
        for func in obj.funcs:
            row = (obj.name, func.old_name, func.sympos)
            if row in seen or (here and table is not None and _misplaced(table, *row)):
                found.add(("old-function", func.old_name))
            if here and "no-ftrace-entry" in refused:
                found.add(("no-ftrace-entry", func.old_name))
            seen.add(row)
    return frozenset(found)


def _misplaced(table: SymbolTable, obj: str, name: str, sympos: int) -> bool:
    count = len([row for row in table.named(name) if row.object == obj])
    return count < max(sympos, 1) or (count > 1 and not sympos)
