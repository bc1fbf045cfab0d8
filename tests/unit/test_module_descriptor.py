"""kmend.toml: what it says, and what is told about it when it says something wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmend.core.errors import UsageError
from kmend.diff.declared import CallbackKind
from kmend.handmade import sources_of
from kmend.module.descriptor import FuncSpec, ObjectSpec, SymbolSpec, parse

WHOLE = """
name = "my_fix"
description = "words"
replace = false
sources = ["a.c", "b.c"]
cflags = ["-iquote", "fs"]

[[object]]
callbacks = { pre_patch = "before", post_unpatch = "after" }
[[object.func]]
old_name = "vfs_read"
[[object.func]]
old_name = "seq_show"
new_func = "mine"
sympos = 2

[[object]]
name = "dm-mod"
file = "../build/dm-mod.ko"
[[object.func]]
old_name = "dm_get.part.0"

[[state]]
id = 7
version = 3

[symbols]
helper = 2
other = { object = "dm-mod", sympos = 1 }
"""


def test_everything_is_read() -> None:
    found = parse(WHOLE, "kmend.toml")
    assert (found.name, found.description, found.replace) == ("my_fix", "words", False)
    assert (found.sources, found.cflags) == (("a.c", "b.c"), ("-iquote", "fs"))
    assert found.objects == (
        ObjectSpec(
            "vmlinux",
            (FuncSpec("vfs_read", "livepatch_vfs_read"), FuncSpec("seq_show", "mine", 2)),
            ((CallbackKind.PRE_PATCH, "before"), (CallbackKind.POST_UNPATCH, "after")),
        ),
        ObjectSpec(
            "dm_mod", (FuncSpec("dm_get.part.0", "livepatch_dm_get_part_0"),), file="../build/dm-mod.ko"
        ),
    )
    assert found.states == ((7, 3),)
    assert found.symbols == {"helper": SymbolSpec("", 2), "other": SymbolSpec("dm_mod", 1)}


def test_an_empty_one_has_the_defaults() -> None:
    found = parse("", "kmend.toml")
    assert found.replace
    assert not found.objects
    assert not found.symbols


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("name = ", "Invalid value"),
        ("nmae = 'x'", "unknown key 'nmae'; known: name, replace"),
        ("replace = 1", "replace is not of type bool"),
        ("name = true", "name is not of type str"),
        ("sources = [1]", "sources is not a list of strings"),
        ("[object]\nname = 'x'", "object is not of type list"),
        ("object = [1]", "write [[object]]"),
        ("[[object]]\n[[object.func]]\nnew_func = 'x'", "func 1: old_name is missing"),
        ("[[object]]\n[[object.func]]\nold_name = 'a b'", "'a b' is no name of a function"),
        ("[[object]]\n[[object.func]]\nold_name = 'a'\nnew_func = 'a.b'", "no name of a C function"),
        ("[[object]]\n[[object.func]]\nold_name = 'a'\nsympos = -1", "positions count from 1"),
        ("[[object]]\n[[object.func]]\nold_name = 'a'\nsympos = true", "sympos is not of type int"),
        ("[[object]]\n[[object.func]]\nold_name = 'a'\nold = 'b'", "unknown key 'old'"),
        ("[[object]]\nname = '../x'", "neither vmlinux nor a module's name"),
        ("[[object]]\nfile = 'x.ko'", "file is for a module"),
        ("[[object]]\n[[object]]", "the object vmlinux is there twice"),
        ("[[object]]\ncallbacks = { before = 'x' }", "unknown key 'before'; known: pre_patch"),
        ("[[state]]\nversion = 1", "state 1: id is missing"),
        ("[[state]]\nid = 1\nrevision = 2", "unknown key 'revision'"),
        ("[symbols]\nx = 'ext4'", "neither a position nor a table"),
        ("[symbols]\nx = { module = 'ext4' }", "neither a position nor a table"),
    ],
)
def test_what_is_wrong_is_named(text: str, why: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(text, "here/kmend.toml")
    assert error.value.rule == "bad-descriptor"
    assert "here/kmend.toml" in error.value.what
    assert why in error.value.why


def test_sources_and_names(tmp_path: Path) -> None:
    folder = tmp_path / "my-fix"
    folder.mkdir()
    with pytest.raises(UsageError) as error:
        sources_of(folder)
    assert error.value.rule == "no-sources"
    (folder / "b.c").touch()
    (folder / "a.c").touch()
    (folder / "a.mod.c").touch()
    assert sources_of(folder).files == ("a.c", "b.c")
    assert sources_of(folder).name == "my_fix"
    assert sources_of(folder, "other-name").name == "other_name"
    assert (sources_of(folder / "b.c").files, sources_of(folder / "b.c").name) == (("b.c",), "b")
    (folder / "kmend.toml").write_text('name = "said"\nsources = ["b.c"]\n')
    for path in (folder, folder / "kmend.toml"):
        found = sources_of(path)
        assert (found.folder, found.files, found.name) == (folder, ("b.c",), "said")
    for sources in ('["absent.c"]', '["../b.c"]', '["a b.c"]', '["kmend.toml"]'):
        (folder / "kmend.toml").write_text(f"sources = {sources}\n")
        with pytest.raises(UsageError, match="nothing to build"):
            sources_of(folder)
    with pytest.raises(UsageError) as error:
        sources_of(folder / "b.c", "a name")
    assert error.value.rule == "module-name"
    for absent in (tmp_path / "absent", tmp_path / "absent.toml", tmp_path / "absent.c"):
        with pytest.raises(UsageError, match="nothing to build"):
            sources_of(absent)
