"""The overlay: looks like the tree to gcc, and the tree is never written."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from kmend.core.errors import Failed, Refused
from kmend.kernel.overlay import make_overlay, read_behind, tree_reader


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tree = tmp_path / "source"
    files = {
        "fs/ext4/a.c": '#include "x.h"\n#include <linux/y.h>\nint a = X + Y; char *f = __FILE__;\n',
        "fs/ext4/x.h": "#define X 1\n",
        "fs/b.c": "int b;\n",
        "fs/sub/deep/c.c": '#include "../../b.c"\nint c;\n',
        "include/linux/y.h": "#define Y 2\n",
        "Makefile": "all:\n",
        "kernel/k.c": '#include "../fs/b.c"\n',
    }
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    return tree


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def gcc(overlay: Path, file: str) -> tuple[str, list[str]]:
    done = subprocess.run(
        ["gcc", "-E", "-P", "-nostdinc", "-I./include", "-MD", "-MF", "deps", file],
        cwd=overlay,
        capture_output=True,
        text=True,
        check=True,
    )
    deps = (overlay / "deps").read_text().replace("\\\n", " ").partition(":")[2].split()
    return " ".join(done.stdout.split()), deps


def test_gcc_sees_the_replaced_file_and_everything_else(source: Path, tmp_path: Path) -> None:
    before = snapshot(source)
    text = b'#include "x.h"\n#include <linux/y.h>\nlong a = X + Y; char *f = __FILE__;\n'
    overlay = make_overlay(source, {"fs/ext4/a.c": text}, tmp_path / "o")
    out, deps = gcc(overlay, "fs/ext4/a.c")
    assert out == 'long a = 1 + 2; char *f = "fs/ext4/a.c";'
    assert deps == ["fs/ext4/a.c", "fs/ext4/x.h", "include/linux/y.h"]
    assert read_behind(overlay, source, ["fs/ext4/a.c"], deps) == ()
    seen = {
        os.path.relpath(Path(place) / name, overlay)
        for place, _, names in os.walk(overlay, followlinks=True)
        for name in names
    }
    assert seen == {*before, "deps"}
    assert snapshot(source) == before


def test_replaced_header_beside_an_unchanged_unit(source: Path, tmp_path: Path) -> None:
    overlay = make_overlay(source, {"fs/ext4/x.h": b"#define X 7\n"}, tmp_path / "o")
    assert gcc(overlay, "fs/ext4/a.c")[0].startswith("int a = 7 + 2;")


def test_absent_and_new_files(source: Path, tmp_path: Path) -> None:
    overlay = make_overlay(source, {"fs/b.c": None, "fs/new/n.c": b"int n;\n"}, tmp_path / "o")
    assert not os.path.lexists(overlay / "fs/b.c")
    assert (overlay / "fs/new/n.c").read_bytes() == b"int n;\n"
    assert (overlay / "fs/ext4").is_symlink()
    assert not (source / "fs/new").exists()


def test_dotdot_through_a_linked_folder_is_prevented_and_detected(source: Path, tmp_path: Path) -> None:
    """The kernel follows the link first, so `..` leads back into the tree."""
    changed = {"fs/b.c": b"long b;\n"}
    wrong = make_overlay(source, changed, tmp_path / "wrong")
    out, deps = gcc(wrong, "kernel/k.c")
    assert out == "int b;"
    assert read_behind(wrong, source, changed, deps) == ("kernel/../fs/b.c",)
    right = make_overlay(source, changed, tmp_path / "right", also=["kernel/k.c", "fs/sub/deep/c.c"])
    for unit, expected in (("kernel/k.c", "long b;"), ("fs/sub/deep/c.c", "long b; int c;")):
        out, deps = gcc(right, unit)
        assert out == expected
        assert read_behind(right, source, changed, deps) == ()


def test_units_spelled_with_dotdot(source: Path, tmp_path: Path) -> None:
    overlay = make_overlay(
        source, {"fs/b.c": b"long b;\n"}, tmp_path / "o", also=["kernel/../fs/sub/deep/c.c"]
    )
    assert gcc(overlay, "kernel/../fs/sub/deep/c.c")[0] == "long b; int c;"


def test_folder_in_use_is_not_touched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o/mine").write_text("x")
    with pytest.raises(Failed) as caught:
        make_overlay(source, {"fs/b.c": b""}, tmp_path / "o")
    assert "not empty" in caught.value.what
    assert (tmp_path / "o/mine").read_text() == "x"


def test_unwritable_place_is_one_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Failed) as caught:
        make_overlay(source, {"fs/b.c": b""}, tmp_path / "file" / "o")
    assert caught.value.rule == "overlay"


@pytest.mark.parametrize("path", ["../out.c", "/etc/passwd", "link/x.c", "fs/alias.c", ""])
def test_paths_that_leave_the_tree(source: Path, tmp_path: Path, path: str) -> None:
    (source / "link").symlink_to(tmp_path)
    (source / "fs/alias.c").symlink_to("/etc/passwd")
    with pytest.raises(Refused) as caught:
        make_overlay(source, {path: b"x"}, tmp_path / "o")
    assert caught.value.rule == "unsafe-path"
    with pytest.raises(Refused):
        tree_reader(source)(path)
    assert not (tmp_path / "o").exists()


def test_tree_reader(source: Path) -> None:
    read = tree_reader(source)
    assert read("fs/b.c") == b"int b;\n"
    assert read("fs/none.c") is None
    assert read("fs") is None
    assert read("Makefile/below") is None
