"""Line control: ``#line`` directives that give every untouched line its old number back.

``__LINE__`` reaches machine code (``WARN_ON``'s bug table, lockdep keys, printk formats), so
one line added at the top of a file would change every function below it. The directive names
a number only; ``__FILE__`` stays what it is. The kernel's own ``scripts/livepatch/fix-patch-lines``
serves the same end behind each hunk; here the place is chosen by what the preprocessor will see.

Traps that decide where a directive may stand:

- Continued lines (a backslash, then perhaps blanks, then the newline) are one line to the
  preprocessor, in comments, strings and ``//`` comments too. They are joined before anything
  else is looked at, as translation phase 2 does.
- Inside a block comment or a raw string a directive is text.
- Between the parentheses of a macro call a directive is undefined behaviour (C11 6.10.3p11),
  and between a macro's name and its parenthesis GCC then does not expand the macro
  (libcpp/macro.c, ``parsing_args``). So: parenthesis depth 0, and never between a word and a
  ``(`` on a later line.
- In a group that ``#if`` skips a directive does nothing, while the lines of that group still
  count. Which groups are skipped is not known here, so the set of all line offsets that the
  compiler may have is followed through the groups; a directive is due wherever that set is not
  exactly the one wanted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import Enum

from kmend.patch.apply import split_lines

#: GCC joins a line that ends in a backslash and white space as well (with a warning).
CONTINUED = re.compile(rb"\\[ \t\v\f\r]*\n")

#: Everything that changes what a newline means, in the order of precedence of the lexer;
#: ``plain`` runs over all that does not, so that a big file takes few steps.
TOKEN = re.compile(
    rb"""
      (?P<newline>\n)
    | (?P<plain>(?:[^\n/"'()\#%}R]|R(?!"))+)
    | (?P<block>/\*.*?(?:\*/|\Z))
    | (?P<line>//[^\n]*)
    | (?P<raw>(?:(?<![\w$])|(?<=\bu8)|(?<=\b[uUL]))R"(?P<mark>[^()\\\s"]{0,16})\(.*?\)(?P=mark)")
    | (?P<string>"(?:\\[^\n]|[^"\\\n])*"?)
    | (?P<char>'(?:\\[^\n]|[^'\\\n])*'?)
    | (?P<hash>\#|%:)
    | (?P<open>\()
    | (?P<close>\))
    | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
DIRECTIVE_NAME = re.compile(rb"\s*(\w+)")
#: A brace in column 0 that ends a function or an initialiser, not a macro's argument.
FUNCTION_END = re.compile(rb"\}(?![ \t]*[,)])")


class Branch(Enum):
    """A conditional directive, by what it does to groups."""

    OPEN = "open"
    NEXT = "next"
    ELSE = "else"
    CLOSE = "close"


BRANCHES = {
    b"if": Branch.OPEN,
    b"ifdef": Branch.OPEN,
    b"ifndef": Branch.OPEN,
    b"elif": Branch.NEXT,
    b"elifdef": Branch.NEXT,
    b"elifndef": Branch.NEXT,
    b"else": Branch.ELSE,
    b"endif": Branch.CLOSE,
}


@dataclass(frozen=True, slots=True)
class Start:
    """The start of a physical line, as the preprocessor will meet it.

    ``safe``: a directive in front of this line is a directive and breaks nothing.
    ``branch``: the line holds this conditional directive. ``control``: it holds a
    ``#line`` (or ``# 12 "file"``) of its own.
    """

    safe: bool
    branch: Branch | None = None
    control: bool = False


@dataclass(slots=True)
class _Line:
    """A logical line while it is read."""

    at: int
    inside: bool = False
    depth: int = 0
    after_word: bool = False
    first: str = ""
    branch: Branch | None = None
    control: bool = False


def line_starts(text: bytes) -> tuple[Start, ...]:
    """What the start of each physical line of a C source is.

    Never raises: on text that is no C (unbalanced, unterminated) fewer lines are safe.
    """
    joined, logical_of = _join(text)
    lines = _logical_lines(joined)
    # a word at a line's end and a parenthesis at the next one's beginning may be one macro call
    opens = [False] * (len(lines) + 1)
    for index in range(len(lines) - 1, -1, -1):
        opens[index] = lines[index].first == "(" or (lines[index].first == "" and opens[index + 1])
    starts = []
    previous = -1
    for index in logical_of:
        line = lines[index]
        begins = index != previous
        previous = index
        safe = begins and not line.inside and line.depth == 0 and not (line.after_word and opens[index])
        starts.append(
            Start(safe, line.branch if begins else None, line.control if begins else False),
        )
    return tuple(starts)


def _join(text: bytes) -> tuple[bytes, list[int]]:
    """Translation phase 2: join continued lines. Gives the text and, per physical line, its logical line."""
    logical_of = []
    logical = 0
    spliced = {match.end() for match in CONTINUED.finditer(text)}
    at = 0
    for line in split_lines(text):
        logical_of.append(logical)
        at += len(line)
        if line.endswith(b"\n") and at not in spliced:
            logical += 1
    return CONTINUED.sub(b"", text), logical_of


def _logical_lines(text: bytes) -> list[_Line]:
    """Read joined text; one entry per logical line, and one for an empty last line."""
    lines = [_Line(0)]
    depth = 0
    saved: list[int] = []  # parenthesis depth at each open #if
    word = False  # the last token that is not blank was a word
    at_start = True  # nothing but blanks and comments since the newline
    directive = False
    named = True  # the directive's name has been read
    for token in TOKEN.finditer(text):
        kind = token.lastgroup if token.lastgroup != "mark" else "raw"
        match kind:
            case "newline":
                at_start, directive, named = True, False, True
                lines.append(_Line(token.end(), depth=depth, after_word=word))
                continue
            case "line":
                continue
            case "plain" if token[0].isspace():
                continue
            case "block" | "raw":
                # lines inside are not safe; they are no lines of their own to a directive either
                inner = token[0].count(b"\n")
                start = token.start()
                for _ in range(inner):
                    start = text.index(b"\n", start) + 1
                    lines.append(_Line(start, inside=True, depth=depth, after_word=word))
                if kind == "block":
                    continue
            case "hash" if at_start:
                directive, named, at_start = True, False, False
                lines[-1].first = lines[-1].first or "#"
                continue
            case _:
                pass
        at_start = False
        if directive:
            if not named:
                named = True
                name = found[1] if (found := DIRECTIVE_NAME.match(token[0])) else b""
                lines[-1].branch = branch = BRANCHES.get(name)
                lines[-1].control = name.isdigit() or name == b"line"
                depth = _branch_depth(branch, saved, depth)
            continue
        line = lines[-1]
        if not line.first:
            line.first = "(" if kind == "open" else "x"
            if line.at == token.start() and FUNCTION_END.match(text, token.start()):
                depth = line.depth = 0  # whatever was counted before, no macro call is open here
        last = token[0].rstrip()[-1:]
        word = kind == "plain" and (last.isalnum() or last in (b"_", b"$"))
        if kind == "open":
            depth += 1
        elif kind == "close":
            depth = max(0, depth - 1)
    return lines


def _branch_depth(branch: Branch | None, saved: list[int], depth: int) -> int:
    """Every group of a conditional starts at the parenthesis depth in front of the ``#if``."""
    match branch:
        case Branch.OPEN:
            saved.append(depth)
            return depth
        case Branch.NEXT | Branch.ELSE:
            return saved[-1] if saved else depth
        case Branch.CLOSE:
            if saved:
                saved.pop()
            return depth
        case None:
            return depth


@dataclass(slots=True)
class _Group:
    """An open conditional.

    A skipped group still counts its lines, inserted directives too. So ways around groups are
    kept as offset minus the number of directives inserted so far: ``entry`` in front of the
    ``#if``, ``exits`` at the ends of the earlier groups.
    """

    entry: frozenset[int]
    exits: frozenset[int] = frozenset()
    has_else: bool = False


class _Offsets:
    """All offsets that the compiler may have at the present line.

    An offset is the number that it reports for a line minus the line's index (from 0) in the
    text without the inserted directives.
    """

    def __init__(self) -> None:
        self.now = frozenset((1,))
        self.inserted = 0
        self._groups: list[_Group] = []

    def insert(self, offset: int) -> None:
        """A directive: exact from here on, as far as its group is not skipped."""
        self.inserted += 1
        self.now = frozenset((offset,))

    def pass_line(self, branch: Branch | None) -> None:
        """Go over a line that holds ``branch``."""
        match branch:
            case Branch.OPEN:
                self._groups.append(_Group(self._kept()))
            case Branch.NEXT | Branch.ELSE if self._groups:
                group = self._groups[-1]
                group.exits |= self._kept()
                group.has_else |= branch is Branch.ELSE
                self.now = self._restored(group.entry)
            case Branch.CLOSE if self._groups:
                group = self._groups.pop()
                exits = group.exits | self._kept()
                self.now = self._restored(exits if group.has_else else exits | group.entry)
            case _:  # no conditional, or a stray one: the compiler will say so
                pass

    def _kept(self) -> frozenset[int]:
        return frozenset(offset - self.inserted for offset in self.now)

    def _restored(self, kept: frozenset[int]) -> frozenset[int]:
        return frozenset(offset + self.inserted for offset in kept)


def with_line_control(new: bytes, origins: Sequence[int | None]) -> bytes:
    """``new`` with ``#line`` directives, so that each line with an origin reports its old number.

    ``origins`` gives for each line of ``new`` its number (from 0) in the old file, or None
    for a line that the patch brought (:attr:`kmend.patch.apply.AppliedFile.origins`). Inside a
    change, and between it and the first safe line behind it, the numbering goes on as it
    comes. Nothing is inserted where the numbers are right already; a file that controls its
    own line numbers is returned as it is.
    """
    lines = split_lines(new)
    if len(lines) != len(origins):
        raise ValueError(f"{len(lines)} lines but {len(origins)} origins")
    if all(origin is None or origin == index for index, origin in enumerate(origins)):
        return new
    starts = line_starts(new)
    if any(start.control for start in starts):
        return new
    out: list[bytes] = []
    offsets = _Offsets()
    for index, (line, start, origin) in enumerate(zip(lines, starts, origins, strict=True)):
        # the number of an #else or #endif itself is of no use to anyone
        if origin is not None and start.safe and start.branch in (None, Branch.OPEN):
            wanted = origin + 1 - index
            if offsets.now != {wanted}:
                out.append(b"#line %d\n" % (origin + 1))
                offsets.insert(wanted)
        out.append(line)
        offsets.pass_line(start.branch)
    return b"".join(out)


def origins_of(old: bytes, new: bytes) -> tuple[int | None, ...]:
    """Origins by comparing the two texts, where no applied patch gives them exactly."""
    before, after = split_lines(old), split_lines(new)
    head = 0
    while head < min(len(before), len(after)) and before[head] == after[head]:
        head += 1
    tail = 0
    while tail < min(len(before), len(after)) - head and before[-1 - tail] == after[-1 - tail]:
        tail += 1
    origins: list[int | None] = [*range(head), *[None] * (len(after) - head)]
    matcher = SequenceMatcher(
        None, before[head : len(before) - tail], after[head : len(after) - tail], autojunk=False
    )
    for block in matcher.get_matching_blocks():
        for step in range(block.size):
            origins[head + block.b + step] = head + block.a + step
    for step in range(1, tail + 1):
        origins[-step] = len(before) - step
    return tuple(origins)
