"""The target's kallsyms, in the kernel's own order, so that ``sympos`` can be counted.

**Order.** ``sympos`` N is the N-th symbol of that name in the order in which livepatch walks:
``klp_find_object_symbol()`` (kernel/livepatch/core.c) calls, for vmlinux,

- on 6.1 ``kallsyms_on_each_symbol()``, which goes through the table from index 0 up;
- since 6.2 ("livepatch: Use kallsyms_on_each_match_symbol() to improve performance")
  ``kallsyms_on_each_match_symbol()``, which goes through ``kallsyms_seqs_of_names``: sorted by
  name, and equal names by address, then by table index (scripts/kallsyms.c, ``compare_names()``).

The table itself is sorted by address (``compare_symbols()``), so both orders are the table's, which
:func:`build_index` asserts.

**Per-CPU symbols** are linked at 0 and stay absolute (``CONFIG_KALLSYMS_ABSOLUTE_PERCPU``): they come
first in the table with small addresses and the letter ``A``. They are named like any other, but no
code address is ever resolved to one: :meth:`Table.covering` starts at the first kernel address.

**On disk** ``kallsyms.bin`` in the target's folder: a header, addresses (u64), letters, names, and the
table indexes of names that occur more than once. 94,000 symbols are loaded in some 30 ms.
"""

from __future__ import annotations

import struct
import sys
from array import array
from bisect import bisect_left, bisect_right
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from kmend.core.errors import Failed
from kmend.core.files import write_atomically
from kmend.core.progress import Progress
from kmend.core.run import run
from kmend.core.target import VMLINUX, Address, KernelSymbol, Target
from kmend.kernel import symvers
from kmend.kernel.vmlinux import Image

FILE = "kallsyms.bin"
_MAGIC = b"kmendks1"
#: magic, number of symbols, bytes of names, entries of the table of repeated names
_HEADER = struct.Struct("<8sIII")
#: x86-64 kernel addresses lie in the upper half (Documentation/x86/x86_64/mm.rst).
_KERNEL_HALF = 1 << 63
#: So many names are searched for before a table of all of them is made.
_FEW = 24


class Table:
    """The symbol table, a :class:`kmend.core.target.SymbolTable`; parts are built when asked for."""

    def __init__(self, addresses: array[int], letters: str, names: bytes, repeated: array[int]) -> None:
        self._addresses = addresses
        self._letters = letters
        self._raw_names = names
        self._repeated_rows = repeated
        self._first_code = bisect_left(addresses, _KERNEL_HALF)
        self._asked = 0

    def __len__(self) -> int:
        return len(self._addresses)

    @cached_property
    def _names(self) -> list[str]:
        return self._raw_names.decode().split("\n")

    @cached_property
    def _first(self) -> dict[str, int]:
        return dict(zip(reversed(self._names), range(len(self._names) - 1, -1, -1), strict=True))

    def _find(self, name: str) -> int | None:
        """Index of the first symbol of that name.

        A search in the raw names takes half a millisecond, a table of all of them fifty: a build of a small
        patch asks a few times only.
        """
        self._asked += 1
        if self._asked > _FEW:
            return self._first.get(name)
        raw = self._raw_names
        wanted = b"\n" + name.encode("utf-8", "surrogateescape") + b"\n"
        if not name or b"\n" in wanted[1:-1] or not raw:
            return None
        if raw.startswith(wanted[1:]) or raw == wanted[1:-1]:
            return 0
        at = raw.find(wanted)
        if at < 0:
            if not raw.endswith(wanted[:-1]):
                return None
            at = len(raw) - len(wanted) + 1
        return raw.count(b"\n", 0, at) + 1

    @cached_property
    def _repeated(self) -> dict[int, tuple[int, ...]]:
        """Names that several symbols have: by the first one's index."""
        rows, out, i = self._repeated_rows, {}, 0
        while i < len(rows):
            count = rows[i]
            group = tuple(rows[i + 1 : i + 1 + count])
            out[group[0]] = group
            i += 1 + count
        return out

    def _symbol(self, index: int) -> KernelSymbol:
        return KernelSymbol(Address(self._addresses[index]), self._letters[index], self._names[index])

    def symbols(self) -> tuple[KernelSymbol, ...]:
        """Every symbol in table order."""
        return tuple(self._symbol(i) for i in range(len(self)))

    def named(self, name: str) -> tuple[KernelSymbol, ...]:
        """All symbols of that name, in ``sympos`` order (``sympos`` 1 is the first); empty when unknown."""
        first = self._find(name)
        if first is None:
            return ()
        rows = self._repeated.get(first, (first,))
        return tuple(KernelSymbol(Address(self._addresses[i]), self._letters[i], name) for i in rows)

    def at(self, address: int) -> tuple[KernelSymbol, ...]:
        """All symbols that lie exactly at the address (aliases), in table order."""
        start, end = bisect_left(self._addresses, address), bisect_right(self._addresses, address)
        return tuple(self._symbol(i) for i in range(start, end))

    def covering(self, address: int) -> KernelSymbol | None:
        """The last symbol at or below the address (the first of its aliases); None below the kernel."""
        i = bisect_right(self._addresses, address) - 1
        if i < self._first_code:
            return None
        return self._symbol(bisect_left(self._addresses, self._addresses[i]))

    def next_after(self, address: int) -> int | None:
        """The address of the first symbol strictly above ``address``."""
        i = bisect_right(self._addresses, address)
        return self._addresses[i] if i < len(self._addresses) else None


def load(target: Target) -> Table:
    """Read the table that :func:`build_index` wrote.

    Raises:
        Failed: (rule ``no-kallsyms``) the target has none, or it is damaged.
    """
    return load_file(target.folder / FILE)


def load_file(path: Path) -> Table:
    """As :func:`load`, from any file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    if len(data) < _HEADER.size:
        raise _unusable(path, "it is truncated")
    magic, count, name_bytes, repeated_count = _HEADER.unpack_from(data)
    ends = [_HEADER.size, 8 * count, count, name_bytes, 4 * repeated_count]
    for i in range(1, len(ends)):
        ends[i] += ends[i - 1]
    if magic != _MAGIC or ends[-1] != len(data):
        raise _unusable(path, "it has another form or is truncated")
    view = memoryview(data)
    addresses, repeated = array("Q"), array("I")
    addresses.frombytes(view[ends[0] : ends[1]])
    repeated.frombytes(view[ends[3] : ends[4]])
    if sys.byteorder == "big":
        addresses.byteswap()
        repeated.byteswap()
    letters = str(view[ends[1] : ends[2]], "ascii")
    names = bytes(view[ends[2] : ends[3]])
    if names.count(b"\n") != max(count - 1, 0):
        raise _unusable(path, "its names do not match its addresses")
    return Table(addresses, letters, names, repeated)


def _unusable(path: Path, why: str) -> Failed:
    return Failed(
        f"{path} (the kernel's symbol table) cannot be used",
        why=why,
        next_step="prepare the target again: `kmend kernel fetch RELEASE`",
        rule="no-kallsyms",
    )


def encode(symbols: list[tuple[int, str, str]]) -> bytes:
    """Rows (address, letter, name) in table order as the bytes of ``kallsyms.bin``."""
    places: dict[str, list[int]] = {}
    for i, (_, _, name) in enumerate(symbols):
        places.setdefault(name, []).append(i)
    repeated = array("I")
    for group in places.values():
        if len(group) > 1:
            repeated.append(len(group))
            repeated.extend(group)
    addresses = array("Q", (row[0] for row in symbols))
    if sys.byteorder == "big":
        addresses.byteswap()
        repeated.byteswap()
    names = "\n".join(row[2] for row in symbols).encode()
    letters = "".join(row[1] for row in symbols).encode("ascii")
    header = _HEADER.pack(_MAGIC, len(symbols), len(names), len(repeated))
    return b"".join((header, addresses.tobytes(), letters, names, repeated.tobytes()))


def build_index(target: Target, progress: Progress) -> None:
    """Decode the image's kallsyms, hold them against what else is known of the image, write ``kallsyms.bin``.

    Raises:
        Failed: (rule ``kallsyms``) no table was found in the image, or it contradicts the image's
            sections, its banner or the exported names: then the reading is wrong and nothing may use it.
    """
    progress.step(f"reading the symbol table of {target.release}")
    result = run(
        [sys.executable, "-P", "-m", "kmend.kernel.kallsyms_finder", str(target.vmlinux)],
        # the Debian package's folder is on no interpreter's path; -P: nor is the current one to be
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=300,
        check=False,
    )
    if result.status != 0:
        tail = result.errors.strip().splitlines()[-1:]
        raise _wrong(target, f"vmlinux-to-elf: {tail[0] if tail else f'status {result.status}'}")
    rows = []
    for line in result.text.splitlines():
        address, letter, name = line.split(" ", 2)
        rows.append((int(address, 16), letter, name))
    check(target, rows)
    write_atomically(target.folder / FILE, encode(rows))


def _wrong(target: Target, why: str) -> Failed:
    return Failed(
        f"the symbol table of {target.vmlinux} could not be read reliably",
        why=why,
        next_step="check that the image is complete and that its kernel has CONFIG_KALLSYMS_ALL",
        rule="kallsyms",
    )


def check(target: Target, rows: list[tuple[int, str, str]]) -> None:
    """Hold a decoded table against independent knowledge of the image.

    - sorted by address, as scripts/kallsyms.c sorts it (what ``sympos`` is counted in);
    - ``_text`` and ``_stext`` where ``.text`` begins, ``_etext`` at its end, ``__init_begin`` and the
      section borders inside of the image, ``linux_banner`` at the bytes of the target's banner;
    - every text symbol inside of an executable section;
    - every name that Module.symvers says vmlinux exports is there;
    - the two ``__ksymtab`` tables, resolved through their own relative offsets, name the same
      addresses (a shifted table could not pass).

    Raises:
        Failed: (rule ``kallsyms``) with the first contradiction.
    """
    if len(rows) < 1000:
        raise _wrong(target, f"only {len(rows)} symbols were found")
    for (low, _, before), (high, _, name) in pairwise(rows):
        if low > high:
            raise _wrong(target, f"{name} ({high:#x}) stands after {before} ({low:#x}): not sorted")
    places: dict[str, list[int]] = {}
    for address, _, name in rows:
        places.setdefault(name, []).append(address)
    with Image.open(target.vmlinux) as image:
        text = image.section(".text")
        if text is None:
            raise _wrong(target, "the image has no .text")
        for name, expected in (("_text", text.address), ("_stext", text.address)):
            if places.get(name) != [expected]:
                raise _wrong(target, f"{name} is {_hex(places.get(name))}, .text begins at {expected:#x}")
        banner = places.get("linux_banner")
        if banner is None or len(banner) != 1:
            raise _wrong(target, "there is no linux_banner")
        wanted = target.banner.encode()
        try:
            found = image.read(banner[0], len(wanted))
        except Failed as error:
            raise _wrong(target, f"linux_banner: {error.what}: {error.why}") from error
        if found != wanted:
            raise _wrong(target, f"linux_banner ({banner[0]:#x}) does not hold the target's banner")
        for address, letter, name in rows:
            if letter in "tT" and address >= _KERNEL_HALF:
                section = image.section_at(address)
                # A label at the very end of a section (_etext, __end_*) lies in none.
                if section is None and image.section_at(address - 1) is None:
                    raise _wrong(target, f"{name} ({address:#x}, text) lies outside of the image")
        _check_exports(target, image, places)


def _check_exports(target: Target, image: Image, places: dict[str, list[int]]) -> None:
    exports = symvers.load(target.symvers)
    names = exports.of(VMLINUX)
    missing = [name for name in names if name not in places]
    if missing or not names:
        why = f"vmlinux exports {missing[0]} ({len(missing)} in all are missing)" if names else "no export"
        raise _wrong(target, f"{why}, says {target.symvers}")
    # struct kernel_symbol with CONFIG_HAVE_ARCH_PREL32_RELOCATIONS (include/linux/export.h): three
    # 32-bit offsets relative to themselves: value, name, namespace.
    strings = image.section("__ksymtab_strings")
    compared = 0
    for table in ("__ksymtab", "__ksymtab_gpl"):
        section, data = image.section(table), image.contents(table)
        if section is None or strings is None or len(data) % 12:
            continue
        texts = image.contents("__ksymtab_strings")
        for i, (value, name, _) in enumerate(struct.iter_unpack("<iii", data)):
            place = section.address + 12 * i
            start = place + 4 + name - strings.address
            if not 0 <= start < len(texts):
                raise _wrong(target, f"{table} entry {i} has no name in __ksymtab_strings")
            symbol = texts[start : texts.index(b"\0", start)].decode()
            address = (place + value) & (1 << 64) - 1
            if address not in places.get(symbol, ()):
                raise _wrong(target, f"{symbol} is exported at {address:#x}, {_hex(places.get(symbol))} here")
            compared += 1
    if compared == 0:
        raise _wrong(target, "the image has no __ksymtab to compare the table with")


def _hex(addresses: list[int] | None) -> str:
    return ", ".join(f"{a:#x}" for a in addresses) if addresses else "absent"
