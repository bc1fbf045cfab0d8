"""Patches: what damaged ones end in, and what any sound one does."""

from __future__ import annotations

import difflib
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kmend.core.errors import KmendError, Refused, UsageError
from kmend.patch.apply import AppliedFile, apply, split_lines
from kmend.patch.intake import parse, read_series
from kmend.patch.lines import with_line_control

ONE = "".join(f"int v{i};\n" for i in range(20)).encode()


FRAME = "--- a/kernel/one.c\n+++ b/kernel/one.c\n"
DAMAGED = {
    # numbers that Python refuses to make of text
    "thousands of digits": FRAME + "@@ -" + "9" * 5000 + " +1 @@\n-int v0;\n+int w;\n",
    # a new file cannot have lines of an old one
    "context in a new file": "--- /dev/null\n+++ b/kernel/new.c\n@@ -1,2 +1,3 @@\n a\n+b\n c\n",
    "two hunks of a new file": (
        "--- /dev/null\n+++ b/kernel/new.c\n@@ -0,0 +1 @@\n+a\n\\ No newline at end of file\n"
        "@@ -0,0 +2 @@\n+b\n"
    ),
    "rename from nothing": "diff --git a/x b/y\nrename from x\n--- a/x\n+++ /dev/null\n@@ -1 +1 @@\n-a\n+b\n",
    "a line that is nothing": FRAME + "@@ -20 +20,2 @@\n int v19;\n+\n\\ No newline at end of file\n",
    "copy to nothing": "diff --git a/x b/y\ncopy to y\n",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_named(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse([("x.patch", text.encode())])
    assert caught.value.rule == "malformed-patch"


@pytest.mark.parametrize(
    "subject",
    [
        "=?idna?q?=ff?=",
        "=?a\0b?q?x?=",
        "=?hex?q?x?=",
        "=?utf-8?b?!!!?=",
        "=?punycode?q?=ff-?=",
        "=?utf-8?q?=C3?=",
    ],
)
def test_subjects_in_any_code_are_read(subject: str) -> None:
    text = f"Subject: {subject}\n\n{FRAME}@@ -1 +1 @@\n-int v0;\n+int w;\n"
    assert parse([("x.patch", text.encode())]).title


@pytest.mark.parametrize(
    "line",
    [
        "--- " + " " * 200_000 + "x",
        "diff --git " + "a " * 100_000,
        "Binary files " + "a and " * 40_000,
        "Content-Transfer-Encoding:" + " " * 100_000 + "x y",
        "Subject: " + "[x " * 50_000,
    ],
    ids=["blanks", "names", "binary", "encoding", "tags"],
)
def test_long_lines_take_no_time(line: str) -> None:
    text = f"{line}\n{FRAME}@@ -1 +1 @@\n-int v0;\n+int w;\n".encode()
    start = time.process_time()
    try:
        parse([("x.patch", text)])
    except KmendError as error:
        assert error.rule == "malformed-patch"
    assert time.process_time() - start < 2.0


def test_a_file_that_only_insertions_without_a_place_would_make_is_refused() -> None:
    text = (
        "--- a/kernel/new.c\n+++ b/kernel/new.c\n@@ -0,0 +1 @@\n+a\n\\ No newline at end of file\n"
        "@@ -0,0 +2 @@\n+b\n"
    )
    tree = {"kernel/one.c": ONE}
    with pytest.raises((Refused, UsageError)) as caught:
        apply(parse([("x.patch", text.encode())], strip=1), tree.get)
    assert caught.value.rule in {"does-not-apply", "malformed-patch"}


def test_a_series_option_of_thousands_of_digits_is_not_understood() -> None:
    with pytest.raises(UsageError):
        read_series("a.patch -p" + "1" * 5000)


# -- any edit of any text -------------------------------------------------------------------------------

LINES = st.sampled_from(
    [
        b"int a;",
        b"\tx++;",
        b"{",
        b"}",
        b"",
        b"#define A 1",
        b"/* c */",
        b"if (a) {",
        b"\r",
        b"  ",
        b"-- ",
        b"+ b",
    ]
)


@st.composite
def edits(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A text and the text after some edits: lines taken away, put in and changed; with or without an end."""
    before = draw(st.lists(LINES, min_size=1, max_size=60))
    after = list(before)
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(after)))
        after[at : at + draw(st.integers(0, 4))] = draw(st.lists(LINES, max_size=4))
    ends = [draw(st.sampled_from([b"\n", b"\n", b""])) for _ in range(2)]
    old, new = (b"\n".join(text) + end for text, end in zip((before, after), ends, strict=True))
    assume(old != new and old and new)
    return old, new


def diffed(old: bytes, new: bytes, folder: Path, *flags: str) -> bytes:
    """What diff(1) makes of the two."""
    (folder / "old").write_bytes(old)
    (folder / "new").write_bytes(new)
    names = ["--label", "a/kernel/one.c", "--label", "b/kernel/one.c"]
    done = subprocess.run(
        ["diff", "-u", *flags, *names, folder / "old", folder / "new"], capture_output=True, check=False
    )
    assert done.returncode == 1, done.stderr
    return done.stdout


def ours(old: bytes, new: bytes) -> bytes:
    """A unified diff by difflib: the same format from another maker."""
    names = (b"a/kernel/one.c", b"b/kernel/one.c")
    rows = difflib.diff_bytes(difflib.unified_diff, split_lines(old), split_lines(new), *names)
    return b"".join(r if r.endswith(b"\n") else r + b"\n\\ No newline at end of file\n" for r in rows)


def applied(text: bytes, old: bytes) -> AppliedFile:
    (file,) = apply(parse([("x.patch", text)]), {"kernel/one.c": old}.get).files
    return file


@settings(max_examples=150, deadline=None)
@given(edits(), st.sampled_from(["-U3", "-U1", "-U8"]))
def test_a_diff_applied_is_the_new_text(texts: tuple[bytes, bytes], context: str) -> None:
    old, new = texts
    with TemporaryDirectory() as folder:
        patches = [diffed(old, new, Path(folder), context), ours(old, new)]
    for text in patches:
        file = applied(text, old)
        assert (file.old, file.new) == (old, new)
        before, after = split_lines(old), split_lines(new)
        assert len(file.origins) == len(after)
        known = [(i, o) for i, o in enumerate(file.origins) if o is not None]
        assert all(after[i] == before[o] for i, o in known), "a line has the origin that it is"
        assert [o for _, o in known] == sorted({o for _, o in known}), "origins ascend"


@settings(max_examples=150, deadline=None)
@given(edits())
def test_what_is_applied_already_is_recognised(texts: tuple[bytes, bytes]) -> None:
    old, new = texts
    with TemporaryDirectory() as folder:
        text = diffed(old, new, Path(folder))
    try:
        again = applied(text, new)
    except Refused as error:
        assert error.rule == "already-applied"
    else:
        # Where the new text holds the old one's lines as well (a line put in beside its like), it applies
        # once more; then undoing it must not be what brought it there.
        assert again.new != new
        assert len(split_lines(again.new or b"")) - len(split_lines(new)) == len(split_lines(new)) - len(
            split_lines(old)
        )


@settings(max_examples=150, deadline=None)
@given(edits())
def test_line_control_keeps_the_numbers_of_untouched_lines(texts: tuple[bytes, bytes]) -> None:
    old, new = texts
    with TemporaryDirectory() as folder:
        file = applied(diffed(old, new, Path(folder)), old)
    result = split_lines(with_line_control(new, file.origins))
    assert [line for line in result if not line.startswith(b"#line ")] == split_lines(new)
    # without open comments and conditionals every line is a place for a directive: every number is exact
    number, index = 1, 0
    for line in result:
        if line.startswith(b"#line "):
            number = int(line.split()[1])
            continue
        origin = file.origins[index]
        if origin is not None:
            assert number == origin + 1, f"line {index} of {new!r}"
        number, index = number + 1, index + 1


@pytest.mark.parametrize("maker", [diffed, None])
def test_a_patch_with_a_line_lost_never_applies(maker: object, tmp_path: Path) -> None:
    old, new = ONE, ONE.replace(b"int v7;\n", b"int w7;\nint w8;\n")
    text = diffed(old, new, tmp_path) if maker else ours(old, new)
    lines = split_lines(text)
    assert applied(text, old).new == new
    for at in range(3, len(lines)):
        with pytest.raises(KmendError):
            applied(b"".join(lines[:at] + lines[at + 1 :]), old)
