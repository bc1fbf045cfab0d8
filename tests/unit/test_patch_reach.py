"""Which units a patch reaches, and which files are refused or passed over by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest

from kmend.core.errors import Refused
from kmend.core.target import Linkage, Unit
from kmend.patch.apply import Applied, AppliedFile
from kmend.patch.reach import Reach, reach


def unit(source: str, owner: str = "vmlinux", linkage: Linkage = Linkage.BUILTIN) -> Unit:
    return Unit(source.removesuffix(".c") + ".o", source, owner, linkage)


@dataclass
class Lookup:
    """A small tree behind the same protocol as the real one."""

    compiled: dict[str, tuple[Unit, ...]]
    included: dict[str, tuple[str, ...]] = field(default_factory=dict)
    headers: dict[str, tuple[Unit, ...]] = field(default_factory=dict)
    words: dict[str, frozenset[str]] = field(default_factory=dict)

    def units(self, source: str) -> tuple[Unit, ...]:
        return self.compiled.get(source, ())

    def includers(self, source: str) -> tuple[str, ...]:
        return self.included.get(source, ())

    def explain_absent(self, source: str) -> str:
        return f"CONFIG_OF_{source} is not set"

    def including(self, header: str) -> tuple[Unit, ...]:
        return self.headers.get(header, ())

    def mentioning(self, names: Iterable[str]) -> frozenset[str]:
        return frozenset().union(*(self.words.get(name, frozenset()) for name in names))


EXT4 = unit("fs/ext4/mballoc.c", "ext4", Linkage.MODULE)
CORE = unit("kernel/sched/core.c")
FAIR = unit("kernel/sched/fair.c")
LOOKUP = Lookup(
    {
        "fs/ext4/mballoc.c": (EXT4,),
        "kernel/sched/core.c": (CORE,),
        "kernel/sched/build_policy.c": (unit("kernel/sched/build_policy.c"),),
        "lib/string.c": (unit("lib/string.c", linkage=Linkage.LIBRARY),),
        "arch/x86/entry/vdso/vma.c": (unit("arch/x86/entry/vdso/vma.c"),),
        "two.c": (unit("two.c", "one_module", Linkage.MODULE), unit("two.c", "other", Linkage.MODULE)),
    },
    {
        "kernel/sched/rt.c": ("kernel/sched/build_policy.c",),
        "a.c": ("b.c",),
        "b.c": ("a.c", "fs/ext4/mballoc.c"),
        "lib/vdso/gettimeofday.c": ("arch/x86/entry/vdso/vclock_gettime.c",),
    },
    {"fs/ext4/ext4.h": (EXT4, CORE), "include/linux/fs.h": (FAIR, CORE)},
)


def applied(*paths: str, old: bytes | None = b"old\n", new: bytes | None = b"new\n") -> Applied:
    return Applied(tuple(AppliedFile(path, old, new, (), ()) for path in paths))


def refused(change: Applied) -> list[tuple[str, str]]:
    with pytest.raises(Refused) as caught:
        reach(change, LOOKUP)
    return [(row.rule, row.what) for row in caught.value.reasons]


def objects(result: Reach) -> list[str]:
    return [unit.obj for unit in result.units]


def test_a_unit_of_a_module_and_one_of_vmlinux() -> None:
    result = reach(applied("fs/ext4/mballoc.c", "kernel/sched/core.c"), LOOKUP)
    assert result.units == (EXT4, CORE)
    assert [file.path for file in result.files] == ["fs/ext4/mballoc.c", "kernel/sched/core.c"]
    assert result.warnings == ()


def test_included_c_files_reach_their_includers_at_any_distance() -> None:
    assert objects(reach(applied("kernel/sched/rt.c"), LOOKUP)) == ["kernel/sched/build_policy.o"]
    assert objects(reach(applied("a.c"), LOOKUP)) == ["fs/ext4/mballoc.o"]
    # once, though two files reach it
    assert objects(reach(applied("a.c", "fs/ext4/mballoc.c"), LOOKUP)) == ["fs/ext4/mballoc.o"]


def test_one_source_in_two_modules() -> None:
    assert [unit.owner for unit in reach(applied("two.c"), LOOKUP).units] == ["one_module", "other"]


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("arch/x86/entry/entry_64.S", "asm-unit"),
        ("lib/string.c", "library-member"),
        ("arch/x86/entry/vdso/vclock_gettime.c", "vdso"),
        ("lib/vdso/gettimeofday.c", "vdso"),
        ("arch/x86/entry/vdso/vsgx.S", "vdso"),
        ("arch/x86/boot/main.c", "boot-code"),
        ("arch/x86/boot/header.S", "boot-code"),
        ("arch/x86/realmode/rm/wakemain.c", "boot-code"),
        ("fs/ext4/Kconfig", "build-system-change"),
        ("fs/ext4/Makefile", "build-system-change"),
        ("scripts/Makefile.build", "build-system-change"),
        ("scripts/Kbuild.include", "build-system-change"),
        ("Makefile", "build-system-change"),
        ("arch/x86/Kconfig.debug", "build-system-change"),
        ("arch/x86/kernel/vmlinux.lds.S", "build-system-change"),
        ("arch/x86/entry/syscalls/syscall_64.tbl", "build-system-change"),
        ("rust/kernel/lib.rs", "rust-unit"),
    ],
)
def test_refused_by_name(path: str, rule: str) -> None:
    assert refused(applied(path))[0][0] == rule
    # another file of the patch that could be done does not save it
    assert refused(applied(path, "fs/ext4/mballoc.c"))[0][0] == rule


def test_every_refusal_is_told_at_once() -> None:
    rules = [rule for rule, _ in refused(applied("fs/b.S", "fs/Kconfig", "fs/ext4/mballoc.c"))]
    assert rules == ["asm-unit", "build-system-change"]


def test_a_headers_units_are_candidates() -> None:
    found = reach(applied("fs/ext4/ext4.h"), LOOKUP)
    assert (found.units, found.candidates) == ((), (EXT4, CORE))


def test_a_unit_whose_own_file_changes_is_no_candidate() -> None:
    found = reach(applied("fs/ext4/ext4.h", "include/linux/fs.h", "fs/ext4/mballoc.c"), LOOKUP)
    assert (found.units, found.candidates) == ((EXT4,), (CORE, FAIR))


OLD, NEW = b"int old(void);\n", b"int old(void);\nint brand_new(void);\n"


def test_a_header_that_only_adds_names_reaches_nobody_else() -> None:
    change = applied("include/linux/fs.h", old=OLD, new=NEW)
    both = Applied((*change.files, *applied("fs/ext4/mballoc.c").files))
    assert reach(both, LOOKUP).candidates == ()
    assert objects(reach(both, LOOKUP)) == ["fs/ext4/mballoc.o"]


@pytest.mark.parametrize(
    ("where", "seen"), [("fs/ext4/mballoc.c", False), ("include/linux/mm.h", True), ("kernel/fork.c", True)]
)
def test_a_name_that_was_there_already_may_be_seen(where: str, seen: bool) -> None:
    """A macro would change what it means; not in the units that are compiled anyway."""
    lookup = replace(LOOKUP, words={"brand_new": frozenset({where})})
    both = Applied(
        (*applied("include/linux/fs.h", old=OLD, new=NEW).files, *applied("fs/ext4/mballoc.c").files)
    )
    assert bool(reach(both, lookup).candidates) is seen


def test_a_header_that_nobody_includes_is_not_compiled() -> None:
    assert refused(applied("include/linux/unused.h")) == [
        ("not-compiled", "include/linux/unused.h is not compiled into this kernel")
    ]
    found = reach(applied("include/linux/unused.h", "fs/ext4/mballoc.c"), LOOKUP)
    assert [row.rule for row in found.warnings] == ["not-compiled"]


@pytest.mark.parametrize(
    "path",
    [
        "Documentation/filesystems/ext4.rst",
        "Documentation/conf.py",
        "tools/testing/selftests/x.c",
        "tools/include/linux/fs.h",
        "tools/perf/Makefile",
        "MAINTAINERS",
        "scripts/mod/modpost.c",
        "fs/ext4/README.txt",
    ],
)
def test_files_that_are_no_code_are_passed_over(path: str) -> None:
    result = reach(applied(path, "fs/ext4/mballoc.c"), LOOKUP)
    assert result.units == (EXT4,)
    assert [(row.rule, row.what) for row in result.warnings] == [("not-compiled", path)]
    assert refused(applied(path)) == [("not-compiled", path)]


def test_a_unit_that_this_configuration_leaves_out_is_said_so_with_the_reason() -> None:
    result = reach(applied("drivers/no.c", "fs/ext4/mballoc.c"), LOOKUP)
    assert [row.why for row in result.warnings] == ["CONFIG_OF_drivers/no.c is not set"]
    assert refused(applied("drivers/no.c")) == [
        ("not-compiled", "drivers/no.c is not compiled into this kernel")
    ]


def test_ordinary_code_beside_the_vdso() -> None:
    assert objects(reach(applied("arch/x86/entry/vdso/vma.c"), LOOKUP)) == ["arch/x86/entry/vdso/vma.o"]


def test_new_and_deleted_files() -> None:
    result = reach(
        Applied((*applied("fs/ext4/new.c", old=None).files, *applied("fs/ext4/mballoc.c").files)), LOOKUP
    )
    assert result.units == (EXT4,)
    assert "no makefile" in result.warnings[0].why
    assert refused(applied("fs/ext4/mballoc.c", new=None))[0][0] == "deleted-unit"


def test_mode_changes_are_noted() -> None:
    mode = AppliedFile("fs/x.c", b"a\n", b"a\n", (), (), ("100644", "100755"))
    result = reach(Applied((mode, *applied("fs/ext4/mballoc.c").files)), LOOKUP)
    assert [row.rule for row in result.warnings] == ["mode-change"]
    assert refused(Applied((mode,)))[0][0] == "nothing-to-compile"


def test_nothing_at_all() -> None:
    assert refused(Applied(()))[0][0] == "nothing-to-compile"
