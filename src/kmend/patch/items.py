"""C text as a row of top-level items, to tell whether a header's change can be seen by a unit at all.

Most units that include a changed header use nothing of what changed in it. Two questions are answered
from the text alone, and "perhaps" is always answered with "yes, it can be seen":

- :func:`unseen`: two preprocessed texts of one unit: do they differ only in declarations that nothing
  else in the unit mentions? Everything that macros made is spelled out there, so a name that does not
  occur is not used.
- :func:`added_names`: a header before and after: does the change only add whole declarations?

The items are found by braces and semicolons. Where that goes wrong, the same text goes wrong on both
sides, and what is not understood counts as a change that can be seen.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

#: How many lines to look at for the end of an item, before the whole text is taken.
TRIES = 200
#: What decides where an item ends; comments, strings and directives are passed over whole.
_TOKEN = re.compile(
    rb'/\*.*?\*/|//(?:\\\n|[^\n])*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
    rb"|^[ \t]*\#(?:\\\n|/\*.*?\*/|[^\n])*|[{}();]",
    re.S | re.M,
)
_COMMENT = re.compile(rb"/\*.*?\*/|//(?:\\\n|[^\n])*", re.S)
_ASM = re.compile(rb"\b(?:__)?asm(?:__)?\b")
_SPACE = re.compile(rb"\s+")
_WORD = re.compile(rb"[A-Za-z_]\w*")
_ATTRIBUTE = re.compile(rb"\b__attribute(?:__)?\s*(?=\(\()|\b(?:__)?alignas\s*(?=\()|\b_Alignas\s*(?=\()")
#: Attributes by which a definition matters although nobody mentions it; those that make one of a declaration.
_KEPT = re.compile(rb"\b(?:__)?(?:used|section|constructor|destructor)(?:__)?\b")
_DEFINES = re.compile(rb"\b(?:__)?(?:alias|ifunc|weakref|symver)(?:__)?\b")
_AGGREGATE = re.compile(rb"(?:typedef )?(struct|union|enum)(?: (\w+))? ?$")
_CONDITIONAL = re.compile(rb"#\s*(if|ifdef|ifndef|else|elif|endif)\b")
_DEFINE = re.compile(rb"#\s*define\s+(\w+)")
#: What stands before a parenthesis in a statement; only a text cut in the middle has one at the top.
_STATEMENT = frozenset({b"return", b"if", b"for", b"while", b"switch", b"sizeof", b"else", b"do", b"goto"})
_INLINE = re.compile(rb"\b(?:__always_inline|__inline__|__inline|inline)\b")


def items(text: bytes) -> list[bytes]:
    """The top-level items of C text in their order: declarations, definitions, directives.

    Comments are taken out and white space counts as one blank. A directive inside of an item belongs to it.
    """
    out: list[bytes] = []
    parts: list[bytes] = []
    start = depth = 0
    body = function = False

    def end(at: int) -> None:
        nonlocal start, body, function
        parts.append(text[start:at])
        item = _SPACE.sub(b" ", b" ".join(parts)).strip()
        if item:
            out.append(item)
        parts.clear()
        start, body, function = at, False, False

    for match in _TOKEN.finditer(text):
        token = match[0]
        first = token[:1]
        if first == b"/":
            parts.append(text[start : match.start()])
            start = match.end()
        elif first in (b"{", b"("):
            if depth == 0 and first == b"{" and not body:
                body = True
                function = _is_function(b" ".join([*parts, text[start : match.start()]]))
            depth += 1
        elif first in (b"}", b")"):
            depth = max(depth - 1, 0)
            if depth == 0 and first == b"}" and function:
                end(match.end())
        elif first == b";":
            if depth == 0:
                end(match.end())
        elif (
            token.lstrip()[:1] == b"#"
            and depth == 0
            and not b"".join(parts).strip()
            and not text[start : match.start()].strip()
        ):
            directive = _COMMENT.sub(b" ", token).replace(b"\\\n", b" ")
            parts.clear()
            out.append(_SPACE.sub(b" ", directive).strip())
            start = match.end()
    end(len(text))
    return out


def unseen(before: bytes, after: bytes) -> bool:
    """Whether two preprocessed texts of a unit differ in nothing that the rest of the unit could use.

    What differs must be declarations, types, or inline functions that nobody mentions: the compiler
    drops them. Two equal texts differ in nothing.
    """
    if before == after:
        return True
    start, behind = _common(before, after)
    old = items(before[start : len(before) - behind])
    new = items(after[start : len(after) - behind])
    gone, come = Counter(old), Counter(new)
    gone, come = gone - come, come - gone
    rest = _without(old, gone)
    if rest is None or rest != _without(new, come):
        return False  # what stayed has another order
    names: set[bytes] = set()
    for item in (*gone, *come):
        introduced = introduces(item)
        if introduced is None:
            return False
        names |= introduced
    return not mentioned(names, b"\n".join((before[:start], *rest, before[len(before) - behind :])))


def mentioned(names: Iterable[bytes], text: bytes) -> bool:
    """Whether one of the names stands in the text as a word."""
    wanted = sorted(names)
    return bool(wanted) and re.search(rb"\b(?:" + b"|".join(wanted) + rb")\b", text) is not None


def added_names(old: bytes, new: bytes) -> frozenset[str] | None:
    """The names that a header's change introduces, when it does nothing else; None: it does more.

    Whoever uses none of the names cannot tell the two texts apart, provided that the names are new: a
    macro of a known name would change what is there.
    """
    before, after = items(old), items(new)
    names: set[bytes] = set()
    run: list[bytes] = []
    at = 0
    for item in after:
        if at < len(before) and item == before[at]:
            at += 1
            found = _of_run(run)
            if found is None:
                return None
            names |= found
            run = []
        else:
            run.append(item)
    found = _of_run(run)
    if at < len(before) or found is None:
        return None
    return frozenset(name.decode() for name in names | found)


def introduces(item: bytes) -> frozenset[bytes] | None:
    """The names that an item introduces, when it matters only to those who mention one of them; else None.

    So for a prototype, a type, an inline function, an ``extern`` variable; not for what is compiled
    whether mentioned or not, and not for what is not understood.
    """
    if item in (b";", b"") or item.startswith((b"_Static_assert", b"static_assert")):
        return frozenset()
    opening = _outer_brace(item)
    closing = item.rfind(b"}") + 1
    outside = item if opening is None else item[:opening] + item[closing:]
    if _DEFINES.search(outside) or _ASM.search(outside):
        return None
    if opening is None:
        return _declared(item)
    if _KEPT.search(outside):
        return None
    head = _plain(item[:opening])
    aggregate = _AGGREGATE.fullmatch(head)
    if aggregate is not None and item.endswith(b";"):
        return _aggregate(item, opening, aggregate[2], typedef=head.startswith(b"typedef"))
    if item.endswith(b"}") and re.search(rb"\b(?:static|extern)\b", head) and _INLINE.search(head):
        return _function(head)
    return None


# -- the kinds -------------------------------------------------------------------------------------


def _declared(item: bytes) -> frozenset[bytes] | None:
    """A declaration without braces."""
    if not item.endswith(b";"):
        return None
    text = _plain(item[:-1])
    if re.fullmatch(rb"(?:struct|union|enum) \w+", text):
        return frozenset({text.split()[-1]})
    if b"=" in text:
        return None
    if text.startswith(b"typedef "):
        pointer = re.search(rb"\( ?\* ?(\w+) ?\) ?\(", text)
        if pointer:
            return frozenset({pointer[1]})
        return _function(text) if b"(" in text else _last(text)
    if b"(" in text:
        return _function(text)
    return _last(text) if text.startswith(b"extern ") else None


def _last(text: bytes) -> frozenset[bytes] | None:
    """The name at the end of a declaration of one thing."""
    if b"," in text:
        return None
    words = _WORD.findall(re.sub(rb"\[[^\]]*\]", b"", text))
    return frozenset({words[-1]}) if len(words) > 1 else None


def _function(head: bytes) -> frozenset[bytes] | None:
    """The name before the first parenthesis; a type stands before it."""
    match = re.match(rb"([^()=]*?)\b([A-Za-z_]\w*) ?\(", head)
    if match is None or not _WORD.search(match[1]) or _STATEMENT & set(_WORD.findall(match[0])):
        return None
    return frozenset({match[2]})


def _aggregate(item: bytes, opening: int, tag: bytes | None, *, typedef: bool) -> frozenset[bytes] | None:
    closing = item.rfind(b"}")
    body, behind = item[opening + 1 : closing], _plain(item[closing + 1 : -1])
    declarators = frozenset(_WORD.findall(re.sub(rb"\[[^\]]*\]", b"", behind)))
    if declarators and not typedef:
        return None  # it defines variables as well
    names = declarators | ({tag} if tag else set())
    # Tags and enumerators inside of it are as visible as its own.
    names |= {row[1] for row in re.finditer(rb"\b(?:struct|union|enum)\s+(\w+)\s*\{", body)}
    if re.match(rb"(?:typedef )?enum\b", _plain(item[:opening])):
        names |= set(_WORD.findall(body))
    for row in re.finditer(rb"\benum\b[^{};]*\{([^}]*)\}", body):
        names |= set(_WORD.findall(row[1]))
    return frozenset(names) or None


def _of_run(run: list[bytes]) -> frozenset[bytes] | None:
    """The names of items that were added one behind the other; conditionals must be balanced in them."""
    names: set[bytes] = set()
    depth = 0
    for item in run:
        if not item.startswith(b"#"):
            found = introduces(item)
            if found is None or b"#" in item:
                return None
            names |= found
            continue
        define, conditional = _DEFINE.match(item), _CONDITIONAL.match(item)
        if define is not None:
            names.add(define[1])
        elif conditional is None:
            return None
        elif conditional[1].startswith(b"if"):
            depth += 1
        elif depth == 0:
            return None  # it belongs to a conditional that was there
        elif conditional[1] == b"endif":
            depth -= 1
    return frozenset(names) if depth == 0 else None


# -- text ------------------------------------------------------------------------------------------


def _is_function(head: bytes) -> bool:
    """Whether the brace that follows opens a function's body."""
    text = _plain(head)
    return text.endswith(b")") and b"=" not in text and not text.startswith(b"typedef ")


def _plain(text: bytes) -> bytes:
    """Without attributes, and with single blanks."""
    while match := _ATTRIBUTE.search(text):
        depth = 0
        for at in range(match.end(), len(text)):
            depth += {0x28: 1, 0x29: -1}.get(text[at], 0)
            if depth == 0:
                break
        else:
            return text
        text = text[: match.start()] + b" " + text[at + 1 :]
    return _SPACE.sub(b" ", text).strip()


def _outer_brace(item: bytes) -> int | None:
    """Where the first brace outside of parentheses opens."""
    depth = 0
    for match in _TOKEN.finditer(item):
        if match[0] == b"{" and depth == 0:
            return match.start()
        depth += {b"(": 1, b")": -1}.get(match[0], 0)
    return None


def _common(a: bytes, b: bytes) -> tuple[int, int]:
    """How many bytes at the beginning and at the end two texts share, up to where an item ends."""
    shorter = min(len(a), len(b))
    start = _longest(shorter, lambda n: a[:n] == b[:n])
    start = _boundary(a, start)
    behind = _longest(shorter - start, lambda n: a[len(a) - n :] == b[len(b) - n :])
    for _ in range(TRIES):
        # the shared end begins behind an item's end
        at = a.find(b"\n", len(a) - behind)
        if at < 0:
            return start, 0
        behind = len(a) - at - 1
        if a[at - 1 : at] in (b";", b"}") and _balanced(a[at:]):
            return start, behind
    return start, 0


def _longest(limit: int, holds: Callable[[int], bool]) -> int:
    """The greatest n up to ``limit`` for which ``holds``, which holds for all below one that it holds for."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _boundary(text: bytes, at: int) -> int:
    """The last end of an item at or before ``at``; 0 when there is none."""
    for _ in range(TRIES):
        at = max(text.rfind(b";\n", 0, at), text.rfind(b"}\n", 0, at)) + 1
        if _balanced(text[:at]):
            return at
    return 0


def _balanced(text: bytes) -> bool:
    return text.count(b"{") == text.count(b"}") and text.count(b"(") == text.count(b")")


def _without(rows: list[bytes], taken: Counter[bytes]) -> list[bytes] | None:
    """The rows without those counted in ``taken``; None when one of them is there more often."""
    left = Counter(taken)
    for row in rows:
        if row in taken:
            left[row] -= 1
    if any(left.values()):
        return None  # which of the equal ones is meant cannot be told
    return [row for row in rows if row not in taken]
