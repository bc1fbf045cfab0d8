"""Is the code that runs the code that was proved? The functions to be replaced, byte by byte.

What is compared: the bytes of each function in the running kernel's memory (``/proc/kcore``) with those of
the kernel's image of the same build id, moved by the distance that KASLR has moved it. Left out are only the
bytes that the kernel rewrites itself, each one listed in the image: alternatives, jump labels, static calls,
retpolines and returns, paravirt calls, lock prefixes, call thunks, IBT seals, run-time constants, and the
ftrace entry (``arch/x86/kernel/alternative.c``, ``kernel/jump_label.c``, ``kernel/static_call_inline.c``,
``kernel/trace/ftrace.c``). A function of a module is compared with its file, relocated fields left out.

Held against every function of running stock kernels: see ``tests/lab/test_runtime_code.py``.
"""

from __future__ import annotations

import os
import re
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path

from kmend.core.errors import KmendError, Refusal, Unable
from kmend.core.live import Check, KernelState
from kmend.core.target import VMLINUX
from kmend.elf.model import STT_FUNC, ElfFile
from kmend.elf.reader import read
from kmend.elf.x86_64 import ROWS
from kmend.kernel.image import extract_vmlinux, read_build_id
from kmend.kernel.modules import unpack
from kmend.kernel.vmlinux import Image
from kmend.module.layout import Layout
from kmend.runtime.btf import structures
from kmend.runtime.kcore import RunningMemory
from kmend.runtime.place import Place, data, optional
from kmend.runtime.preflight import Wanted
from kmend.runtime.probes import read_probes, replaced
from kmend.runtime.symbols import RunningSymbol, SymbolTable

#: Addresses in the image's table of relocations have their upper half cut off.
_UPPER = 0xFFFFFFFF00000000
#: What is rewritten at a place; kinds are small numbers, so that places of all tables sort as integers.
_CALL, _LOCK, _SEAL, _WORD, _ENTRY, _JUMP_LABEL, _OTHER = range(7)
_KINDS = 8
_LENGTHS = {_LOCK: 1, _SEAL: 4, _WORD: 8, _ENTRY: 5}
#: Tables of ``s32`` distances from the entry itself to the place, by section.
_DISTANCES = {
    ".retpoline_sites": _CALL,
    ".return_sites": _CALL,
    ".call_sites": _CALL,
    ".smp_locks": _LOCK,
    ".ibt_endbr_seal": _SEAL,
    ".cfi_sites": _CALL,
}
#: struct alt_instr: 12 bytes up to 6.2, 14 since; the length of the instruction is the last byte but one.
_ALT_SIZES = (12, 14)
_PARAVIRT = struct.Struct("<QBB6x")
_JUMP = struct.Struct("<iiq")
_STATIC_CALL = struct.Struct("<ii")
#: A static call's trampoline: a jump that the kernel redirects, and a mark (asm/static_call.h).
_TRAMPOLINE = 8


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a function differs first: offset in bytes, what runs, what the image has."""

    name: str
    object: str
    offset: int
    running: bytes
    image: bytes


@dataclass(slots=True)
class Compared:
    """What was compared, in numbers: ``left_out`` are bytes that the kernel rewrites itself."""

    functions: int = 0
    size: int = 0
    left_out: int = 0
    differences: list[Difference] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


class Rewritten:
    """The places of an image that the kernel rewrites, and those that it relocates."""

    def __init__(self, image: Image, bounds: Callable[[str], int | None]) -> None:
        """``bounds`` gives the link-time address of a symbol (``__start___jump_table``), if there is one."""
        self._image = image
        #: lengths of those places whose kind does not tell
        self._lengths: dict[int, int] = {}
        self._places = sorted(
            chain(self._distances(), self._alternatives(), self._paravirt(), self._tables(bounds))
        )
        self._relocated = _relocations(image)

    def offsets(self, address: int, size: int) -> frozenset[int]:
        """Offsets in the function at the link-time address that the kernel may rewrite."""
        # an alternative's length is one byte: none begins farther in front
        first = bisect_left(self._places, (address - 256) * _KINDS)
        last = bisect_left(self._places, (address + size) * _KINDS)
        out: set[int] = set()
        for row in self._places[first:last]:
            start, kind = divmod(row, _KINDS)
            length = self._length(start, kind)
            out.update(range(max(start - address, 0), min(start - address + length, size)))
        return frozenset(out)

    def moved(self, code: bytes, address: int, distance: int) -> bytes:
        """The function's bytes as they are when the kernel lies ``distance`` bytes higher."""
        out = bytearray(code)
        for places, width, sign in self._relocated:
            at = bisect_left(places, address)
            while at < len(places) and places[at] + width <= address + len(code):
                place = places[at] - address
                value = int.from_bytes(out[place : place + width], "little") + sign * distance
                out[place : place + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
                at += 1
        return bytes(out)

    def _length(self, place: int, kind: int) -> int:
        """How many bytes are rewritten there."""
        if kind == _CALL:  # a call, jump or conditional jump, perhaps behind a CS prefix
            code = self._image.read(place, 2)
            if code[0] == 0x2E:
                return 7 if code[1] == 0x0F else 6
            return 6 if code[0] == 0x0F else 5
        if kind == _JUMP_LABEL:  # a jump or a NOP of 2 or 5 bytes
            code = self._image.read(place, 2)
            return 2 if code == b"\x66\x90" or code[0] == 0xEB else 5
        return self._lengths[place] if kind == _OTHER else _LENGTHS[kind]

    def _distances(self) -> Iterator[int]:
        for section in self._image.sections:
            kind = _WORD if section.name.startswith("runtime_") else _DISTANCES.get(section.name)
            if kind is None or section.nobits:
                continue
            table = array("i", self._image.contents(section.name)[: section.size // 4 * 4])
            base = section.address
            yield from [(base + 4 * at + value) * _KINDS + kind for at, value in enumerate(table)]

    def _alternatives(self) -> Iterator[int]:
        section = self._image.section(".altinstructions")
        if section is None:
            return
        contents = self._image.contents(section.name)
        for size in _ALT_SIZES:
            rows = list(self._alternative_rows(section.address, contents, size))
            if len(contents) % size == 0 and all(self._executable(place) for place, _ in rows):
                yield from self._others(rows)
                return
        raise Unable("the image's table of alternatives has an unknown form", rule="no-kcore")

    def _others(self, rows: Iterable[tuple[int, int]]) -> Iterator[int]:
        for place, length in rows:
            self._lengths[place] = max(length, self._lengths.get(place, 0))
            yield place * _KINDS + _OTHER

    @staticmethod
    def _alternative_rows(address: int, contents: bytes, size: int) -> Iterator[tuple[int, int]]:
        for at in range(0, len(contents) - size + 1, size):
            distance = int.from_bytes(contents[at : at + 4], "little", signed=True)
            yield address + at + distance, contents[at + size - 2]

    def _executable(self, place: int) -> bool:
        section = self._image.section_at(place)
        return section is not None and section.executable

    def _paravirt(self) -> Iterator[int]:
        contents = self._image.contents(".parainstructions")
        whole = len(contents) // _PARAVIRT.size * _PARAVIRT.size
        return self._others((row[0], row[2]) for row in _PARAVIRT.iter_unpack(contents[:whole]))

    def _tables(self, bounds: Callable[[str], int | None]) -> Iterator[int]:
        """Tables inside of other sections, found by the symbols around them."""
        for start, contents in self._between(bounds, "__start___jump_table", "__stop___jump_table"):
            for at, (distance, _, _) in enumerate(_JUMP.iter_unpack(contents)):
                yield (start + at * _JUMP.size + distance) * _KINDS + _JUMP_LABEL
        for start, contents in self._between(bounds, "__start_static_call_sites", "__stop_static_call_sites"):
            for at, (distance, _) in enumerate(_STATIC_CALL.iter_unpack(contents)):
                yield (start + at * _STATIC_CALL.size + distance) * _KINDS + _CALL
        for start, contents in self._between(bounds, "__static_call_text_start", "__static_call_text_end"):
            for at in range(0, len(contents), _TRAMPOLINE):
                yield (start + at) * _KINDS + _ENTRY
        for _, contents in self._between(bounds, "__start_mcount_loc", "__stop_mcount_loc"):
            yield from [place * _KINDS + _ENTRY for place in array("Q", contents)]

    def _between(
        self, bounds: Callable[[str], int | None], first: str, last: str
    ) -> Iterator[tuple[int, bytes]]:
        start, stop = bounds(first), bounds(last)
        if start is not None and stop is not None and stop > start:
            yield start, self._image.read(start, stop - start)


def _relocations(image: Image) -> tuple[tuple[Sequence[int], int, int], ...]:
    """(places, width, sign) from the table behind the image (``handle_relocations()``, written by
    ``arch/x86/tools/relocs.c``): read from its end, three lists, each ended by a zero.
    """
    raw = image.trailer()
    table = array("I", raw[: len(raw) // 4 * 4])
    found = []
    at = len(table)
    for width, sign in ((4, 1), (4, -1), (8, 1)):
        places = []
        while at > 0:
            at -= 1
            if table[at] == 0:
                break
            places.append(_UPPER | table[at])
        found.append((sorted(places), width, sign))
    return tuple(found)


class Linked:
    """Link-time addresses of the running kernel's symbols.

    ``distance`` is how far KASLR has moved it, in bytes: its ``_text`` against the image's.
    """

    def __init__(self, table: SymbolTable, image: Image) -> None:
        """
        Raises:
            Unable: (rule ``no-kcore``) there is no telling where the kernel lies.
        """
        self._table = table
        section = image.section(".text")
        rows = [row for row in table.named("_text") if row.object == VMLINUX]
        if section is None or len(rows) != 1:
            raise Unable("the running kernel's place in memory is not known", rule="no-kcore")
        self.distance = rows[0].address - section.address

    def __call__(self, name: str) -> int | None:
        """The address of the symbol of that name; None: there is none, or several."""
        rows = [row for row in self._table.named(name) if row.object == VMLINUX]
        return rows[0].address - self.distance if len(rows) == 1 else None


class RunningCode:
    """Compares functions of the running kernel with its image and its modules' files."""

    def __init__(
        self,
        place: Place,
        image: Image,
        module: Callable[[str], ElfFile | None],
        table: SymbolTable | None = None,
    ) -> None:
        """``table`` is the kernel's symbol table when it has been read already.

        Raises:
            Unable: memory or symbols of the running kernel cannot be read, or the image is another.
        """
        self._place, self._image, self._module = place, image, module
        self._table = table or SymbolTable(place)
        self._memory = RunningMemory(place)
        try:
            self._linked = Linked(self._table, image)
            self._distance = self._linked.distance
            self._rewritten = Rewritten(image, self._linked)
        except BaseException:
            self._memory.close()
            raise
        self._probes = read_probes(place) or ()
        self._starts: list[int] = []

    def close(self) -> None:
        """Let go of the running kernel's memory."""
        self._memory.close()

    def compare(self, wanted: Iterable[Wanted]) -> Compared:
        """Compare each function; what cannot be is named with the reason."""
        found = Compared()
        modules: dict[str, _ModuleCode | str] = {}
        for row in wanted:
            if row.object != VMLINUX:
                if row.object not in modules:
                    modules[row.object] = self._of_module(row.object)
                code = modules[row.object]
                if isinstance(code, str):
                    found.skipped[f"{row.object}:{row.name}"] = code
                    continue
            symbols = [one for one in self._table.named(row.name) if one.object == row.object]
            at = max(row.sympos, 1) - 1
            if at >= len(symbols):
                found.skipped[f"{row.object}:{row.name}"] = "there is no such symbol"
                continue
            try:
                if row.object == VMLINUX:
                    self._of_image(symbols[at], found)
                elif isinstance(code, _ModuleCode):
                    self._in_module(code, row, at, symbols[at], found)
            except KmendError as error:
                found.skipped[f"{row.object}:{row.name}"] = f"{error.what} ({error.why})"
        return found

    def all_functions(self) -> Compared:
        """Every function of the image's ``.text``: what the tests hold the rules above against."""
        found = Compared()
        section = self._image.section(".text")
        assert section is not None
        low = section.address + self._distance
        self._starts = self._table.starts()
        for start in self._starts:
            if low <= start < low + section.size:
                self._of_image(RunningSymbol(start, "t", f"{start:#x}", VMLINUX), found)
        return found

    def _of_image(self, symbol: RunningSymbol, found: Compared) -> None:
        linked = symbol.address - self._distance
        section = self._image.section_at(linked)
        if section is None:
            raise Unable(f"{symbol.name} is not in the image", rule="no-kcore")
        # what lies between the last function and the section's end is nobody's
        size = min(self._size(symbol.address), section.address + section.size - linked)
        code = self._rewritten.moved(self._image.read(linked, size), linked, self._distance)
        self._judge(symbol, code, self._rewritten.offsets(linked, size), found)

    def _size(self, address: int) -> int:
        """Up to the next symbol, as kallsyms_lookup_size_offset() has it."""
        if self._starts:  # every function is asked for: searching the text for each would take hours
            at = bisect_right(self._starts, address)
            after = self._starts[at] if at < len(self._starts) else None
        else:
            after = self._table.after(address)
        if after is None:
            raise Unable(f"the end of the function at {address:#x} is not known", rule="no-kcore")
        return after - address

    def _judge(self, symbol: RunningSymbol, code: bytes, left_out: frozenset[int], found: Compared) -> None:
        running = self._memory.read(symbol.address, len(code))
        left_out |= replaced(self._probes, symbol.address, len(code))
        found.functions += 1
        found.size += len(code)
        found.left_out += len(left_out)
        if running == code:
            return
        for at, (ours, theirs) in enumerate(zip(code, running, strict=True)):
            if ours != theirs and at not in left_out:
                found.differences.append(
                    Difference(symbol.name, symbol.object, at, running[at : at + 8], code[at : at + 8])
                )
                return

    # -- modules ------------------------------------------------------------------------------------

    def _of_module(self, name: str) -> _ModuleCode | str:
        file = self._module(name)
        if file is None:
            return "the module's file is not known"
        same = is_loaded_from(self._place, name, file)
        if same is None:
            return "the module is not loaded"
        if not same:
            return "the loaded module is not the one of the file"
        return _ModuleCode(file)

    def _in_module(
        self, code: _ModuleCode, row: Wanted, at: int, symbol: RunningSymbol, found: Compared
    ) -> None:
        place = code.function(row.name, at)
        if place is None:
            found.skipped[f"{row.object}:{row.name}"] = "the module's file has no such function"
            return
        section, start, size = place
        self._judge(
            symbol,
            code.elf.sections[section].data[start : start + size],
            code.offsets(section, start, size),
            found,
        )


class _ModuleCode:
    """A module's file: its functions, and the bytes of them that its loading changes."""

    def __init__(self, elf: ElfFile) -> None:
        self.elf = elf
        self._sites: dict[int, list[tuple[int, int]]] = {}
        for section in elf.sections:
            for reloc in section.relocs:
                symbol = elf.symbols[reloc.symbol]
                self._sites.setdefault(section.index, []).append((reloc.offset, ROWS[reloc.type].size))
                # tables of sites lead from their entries into the code
                if symbol.defined and section.name in _TABLES:
                    length = self._length(section.name, section.data, reloc.offset)
                    if length:
                        place = symbol.value + reloc.addend
                        self._sites.setdefault(symbol.section, []).append((place, length))

    @staticmethod
    def _length(name: str, table: bytes, at: int) -> int:
        """How many bytes a table's entry covers whose relocation is at ``at``; 0: it is no site."""
        match name:
            case ".altinstructions":
                for size in _ALT_SIZES:
                    if len(table) % size == 0:
                        return table[at + size - 2] if at % size == 0 else 0
                return 0
            case ".parainstructions":
                return table[at + 9] if at % _PARAVIRT.size == 0 else 0
            case "__jump_table":
                return 5 if at % _JUMP.size == 0 else 0
            case ".static_call_sites":
                return 6 if at % _STATIC_CALL.size == 0 else 0
            case ".smp_locks":
                return 1
            case ".ibt_endbr_seal":
                return 4
            case "__mcount_loc":
                return 5
            case _:
                return 7  # a CS prefix and the longest of the jumps: retpolines, returns, call thunks

    def function(self, name: str, at: int) -> tuple[int, int, int] | None:
        """Section, start and size of the ``at``-th function of that name."""
        rows = [s for s in self.elf.symbols if s.name == name and s.type == STT_FUNC and s.defined]
        return (rows[at].section, rows[at].value, rows[at].size) if at < len(rows) else None

    def offsets(self, section: int, start: int, size: int) -> frozenset[int]:
        """Offsets in a function that loading the module changes."""
        out: set[int] = set()
        for place, length in self._sites.get(section, ()):
            out.update(range(max(place - start, 0), min(place - start + length, size)))
        return frozenset(out)


_TABLES = frozenset(
    {
        *(".altinstructions", ".parainstructions", "__jump_table", ".static_call_sites", ".smp_locks"),
        *(".retpoline_sites", ".return_sites", ".call_sites", ".ibt_endbr_seal", "__mcount_loc"),
    }
)


def layout(place: Place) -> Layout:
    """The part of the livepatch structures' layout that reading a module's descriptors needs, from the BTF of
    the running kernel, and that of ``struct modversion_info``. What has to do with building modules is 0.

    Raises:
        Unable: (rule ``no-btf``) the kernel shows no BTF, or its structures are not there.
    """
    found = structures(place, ("klp_patch", "klp_object", "klp_func", "klp_callbacks", "modversion_info"))
    version = found.get("modversion_info")
    try:
        patch, obj, func, calls = (
            found[name] for name in ("klp_patch", "klp_object", "klp_func", "klp_callbacks")
        )
        known = {
            "patch_size": patch.size,
            "patch_mod": patch.members["mod"],
            "patch_objs": patch.members["objs"],
            "patch_replace": patch.members["replace"],
            "object_size": obj.size,
            "object_name": obj.members["name"],
            "object_funcs": obj.members["funcs"],
            "func_size": func.size,
            "func_old_name": func.members["old_name"],
            "func_new_func": func.members["new_func"],
            "func_old_sympos": func.members["old_sympos"],
            "callbacks": obj.members["callbacks"],
            **{name: calls.members[name] for name in _CALLBACKS},
            "version_size": version.size if version else 0,
            "version_name": version.members["name"] if version else 0,
        }
    except KeyError as error:
        raise Unable(
            "the running kernel's livepatch structures are not known", why=f"no {error}", rule="no-btf"
        ) from error
    return Layout(**{row.name: known.get(row.name, 0) for row in fields(Layout)})


_CALLBACKS = ("pre_patch", "post_patch", "pre_unpatch", "post_unpatch")


def boot_image(release: str, wanted: str, boot: Path = Path("/boot")) -> Image:
    """The unpacked image of the kernel that runs, from ``/boot``, as a file in memory.

    Raises:
        Unable: it is not there, or of another build than ``wanted`` (rule ``no-image``); or nothing here can
            unpack it (``missing-tool``).
        Failed: it is damaged.
    """
    path = boot / f"vmlinuz-{release}"
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise Unable(f"{path} cannot be read", why=error.strerror or str(error), rule="no-image") from error
    vmlinux = extract_vmlinux(packed)
    found = read_build_id(vmlinux)
    if found != wanted:
        raise Unable(
            f"{path} is another build than the kernel that runs",
            why=f"its build id is {found[:12]}…, the running kernel's {wanted[:12]}…",
            rule="no-image",
        )
    fd = os.memfd_create("kmend-vmlinux", os.MFD_CLOEXEC)
    try:
        view = memoryview(vmlinux)
        while view:
            view = view[os.write(fd, view) :]
        return Image.open(Path(f"/proc/self/fd/{fd}"))
    finally:
        os.close(fd)


def module_file(release: str, name: str, modules: Path = Path("/lib/modules")) -> ElfFile | None:
    """A module of the running kernel, found by ``modules.dep``; None: not there, or not readable."""
    folder = modules / release
    stem = re.escape(name).replace("_", "[-_,]")  # as kmend.kernel.symvers.module_name()
    try:
        listed = (folder / "modules.dep").read_text()
        row = re.search(rf"^((?:[^:\n]*/)?{stem}\.ko(?:\.\w+)?):", listed, re.MULTILINE)
        return read(unpack(folder / row[1]), name) if row else None
    except (OSError, ValueError, KmendError):
        return None


def is_loaded_from(place: Place, name: str, file: ElfFile) -> bool | None:
    """Whether the loaded module is known by its build id to be that of the file; None: there is none loaded.

    Raises:
        Unable: this user may not look.
    """
    shown = data(place.module(name) / "notes/.note.gnu.build-id")
    if shown is None:
        return None if optional(place.module(name) / "initstate") is None else False
    note = file.section(".note.gnu.build-id")
    return note is not None and note.data == shown


class OwnFiles:
    """The files that the running kernel was started from, as its packages have them; each is read once."""

    def __init__(
        self, kernel: KernelState, boot: Path = Path("/boot"), modules: Path = Path("/lib/modules")
    ) -> None:
        self._kernel, self._boot, self._folder = kernel, boot, modules
        self._image: Image | KmendError | None = None
        self._modules: dict[str, ElfFile | None] = {}

    def image(self) -> Image:
        """As :func:`boot_image`."""
        if self._image is None:
            try:
                self._image = boot_image(self._kernel.release, self._kernel.build_id, self._boot)
            except KmendError as error:
                self._image = error
        if isinstance(self._image, KmendError):
            raise self._image
        return self._image

    def module(self, name: str) -> ElfFile | None:
        """As :func:`module_file`."""
        if name not in self._modules:
            self._modules[name] = module_file(self._kernel.release, name, self._folder)
        return self._modules[name]


def checks(found: Compared) -> Iterator[Check]:
    """The comparison as rows of a load's checks."""
    for row in found.differences:
        yield Check(
            "running code",
            False,
            f"{row.name} differs",
            Refusal(
                "running-code",
                f"{row.name}() as it runs is not that of {row.object}'s own file",
                f"at offset {row.offset:#x} it has {row.running.hex(' ')} instead of {row.image.hex(' ')}: "
                "something has changed the kernel's code (a debugger, a rootkit; a kprobe, if debugfs is not "
                "mounted and does not show it), or memory is damaged",
                "find out what changed it before patching it",
            ),
        )
    if found.functions and not found.differences:
        yield Check(
            "running code",
            True,
            f"{found.functions} functions, {found.size} bytes: the running code is the image's "
            f"({found.left_out} bytes that the kernel rewrites itself left out)",
        )
    for name, why in found.skipped.items():
        yield Check(f"running code of {name}", None, why)
