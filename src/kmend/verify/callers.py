"""Who reaches a function in the kernel as it is: read from the target's own image and modules.

Asked only about a function whose prototype changed. A direct call of vmlinux has no relocation left, so
every ``call`` and ``jmp`` is looked at (half a second); in a module the relocations say it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from kmend.core.target import VMLINUX, SymbolTable
from kmend.diff.select import is_branch
from kmend.diff.special import DISPENSABLE, SATELLITES, TABLE
from kmend.diff.unit import RefKind, UnitObject
from kmend.verify.safety import Reached
from kmend.verify.symbols import in_vmlinux_init

#: Opcodes in front of a 32-bit distance: call, jmp, jcc; and ``lea distance(%rip)``, which makes a pointer.
_BRANCH = re.compile(rb"[\xe8\xe9]|\x0f[\x80-\x8f]")
_LEA = re.compile(rb"\x8d[\x05\x0d\x15\x1d\x25\x2d\x35\x3d]")
_DISTANCE = struct.Struct("<i")


class SectionLike(Protocol):
    """A section of the image."""

    @property
    def name(self) -> str: ...
    @property
    def address(self) -> int: ...
    @property
    def nobits(self) -> bool: ...
    @property
    def executable(self) -> bool: ...
    @property
    def loaded(self) -> bool: ...


class WholeImage(Protocol):
    """The target's vmlinux with all its sections."""

    @property
    def sections(self) -> Sequence[SectionLike]: ...

    def contents(self, name: str) -> bytes: ...


class TargetCallers:
    """:class:`kmend.verify.safety.Callers`, answered from a target's image, symbols and modules."""

    def __init__(
        self, image: WholeImage, symbols: SymbolTable, module: Callable[[str], UnitObject | None]
    ) -> None:
        self._image, self._symbols, self._module = image, symbols, module

    def outside(self, owner: str, name: str) -> Reached | None:
        """As :meth:`kmend.verify.safety.Callers.outside`."""
        if owner != VMLINUX:
            unit = self._module(owner)
            return None if unit is None else _in_module(unit, name)
        found = self._symbols.named(name)
        if len(found) != 1:
            return None  # which of them is meant cannot be told here
        address = found[0].address
        calls: dict[str, None] = {}
        holders: dict[str, None] = {}
        for section in self._image.sections:
            if not section.loaded or section.nobits:
                continue
            data = self._image.contents(section.name)
            if section.executable:
                calls.update(dict.fromkeys(self._users(section, _distances(_BRANCH, data, section, address))))
                holders.update(dict.fromkeys(self._users(section, _distances(_LEA, data, section, address))))
                holders.update(dict.fromkeys(self._users(section, _values(data, address & 0xFFFFFFFF, 4))))
            else:
                holders.update(dict.fromkeys(self._users(section, _values(data, address, 8))))
        return Reached(tuple(calls), tuple(holders))

    def _users(self, section: SectionLike, offsets: Iterator[int]) -> Iterator[str]:
        """The functions and variables at these places; without what is gone since the start."""
        for offset in offsets:
            place = section.address + offset
            if section.name in SATELLITES:
                yield section.name  # what an alternative puts in place at start stays in use
                continue
            if self._in_table(place) or in_vmlinux_init(self._symbols, place):
                continue
            symbol = self._symbols.covering(place)
            if symbol is None:
                yield section.name
            elif len(self._symbols.named(symbol.name)) > 1:
                yield f"{symbol.name} (one of several of that name)"
            else:
                yield symbol.name

    def _in_table(self, place: int) -> bool:
        """Whether the place lies in the table of ftrace sites."""
        start, stop = (self._symbols.named(f"__{end}_mcount_loc") for end in ("start", "stop"))
        return bool(start and stop) and start[0].address <= place < stop[0].address


def _distances(pattern: re.Pattern[bytes], data: bytes, section: SectionLike, address: int) -> Iterator[int]:
    """Where an instruction of that form leads to the address."""
    wanted = address - section.address
    limit = len(data) - 4
    for match in pattern.finditer(data):
        at = match.end()
        if at <= limit and at + 4 + _DISTANCE.unpack_from(data, at)[0] == wanted:
            yield match.start()


def _values(data: bytes, value: int, size: int) -> Iterator[int]:
    wanted = value.to_bytes(size, "little")
    at = data.find(wanted)
    while at >= 0:
        yield at
        at = data.find(wanted, at + 1)


def _in_module(unit: UnitObject, name: str) -> Reached | None:
    """Who refers to a function of a module, by the module's relocations."""
    keys = {key for key, part in unit.parts.items() if part.name == name}
    keys |= {key for alias, key in unit.aliases.items() if alias == name}
    if len(keys) != 1:
        return None
    calls: dict[str, None] = {}
    holders: dict[str, None] = {}
    for section in unit.elf.sections:
        if not section.alloc or section.name in TABLE or section.name in DISPENSABLE:
            continue
        for reloc in section.relocs:
            ref = unit.ref(section, reloc)
            if ref.kind is not RefKind.PART or ref.name not in keys:
                continue
            user = unit.covering(section.index, reloc.offset)
            who = user.name if user is not None else section.name
            (calls if is_branch(section, reloc) else holders)[who] = None
    return Reached(tuple(calls), tuple(holders))
