"""Starting the unpacked kernel, as the kernel's own unpacker would have left it.

More than half of a boot under TCG is the unpacking of the vmlinuz (3.5 of 6 s). QEMU can start an unpacked
image by its PVH entry (``arch/x86/platform/pvh/head.S``), so this module does the unpacker's last work on
the host: it moves the kernel to a random address, applying the table of relocations that lies behind the ELF
image in the vmlinuz (``handle_relocations()`` in ``arch/x86/boot/compressed/misc.c``, written by
``arch/x86/tools/relocs.c``). Without that, an address that a module wrongly holds as a constant would fit in
the lab and nowhere else. What is not done: the kernel knows of no KASLR, so the direct mapping and the module
area stay where they are by default, and an oops says "Kernel Offset: disabled".
"""

from __future__ import annotations

import secrets
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path

from kmend.core.errors import Failed

#: ``__START_KERNEL_map`` (arch/x86/include/asm/page_64_types.h): link addresses are physical ones plus this.
START_KERNEL_MAP = 0xFFFFFFFF80000000
PT_LOAD, PT_NOTE = 1, 4
#: ``XEN_ELFNOTE_PHYS32_ENTRY`` (include/xen/interface/elfnote.h): the physical address of the PVH entry.
PHYS32_ENTRY = 18
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_NOTE = struct.Struct("<III")
_WORD, _LONG = struct.Struct("<I"), struct.Struct("<Q")
_XEN = b"Xen\0"


@dataclass(frozen=True, slots=True)
class _Layout:
    """``loads`` and ``notes``: offset in the file, physical address, size in the file and in memory."""

    loads: tuple[tuple[int, int, int, int], ...]
    notes: tuple[tuple[int, int, int, int], ...]
    align: int
    end: int

    @property
    def low(self) -> int:
        return min(physical for _, physical, _, _ in self.loads)

    @property
    def high(self) -> int:
        return max(physical + size for _, physical, _, size in self.loads)


def possible(vmlinux: Path) -> bool:
    """Whether that image has a PVH entry and a table of relocations. Reads little of it."""
    try:
        with vmlinux.open("rb") as file:
            layout = _layout(file.read(4096))
            size = file.seek(0, 2)
            if layout is None or size < layout.end + 12 or (size - layout.end) % 4:
                return False
            for offset, _, length, _ in layout.notes:
                file.seek(offset)
                if _entry(file.read(min(length, 65536))) is not None:
                    return True
    except OSError:
        return False
    return False


def moved(vmlinux: Path, memory: int, distance: int | None = None) -> bytes:
    """An ELF file with one segment and a PVH entry: the kernel, moved as KASLR would.

    ``memory`` is the guest's in bytes. ``distance`` in bytes is drawn at random, never 0, unless given.

    Raises:
        Failed: the image is damaged, or was no such image (see :func:`possible`).
    """
    try:
        data = vmlinux.read_bytes()
    except OSError as error:
        raise _bad(vmlinux, error.strerror or str(error)) from error
    layout = _layout(data[:4096])
    if layout is None:
        raise _bad(vmlinux, "it is no unpacked kernel")
    low, high = layout.low, layout.high
    if distance is None:
        # the lower half of the memory: QEMU puts the initramfs at its upper end
        slots = (memory // 2 - high) // layout.align
        if slots < 1:
            raise _bad(vmlinux, f"it does not fit into {memory >> 20} MB")
        distance = (1 + secrets.randbelow(slots)) * layout.align
    image = bytearray(high - low)
    for offset, physical, size, _ in layout.loads:
        image[physical - low : physical - low + size] = data[offset : offset + size]
    try:
        _relocate(image, low, array("I", data[layout.end :]), distance)
        entries = [
            (_entry(data[offset : offset + size]), _entry(bytes(image[at - low : at - low + size])))
            for offset, at, size, _ in layout.notes
        ]
    except (struct.error, IndexError, ValueError) as error:
        raise _bad(vmlinux, "its table of relocations is damaged") from error
    for before, after in entries:
        if before is not None and after is not None:
            # the note itself is relocated where the kernel's build lists it
            return _elf(image, low + distance, after if after != before else after + distance)
    raise _bad(vmlinux, "it has no PVH entry")


def stub() -> bytes:
    """What a restored machine is given for a kernel: the same kind of file makes QEMU build the same machine.

    Nothing of it is ever executed; the kernel is in the snapshot's memory.
    """
    return _elf(bytearray(b"\xf4" * 16), 0x1000000, 0x1000000)


def _relocate(image: bytearray, low: int, table: array[int], distance: int) -> None:
    """Apply the table from its end: 32-bit places, a zero, 32-bit ones to decrease, a zero, 64-bit ones."""
    base = (START_KERNEL_MAP & 0xFFFFFFFF) + low
    at = len(table)
    for form, mask, change in (
        (_WORD, 0xFFFFFFFF, distance),
        (_WORD, 0xFFFFFFFF, -distance),
        (_LONG, 0xFFFFFFFFFFFFFFFF, distance),
    ):
        unpack, pack = form.unpack_from, form.pack_into
        while True:
            at -= 1
            if at < 0:
                raise ValueError("the table has no end")
            place = table[at]
            if place == 0:
                break
            place -= base
            if place < 0:
                raise ValueError("a place outside of the kernel")
            pack(image, place, unpack(image, place)[0] + change & mask)


def _layout(head: bytes) -> _Layout | None:
    """The program headers, from the file's first bytes; None when it is no 64-bit x86 kernel image."""
    if len(head) < _EHDR.size or head[:6] != b"\x7fELF\x02\x01":
        return None
    fields = _EHDR.unpack_from(head)
    machine, phoff, shoff, phentsize, phnum, shentsize, shnum = (fields[i] for i in (2, 5, 6, 9, 10, 11, 12))
    if machine != 62 or phentsize != _PHDR.size or phoff + phnum * phentsize > len(head):
        return None
    rows = [_PHDR.unpack_from(head, phoff + n * phentsize) for n in range(phnum)]
    loads = tuple((row[2], row[4], row[5], row[6]) for row in rows if row[0] == PT_LOAD)
    notes = tuple((row[2], row[4], row[5], row[6]) for row in rows if row[0] == PT_NOTE)
    if not loads or not notes:
        return None
    align = max(row[7] for row in rows if row[0] == PT_LOAD)
    end = max(shoff + shentsize * shnum, *(offset + size for offset, _, size, _ in loads))
    return _Layout(loads, notes, align, end) if align else None


def _entry(notes: bytes) -> int | None:
    """The PVH entry's physical address, if one of the notes is that one."""
    at = 0
    while at + _NOTE.size <= len(notes):
        name_size, size, kind = _NOTE.unpack_from(notes, at)
        name = at + _NOTE.size
        value = name + (name_size + 3 & ~3)
        if kind == PHYS32_ENTRY and notes[name : name + name_size] == _XEN and value + size <= len(notes):
            return int.from_bytes(notes[value : value + size], "little")
        at = value + (size + 3 & ~3)
    return None


def _elf(image: bytearray, physical: int, entry: int) -> bytes:
    """The smallest ELF file that QEMU loads at ``physical`` and enters at ``entry``."""
    note = _NOTE.pack(len(_XEN), 8, PHYS32_ENTRY) + _XEN + _LONG.pack(entry)
    place = 4096
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    head = _EHDR.pack(ident, 2, 62, 1, entry, _EHDR.size, 0, 0, _EHDR.size, _PHDR.size, 2, 64, 0, 0)
    virtual = START_KERNEL_MAP + physical
    at = _EHDR.size + 2 * _PHDR.size
    head += _PHDR.pack(PT_LOAD, 7, place, virtual, physical, len(image), len(image), 4096)
    head += _PHDR.pack(PT_NOTE, 4, at, 0, 0, len(note), len(note), 4)
    return b"".join(((head + note).ljust(place, b"\0"), image))


def _bad(vmlinux: Path, why: str) -> Failed:
    return Failed(
        f"{vmlinux} cannot be started",
        why=why,
        next_step="fetch the kernel again with `kmend kernel fetch`",
        rule="no-lab-kernel",
    )
