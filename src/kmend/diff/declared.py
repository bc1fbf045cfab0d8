"""What a patch declares beside its code: callbacks, states, and what the author wants ignored.

The macros of ``kmend.h`` and ``kpatch-macros.h`` (:mod:`kmend.module.include`) put pointers and values into
sections that no kernel knows: ``.kmend.*``, and ``.kpatch.*`` for a patch that brings a copy of kpatch's
header along. They are read here and never become a part of the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from kmend.core.errors import Refusal
from kmend.elf.model import SHN_UNDEF, STT_SECTION, ElfFile, Reloc, Section

#: Sections of this kind hold declarations.
PREFIXES = (".kmend.", ".kpatch.")


class CallbackKind(Enum):
    """``struct klp_callbacks`` (include/linux/livepatch.h): when the kernel calls it."""

    PRE_PATCH = "pre_patch"
    POST_PATCH = "post_patch"
    PRE_UNPATCH = "pre_unpatch"
    POST_UNPATCH = "post_unpatch"

    @property
    def words(self) -> str:
        """For people: ``pre-patch``."""
        return self.value.replace("_", "-")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a declared pointer leads: a place in a section of the object, or an undefined symbol's name."""

    section: int
    offset: int
    symbol: str


@dataclass(frozen=True, slots=True)
class Declarations:
    """All of one object. ``states`` are rows of id and version (``struct klp_state``)."""

    callbacks: tuple[tuple[CallbackKind, Place], ...] = ()
    states: tuple[tuple[int, int], ...] = ()
    ignored_functions: tuple[Place, ...] = ()
    ignored_sections: tuple[str, ...] = ()
    forced: tuple[Place, ...] = ()
    #: declarations that are not understood
    refusals: tuple[Refusal, ...] = ()

    @property
    def acts(self) -> bool:
        """Whether the module must exist for them alone."""
        return bool(self.callbacks or self.states)


def is_declaration(name: str) -> bool:
    """Whether a section of that name holds declarations and nothing that the kernel would see."""
    return name.startswith(PREFIXES)


def declarations(elf: ElfFile) -> Declarations:
    """Read the declarations of an object."""
    callbacks: list[tuple[CallbackKind, Place]] = []
    states: list[tuple[int, int]] = []
    functions: list[Place] = []
    forced: list[Place] = []
    sections: list[str] = []
    refusals: list[Refusal] = []
    for section in elf.sections:
        if not is_declaration(section.name) or not section.size or not section.alloc:
            continue
        _, _, what = section.name[1:].partition(".")
        match what:
            case (
                "callbacks.pre_patch"
                | "callbacks.post_patch"
                | "callbacks.pre_unpatch"
                | ("callbacks.post_unpatch")
            ):
                kind = CallbackKind(what.removeprefix("callbacks."))
                callbacks += [(kind, place) for place in _places(elf, section)]
            case "ignore.functions":
                functions += _places(elf, section)
            case "ignore.sections":
                # kpatch's macro leaves pointers to strings, ours the strings themselves
                sections += [_text(elf, place) for place in _places(elf, section)]
                if not section.relocs:
                    sections += [name.decode(errors="replace") for name in section.data.split(b"\0") if name]
            case "force":
                forced += _places(elf, section)
            case "states":
                # struct { u64 id; u64 version; } of kmend.h
                for at in range(0, section.size - 15, 16):
                    row = section.data[at : at + 16]
                    states.append((int.from_bytes(row[:8], "little"), int.from_bytes(row[8:], "little")))
            case _:
                refusals.append(
                    Refusal(
                        "unknown-declaration",
                        f"section {section.name}",
                        "kmend knows callbacks, states, and what to ignore; this is none of them",
                        "use the macros of kmend.h",
                    )
                )
    order = list(CallbackKind)
    callbacks.sort(key=lambda row: order.index(row[0]))  # GCC lays them out from the last to the first
    return Declarations(
        tuple(callbacks), tuple(states), tuple(functions), tuple(sections), tuple(forced), tuple(refusals)
    )


def _places(elf: ElfFile, section: Section) -> Iterator[Place]:
    for reloc in section.relocs:
        yield _place(elf, reloc)


def _place(elf: ElfFile, reloc: Reloc) -> Place:
    symbol = elf.symbols[reloc.symbol]
    if symbol.section == SHN_UNDEF or not symbol.defined:
        return Place(0, 0, symbol.name)
    name = "" if symbol.type == STT_SECTION else symbol.name
    return Place(symbol.section, symbol.value + reloc.addend, name)


def _text(elf: ElfFile, place: Place) -> str:
    data = elf.sections[place.section].data
    return data[place.offset : data.find(b"\0", place.offset)].decode(errors="replace")
