"""C text as items: what a unit can see of a header's change."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmend.patch import items as patch_items
from kmend.patch.items import added_names, introduces, items, unseen

HEADER = b"""\
#ifndef _X_H
#define _X_H
/* struct no { int; }; */
struct x { int a; char b[2]; };
typedef int (*call_t)(struct x *);
static inline int get(struct x *x) { return x->a; /* } */ }
extern int count[4];
int put(struct x *x);
#ifdef CONFIG_Y
enum mode { ONE, TWO = 5, };
#endif
#endif
"""


def test_items_end_where_declarations_do() -> None:
    assert items(HEADER) == [
        b"#ifndef _X_H",
        b"#define _X_H",
        b"struct x { int a; char b[2]; };",
        b"typedef int (*call_t)(struct x *);",
        b"static inline int get(struct x *x) { return x->a; }",
        b"extern int count[4];",
        b"int put(struct x *x);",
        b"#ifdef CONFIG_Y",
        b"enum mode { ONE, TWO = 5, };",
        b"#endif",
        b"#endif",
    ]


def test_braces_in_strings_and_directives_do_not_count() -> None:
    text = b"static inline char f(void) { return \"}{\"[0] + '}'; }\n#define M(x) \\\n  do { (x; \\\n"
    assert items(text + b"\nint g;") == [
        b"static inline char f(void) { return \"}{\"[0] + '}'; }",
        b"#define M(x) do { (x;",
        b"int g;",
    ]


@pytest.mark.parametrize(
    ("item", "names"),
    [
        (b"int f(int);", {b"f"}),
        (b"extern struct s *f(int (*g)(void));", {b"f"}),
        (b"__attribute__((noreturn)) void f(void) __attribute__((__cold__));", {b"f"}),
        (b"static inline __attribute__((__unused__)) int f(void) { return g(); }", {b"f"}),
        (b"static inline struct s *f(void) { return 0; }", {b"f"}),
        (b"struct s;", {b"s"}),
        (
            b"struct s { int a; enum e { A, B = 2 } e; struct t { int x; } t; };",
            {b"s", b"e", b"A", b"B", b"t"},
        ),
        (b"enum { A, B };", {b"A", b"B"}),
        (b"typedef struct { int a; } s_t;", {b"s_t"}),
        (b"typedef int (*f_t)(int);", {b"f_t"}),
        (b"typedef unsigned long ul;", {b"ul"}),
        (b"extern int a[4];", {b"a"}),
        (b'_Static_assert(sizeof(int) == 4, "x");', set()),
    ],
)
def test_what_an_item_introduces(item: bytes, names: set[bytes]) -> None:
    found = introduces(item)
    assert found is not None
    assert names <= found


@pytest.mark.parametrize(
    "item",
    [
        b"int f(void) { return 1; }",
        b"static int f(void) { return 1; }",
        b"static inline __attribute__((__used__)) int f(void) { return 1; }",
        b"int a;",
        b"static int a = 1;",
        b"struct s { int a; } b;",
        b"struct { int a; };",
        b'extern int f(void) __attribute__((alias("g")));',
        b'int f(void) __asm__("g");',
        b'__asm__(".globl f");',
        b"return f(x);",
        b"MODULE_LICENSE(x);",
        b"extern int a, b;",
    ],
)
def test_what_matters_to_those_who_do_not_mention_it(item: bytes) -> None:
    assert introduces(item) is None


BEFORE = b"""\
struct s { int a; };
int f(struct s *);
static inline int g(void) { return 1; }
int h(void) { return f(0); }
"""
CHOICE = b"#ifdef CONFIG_Z\nint z(void);\n#else\nstatic inline int z(void) { return 0; }\n#endif\nint put"


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        (b"return 1;", b"return 2;", True),  # g is used by nobody
        (b"int f(struct s *);", b"int f(struct s *);\nint z(int);", True),
        (b"int f(struct s *);", b"long f(struct s *);", False),
        (b"int a;", b"long a;", False),  # s is mentioned by f
        (b"return f(0);", b"return f(0) + 1;", False),
        (b"int h(void)", b"static int q;\nint h(void)", False),
        (b"static inline int g(void) { return 1; }\n", b"", True),
        (b"return f(0)", b"return f(0) + g()", False),
    ],
)
def test_changes_that_nobody_uses_are_not_seen(old: bytes, new: bytes, same: bool) -> None:
    assert unseen(BEFORE, BEFORE.replace(old, new, 1)) is same
    assert unseen(BEFORE.replace(old, new, 1), BEFORE) is same


def test_an_order_that_changes_is_seen() -> None:
    rows = [b"extern int a;\n", b"int x = 1;\n", b"int y = 2;\n"]
    assert not unseen(b"".join(rows), rows[0] + rows[2] + rows[1])


def test_a_used_chain_is_seen_and_an_unused_one_is_not() -> None:
    text = b"static inline int a(void) { return 1; }\nstatic inline int b(void) { return a(); }\n"
    changed = text.replace(b"return 1", b"return 2")
    assert not unseen(text, changed)  # b mentions it: who uses b is not followed
    both = changed.replace(b"return a()", b"return -a()")
    assert unseen(text, both)
    user = b"int c(void) { return b(); }\n"
    assert not unseen(text + user, both + user)


LINES = [*BEFORE.splitlines(keepends=True), b'int p(void)\n{\n\tputs("(");\n\treturn g();\n}\n', b"int q;\n"]


@given(st.lists(st.sampled_from(LINES), max_size=9), st.lists(st.sampled_from(LINES), max_size=9))
def test_what_is_shared_at_both_ends_makes_no_difference(old: list[bytes], new: list[bytes]) -> None:
    """The answer is the one that the whole texts give."""
    before, after = b"".join(old), b"".join(new)
    quick = unseen(before, after)
    tries, patch_items.TRIES = patch_items.TRIES, 0
    try:
        assert unseen(before, after) is quick
    finally:
        patch_items.TRIES = tries


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        (b"int put(struct x *x);", b"int put(struct x *x);\nint more(void);", {"more"}),
        (b"int put", CHOICE, {"z"}),
        (b"#endif\n#endif", b"#endif\n#define NEW(x) ((x) + 1)\n#endif", {"NEW"}),
        (b"/* struct", b"/* another comment, struct", set()),
    ],
)
def test_a_header_that_only_adds(old: bytes, new: bytes, names: set[str]) -> None:
    assert added_names(HEADER, HEADER.replace(old, new, 1)) == frozenset(names)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"int a; char", b"int a; long c; char"),
        (b"return x->a;", b"return x->a + 1;"),
        (b"TWO = 5,", b"TWO = 5, THREE,"),
        (b"int put(struct x *x);", b""),
        (b"#ifdef CONFIG_Y", b"#include <y.h>\n#ifdef CONFIG_Y"),
        (b"#ifdef CONFIG_Y", b"#undef put\n#ifdef CONFIG_Y"),
        (b"int put(struct x *x);", b"#if 0\nint put(struct x *x);"),
        (b"int put(struct x *x);", b"#else\nint put(struct x *x);"),
        (b"int put(struct x *x);", b"static int state;\nint put(struct x *x);"),
        (b"int put(struct x *x);", b"struct n {\n#define put(x) 0\nint i; };\nint put(struct x *x);"),
        (b"int put(struct x *x);", b"#pragma pack(1)\nint put(struct x *x);"),
    ],
)
def test_a_header_that_does_more(old: bytes, new: bytes) -> None:
    assert added_names(HEADER, HEADER.replace(old, new, 1)) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return 1;", "return 2;"),
        ("struct q { int a; };", "struct q { int b, a; };"),
        ("int far(int);", "long far(int, int);"),
        ("enum { P };", "enum { O, P };"),
    ],
)
def test_the_compiler_makes_the_same_code_of_what_is_not_seen(tmp_path: Path, old: str, new: str) -> None:
    text = (
        "struct q { int a; };\nint far(int);\nenum { P };\nint near(int);\n"
        "static inline int g(void) { return 1; }\nint h(int x) { return near(x) * 3; }\n"
    )
    objects = []
    assert unseen(text.encode(), text.replace(old, new).encode())
    for name, source in (("a", text), ("b", text.replace(old, new))):
        (tmp_path / "x.c").write_text(source)
        subprocess.run(["gcc", "-O2", "-c", "x.c", "-o", f"{name}.o"], cwd=tmp_path, check=True)
        objects.append((tmp_path / f"{name}.o").read_bytes())
    assert objects[0] == objects[1]
