"""Reading a livepatch module back: what it says of itself and what it would patch.

Works for any module built with the kernel's static descriptors, not only for kmend's:
``struct klp_patch`` is found by its size and relocations when the symbol ``kmend_patch`` is absent.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from kmend.core.errors import UsageError
from kmend.core.target import VMLINUX
from kmend.diff.declared import CallbackKind
from kmend.elf.model import ET_REL, SHN_LIVEPATCH, STT_OBJECT, STT_SECTION, ElfFile, Reloc, Section, Symbol
from kmend.module.layout import Layout, modinfo

#: ``.klp.sym.OBJECT.NAME,SYMPOS`` (kernel/livepatch/core.c, klp_resolve_symbols).
KLP_SYMBOL = re.compile(r"^\.klp\.sym\.([^.]{1,55})\.([^,]{1,511}),([0-9]{1,9})$")
#: ``.klp.rela.OBJECT.SECTION``
KLP_RELA = re.compile(r"^\.klp\.rela\.([^.]{1,55})\.(.+)$")
PATCH_SYMBOL = "kmend_patch"


@dataclass(frozen=True, slots=True)
class FuncRow:
    """A ``struct klp_func``: ``new_func`` is the name of the symbol that replaces ``old_name``."""

    old_name: str
    sympos: int
    new_func: str


@dataclass(frozen=True, slots=True)
class ObjectFuncs:
    """A ``struct klp_object``: ``callbacks`` are the kinds that it has, each with the function's name."""

    name: str
    funcs: tuple[FuncRow, ...]
    callbacks: tuple[tuple[CallbackKind, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Description:
    """A livepatch module. ``objects`` is None where its descriptors cannot be read statically."""

    name: str
    vermagic: str
    info: tuple[tuple[str, str], ...]
    replace: bool | None
    objects: tuple[ObjectFuncs, ...] | None
    note: dict[str, object] | None

    @property
    def release(self) -> str:
        """The release that the module was built for (the first word of vermagic)."""
        return self.vermagic.partition(" ")[0]


def describe(elf: ElfFile, layout: Layout | None, name: str = "the module") -> Description:
    """Describe a module; without ``layout`` (no target at hand) the descriptors stay unread.

    Raises:
        UsageError: (rule ``not-a-livepatch``) no module, or one that is not marked as a livepatch.
    """
    info = tuple(modinfo(elf))
    values = dict(info)
    if elf.type != ET_REL or elf.section(".gnu.linkonce.this_module") is None:
        raise UsageError(
            f"{name} is no kernel module",
            why="it has no .gnu.linkonce.this_module section",
            next_step="name a .ko file that `kmend build` made",
            rule="not-a-livepatch",
        )
    if values.get("livepatch") != "Y":
        raise UsageError(
            f"{name} is no livepatch module",
            why="its modinfo has no livepatch=Y; the kernel would refuse it",
            next_step="name a .ko file that `kmend build` made",
            rule="not-a-livepatch",
        )
    replace, objects = descriptors(elf, layout) if layout is not None else (None, None)
    return Description(values.get("name", ""), values.get("vermagic", ""), info, replace, objects, _note(elf))


def _note(elf: ElfFile) -> dict[str, object] | None:
    section = elf.section(".note.kmend")
    if section is None or len(section.data) < 20:
        return None
    size = int.from_bytes(section.data[4:8], "little")
    try:
        note = json.loads(section.data[20 : 20 + size])
    except ValueError:
        return None
    return note if isinstance(note, dict) else None


class _Memory:
    """The module's data with its relocations: reads pointers as (section, offset)."""

    def __init__(self, elf: ElfFile) -> None:
        self.elf = elf
        self.relocs: dict[tuple[int, int], Reloc] = {
            (s.index, r.offset): r for s in elf.sections for r in s.relocs
        }

    def pointer(self, section: Section, offset: int) -> tuple[Section, int, Symbol] | None:
        reloc = self.relocs.get((section.index, offset))
        if reloc is None:
            return None
        symbol = self.elf.symbols[reloc.symbol]
        if not symbol.defined:
            return None
        return self.elf.sections[symbol.section], symbol.value + reloc.addend, symbol

    def text(self, section: Section, offset: int) -> str:
        place = self.pointer(section, offset)
        if place is None:
            return ""
        data, at, _ = place
        return data.data[at : data.data.find(b"\0", at)].decode(errors="replace")


def _patch_symbol(elf: ElfFile, lay: Layout, memory: _Memory) -> Symbol | None:
    """Our ``struct klp_patch``; in a module that somebody else made, the one variable that can be one:
    of its size, with ``__this_module`` in ``mod`` and something of the module in ``objs``.
    """
    found = []
    for symbol in elf.symbols:
        if not symbol.defined or symbol.type != STT_OBJECT:
            continue
        if symbol.name == PATCH_SYMBOL:
            return symbol
        mod = memory.relocs.get((symbol.section, symbol.value + lay.patch_mod))
        objs = memory.relocs.get((symbol.section, symbol.value + lay.patch_objs))
        if (
            symbol.size == lay.patch_size
            and mod is not None
            and objs is not None
            and elf.symbols[mod.symbol].name == "__this_module"
            and elf.symbols[objs.symbol].defined
        ):
            found.append(symbol)
    return found[0] if len(found) == 1 else None


def descriptors(elf: ElfFile, lay: Layout) -> tuple[bool | None, tuple[ObjectFuncs, ...] | None]:
    """``replace`` and the objects of the module's (or object file's) one ``struct klp_patch``.

    (None, None) where there is none, or several, or where code fills it in at run time.
    """
    memory = _Memory(elf)
    patch = _patch_symbol(elf, lay, memory)
    if patch is None:
        return None, None
    section = elf.sections[patch.section]
    place = memory.pointer(section, patch.value + lay.patch_objs)
    if place is None or patch.value + lay.patch_replace >= len(section.data):
        return None, None
    replace = bool(section.data[patch.value + lay.patch_replace])
    table, at, _ = place
    objects = []
    while (funcs := memory.pointer(table, at + lay.object_funcs)) is not None:
        name = memory.text(table, at + lay.object_name) or VMLINUX
        rows, where = funcs[0], funcs[1]
        found = []
        while memory.pointer(rows, where + lay.func_old_name) is not None:
            target = memory.pointer(rows, where + lay.func_new_func)
            position = where + lay.func_old_sympos
            found.append(
                FuncRow(
                    memory.text(rows, where + lay.func_old_name),
                    int.from_bytes(rows.data[position : position + 8], "little"),
                    _symbol_name(elf, target) if target else "",
                )
            )
            where += lay.func_size
        called = []
        for kind in CallbackKind:
            callback = memory.pointer(table, at + lay.callback(kind))
            if callback is not None:
                called.append((kind, _symbol_name(elf, callback)))
        objects.append(ObjectFuncs(name, tuple(found), tuple(called)))
        at += lay.object_size
    return replace, tuple(objects)


def _symbol_name(elf: ElfFile, place: tuple[Section, int, Symbol]) -> str:
    section, at, symbol = place
    if symbol.type != STT_SECTION:
        return symbol.name
    for other in elf.symbols:
        if other.section == section.index and other.value == at and other.type != STT_SECTION:
            return other.name
    return f"{section.name}+{at:#x}"


def klp_symbols(elf: ElfFile) -> tuple[Symbol, ...]:
    """The symbols that the livepatch core resolves (``SHN_LIVEPATCH``)."""
    return tuple(s for s in elf.symbols if s.section == SHN_LIVEPATCH)
