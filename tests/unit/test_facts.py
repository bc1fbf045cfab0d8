"""What a machine without a target tells of its kernel: parsing, and what becomes of unknown facts."""

from __future__ import annotations

import lzma
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from kmend import facts, running
from kmend.core.errors import Failed, Refusal, Unable
from kmend.elf.model import ElfFile, Reloc, Section, Symbol
from kmend.elf.reader import read
from kmend.facts import RunningFacts
from kmend.kernel import symvers
from kmend.kernel.symvers import Export, ImageExports
from kmend.kernel.vmlinux import Image
from kmend.module.describe import Description, FuncRow, ObjectFuncs
from kmend.module.layout import Layout
from kmend.runtime.place import Place
from kmend.runtime.symbols import SymbolTable
from kmend.verify.rules import Checked, TargetFacts

#: Where the tables of the image below are linked.
BASE = 0xFFFFFFFF81000000
STRINGS = b"\0alpha\0beta\0gamma\0CRYPTO\0"


def text_at(word: str) -> int:
    return STRINGS.index(word.encode() + b"\0") if word else 0


def rows(place: int, strings: int, *names: tuple[str, str]) -> bytes:
    """``struct kernel_symbol`` for names and namespaces: distances, each from itself."""
    out = b""
    for name, space in names:
        at = place + len(out)
        space_at = strings + text_at(space) - (at + 8) if space else 0
        out += struct.pack("<iii", 0x1234, strings + text_at(name) - (at + 4), space_at)
    return out


def image(**changed: bytes) -> Image:
    strings = BASE + 0x1000
    contents = {
        "__ksymtab": rows(BASE, strings, ("alpha", ""), ("gamma", "CRYPTO")),
        "__kcrctab": struct.pack("<II", 0x11, 0x33),
        "__ksymtab_gpl": rows(BASE + 0x100, strings, ("beta", "")),
        "__kcrctab_gpl": struct.pack("<I", 0xFFFFFFFF),
        "__ksymtab_strings": STRINGS,
        **changed,
    }
    places = {"__ksymtab": BASE, "__ksymtab_gpl": BASE + 0x100, "__ksymtab_strings": strings}

    class Tiny:
        def section(self, name: str) -> SimpleNamespace | None:
            return SimpleNamespace(address=places.get(name, 0)) if contents.get(name) else None

        def contents(self, name: str) -> bytes:
            return contents.get(name, b"")

    return cast(Image, Tiny())


def test_exports_of_an_image() -> None:
    exports = ImageExports(image())
    assert len(exports) == 3
    assert exports.get("alpha") == Export("alpha", 0x11, "vmlinux", False, "")
    assert exports.get("gamma") == Export("gamma", 0x33, "vmlinux", False, "CRYPTO")
    assert exports.get("beta") == Export("beta", 0xFFFFFFFF, "vmlinux", True, "")
    assert [exports.get(name) for name in ("", "aleph", "zeta", "CRYPTO")] == [None] * 4


@pytest.mark.parametrize(
    "changed",
    [
        {"__ksymtab_strings": b""},
        {"__kcrctab": b""},  # CONFIG_MODVERSIONS is off
        {"__kcrctab_gpl": bytes(8)},
        {"__ksymtab": bytes(13)},
        {"__ksymtab": struct.pack("<iii", 0, -8, 0) * 2},  # names in front of their section
    ],
)
def test_exports_of_an_unknown_form_are_none(changed: dict[str, bytes]) -> None:
    with pytest.raises(Failed, match="exports cannot be read"):
        ImageExports(image(**changed)).get("alpha")


def section(index: int, name: str, contents: bytes, relocs: tuple[Reloc, ...] = ()) -> Section:
    return Section(index, name, 1, 2, 0, len(contents), 0, 0, 1, 0, contents, relocs)


def module(crcs: bytes, where: int = 2) -> ElfFile:
    """Exports ``beta`` in the namespace CRYPTO, its strings at a symbol's value and a relocation's addend."""
    relocs = (Reloc(0, 2, 1, 0), Reloc(4, 2, 2, text_at("beta") - 2), Reloc(8, 2, 3, 0))
    return ElfFile(
        62,
        1,
        0,
        (
            section(0, "", b""),
            section(1, ".text", b"\xc3"),
            section(2, "__ksymtab_strings", STRINGS),
            section(3, "__ksymtab_gpl", bytes(12), relocs),
            section(4, "__kcrctab_gpl", crcs),
        ),
        (
            Symbol(0, "", 0, 0, 0, 0, 0, 0),
            Symbol(1, "beta", 0, 1, 2, 1, 0, 1),
            Symbol(2, "__kstrtab_beta", 2, 0, 0, 0, 0, where),
            Symbol(3, "__kstrtabns_beta", text_at("CRYPTO"), 0, 0, 0, 0, 2),
        ),
    )


def test_exports_of_a_module() -> None:
    found = symvers.of_module(module(struct.pack("<I", 7)), "fix")
    assert found == {"beta": Export("beta", 7, "fix", True, "CRYPTO")}
    for damaged in (module(b""), module(bytes(4), where=1)):
        with pytest.raises(Failed, match="what fix exports"):
            symvers.of_module(damaged, "fix")


def elf() -> bytes:
    names = b"\0.shstrtab\0"
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 1, 62, 1, 0, 0, 64, 0, 64, 0, 0, 64, 2, 1)
    row = struct.pack("<IIQQQQIIQQ", 1, 3, 0, 0, 64 + 128, len(names), 0, 0, 1, 0)
    return head + bytes(64) + row + names


def test_a_modules_file_is_found_by_either_spelling(tmp_path: Path) -> None:
    folder = tmp_path / "6.1.0"
    (folder / "kernel/md").mkdir(parents=True)
    (folder / "kernel/md/dm-mod.ko").write_bytes(elf())
    (folder / "kernel/md/mod.ko.xz").write_bytes(lzma.compress(elf()))
    (folder / "kernel/md/bad.ko").write_bytes(b"no module")
    listed = "kernel/md/dm-mod.ko: kernel/md/mod.ko.xz\nkernel/md/mod.ko.xz:\nkernel/md/bad.ko:\ngone.ko:\n"
    (folder / "modules.dep").write_text(listed)
    assert running.module_file("6.1.0", "dm_mod", tmp_path) == read(elf())
    assert running.module_file("6.1.0", "mod", tmp_path) == read(elf())
    for name in ("bad", "gone", "od", "md", "m.d"):
        assert running.module_file("6.1.0", name, tmp_path) is None
    assert running.module_file("6.2.0", "mod", tmp_path) is None


LAYOUT = Layout(*[0] * 31)
NO_SYMBOL = Refusal("klp-symbol", "used", "vmlinux has no symbol of this name", "")


class NoFiles:
    def image(self) -> Image:
        raise Unable("/boot/vmlinuz-6.1.0 cannot be read", why="No such file", rule="no-image")

    def module(self, _name: str) -> ElfFile | None:
        return None


def description(vermagic: str = "6.1.0 SMP ", *functions: tuple[str, int]) -> Description:
    funcs = tuple(FuncRow(name, sympos, "new") for name, sympos in functions)
    return Description("fix", vermagic, (), False, (ObjectFuncs("vmlinux", funcs),), None)


def table(place: Place, contents: str = "") -> SymbolTable:
    place.proc.mkdir(parents=True, exist_ok=True)
    (place.proc / "kallsyms").write_text("ffffffff81000000 T _text\n" + contents)
    return SymbolTable(place)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "sys", tmp_path / "proc", tmp_path / "dev", tmp_path / "run")


def test_what_is_not_known_is_named_and_refuses_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rules(_elf: ElfFile, target: TargetFacts, _name: str) -> Checked:
        assert target.exports.get("anything") is None
        assert target.traceable("vmlinux", 0x1000) and target.traceable("ext4", 3)
        assert target.module("ext4") is None
        assert [row.address for row in target.symbols.named("_text")] == [0xFFFFFFFF81000000]
        refused = [Refusal(rule, "x", "", "") for rule in ("vermagic", "not-exported", "symbol-version")]
        counts = {"vermagic": 1, "exports": 9, "functions": 2, "livepatch symbols": 1}
        return Checked(description(), (*refused, NO_SYMBOL), counts)

    monkeypatch.setattr(facts, "check", rules)
    files = cast(running.OwnFiles, NoFiles())
    own = RunningFacts(place, "6.1.0", files, LAYOUT, table(place), module(b""))
    checked = own.check("fix.ko")
    assert checked.refusals == (NO_SYMBOL,)
    found = list(facts.checks(checked, own.unknown, frozenset(), "files"))
    assert [(row.name, row.passed) for row in found] == [
        ("rules of kmend check", False),
        ("rules of kmend check: vermagic", None),
        ("rules of kmend check: exports", None),
        ("rules of kmend check: ftrace entries of vmlinux", None),
        ("rules of kmend check: ext4", None),
    ]
    assert "/boot/vmlinuz-6.1.0 cannot be read: No such file" in {row.text for row in found}
    told = frozenset({("klp-symbol", "used")})
    (row, *_) = facts.checks(checked, own.unknown, told, "files")
    assert (row.passed, row.refusal) == (False, None)
    assert row.text == "2 things looked at in files, the same objections"


def test_without_symbols_only_what_needs_none_is_held(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Refusal("klp-symbol", "of_module", "ext4 has no symbol of this name", "")

    def rules(_elf: ElfFile, target: TargetFacts, _name: str) -> Checked:
        assert target.symbols.named("used") == ()
        return Checked(description(), (NO_SYMBOL, other), {})

    monkeypatch.setattr(facts, "check", rules)
    mine = module(b"")
    symbol = Symbol(4, ".klp.sym.vmlinux.used,0", 0, 0, 0, 1, 0, 0xFF20)
    elf_file = ElfFile(62, 1, 0, mine.sections, (*mine.symbols, symbol))
    own = RunningFacts(place, "6.1.0", cast(running.OwnFiles, NoFiles()), LAYOUT, None, elf_file)
    assert own.check("fix.ko").refusals == (other,)
    assert "the kernel shows this user no symbols" in {row.why for row in own.unknown}


def test_a_module_other_than_its_file_is_not_known(place: Place) -> None:
    class Files(NoFiles):
        def module(self, _name: str) -> ElfFile:
            return read(elf())

    (place.module("ext4") / "notes").mkdir(parents=True)
    (place.module("ext4") / "initstate").write_text("live\n")
    (place.module("ext4") / "notes/.note.gnu.build-id").write_bytes(b"another")
    own = RunningFacts(place, "6.1.0", cast(running.OwnFiles, Files()), LAYOUT, table(place), module(b""))
    assert own.module("ext4") is None
    assert own.module("absent") is not None
    assert [(row.what, row.why) for row in own.unknown] == [
        ("ext4", "the loaded module is not the one of its file")
    ]


@pytest.mark.parametrize(
    ("made", "refused", "expected"),
    [
        (lambda: description("6.1.0 SMP ", ("once", 0)), set(), set()),
        (lambda: description("6.2.0 SMP "), {"vermagic"}, {("vermagic", "6.2.0 SMP")}),
        (lambda: description("6.1.0 ", ("twice", 0), ("twice", 2), ("twice", 3)), set(), {"twice"}),
        (lambda: description("6.1.0 ", ("once", 0), ("once", 0)), set(), {"once"}),
        (lambda: description("6.1.0 ", ("none", 0)), set(), {"none"}),
        (
            lambda: description("6.1.0 ", ("once", 0)),
            {"no-ftrace-entry"},
            {("no-ftrace-entry", "once")},
        ),
    ],
)
def test_what_others_say_is_not_said_twice(
    place: Place, made: Callable[[], Description], refused: set[str], expected: set[object]
) -> None:
    symbols = "".join(
        f"ffffffff8100{at:04x} t {name}\n" for at, name in enumerate(("once", "twice", "twice"))
    )
    found = facts.named_by_others(place, table(place, symbols), made(), refused)
    assert found == {("old-function", row) if isinstance(row, str) else row for row in expected}
