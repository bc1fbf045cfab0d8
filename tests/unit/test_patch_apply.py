"""Applying: patch(1) is the oracle where it is right; where it guesses, kmend refuses."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmend.core.errors import Refused
from kmend.patch.apply import Applied, Read, apply, matches, nearest, stripped, unsafe
from kmend.patch.intake import parse
from kmend.patch.model import Side

EXAMPLES = Path(__file__).parents[2] / "examples"


def tree(files: dict[str, bytes]) -> Read:
    return files.get


def text(*lines: object) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def diff(
    old: bytes, new: bytes, folder: Path, *flags: str, names: tuple[str, str] = ("a/fs/x.c", "b/fs/x.c")
) -> bytes:
    (folder / "old").write_bytes(old)
    (folder / "new").write_bytes(new)
    done = subprocess.run(
        ["diff", *(flags or ("-u",)), "--label", names[0], "--label", names[1], "old", "new"],
        cwd=folder,
        capture_output=True,
        check=False,
    )
    return done.stdout


def only(applied: Applied) -> bytes | None:
    (file,) = applied.files
    return file.new


def refusals(patch: bytes, files: dict[str, bytes], **options: int) -> list[tuple[str, str, str]]:
    with pytest.raises(Refused) as caught:
        apply(parse([("p", patch)]), tree(files), **options)
    return [(row.rule, row.what, row.why) for row in caught.value.reasons]


OLD = text(*range(40))
NEW = text(*range(10), "ten", *range(11, 30), *range(31, 40))


def test_a_plain_patch_and_where_its_lines_come_from(tmp_path: Path) -> None:
    applied = apply(parse([("p", diff(OLD, NEW, tmp_path))]), tree({"fs/x.c": OLD}))
    (file,) = applied.files
    assert (file.path, file.old, file.new) == ("fs/x.c", OLD, NEW)
    assert file.origins == (*range(10), None, *range(11, 30), *range(31, 40))
    assert [(row.line, row.offset, row.fuzz) for row in file.hunks] == [(8, 0, 0), (28, 0, 0)]
    assert applied.warnings == ()
    assert applied.contents == {"fs/x.c": NEW}


def test_offset_is_found_and_told(tmp_path: Path) -> None:
    moved = text("x", "y") + OLD
    applied = apply(parse([("p", diff(OLD, NEW, tmp_path))]), tree({"fs/x.c": moved}))
    assert only(applied) == text("x", "y") + NEW
    assert [row.offset for row in applied.files[0].hunks] == [2, 2]
    assert [row.rule for row in applied.warnings] == ["hunk-moved", "hunk-moved"]
    assert "+2 lines" in applied.warnings[0].why


def test_ambiguous_place_is_refused(tmp_path: Path) -> None:
    """patch(1) would take the nearer of the two."""
    block = text("{", "a", "b", "if (x)", "c", "d", "}")
    old = text(*range(20)) + block + text(*range(30, 50))
    patch = diff(old, old.replace(b"if (x)", b"if (!x)"), tmp_path)
    there = text(*range(20)) + text("new") + block + text("between") + block
    ((rule, what, why),) = refusals(patch, {"fs/x.c": there})
    assert rule == "ambiguous-hunk"
    assert "fs/x.c: hunk 1 of 1 (p, line 3" in what
    assert "2 places" in what
    assert "lines 22, 30" in why
    # at the very line that the patch names there is no doubt
    applied = apply(parse([("p", patch)]), tree({"fs/x.c": old + block}))
    assert [row.offset for row in applied.files[0].hunks] == [0]


def test_hunk_without_context_is_refused_only_where_nothing_proves_its_place(tmp_path: Path) -> None:
    insertion = diff(OLD, text(*range(5), "new", *range(5, 40)), tmp_path, "-U0")
    ((rule, _, _),) = refusals(insertion, {"fs/x.c": OLD})
    assert rule == "no-context"
    change = diff(OLD, OLD.replace(b"5\n", b"five\n", 1), tmp_path, "-U0")
    assert only(apply(parse([("p", change)]), tree({"fs/x.c": OLD}))) == OLD.replace(b"5\n", b"five\n", 1)


def test_failure_names_file_hunk_line_and_shows_both_sides(tmp_path: Path) -> None:
    there = OLD.replace(b"12\n", b"twelve\n").replace(b"32\n", b"thirty-two\n")
    rows = refusals(diff(OLD, NEW, tmp_path), {"fs/x.c": there})
    assert [row[0] for row in rows] == ["does-not-apply", "does-not-apply"]
    assert "fs/x.c: hunk 1 of 2 (p, line 3" in rows[0][1]
    assert rows[0][2] == "line 13: expected '12'\n         found    'twelve'"
    assert "expected '32'" in rows[1][2]


def test_shifted_failure_shows_the_lines_where_it_nearly_fits(tmp_path: Path) -> None:
    there = text(*"abcdef") + OLD.replace(b"12\n", b"twelve\n")
    ((_, _, why), *_) = refusals(diff(OLD, NEW, tmp_path), {"fs/x.c": there})
    assert why.startswith("line 19: expected '12'")


def test_white_space_and_line_endings_are_called_by_name(tmp_path: Path) -> None:
    old = text("\tif (a)", "\t\tb();", "\tc();")
    patch = diff(old, old.replace(b"b()", b"d()"), tmp_path)
    ((_, _, why),) = refusals(patch.replace(b"\t", b"        "), {"fs/x.c": old})
    assert "white space" in why
    ((_, _, why),) = refusals(patch, {"fs/x.c": old.replace(b"\n", b"\r\n")})
    assert "line endings" in why
    ((_, _, why),) = refusals(patch.replace(b"\n", b"\r\n"), {"fs/x.c": old})
    assert "line endings" in why
    # CR LF in both is the same file
    crlf = old.replace(b"\n", b"\r\n")
    applied = apply(parse([("p", patch.replace(b"\n", b"\r\n"))]), tree({"fs/x.c": crlf}))
    assert only(applied) == crlf.replace(b"b()", b"d()")


def test_fuzz_only_when_asked_for(tmp_path: Path) -> None:
    there = OLD.replace(b"7\n", b"seven\n", 1).replace(b"27\n", b"twenty-seven\n")
    patch = diff(OLD, NEW, tmp_path)
    assert {row[0] for row in refusals(patch, {"fs/x.c": there})} == {"does-not-apply"}
    applied = apply(parse([("p", patch)]), tree({"fs/x.c": there}), fuzz=1)
    # the file's own context stays
    assert only(applied) == NEW.replace(b"7\n", b"seven\n", 1).replace(b"27\n", b"twenty-seven\n")
    assert [row.fuzz for row in applied.files[0].hunks] == [1, 1]
    assert "ignoring 1 context" in applied.warnings[0].why


def test_a_last_line_without_newline_goes_nowhere_else() -> None:
    patch = b"--- a/fs/x.c\n+++ b/fs/x.c\n@@ -1,2 +1,2 @@\n a\n-b\n+c\n\\ No newline at end of file\n"
    assert only(apply(parse([("p", patch)]), tree({"fs/x.c": b"a\nb\n"}))) == b"a\nc"
    ((rule, _, _),) = refusals(patch, {"fs/x.c": b"a\nb\nmore\n"}, fuzz=3)
    assert rule == "does-not-apply"


def test_already_applied(tmp_path: Path) -> None:
    ((rule, what, _),) = refusals(diff(OLD, NEW, tmp_path), {"fs/x.c": NEW})
    assert rule == "already-applied"
    assert what == "already applied: fs/x.c"


def test_half_applied_is_not_already_applied(tmp_path: Path) -> None:
    half = text(*range(10), "ten", *range(11, 40))
    rows = refusals(diff(OLD, NEW, tmp_path), {"fs/x.c": half})
    assert [row[0] for row in rows] == ["does-not-apply"]


def test_one_of_several_already_applied_is_named(tmp_path: Path) -> None:
    middle = text(*range(10), "ten", *range(11, 40))
    first, second = diff(OLD, middle, tmp_path), diff(middle, NEW, tmp_path)
    patches = parse([("one", first), ("two", second)])
    assert only(apply(patches, tree({"fs/x.c": OLD}))) == NEW
    with pytest.raises(Refused) as caught:
        apply(patches, tree({"fs/x.c": middle}))
    assert [row.rule for row in caught.value.reasons] == ["does-not-apply", "already-applied"]
    assert caught.value.reasons[1].what == "one is already applied: fs/x.c"


def test_several_patches_over_one_file_are_one_change(tmp_path: Path) -> None:
    states = [OLD]
    rng = random.Random(1)
    for step in range(5):
        lines = states[-1].splitlines(keepends=True)
        lines.insert(rng.randrange(len(lines)), f"step {step}\n".encode())
        del lines[rng.randrange(len(lines))]
        states.append(b"".join(lines))
    patches = [(str(i), diff(states[i], states[i + 1], tmp_path)) for i in range(5)]
    (file,) = apply(parse(patches), tree({"fs/x.c": OLD})).files
    assert (file.old, file.new) == (OLD, states[-1])
    before, after = OLD.splitlines(), states[-1].splitlines()
    for line, origin in zip(after, file.origins, strict=True):
        assert (origin is None) == line.startswith(b"step")
        assert origin is None or before[origin] == line


def test_patches_that_cancel_out_leave_nothing(tmp_path: Path) -> None:
    patches = parse([("one", diff(OLD, NEW, tmp_path)), ("two", diff(NEW, OLD, tmp_path))])
    assert apply(patches, tree({"fs/x.c": OLD})).files == ()


def test_created_deleted_renamed_copied() -> None:
    patch = (
        b"diff --git a/fs/n.c b/fs/n.c\nnew file mode 100644\n"
        b"--- /dev/null\n+++ b/fs/n.c\n@@ -0,0 +1 @@\n+n\n"
        b"diff --git a/fs/o.c b/fs/o.c\ndeleted file mode 100644\n"
        b"--- a/fs/o.c\n+++ /dev/null\n@@ -1 +0,0 @@\n-o\n"
        b"diff --git a/fs/r.c b/fs/s.c\nsimilarity index 60%\nrename from fs/r.c\nrename to fs/s.c\n"
        b"--- a/fs/r.c\n+++ b/fs/s.c\n@@ -1 +1 @@\n-r\n+s\n"
        b"diff --git a/fs/c.c b/fs/d.c\nsimilarity index 100%\ncopy from fs/c.c\ncopy to fs/d.c\n"
        b"diff --git a/fs/m.c b/fs/m.c\nold mode 100644\nnew mode 100755\n"
    )
    files = {"fs/o.c": b"o\n", "fs/r.c": b"r\n", "fs/c.c": b"c\n", "fs/m.c": b"m\n"}
    applied = apply(parse([("p", patch)]), tree(files))
    assert applied.contents == {
        "fs/n.c": b"n\n",
        "fs/o.c": None,
        "fs/r.c": None,
        "fs/s.c": b"s\n",
        "fs/d.c": b"c\n",
    }
    assert [(f.path, f.mode_change) for f in applied.files if f.mode_change] == [
        ("fs/m.c", ("100644", "100755"))
    ]
    # the same upon its own result
    done = {path: text for path, text in (files | applied.contents).items() if text is not None}
    assert {row[0] for row in refusals(patch, done)} <= {"already-applied", "does-not-apply"}


def test_creation_upon_an_existing_file_and_deletion_of_another_one() -> None:
    create = b"--- /dev/null\n+++ b/fs/n.c\n@@ -0,0 +1 @@\n+n\n"
    ((rule, what, _),) = refusals(create, {"fs/n.c": b"other\n"})
    assert (rule, what) == ("does-not-apply", "fs/n.c exists already")
    ((rule, _, _),) = refusals(create, {"fs/n.c": b"n\n"})
    assert rule == "already-applied"
    delete = b"--- a/fs/o.c\n+++ /dev/null\n@@ -1 +0,0 @@\n-o\n"
    ((rule, what, _),) = refusals(delete, {"fs/o.c": b"o\nmore\n"})
    assert rule == "does-not-apply"


HUNK = b"@@ -1 +1 @@\n-a\n+b\n"


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ("a/fs/x.c", "b/fs/x.c", "fs/x.c"),
        ("fs/x.c", "fs/x.c", "fs/x.c"),
        ("linux-6.1.orig/fs/x.c", "linux-6.1/fs/x.c", "fs/x.c"),
        ("/home/me/linux/fs/x.c", "/home/me/linux/fs/x.c", "fs/x.c"),
        ("fs/x.c.orig", "fs/x.c", "fs/x.c"),
        ("fs/x.c", "fs/x.c.new", "fs/x.c"),
        ("a/Makefile", "b/Makefile", "Makefile"),
        ("fs/Makefile", "fs/Makefile", "fs/Makefile"),
        ("a//fs/x.c", "b//fs/x.c", "fs/x.c"),
    ],
)
def test_strip_level_is_found(old: str, new: str, path: str) -> None:
    files = {"fs/x.c": b"a\n", "Makefile": b"a\n", "fs/Makefile": b"a\n", "x.c": b"a\n"}
    applied = apply(parse([("p", f"--- {old}\n+++ {new}\n".encode() + HUNK)]), tree(files))
    assert [file.path for file in applied.files] == [path]


def test_strip_level_of_new_files_follows_the_tree() -> None:
    new = b"--- /dev/null\n+++ linux/drivers/n.c\n@@ -0,0 +1 @@\n+n\n"
    assert apply(parse([("p", new)]), tree({})).contents == {"drivers/n.c": b"n\n"}


def test_given_strip_level_is_obeyed() -> None:
    patch = b"--- x/a/fs/x.c\n+++ x/b/fs/x.c\n" + HUNK
    assert apply(parse([("p", patch)], strip=2), tree({"fs/x.c": b"a\n"})).contents == {"fs/x.c": b"b\n"}
    with pytest.raises(Refused) as caught:
        apply(parse([("p", patch)], strip=9), tree({"fs/x.c": b"a\n"}))
    assert "components" in caught.value.reasons[0].what


@pytest.mark.parametrize(
    "name", ["../fs/x.c", "fs/../../x.c", "/etc/passwd", ".git/config", "fs/./x.c", "x\0y"]
)
def test_unsafe_paths(name: str) -> None:
    assert unsafe(name)
    patch = b"--- /dev/null\n+++ " + name.encode() + b"\n@@ -0,0 +1 @@\n+n\n"
    with pytest.raises(Refused) as caught:
        apply(parse([("p", patch)], strip=0), tree({}))
    assert caught.value.reasons[0].rule == "unsafe-path"


def test_unsafe_paths_are_never_read() -> None:
    read: list[str] = []
    patch = b"--- a/../../etc/passwd\n+++ b/../../etc/passwd\n" + HUNK

    def reader(path: str) -> bytes | None:
        read.append(path)
        return None

    with pytest.raises(Refused):
        apply(parse([("p", patch)]), reader)
    assert not [path for path in read if ".." in path]


def test_missing_file() -> None:
    ((rule, what, _),) = refusals(b"--- a/fs/no.c\n+++ b/fs/no.c\n" + HUNK, {})
    assert rule == "does-not-apply"
    assert "fs/no.c is not in the source tree" in what


def test_stripped() -> None:
    assert [stripped("a//b/c", n) for n in range(4)] == ["a/b/c", "b/c", "c", None]


@given(st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=30), st.integers(0, 29), st.integers(1, 5))
def test_matches_finds_every_place(lines: list[bytes], at: int, size: int) -> None:
    wanted = lines[at : at + size]
    if wanted:
        found = [i for i in range(len(lines) - len(wanted) + 1) if lines[i : i + len(wanted)] == wanted]
        assert matches(wanted, lines, 0) == found
        assert matches(wanted, lines, 3) == [i for i in found if i >= 3]
        assert nearest(wanted, lines, at) <= len(lines)


# --- the oracle: patch(1) ---------------------------------------------------------------------------


def by_patch(folder: Path, content: bytes, patch: bytes, fuzz: int) -> bytes | None:
    """What patch(1) makes of it, None when it fails. ``--force``: no guess that the patch is reversed."""
    (folder / "target").write_bytes(content)
    done = subprocess.run(
        ["patch", "--force", "-r-", f"-F{fuzz}", "-s", "-o", "out", "target"],
        cwd=folder,
        input=patch,
        capture_output=True,
        check=False,
    )
    return (folder / "out").read_bytes() if done.returncode == 0 else None


@settings(max_examples=300, deadline=None)
@given(st.integers(), st.integers(0, 3), st.integers(1, 4), st.integers(2, 40))
def test_results_are_those_of_patch(
    tmp_path_factory: pytest.TempPathFactory, seed: int, fuzz: int, context: int, alphabet: int
) -> None:
    """Random text, random edits, a drifted target: what kmend applies, patch(1) applies the same way."""
    rng = random.Random(seed)
    folder = tmp_path_factory.mktemp("p")

    def edited(lines: list[bytes], share: float) -> list[bytes]:
        out: list[bytes] = []
        for line in lines:
            roll = rng.random()
            if roll < share / 3:
                continue
            out.append(line if roll > share * 2 / 3 else b"%d edited\n" % rng.randrange(9))
            if roll > 1 - share / 3:
                out.append(b"%d added\n" % rng.randrange(9))
        return out

    old = [b"%d\n" % rng.randrange(alphabet) for _ in range(rng.randrange(1, 60))]
    new = edited(old, 0.15)
    there = edited(old, rng.choice((0.0, 0.05, 0.2)))
    if fuzz == 0 and rng.random() < 0.2 and new:  # with fuzz, patch(1) puts a file's last line in the middle
        new[-1] = new[-1].rstrip(b"\n")
    patch = diff(b"".join(old), b"".join(new), folder, f"-U{context}")
    if not patch or not new or not there:
        return
    target = b"".join(there)
    expected = by_patch(folder, target, patch, fuzz)
    patches = parse([("p", patch)], strip=1)
    # with as much fuzz as context, patch(1) puts a bare insertion wherever it expects it
    blind = any(
        all(row.side is not Side.REMOVED for row in hunk.lines) and fuzz >= max(hunk.leading, hunk.trailing)
        for hunk in patches.files[0].hunks
    )
    try:
        applied = apply(patches, tree({"fs/x.c": target}), fuzz=fuzz)
    except Refused as refused:
        if expected is not None and not blind:  # patch(1) took the nearest of several places
            assert {row.rule for row in refused.reasons} & {"ambiguous-hunk", "already-applied"}
        return
    result = applied.contents.get("fs/x.c", target)
    assert expected is not None
    assert result == expected


def test_the_real_ext4_fix() -> None:
    """The example against the lines that it is about, taken from the patch itself."""
    patches = parse([("ext4", (EXAMPLES / "ext4-null-folio.patch").read_bytes())])
    (file,) = patches.files
    assert patches.sources[0].title.startswith("ext4:")
    assert "6.1.192-2" in patches.sources[0].origin
    lines: list[bytes] = [b"\n"] * 2000
    for hunk in file.hunks:
        lines[hunk.old_start - 1 : hunk.old_start - 1 + hunk.old_count] = hunk.old
    before = b"".join(lines)
    applied = apply(patches, tree({"fs/ext4/mballoc.c": before}))
    after = only(applied)
    assert after is not None
    assert after.count(b"IS_ERR(folio)") == 0
    assert after.count(b"if (!folio)") == 4
    assert [row.offset for row in applied.files[0].hunks] == [0] * 7
    with pytest.raises(Refused) as caught:
        apply(patches, tree({"fs/ext4/mballoc.c": after}))
    assert [row.rule for row in caught.value.reasons] == ["already-applied"]
