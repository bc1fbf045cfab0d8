"""Where the undefined names of hand-written code lead in the target.

Unlike a unit of the kernel, which can only mean what the linker would have given it, hand-written code may
name any function or variable of the kernel, static ones included: that is what livepatch symbols are for
(Documentation/livepatch/module-elf-format.rst). So a name is taken when there is exactly one in reach.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kmend.core.errors import KmendError, Refusal
from kmend.core.target import VMLINUX
from kmend.module.descriptor import SymbolSpec
from kmend.module.resolve import Exported, Livepatched, Resolution
from kmend.verify.symbols import (
    World,
    is_global,
    module_init,
    module_places,
    module_position,
)


class Names:
    """Finds names for a module that patches ``objects``; ``given`` are the author's own answers.

    ``livepatch``: False for an ordinary module, which can only have what vmlinux exports.
    """

    def __init__(
        self, world: World, objects: Sequence[str], given: Mapping[str, SymbolSpec], *, livepatch: bool
    ) -> None:
        self.world, self.objects, self.given, self.livepatch = world, tuple(objects), given, livepatch
        #: for a module whose symbols may be used: the patched object that must be there for it
        self.carriers: dict[str, str] = {}
        for obj in self.objects:
            if obj != VMLINUX:
                self.carriers[obj] = obj
        for obj in self.objects:
            if obj != VMLINUX:
                for module in world.dependencies(obj):
                    self.carriers.setdefault(module, obj)

    def find(self, name: str) -> Resolution | Refusal:
        """How the module gets at the name, or why it does not."""
        given = self.given.get(name)
        if given is not None and self.livepatch:
            return self._given(name, given)
        export = self.world.exports.get(name)
        if export is not None and export.owner == VMLINUX:
            return Exported(name, export.crc, export.namespace)
        if not self.livepatch:
            return Refusal(
                "not-exported",
                name,
                "an ordinary module gets only what the kernel image exports"
                + (f"; {export.owner} exports it" if export else ""),
                "use something else, or make it a livepatch (klp_enable_patch)",
            )
        found: list[tuple[str, int, bool]] = []  # object, place, whether it is global
        found += [(VMLINUX, s.address, is_global(s)) for s in self.world.symbols.named(name)]
        for module in self.carriers:
            unit = self.world.module(module)
            everyone = module_places(unit, name)
            exported = module_places(unit, name, only_global=True)
            found += [(module, place, place in exported) for place in everyone]
        if not found:
            if export is not None:
                return Refusal(
                    "new-dependency",
                    name,
                    f"{export.owner} exports it, but the patch changes neither it nor a module that needs it",
                    f"name {export.owner} as an object of the patch: its symbols are there when it is",
                )
            return Refusal(
                "symbol-missing",
                name,
                f"neither the kernel image nor {self._modules()} has a symbol of that name; it may exist "
                "only inlined, or as a macro",
                "copy the function into your file, or check the spelling",
            )
        chosen = found if len(found) == 1 else [row for row in found if row[2]]
        if len(chosen) != 1:
            return self._several(name, found)
        return self._livepatched(chosen[0][0], name, chosen[0][1])

    def _modules(self) -> str:
        return ", ".join(sorted(self.carriers)) if self.carriers else "a module that the patch names"

    def _several(self, name: str, found: Sequence[tuple[str, int, bool]]) -> Refusal:
        counts: dict[str, int] = {}
        for obj, _, _ in found:
            counts[obj] = counts.get(obj, 0) + 1
        where = ", ".join(f"{obj} has {count}" for obj, count in counts.items())
        return Refusal(
            "ambiguous-symbol",
            name,
            f"several symbols have the name ({where}) and nothing tells which is meant",
            f"say it in kmend.toml: [symbols] {name} = {{ object = …, sympos = … }}",
        )

    def _livepatched(self, obj: str, name: str, place: int) -> Resolution | Refusal:
        gone = Refusal(
            "init-reference",
            name,
            f"it stands in init memory of {obj}, which is gone once that is up",
            "do without it",
        )
        if obj == VMLINUX:
            if self.world.in_init(place):
                return gone
            places = [s.address for s in self.world.symbols.named(name)]
            return Livepatched(obj, name, 0 if len(places) == 1 else places.index(place) + 1)
        unit = self.world.module(obj)
        if module_init(unit, place):
            return gone
        position = module_position(unit, name, place)
        if position is None:
            return self._several(name, [(obj, p, False) for p in module_places(unit, name)])
        return Livepatched(obj, name, position)

    def _given(self, name: str, given: SymbolSpec) -> Resolution | Refusal:
        obj = given.object or self._only(name)
        if obj != VMLINUX and obj not in self.carriers:
            return Refusal(
                "new-dependency",
                name,
                f"[symbols] takes it from {obj}, but the patch changes neither that nor a module that needs "
                "it",
                f"name {obj} as an object of the patch",
            )
        try:
            places = (
                [s.address for s in self.world.symbols.named(name)]
                if obj == VMLINUX
                else module_places(self.world.module(obj), name)
            )
        except KmendError as error:
            return error.reasons[0]
        if given.sympos == 0 and len(places) == 1:
            return self._livepatched(obj, name, places[0])
        if not 0 < given.sympos <= len(places):
            return Refusal(
                "symbol-missing" if not places else "ambiguous-symbol",
                name,
                f"[symbols] asks for number {given.sympos} of {obj}, which has {len(places)}",
                "positions count from 1 in the order of kallsyms",
            )
        return self._livepatched(obj, name, places[given.sympos - 1])

    def _only(self, name: str) -> str:
        """The one object in reach that has the name; vmlinux where that is not so."""
        having = [module for module in self.carriers if module_places(self.world.module(module), name)]
        return having[0] if len(having) == 1 and not self.world.symbols.named(name) else VMLINUX
