"""Running compiler and objtool, and the cache of originals, with a small tree in place of the kernel's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kmend.core.config import Config, load
from kmend.core.errors import Failed
from kmend.core.files import scratch_folder
from kmend.core.progress import Silent
from kmend.core.target import Linkage, Release, Target, Unit
from kmend.kernel import compile as compiling
from kmend.kernel.kbuild import CompileCommand
from kmend.view import scratch

UNIT = Unit("lib/one.o", "lib/one.c", "vmlinux", Linkage.BUILTIN)
COMMAND = CompileCommand(
    ("gcc", "-O2", "-g", "-nostdinc", "-Iinclude", "-DKBUILD_MODNAME=one"), "lib/one.c", None, False, False
)
TOOL = """#!/bin/sh
for last; do :; done
case "$1" in
  fail) echo "$last: error: no"; exit 1;;
  warn) echo "$last: warning: objtool: odd"; exit 0;;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "lib").mkdir(parents=True)
    (root / "include").mkdir()
    (root / "include/number.h").write_text("#define NUMBER 1\n")
    (root / "lib/one.c").write_text(
        "#include <number.h>\nint one(void) { return NUMBER; }\nchar *f = __FILE__;\n"
    )
    (root / "objtool").write_text(TOOL)
    (root / "objtool").chmod(0o755)
    return root


@pytest.fixture
def target(tmp_path: Path, tree: Path) -> Target:
    return Target(
        Release("6.1.0-0-test"), "custom", "", "", tmp_path / "folder", tree, tmp_path / ".config",
        tmp_path / "symvers", tmp_path / "vmlinux", None, None, "gcc",
    )  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    return load({"cache": str(tmp_path / "cache"), "jobs": "2"}, env={}, file=tmp_path / "none.toml")


Compile = Callable[..., compiling.Compiled]


@pytest.fixture
def compile_one(target: Target, tree: Path, tmp_path: Path) -> Compile:
    def work(command: CompileCommand = COMMAND, **more: object) -> compiling.Compiled:
        fields: dict[str, object] = {"tree": tree, "out": tmp_path / "out", **more}
        return compiling.compile_unit(target, UNIT, command, **fields)  # type: ignore[arg-type]  # as given

    return work


def files_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_unit_is_compiled_outside_of_the_tree(compile_one: Compile, tree: Path, tmp_path: Path) -> None:
    before = files_below(tree)
    made = compile_one()
    assert made.path == tmp_path / "out/lib/one.o" and made.path.read_bytes()[:4] == b"\x7fELF"
    assert made.deps == ("lib/one.c", "include/number.h")
    assert not made.cached and made.warnings == () and made.seconds > 0
    data = made.path.read_bytes()
    assert b".text.one" in data and b".debug_info" not in data and b"lib/one.c\0" in data
    assert files_below(tree) == before and files_below(tmp_path / "out") == ["lib/one.o"]
    with_debug = compile_one(debug_info=True, extra_flags=())
    assert b".debug_info" in with_debug.path.read_bytes() and b".text.one" not in with_debug.path.read_bytes()


def test_compiler_errors_are_the_reason(compile_one: Compile, tree: Path, tmp_path: Path) -> None:
    compile_one()
    (tree / "lib/one.c").write_text("int one(void) { return missing; }\n#include <nowhere.h>\n")
    with pytest.raises(Failed) as caught:
        compile_one()
    assert caught.value.rule == "compile-error" and caught.value.what == "lib/one.c does not compile"
    assert "nowhere.h" in caught.value.why and "lib/one.c:2" in caught.value.why
    # The earlier object stays whole; nothing half-made lies about.
    assert files_below(tmp_path / "out") == ["lib/one.o"]


def test_compiler_that_dies_is_no_success(compile_one: Compile, tmp_path: Path) -> None:
    killer = tmp_path / "gcc-dies"
    killer.write_text("#!/bin/sh\nkill -9 $$\n")
    killer.chmod(0o755)
    with pytest.raises(Failed) as caught:
        compile_one(replace(COMMAND, compiler=(str(killer),)))
    assert caught.value.rule == "compile-error" and "signal 9" in caught.value.why
    quiet = tmp_path / "gcc-lies"
    quiet.write_text("#!/bin/sh\nexit 0\n")
    quiet.chmod(0o755)
    with pytest.raises(Failed) as caught:
        compile_one(replace(COMMAND, compiler=(str(quiet),)))
    assert "no object" in caught.value.why


def test_compiler_is_stopped_in_time(compile_one: Compile, tmp_path: Path) -> None:
    slow = tmp_path / "gcc-slow"
    slow.write_text("#!/bin/sh\nsleep 60\n")
    slow.chmod(0o755)
    start = time.monotonic()
    with pytest.raises(Failed) as caught:
        compile_one(replace(COMMAND, compiler=(str(slow),)), timeout=0.3)
    assert caught.value.rule == "timeout" and time.monotonic() - start < 10


def test_objtool_speaks_and_fails(compile_one: Compile, tmp_path: Path) -> None:
    warned = compile_one(replace(COMMAND, objtool=("./objtool", "warn")))
    assert warned.warnings == ("one.o: warning: objtool: odd",)
    assert 0 < warned.objtool_seconds < warned.seconds
    warned.path.unlink()
    with pytest.raises(Failed) as caught:
        compile_one(replace(COMMAND, objtool=("./objtool", "fail")))
    assert caught.value.rule == "objtool" and "one.o: error: no" in caught.value.why
    assert files_below(tmp_path / "out") == []  # never an object that objtool has not passed


def test_unwritable_output(compile_one: Compile, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Failed) as caught:
        compile_one(out=tmp_path / "file")
    assert caught.value.rule == "unwritable"


def test_a_run_that_finds_its_original_removes_what_a_killed_one_left(
    target: Target, settings: Config
) -> None:
    """Killed once its object was in the store, but its folder not yet gone."""
    compiling.original(settings, target, UNIT, COMMAND)
    work = settings.objects / "work"
    (work / "unit-killed").mkdir()
    (work / "unit-killed.lock").touch()
    (work / "unit-late.lock").touch()
    with scratch(settings):
        assert compiling.original(settings, target, UNIT, COMMAND).cached
        assert list(work.iterdir()) == []


def test_originals_are_kept_by_content(target: Target, settings: Config, tree: Path) -> None:
    def ask(command: CompileCommand = COMMAND) -> compiling.Compiled:
        return compiling.original(settings, target, UNIT, command)

    first = ask()
    again = ask()
    assert not first.cached and again.cached
    assert again.path == first.path and again.deps == first.deps and again.seconds == first.seconds

    header = tree / "include/number.h"
    header.write_text("#define NUMBER 2\n")
    changed = ask()
    assert not changed.cached and changed.path != first.path
    assert changed.path.read_bytes() != first.path.read_bytes()
    header.write_text("#define NUMBER 1\n")
    assert ask().path == first.path and ask().cached  # the old contents are known still

    other = ask(replace(COMMAND, compiler=(*COMMAND.compiler, "-O1")))
    assert not other.cached and other.path != first.path

    first.path.write_bytes(first.path.read_bytes()[:100])  # as a power cut may leave it
    mended = ask()
    assert not mended.cached and mended.path.read_bytes()[:4] == b"\x7fELF" and ask().cached
    assert list((settings.objects / "work").iterdir()) == []


def test_cache_heeds_objtool_and_new_headers(target: Target, settings: Config, tree: Path) -> None:
    command = replace(COMMAND, objtool=("./objtool", "quiet"))
    assert not compiling.original(settings, target, UNIT, command).cached
    assert compiling.original(settings, target, UNIT, command).cached
    (tree / "objtool").write_text(TOOL + "# another build of it\n")
    assert not compiling.original(settings, target, UNIT, command).cached
    (tree / "include/number.h").write_text("#include <more.h>\n#define NUMBER MORE\n")
    (tree / "include/more.h").write_text("#define MORE 7\n")
    made = compiling.original(settings, target, UNIT, command)
    assert not made.cached and "include/more.h" in made.deps
    (tree / "include/more.h").write_text("#define MORE 8\n")
    assert not compiling.original(settings, target, UNIT, command).cached


def test_left_overs_of_killed_runs_are_swept(target: Target, settings: Config) -> None:
    work = settings.objects / "work"
    (work / "unit-dead" / "fs").mkdir(parents=True)
    (work / "unit-dead.lock").touch()
    with scratch_folder(work, "unit") as alive:
        compiling.original(settings, target, UNIT, COMMAND)
        assert sorted(path.name for path in work.iterdir()) == [alive.name, f"{alive.name}.lock"]
    assert list(work.iterdir()) == []


def test_a_full_disk_is_not_the_authors_error(tree: Path, target: Target, tmp_path: Path) -> None:
    """The compiler is the one to meet it, and says so among its own errors."""
    fake = tree / "full.sh"
    fake.write_text(
        '#!/bin/sh\necho "$TMPDIR/x.s: Fatal error: $TMPDIR: No space left on device" >&2; exit 1\n'
    )
    fake.chmod(0o755)
    command = replace(COMMAND, compiler=(str(fake),))
    with pytest.raises(Failed) as caught:
        compiling.compile_unit(target, UNIT, command, tree=tree, out=tmp_path / "out")
    assert caught.value.rule == "disk-full"
    assert str(tmp_path / "out") in caught.value.why, "gcc's own files must not go to /tmp"
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_pairs(target: Target, settings: Config, tree: Path, tmp_path: Path) -> None:
    patched = tmp_path / "patched"
    (patched / "lib").mkdir(parents=True)
    (patched / "include").symlink_to(tree / "include")
    (patched / "lib/one.c").write_text((tree / "lib/one.c").read_text().replace("NUMBER;", "NUMBER + 41;"))
    out = tmp_path / "pairs"
    pairs = compiling.compile_pairs(
        settings, target, {UNIT: COMMAND}, patched_tree=patched, out=out, progress=Silent()
    )
    pair = pairs[UNIT]
    assert pair.patched.path == out / "lib/one.o" and pair.original.path.parent.parent == settings.objects
    assert b"lib/one.c\0" in pair.patched.path.read_bytes()  # __FILE__ is the same on both sides
    assert pair.original.path.read_bytes() != pair.patched.path.read_bytes()
    assert (
        compiling.compile_pairs(settings, target, {}, patched_tree=patched, out=out, progress=Silent()) == {}
    )


def test_first_failure_ends_the_others(target: Target, settings: Config, tree: Path, tmp_path: Path) -> None:
    slow = tmp_path / "gcc-slow"
    slow.write_text('#!/bin/sh\ncase "$*" in --version|-print*) exit 0;; esac\nsleep 60\n')
    slow.chmod(0o755)
    other = replace(UNIT, obj="lib/two.o", source="lib/two.c")
    (tree / "lib/one.c").write_text("broken\n")
    commands = {UNIT: COMMAND, other: replace(COMMAND, compiler=(str(slow),), source="lib/two.c")}
    start = time.monotonic()
    with pytest.raises(Failed) as caught:
        compiling.compile_pairs(
            settings, target, commands, patched_tree=tree, out=tmp_path / "out", progress=Silent()
        )
    assert caught.value.rule == "compile-error" and time.monotonic() - start < 20


@pytest.mark.parametrize(
    "flag", ["-g", "-g3", "-gdwarf-4", "-gdwarf-5", "-gz=zlib", "-gsplit-dwarf", "-ggdb"]
)
def test_debug_flags_are_dropped(flag: str) -> None:
    command = replace(COMMAND, compiler=("gcc", flag, "-fno-gnu-unique", "-mfoo"))
    assert compiling.compiler_arguments(command, ())[:3] == ("gcc", "-fno-gnu-unique", "-mfoo")
    assert compiling.compiler_arguments(command, (), debug_info=True)[1] == flag


def test_dependency_listing_of_the_compiler() -> None:
    text = "o: fs/a.c include/b.h \\\n  fs/../fs/c.h with\\ space.h a\\#b.h co$$t.h \\\n include/b.h\n"
    assert compiling.read_dependencies(text) == (
        "fs/a.c", "include/b.h", "fs/c.h", "with space.h", "a#b.h", "co$t.h",
    )  # fmt: skip


def test_objects_of_dotted_names_stay_below_the_output() -> None:
    unit = replace(UNIT, obj="arch/x86/kvm/../../../virt/kvm/kvm_main.o")
    assert compiling.object_name(unit) == "arch/x86/kvm/__/__/__/virt/kvm/kvm_main.o"
