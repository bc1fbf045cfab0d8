"""Line control: real gcc is the oracle for the number that each line reports."""

from __future__ import annotations

import random
import re
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmend.patch.apply import split_lines
from kmend.patch.lines import line_starts, origins_of, with_line_control


def without_directives(text: bytes) -> bytes:
    return b"".join(line for line in split_lines(text) if not line.startswith(b"#line "))


def preprocess(text: bytes, *flags: str) -> str:
    """What gcc makes of the text; markers of its own left out."""
    done = subprocess.run(
        ["gcc", "-E", "-P", "-w", "-std=gnu11", *flags, "-x", "c", "-"],
        input=text,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def reported(text: bytes, *flags: str) -> dict[str, int]:
    """Which line number gcc reports where the text says ``M(name)``: expands to ``@name=__LINE__``."""
    head = b"#define M(name) @name=__LINE__\n#line 1\n"
    found = {}
    for name, number in re.findall(r"@(\w+) ?= ?(\d+)", preprocess(head + text, *flags)):
        found[name] = int(number)
    return found


def edit(old: str, new: str) -> bytes:
    """The new text under line control, checked to be the new text otherwise."""
    result = with_line_control(new.encode(), origins_of(old.encode(), new.encode()))
    assert without_directives(result) == new.encode()
    return result


def number_of(text: str, name: str) -> int:
    return next(i for i, line in enumerate(text.split("\n"), 1) if f"M({name})" in line)


def test_nothing_is_inserted_where_lines_do_not_shift() -> None:
    old = "int a;\nint b;\nM(x);\n"
    assert edit(old, old.replace("int b", "long b")) == old.replace("int b", "long b").encode()


def test_added_and_removed_lines() -> None:
    old = "int a;\nint b;\nint c;\nM(x);\n"
    for new in (old.replace("int b;\n", "int b;\nint b2;\nint b3;\n"), old.replace("int b;\n", "")):
        assert reported(edit(old, new))["x"] == 4


TRAPS = {
    "block comment": "int a;\n/* one\n * two\n */\nM(x);\n",
    "comment after code": "int a; /* begins\nends */ M(x)\nM(y);\n",
    "continued line comment": "int a; // goes on \\\nstill a comment \\\nand here\nM(x);\n",
    "continued with blanks": "#define A one \\  \n two \\\t\n three\nM(x);\n",
    "string with comment opener": 'char *s = "/*";\nint b;\nM(x);\n',
    "char quote": "int q = '\"';\nint b;\nM(x);\nint r = '\\'';\nM(y);\n",
    "escaped backslash at end of string": 'char *s = "\\\\";\nint b; /* " */\nM(x);\n',
    "string continued": 'char *s = "one \\\ntwo /* \\\nthree";\nM(x);\n',
    "split comment opener": "int a; /\\\n* comment\n more *\\\n/ int b;\nM(x);\n",
    "macro arguments": "#define F(a, b) a b\nF(int a;,\n  int b;\n  )\nM(x);\n",
    "macro name on its own line": "#define F(a) a\nint a;\nF\n\n(int b;)\nM(x);\n",
    "raw string": 'char *s = R"x(\n/* " \n)x";\nM(x);\n',
    "unbalanced branches": "#ifdef X\n if (g(1,\n#else\n if (h(\n#endif\n 2)) M(x);\n}\nM(y);\n",
    "apostrophe in a skipped group": "#if 0\nit isn't C /* here\n*/\n#endif\nM(x);\n",
    "directive with comment": "#define A /* a\n b */ 1\nM(x);\n",
    "comment before directive": "/* a\n */ #if 1\nM(x);\n#endif\nM(y);\n",
    "divide and stars": "int a = 6 /2; int *p; int b = a */*c*/p;\nM(x);\n",
    "word R before string": '#define R "r"\nchar *s = FOOR"(";\nM(x);\n',
}


@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.parametrize("lines", [1, 3])
def test_lexical_traps(name: str, lines: int) -> None:
    """The change stands in front of the trap; everything after it keeps its number."""
    old = "int first;\n" + TRAPS[name]
    new = "int first;\n" + "int added;\n" * lines + TRAPS[name]
    under_control = edit(old, new)
    expected, got = reported(old.encode()), reported(under_control)
    assert expected
    assert got == expected
    # the same code otherwise
    assert preprocess(under_control).split() == preprocess(new.encode()).split()


@pytest.mark.parametrize("name", TRAPS)
def test_change_inside_every_line_of_a_trap(name: str) -> None:
    """A blank line added anywhere: what gcc makes of it does not change, and the end keeps its number."""
    old_lines = TRAPS[name].split("\n")[:-1]
    tail = "int u;\n}\n;\nM(end);\n"
    old = "\n".join(old_lines) + "\n" + tail
    for at in range(1, len(old_lines)):
        new = "\n".join([*old_lines[:at], "", *old_lines[at:]]) + "\n" + tail
        origins = tuple(i if i < at else None if i == at else i - 1 for i in range(new.count("\n")))
        under_control = with_line_control(new.encode(), origins)
        assert without_directives(under_control) == new.encode()
        try:
            plain = preprocess(new.encode())
        except AssertionError:
            continue  # the blank line itself broke the C text (it ended a continued line)
        assert preprocess(under_control).replace("M", " M ").split() == plain.replace("M", " M ").split()
        got = reported(under_control)
        if "end" in got:
            assert got["end"] == number_of(old, "end"), (name, at)


GROUPS = """\
int first;
#ifdef A
M(a1);
@
M(a2);
#elif defined(B)
M(b1);
@
M(b2);
# ifdef C
@
M(c1);
# endif
M(b3);
#else
M(e1);
@
#endif
M(after);
#if defined(C) && 0
@
M(never);
#endif
M(last);
"""


@pytest.mark.parametrize("flags", [(), ("-DA",), ("-DB",), ("-DB", "-DC"), ("-DC",)])
@pytest.mark.parametrize("which", [0b1, 0b10, 0b100, 0b1000, 0b10000, 0b11111, 0b10101])
@pytest.mark.parametrize("added", ["", "int x;\n", "int x;\nint y;\nint z;\n"])
def test_conditional_groups_under_every_configuration(flags: tuple[str, ...], which: int, added: str) -> None:
    """A directive in a skipped group does nothing, and its own line counts."""
    old, new = [], []
    change = 0
    for line in GROUPS.splitlines(keepends=True):
        if line != "@\n":
            old.append(line)
            new.append(line)
            continue
        old.append("int old;\n")
        new.append(added if which >> change & 1 else "int old;\n")
        change += 1
    before, after = "".join(old), "".join(new)
    assert reported(edit(before, after), *flags) == reported(before.encode(), *flags)


@pytest.mark.parametrize("flags", [(), ("-DA",)])
def test_directives_of_a_skipped_group_count_as_lines(flags: tuple[str, ...]) -> None:
    """Inside the group one line goes and one comes: behind it the lines do not shift, the directives do."""
    old = "#ifdef A\nint gone;\nM(a);\nM(b);\n#endif\nM(after);\n"
    new = "#ifdef A\nM(a);\nint come;\nM(b);\n#endif\nM(after);\n"
    assert reported(edit(old, new), *flags) == reported(old.encode(), *flags)


def test_no_directive_between_parentheses() -> None:
    old = "int first;\nF(a,\n b,\n c)\nint x;\n"
    new = old.replace(" b,\n", " b,\n b2,\n")
    assert edit(old, new) == new.replace("int x", "#line 5\nint x").encode()


def test_each_group_starts_at_the_depth_in_front_of_the_conditional() -> None:
    middle = "#ifdef X\n if (g(1,\n#else\n if (h(\n#endif\n 2))\n  int x;\n"
    old, new = "int a;\nF(\n" + middle, "int a;\nF(\nint b,\n" + middle
    assert b"#line" not in edit(old, new)  # the call of F is never closed
    # one in front of #ifdef; behind the conditional the numbers are right, nothing more is due
    old, new = "int a;\n" + middle, "int a;\nint b;\n" + middle
    assert edit(old, new) == new.replace("#ifdef", "#line 2\n#ifdef").encode()
    assert line_starts(middle.encode())[-1].safe


def test_function_end_repairs_a_wrong_depth() -> None:
    text = b"#define OPEN (\nint f(\n{\n}\nint g;\n"
    assert [start.safe for start in line_starts(text)] == [True, True, False, True, True]
    argument = b"F(a, {\n})\nint g;\n"
    assert [start.safe for start in line_starts(argument)] == [True, False, True]


def test_own_line_directives_are_left_alone() -> None:
    new = b'int a;\n#line 7 "other.y"\nint b;\n'
    assert with_line_control(new, (None, 0, 1)) == new
    assert with_line_control(b'int a;\n# 7 "other.y"\nint b;\n', (None, 0, 1)).count(b"#") == 1


def test_wrong_number_of_origins_is_an_error() -> None:
    with pytest.raises(ValueError, match="origins"):
        with_line_control(b"a\nb\n", (0,))


def test_origins_of_finds_kept_lines() -> None:
    assert origins_of(b"a\nb\nc\n", b"a\nX\nc\n") == (0, None, 2)
    assert origins_of(b"a\nb\n", b"x\na\nb\n") == (None, 0, 1)
    assert origins_of(b"", b"x\n") == (None,)
    assert origins_of(b"x\n", b"") == ()


def test_line_starts_count_physical_lines() -> None:
    for text in (b"", b"a", b"a\n", b"a\\\nb\n", b"/*", b'"\n', b"a\\\n", b"#if\n#endif"):
        assert len(line_starts(text)) == len(split_lines(text))


PIECES = st.sampled_from(
    [
        "M({n});",
        "int v{n};",
        "/* c */",
        "/* open",
        "close */",
        '"s";',
        "'c';",
        "F(",
        ");",
        "F",
        "(1);",
        "#if 1",
        "#if 0",
        "#else",
        "#endif",
        "// c \\",
        "x \\",
        "",
        "{{",
        "}}",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, min_size=4, max_size=30), st.integers(), st.integers(0, 3))
def test_random_text_is_the_same_to_gcc(pieces: list[str], seed: int, grow: int) -> None:
    """Whatever the text: gcc makes the same of it with and without directives, and every marker that
    stands on a safe line behind a change reports its old number."""
    rng = random.Random(seed)
    old = [piece.format(n=i) + "\n" for i, piece in enumerate(pieces)] + ["}\n", ";\n"]
    at = rng.randrange(len(old))
    keep = rng.randrange(at, len(old))
    fresh = [f"int fresh{i};\n" for i in range(grow)]
    new = old[:at] + fresh + old[keep:]
    origins = (*range(at), *([None] * grow), *range(keep, len(old)))
    text = "".join(new).encode()
    under_control = with_line_control(text, origins)
    assert without_directives(under_control) == text
    head = b"#define F(a) a\n"
    try:
        plain = preprocess(head + text)
    except AssertionError:
        return  # not C for gcc (an unterminated comment or group): nothing to compare
    assert preprocess(head + under_control).split() == plain.split()
    starts = line_starts(text)
    got = reported(head + b"#line 1\n" + under_control)
    for index, (line, origin) in enumerate(zip(new, origins, strict=True)):
        name = line.removeprefix("M(").removesuffix(");\n")
        if line.startswith("M(") and origin is not None and starts[index].safe and name in got:
            assert got[name] == origin + 1
