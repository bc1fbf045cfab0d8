"""``/proc/kallsyms``: where the running kernel's symbols lie.

The file has an address, nm's letter, the name and, for a module's symbol, ``[module]``. To users without
CAP_SYSLOG (``kptr_restrict``) all addresses are 0; then nothing can be told from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kmend.core.errors import Unable
from kmend.core.target import VMLINUX
from kmend.runtime.place import Place, data, not_permitted


@dataclass(frozen=True, slots=True)
class RunningSymbol:
    """A row: run-time address (KASLR included), nm letter, name, ``vmlinux`` or the module."""

    address: int
    type: str
    name: str
    object: str


class SymbolTable:
    """The table as it was at one moment. It is searched as text: few of its 160,000 lines are asked for."""

    def __init__(self, place: Place) -> None:
        """
        Raises:
            Unable: the file cannot be read, or shows no addresses to this user (rule ``not-permitted``).
        """
        path = place.proc / "kallsyms"
        contents = data(path)
        if not contents:
            raise Unable(f"{path} is not there", why="the kernel shows no symbols", rule="unreadable")
        self._text = b"\n" + contents.rstrip(b"\n") + b"\n"
        #: Other long tables of the same moment by their names, for who looks things up in both.
        self.beside: dict[str, str | None] = {}
        last = self._text[self._text.rfind(b"\n", 0, -1) :]
        first = self._text[1 : self._text.find(b" ")]
        if not first.strip(b"0") and not last.split()[0].strip(b"0"):
            raise not_permitted(path)

    def named(self, name: str) -> tuple[RunningSymbol, ...]:
        """The symbols of that name in the kernel's order: ``sympos`` 1 is an object's first."""
        rows = []
        for end in (b"\n", b"\t"):
            rows += list(self._lines(b" " + name.encode() + end))
        found = [row for _, row in sorted(rows, key=lambda pair: pair[0]) if row.name == name]
        return tuple(found)

    def at(self, address: int) -> tuple[RunningSymbol, ...]:
        """The symbols that begin at the address."""
        return tuple(row for _, row in self._lines(b"\n%016x " % address))

    def starts(self) -> list[int]:
        """Every address at which a symbol begins, ascending: the next one ends a function."""
        return sorted({int(line[:16], 16) for line in self._text.split(b"\n") if line})

    def after(self, address: int) -> int | None:
        """The first of :meth:`starts` above ``address``; None: there is none."""
        # Those that share the leading digits lie nearest; few functions are longer than a page.
        for digits in (13, 12, 11, 10, 0):
            above = [found for found in self._beginning(b"%016x" % address, digits) if found > address]
            if above:
                return min(above)
        return None

    def _beginning(self, word: bytes, digits: int) -> Iterator[int]:
        needle = b"\n" + word[:digits]
        at = self._text.find(needle)
        while at >= 0 and at + 17 < len(self._text):
            yield int(self._text[at + 1 : at + 17], 16)
            at = self._text.find(needle, at + 1)

    def _lines(self, needle: bytes) -> Iterator[tuple[int, RunningSymbol]]:
        at = self._text.find(needle)
        while at >= 0:
            start = at + 1 if needle.startswith(b"\n") else self._text.rfind(b"\n", 0, at) + 1
            line = self._text[start : self._text.find(b"\n", start)]
            words = line.split(None, 3)
            if len(words) >= 3:
                owner = words[3].strip(b"[]").decode(errors="replace") if len(words) > 3 else VMLINUX
                yield (
                    start,
                    RunningSymbol(
                        int(words[0], 16), words[1].decode(), words[2].decode(errors="replace"), owner
                    ),
                )
            at = self._text.find(needle, at + 1)
