"""Provenance on real kernels: every byte counts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmend.core.config import Config
from kmend.core.errors import Failed
from kmend.core.target import VMLINUX, Linkage, Target, Unit
from kmend.diff.select import is_init
from kmend.diff.special import SpecialSections
from kmend.diff.unit import Part, UnitObject
from kmend.kernel import compile as compiling
from kmend.kernel import kbuild
from kmend.verify.provenance import Findings, ModuleBinary, VmlinuxBinary
from kmend.verify.symbols import Prover
from kmend.view import TargetView

pytestmark = pytest.mark.target

#: Ten functions of vmlinux whose every byte is flipped.
SWEPT = {
    "fs/proc/cmdline.c": ("cmdline_proc_show",),
    "fs/read_write.c": (
        "vfs_read",
        "vfs_llseek",
        "generic_file_llseek_size",
        "do_iter_write",
        "vfs_iter_read",
    ),
    "net/ipv4/tcp_input.c": ("tcp_rcv_established", "tcp_check_space", "tcp_fin", "tcp_reset"),
}


class Flipped:
    """The image with one byte changed."""

    def __init__(self, view: TargetView) -> None:
        self.image = view.image
        self.address = 0
        self.mask = 0

    def read(self, address: int, size: int) -> bytes:
        data = self.image.read(address, size)
        if self.mask and address <= self.address < address + size:
            at = self.address - address
            data = data[:at] + bytes([data[at] ^ self.mask]) + data[at + 1 :]
        return data


def original(config: Config, target: Target, source: str) -> tuple[Unit, UnitObject]:
    (unit,) = kbuild.unit_map(target).units(source)
    command = kbuild.commands(target, [unit])[unit]
    made = compiling.original(config, target, unit, command)
    return unit, UnitObject.parse(made.path.read_bytes(), unit.obj)


@pytest.fixture(scope="module")
def view(config: Config, target_56: Target) -> TargetView:
    return TargetView(config, target_56)


def swept(config: Config, target: Target) -> Iterator[tuple[UnitObject, Part]]:
    for source, names in SWEPT.items():
        _, unit = original(config, target, source)
        for name in names:
            yield unit, unit.parts[name]


def test_every_flipped_byte_is_caught(
    config: Config, target_56: Target, view: TargetView, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flip each compared byte of ten functions in two ways: the comparison must fail each time."""
    image = Flipped(view)
    binary = VmlinuxBinary(image, view.symbols)
    flips = missed = total = masked = functions = 0
    for unit, part in swept(config, target_56):
        special = SpecialSections(unit)
        (place,) = binary.places(part)
        image.mask = 0
        findings = Findings()
        assert binary.compare(unit, special, part, place, findings) is None
        total += findings.compared
        masked += findings.masked
        functions += 1
        for offset in range(part.size):
            image.address = place + offset
            for image.mask in (0x01, 0x80):
                flips += 1
                if binary.compare(unit, special, part, place, Findings()) is None:
                    missed += 1
    with capsys.disabled():
        print(
            f"\nprovenance: {functions} functions, {total} bytes compared, {masked} masked "
            f"({100 * masked / total:.2f} %), {flips} flips, {missed} missed"
        )
    assert functions == 10
    assert missed == 0
    assert masked == 0, "nothing in 6.1 is rewritten after compiling"


@pytest.mark.parametrize("source", ["fs/proc/cmdline.c", "fs/read_write.c", "net/ipv4/tcp_input.c"])
def test_whole_units_of_vmlinux_are_the_shipped_code(
    config: Config, target_56: Target, view: TargetView, source: str
) -> None:
    unit, parsed = original(config, target_56, source)
    assert unit.owner == VMLINUX
    assert unit.linkage is Linkage.BUILTIN
    prover = Prover(view.world(), unit.owner, parsed, SpecialSections(parsed))
    functions = [f for f in parsed.functions() if not is_init(parsed.section_of(f))]
    assert functions
    assert {f.name: prover.function(f) for f in functions if prover.function(f) is not None} == {}


def test_a_whole_unit_of_a_module_is_the_shipped_code(
    config: Config, target_56: Target, view: TargetView
) -> None:
    unit, parsed = original(config, target_56, "fs/ext4/mballoc.c")
    assert unit.owner == "ext4"
    prover = Prover(view.world(), unit.owner, parsed, SpecialSections(parsed))
    functions = [f for f in parsed.functions() if not is_init(parsed.section_of(f))]
    assert len(functions) > 60
    assert {f.name: prover.function(f) for f in functions if prover.function(f) is not None} == {}


def test_flips_in_a_module_are_caught(config: Config, target_56: Target, view: TargetView) -> None:
    """Every 7th byte of one function of ext4.ko, in the file itself."""
    _, unit = original(config, target_56, "fs/ext4/mballoc.c")
    part = unit.parts["ext4_mb_load_buddy_gfp"]
    special = SpecialSections(unit)
    module = view.module("ext4")
    (theirs,) = [p for p in module.parts.values() if p.name == part.name]
    section = module.section_of(theirs)
    covered = {
        i for r in module.relocs(theirs) for i in range(r.offset - theirs.start, r.offset - theirs.start + 4)
    }
    raw = bytearray(view_path(target_56, "ext4").read_bytes())
    base = raw.index(section.data[theirs.start : theirs.end])
    caught = 0
    for offset in range(0, part.size, 7):
        if offset in covered:
            continue  # the loader writes there; what counts is the relocation itself
        raw[base + offset] ^= 0x10
        damaged = ModuleBinary(UnitObject.parse(bytes(raw), "ext4"), "ext4")
        raw[base + offset] ^= 0x10
        mismatch = damaged.compare(unit, special, part, damaged.places(part)[0], Findings())
        assert mismatch is not None, hex(offset)
        assert mismatch.function == part.name
        caught += 1
        if caught == 40:
            break
    assert caught == 40


def view_path(target: Target, name: str) -> Path:
    assert target.modules is not None
    (path,) = target.modules.rglob(f"{name}.ko")
    return path


def test_a_changed_constant_is_shown_with_its_instruction(
    config: Config, target_56: Target, view: TargetView, tmp_path: Path
) -> None:
    (unit,) = kbuild.unit_map(target_56).units("fs/read_write.c")
    command = kbuild.commands(target_56, [unit])[unit]
    text = (target_56.source / "fs/read_write.c").read_text()
    assert text.count("return -ESPIPE;") >= 1
    tree = tmp_path / "tree"
    tree.mkdir()
    for entry in target_56.source.iterdir():
        (tree / entry.name).symlink_to(entry)
    (tree / "fs").unlink()
    shutil.copytree(target_56.source / "fs", tree / "fs", symlinks=True, copy_function=_link)
    (tree / "fs/read_write.c").unlink()
    (tree / "fs/read_write.c").write_text(text.replace("return -EINVAL;", "return -EPERM;"))
    made = compiling.compile_unit(target_56, unit, command, tree=tree, out=tmp_path / "out")
    parsed = UnitObject.parse(made.path.read_bytes(), unit.obj)
    prover = Prover(view.world(), unit.owner, parsed, SpecialSections(parsed))
    mismatch = prover.function(parsed.parts["vfs_read"])
    assert mismatch is not None
    assert mismatch.ours == "movq $-1, %rbx"
    assert mismatch.theirs == "movq $-22, %rbx"
    assert "bytes differ" in mismatch.why


def _link(source: str, target: str) -> str:
    Path(target).symlink_to(source)
    return target


def test_another_release_is_refused(config: Config, target_56: Target, target_55: Target) -> None:
    """mballoc.c of -56 against ext4.ko of -55: the fix itself is what differs."""
    _, unit = original(config, target_56, "fs/ext4/mballoc.c")
    other = TargetView(config, target_55)
    prover = Prover(other.world(), "ext4", unit, SpecialSections(unit))
    mismatch = prover.function(unit.parts["ext4_mb_load_buddy_gfp"])
    assert mismatch is not None
    assert mismatch.ours != mismatch.theirs
    refusal = mismatch.refusal("ext4")
    assert refusal.rule == "provenance"
    assert mismatch.ours in refusal.why
    assert mismatch.theirs in refusal.why


def test_reading_beyond_the_image_is_an_error(view: TargetView) -> None:
    with pytest.raises(Failed):
        view.image.read(0xFFFFFFFF00000000, 8)
