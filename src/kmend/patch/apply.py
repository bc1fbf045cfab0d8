"""Applying a patch set to a tree, without touching the tree: contents in, contents out.

Placement follows patch(1) (``locate_hunk`` in its patch.c: expected line first, hunks at
the file's start or end anchored there) with one difference: where patch(1) takes the
nearest of several places, this refuses. A hunk in the wrong function is a wrong live patch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from kmend.core.errors import Refusal, Refused
from kmend.patch.model import FilePatch, Form, Hunk, PatchSet

#: Gives a file's content by its path in the tree, None when there is no such file.
Read = Callable[[str], bytes | None]

#: How many leading components are tried when neither ``-p`` nor git's form says.
DEEPEST_STRIP = 8
#: The kernel tree's top level: decides the names of patches that only create files.
TOP_LEVEL = frozenset(
    (
        "Documentation",
        "LICENSES",
        "arch",
        "block",
        "certs",
        "crypto",
        "drivers",
        "fs",
        "include",
        "init",
        "io_uring",
        "ipc",
        "kernel",
        "lib",
        "mm",
        "net",
        "rust",
        "samples",
        "scripts",
        "security",
        "sound",
        "tools",
        "usr",
        "virt",
    )
)
#: How many differing lines of a failed hunk are shown.
SHOWN = 3


@dataclass(frozen=True, slots=True)
class AppliedHunk:
    """Where a hunk went: ``line`` (from 1) in the file as it was then, ``offset`` in lines from
    where the patch said, ``fuzz`` context lines ignored at each end."""

    source: str
    hunk: Hunk
    line: int
    offset: int
    fuzz: int


@dataclass(frozen=True, slots=True)
class AppliedFile:
    """A file before and after all patches; None: absent.

    ``origins`` has one entry per line of ``new``: the number (from 0) of the line in
    ``old`` that it is, None for a line that the patches brought.
    """

    path: str
    old: bytes | None
    new: bytes | None
    origins: tuple[int | None, ...]
    hunks: tuple[AppliedHunk, ...]
    mode_change: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Applied:
    """The tree's difference: files whose content or mode differs, by path; notes about offsets and fuzz."""

    files: tuple[AppliedFile, ...]
    warnings: tuple[Refusal, ...] = ()

    @property
    def contents(self) -> dict[str, bytes | None]:
        """New content per path, as an overlay wants it."""
        return {file.path: file.new for file in self.files if file.new != file.old}


def apply(patchset: PatchSet, read: Read, *, fuzz: int = 0) -> Applied:
    """Apply every patch in order.

    ``fuzz`` is how many context lines at each end of a hunk may be ignored, at most.

    Raises:
        Refused: ``does-not-apply`` (every hunk that fails, with the lines expected and found),
            ``ambiguous-hunk``, ``no-context``, ``already-applied``, ``unsafe-path``.
    """
    paths = resolve(patchset.files, read)
    state, refusals = _run(patchset.files, paths, read, fuzz)
    if refusals:
        raise _explained(patchset, read, refusals)
    files, warnings = [], []
    for path, content in sorted(state.items()):
        old = read(path)
        file = AppliedFile(
            path, old, content.text(), tuple(content.origins), tuple(content.hunks), content.mode_change
        )
        if file.old == file.new and file.mode_change is None:
            continue
        files.append(file)
        for row in file.hunks:
            if row.offset or row.fuzz:
                how = f"{row.offset:+d} lines from where the patch says" if row.offset else "at its line"
                ignored = f", ignoring {row.fuzz} context lines at each end" if row.fuzz else ""
                warnings.append(
                    Refusal(
                        "hunk-moved",
                        f"{path}: the hunk of {row.source}:{row.hunk.line} went to line {row.line}",
                        how + ignored,
                        "check that this is the place that was meant",
                    )
                )
    return Applied(tuple(files), tuple(warnings))


# --- names -------------------------------------------------------------------------------------------


Paths = dict[int, tuple[str | None, str | None]]


def resolve(files: Sequence[FilePatch], read: Read) -> Paths:
    """The paths in the tree that each file's patch means: index → (old, new), None for absent.

    Where the strip level is not known it is found per patch: the one that keeps most of
    the name among those under which every file of that patch exists.

    Raises:
        Refused: ``unsafe-path``; ``does-not-apply`` when a file cannot be found.
    """
    levels: dict[str, int | None] = {}
    for source in dict.fromkeys(file.source for file in files):
        mine = [file for file in files if file.source == source and file.strip is None]
        levels[source] = find_level(mine, created_by(files), read) if mine else None
    paths: Paths = {}
    refusals: list[Refusal] = []
    for index, file in enumerate(files):
        level = levels[file.source] if file.strip is None else file.strip
        old, new = (
            stripped(name, level) if name is not None and level is not None else None
            for name in (file.old_name, file.new_name)
        )
        if (old is None and file.old_name is not None) or (new is None and file.new_name is not None):
            refusals.append(_no_name(file, level))
            continue
        for path in (old, new):
            if path is not None and (why := unsafe(path)):
                refusals.append(
                    Refusal(
                        "unsafe-path",
                        f"{file.source}, line {file.line}: {path}",
                        why,
                        "a patch may only name files inside the source tree; make it there",
                    )
                )
                break
        else:
            paths[index] = _one_name(file, old, new, read)
    if refusals:
        raise Refused(refusals)
    return paths


def _one_name(file: FilePatch, old: str | None, new: str | None, read: Read) -> tuple[str | None, str | None]:
    """``diff -u x.c.orig x.c`` names two files but changes one: take the one that the tree has."""
    if file.form is not Form.MODIFIED or old is None or new is None or old == new:
        return old, new
    if read(new) is not None or read(old) is None:
        return new, new
    return old, old


def created_by(files: Iterable[FilePatch]) -> frozenset[str]:
    """Raw names that an earlier patch of the set may have made, so that they need not exist in the tree."""
    made: set[str] = set()
    for file in files:
        if file.new_name is not None and file.form is not Form.MODIFIED:
            made.update(tail for level in range(DEEPEST_STRIP) if (tail := stripped(file.new_name, level)))
    return frozenset(made)


def find_level(files: Sequence[FilePatch], made: frozenset[str], read: Read) -> int | None:
    """The strip level of one patch, None when no level fits."""

    def fits(file: FilePatch, level: int) -> bool:
        names = [file.old_name, file.new_name]
        if file.form is Form.CREATED:
            tail = stripped(file.new_name or "", level)
            return tail is not None and tail.partition("/")[0] in TOP_LEVEL
        tails = [tail for name in names if name is not None and (tail := stripped(name, level)) is not None]
        return any(tail in made or (not unsafe(tail) and read(tail) is not None) for tail in tails)

    lowest = 0
    for file in files:
        heads = {name.partition("/")[0] for name in (file.old_name, file.new_name) if name is not None}
        if len(heads) == 2 and all(
            "/" in name for name in (file.old_name, file.new_name) if name is not None
        ):
            lowest = 1  # a/fs/x.c and b/fs/x.c, or linux.orig/ and linux/: the first component is a prefix
    for level in range(lowest, DEEPEST_STRIP + 1):
        if all(fits(file, level) for file in files):
            return level
    # a file that the tree lacks must not hide the level that all others share
    for level in range(lowest, DEEPEST_STRIP + 1):
        if any(fits(file, level) for file in files):
            return level
    return None


def stripped(name: str, level: int) -> str | None:
    """``name`` without its first ``level`` components (as ``patch -pN``: runs of slashes count once)."""
    rest = re.sub("/+", "/", name)
    for _ in range(level):
        _, slash, rest = rest.partition("/")
        if not slash:
            return None
    return rest or None


def unsafe(path: str) -> str:
    """Why a path may not be used, '' when it may."""
    if path.startswith("/"):
        return "the path is absolute"
    parts = path.split("/")
    if ".." in parts:
        return "the path leaves the source tree (..)"
    if "." in parts or "" in parts or "\0" in path or "\n" in path:
        return "the path is not in its plain form"
    if parts[0] == ".git":
        return "the path lies inside the repository's own folder"
    return ""


def _no_name(file: FilePatch, level: int | None) -> Refusal:
    if level is None:
        return Refusal(
            "does-not-apply",
            f"{file.source}, line {file.line}: {file.name} is not in the source tree",
            f"with none of its first {DEEPEST_STRIP} components taken off does the name fit a file",
            "check that the patch is for this kernel; -pN says how many components to take off",
        )
    return Refusal(
        "does-not-apply",
        f"{file.source}, line {file.line}: {file.name} has fewer than {level + 1} components",
        f"{level} leading components are to be taken off",
        "name another number with -pN",
    )


# --- contents ----------------------------------------------------------------------------------------


class _Content:
    """A file while patches are applied to it."""

    __slots__ = ("hunks", "lines", "mode_change", "origins")

    def __init__(self, text: bytes | None) -> None:
        self.lines: list[bytes] | None = None if text is None else split_lines(text)
        self.origins: list[int | None] = list(range(len(self.lines or ())))
        self.hunks: list[AppliedHunk] = []
        self.mode_change: tuple[str, str] | None = None

    def text(self) -> bytes | None:
        return None if self.lines is None else b"".join(self.lines)

    def vanish(self) -> None:
        self.lines, self.origins = None, []


def split_lines(text: bytes) -> list[bytes]:
    """Lines with their ``\\n``; only ``\\n`` ends one (bytes.splitlines would also cut at a lone ``\\r``)."""
    return re.findall(rb"[^\n]*\n|[^\n]+", text)


def _run(
    files: Sequence[FilePatch], paths: Paths, read: Read, fuzz: int
) -> tuple[dict[str, _Content], list[Refusal]]:
    """Apply in order on contents held in memory; goes on after a failure, so that all are told at once."""
    state: dict[str, _Content] = {}
    refusals: list[Refusal] = []

    def content(path: str) -> _Content:
        if path not in state:
            state[path] = _Content(read(path))
        return state[path]

    for index, file in enumerate(files):
        old, new = paths[index]
        if old is None:
            assert new is not None
            _create(file, new, content(new), refusals)
            continue
        before = content(old)
        if before.lines is None:
            if file.form is Form.MODIFIED and len(file.hunks) == 1 and file.hunks[0].old_count == 0:
                _create(file, old, before, refusals)  # diff -N without a date: an absent file looks empty
            else:
                refusals.append(_missing(file, old))
            continue
        if file.form is Form.COPIED and new is not None:
            # git takes the copy's source as it was before the patch
            target, original = content(new), _Content(read(old))
            if target.lines is not None:
                refusals.append(_exists(file, new))
                continue
            target.lines = original.lines
            target.origins = [None] * len(original.lines or ())
            _patch(file, new, target, fuzz, refusals)
            continue
        _patch(file, old, before, fuzz, refusals)
        if file.old_mode and file.new_mode and file.old_mode != file.new_mode:
            before.mode_change = (file.old_mode, file.new_mode)
        if new is None:
            if before.lines:
                refusals.append(
                    Refusal(
                        "does-not-apply",
                        f"{old}: the patch deletes it, but {len(before.lines)} lines would remain",
                        "the file differs from the one that the patch was made against",
                        "make the patch against this kernel's source",
                    )
                )
            before.vanish()
        elif new != old:
            target = content(new)
            if target.lines is not None:
                refusals.append(_exists(file, new))
                continue
            target.lines, target.origins = before.lines, [None] * len(before.lines or ())
            target.hunks = before.hunks
            before.vanish()
    return state, refusals


def _create(file: FilePatch, path: str, content: _Content, refusals: list[Refusal]) -> None:
    if content.lines is not None:
        refusals.append(_exists(file, path))
        return
    content.lines = [line for hunk in file.hunks for line in hunk.new]
    content.origins = [None] * len(content.lines)
    content.hunks.extend(AppliedHunk(file.source, hunk, 1, 0, 0) for hunk in file.hunks)


def _patch(file: FilePatch, path: str, content: _Content, fuzz: int, refusals: list[Refusal]) -> None:
    """Apply one file's hunks in place; each works on the file as it was before this patch."""
    before = content.lines or []
    at, shift, offset = 0, 0, 0
    lines, origins = list(before), list(content.origins)
    for number, hunk in enumerate(file.hunks, 1):
        found = locate(hunk, before, at, offset, fuzz)
        if isinstance(found, Misplaced):
            refusals.append(_failed(file, path, number, hunk, before, found, offset))
            continue
        spot, used = found.at, found.fuzz
        old, new = hunk.old, hunk.new
        head, tail = found.dropped
        start, stop = spot, spot + len(old) - head - tail
        fresh = list(new[head : len(new) - tail])
        kept = _kept(hunk, head, tail)
        marks = [None if k is None else origins[start + shift + k] for k in kept]
        # context comes from the file, so that ignored differences (fuzz) never rewrite it
        for position, k in enumerate(kept):
            if k is not None:
                fresh[position] = before[start + k]
        lines[start + shift : stop + shift] = fresh
        origins[start + shift : stop + shift] = marks
        expected = expected_at(hunk) + head
        content.hunks.append(AppliedHunk(file.source, hunk, spot - head + 1, spot - expected, used))
        shift += len(fresh) - (stop - start)
        offset = spot - expected
        # like patch(1), the next hunk's context may overlap this one's, but nothing that this one changed
        at = stop - (hunk.trailing - tail)
    content.lines, content.origins = lines, origins


def _kept(hunk: Hunk, head: int, tail: int) -> list[int | None]:
    """For each line of the hunk's new side (without dropped context): its index on the old side, or None."""
    result: list[int | None] = []
    old = 0
    for row in hunk.lines[head : len(hunk.lines) - tail]:
        match row.side.value:
            case " ":
                result.append(old)
                old += 1
            case "-":
                old += 1
            case _:
                result.append(None)
    return result


# --- placement ---------------------------------------------------------------------------------------


class Why(Enum):
    """Why a hunk has no place."""

    NO_MATCH = "no match"
    AMBIGUOUS = "ambiguous"
    NO_CONTEXT = "no context"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a hunk fits: ``at`` is the index (from 0) of its first compared line, ``dropped`` how many
    context lines at its head and tail were not compared."""

    at: int
    fuzz: int
    dropped: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Misplaced:
    """No place, or several (``at``: indices from 0)."""

    why: Why
    at: tuple[int, ...] = ()


def expected_at(hunk: Hunk) -> int:
    """The index (from 0) at which the header puts the hunk."""
    return hunk.old_start - 1 if hunk.old_count else hunk.old_start


def locate(hunk: Hunk, lines: Sequence[bytes], lowest: int, offset: int, fuzz: int) -> Place | Misplaced:
    """Find the one place of a hunk at or behind index ``lowest``, ignored context included.

    The line that the header names, moved by ``offset`` (the previous hunk's), is taken when
    the hunk matches there; else the only other match. ``fuzz`` counts as in patch(1): with
    fuzz f, context beyond the longer side's length minus f is ignored.
    """
    old = hunk.old
    if not old:
        # nothing proves the place of a bare insertion, except in an empty file
        return Misplaced(Why.NO_CONTEXT) if lines else Place(0, 0, (0, 0))
    context = max(hunk.leading, hunk.trailing)
    # a line without newline is a file's last: put anywhere else it would join the next one
    ends_file = not all(row.text.endswith(b"\n") for row in hunk.lines)
    for level in range(min(fuzz, context) + 1):
        head = level + hunk.leading - context
        tail = level + hunk.trailing - context
        # fewer context lines on one side than on the other: the hunk was cut at that end of the file
        at_start = head < 0 and hunk.old_start <= 1
        at_end = tail < 0
        head, tail = max(head, 0), max(tail, 0)
        wanted = old[head : len(old) - tail]
        if not wanted:
            break
        expected = expected_at(hunk) + offset + head
        found = matches(wanted, lines, lowest + head)
        if at_start:
            found = [at for at in found if at == 0]
        if at_end or ends_file:
            found = [at for at in found if at + len(wanted) == len(lines)]
        if expected in found:
            return Place(expected, level, (head, tail))
        if len(found) == 1:
            return Place(found[0], level, (head, tail))
        if found:
            return Misplaced(Why.AMBIGUOUS, tuple(found))
    return Misplaced(Why.NO_MATCH)


def matches(wanted: Sequence[bytes], lines: Sequence[bytes], lowest: int) -> list[int]:
    """Every index at or behind ``lowest`` where ``wanted`` stands."""
    size = len(wanted)
    wanted = list(wanted)
    # the rarest-looking (longest) line is looked for first; list.index runs at C speed
    key = max(range(size), key=lambda i: len(wanted[i]))
    found = []
    at = max(lowest, 0) + key
    last = len(lines) - size + key
    while at <= last:
        try:
            at = lines.index(wanted[key], at, last + 1)
        except ValueError:
            break
        if list(lines[at - key : at - key + size]) == wanted:
            found.append(at - key)
        at += 1
    return found


# --- explanations ------------------------------------------------------------------------------------


def _failed(
    file: FilePatch, path: str, number: int, hunk: Hunk, lines: Sequence[bytes], found: Misplaced, offset: int
) -> Refusal:
    """Name the file, the hunk and the line, and show what was expected and what is there."""
    section = f", in {hunk.section}" if hunk.section else ""
    what = f"{path}: hunk {number} of {len(file.hunks)} ({file.source}, line {hunk.line}{section})"
    match found.why:
        case Why.AMBIGUOUS:
            places = ", ".join(str(at + 1) for at in found.at[:8]) + ("…" if len(found.at) > 8 else "")
            return Refusal(
                "ambiguous-hunk",
                f"{what} fits in {len(found.at)} places",
                f"the header says line {hunk.old_start}, which does not match; lines {places} do",
                "make the patch against this kernel's source, or with more context (git diff -U8)",
            )
        case Why.NO_CONTEXT:
            return Refusal(
                "no-context",
                f"{what} has no line that proves its place",
                "it only adds lines and was made without context (-U0)",
                "make the patch with context (diff -u)",
            )
        case Why.NO_MATCH:
            why = mismatch(hunk.old, lines, expected_at(hunk) + offset)
            return Refusal(
                "does-not-apply",
                f"{what} does not apply",
                why,
                "make the patch against this kernel's source; --fuzz N ignores context lines",
            )


def mismatch(wanted: Sequence[bytes], lines: Sequence[bytes], expected: int) -> str:
    """Expected and found lines at the place where the hunk comes nearest to fitting."""

    def bare(row: bytes) -> bytes:
        return row.rstrip(b"\r\n")

    def squeezed(row: bytes) -> bytes:
        return b" ".join(row.split())

    if places := matches(wanted, lines, 0):
        return (
            f"its lines stand at line {places[0] + 1}, but its place is said to be another: fewer context "
            "lines in front or behind mean the start or the end of the file, and hunks follow each other"
        )
    if matches([bare(row) for row in wanted], [bare(row) for row in lines], 0):
        return "only line endings differ (CR LF on one side, LF on the other)"
    if matches([squeezed(row) for row in wanted], [squeezed(row) for row in lines], 0):
        return "only white space differs: a mail program or an editor may have turned tabs into blanks"
    spot = nearest(wanted, lines, expected)
    shown = []
    for index, row in enumerate(wanted):
        there = lines[spot + index] if spot + index < len(lines) else None
        if there == row:
            continue
        shown.append(f"line {spot + index + 1}: expected {_quoted(row)}")
        shown.append(f"{' ' * len(f'line {spot + index + 1}:')} found    {_quoted(there)}")
        if len(shown) >= 2 * SHOWN:
            break
    return "\n".join(shown)


def nearest(wanted: Sequence[bytes], lines: Sequence[bytes], expected: int) -> int:
    """The index where most of the wanted lines stand; the one closest to ``expected`` among equals."""
    votes: dict[int, int] = {}
    places: dict[bytes, list[int]] = {}
    for at, row in enumerate(lines):
        places.setdefault(row, []).append(at)
    for index, row in enumerate(wanted):
        if row.strip() in (b"", b"{", b"}"):
            continue
        for at in places.get(row, ()):
            votes[at - index] = votes.get(at - index, 0) + 1
    spots = {spot: count for spot, count in votes.items() if spot >= 0}
    if not spots:
        return max(0, min(expected, len(lines)))
    return max(spots, key=lambda spot: (spots[spot], -abs(spot - expected)))


def _quoted(row: bytes | None) -> str:
    if row is None:
        return "the end of the file"
    text = row.decode(errors="replace").rstrip("\n")
    return repr(text if len(text) <= 90 else text[:89] + "…")


def _missing(file: FilePatch, path: str) -> Refusal:
    return Refusal(
        "does-not-apply",
        f"{path} is not in the source tree",
        f"{file.source}, line {file.line}, changes it",
        "check that the patch is for this kernel; -pN says how many components to take off its names",
    )


def _exists(file: FilePatch, path: str) -> Refusal:
    return Refusal(
        "does-not-apply",
        f"{path} exists already",
        f"{file.source}, line {file.line}, creates it",
        "check that the patch is for this kernel",
    )


def _explained(patchset: PatchSet, read: Read, refusals: list[Refusal]) -> Refused:
    """The failure, or better: that the tree has the change already."""
    if names := _applied_names(patchset.files, read):
        return Refused(
            [
                Refusal(
                    "already-applied",
                    f"already applied: {', '.join(names)}",
                    "the source of this kernel contains the whole change: undoing it applies cleanly",
                    "nothing is to be patched; check which kernel was meant with --kernel",
                )
            ]
        )
    several = len(patchset.sources) > 1
    for source in patchset.sources if several else ():
        mine = [file for file in patchset.files if file.source == source.name]
        if names := _applied_names(mine, read):
            refusals.append(
                Refusal(
                    "already-applied",
                    f"{source.name} is already applied: {', '.join(names)}",
                    "the source of this kernel contains this patch of the set",
                    f"leave {source.name} out",
                )
            )
    return Refused(refusals)


def _applied_names(files: Sequence[FilePatch], read: Read) -> list[str]:
    """The files of a change that the tree already holds whole; empty when it does not."""
    back = [file.reversed() for file in reversed(files)]
    try:
        paths = resolve(back, read)
        state, refusals = _run(back, paths, read, 0)
    except Refused:
        return []
    if refusals or all(content.text() == read(path) for path, content in state.items()):
        return []
    return sorted({path for old, new in paths.values() for path in (old, new) if path is not None})
