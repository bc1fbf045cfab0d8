"""The bootable image: the vmlinux inside a bzImage, its GNU build id and its banner.

A bzImage is a boot sector, set-up code and a compressed vmlinux. Where the compressed part lies is
said by the set-up header (Documentation/x86/boot.rst, ``payload_offset`` and ``payload_length``,
boot protocol 2.08); images without it are searched for the magic numbers that the kernel's own
scripts/extract-vmlinux knows.
"""

from __future__ import annotations

import bz2
import lzma
import mmap
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kmend.core.errors import Failed, Unable
from kmend.kernel import zstd

ELF_MAGIC = b"\x7fELF"
PT_NOTE = 4
NT_GNU_BUILD_ID = 3
#: The kernel's lz4 images are in the legacy frame format: a magic, then blocks that unpack to 8 MiB each.
LZ4_BLOCK = 8 << 20

Bytes = bytes | mmap.mmap


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _whole(decoder: _Decoder, data: bytes) -> bytes:
    """Everything up to the end of the stream; what the build appends after it is passed over.

    Raises:
        ValueError: the stream does not end (the image is cut short).
    """
    out = decoder.decompress(data)
    if not decoder.eof:
        raise ValueError("cut short")
    return out


def _xz(data: bytes) -> bytes:
    return _whole(lzma.LZMADecompressor(format=lzma.FORMAT_XZ), data)


def _lzma(data: bytes) -> bytes:
    return _whole(lzma.LZMADecompressor(format=lzma.FORMAT_ALONE), data)


def _gzip(data: bytes) -> bytes:
    return _whole(zlib.decompressobj(wbits=31), data)


def _bzip2(data: bytes) -> bytes:
    return _whole(bz2.BZ2Decompressor(), data)


def _lz4(data: bytes) -> bytes:
    try:
        import lz4.block  # noqa: PLC0415 - hardly any kernel needs it
    except ImportError as error:
        raise Unable(
            "the kernel image cannot be unpacked",
            why="the Python package lz4 is missing",
            next_step="apt install python3-lz4, or pip install lz4",
            rule="missing-tool",
        ) from error
    out: list[bytes] = []
    at, total = 4, 0
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if size == total:
            return b"".join(out)  # the unpacked size, which the build appends, ends the blocks
        try:
            block: bytes = lz4.block.decompress(data[at : at + size], uncompressed_size=LZ4_BLOCK)
        except lz4.block.LZ4BlockError as error:
            raise ValueError(str(error)) from error
        out.append(block)
        total += len(block)
        at += size
    raise ValueError("cut short")


@dataclass(frozen=True, slots=True)
class Packing:
    """A way in which the kernel's build packs vmlinux: its name, its first bytes, its decoder."""

    name: str
    magic: bytes
    unpack: Callable[[bytes], bytes]


#: As in scripts/extract-vmlinux; LZO is left out because no Debian kernel was ever packed with it.
PACKINGS = (
    Packing("gzip", b"\x1f\x8b\x08", _gzip),
    Packing("xz", b"\xfd7zXZ\x00", _xz),
    Packing("bzip2", b"BZh", _bzip2),
    Packing("lzma", b"\x5d\x00\x00\x00", _lzma),
    Packing("lz4", b"\x02\x21\x4c\x18", _lz4),
    Packing("zstd", b"\x28\xb5\x2f\xfd", zstd.decompress),
)

_UNPACK_ERRORS = (ValueError, EOFError, OSError, zlib.error, lzma.LZMAError)


def _declared_payload(image: bytes) -> tuple[int, int] | None:
    """Offset and length of the packed vmlinux as the set-up header states them."""
    if len(image) < 0x250 or image[0x202:0x206] != b"HdrS":
        return None
    (protocol,) = struct.unpack_from("<H", image, 0x206)
    if protocol < 0x0208:
        return None
    sectors = image[0x1F1] or 4  # boot.rst: 0 means 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (sectors + 1) * 512 + offset
    return (start, length) if length and start + length <= len(image) else None


def _candidates(image: bytes) -> Iterator[tuple[Packing, bytes]]:
    if payload := _declared_payload(image):
        start, length = payload
        for packing in PACKINGS:
            if image.startswith(packing.magic, start):
                yield packing, image[start : start + length]
    for packing in PACKINGS:
        at = image.find(packing.magic)
        while at >= 0:
            yield packing, image[at:]
            at = image.find(packing.magic, at + 1)


def extract_vmlinux(image: bytes) -> bytes:
    """The ELF file inside a bzImage; an image that is ELF already is returned as it is.

    What follows the ELF file in the packed part (the table of KASLR relocations, ``vmlinux.relocs``)
    is kept, as scripts/extract-vmlinux keeps it.

    Raises:
        Failed: rule ``no-vmlinux``: nothing in the image unpacks to an ELF file.
        Unable: rule ``missing-tool``: perhaps something would, but no decompressor for it is installed.
    """
    if image.startswith(ELF_MAGIC):
        return image
    missing: Unable | None = None
    for packing, packed in _candidates(image):
        try:
            vmlinux = packing.unpack(packed)
        except _UNPACK_ERRORS:
            continue
        except Unable as error:
            missing = missing or error
            continue
        if vmlinux.startswith(ELF_MAGIC):
            return vmlinux
    if missing is not None:
        raise missing
    raise Failed(
        "no vmlinux was found in the kernel image",
        why=f"nothing in its {len(image)} bytes unpacks to an ELF file "
        f"(tried {', '.join(p.name for p in PACKINGS)})",
        next_step="name the uncompressed vmlinux with --vmlinux",
        rule="no-vmlinux",
    )


@contextmanager
def mapped(path: Path) -> Iterator[Bytes]:
    """The bytes of a file without holding them all in memory (a vmlinux with debug data has 500 MB).

    Raises:
        Failed: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                yield b""
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield data
    except OSError as error:
        raise Failed(f"{path} cannot be read", why=error.strerror or str(error), rule="unreadable") from error


def read_build_id(vmlinux: Bytes) -> str:
    """The GNU build id in hexadecimal, from the notes that a program header names.

    Raises:
        Failed: rule ``not-elf`` (no 64-bit little-endian ELF file, or cut short), ``no-build-id``.
    """
    if len(vmlinux) < 64 or vmlinux[:6] != ELF_MAGIC + b"\x02\x01":
        raise Failed(
            "the vmlinux is no 64-bit ELF file", why=f"it starts with {vmlinux[:8]!r}", rule="not-elf"
        )
    (phoff,) = struct.unpack_from("<Q", vmlinux, 32)
    phentsize, phnum = struct.unpack_from("<HH", vmlinux, 54)
    for index in range(phnum):
        at = phoff + index * phentsize
        if at + 56 > len(vmlinux):
            raise Failed(
                "the vmlinux is cut short", why="its program headers lie beyond its end", rule="not-elf"
            )
        kind, _flags, offset, _va, _pa, size = struct.unpack_from("<IIQQQQ", vmlinux, at)
        if kind == PT_NOTE and (found := _build_id_note(vmlinux[offset : offset + size])):
            return found
    raise Failed(
        "the vmlinux has no build id",
        why="none of its notes is a GNU build id",
        next_step="link the kernel with --build-id (the kernel's own default)",
        rule="no-build-id",
    )


def _build_id_note(notes: bytes) -> str | None:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        name = notes[at + 12 : at + 12 + name_size]
        start = at + 12 + ((name_size + 3) & ~3)
        if kind == NT_GNU_BUILD_ID and name == b"GNU\0" and 0 < size <= len(notes) - start:
            return notes[start : start + size].hex()
        at = start + ((size + 3) & ~3)
    return None


@dataclass(frozen=True, slots=True)
class Banner:
    """``linux_banner`` taken apart (init/version-timestamp.c, scripts/mkcompile_h).

    ``Linux version RELEASE (USER@HOST) (COMPILER, LINKER) VERSION``; ``version`` is ``uname -v``.
    """

    text: str
    release: str
    user: str
    host: str
    compiler: str
    linker: str
    version: str

    @property
    def timestamp(self) -> str:
        """What the build was given as KBUILD_BUILD_TIMESTAMP: the version without number and flags."""
        return _FLAGS.sub("", self.version)

    @property
    def number(self) -> str:
        """KBUILD_BUILD_VERSION: ``1`` of ``#1``."""
        return self.version[1:].split(" ", 1)[0]


_BANNER = re.compile(
    rb"Linux version (?P<release>[0-9][^ \0\n]*) \((?P<user>[^@)\0\n]*)@(?P<host>[^)\0\n]*)\) "
    rb"\((?P<tools>[^\0\n]*?)\) (?P<version>#[0-9][^\0\n]*)\n\0"
)
#: scripts/mkcompile_h / init/Makefile put these between the number and the timestamp.
_FLAGS = re.compile(r"^#\S+ (?:(?:SMP|PREEMPT|PREEMPT_DYNAMIC|PREEMPT_RT) )*")


def read_banner(vmlinux: Bytes) -> Banner:
    """The kernel's ``linux_banner``.

    Raises:
        Failed: rule ``no-banner``: there is none, or two that differ.
    """
    found = {match.group(0): match for match in _BANNER.finditer(vmlinux)}
    if len(found) != 1:
        raise Failed(
            "the vmlinux does not say which kernel it is",
            why="no banner (Linux version …) was found in it" if not found else "it has several banners",
            next_step="name the vmlinux of a whole, linked kernel",
            rule="no-banner",
        )
    (match,) = found.values()
    compiler, _, linker = match["tools"].decode(errors="replace").rpartition(", ")
    return Banner(
        text=match.group(0)[:-2].decode(errors="replace"),
        release=match["release"].decode(errors="replace"),
        user=match["user"].decode(errors="replace"),
        host=match["host"].decode(errors="replace"),
        compiler=compiler,
        linker=linker,
        version=match["version"].decode(errors="replace"),
    )
