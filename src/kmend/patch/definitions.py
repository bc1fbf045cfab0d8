"""Which functions a patch edits, by name: the answer to "why is this function in the module?".

A reading aid for the report only; what is replaced is decided by comparing objects. It reads
kernel style: a function's body begins with ``{`` and ends with ``}`` in the first column.
"""

from __future__ import annotations

import re

from kmend.patch.apply import AppliedFile, split_lines

_SYSCALL = re.compile(r"\b(?:COMPAT_)?SYSCALL_DEFINE\d\s*\(\s*(\w+)")
#: How far above its body a function's head is looked for, in lines.
_HEAD = 25


def edited_functions(file: AppliedFile) -> frozenset[str]:
    """Names of the functions whose text the patch touches in this file (of the new text)."""
    if file.new is None:
        return frozenset()
    lines = [line.decode(errors="replace") for line in split_lines(file.new)]
    names = set()
    for index in _touched(file.origins):
        name = _enclosing(lines, index)
        if name:
            names.add(name)
    return frozenset(names)


def _touched(origins: tuple[int | None, ...]) -> list[int]:
    """Lines of the new text that are new, or behind which (or before which) lines were taken away."""
    out = []
    expected = 0
    for index, origin in enumerate(origins):
        if origin is None:
            out.append(index)
            continue
        if origin != expected:
            out.append(index)
        expected = origin + 1
    return out


def _enclosing(lines: list[str], index: int) -> str | None:
    start = index
    while start >= 0 and not lines[start].startswith("{"):
        if lines[start].startswith("}") and start != index:
            start = -1
            break
        start -= 1
    if start < 0:
        # Perhaps in a function's head: the body begins below.
        start = index
        while start < len(lines) and start - index < _HEAD and not lines[start].startswith("{"):
            if lines[start].startswith(("}", "#")) or not lines[start].strip():
                return None
            start += 1
        if start >= len(lines) or not lines[start].startswith("{"):
            return None
    head: list[str] = []
    for line in reversed(lines[max(0, start - _HEAD) : start]):
        if not line.strip() or line.startswith(("}", "#", " *", "/*")) or line.rstrip().endswith(";"):
            break
        head.insert(0, line)
    return _name(" ".join(head))


def _name(head: str) -> str | None:
    syscall = _SYSCALL.search(head)
    if syscall:
        return f"__do_sys_{syscall[1]}"
    found, depth, last = None, 0, 0
    for at, letter in enumerate(head):
        if letter == "(":
            if depth == 0:
                before = re.search(r"(\w+)\s*$", head[last:at])
                found = before[1] if before else found
            depth += 1
        elif letter == ")":
            depth -= 1
            last = at + 1
    return found
