"""vmlinux out of a bzImage, its build id and its banner."""

from __future__ import annotations

import bz2
import ctypes
import gzip
import lzma
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import lz4.block
import pytest
import zstandard

from kmend.core.errors import Failed, Unable
from kmend.kernel import image, zstd

BANNER = (
    b"Linux version 6.1.0-55-amd64 (debian-kernel@lists.debian.org) "
    b"(gcc-12 (Debian 12.2.0-14+deb12u1) 12.2.0, GNU ld (GNU Binutils for Debian) 2.40) "
    b"#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-1 (2026-11-14)\n\0"
)
BUILD_ID = bytes(range(20))


def note(name: bytes, kind: int, data: bytes) -> bytes:
    padded = name + b"\0" * (-len(name) % 4)
    return struct.pack("<III", len(name), len(data), kind) + padded + data + b"\0" * (-len(data) % 4)


def vmlinux(notes: bytes, payload: bytes = BANNER) -> bytes:
    header = (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    )
    segment = struct.pack("<IIQQQQQQ", image.PT_NOTE, 4, 120, 0, 0, len(notes), len(notes), 4)
    return header + segment + notes + payload


ELF = vmlinux(note(b"Xen\0", 6, b"abcdef") + note(b"GNU\0", 3, BUILD_ID))


def legacy_lz4(data: bytes) -> bytes:
    block: bytes = lz4.block.compress(data, store_size=False)
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block


def bzimage(packed: bytes, *, protocol: int = 0x020F) -> bytes:
    """Boot sector, two sectors of set-up code, then the payload at offset 16 of the protected-mode code."""
    out = bytearray(3 * 512)
    out[0x1F1] = 2
    out[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", out, 0x206, protocol)
    if protocol >= 0x0208:
        struct.pack_into("<II", out, 0x248, 16, len(packed) + 4)
    # the build appends the unpacked size, which no decoder may take for data
    return bytes(out) + b"\x90" * 16 + packed + struct.pack("<I", len(ELF)) + b"after" * 100


PACKERS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("xz", lambda d: lzma.compress(d, check=lzma.CHECK_CRC32)),
    ("bzip2", bz2.compress),
    ("lzma", lambda d: lzma.compress(d, format=lzma.FORMAT_ALONE, preset=9)),
    ("lz4", legacy_lz4),
    ("zstd", zstandard.compress),
]


@pytest.mark.parametrize("protocol", [0x020F, 0x0206])
@pytest.mark.parametrize(("name", "pack"), PACKERS, ids=[name for name, _ in PACKERS])
def test_every_packing_is_undone(name: str, pack: Callable[[bytes], bytes], protocol: int) -> None:
    assert {p.name for p in image.PACKINGS} == {n for n, _ in PACKERS}
    assert image.extract_vmlinux(bzimage(pack(ELF), protocol=protocol))[: len(ELF)] == ELF


@pytest.mark.parametrize("protocol", [0x020F, 0x0206])
@pytest.mark.parametrize(("name", "pack"), PACKERS, ids=[name for name, _ in PACKERS])
def test_an_image_cut_short_yields_nothing(name: str, pack: Callable[[bytes], bytes], protocol: int) -> None:
    big = ELF + bytes(i * i % 251 for i in range(200_000))
    whole = bzimage(pack(big), protocol=protocol)
    end = whole.index(b"afterafter") - 4
    with pytest.raises(Failed) as caught:
        image.extract_vmlinux(whole[: end - (end - 3 * 512) // 3])
    assert caught.value.rule == "no-vmlinux"


@pytest.mark.parametrize("name", ["zstd", "lz4"])
def test_a_decompressor_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def no_library(name: str) -> NoReturn:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    zstd._library.cache_clear()
    for package in ("zstandard", "lz4.block"):
        monkeypatch.setitem(sys.modules, package, None)  # what makes an import fail
    with pytest.raises(Unable) as caught:
        image.extract_vmlinux(bzimage(dict(PACKERS)[name](ELF)))
    assert caught.value.rule == "missing-tool"
    assert name in caught.value.why
    assert name in caught.value.next_step
    # its magic number by chance in an image that is packed otherwise
    misled = bytes(16) + image.PACKINGS[4].magic + image.PACKINGS[5].magic + bytes(64)
    assert image.extract_vmlinux(misled + gzip.compress(ELF))[: len(ELF)] == ELF


@pytest.mark.parametrize("package", [True, False])
def test_zstd_by_the_package_and_by_the_library(monkeypatch: pytest.MonkeyPatch, package: bool) -> None:
    plain = ELF + bytes(range(256)) * 100_000
    packed = zstandard.compress(plain)
    if not package:
        monkeypatch.setitem(sys.modules, "zstandard", None)
    assert zstd.decompress(packed + b"behind it") == plain
    image_of = b"\x28\xb5\x2f\xfd no frame" + packed + bytes(4)
    assert image.extract_vmlinux(image_of) == plain
    for wrong in (packed[:-9], b"no frame at all", b""):
        with pytest.raises(ValueError, match=r"cut short|damaged|error"):
            zstd.decompress(wrong)


def test_a_magic_number_by_chance_does_not_mislead() -> None:
    packed = b"\x1f\x8b\x08 no gzip" + b"BZh" + gzip.compress(ELF)
    assert image.extract_vmlinux(bzimage(packed, protocol=0x0200)) == ELF


def test_an_elf_file_is_taken_as_it_is() -> None:
    assert image.extract_vmlinux(ELF) is ELF


@pytest.mark.parametrize(
    "data", [b"", b"MZ" * 500, bzimage(gzip.compress(b"no elf")), bzimage(gzip.compress(ELF))[:1600]]
)
def test_what_holds_no_kernel_is_refused(data: bytes) -> None:
    with pytest.raises(Failed) as caught:
        image.extract_vmlinux(data)
    assert caught.value.rule == "no-vmlinux"


def test_the_build_id_is_the_gnu_note() -> None:
    assert image.read_build_id(ELF) == BUILD_ID.hex()


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (vmlinux(note(b"Xen\0", 3, BUILD_ID)), "no-build-id"),
        (vmlinux(struct.pack("<III", 4, 2000, 3) + b"GNU\0"), "no-build-id"),
        (ELF[:80], "not-elf"),
        (b"\x7fELF\x01" + ELF[5:], "not-elf"),
        (b"", "not-elf"),
    ],
)
def test_a_missing_build_id_is_told(data: bytes, rule: str) -> None:
    with pytest.raises(Failed) as caught:
        image.read_build_id(data)
    assert caught.value.rule == rule


def test_the_banner_is_taken_apart() -> None:
    banner = image.read_banner(ELF)
    assert banner.release == "6.1.0-55-amd64"
    assert (banner.user, banner.host) == ("debian-kernel", "lists.debian.org")
    assert banner.compiler == "gcc-12 (Debian 12.2.0-14+deb12u1) 12.2.0"
    assert banner.linker == "GNU ld (GNU Binutils for Debian) 2.40"
    assert banner.version == "#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-1 (2026-11-14)"
    assert (banner.number, banner.timestamp) == ("1", "Debian 6.1.192-1 (2026-11-14)")


def test_the_same_banner_twice_is_one_and_two_banners_are_refused() -> None:
    assert image.read_banner(BANNER + BANNER).release == "6.1.0-55-amd64"
    for data in (BANNER + BANNER.replace(b"-55-", b"-56-"), b"Linux version %s (%s)\n\0", b""):
        with pytest.raises(Failed) as caught:
            image.read_banner(data)
        assert caught.value.rule == "no-banner"


def test_a_file_is_mapped_and_an_absent_one_is_told(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(ELF)
    with image.mapped(tmp_path / "vmlinux") as data:
        assert image.read_build_id(data) == BUILD_ID.hex()
        assert image.read_banner(data).number == "1"
    (tmp_path / "empty").touch()
    with image.mapped(tmp_path / "empty") as data:
        assert len(data) == 0
    with pytest.raises(Failed), image.mapped(tmp_path / "absent"):
        pass
