"""Instruction boundaries, through capstone (imported on first use: most builds never need it)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import capstone


#: capstone shows a sign-extended immediate as a 64-bit number; ``$-22`` is what one looks for.
_HUGE = re.compile(r"\$(\d{19,20})\b")


def _signed(match: re.Match[str]) -> str:
    value = int(match[1])
    return f"${value - (1 << 64) if value >> 63 else value}"


@dataclass(frozen=True, slots=True)
class Insn:
    """One instruction: offset from the start of the code, length in bytes, text in AT&T syntax."""

    offset: int
    length: int
    text: str


@lru_cache(maxsize=1)
def _engine() -> capstone.Cs:
    import capstone  # noqa: PLC0415 - 40 ms at start-up, needed by few builds

    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    engine.syntax = capstone.CS_OPT_SYNTAX_ATT
    return engine


def decode(code: bytes, *, address: int = 0) -> tuple[Insn, ...]:
    """The instructions of ``code`` from its first byte on; ends early at a byte that begins none.

    ``address`` is where the code lies: branch targets in the text are computed from it.
    """
    return tuple(
        Insn(start - address, length, _HUGE.sub(_signed, f"{mnemonic} {operands}".strip()))
        for start, length, mnemonic, operands in _engine().disasm_lite(code, address)
    )


def containing(code: bytes, offset: int, *, address: int = 0) -> Insn | None:
    """The instruction that the byte at ``offset`` belongs to, or None when decoding does not reach it."""
    for insn in decode(code, address=address):
        if insn.offset <= offset < insn.offset + insn.length:
            return insn
    return None


def ends(code: bytes) -> dict[int, int]:
    """For each byte offset of ``code`` the offset at which its instruction ends."""
    out: dict[int, int] = {}
    for insn in decode(code):
        for at in range(insn.offset, insn.offset + insn.length):
            out[at] = insn.offset + insn.length
    return out
