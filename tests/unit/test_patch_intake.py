"""Reading patches: every form that people hand in, and every damage that must not pass unseen."""

from __future__ import annotations

import base64
import quopri
import random
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unidiff.patch import PatchSet

from kmend.core.errors import Refused, UsageError
from kmend.patch.intake import SeriesEntry, git_names, parse, read_series
from kmend.patch.model import Form, Side

HEAD = b"--- a/fs/x.c\n+++ b/fs/x.c\n"
HUNK = b"@@ -1,3 +1,3 @@ int f(void)\n one\n-two\n+zwei\n three\n"


def test_the_parts_of_a_plain_diff() -> None:
    (file,) = parse([("p", HEAD + HUNK)]).files
    assert (file.old_name, file.new_name, file.form, file.line) == ("a/fs/x.c", "b/fs/x.c", Form.MODIFIED, 1)
    (hunk,) = file.hunks
    assert (hunk.old_start, hunk.old_count, hunk.new_start, hunk.new_count) == (1, 3, 1, 3)
    assert (hunk.section, hunk.line, hunk.leading, hunk.trailing) == ("int f(void)", 3, 1, 1)
    assert hunk.old == (b"one\n", b"two\n", b"three\n")
    assert hunk.new == (b"one\n", b"zwei\n", b"three\n")
    assert hunk.reversed().old == hunk.new


@pytest.mark.parametrize(
    ("tail", "why"),
    [
        (b"@@ -1,3 +1,3 @@\n one\n-two\n+zwei\n", "ends inside"),
        (b"@@ -1,2 +1,2 @@\n one\n-two\n+zwei\n three\n", "more lines than its header counts"),
        (b"@@ -1,2 +1,2 @@\n one\n-two\n+zwei\n+lost\n", "more lines than its header counts"),
        (b"@@ -1,2 +1,2 @@\n one\n-two\n+zwei\n-lost\n", "more lines than its header counts"),
        (b"@@ -1,2 +1,1 @@\n one\n-two\n\n+lost\n", "more lines than its header counts"),
        (b"@@ -1,3 +1,3 @@\n one\n*two\n", "not a line of a hunk"),
        (b"@@ -1,3 +1,4 @@\n one\n-two\n+zwei\n three\n" + HEAD + HUNK, "has more lines"),
        (b"@@ -0,3 +1,3 @@\n one\n-two\n+zwei\n three\n", "count from 1"),
        (b"@@ -1,0 +1,0 @@\n", "empty hunk"),
        (b"@@ -1,3 +1 @\n one\n", "damaged hunk header"),
        (HUNK + b"@@ -2,3 +2,3 @@\n one\n-two\n+zwei\n three\n", "overlaps"),
        (HUNK + b"@@ damaged\n", "damaged hunk header"),
        (b"@@ -1,2 +1,2 @@\n one\n\\ No newline at end of file\n-two\n+zwei\n", "middle of a file"),
        (b"@@ -1 +1 @@\n\\ No newline at end of file\n-two\n+zwei\n", "without a line in front"),
        (b"", "cut short"),
    ],
)
def test_malformed_hunks_are_errors(tail: bytes, why: str) -> None:
    """The line counts of a header and the lines below it must agree; unidiff drops surplus lines silently."""
    with pytest.raises(UsageError) as caught:
        parse([("p", HEAD + tail)])
    assert why in caught.value.why
    assert caught.value.rule == "malformed-patch"
    assert caught.value.exit_status == 2
    assert caught.value.what.startswith("p, line ")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"@@ -1 +1 @@\n-a\n+b\n", "without a file header"),
        (b"diff --cc fs/x.c\nindex 1,2..3\n--- a/fs/x.c\n+++ b/fs/x.c\n@@@ -1 -1 +1 @@@\n", "combined"),
        (b"*** a/x.c\n--- b/x.c\n***************\n*** 1 ****\n! a\n--- 1 ----\n! b\n", "context diff"),
        (b"diff --git a/x.c b/x.c\nindex 12..34 100644\n", "cut short"),
        (b"diff --git a/x.c b/x.c\nindex 12..34 100644\n@@ -1 +1 @@\n-a\n+b\n", "without the lines"),
    ],
)
def test_other_damage(text: bytes, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse([("p", text)])
    assert why in caught.value.why


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"hello\nworld\n", "no unified diff"),
        (b"\x7fELF\x02\x01", "ELF"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"--- about this\n+++ and that\nmore text\n", "no unified diff"),
    ],
)
def test_not_a_patch(content: bytes, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse([("name.txt", content)])
    assert caught.value.rule == "not-a-patch"
    assert caught.value.exit_status == 2
    assert why in caught.value.why
    assert "name.txt" in caught.value.what


def test_no_patch_at_all() -> None:
    with pytest.raises(UsageError):
        parse([])


MAIL = b"""From 0123456789abcdef0123456789abcdef01234567 Mon Sep 17 00:00:00 2001
From: =?utf-8?q?J=C3=B6rg?= <j@example.org>
Date: Mon, 1 Jan 2024 00:00:00 +0000
Subject: [PATCH 6.1 3/7] ext4: look before
 you leap

[ Upstream commit aabbccddeeff00112233aabbccddeeff00112233 ]

- a list item
+ another one
--- not a header
+++ neither
---
 fs/x.c | 2 +-
 1 file changed, 1 insertion(+), 1 deletion(-)

"""


def test_a_damaged_header_of_a_mail_is_no_obstacle() -> None:
    """What cannot be decoded (base64 of one letter) is shown as it stands."""
    diff = b"--- a/x.c\n+++ b/x.c\n@@ -1 +1 @@\n-a\n+b\n"
    parsed = parse([("x.patch", b"Subject: =?utf-8?b?a?= fix\n\n" + diff)])
    assert parsed.title == "=?utf-8?b?a?= fix"


def test_mail_text_in_front_and_signature_behind() -> None:
    patches = parse([("m", MAIL + HEAD + HUNK + b"-- \n2.39.2\n\n")])
    (source,) = patches.sources
    assert source.title == "ext4: look before you leap"
    assert source.origin == "upstream commit aabbccddeeff00112233aabbccddeeff00112233"
    assert source.author == "Jörg <j@example.org>"
    assert patches.title == source.title
    assert len(patches.files) == 1


def test_several_mails_in_one_file() -> None:
    second = MAIL.replace(b"look before", b"and")
    files = parse([("m", MAIL + HEAD + HUNK + b"-- \n2.39.2\n\n" + second + HEAD + HUNK)]).files
    assert len(files) == 2


def test_debian_header_and_git_show() -> None:
    dep3 = b"Description: stop it\nOrigin: upstream, https://git.example.org/1\nAuthor: A <a@b>\n\n"
    (source,) = parse([("d", dep3 + HEAD + HUNK)]).sources
    assert (source.title, source.origin) == ("stop it", "upstream, https://git.example.org/1")
    show = b"commit " + b"ab" * 20 + b"\nAuthor: A <a@b>\nDate:   now\n\n    the subject\n\n    more\n\n"
    (source,) = parse([("s", show + HEAD + HUNK)]).sources
    assert (source.title, source.origin) == ("the subject", "commit " + "ab" * 20)
    (source,) = parse([("bare", HEAD + HUNK)]).sources
    assert source.title == source.origin == ""
    assert parse([("bare", HEAD + HUNK)]).title == "bare"


@pytest.mark.parametrize("how", ["quoted-printable", "base64"])
def test_transfer_encodings(how: str) -> None:
    body = HEAD + HUNK.replace(b"zwei", b"a = b;\t/* \xc3\xb6 */")
    encoded = quopri.encodestring(body) if how == "quoted-printable" else base64.encodebytes(body)
    mail = b"Subject: x\nContent-Transfer-Encoding: " + how.encode() + b"\n\n" + encoded
    plain = mail[: mail.index(b"Content")] + b"\n" + body
    assert parse([("m", mail)]).files[0].hunks[0].new == parse([("m", plain)]).files[0].hunks[0].new


def test_no_newline_at_end() -> None:
    text = HEAD + b"@@ -1 +1 @@\n-a\n\\ No newline at end of file\n+b\n\\ No newline at end of file\n"
    (hunk,) = parse([("p", text)]).files[0].hunks
    assert (hunk.old, hunk.new) == ((b"a",), (b"b",))


def test_blank_context_lines_without_their_blank() -> None:
    (hunk,) = parse([("p", HEAD + b"@@ -1,3 +1,3 @@\n\n-a\n+b\n\n")]).files[0].hunks
    assert hunk.old == (b"\n", b"a\n", b"\n")


def test_carriage_returns_stay_in_the_lines() -> None:
    text = (HEAD + HUNK).replace(b"\n", b"\r\n")
    (file,) = parse([("p", text)]).files
    assert file.new_name == "b/fs/x.c"
    assert file.hunks[0].old == (b"one\r\n", b"two\r\n", b"three\r\n")


GIT = {
    "rename": (
        b"diff --git a/fs/old name.c b/fs/new.c\nsimilarity index 90%\nrename from fs/old name.c\n"
        b"rename to fs/new.c\nindex 1..2 100644\n--- a/fs/old name.c\t\n+++ b/fs/new.c\n" + HUNK,
        (Form.RENAMED, "fs/old name.c", "fs/new.c", 0, 1),
    ),
    "pure rename": (
        b"diff --git a/fs/a b.c b/fs/c d.c\nsimilarity index 100%\n"
        b"rename from fs/a b.c\nrename to fs/c d.c\n",
        (Form.RENAMED, "fs/a b.c", "fs/c d.c", 0, 0),
    ),
    "copy": (
        b"diff --git a/fs/a.c b/fs/b.c\nsimilarity index 100%\ncopy from fs/a.c\ncopy to fs/b.c\n",
        (Form.COPIED, "fs/a.c", "fs/b.c", 0, 0),
    ),
    "new": (
        b"diff --git a/fs/n.c b/fs/n.c\nnew file mode 100644\nindex 0..1\n--- /dev/null\n+++ b/fs/n.c\n"
        b"@@ -0,0 +1,2 @@\n+a\n+b\n",
        (Form.CREATED, None, "b/fs/n.c", 1, 1),
    ),
    "new and empty": (
        b"diff --git a/fs/n.c b/fs/n.c\nnew file mode 100644\nindex 0000000..e69de29\n",
        (Form.CREATED, None, "b/fs/n.c", 1, 0),
    ),
    "deleted": (
        b"diff --git a/fs/n.c b/fs/n.c\ndeleted file mode 100644\nindex 1..0\n--- a/fs/n.c\n+++ /dev/null\n"
        b"@@ -1,2 +0,0 @@\n-a\n-b\n",
        (Form.DELETED, "a/fs/n.c", None, 1, 1),
    ),
    "mode": (
        b"diff --git a/scripts/x.sh b/scripts/x.sh\nold mode 100644\nnew mode 100755\n",
        (Form.MODIFIED, "a/scripts/x.sh", "b/scripts/x.sh", 1, 0),
    ),
    "no prefix": (
        b"diff --git fs/x.c fs/x.c\nindex 1..2 100644\n--- fs/x.c\n+++ fs/x.c\n" + HUNK,
        (Form.MODIFIED, "fs/x.c", "fs/x.c", 0, 1),
    ),
    "quoted": (
        b'diff --git "a/fs/f\\303\\266.c" "b/fs/f\\303\\266.c"\nold mode 100644\nnew mode 100755\n',
        (Form.MODIFIED, "a/fs/fö.c", "b/fs/fö.c", 1, 0),
    ),
}


@pytest.mark.parametrize("name", GIT)
def test_git_forms(name: str) -> None:
    text, expected = GIT[name]
    (file,) = parse([("g", text)]).files
    assert (file.form, file.old_name, file.new_name, file.strip, len(file.hunks)) == expected


def test_git_names_with_blanks() -> None:
    assert git_names(b"a/x y.c b/x y.c") == ("a/x y.c", "b/x y.c")
    assert git_names(b"a/x y.c b/z.c") == (None, None)


def test_files_that_are_not_text_are_refused_by_name() -> None:
    text = (
        b"diff --git a/x.bin b/x.bin\nindex 1..2 100644\nGIT binary patch\nliteral 3\nKcmZ\n\n"
        b"diff --git a/l b/l\nnew file mode 120000\n--- /dev/null\n+++ b/l\n@@ -0,0 +1 @@\n+target\n"
        b"\\ No newline at end of file\nBinary files a/y.png and b/y.png differ\n"
    )
    with pytest.raises(Refused) as caught:
        parse([("g", text + HEAD + HUNK)])
    assert [row.rule for row in caught.value.reasons] == ["binary-patch", "file-mode", "binary-patch"]


def test_gnu_new_and_deleted_files_by_their_date() -> None:
    text = (
        b"--- a/fs/n.c\t1970-01-01 00:00:00.000000000 +0000\n+++ b/fs/n.c\t2024-01-01 10:00:00.0 +0100\n"
        b"@@ -0,0 +1 @@\n+a\n--- a/fs/o.c\t2024-01-01 10:00:00\n+++ b/fs/o.c\t1969-12-31 19:00:00 -0500\n"
        b"@@ -1 +0,0 @@\n-a\n"
    )
    new, gone = parse([("g", text)]).files
    assert (new.form, new.old_name, new.new_name) == (Form.CREATED, None, "b/fs/n.c")
    assert (gone.form, gone.old_name, gone.new_name) == (Form.DELETED, "a/fs/o.c", None)


def test_old_dates_and_blanks_in_names() -> None:
    text = b"--- fs/x.c.orig Mon Jan  1 10:00:00 2024\n+++ fs/x.c 2024-01-01 10:00:00\n" + HUNK
    (file,) = parse([("g", text)]).files
    assert (file.old_name, file.new_name, file.strip) == ("fs/x.c.orig", "fs/x.c", None)


def test_strip_given_for_all_or_by_name() -> None:
    texts = [("one", HEAD + HUNK), ("two", HEAD + HUNK)]
    assert [file.strip for file in parse(texts, strip=3).files] == [3, 3]
    assert [file.strip for file in parse(texts, strip={"two": 2}).files] == [None, 2]


def test_series() -> None:
    text = "# a comment\n\nfirst.patch\n  dir/second.patch -p0 # why\nthird#.patch -pab\n"
    assert read_series(text) == (
        SeriesEntry("first.patch"),
        SeriesEntry("dir/second.patch", 0),
        SeriesEntry("third#.patch", 1),
    )
    for bad in ("a.patch -R\n", "a.patch --what\n"):
        with pytest.raises(UsageError) as caught:
            read_series(bad)
        assert caught.value.rule == "series"


# --- an oracle: diff makes it, unidiff reads it too -------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(), st.booleans(), st.integers(0, 5))
def test_well_formed_patches_read_as_unidiff_reads_them(
    tmp_path_factory: pytest.TempPathFactory, seed: int, newline: bool, context: int
) -> None:
    rng = random.Random(seed)
    old = [f"line {rng.randrange(6)}" for _ in range(rng.randrange(1, 40))]
    new = [
        line if rng.random() > 0.2 else "other" for line in old for _ in range(rng.choice((0, 1, 1, 1, 2)))
    ]
    folder: Path = tmp_path_factory.mktemp("d")
    (folder / "a").write_text("\n".join(old) + "\n")
    (folder / "b").write_text("\n".join(new) + ("\n" if newline else ""))
    text = subprocess.run(
        ["diff", f"-U{context}", "a", "b"], cwd=folder, capture_output=True, check=False
    ).stdout
    if not text:
        return
    (mine,) = parse([("p", text)]).files
    (theirs,) = PatchSet(text.decode())
    assert len(mine.hunks) == len(theirs)
    for hunk, other in zip(mine.hunks, theirs, strict=True):
        assert (hunk.old_start, hunk.old_count) == (other.source_start, other.source_length)
        assert (hunk.new_start, hunk.new_count) == (other.target_start, other.target_length)
        lines = [(line.line_type, line.value.encode()) for line in other if line.line_type != "\\"]
        mine_lines = [(row.side.value, row.text.removesuffix(b"\n") + b"\n") for row in hunk.lines]
        assert mine_lines == lines


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_end_in_a_patch_or_a_known_error(noise: bytes) -> None:
    for text in (noise, HEAD + noise, HEAD + HUNK + noise, b"diff --git " + noise):
        try:
            patches = parse([("p", text)])
        except (UsageError, Refused):
            continue
        for file in patches.files:
            for hunk in file.hunks:
                assert len(hunk.old) == hunk.old_count
                assert len(hunk.new) == hunk.new_count
                assert any(row.side is not Side.CONTEXT for row in hunk.lines) or hunk.old == hunk.new
