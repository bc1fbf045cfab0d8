"""Units, commands, objects and tables of a real kernel, held against the kernel's own build and packages."""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmend.core.config import Config
from kmend.core.errors import Failed
from kmend.core.run import run
from kmend.core.target import Linkage, Target, Unit
from kmend.kernel import compile as compiling
from kmend.kernel import kallsyms, kbuild, modules, symvers, units
from kmend.kernel.vmlinux import Image

pytestmark = pytest.mark.target


@pytest.fixture(scope="module")
def unit_map(target_55: Target) -> kbuild.UnitMap:
    return kbuild.unit_map(target_55)


def only(found: tuple[Unit, ...]) -> Unit:
    assert len(found) == 1
    return found[0]


def test_modules_are_exactly_the_image_s(target_55: Target, unit_map: kbuild.UnitMap) -> None:
    assert target_55.modules is not None
    order = (target_55.modules / "modules.order").read_text().split()
    found = {unit.owner for unit in unit_map.all_units() if unit.linkage is Linkage.MODULE}
    assert found == {symvers.module_name(path) for path in order}
    assert len(found) == len(order) == 4023
    units.check_modules(target_55, [path.removeprefix("kernel/")[:-3] + ".o" for path in order])
    with pytest.raises(Failed) as caught:
        units.check_modules(target_55, [path.removeprefix("kernel/")[:-3] + ".o" for path in order[1:]])
    assert caught.value.rule == "unit-map" and "1 are in the image alone" in caught.value.why


def test_units_of_known_files(unit_map: kbuild.UnitMap) -> None:
    ext4 = Unit("fs/ext4/mballoc.o", "fs/ext4/mballoc.c", "ext4", Linkage.MODULE)
    assert unit_map.units("fs/ext4/mballoc.c") == (ext4,) == unit_map.units("./fs/ext4/../ext4/mballoc.c")
    cmdline = only(unit_map.units("fs/proc/cmdline.c"))
    assert (cmdline.owner, cmdline.linkage) == ("vmlinux", Linkage.BUILTIN)
    assert only(unit_map.units("lib/string.c")).linkage is Linkage.LIBRARY
    kvm = only(unit_map.units("virt/kvm/kvm_main.c"))
    assert (kvm.obj, kvm.owner) == ("arch/x86/kvm/../../../virt/kvm/kvm_main.o", "kvm")
    assert only(unit_map.units("tools/lib/bpf/relo_core.c")).obj == "kernel/bpf/relo_core.o"
    assert only(unit_map.units("arch/x86/entry/entry_64.S")).owner == "vmlinux"
    shared = unit_map.units("drivers/net/ethernet/cavium/liquidio/octeon_nic.c")
    assert {unit.owner for unit in shared} == {"liquidio", "liquidio_vf"} and len(
        {u.obj for u in shared}
    ) == 1
    assert unit_map.units("fs/ext4") == unit_map.units("mballoc.c") == unit_map.units("") == ()
    assert len(unit_map.all_units()) > 13_000


def test_units_of_one_name_do_not_mix(unit_map: kbuild.UnitMap) -> None:
    for unit in random.Random(5).sample(unit_map.all_units(), 300):
        assert unit in unit_map.units(unit.source)
        assert all(found.source == unit.source for found in unit_map.units(unit.source))
        assert unit in [row.unit for row in unit_map.rows_of(unit.obj)]


def test_every_c_source_of_vmlinux_is_named_by_its_symbols(
    target_55: Target, unit_map: kbuild.UnitMap
) -> None:
    """Functions that a few built-in units define are in the image; those of units that are off are not."""
    table = kallsyms.load(target_55)
    for source, function in (("fs/read_write.c", "vfs_read"), ("mm/slub.c", "kmem_cache_alloc")):
        assert unit_map.units(source) and table.named(function)
    for source, function in (("mm/slob.c", "slob_alloc"), ("kernel/kcsan/core.c", "kcsan_setup_watchpoint")):
        assert not unit_map.units(source) and not table.named(function)


def test_includers(unit_map: kbuild.UnitMap) -> None:
    assert unit_map.includers("kernel/sched/rt.c") == ("kernel/sched/build_policy.c",)
    assert "lib/decompress_unzstd.c" in unit_map.includers("lib/zstd/common/debug.c")  # through a header
    assert unit_map.includers("fs/ext4/mballoc.c") == ()  # mballoc-test.c came later
    assert unit_map.includers("no/such.c") == ()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("fs/ext4/inode-test.c", "CONFIG_EXT4_KUNIT_TESTS is not set (fs/ext4/Makefile, line 18)"),
        ("mm/slob.c", "CONFIG_SLOB is not set"),
        ("mm/kasan/common.c", "CONFIG_KASAN is not set (mm/Makefile"),
        ("drivers/gpu/drm/msm/msm_drv.c", "CONFIG_DRM_MSM is not set"),
        ("arch/arm64/kernel/setup.c", "architecture arm64"),
        ("arch/x86/boot/main.c", "boot code"),
        ("arch/x86/entry/vdso/vclock_gettime.c", "vDSO"),
        ("arch/x86/purgatory/purgatory.c", "purgatory"),
        ("arch/x86/realmode/rm/wakemain.c", "real-mode"),
        ("drivers/firmware/efi/libstub/efi-stub.c", "EFI boot stub"),
        ("scripts/mod/modpost.c", "machine that builds"),
        ("fs/unicode/mkutf8data.c", "program of the build"),
        ("kernel/sched/rt.c", "kernel/sched/build_policy.c includes it"),
        ("kernel/bounds.c", "header of constants"),
        ("init/noinitramfs.c", "CONFIG_BLK_DEV_INITRD is y"),
        ("fs/ext4/nothing.c", "has no such file"),
        ("include/linux/list.h", "no C or assembly source"),
        ("fs/ext4", "folder"),
        ("../outside.c", "outside"),
    ],
)
def test_absent_files_are_explained(unit_map: kbuild.UnitMap, source: str, said: str) -> None:
    if source.endswith(".c"):
        assert unit_map.units(source) == ()
    assert said in unit_map.explain_absent(source)


def test_explanations_always_come(target_55: Target, unit_map: kbuild.UnitMap) -> None:
    """No file of the tree makes the explanation fail or fall silent."""
    every = [
        os.path.relpath(Path(folder) / name, target_55.source)
        for top in ("arch/x86", "fs", "kernel", "lib", "mm", "net", "drivers/net", "sound/soc")
        for folder, _, names in os.walk(target_55.source / top)
        for name in names
        if name.endswith(".c")
    ]
    absent = [name for name in every if not unit_map.units(name)]
    sentences = Counter(unit_map.explain_absent(name) for name in random.Random(7).sample(absent, 150))
    assert all(sentence and not sentence.endswith(".") for sentence in sentences)
    vague = sum(
        n for sentence, n in sentences.items() if "mentions it" in sentence or "no makefile" in sentence
    )
    assert vague <= 15  # at least nine of ten are given a reason


def listing(tree: Path) -> dict[str, tuple[int, int]]:
    out = {}
    for folder, _, names in os.walk(tree):
        for name in names:
            status = os.lstat(f"{folder}/{name}")
            out[f"{folder}/{name}"] = (status.st_mtime_ns, status.st_size)
    return out


COMPILE = re.compile(
    r"(?<!')(\S*gcc\S* -Wp,-MMD,\S+ .*?) -c -o (\S+) ([^\s;]+) *(?:; *(\S*objtool .*?) \S+\.o)? *;"
)


def real_commands(
    target: Target, objects: list[str]
) -> Iterator[tuple[str, str, list[str], list[str] | None]]:
    """What kbuild's top Makefile says that it would run (object, source, compiler, objtool)."""
    text = subprocess.run(
        ["make", "-n", "-k", f"KERNELRELEASE={target.release}", f"CC={target.compiler}", *objects],
        cwd=target.source, env={"PATH": os.environ["PATH"], "LC_ALL": "C"}, capture_output=True, text=True,
        check=False,
    ).stdout  # fmt: skip
    for line in text.splitlines():
        if match := COMPILE.search(line):
            words = [word for word in shlex.split(match[1]) if not word.startswith("-Wp,-MMD")]
            yield match[2], match[3], words, shlex.split(match[4]) if match[4] else None


def test_commands_are_kbuild_s_own(target_55: Target, unit_map: kbuild.UnitMap) -> None:
    choose = random.Random(3)
    compiled = [
        unit
        for unit in unit_map.all_units()
        if unit.source.endswith(".c")
        and (target_55.source / unit.source).exists()
        and not (target_55.source / unit.obj).exists()  # make would find it made
    ]
    chosen = choose.sample(compiled, 40) + choose.sample([u for u in compiled if ".." in u.obj], 10)
    real = {row[0]: row[1:] for row in real_commands(target_55, [unit.obj for unit in chosen])}
    ours = kbuild.commands(target_55, chosen)
    assert set(real) >= {unit.obj for unit in chosen}  # beside them, tools of the build itself
    for unit, command in ours.items():
        source, words, objtool = real[unit.obj]
        assert (command.source, list(command.compiler)) == (source, words)
        assert (list(command.objtool) if command.objtool else None) == objtool
        assert command.defines_module == (unit.linkage is Linkage.MODULE) and not command.late_objtool


def test_asking_changes_nothing_in_the_tree(
    target_55: Target, unit_map: kbuild.UnitMap, tmp_path: Path
) -> None:
    chosen = [
        only(unit_map.units(s)) for s in ("fs/ext4/mballoc.c", "lib/crc32.c", "security/selinux/hooks.c")
    ]
    kbuild.commands(target_55, chosen)
    for cached in (target_55.folder / "commands").iterdir():
        cached.unlink()
    before = listing(target_55.source)
    first = kbuild.commands(target_55, chosen)
    compiling.compile_unit(target_55, chosen[1], first[chosen[1]], tree=target_55.source, out=tmp_path)
    assert kbuild.commands(target_55, chosen) == first  # from the cache
    assert listing(target_55.source) == before


def test_assembly_has_no_compile_command(target_55: Target, unit_map: kbuild.UnitMap) -> None:
    with pytest.raises(Failed) as caught:
        kbuild.commands(target_55, [Unit("fs/none.o", "fs/none.c", "vmlinux", Linkage.BUILTIN)])
    assert caught.value.rule == "kbuild"


def test_original_equals_the_image(target_55: Target, unit_map: kbuild.UnitMap, config: Config) -> None:
    """cmdline_proc_show as compiled here is in the image at its symbol, but for the relocated bytes."""
    unit = only(unit_map.units("fs/proc/cmdline.c"))
    made = compiling.original(config, target_55, unit, kbuild.commands(target_55, [unit])[unit])
    assert made.deps[0] == "fs/proc/cmdline.c" and "include/linux/seq_file.h" in made.deps
    dump = run(["objdump", "-dr", "-j", ".text.cmdline_proc_show", str(made.path)]).text
    code, relocated = bytearray(), set()
    for line in dump.splitlines():
        if row := re.match(r"\s+[0-9a-f]+:\t((?:[0-9a-f]{2} )+)", line):
            code += bytes.fromhex(row[1])
        elif row := re.match(r"\s+([0-9a-f]+): R_X86_64_\w+", line):
            relocated |= set(range(int(row[1], 16) - 1, int(row[1], 16) + 4))  # with the opcode before it
    (symbol,) = kallsyms.load(target_55).named("cmdline_proc_show")
    with Image.open(target_55.vmlinux) as image:
        shipped = image.read(symbol.address, len(code))
    same = [i for i in range(len(code)) if i not in relocated]
    assert len(same) > 15 and all(code[i] == shipped[i] for i in same)
    assert compiling.original(config, target_55, unit, kbuild.commands(target_55, [unit])[unit]).cached


def test_snippet_is_a_module_of_this_kernel(target_55: Target, tmp_path: Path) -> None:
    text = (
        "#include <linux/module.h>\n#include <linux/livepatch.h>\n"
        "#ifndef MODULE\n#error no module\n#endif\n"
        "unsigned long kmend_layout[] = { sizeof(struct klp_patch), offsetof(struct module, name) };\n"
        'const char *kmend_name = KBUILD_MODNAME;\nMODULE_LICENSE("GPL");\n'
    )
    made = compiling.compile_snippet(target_55, text, out=tmp_path, module_name="kmend-layout")
    data = made.read_bytes()
    assert b"kmend_layout\0" in data and b"license=GPL\0" in data
    with pytest.raises(Failed) as caught:
        compiling.compile_snippet(target_55, "int x = foo;\n", out=tmp_path, module_name="bad")
    assert caught.value.rule == "compile-error" and "foo" in caught.value.why


def test_symbol_table(target_55: Target) -> None:
    table = kallsyms.load(target_55)
    assert len(table) == 94_266
    symbols = table.symbols()
    assert [s.address for s in symbols] == sorted(s.address for s in symbols)
    twice = table.named("init_once")
    assert len(twice) > 5 and [s.address for s in twice] == sorted(s.address for s in twice)
    (read,) = table.named("vfs_read")
    assert table.covering(read.address + 3) == read and read in table.at(read.address)
    end = table.next_after(read.address)
    assert end is not None and end > read.address
    assert {s.name for s in table.at(table.named("_text")[0].address)} >= {"_text", "_stext"}
    (current,) = table.named("current_task")
    assert current.type == "A" and current.address < 0x100000 and table.covering(current.address) is None
    kallsyms.check(target_55, [(s.address, s.type, s.name) for s in symbols])


def test_wrong_symbol_table_is_noticed(target_55: Target) -> None:
    rows = [(int(s.address), s.type, s.name) for s in kallsyms.load(target_55).symbols()]
    shifted = [(a + 16 if a > 1 << 63 and n not in ("_text", "_stext") else a, t, n) for a, t, n in rows]
    shifted.sort(key=lambda row: row[0])
    with pytest.raises(Failed):
        kallsyms.check(target_55, shifted)
    renamed = [(a, t, rows[(i + 1) % len(rows)][2]) for i, (a, t, n) in enumerate(rows)]
    with pytest.raises(Failed):
        kallsyms.check(target_55, renamed)


def test_modules_of_the_target(target_55: Target) -> None:
    ext4 = modules.module_file(target_55, "ext4")
    assert ext4.path.name == "ext4.ko" and ext4.path.is_file()
    assert set(modules.module_dependencies(target_55, "ext4")) == {"crc16", "jbd2", "mbcache"}
    (row,) = modules.defined_in(target_55, "ext4_mb_load_buddy_gfp")
    assert (row.module, row.is_function, row.is_local) == ("ext4", True, True)
    info = modules.find(target_55, "ext4")
    assert info is not None and set(info.depends) == {"crc16", "jbd2", "mbcache"}


def test_exports_agree_with_what_modules_define(target_55: Target) -> None:
    exports = symvers.load(target_55.symvers)
    assert exports.get("jbd2_journal_start") is not None and len(exports) > 20_000
    choose = random.Random(11)
    names = [name for name in exports if (e := exports.get(name)) and e.owner != "vmlinux"]
    wrong = []
    for name in choose.sample(names, 200):
        export = exports.get(name)
        assert export is not None
        if export.owner not in {row.module for row in modules.defined_in(target_55, name)}:
            wrong.append(name)
    # Exports of assembly functions without a type are not in the index of functions and variables.
    assert len(wrong) <= 2, wrong
