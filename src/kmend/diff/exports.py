"""What an object exports to modules, by the tables of either line.

Up to 6.9 each export is a section of its own, ``___ksymtab+NAME`` or ``___ksymtab_gpl+NAME``; since
ddb5cdbafaaa ("kbuild: generate KSYMTAB entries by modpost") the object only lists them in
``.export_symbol``, from which modpost makes the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from kmend.diff.unit import UnitObject
from kmend.elf.model import Section, Symbol

_TABLES = {"___ksymtab+": "", "___ksymtab_gpl+": "GPL"}
_LISTED = "__export_symbol_"


@dataclass(frozen=True, slots=True)
class Export:
    """How a symbol is exported: ``licence`` (``GPL`` or ''), and the namespace that users must name."""

    licence: str
    namespace: str


def is_export_table(section: str) -> bool:
    """Whether a section of this name tells what is exported."""
    return "ksymtab" in section or "kcrctab" in section or section.startswith(".export_symbol")


def exports_of(unit: UnitObject) -> dict[str, Export]:
    """The exports of an object, by the symbol's name."""
    out: dict[str, Export] = {}
    sections, symbols = unit.elf.sections, {s.name: s for s in unit.elf.symbols}
    for section in sections:
        for table, licence in _TABLES.items():
            if section.name.startswith(table):
                name = section.name.removeprefix(table)
                out[name] = Export(licence, _text(sections, symbols.get(f"__kstrtabns_{name}")))
    for symbol in unit.elf.symbols:
        if symbol.defined and symbol.name.startswith(_LISTED):
            text = sections[symbol.section].data[symbol.value :]
            fields = [*text.split(b"\0", 2), b"", b""]
            out[symbol.name.removeprefix(_LISTED)] = Export(
                fields[0].decode(errors="replace"), fields[1].decode(errors="replace")
            )
    return out


def _text(sections: tuple[Section, ...], symbol: Symbol | None) -> str:
    if symbol is None or not symbol.defined:
        return ""
    return sections[symbol.section].data[symbol.value :].split(b"\0", 1)[0].decode(errors="replace")
