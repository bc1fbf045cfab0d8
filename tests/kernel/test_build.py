"""``kmend build`` on real kernels, as a user types it: modules, reports, refusals, exit status."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kmend.cli import main
from kmend.core.config import Config
from kmend.core.run import run
from kmend.core.target import Target
from kmend.diff.unit import UnitObject
from kmend.elf.reader import read
from kmend.kernel import compile as compiling
from kmend.kernel import kbuild
from kmend.kernel.vmlinux import Image
from kmend.module.describe import describe, klp_symbols
from kmend.module.layout import modinfo, read_layout
from kmend.view import TargetView

pytestmark = pytest.mark.target

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
EXT4 = EXAMPLES / "ext4-null-folio.patch"
CMDLINE = EXAMPLES / "cmdline.patch"

Build = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Build:
    """Run ``kmend build --json``: exit status and document."""

    def go(*args: str | Path) -> tuple[int, dict[str, Any]]:
        status = main(["build", *map(str, args), "--json", "--quiet", "-o", str(tmp_path)])
        return status, json.loads(capsys.readouterr().out)

    return go


def patch_of(tmp_path: Path, target: Target, path: str, *changes: tuple[str, str]) -> Path:
    """A patch that makes the replacements in one file of the target's source."""
    old = (target.source / path).read_text()
    new = old
    for before, after in changes:
        assert new.count(before) == 1, (before, new.count(before))
        new = new.replace(before, after)
    (tmp_path / "old").write_text(old)
    (tmp_path / "new").write_text(new)
    found = run(
        ["diff", "-u", "--label", f"a/{path}", "--label", f"b/{path}", tmp_path / "old", tmp_path / "new"],
        check=False,
    )
    out = tmp_path / "change.patch"
    out.write_bytes(found.stdout)
    return out


def names(document: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {o["name"]: {f["name"]: f["status"] for f in o["functions"]} for o in document["objects"]}


def rules(document: dict[str, Any]) -> set[str]:
    return {r["rule"] for r in document["refused"]}


@pytest.mark.usefixtures("target_55")
def test_the_ext4_fix(build: Build, tmp_path: Path) -> None:
    status, document = build(EXT4, "--kernel", "6.1.0-55-amd64")
    assert status == 0
    assert document["result"] == "built"
    assert names(document) == {"ext4": {"ext4_mb_init_group": "changed", "ext4_mb_load_buddy_gfp": "changed"}}
    assert document["verified"] == {"functions": 2, "identical": 2, "skipped": []}
    why = {f["name"]: f["why"] for f in document["objects"][0]["functions"]}
    assert why["ext4_mb_load_buddy_gfp"] == "edited"
    assert "ext4_mb_get_buddy_page_lock" in why["ext4_mb_init_group"]
    module = Path(document["module"])
    assert module == tmp_path / "kmend_ext4_null_folio.ko"
    assert hashlib.sha256(module.read_bytes()).hexdigest() == document["sha256"]
    assert json.loads(module.with_suffix(".json").read_text()) == document
    assert {"fetch", "prepare", "compile", "diff", "link", "verify", "total"} <= set(document["timings"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "kmend_ext4_null_folio.json",
        "kmend_ext4_null_folio.ko",
    ]


@pytest.mark.usefixtures("target_56")
def test_the_fixed_kernel_says_already_applied(build: Build, tmp_path: Path) -> None:
    status, document = build(EXT4, "--kernel", "6.1.0-56-amd64")
    assert status == 1
    assert document["result"] == "refused"
    assert rules(document) == {"already-applied"}
    assert "already applied" in document["refused"][0]["what"]
    assert not list(tmp_path.iterdir())


def test_the_module_itself(build: Build, config: Config, target_56: Target) -> None:
    """What was emitted: readelf is content, and the descriptors and the note say what they should."""
    status, document = build(CMDLINE, "--kernel", "6.1.0-56-amd64")
    assert status == 0
    module = Path(document["module"])
    seen = run(["readelf", "-aW", module])
    assert not seen.errors
    elf = read(module.read_bytes())
    info = dict(modinfo(elf))
    (sibling,) = (target_56.modules or Path()).rglob("ext4.ko")
    assert info["vermagic"] == dict(modinfo(read(sibling.read_bytes())))["vermagic"]
    assert info["livepatch"] == "Y"
    assert info["license"] == "GPL"
    assert info["name"] == "kmend_cmdline"
    assert info["kmend_build_id"] == document["kernel"]["build_id"]
    view = TargetView(config, target_56)
    found = describe(elf, read_layout(view.glue()))
    assert found.replace is True
    assert found.objects is not None
    assert [(o.name, [(f.old_name, f.sympos, f.new_func) for f in o.funcs]) for o in found.objects] == [
        ("vmlinux", [("cmdline_proc_show", 0, "cmdline_proc_show")])
    ]
    assert found.note is not None
    assert found.note["report"] == info["kmend_report"]
    assert [s.name for s in klp_symbols(elf)] == [".klp.sym.vmlinux.saved_command_line,0"]


def test_the_code_is_the_compilers(build: Build, config: Config, target_55: Target, tmp_path: Path) -> None:
    """objdump of each changed function equals that of the object that gcc and objtool made."""
    _, document = build(EXT4, "--kernel", "6.1.0-55-amd64")
    module = UnitObject.parse(Path(document["module"]).read_bytes(), "module")
    (unit,) = kbuild.unit_map(target_55).units("fs/ext4/mballoc.c")
    tree = tmp_path / "tree"
    subprocess.run(["cp", "-rs", f"{target_55.source}/fs", tmp_path / "fs"], check=True)
    tree.mkdir()
    for entry in target_55.source.iterdir():
        (tree / entry.name).symlink_to(entry if entry.name != "fs" else tmp_path / "fs")
    mballoc = tmp_path / "fs/ext4/mballoc.c"
    text = mballoc.read_bytes()
    mballoc.unlink()
    mballoc.write_bytes(text)
    run(["patch", "-p1", "-d", tmp_path, "-i", EXT4])
    command = kbuild.commands(target_55, [unit])[unit]
    made = compiling.compile_unit(target_55, unit, command, tree=tree, out=tmp_path / "out")
    ours = UnitObject.parse(made.path.read_bytes(), "object")
    for name in ("ext4_mb_init_group", "ext4_mb_load_buddy_gfp"):
        a, b = ours.parts[name], module.parts[name]
        assert ours.code(a) == module.code(b)
        assert [(r.offset - a.start, r.type) for r in ours.relocs(a)] == [
            (r.offset - b.start, r.type) for r in module.relocs(b)
        ]


@pytest.mark.usefixtures("target_56")
def test_no_replace_and_names(build: Build, config: Config, target_56: Target) -> None:
    status, document = build(CMDLINE, "--kernel", "6.1.0-56-amd64", "--no-replace", "-n", "my-fix")
    assert status == 0
    assert document["name"] == "my_fix"
    elf = read(Path(document["module"]).read_bytes())
    found = describe(elf, read_layout(TargetView(config, target_56).glue()))
    assert (found.name, found.replace) == ("my_fix", False)


def test_a_signature_is_appended(build: Build, target_56: Target, tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    request = ["-new", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=t"]
    run(["openssl", "req", *request, "-keyout", key, "-out", cert])
    status, document = build(CMDLINE, "--kernel", target_56.release, "--sign-key", key, "--sign-cert", cert)
    assert status == 0
    data = Path(document["module"]).read_bytes()
    assert data.endswith(b"~Module signature appended~\n")
    assert hashlib.sha256(data).hexdigest() == document["sha256"]
    seen = run(["modinfo", document["module"]]).text
    assert "sig_hashalgo:   sha256" in seen


def test_moved_lines_are_nothing(build: Build, target_56: Target, tmp_path: Path) -> None:
    """Comments above WARN()s and ratelimits: __LINE__ must not reach the code of untouched functions."""
    change = patch_of(
        tmp_path,
        target_56,
        "fs/ext4/mballoc.c",
        ("/*\n * MUSTDO:", "/* one\n * two\n * three */\n\n/*\n * MUSTDO:"),
        (
            "static inline void mb_set_bit(int bit, void *addr)\n{",
            "/* four */\n/* five */\nstatic inline void mb_set_bit(int bit, void *addr)\n{",
        ),
    )
    status, document = build(change, "--kernel", target_56.release)
    assert (status, document["result"]) == (0, "nothing-changed")
    assert document["module"] is None


def test_a_new_function_and_static_data(build: Build, target_56: Target, tmp_path: Path) -> None:
    change = patch_of(
        tmp_path,
        target_56,
        "fs/proc/cmdline.c",
        (
            "static int cmdline_proc_show(struct seq_file *m, void *v)\n{",
            "static noinline int times(void)\n{\n\tstatic int count;\n\treturn ++count;\n}\n\n"
            'static int cmdline_proc_show(struct seq_file *m, void *v)\n{\n\tseq_printf(m, "%d ", times());',
        ),
    )
    status, document = build(change, "--kernel", target_56.release)
    assert status == 0, document
    assert names(document) == {"vmlinux": {"cmdline_proc_show": "changed", "times": "new"}}


REFUSED = {
    "fs/proc/cmdline.c": (
        'proc_create_single("cmdline", 0',
        'proc_create_single("cmdline", 0444',
        "init-code",
    ),
    "fs/read_write.c": (".llseek\t\t= generic_file_llseek,", ".llseek\t\t= noop_llseek,", "changed-data"),
    "arch/x86/lib/clear_page_64.S": (
        "SYM_FUNC_START(clear_page_rep)",
        "SYM_FUNC_START(clear_page_rep)\n\tnop",
        "asm-unit",
    ),
    "arch/x86/entry/vdso/vma.c": ("#include <asm/vdso.h>\n", "#include <asm/vdso.h>\n\n", ""),
    "arch/x86/entry/vdso/vclock_gettime.c": (
        "#include <linux/time.h>\n",
        "#include <linux/time.h>\n\n",
        "vdso",
    ),
    "lib/argv_split.c": ("static int count_argc(", "static noinline int count_argc(", "library-member"),
    "fs/minix/Makefile": ("obj-$(CONFIG_MINIX_FS)", "obj-m += minix.o\nobj-y", "build-system-change"),
    "drivers/i2c/busses/i2c-au1550.c": ("MODULE_LICENSE", "/* */MODULE_LICENSE", "not-compiled"),
}


@pytest.mark.parametrize("path", REFUSED)
def test_refusals_by_name(build: Build, target_56: Target, tmp_path: Path, path: str) -> None:
    before, after, wanted = REFUSED[path]
    status, document = build(
        patch_of(tmp_path, target_56, path, (before, after)), "--kernel", target_56.release
    )
    assert rules(document) == ({wanted} if wanted else set())
    assert status == (1 if wanted else 0)
    for row in document["refused"]:
        assert row["what"]
        assert row["why"]
        assert row["next_step"]
    assert not list(tmp_path.glob("*.ko"))


def test_a_header_is_followed_into_its_units(build: Build, target_56: Target, tmp_path: Path) -> None:
    """An inline function of a header: every unit that inlines it, and no other."""
    change = patch_of(
        tmp_path,
        target_56,
        "fs/ext4/ext4_extents.h",
        (
            "static inline unsigned short ext_depth(struct inode *inode)\n{\n",
            "static inline unsigned short ext_depth(struct inode *inode)\n{\n\tbarrier();\n",
        ),
    )
    status, document = build(change, "--kernel", target_56.release)
    assert status == 0, document
    functions = names(document)
    assert set(functions) == {"ext4"}
    assert "ext4_ext_map_blocks" in functions["ext4"]
    assert set(functions["ext4"].values()) == {"changed"}


def test_a_comment_in_a_header_is_nothing(build: Build, target_56: Target, tmp_path: Path) -> None:
    change = patch_of(
        tmp_path,
        target_56,
        "fs/ext4/ext4_extents.h",
        ("#ifndef _EXT4_EXTENTS\n", "#ifndef _EXT4_EXTENTS\n/* a comment\n   of two lines */\n"),
    )
    status, document = build(change, "--kernel", target_56.release)
    assert (status, document["result"]) == (0, "nothing-changed")


def test_a_new_field_is_named(build: Build, target_56: Target, tmp_path: Path) -> None:
    change = patch_of(
        tmp_path,
        target_56,
        "fs/ext4/mballoc.h",
        ("\tunsigned\t\tpa_deleted;\n", "\tunsigned\t\tpa_deleted;\n\tlong\t\tpa_fresh;\n"),
    )
    status, document = build(change, "--kernel", target_56.release)
    assert (status, document["result"]) == (1, "refused")
    row = next(r for r in document["refused"] if r["rule"] == "layout-changed")
    assert row["what"] == "struct ext4_prealloc_space"
    assert "pa_fresh is new" in row["why"]
    assert "klp_shadow" in row["next_step"]


def test_a_human_may_allow_a_layout_and_never_a_proof(
    build: Build, target_56: Target, tmp_path: Path
) -> None:
    """A structure that lives on the stack of one function: nobody else ever sees one."""
    change = patch_of(
        tmp_path,
        target_56,
        "fs/isofs/inode.c",
        ("struct iso9660_options{\n", "struct iso9660_options{\n\tlong fresh;\n"),
    )
    status, document = build(change, "--kernel", target_56.release, "--allow", "layout-changed")
    assert (status, document["result"]) == (0, "built")
    (row,) = [row for row in document["warnings"] if row["rule"] == "layout-changed"]
    assert "fresh is new" in row["why"]
    assert row["next_step"].startswith("you answer for this")
    status, document = build(change, "--kernel", target_56.release, "--allow", "provenance")
    assert status == 2
    assert rules(document) == {"not-allowable"}


def test_a_changed_prototype_is_followed_into_all_its_callers(
    build: Build, target_56: Target, tmp_path: Path
) -> None:
    """A right module: every caller in the kernel is replaced together with it."""
    head = "get_joliet_filename(struct iso_directory_record"
    body = "inode * inode{})\n{{\n\tstruct nls_table *nls;\n\tunsigned char len = 0;\n\n{}\tnls = "
    changes = {
        "isofs.h": (
            f"{head} *, unsigned char *, struct inode *);",
            f"{head} *, unsigned char *, struct inode *, int);",
        ),
        "joliet.c": (body.format("", ""), body.format(", int most", "\tif (most < 1)\n\t\treturn 0;\n")),
        "dir.c": ("get_joliet_filename(de, tmpname, inode)", "get_joliet_filename(de, tmpname, inode, 64)"),
        "namei.c": ("get_joliet_filename(de, tmpname, dir)", "get_joliet_filename(de, tmpname, dir, 64)"),
    }
    parts = [
        patch_of(tmp_path, target_56, f"fs/isofs/{path}", change).read_bytes()
        for path, change in changes.items()
    ]
    (tmp_path / "all.patch").write_bytes(b"".join(parts))
    status, document = build(tmp_path / "all.patch", "--kernel", target_56.release)
    assert (status, document["result"]) == (0, "built"), document["refused"]
    assert {"get_joliet_filename", "isofs_lookup"} <= set(names(document)["isofs"])


def test_a_series_with_a_level_of_its_own_for_each_patch(
    build: Build, target_56: Target, tmp_path: Path
) -> None:
    """One patch has git's prefixes and needs none named, one has three folders in front of its names."""
    deep = patch_of(
        tmp_path,
        target_56,
        "fs/read_write.c",
        ("ssize_t vfs_read(struct file *file, ", "ssize_t vfs_read(struct file *const file, "),
    )
    text = deep.read_text().replace(" a/fs/", " home/me/linux/fs/").replace(" b/fs/", " home/me/new/fs/")
    (tmp_path / "deep.patch").write_text(text)
    (tmp_path / "cmdline.patch").write_bytes(CMDLINE.read_bytes())
    series = tmp_path / "series"
    series.write_text("cmdline.patch\ndeep.patch -p3\n")
    status, document = build(series, "--kernel", target_56.release, "-n", "both")
    assert (status, document["refused"]) == (0, [])
    assert names(document) == {"vmlinux": {"cmdline_proc_show": "changed"}}
    series.write_text("cmdline.patch\ndeep.patch -p2\n")
    status, document = build(series, "--kernel", target_56.release, "-n", "both")
    assert (status, rules(document)) == (1, {"does-not-apply"})


def test_a_syntax_error_is_gccs_own_words(build: Build, target_56: Target, tmp_path: Path) -> None:
    change = patch_of(tmp_path, target_56, "fs/proc/cmdline.c", ("seq_putc(m, '\\n');", "seq_putc(m, '\\n')"))
    status, document = build(change, "--kernel", target_56.release)
    assert (status, document["result"]) == (1, "failed")
    assert rules(document) == {"compile-error"}
    assert "expected ‘;’" in document["refused"][0]["why"] or "expected ';'" in document["refused"][0]["why"]
    assert "cmdline.c:" in document["refused"][0]["why"]


def test_a_new_warning_of_the_compiler_is_shown(build: Build, target_56: Target, tmp_path: Path) -> None:
    change = patch_of(
        tmp_path,
        target_56,
        "fs/proc/cmdline.c",
        ("\tseq_putc(m, '\\n');\n", "#warning look here\n\tseq_putc(m, '\\n');\n\tseq_putc(m, ' ');\n"),
    )
    status, document = build(change, "--kernel", target_56.release)
    assert (status, document["result"]) == (0, "built"), document["refused"]
    (row,) = document["warnings"]
    assert row["rule"] == "compiler-warning"
    assert "look here" in row["why"]


def test_a_wrong_compiler_is_refused(
    build: Build, target_56: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gcc-12 that says it is another version."""
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "gcc-12").write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && echo 'gcc-12 (Debian 12.1.0-1) 12.1.0' && exit\n"
        'exec /usr/bin/gcc-12 "$@"\n'
    )
    (fake / "gcc-12").chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake}:/usr/sbin:/usr/bin:/sbin:/bin")
    out = tmp_path / "out"
    out.mkdir()
    status, document = build(CMDLINE, "--kernel", target_56.release)
    assert status in (1, 3)
    assert rules(document) == {"wrong-compiler"}
    words = json.dumps(document)
    assert "12.1.0" in words
    assert "12.2.0" in words


def test_vmlinux_reads_only_what_is_loaded(target_56: Target) -> None:
    image = Image.open(target_56.vmlinux)
    text = image.section(".text")
    assert text is not None
    assert image.read(text.address, 16) != bytes(16)
