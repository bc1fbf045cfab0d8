"""The values of a patch: what the author's unified diffs say, before they meet a source tree."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class Side(Enum):
    """What a hunk's line does, as its first character in the patch."""

    CONTEXT = " "
    REMOVED = "-"
    ADDED = "+"


class Form(Enum):
    """What a patch does to a file as a whole."""

    MODIFIED = "modified"
    CREATED = "created"
    DELETED = "deleted"
    RENAMED = "renamed"
    COPIED = "copied"


@dataclass(frozen=True, slots=True)
class HunkLine:
    """One line. ``text`` holds its line ending; without one it is the file's last line and has none."""

    side: Side
    text: bytes


@dataclass(frozen=True, slots=True)
class Hunk:
    """One block of a file's patch.

    ``old_start`` and ``new_start`` are line numbers counted from 1, as in the header
    ``@@ -old_start,old_count +new_start,new_count @@ section``; with a count of 0 the
    start is the line *before* the block. ``line`` is the header's line in the patch.
    """

    old_start: int
    old_count: int
    new_start: int
    new_count: int
    section: str
    lines: tuple[HunkLine, ...]
    line: int

    @property
    def old(self) -> tuple[bytes, ...]:
        """The lines that must be there before."""
        return tuple(row.text for row in self.lines if row.side is not Side.ADDED)

    @property
    def new(self) -> tuple[bytes, ...]:
        """The lines that are there afterwards."""
        return tuple(row.text for row in self.lines if row.side is not Side.REMOVED)

    @property
    def leading(self) -> int:
        """How many context lines stand in front of the first change."""
        return _context(self.lines)

    @property
    def trailing(self) -> int:
        """How many context lines stand behind the last change."""
        return _context(tuple(reversed(self.lines)))

    def reversed(self) -> Hunk:
        """The hunk that undoes this one."""
        swap = {Side.ADDED: Side.REMOVED, Side.REMOVED: Side.ADDED, Side.CONTEXT: Side.CONTEXT}
        return Hunk(
            self.new_start,
            self.new_count,
            self.old_start,
            self.old_count,
            self.section,
            tuple(HunkLine(swap[row.side], row.text) for row in self.lines),
            self.line,
        )


def _context(lines: tuple[HunkLine, ...]) -> int:
    count = 0
    for row in lines:
        if row.side is not Side.CONTEXT:
            break
        count += 1
    return count


@dataclass(frozen=True, slots=True)
class FilePatch:
    """What one patch says of one file.

    ``old_name`` and ``new_name`` are the names as the patch spells them, prefixes
    included; None stands for ``/dev/null``. ``strip`` is how many leading components
    to take off them (given by ``-p``, or certain from git's form); None: to be found
    out against the tree. ``source`` is the patch's own name, ``line`` where the file's
    part begins in it.
    """

    old_name: str | None
    new_name: str | None
    form: Form
    hunks: tuple[Hunk, ...]
    source: str
    line: int
    strip: int | None = None
    old_mode: str | None = None
    new_mode: str | None = None

    @property
    def name(self) -> str:
        """The name to call it by."""
        return self.new_name or self.old_name or "/dev/null"

    def reversed(self) -> FilePatch:
        """The patch that undoes this one."""
        form = {Form.CREATED: Form.DELETED, Form.DELETED: Form.CREATED, Form.COPIED: Form.DELETED}
        return replace(
            self,
            old_name=self.new_name,
            new_name=None if self.form is Form.COPIED else self.old_name,
            form=form.get(self.form, self.form),
            hunks=tuple(hunk.reversed() for hunk in self.hunks),
            old_mode=self.new_mode,
            new_mode=self.old_mode,
        )


@dataclass(frozen=True, slots=True)
class PatchSource:
    """Where a patch comes from, as far as its text in front of the diff tells.

    ``title`` is its subject, ``origin`` the commit id or the ``Origin:`` of a Debian
    patch header (DEP-3), ``author`` who wrote it; '' when the text does not say.
    """

    name: str
    title: str
    origin: str
    author: str


@dataclass(frozen=True, slots=True)
class PatchSet:
    """Several patches in order, to be applied as one cumulative change."""

    files: tuple[FilePatch, ...]
    sources: tuple[PatchSource, ...]

    @property
    def title(self) -> str:
        """The subjects, joined; the patches' own names where they have no subject."""
        return "; ".join(source.title or source.name for source in self.sources)

    @property
    def origin(self) -> str:
        """The origins that are known, joined."""
        return "; ".join(source.origin for source in self.sources if source.origin)
