"""The tables of a target, from files made byte by byte: image, symbol table, exports, modules."""

from __future__ import annotations

import dataclasses
import gzip
import lzma
import mmap
import struct
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kmend.core.errors import Failed
from kmend.core.progress import Silent
from kmend.core.target import KernelSymbol, Release, Target
from kmend.kernel import kallsyms, modules, symvers
from kmend.kernel.vmlinux import Image

TEXT = 0xFFFFFFFF81000000
EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
SHDR = struct.Struct("<IIQQQQIIQQ")


def elf(sections: list[tuple[str, int, int, int, bytes, int]], *, kind: int = 2, machine: int = 62) -> bytes:
    """An ELF64 file of sections: name, type, flags, address, bytes (of NOBITS the size counts), link."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name, *_ in sections) + b".shstrtab\0"
    body = b""
    rows = [SHDR.pack(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)]
    for name, sh_type, flags, address, data, link in sections:
        rows.append(
            SHDR.pack(
                names.index(name.encode() + b"\0"), sh_type, flags, address, 64 + len(body), len(data),
                link, 0, 1, 0,
            )
        )  # fmt: skip
        body += b"" if sh_type == 8 else data
    rows.append(SHDR.pack(names.index(b".shstrtab"), 3, 0, 0, 64 + len(body), len(names), 0, 0, 1, 0))
    body += names
    head = EHDR.pack(
        b"\x7fELF\x02\x01\x01" + bytes(9), kind, machine, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, len(rows),
        len(rows) - 1,
    )  # fmt: skip
    return head + body + b"".join(rows)


def image_bytes() -> bytes:
    return elf(
        [
            (".text", 1, 6, TEXT, bytes(range(256)), 0),
            (".data", 1, 3, TEXT + 0x1000, b"data", 0),
            (".bss", 8, 3, TEXT + 0x2000, bytes(64), 0),
            (".data..percpu", 1, 3, 0, b"per-cpu", 0),
            (".comment", 1, 0, 0, b"GCC", 0),
        ]
    )


@pytest.fixture
def target(tmp_path: Path) -> Target:
    """A target of empty places; a test fills in what it needs."""
    return Target(
        Release("6.1.0-0-test"), "custom", "Linux version 6.1.0-0-test (gcc) #1 test", "00", tmp_path,
        tmp_path / "source", tmp_path / ".config", tmp_path / "Module.symvers", tmp_path / "vmlinux", None,
        tmp_path / "modules", "gcc",
    )  # fmt: skip


def test_image_reads_by_address(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(image_bytes())
    with Image.open(path) as image:
        assert image.read(TEXT + 16, 4) == bytes([16, 17, 18, 19])
        assert image.read(TEXT + 255, 1) == b"\xff"
        assert image.read(TEXT + 0x1000, 4) == b"data"
        text = image.section_at(TEXT + 255)
        assert text is not None and text.name == ".text" and text.executable and text.loaded
        assert image.section_at(TEXT + 256) is None
        assert image.section_at(TEXT - 1) is None
        assert image.section_at(2) is None  # per-CPU data is linked at 0 and not reached by address
        assert image.contents(".data..percpu") == b"per-cpu"
        assert image.contents(".bss") == b"" and image.contents(".nothing") == b""
        assert [s.name for s in image.sections][:3] == [".text", ".data", ".bss"]


@pytest.mark.parametrize(
    ("address", "size", "why"),
    [
        (TEXT + 250, 7, "ends at"),
        (TEXT + 0x2000, 4, "no bytes in the file"),
        (TEXT + 0x900, 1, "no section"),
        (0, 1, "no section"),
    ],
)
def test_image_refuses_what_it_does_not_hold(tmp_path: Path, address: int, size: int, why: str) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(image_bytes())
    with Image.open(path) as image, pytest.raises(Failed) as caught:
        image.read(address, size)
    assert caught.value.rule == "image-range" and why in caught.value.why


def test_every_truncated_image_is_refused(tmp_path: Path) -> None:
    whole = image_bytes()
    path = tmp_path / "vmlinux"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(Failed) as caught:
            Image.open(path)
        assert caught.value.rule == "bad-image"
    with pytest.raises(Failed, match="usable kernel image"):
        Image.open(tmp_path)  # a folder
    path.write_bytes(elf([], machine=183))
    with pytest.raises(Failed) as caught:
        Image.open(path)
    assert "machine 183" in caught.value.why


NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8)
ROWS = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 0x40000), st.integers(TEXT, TEXT + 200)), st.sampled_from("tTdDA"), NAMES
    ),
    min_size=1,
    max_size=60,
).map(lambda rows: sorted(rows, key=lambda row: row[0]))


@given(ROWS)
def test_symbol_table_answers_like_a_plain_list(rows: list[tuple[int, str, str]]) -> None:
    import tempfile  # noqa: PLC0415 - hypothesis forbids a fixture per example

    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(kallsyms.encode(rows))
        table = kallsyms.load_file(Path(file.name))
    plain = [KernelSymbol(a, t, n) for a, t, n in rows]  # type: ignore[arg-type]  # NewType of int
    assert list(table.symbols()) == plain
    for asked in (-1000, 1000):  # names are searched for at first, and looked up in a table later on
        table._asked = asked
        for name in {n for _, _, n in rows} | {n[:-1] for _, _, n in rows} | {"absent name"}:
            # table order is sympos order
            assert list(table.named(name)) == [s for s in plain if s.name == name]
    for address in {a for a, _, _ in rows} | {a + 1 for a, _, _ in rows} | {0, TEXT - 1}:
        assert list(table.at(address)) == [s for s in plain if s.address == address]
        above = [s.address for s in plain if s.address > address]
        assert table.next_after(address) == (above[0] if above else None)
        below = [s.address for s in plain if TEXT <= s.address <= address]
        expected = next(s for s in plain if s.address == below[-1]) if below else None
        assert table.covering(address) == expected


def test_damaged_symbol_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kallsyms.bin"
    whole = kallsyms.encode([(TEXT, "T", "one"), (TEXT, "t", "two"), (TEXT + 1, "t", "one")])
    with pytest.raises(Failed):
        kallsyms.load_file(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(Failed) as caught:
            kallsyms.load_file(path)
        assert caught.value.rule == "no-kallsyms"
    path.write_bytes(b"X" + whole[1:])
    with pytest.raises(Failed):
        kallsyms.load_file(path)
    path.write_bytes(whole)
    assert len(kallsyms.load_file(path)) == 3


def exporting_image(target: Target, symbols: dict[str, int]) -> None:
    """An image whose __ksymtab exports ``symbols`` (struct kernel_symbol with relative offsets)."""
    strings = b"\0".join(name.encode() for name in symbols) + b"\0"
    table_at, strings_at = TEXT + 0x3000, TEXT + 0x4000
    table = b""
    for i, (name, address) in enumerate(symbols.items()):
        place = table_at + 12 * i
        table += struct.pack(
            "<iii", address - place, strings_at + strings.index(name.encode() + b"\0") - place - 4, 0
        )
    banner = target.banner.encode() + b"\n\0"
    target.vmlinux.write_bytes(
        elf(
            [
                (".text", 1, 6, TEXT, bytes(0x2000), 0),
                (".rodata", 1, 2, TEXT + 0x2000, banner, 0),
                ("__ksymtab", 1, 2, table_at, table, 0),
                ("__ksymtab_strings", 1, 2, strings_at, strings, 0),
            ]
        )
    )
    target.symvers.write_text("".join(f"0x00000001\t{n}\tvmlinux\tEXPORT_SYMBOL\t\n" for n in symbols))


def good_rows() -> list[tuple[int, str, str]]:
    rows = [(0, "A", "fixed_percpu_data"), (TEXT, "T", "_stext"), (TEXT, "T", "_text")]
    rows += [(TEXT + 4 * i, "t", f"function_{i}") for i in range(1, 1200)]
    return [*rows, (TEXT + 0x2000, "R", "linux_banner")]


def test_symbol_table_is_held_against_the_image(target: Target) -> None:
    exporting_image(target, {"function_7": TEXT + 28, "function_9": TEXT + 36})
    rows = good_rows()
    kallsyms.check(target, rows)

    def refused(changed: list[tuple[int, str, str]], word: str) -> None:
        with pytest.raises(Failed) as caught:
            kallsyms.check(target, changed)
        assert caught.value.rule == "kallsyms" and word in caught.value.why

    refused(rows[:900], "only 900")
    refused([rows[1], rows[0], *rows[2:]], "not sorted")
    refused([r for r in rows if r[2] != "function_9"], "exports function_9")
    refused([(a + 4 if a > TEXT else a, t, n) for a, t, n in rows[:-1]] + rows[-1:], "is exported at")
    refused([(a + 16 if n == "linux_banner" else a, t, n) for a, t, n in rows], "banner")
    refused([(a + 1 if n == "linux_banner" else a, t, n) for a, t, n in rows], "does not hold")
    moved = sorted(((TEXT + 1 if n == "_text" else a, t, n) for a, t, n in rows), key=lambda row: row[0])
    refused(moved, "_text is")
    beyond = sorted([*rows, (TEXT + 0x2800, "t", "stray")], key=lambda row: row[0])
    refused(beyond, "outside of the image")
    other = dataclasses.replace(target, banner="Linux version 5.10 (gcc) #1 other")
    with pytest.raises(Failed, match="reliably"):
        kallsyms.check(other, rows)


def test_exports(tmp_path: Path) -> None:
    path = tmp_path / "Module.symvers"
    path.write_text(
        "0x4c9d28b0\tphys_base\tvmlinux\tEXPORT_SYMBOL\t\n"
        "0x9299c46e\tdm_io\tdrivers/md/dm-mod\tEXPORT_SYMBOL_GPL\t\n"
        "0x00000000\tcxl_add\tdrivers/cxl/core/cxl_core\tEXPORT_SYMBOL_GPL\tCXL\n"
    )
    exports = symvers.load(path)
    assert exports.get("phys_base") == symvers.Export("phys_base", 0x4C9D28B0, "vmlinux", False, "")
    assert exports.get("dm_io") == symvers.Export("dm_io", 0x9299C46E, "dm_mod", True, "")
    assert exports.get("cxl_add") == symvers.Export("cxl_add", 0, "cxl_core", True, "CXL")
    assert exports.get("absent") is None and "dm_io" in exports and len(exports) == 3
    assert exports.of("vmlinux") == ("phys_base",) and exports.of("dm_mod") == ("dm_io",)


@pytest.mark.parametrize("text", ["", "one line of prose\n", "0xzz\tname\tvmlinux\tEXPORT_SYMBOL\n", "0x1\n"])
def test_other_files_are_no_symvers(tmp_path: Path, text: str) -> None:
    path = tmp_path / "Module.symvers"
    path.write_text(text)
    with pytest.raises(Failed) as caught:
        symvers.load(path)
    assert caught.value.rule == "bad-symvers"
    with pytest.raises(Failed):
        symvers.load(tmp_path / "absent")


def module_bytes(modinfo: dict[str, str], symbols: list[tuple[str, int, int]]) -> bytes:
    """A module: symbols are (name, st_info, section)."""
    strings = b"\0" + b"".join(name.encode() + b"\0" for name, _, _ in symbols)
    table = bytes(24)
    for name, info, section in symbols:
        table += struct.pack(
            "<IBBHQQ", strings.index(b"\0" + name.encode() + b"\0") + 1, info, 0, section, 0, 0
        )
    info_bytes = b"".join(f"{key}={value}".encode() + b"\0" for key, value in modinfo.items())
    return elf(
        [
            (".text", 1, 6, 0, b"\xc3", 0),
            (".modinfo", 1, 2, 0, info_bytes, 0),
            (".symtab", 2, 0, 0, table, 4),
            (".strtab", 3, 0, 0, strings, 0),
        ],
        kind=1,
    )


def fill_modules(target: Target) -> None:
    assert target.modules is not None
    root = target.modules / "kernel"
    for folder in ("fs/ext4", "fs/jbd2", "lib", "drivers/md"):
        (root / folder).mkdir(parents=True)
    (root / "fs/ext4/ext4.ko").write_bytes(
        module_bytes(
            {"depends": "jbd2,crc16", "softdep": "pre: dm-mod crypto-x post: late"},
            [("ext4_fill", 0x12, 1), ("shared", 0x02, 1), ("ext4_table", 0x01, 1), ("printk", 0x10, 0)],
        )
    )
    jbd2 = module_bytes({"depends": "crc16"}, [("shared", 0x02, 1), ("shared", 0x01, 1)])
    (root / "fs/jbd2/jbd2.ko.xz").write_bytes(lzma.compress(jbd2))
    (root / "lib/crc16.ko.zst").write_bytes(zstandard.ZstdCompressor().compress(module_bytes({}, [])))
    (root / "drivers/md/dm-mod.ko.gz").write_bytes(
        gzip.compress(module_bytes({"depends": ""}, [("a", 0x12, 1)]))
    )


def test_modules_are_indexed(target: Target) -> None:
    fill_modules(target)
    modules.build_index(target, Silent())
    assert [m.name for m in modules.all_modules(target)] == ["crc16", "dm_mod", "ext4", "jbd2"]
    assert modules.module_dependencies(target, "ext4") == ("crc16", "jbd2")
    assert modules.module_dependencies(target, "ext4", soft=True) == ("crc16", "jbd2", "dm_mod")
    assert modules.module_dependencies(target, "crc16") == ()
    assert modules.find(target, "dm-mod") == modules.find(target, "dm_mod") is not None
    assert modules.find(target, "nope") is None
    shared = modules.defined_in(target, "shared")
    assert {(s.module, s.is_function) for s in shared} == {("ext4", True), ("jbd2", True), ("jbd2", False)}
    assert len(shared) == 3 and all(s.is_local for s in shared)
    assert modules.defined_in(target, "ext4_fill") == (
        modules.ModuleSymbol("ext4_fill", "ext4", True, False),
    )
    assert modules.defined_in(target, "printk") == ()  # undefined there
    assert modules.defined_in(target, "") == () and modules.defined_in(target, "zzz") == ()


def test_compressed_modules_are_unpacked(target: Target) -> None:
    fill_modules(target)
    modules.build_index(target, Silent())
    assert target.modules is not None
    plain = modules.module_file(target, "ext4")
    assert plain.path == target.modules / "kernel/fs/ext4/ext4.ko"
    for name in ("jbd2", "crc16", "dm-mod"):
        file = modules.module_file(target, name)
        assert file.path.suffix == ".ko" and file.path.read_bytes()[:4] == b"\x7fELF"
        assert file.name == name.replace("-", "_")
    with pytest.raises(Failed) as caught:
        modules.module_file(target, "nope")
    assert caught.value.rule == "unknown-module"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("bad.ko", b"text"),
        ("bad.ko", module_bytes({}, [])[:300]),
        ("bad.ko.xz", b"no xz"),
        ("bad.ko.zst", b"no zst"),
        ("bad.ko.gz", b"no gz"),
    ],
)
def test_damaged_modules_are_refused(target: Target, name: str, data: bytes) -> None:
    fill_modules(target)
    assert target.modules is not None
    (target.modules / "kernel" / name).write_bytes(data)
    with pytest.raises(Failed) as caught:
        modules.build_index(target, Silent())
    assert caught.value.rule == "bad-module" and name in caught.value.what


def test_absent_indexes_say_so(target: Target) -> None:
    for ask in (modules.all_modules, lambda t: modules.defined_in(t, "x"), kallsyms.load):
        with pytest.raises(Failed) as caught:
            ask(target)
        assert "kmend kernel fetch" in caught.value.next_step
    no_modules = dataclasses.replace(target, modules=None)
    modules.build_index(no_modules, Silent())
    assert modules.all_modules(no_modules) == () and modules.defined_in(no_modules, "x") == ()


@given(st.lists(NAMES, min_size=1, max_size=40), NAMES)
def test_bisection_finds_the_first_row(names: list[str], wanted: str) -> None:
    rows = sorted(f"{name}\tf\tm{i}\n" for i, name in enumerate(names))
    text = "".join(rows).encode()
    with mmap.mmap(-1, len(text)) as data:
        data.write(text)
        at = modules._first_row(data, wanted.encode() + b"\t")
    before = sum(len(row) for row in rows if row[: len(wanted) + 1] < f"{wanted}\t")
    assert at == before
