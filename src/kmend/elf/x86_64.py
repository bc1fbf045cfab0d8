"""x86-64 relocation types as rows.

System V ABI, AMD64 supplement, table 4.9; which of them a module may use:
``arch/x86/kernel/module.c`` ``__write_relocate_add()``.
"""

from __future__ import annotations

from dataclasses import dataclass

from kmend.core.errors import Failed

R_NONE = 0
R_64 = 1
R_PC32 = 2
R_PLT32 = 4
R_32 = 10
R_32S = 11
R_PC64 = 24


@dataclass(frozen=True, slots=True)
class RelocType:
    """``size``: bytes of the field; ``relative``: minus the place; ``signed``: how the field is extended."""

    number: int
    name: str
    size: int
    relative: bool
    signed: bool


ROWS: dict[int, RelocType] = {
    row.number: row
    for row in (
        RelocType(R_NONE, "R_X86_64_NONE", 0, False, False),
        RelocType(R_64, "R_X86_64_64", 8, False, False),
        RelocType(R_PC32, "R_X86_64_PC32", 4, True, True),
        RelocType(R_PLT32, "R_X86_64_PLT32", 4, True, True),
        RelocType(R_32, "R_X86_64_32", 4, False, False),
        RelocType(R_32S, "R_X86_64_32S", 4, False, True),
        RelocType(R_PC64, "R_X86_64_PC64", 8, True, False),
    )
}


def row(number: int) -> RelocType:
    """The row of a relocation type.

    Raises:
        Failed: (rule ``relocation-type``) a type that the kernel's module loader does not know.
    """
    try:
        return ROWS[number]
    except KeyError:
        raise Failed(
            f"relocation type {number}",
            why="the kernel's module loader does not apply this type (arch/x86/kernel/module.c)",
            next_step="report the unit: kmend does not understand its code",
            rule="relocation-type",
        ) from None


def target_of(field: bytes, kind: RelocType, place: int, addend: int) -> int:
    """The symbol address S that makes a linked ``field`` at ``place`` hold what it holds (S + A [- P])."""
    value = int.from_bytes(field, "little", signed=kind.signed or kind.relative)
    return (value - addend + (place if kind.relative else 0)) & 0xFFFFFFFFFFFFFFFF
