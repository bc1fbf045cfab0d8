"""Functions, macros and types out of C text in kernel style: what ``kmend module --new`` begins with.

A reading aid: it takes what the kernel's coding style lets a reader see (a definition starts in the first
column, its body ends with ``}`` there), and the compiler has the last word about what comes out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_WORD = re.compile(r"[A-Za-z_]\w*")
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.DOTALL)
_INLINE = re.compile(r"\b(?:inline|__always_inline|noinline|__init|__exit|__cold|noinline_for_stack)\b\s*")
#: How many lines a function's head may begin above its name.
_ABOVE = 6


@dataclass(frozen=True, slots=True)
class Function:
    """A definition: ``head`` up to the closing parenthesis of its parameters, ``body`` from ``{`` on."""

    name: str
    head: str
    body: str
    start: int

    @property
    def static(self) -> bool:
        return bool(re.search(r"\bstatic\b", self.head))

    @property
    def inline(self) -> bool:
        return bool(re.search(r"\b(?:inline|__always_inline)\b", self.head))

    @property
    def text(self) -> str:
        return f"{self.head}\n{self.body}\n"

    @property
    def prototype(self) -> str:
        """A declaration of it as something that another file defines."""
        return re.sub(r"\s+", " ", f"{_global(self.head)};").strip()

    def renamed(self, name: str) -> str:
        """Its text under another name, with external linkage."""
        head = re.sub(rf"\b{re.escape(self.name)}\b(?=\s*\()", name, _global(self.head), count=1)
        return f"{head}\n{self.body}\n"


def _global(head: str) -> str:
    return _INLINE.sub("", re.sub(r"\bstatic\b\s*", "", head))


def blanked(text: str) -> str:
    """The text with comments and literals replaced by blanks of the same length; newlines stay."""
    return _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def find_function(text: str, name: str, clean: str | None = None) -> Function | None:
    """The definition of a function, or None; ``clean`` is ``blanked(text)`` where the caller has it."""
    clean = blanked(text) if clean is None else clean
    for match in re.finditer(rf"\b{re.escape(name)}\s*\(", clean):
        line = clean.rfind("\n", 0, match.start()) + 1
        if clean[line : line + 1].isspace() or clean[line : line + 1] == "#":
            continue
        close = _closing(clean, match.end() - 1)
        if close < 0:
            continue
        brace = re.compile(r"(?:\s|__\w+(?:\([^()]*\))?)*\{").match(clean, close + 1)
        if brace is None:
            continue
        end = clean.find("\n}", brace.end())
        if end < 0:
            continue
        start = _head_start(clean, line)
        body = text[brace.end() - 1 : end + 2]
        return Function(name, text[start : close + 1], body, start)
    return None


def _closing(clean: str, at: int) -> int:
    depth = 0
    for place in range(at, len(clean)):
        if clean[place] == "(":
            depth += 1
        elif clean[place] == ")":
            depth -= 1
            if depth == 0:
                return place
        elif clean[place] in ";{}":
            return -1
    return -1


def _head_start(clean: str, line: int) -> int:
    """Where the head begins whose last line begins at ``line``: its type may stand on lines before."""
    for _ in range(_ABOVE):
        before = clean.rfind("\n", 0, max(line - 1, 0)) + 1
        text = clean[before : max(line - 1, 0)]
        if line == 0 or not text.strip() or text[0] in "#}" or text.rstrip()[-1] in ";})\\":
            break
        line = before
    return line


def includes(text: str) -> tuple[str, ...]:
    """The ``#include`` lines, those under a condition with ``#if`` and ``#endif``; none behind ``#else``."""
    out: list[str] = []
    conditions: list[str] = []
    for line in text.splitlines():
        word = re.match(r"\s*#\s*(\w+)", line)
        if word is None:
            continue
        match word[1]:
            case "if" | "ifdef" | "ifndef":
                conditions.append(line)
            case "else" | "elif":
                if conditions:
                    conditions[-1] = ""
            case "endif":
                if conditions:
                    conditions.pop()
            case "include":
                if all(conditions) and not any(c.rstrip().endswith("\\") for c in conditions):
                    out += [*conditions, line, *("#endif" for _ in conditions)]
            case _:
                pass
    return tuple(out)


@dataclass(slots=True)
class Needed:
    """What of a file its functions need: texts by name in the order of the file, and declarations."""

    macros: dict[str, tuple[int, str]] = field(default_factory=dict)
    types: dict[str, tuple[int, str]] = field(default_factory=dict)
    copied: dict[str, Function] = field(default_factory=dict)
    declared: dict[str, str] = field(default_factory=dict)

    def parts(self) -> Iterator[str]:
        """The texts in an order that compiles: macros, types, declarations, functions."""
        for table in (self.macros, self.types):
            yield from (text for _, text in sorted(table.values()))
        if self.declared:
            yield "".join(f"{row}\n" for row in self.declared.values())
        yield from (f.text for f in sorted(self.copied.values(), key=lambda f: f.start))


def needed_by(text: str, functions: tuple[Function, ...], exists: Callable[[str], bool]) -> Needed:
    """What the functions use that only their own file has.

    A static function or variable of which the kernel has a symbol (``exists``) is declared; a function that
    was inlined everywhere is copied, with what it needs in turn.
    """
    clean = blanked(text)
    found = Needed()
    own = {function.name for function in functions}
    waiting = [f.head + f.body for f in functions]
    seen: set[str] = set()
    while waiting:
        here = blanked(waiting.pop())
        for word in _WORD.findall(here):
            if word in seen:
                continue
            seen.add(word)
            if word in own and exists(word):
                # a call of itself, or a pointer to it, means the one that the kernel knows
                function = next(f for f in functions if f.name == word)
                if function.static and len(re.findall(rf"\b{word}\b", here)) > 1:
                    found.declared[word] = function.prototype
                continue
            waiting += _take(text, clean, word, exists, found)
    return found


def _take(text: str, clean: str, word: str, exists: Callable[[str], bool], found: Needed) -> list[str]:
    """Put what ``word`` means in the file into ``found``; returns the texts that were copied."""
    macro = re.search(rf"^[ \t]*#[ \t]*define[ \t]+{word}\b(?:[^\n]*\\\n)*[^\n]*\n", text, re.MULTILINE)
    if macro is not None:
        found.macros[word] = (macro.start(), macro[0])
        return [macro[0]]
    kind = re.search(rf"^(?:struct|union|enum) {word} \{{.*?^\}}[^;\n]*;\n", clean, re.MULTILINE | re.DOTALL)
    if kind is not None:
        found.types[word] = (kind.start(), text[kind.start() : kind.end()])
        return [text[kind.start() : kind.end()]]
    if not re.search(rf"\b{word}\s*\(", clean):
        return _variable(clean, word, exists, found)
    function = find_function(text, word, clean)
    if function is None:
        return _variable(clean, word, exists, found)
    if not function.static:
        return []
    if exists(word) and not function.inline:
        found.declared[word] = function.prototype
        return [function.head]
    found.copied[word] = function
    return [function.text]


def _variable(clean: str, word: str, exists: Callable[[str], bool], found: Needed) -> list[str]:
    row = re.search(rf"^static\s+([^()=;{{}}]*\b{word}\b[^()=;{{}}]*)(?:=|;)", clean, re.MULTILINE)
    if row is not None and exists(word):
        found.declared[word] = "extern " + re.sub(r"\s+", " ", row[1]).strip() + ";"
        return [row[1]]
    return []
