"""``Module.symvers``: what the kernel and its modules export, and the CRC of each symbol.

Written by modpost (scripts/mod/modpost.c, ``write_dump``), one row per symbol:
``0xCRC<TAB>name<TAB>owner<TAB>EXPORT_SYMBOL[_GPL]<TAB>namespace``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kmend.core.errors import Failed

#: A row of modpost's. All of them are looked at by one pattern: five times as fast as one by one.
_ROW = re.compile(r"^0x[0-9a-f]{1,8}\t([^\t\n]+)\t[^\t\n]*\t.*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Export:
    """An exported symbol. ``owner`` is ``vmlinux`` or the module's name with underscores.

    ``gpl``: only modules under a GPL-compatible licence may use it. ``namespace`` is empty, or
    what the user must name with ``MODULE_IMPORT_NS``.
    """

    name: str
    crc: int
    owner: str
    gpl: bool
    namespace: str


def module_name(path: str) -> str:
    """``drivers/md/dm-mod`` or ``.../dm-mod.ko.xz`` as the kernel names the module: ``dm_mod``.

    ``KBUILD_MODNAME`` has dashes and commas as underscores (scripts/Makefile.lib, ``name-fix-token``).
    """
    base = path.rpartition("/")[2]
    stem, mark, _ = base.partition(".ko")
    return (stem if mark else base).replace("-", "_").replace(",", "_")


class Exports:
    """All exports; a row becomes an :class:`Export` when it is asked for."""

    def __init__(self, rows: dict[str, str]) -> None:
        self._rows = rows

    def get(self, name: str) -> Export | None:
        """The export of that name, or None."""
        row = self._rows.get(name)
        if row is None:
            return None
        crc, _, owner, kind, *rest = row.split("\t")
        return Export(name, int(crc, 16), module_name(owner), "_GPL" in kind, rest[0].strip() if rest else "")

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def of(self, owner: str) -> tuple[str, ...]:
        """Names that ``owner`` (``vmlinux`` or a module's name) exports, in the order of the file."""
        return tuple(name for name, row in self._rows.items() if module_name(row.split("\t", 3)[2]) == owner)


def load(path: Path) -> Exports:
    """Read ``Module.symvers`` (25,000 rows in under 20 ms).

    Raises:
        Failed: (rule ``bad-symvers``) the file cannot be read, is empty, or has a row of another form.
    """
    try:
        text = path.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(path, str(error)) from error
    # Only \n ends a row; splitlines() would also cut at a form feed, where the pattern sees none.
    rows = text.removesuffix("\n").split("\n") if text else []
    names = _ROW.findall(text)
    if len(names) != len(rows):
        number, row = next((n, row) for n, row in enumerate(rows, 1) if not _ROW.fullmatch(row))
        raise _bad(path, f"line {number} is no row of modpost's: {row[:80]!r}")
    if not rows:
        raise _bad(path, "it is empty")
    return Exports(dict(zip(names, rows, strict=True)))


def _bad(path: Path, why: str) -> Failed:
    return Failed(
        f"{path} is no usable Module.symvers",
        why=why,
        next_step="take the file from the headers package of this very kernel",
        rule="bad-symvers",
    )
