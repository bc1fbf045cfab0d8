"""Reading unified diffs: git's, ``diff -u``'s, a quilt series', with or without mail text in front.

Written by hand, on bytes, because a patch that is silently cut short is a wrong live
patch: a hunk with more lines than its header counts is an error here (docs/decisions/0001).
"""

from __future__ import annotations

import base64
import binascii
import quopri
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from kmend.core.errors import Refusal, Refused, UsageError
from kmend.patch.model import FilePatch, Form, Hunk, HunkLine, PatchSet, PatchSource, Side

#: At most nine digits: no file has more lines, and Python refuses to make a number of thousands of them.
HUNK = re.compile(rb"@@ -(\d{1,9})(?:,(\d{1,9}))? \+(\d{1,9})(?:,(\d{1,9}))? @@(.*)")
GIT_HEADER = re.compile(rb"diff --git (\S.*)")
#: git's extended header lines (git-diff(1), "generating patch text with -p").
GIT_EXTENDED = re.compile(
    rb"(old mode|new mode|deleted file mode|new file mode|copy from|copy to|rename from|rename to"
    rb"|similarity index|dissimilarity index|index|GIT binary patch|Binary files) ?(.*)"
)
BINARY = re.compile(rb"(?:Binary files .* differ|GIT binary patch)\s*$")
#: The date behind a name: after a tab (GNU diff), or after blanks (old diffs). Looked for at the first blank
#: of a row alone, so that a line of nothing but blanks takes no time.
DATE = re.compile(
    rb"(?:\t.*|(?<![ ])[ ]+(?:\d{4}-\d\d-\d\d|(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) [A-Z][a-z][a-z] ).*)$"
)
#: GNU diff -N gives a file that is not there the epoch as its date, in local time.
EPOCH = re.compile(rb"(?:1969-12-31|1970-01-01) \d\d:\d\d:\d\d")
COMMIT = re.compile(rb"(?:From|commit) ([0-9a-f]{40})\b")
UPSTREAM = re.compile(
    rb"\[ Upstream commit ([0-9a-f]{12,40}) \]|commit ([0-9a-f]{12,40}) upstream\.?"
    rb"|\(cherry picked from commit ([0-9a-f]{12,40})\)"
)
SUBJECT_TAGS = re.compile(r"^(?:Re:\s*)?(?:\[[^\]]*\]\s*)+")
SYMLINK, SUBMODULE = "120000", "160000"
#: Bytes of the longest git header whose names are told apart: twice PATH_MAX (include/uapi/linux/limits.h).
LONGEST = 2 * 4096


def parse(texts: Sequence[tuple[str, bytes]], *, strip: int | Mapping[str, int] | None = None) -> PatchSet:
    """Read patches, given as (name, content), in the order in which they apply.

    ``strip`` is how many leading components to take off the names (``-p``), for all or
    per patch name; without it git's form decides, else :func:`kmend.patch.apply.apply` finds out.

    Raises:
        UsageError: ``not-a-patch`` (no unified diff in it), ``malformed-patch`` (says the line).
        Refused: ``binary-patch``, ``file-mode`` (symbolic links, submodules).
    """
    files: list[FilePatch] = []
    sources: list[PatchSource] = []
    refusals: list[Refusal] = []
    for name, content in texts:
        level = strip.get(name) if isinstance(strip, Mapping) else strip
        reader = _Reader(name, mail_body(content), level)
        reader.read()
        if not reader.files and not reader.refusals:
            raise _not_a_patch(name, content)
        files.extend(reader.files)
        refusals.extend(reader.refusals)
        sources.append(describe(name, reader.preamble))
    if refusals:
        raise Refused(refusals)
    if not files:
        raise UsageError(
            "no patch was given", next_step="name at least one patch file", rule="not-a-patch", why=""
        )
    return PatchSet(tuple(files), tuple(sources))


@dataclass(frozen=True, slots=True)
class SeriesEntry:
    """A line of a quilt series: the patch's file name and its ``-pN`` (None: not said)."""

    name: str
    strip: int | None = None


def read_series(text: str) -> tuple[SeriesEntry, ...]:
    """The patches of a quilt ``series`` file, in order (quilt(1): ``name [-pN|-R] [# comment]``).

    Raises:
        UsageError: ``series``: an option that is not understood, or a reversed patch (``-R``).
    """
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        words = re.sub(r"(^|\s)#.*", "", line).split()
        if not words:
            continue
        strip = None
        for option in words[1:]:
            if option == "-pab":
                strip = 1
            elif re.fullmatch(r"-p[0-9]{1,3}", option):
                strip = int(option[2:])
            else:
                raise UsageError(
                    f"series, line {number}: {option} is not understood",
                    why="a series line is a patch name with at most -pN behind it"
                    + ("; reversed patches are not taken" if option == "-R" else ""),
                    next_step="write the patch the right way round and drop the option",
                    rule="series",
                )
        entries.append(SeriesEntry(words[0], strip))
    return tuple(entries)


class _Reader:
    """One pass over one patch. Holds a cursor; every method consumes lines."""

    def __init__(self, name: str, content: bytes, strip: int | None) -> None:
        self.name = name
        self.lines = re.findall(rb"[^\n]*\n|[^\n]+", content)
        self.at = 0
        self.strip = strip
        self.files: list[FilePatch] = []
        self.refusals: list[Refusal] = []
        self.preamble: list[bytes] = []
        #: Right behind a hunk a line of diff is one that the hunk's header did not count.
        self.behind_hunk = False

    def read(self) -> None:
        while self.at < len(self.lines):
            line = self.bare()
            if GIT_HEADER.match(line):
                self.git_file()
            elif self.is_plain_header():
                self.plain_file()
            elif line.startswith((b"diff --cc ", b"diff --combined ")):
                self.malformed("a combined diff of a merge", "make a diff against one parent: git diff A B")
            elif line.startswith(b"***************"):
                self.malformed("a context diff", "make a unified one: diff -u")
            elif BINARY.match(line):
                self.binary(line)
                self.at += 1
            else:
                self.prose(line)

    def bare(self, ahead: int = 0) -> bytes:
        """The line without its ending (CR LF too: mail programs add it); empty behind the last one."""
        at = self.at + ahead
        return self.lines[at].rstrip(b"\r\n") if at < len(self.lines) else b""

    def malformed(self, why: str, next_step: str = "") -> NoReturn:
        raise UsageError(
            f"{self.name}, line {self.at + 1}: malformed patch",
            why=why,
            next_step=next_step or "make the patch again with git diff or diff -u",
            rule="malformed-patch",
        )

    def prose(self, line: bytes) -> None:
        """A line of text around the diffs."""
        if HUNK.match(line):
            self.malformed("a hunk without a file header (---, +++) in front of it")
        if self.behind_hunk and line.strip():
            signature = line in (b"-- ", b"--")  # git format-patch and mail programs end with it
            if not signature and line[:1] in (b"+", b"-", b" ", b"\t"):
                self.malformed(
                    f"the hunk before it has more lines than its header counts: {_shown(line)}",
                    "mend the counts (rediff, recountdiff) or make the patch again",
                )
            self.behind_hunk = False
        if not self.files:
            self.preamble.append(line)
        self.at += 1

    def is_plain_header(self) -> bool:
        """``---``, ``+++`` and a hunk; text may hold any one of them, a patch cut short the first two."""
        if not (self.bare().startswith(b"--- ") and self.bare(1).startswith(b"+++ ")):
            return False
        return self.bare(2).startswith(b"@@ ") or self.at + 2 >= len(self.lines)

    def plain_file(self, git: dict[str, str] | None = None, start: int | None = None) -> None:
        """``---``, ``+++`` and hunks, alone or as the end of a git header."""
        start = self.at if start is None else start
        old_line, new_line = self.bare()[4:], self.bare(1)[4:]
        old_name, new_name = file_name(old_line), file_name(new_line)
        self.at += 2
        hunks = self.hunks()
        if not hunks:
            self.malformed("no hunk behind the file header: the patch is cut short")
        form = Form.MODIFIED
        if old_name is None and new_name is None:
            self.malformed("both names are /dev/null")
        whole = len(hunks) == 1 and hunks[0].old_count == 0
        if old_name is None and not whole:
            self.malformed("the file is new, but its hunks have lines or places of an old one")
        if old_name is None or (EPOCH.search(old_line) and whole):
            form, old_name = Form.CREATED, None
        elif new_name is None or (EPOCH.search(new_line) and hunks[-1].new_count == 0):
            form, new_name = Form.DELETED, None
        self.add(old_name, new_name, form, hunks, start, git or {})

    def git_file(self) -> None:
        """A ``diff --git`` header, its extended lines, and the hunks if any follow."""
        start = self.at
        header = GIT_HEADER.match(self.bare())
        assert header is not None
        extended: dict[str, str] = {}
        self.at += 1
        self.behind_hunk = False
        while match := GIT_EXTENDED.match(self.bare()):
            if BINARY.match(self.bare()):
                self.binary(header[1])
                self.at += 1
                return
            key = match[1].decode()
            extended[key] = (
                unquote(match[2]) if key.endswith((" from", " to")) else match[2].decode(errors="replace")
            )
            self.at += 1
        for word in ("rename", "copy"):
            if (f"{word} from" in extended) != (f"{word} to" in extended):
                self.malformed(f"a {word} that names one file alone")
        if self.bare().startswith(b"--- ") and self.bare(1).startswith(b"+++ "):
            self.plain_file(extended, start)
            return
        old_name, new_name = git_names(header[1])
        if "rename from" in extended:
            self.add(old_name, new_name, Form.RENAMED, (), start, extended)
        elif "copy from" in extended:
            self.add(old_name, new_name, Form.COPIED, (), start, extended)
        elif old_name is None or new_name is None:
            self.malformed("the two names of the git header cannot be told apart")
        elif "new file mode" in extended:
            self.add(None, new_name, Form.CREATED, (), start, extended)
        elif "deleted file mode" in extended:
            self.add(old_name, None, Form.DELETED, (), start, extended)
        elif "new mode" in extended:
            self.add(old_name, new_name, Form.MODIFIED, (), start, extended)
        elif HUNK.match(self.bare()):
            self.malformed("a hunk without the lines --- and +++ in front of it")
        elif "index" in extended:
            self.malformed("a git header without a change: the patch is cut short")

    def add(
        self,
        old_name: str | None,
        new_name: str | None,
        form: Form,
        hunks: tuple[Hunk, ...],
        start: int,
        git: dict[str, str],
    ) -> None:
        """Note one file's patch; ``git`` are its extended header lines."""
        index_mode = git.get("index", "").partition(" ")[2] or None
        old_mode = git.get("old mode") or git.get("deleted file mode") or index_mode
        new_mode = git.get("new mode") or git.get("new file mode") or index_mode
        name = new_name or old_name or ""
        for mode in (old_mode, new_mode):
            if mode in (SYMLINK, SUBMODULE):
                self.refusals.append(
                    Refusal(
                        "file-mode",
                        f"{self.name}: {name} is a {'symbolic link' if mode == SYMLINK else 'submodule'}",
                        f"its git mode is {mode}; only regular files reach a compiler",
                        "take this file out of the patch",
                    )
                )
                return
        if form is Form.MODIFIED and "rename from" in git:
            form = Form.RENAMED
        elif form is Form.MODIFIED and "copy from" in git:
            form = Form.COPIED
        strip = self.strip
        if form in (Form.RENAMED, Form.COPIED):
            # these two lines are the only names without prefixes, and the only ones that blanks cannot blur
            word = "rename" if form is Form.RENAMED else "copy"
            old_name, new_name = git[f"{word} from"], git[f"{word} to"]
            strip = max(0, (strip or 1) - 1)
        elif strip is None and self.lines[start].startswith(b"diff --git "):
            strip = git_strip(old_name, new_name)
        self.files.append(
            FilePatch(old_name, new_name, form, hunks, self.name, start + 1, strip, old_mode, new_mode)
        )

    def binary(self, what: bytes) -> None:
        """A change that holds no text."""
        shown = what.decode(errors="replace").strip()
        self.refusals.append(
            Refusal(
                "binary-patch",
                f"{self.name}, line {self.at + 1}: a binary change ({shown})",
                "a binary file never reaches the compiler as source",
                "take this file out of the patch",
            )
        )

    def hunks(self) -> tuple[Hunk, ...]:
        """All hunks at the cursor, in ascending order.

        Raises:
            UsageError: ``malformed-patch``.
        """
        hunks: list[Hunk] = []
        while match := HUNK.match(self.bare()):
            hunk = self.hunk(match)
            if hunks and hunk.old_start < hunks[-1].old_start + hunks[-1].old_count:
                self.at = hunk.line - 1
                self.malformed("the hunk overlaps the one before it, or they are out of order")
            hunks.append(hunk)
        if self.bare().startswith(b"@@ "):
            self.malformed(f"a damaged hunk header: {_shown(self.bare())}")
        self.behind_hunk = bool(hunks)
        return tuple(hunks)

    def hunk(self, header: re.Match[bytes]) -> Hunk:
        """One hunk; exactly as many lines as its header counts."""
        line = self.at + 1
        old_start, new_start = int(header[1]), int(header[3])
        old_count = int(header[2]) if header[2] is not None else 1
        new_count = int(header[4]) if header[4] is not None else 1
        if (old_start == 0 and old_count) or (new_start == 0 and new_count):
            self.malformed("line numbers count from 1")
        self.at += 1
        rows: list[HunkLine] = []
        old_left, new_left = old_count, new_count
        while old_left > 0 or new_left > 0:
            if self.at >= len(self.lines):
                self.malformed(f"the patch ends inside the hunk of line {line}")
            text = self.lines[self.at]
            if not text.endswith(b"\n"):
                text += (
                    b"\n"  # the patch file's own last newline is lost; the marker below speaks for the source
                )
            mark = text[:1]
            if mark == b"\\":
                self.no_newline(rows)
                continue
            if mark in (b"\n", b"\r"):  # a mail program cut the blank off an empty context line
                side, body = Side.CONTEXT, text
            elif mark in (b" ", b"+", b"-"):
                side, body = Side(mark.decode()), text[1:]
            else:
                self.malformed(f"not a line of a hunk: {_shown(text)}")
            old_left -= side is not Side.ADDED
            new_left -= side is not Side.REMOVED
            if old_left < 0 or new_left < 0:
                self.malformed(f"the hunk of line {line} has more lines than its header counts")
            rows.append(HunkLine(side, body))
            self.at += 1
        if self.at < len(self.lines) and self.lines[self.at].startswith(b"\\"):
            self.no_newline(rows)
        if not rows:
            self.malformed("an empty hunk")
        _check_ends(rows, self.malformed)
        section = header[5].decode(errors="replace").strip()
        return Hunk(old_start, old_count, new_start, new_count, section, tuple(rows), line)

    def no_newline(self, rows: list[HunkLine]) -> None:
        """``\\ No newline at end of file``: speaks of the line in front of it."""
        if not rows:
            self.malformed("the mark of a missing newline without a line in front of it")
        last = rows[-1]
        if last.text in (b"\n", b""):
            self.malformed("an empty line without a newline: no file has such a line")
        # `\r` stays: it belongs to the line, only the newline is missing
        rows[-1] = HunkLine(last.side, last.text.removesuffix(b"\n"))
        self.at += 1


def _check_ends(rows: list[HunkLine], malformed: Callable[[str], NoReturn]) -> None:
    """A line without a newline can only be its side's last one."""
    for sides in ((Side.CONTEXT, Side.REMOVED), (Side.CONTEXT, Side.ADDED)):
        mine = [row for row in rows if row.side in sides]
        if any(not row.text.endswith(b"\n") for row in mine[:-1]):
            malformed("a line without newline in the middle of a file")


def file_name(text: bytes) -> str | None:
    """The name in a ``---`` or ``+++`` line: date taken off, git's quoting undone; None for ``/dev/null``."""
    if not text.startswith(b'"'):
        text = DATE.sub(b"", text)
    name = unquote(text.strip())
    return None if name == "/dev/null" else name


def unquote(text: bytes) -> str:
    """Undo git's C-style quoting (git-config(1), ``core.quotePath``); bytes that are no UTF-8 survive."""
    if len(text) >= 2 and text.startswith(b'"') and text.rstrip().endswith(b'"'):
        simple = {b"a": 7, b"b": 8, b"t": 9, b"n": 10, b"v": 11, b"f": 12, b"r": 13, b'"': 34, b"\\": 92}
        text = re.sub(
            rb'\\([0-7]{3}|[abtnvfr"\\])',
            lambda m: bytes((simple[m[1]] if m[1] in simple else int(m[1], 8) & 0xFF,)),
            text.rstrip()[1:-1],
        )
    return text.decode("utf-8", "surrogateescape")


def git_names(text: bytes) -> tuple[str | None, str | None]:
    """The two names of a ``diff --git`` line, for parts without a ``---`` line (modes, empty files)."""
    quoted = re.fullmatch(rb'("(?:\\.|[^"\\])*"|\S+) ("(?:\\.|[^"\\])*"|\S+)', text)
    if quoted:
        return unquote(quoted[1]), unquote(quoted[2])
    if len(text) > LONGEST:
        return None, None
    # names with blanks are not quoted: they are told apart only where both are the same behind their prefixes
    for at in (i for i, char in enumerate(text) if char == 0x20):
        old, new = text[:at], text[at + 1 :]
        if old.partition(b"/")[2] == new.partition(b"/")[2]:
            return unquote(old), unquote(new)
    return None, None


def git_strip(old_name: str | None, new_name: str | None) -> int | None:
    """How many components git put in front: 1 for ``a/ b/`` (and ``diff.mnemonicPrefix``), 0 for none.

    None when one side is absent and the other shows no known prefix: then the tree decides.
    """
    prefixes = {name.partition("/")[0] for name in (old_name, new_name) if name is not None}
    if prefixes <= {"a", "b", "c", "i", "o", "w"}:
        return 1
    if old_name is not None and old_name == new_name:
        return 0
    return None


def mail_body(content: bytes) -> bytes:
    """Undo a mail's transfer encoding (quoted-printable, base64); other content as it is."""
    head, blank, body = content.replace(b"\r\n", b"\n").partition(b"\n\n")
    found = re.search(rb"^Content-Transfer-Encoding:\s*(\S+)\s*$", head, re.IGNORECASE | re.MULTILINE)
    if not found or not blank or not re.match(rb"(?:From |[A-Za-z-]+:)", head):
        return content
    match found[1].lower():
        case b"quoted-printable":
            return head + b"\n\n" + quopri.decodestring(body)
        case b"base64":
            try:
                return head + b"\n\n" + base64.b64decode(body, validate=False)
            except binascii.Error:
                return content
        case _:
            return content


def describe(name: str, preamble: Sequence[bytes]) -> PatchSource:
    """Find subject, origin and author in the text in front of the first diff."""
    text = [line.decode(errors="replace") for line in preamble]
    fields: dict[str, str] = {}
    last = ""
    for line in text:
        match = re.match(r"(Subject|Description|From|Author|Origin|Date):\s*(.*)", line)
        if match and match[1] not in fields:
            last = match[1]
            fields[last] = match[2]
        elif last == "Subject" and line[:1] in (" ", "\t") and line.strip():  # a folded mail header
            fields[last] += " " + line.strip()
        else:
            last = ""
    title = SUBJECT_TAGS.sub("", _decoded(fields.get("Subject", fields.get("Description", "")))).strip()
    if not title:  # git show and git log indent the message by four blanks
        title = next((line.strip() for line in text if line.startswith("    ") and line.strip()), "")
    whole = b"\n".join(preamble)
    origin = fields.get("Origin", "").strip()
    if not origin:
        upstream = UPSTREAM.search(whole)
        commit = COMMIT.search(whole)
        if upstream:
            origin = "upstream commit " + next(group for group in upstream.groups() if group).decode()
        elif commit and commit[1].strip(b"0"):
            origin = "commit " + commit[1].decode()
    author = _decoded(fields.get("From", fields.get("Author", ""))).strip()
    return PatchSource(name, title, origin, author)


def _decoded(text: str) -> str:
    """Undo RFC 2047 encoding of a mail header; one that is damaged stays as it is."""
    if "=?" not in text:
        return text
    from email.errors import HeaderParseError  # noqa: PLC0415 - the mail library is not small, and few need it
    from email.header import decode_header  # noqa: PLC0415 - as above

    try:
        encoded = decode_header(text)
    except HeaderParseError:
        return text
    parts = []
    for part, charset in encoded:
        if isinstance(part, str):
            parts.append(part)
            continue
        try:
            parts.append(part.decode(charset or "utf-8", "replace"))
        except (LookupError, ValueError):  # no such code; a code that cannot replace what it does not know
            parts.append(part.decode("utf-8", "replace"))
    return "".join(parts)


def _not_a_patch(name: str, content: bytes) -> UsageError:
    """The error for a text without any diff; says what it looks like instead."""
    kinds = (
        (b"\x7fELF", "it is an ELF file"),
        (b"\x1f\x8b", "it is compressed with gzip; unpack it first"),
        (b"\xfd7zXZ", "it is compressed with xz; unpack it first"),
        (b"\x28\xb5\x2f\xfd", "it is compressed with zstd; unpack it first"),
        (b"BZh", "it is compressed with bzip2; unpack it first"),
    )
    why = "no unified diff was found in it"
    if not content.strip():
        why = "it is empty"
    for magic, text in kinds:
        if content.startswith(magic):
            why = text
    return UsageError(
        f"{name} is not a patch",
        why=why,
        next_step="give a unified diff: git diff, git format-patch or diff -u",
        rule="not-a-patch",
    )


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace").rstrip()
    return repr(text if len(text) <= 80 else text[:77] + "…")
