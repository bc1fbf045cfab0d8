"""Layout changes, seen through the BTF of real objects."""

from __future__ import annotations

from pathlib import Path

import pytest

from kmend.core.errors import Failed
from kmend.core.run import run
from kmend.elf.reader import read
from kmend.verify.types import Types, changed_layouts

SOURCE = """
struct inner { short s; };
struct s { int a; char b; union { long x; void *y; }; int c:3, d:5; struct inner in; struct inner *p; };
enum e { A, B, C };
enum { LOOSE = 7 };
typedef struct { int q; } anon_t;
typedef int number_t;
struct uses { number_t n; const char *text; int (*call)(struct s *); };
struct s v; enum e w; anon_t z; struct uses u; int loose = LOOSE;
"""


def types(folder: Path, source: str) -> Types:
    (folder / "t.c").write_text(source)
    run(["gcc", "-gbtf", "-c", folder / "t.c", "-o", folder / "t.o"])
    found = Types.of(read((folder / "t.o").read_bytes()), "t.o")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("before", "after", "rule", "what", "word"),
    [
        ("char b;", "char b; long n;", "layout-changed", "struct s", "field n is new"),
        ("char b;", "char b, bb;", "layout-changed", "struct s", "field bb is new"),
        ("int c:3", "int c:4", "layout-changed", "struct s", "was 3 and is 4 bits wide"),
        ("int c:3, d:5;", "int d:5, c:3;", "layout-changed", "struct s", "the field c was at bit 128"),
        ("short s;", "long s;", "layout-changed", "struct inner", "integer of 2 bytes and is integer of 8"),
        ("int q;", "int q, r;", "layout-changed", "anon_t", "field r is new"),
        ("long x;", "long x[2];", "layout-changed", "struct s", "union"),
        ("struct inner *p;", "struct inner p;", "layout-changed", "struct s", "the field p was"),
        ("int a; ", "", "layout-changed", "struct s", "the field a is gone"),
        ("number_t n;", "long n;", "layout-changed", "struct uses", "integer of 4 bytes"),
        ("A, B, C", "A, X, B, C", "enum-changed", "B", "was 1 and is 2"),
        ("LOOSE = 7", "LOOSE = 8", "enum-changed", "LOOSE", "was 7 and is 8"),
    ],
)
def test_what_breaks_old_data_is_named(
    tmp_path: Path, before: str, after: str, rule: str, what: str, word: str
) -> None:
    assert SOURCE.count(before) == 1
    rows = changed_layouts(types(tmp_path, SOURCE), types(tmp_path, SOURCE.replace(before, after)))
    found = {(r.rule, r.what): r.why for r in rows}
    assert word in found[rule, what]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("void *y;", "char *y;"),
        ("int a;", "unsigned a;"),
        ("int a;", "int renamed;"),
        ("A, B, C", "A, B, C, D"),
        ("typedef int number_t;", "typedef unsigned number_t;"),
        ("int (*call)(struct s *);", "void (*call)(int, int);"),
        ("enum { LOOSE = 7 };", "enum { LOOSE = 7 }; struct fresh { int x; }; struct fresh f;"),
    ],
)
def test_what_keeps_old_data_valid_passes(tmp_path: Path, before: str, after: str) -> None:
    assert SOURCE.count(before) == 1
    assert changed_layouts(types(tmp_path, SOURCE), types(tmp_path, SOURCE.replace(before, after))) == ()


def test_damaged_types_are_an_error() -> None:
    for data in (b"", b"\x9f\xeb", bytes(24), b"\x9f\xeb\x01\x00" + bytes([24, 0, 0, 0]) + b"\xff" * 40):
        with pytest.raises(Failed):
            Types(data, "t.o").named  # noqa: B018 - reading it is the test


def test_an_object_without_types_has_none(tmp_path: Path) -> None:
    (tmp_path / "t.c").write_text(SOURCE)
    run(["gcc", "-c", tmp_path / "t.c", "-o", tmp_path / "t.o"])
    assert Types.of(read((tmp_path / "t.o").read_bytes()), "t.o") is None


def test_who_takes_a_changed_structure_is_told(tmp_path: Path) -> None:
    source = SOURCE + "int first(struct s *p) { return p->a; }\nint other(struct inner *p) { return p->s; }\n"
    before, after = types(tmp_path, source), types(tmp_path, source.replace("char b;", "char b; long n;"))
    found = {row.what: row for row in changed_layouts(before, after)}
    assert "in this file first take one" in found["struct s"].why
    assert "klp_shadow_get_or_alloc()" in found["struct s"].next_step
    assert before.taking("struct inner") == ("other",)
    assert before.taking("struct uses") == ()
