"""What kmend writes, seen by the tools of others: readelf and objdump; reader and writer on real files."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from elftools.elf.descriptions import describe_reloc_type
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import Symbol, SymbolTableSection

from kmend.cli import main
from kmend.core.config import Config
from kmend.core.run import run
from kmend.core.target import Target, Unit
from kmend.diff.compare import compare
from kmend.diff.select import select
from kmend.diff.unit import UnitObject
from kmend.elf.reader import read
from kmend.elf.writer import rewrite, taken_apart, write
from kmend.kernel import compile as compiling
from kmend.kernel import kbuild, overlay
from kmend.pairs import include_flags
from kmend.patch.apply import apply
from kmend.patch.intake import parse
from kmend.patch.lines import with_line_control

pytestmark = pytest.mark.target

ROOT = Path(__file__).resolve().parents[2]
CMDLINE = ROOT / "examples" / "cmdline.patch"
EXT4 = ROOT / "examples" / "ext4-null-folio.patch"


# -- objdump ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """An instruction: its place in the function, bytes and words as objdump shows them, relocations."""

    at: int
    code: str
    words: str
    relocs: tuple[tuple[int, str, str], ...]


class Disassembly:
    """``objdump -d`` of a file, function by function, with its relocations named by what they lead to.

    A linker lays sections out anew, so ``.rodata.str1.1+0x10`` says nothing: the string does, and for
    other sections the symbol that stands there. ``.klp.sym.vmlinux.seq_puts,0`` is ``seq_puts``. The
    relocations are pyelftools': objdump shows one relocation section of each section, and a livepatch module
    has two.
    """

    def __init__(self, path: Path) -> None:
        elf = ELFFile(io.BytesIO(path.read_bytes()))
        self.sections = list(elf.iter_sections())
        self.data = [section.data() for section in self.sections]
        (table,) = [s for s in self.sections if isinstance(s, SymbolTableSection)]
        self.symbols = list(table.iter_symbols())
        self.relocs: dict[tuple[str, int], tuple[str, int, int]] = {}
        for section in self.sections:
            if isinstance(section, RelocationSection):
                where = self.sections[section["sh_info"]].name
                for row in section.iter_relocations():
                    kind = describe_reloc_type(row["r_info_type"], elf)
                    assert (where, row["r_offset"]) not in self.relocs
                    self.relocs[where, row["r_offset"]] = (kind, row["r_info_sym"], row["r_addend"])
        sizes = {s.name: s["st_size"] for s in self.symbols if s["st_info"]["type"] == "STT_FUNC"}
        self.functions: dict[str, list[Line]] = {}
        start, name, where = 0, "", ""
        for text in run(["objdump", "-dw", "-z", path]).text.splitlines():
            if section_head := re.fullmatch(r"Disassembly of section (.+):", text):
                where = section_head[1]
            elif head := re.fullmatch(r"([0-9a-f]+) <(.+)>:", text):
                start, name = int(head[1], 16), head[2]
                self.functions[name] = []
            elif body := re.match(r"\s+([0-9a-f]+):\t((?:[0-9a-f]{2} )+)\s*\t?(.*)", text):
                at, code = int(body[1], 16), body[2].strip()
                end = at + len(code.split())
                if at - start < sizes.get(name, 0):  # what follows fills up to the next function
                    found = tuple(
                        self._reloc(where, place, start, end)
                        for place in range(at, end)
                        if (where, place) in self.relocs
                    )
                    self.functions[name].append(Line(at - start, code, self._plain(body[3]), found))

    def padding(self, name: str) -> int:
        """How many bytes objtool's ``__pfx_NAME`` has in front of a function."""
        return next((s["st_size"] for s in self.symbols if s.name == f"__pfx_{name}"), 0)

    def before(self, name: str, count: int) -> bytes:
        """The bytes in front of a function."""
        (symbol,) = [s for s in self.symbols if s.name == name and s["st_info"]["type"] == "STT_FUNC"]
        return bytes(self.data[symbol["st_shndx"]][symbol["st_value"] - count : symbol["st_value"]])

    @staticmethod
    def _plain(words: str) -> str:
        """The instruction without the addresses that objdump computes for its operands."""
        return re.sub(r"\b[0-9a-f]+ <[^>]*>", "TARGET", re.sub(r"\s*# [0-9a-f]+ <.*>", "", words)).strip()

    def _reloc(self, where: str, place: int, start: int, end: int) -> tuple[int, str, str]:
        kind, number, addend = self.relocs[where, place]
        if kind in ("R_X86_64_PC32", "R_X86_64_PLT32"):
            addend += end - place
        return place - start, kind, self._meaning(self.symbols[number], addend)

    def _meaning(self, symbol: Symbol, addend: int) -> str:
        if klp := re.fullmatch(r"\.klp\.sym\.[^.]+\.(.+),\d+", symbol.name):
            return f"{klp[1]}+{addend:#x}"
        if symbol["st_info"]["type"] != "STT_SECTION":
            return f"{symbol.name}+{addend:#x}"
        section = symbol["st_shndx"]
        if re.match(r"\.rodata(\..+)?\.str", self.sections[section].name):
            return repr(self.data[section][addend : self.data[section].index(b"\0", addend)])
        for other in self.symbols:
            value, size = other["st_value"], other["st_size"]
            if other["st_shndx"] == section and value <= addend < value + size:
                return f"{other.name}+{addend - value:#x}"
        return f"{self.sections[section].name}+{addend:#x}"


def patched_object(target: Target, patch: bytes, folder: Path) -> Path:
    """What the compiler makes of the patched unit, with the flags that kmend compiles with."""
    applied = apply(parse([("x.patch", patch)]), overlay.tree_reader(target.source))
    (file,) = applied.files
    assert file.new is not None
    files = {file.path: with_line_control(file.new, file.origins)}
    (unit,) = kbuild.unit_map(target).units(file.path)
    command = kbuild.commands(target, [unit])[unit]
    tree = overlay.make_overlay(target.source, files, folder / "tree", also=[command.source])
    flags = (*compiling.SPLIT_WITH_TYPES, *include_flags())
    return compiling.compile_unit(
        target, unit, command, tree=tree, out=folder / "object", extra_flags=flags
    ).path


def ext4_patch(target: Target) -> bytes:
    """A change of ``ext4_mb_load_buddy_gfp()`` in its own place of this kernel's source, with its context."""
    lines = (target.source / "fs/ext4/mballoc.c").read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if "load group %u" in line)
    before, after = "".join(f" {row}" for row in lines[at - 2 : at + 1]), lines[at + 1 : at + 4]
    return (
        f"--- a/fs/ext4/mballoc.c\n+++ b/fs/ext4/mballoc.c\n@@ -{at - 1},6 +{at - 1},7 @@\n"
        f"{before}+\tcond_resched();\n{''.join(f' {row}' for row in after)}"
    ).encode()


CASES: dict[str, tuple[str, Callable[[Target], bytes]]] = {
    "cmdline, 6.1": ("target_56", lambda _: CMDLINE.read_bytes()),
    "cmdline, 6.12": ("target_612", lambda _: CMDLINE.read_bytes()),
    "ext4, 6.1": ("target_55", lambda _: EXT4.read_bytes()),
    "ext4, 6.12": ("target_612", ext4_patch),
}


@pytest.mark.parametrize("case", CASES)
def test_emitted_modules_hold_the_compilers_code(
    case: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixture, patch_of = CASES[case]
    target: Target = request.getfixturevalue(fixture)
    patch = patch_of(target)
    (tmp_path / "x.patch").write_bytes(patch)
    words = [
        "build",
        str(tmp_path / "x.patch"),
        "--kernel",
        target.release,
        "-o",
        str(tmp_path),
        "-n",
        "made",
    ]
    assert main([*words, "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = [f["name"] for o in report["objects"] for f in o["functions"]]
    assert names

    module = tmp_path / "made.ko"
    for file in (module, tmp_path / "again.ko"):
        if file != module:
            file.write_bytes(rewrite(read(module.read_bytes())))
        seen = run(["readelf", "-aW", file], check=False)
        assert (seen.status, seen.errors) == (0, "")

    ours, theirs = Disassembly(module), Disassembly(patched_object(target, patch, tmp_path))
    cold = [name for name in theirs.functions if name.partition(".cold")[0] in names and ".cold" in name]
    for name in [*names, *cold]:
        padding = theirs.padding(name)
        assert ours.before(name, padding) == theirs.before(name, padding) == b"\x90" * padding
        assert len(theirs.functions[name]) > 0
        assert ours.functions[name] == theirs.functions[name], name
    assert (theirs.padding(names[0]) == 16) == (target.release.startswith("6.12"))
    assert any(line.relocs for name in names for line in ours.functions[name])


# -- reader and writer -----------------------------------------------------------------------------------


def test_round_trips_of_real_files() -> None:
    # 500 files take two minutes: make check-round-trip
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "check_round_trip.py", "--count", "24", "--seed", "7"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^differences +0$", done.stdout, re.MULTILINE)
    assert re.search(r"^held to readelf -a +24$", done.stdout, re.MULTILINE)


def unit_object(config: Config, target: Target, source: str) -> tuple[Unit, bytes]:
    unit = kbuild.unit_map(target).units(source)[0]
    command = kbuild.commands(target, [unit])[unit]
    return unit, compiling.original(config, target, unit, command).path.read_bytes()


@pytest.mark.parametrize("fixture", ["target_56", "target_612"])
@pytest.mark.parametrize("source", ["kernel/irq_work.c", "mm/maccess.c", "fs/ext4/acl.c", "kernel/panic.c"])
def test_order_means_nothing_in_the_kernels_objects(
    fixture: str, source: str, request: pytest.FixtureRequest, config: Config
) -> None:
    unit, data = unit_object(config, request.getfixturevalue(fixture), source)
    old = UnitObject.parse(data, unit.obj)
    for seed in range(4):
        rng = Random(seed)
        sections, symbols = taken_apart(old.elf)
        rng.shuffle(sections)
        rng.shuffle(symbols)
        new = UnitObject.parse(write(sections, symbols), unit.obj)
        diff = compare(old, new)
        selection = select(diff)
        assert diff.nothing
        assert (diff.new_functions, diff.removed, diff.new_data, selection.refusals) == ((), (), (), ())
        assert all(a == b for a, b in diff.twins.original.items())
