"""Patches: what damaged ones end in, and what any sound one does."""

from __future__ import annotations

import time

import pytest

from kmend.core.errors import KmendError, Refused, UsageError
from kmend.patch.apply import apply
from kmend.patch.intake import parse, read_series

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
