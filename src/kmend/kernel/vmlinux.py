"""The target's vmlinux: bytes by link-time address and by section.

``scripts/extract-vmlinux`` yields a file with section headers and no symbol table;
symbols come from :mod:`kmend.kernel.kallsyms`. The file (65 MB) is mapped, not read.
"""

from __future__ import annotations

import mmap
import os
import struct
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from kmend.core.errors import Failed

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_EM_X86_64 = 62
_SHT_NULL = 0
_SHT_NOBITS = 8
_SHN_XINDEX = 0xFFFF
_SHF_ALLOC = 2
_SHF_EXECINSTR = 4


@dataclass(frozen=True, slots=True)
class ImageSection:
    """A section header. ``address`` is link-time (no KASLR offset), ``size`` in bytes.

    ``nobits``: it has no bytes in the file (``.bss``). ``loaded``: it is part of the running
    kernel's address space. Per-CPU data (``.data..percpu``) is linked at address 0 and is
    reached by name only.
    """

    name: str
    address: int
    offset: int
    size: int
    nobits: bool
    executable: bool
    loaded: bool


def _bad(path: Path, why: str) -> Failed:
    return Failed(
        f"{path} is no usable kernel image",
        why=why,
        next_step="prepare the target again: `kmend kernel fetch RELEASE`",
        rule="bad-image",
    )


def _headers(data: mmap.mmap, path: Path) -> tuple[ImageSection, ...]:
    length = len(data)
    view = memoryview(data)
    try:
        if length < _EHDR.size or bytes(view[:4]) != b"\x7fELF":
            raise _bad(path, "it does not begin with an ELF header")
        ident, _, machine, _, _, _, shoff, _, _, _, _, entsize, count, names_at = _EHDR.unpack_from(view)
        if ident[4] != 2 or ident[5] != 1 or machine != _EM_X86_64:
            raise _bad(path, f"it is not a little-endian 64-bit x86-64 file (machine {machine})")
        if shoff == 0 or entsize != _SHDR.size or shoff + _SHDR.size > length:
            raise _bad(path, "its section headers are missing or lie outside of it: truncated?")
        first = _SHDR.unpack_from(view, shoff)
        count = count or first[5]
        names_at = first[6] if names_at == _SHN_XINDEX else names_at
        if shoff + count * _SHDR.size > length or not 0 < names_at < count:
            raise _bad(path, "its section headers lie outside of it: truncated?")
        rows = [_SHDR.unpack_from(view, shoff + i * _SHDR.size) for i in range(count)]
        if rows[names_at][4] + rows[names_at][5] > length:
            raise _bad(path, "its section names lie outside of it: truncated?")
        names = bytes(view[rows[names_at][4] : rows[names_at][4] + rows[names_at][5]])
        out = []
        for name, kind, flags, address, offset, size, *_ in rows:
            if kind == _SHT_NULL:
                continue
            end = names.find(b"\0", name)
            if end < 0:
                raise _bad(path, "a section's name lies outside of its name table")
            nobits = kind == _SHT_NOBITS
            if not nobits and offset + size > length:
                raise _bad(path, "a section's contents lie outside of it: truncated?")
            text = names[name:end].decode("ascii", "replace")
            loaded = bool(flags & _SHF_ALLOC) and address != 0
            out.append(
                ImageSection(text, address, offset, size, nobits, bool(flags & _SHF_EXECINSTR), loaded)
            )
        return tuple(out)
    finally:
        view.release()


class Image:
    """An opened vmlinux. Use it as a context manager, or call :meth:`close`."""

    def __init__(self, path: Path, data: mmap.mmap, sections: tuple[ImageSection, ...]) -> None:
        self.path = path
        self.sections = sections
        self._data = data
        self._loaded = sorted((s for s in sections if s.loaded and s.size), key=lambda s: s.address)
        self._starts = [s.address for s in self._loaded]
        self._by_name = {s.name: s for s in reversed(sections)}

    @classmethod
    def open(cls, path: Path) -> Image:
        """Map the file and read its section headers.

        Raises:
            Failed: (rule ``bad-image``) it cannot be read, is no x86-64 ELF file, or is truncated.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
            finally:
                os.close(fd)
        except (OSError, ValueError) as error:
            raise _bad(path, str(error)) from error
        try:
            return cls(path, data, _headers(data, path))
        except BaseException:
            data.close()
            raise

    def close(self) -> None:
        self._data.close()

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def section(self, name: str) -> ImageSection | None:
        """The (first) section of that name."""
        return self._by_name.get(name)

    def section_at(self, address: int) -> ImageSection | None:
        """The loaded section that covers the address."""
        i = bisect_right(self._starts, address) - 1
        if i < 0:
            return None
        section = self._loaded[i]
        return section if address < section.address + section.size else None

    def contents(self, name: str) -> bytes:
        """All bytes of a section; empty when there is no such section or it has none in the file."""
        section = self.section(name)
        if section is None or section.nobits:
            return b""
        return self._data[section.offset : section.offset + section.size]

    def trailer(self) -> bytes:
        """What lies behind the ELF file's own end: in an unpacked image its table of relocations."""
        fields = _EHDR.unpack_from(self._data)
        ends = (section.offset + section.size for section in self.sections if not section.nobits)
        return self._data[max(fields[6] + fields[11] * fields[12], *ends) :]

    def read(self, address: int, size: int) -> bytes:
        """``size`` bytes from the link-time ``address``.

        Raises:
            Failed: (rule ``image-range``) the range does not lie inside of one loaded section that
                has bytes in the file.
        """
        section = self.section_at(address)
        if section is None or size < 0:
            raise self._outside(address, size, "no section of the image covers it")
        if section.nobits:
            raise self._outside(address, size, f"section {section.name} has no bytes in the file")
        start = address - section.address
        if start + size > section.size:
            end = section.address + section.size
            raise self._outside(address, size, f"section {section.name} ends at {end:#x}")
        return self._data[section.offset + start : section.offset + start + size]

    def _outside(self, address: int, size: int, why: str) -> Failed:
        return Failed(
            f"{size} bytes at {address:#x} are not in the kernel image",
            why=why,
            next_step=f"compare the address with `readelf -SW {self.path}`",
            rule="image-range",
        )
