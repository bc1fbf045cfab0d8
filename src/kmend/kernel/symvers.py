"""What the kernel and its modules export, and the CRC of each symbol.

``Module.symvers`` is written by modpost (scripts/mod/modpost.c, ``write_dump``), one row per symbol:
``0xCRC<TAB>name<TAB>owner<TAB>EXPORT_SYMBOL[_GPL]<TAB>namespace``. The same is in the files that the kernel
is made of, in ``__ksymtab`` and ``__kcrctab`` and the two of the same name with ``_gpl``:
``struct kernel_symbol`` is three distances, each from itself, to the symbol, its name and its namespace
(include/linux/export.h and kernel/module/internal.h, ``CONFIG_HAVE_ARCH_PREL32_RELOCATIONS``).
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kmend.core.errors import Failed
from kmend.core.target import VMLINUX
from kmend.elf.model import ElfFile, Section
from kmend.kernel.vmlinux import Image

#: A row of modpost's. All of them are looked at by one pattern: five times as fast as one by one.
_ROW = re.compile(r"^0x[0-9a-f]{1,8}\t([^\t\n]+)\t[^\t\n]*\t.*$", re.MULTILINE)

#: Symbols, their CRCs, and whether only modules under a GPL-compatible licence may use them.
_TABLES = (("__ksymtab", "__kcrctab", False), ("__ksymtab_gpl", "__kcrctab_gpl", True))
_STRINGS = "__ksymtab_strings"
#: Bytes of a ``struct kernel_symbol``, and where in it the distances to name and namespace are.
_ROW_SIZE, _ROW_NAME, _ROW_NAMESPACE = 12, 4, 8


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


class ImageExports:
    """What vmlinux exports, from its image: a name is searched for as the kernel does it.

    ``find_exported_symbol_in_section()`` (kernel/module/main.c): by bisection, as the linker has sorted the
    tables by name. 12,000 rows are never made into as many objects.
    """

    def __init__(self, image: Image) -> None:
        """
        Raises:
            Failed: (rule ``bad-image``) the image has no such tables (``CONFIG_MODVERSIONS`` is off), or of
                another form.
        """
        strings = image.section(_STRINGS)
        self._strings = image.contents(_STRINGS)
        if strings is None:
            raise _image(f"there is no {_STRINGS}")
        self._tables: list[tuple[array[int], array[int], int, bool]] = []
        for symbols, crcs, gpl in _TABLES:
            section, contents, sums = image.section(symbols), image.contents(symbols), image.contents(crcs)
            if section is None or len(contents) % _ROW_SIZE or len(sums) * 3 != len(contents):
                raise _image(f"there is no CRC for each row of {symbols}")
            # distances count from the field: with the table's place in front of the strings added, from there
            base = section.address - strings.address
            self._tables.append((array("i", contents), array("I", sums), base, gpl))

    def __len__(self) -> int:
        return sum(len(crcs) for _, crcs, _, _ in self._tables)

    def get(self, name: str) -> Export | None:
        """The export of that name, or None.

        Raises:
            Failed: (rule ``bad-image``) a row has no name.
        """
        wanted = name.encode()
        for rows, crcs, base, gpl in self._tables:

            def name_of(at: int, rows: array[int] = rows, base: int = base) -> bytes:
                return self._text(base + at * _ROW_SIZE + _ROW_NAME + rows[3 * at + 1])

            at = bisect_left(range(len(crcs)), wanted, key=name_of)
            if at < len(crcs) and name_of(at) == wanted:
                distance = rows[3 * at + 2]  # 0: none (kernel_symbol_namespace())
                space = self._text(base + at * _ROW_SIZE + _ROW_NAMESPACE + distance) if distance else b""
                return Export(name, crcs[at], VMLINUX, gpl, space.decode(errors="replace"))
        return None

    def _text(self, start: int) -> bytes:
        end = self._strings.find(b"\0", start) if start >= 0 else -1
        if end < 0:
            raise _image(f"a row's name is not in {_STRINGS}")
        return self._strings[start:end]


def of_module(elf: ElfFile, owner: str) -> dict[str, Export]:
    """What a module exports, from its file, by name.

    Raises:
        Failed: (rule ``bad-module``) its tables have another form.
    """
    found = {}
    for symbols, crcs, gpl in _TABLES:
        section, sums = elf.section(symbols), elf.section(crcs)
        if section is None or not section.size:
            continue
        if sums is None or len(sums.data) * 3 != len(section.data):
            raise _module(owner, f"there is no CRC for each row of {symbols}")
        texts = _texts(elf, section)
        for at, crc in enumerate(array("I", sums.data)):
            name = texts.get(at * _ROW_SIZE + _ROW_NAME, "")
            if not name:
                raise _module(owner, f"a row of {symbols} has no name")
            space = texts.get(at * _ROW_SIZE + _ROW_NAMESPACE, "")
            found[name] = Export(name, crc, owner, gpl, space)
    return found


def _texts(elf: ElfFile, table: Section) -> dict[int, str]:
    """The strings that a table's relocations lead to, by offset of the field."""
    found = {}
    for reloc in table.relocs:
        symbol = elf.symbols[reloc.symbol]
        if symbol.defined and (strings := elf.sections[symbol.section]).name == _STRINGS:
            start = symbol.value + reloc.addend
            end = strings.data.find(b"\0", start)
            found[reloc.offset] = strings.data[start:end].decode(errors="replace")
    return found


def _image(why: str) -> Failed:
    return Failed("what the kernel's image exports cannot be read", why=why, rule="bad-image")


def _module(owner: str, why: str) -> Failed:
    return Failed(f"what {owner} exports cannot be read", why=why, rule="bad-module")


def _bad(path: Path, why: str) -> Failed:
    return Failed(
        f"{path} is no usable Module.symvers",
        why=why,
        next_step="take the file from the headers package of this very kernel",
        rule="bad-symvers",
    )
