"""Why a source file is not compiled into this kernel: the sentence that a refusal shows.

Read from the text of the makefiles, the other way round than kbuild does: from the object's name to
the line that mentions it, and to the option or the condition on that line. A reason for people; the
fact itself comes from the unit index.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from kmend.core.target import Target
from kmend.kernel import kbuild_env

if TYPE_CHECKING:
    from kmend.kernel.units import UnitMap

#: Code that is in the tree but not in the running kernel's text. First match wins.
_PLACES = (
    (r"arch/x86/um/", "it belongs to user-mode Linux, not to this kernel"),
    (r"arch/x86/boot/", "it is boot code: it runs before the kernel and is gone when that runs"),
    (r"arch/x86/realmode/rm/", "it is real-mode code, linked into the kernel as a blob of data"),
    (r"arch/x86/purgatory/", "it is kexec's purgatory, a program of its own between two kernels"),
    (r"arch/x86/entry/vdso/", "it is the vDSO: mapped into user space, which a livepatch does not reach"),
    (r"drivers/firmware/efi/libstub/", "it is the EFI boot stub: it runs before the kernel"),
    (r"arch/x86/tools/|scripts/|tools/|usr/", "it is a program that runs on the machine that builds"),
    (r"Documentation/", "it is an example in the documentation"),
)

_ARCH = re.compile(r"arch/([^/]+)/")
_OPTION = re.compile(r"CONFIG_\w+")
_CONDITION = re.compile(r"\s*(ifeq|ifneq|ifdef|ifndef|else|endif)\b(.*)")
_ASSIGN = re.compile(r"\s*([^:=+?\s]+(?:\([^)]*\))?[^:=+?\s]*)\s*(?:[:+?]?=)(.*)")
#: The left side of a list of objects: obj-y, lib-$(CONFIG_X), foo-objs, foo-$(CONFIG_X) …
_LIST = re.compile(r"-(?:y|m|objs|objs-\$.*|\$.*)$")


@dataclass(frozen=True, slots=True)
class _Line:
    """A makefile's assignment: where, left side, words on the right, and the conditions that hold it."""

    file: str
    number: int
    left: str
    words: tuple[str, ...]
    conditions: tuple[tuple[str, bool], ...]  # text of if…, and whether it must hold


def explain(target: Target, units: UnitMap, source: str) -> str:
    """One sentence without a full stop, for ``why`` of a refusal."""
    name = os.path.normpath(source)
    path = target.source / name
    if name.startswith(("../", "/")) or name == "..":
        return "it lies outside of the kernel's source tree"
    if not path.exists():
        return f"the source of {target.release} has no such file"
    if path.is_dir():
        return "it is a folder"
    if includers := units.includers(name):
        shown = ", ".join(includers[:3]) + (f" and {len(includers) - 3} more" if len(includers) > 3 else "")
        return f"it is no unit of its own: {shown} includes it"
    if not name.endswith((".c", ".S", ".rs")):
        return "it is no C or assembly source"
    arch = _ARCH.match(name)
    if arch and arch[1] != "x86":
        return f"it belongs to the architecture {arch[1]}; {target.release} is built for x86"
    for pattern, why in _PLACES:
        if re.match(pattern, name):
            return why
    if units.units(name):
        return "it is compiled"
    return _Makefiles(target).reason(name)


class _Makefiles:
    def __init__(self, target: Target) -> None:
        self._tree = target.source
        self._visited = kbuild_env.load(target).visited
        self._options = _configuration(target.config)

    def reason(self, name: str) -> str:
        stem = name.rpartition(".")[0]
        if any(_matches(word, f"{stem}.s") for line in self._lines("") for word in line.words):
            return "it only serves to generate a header of constants, and is not linked"
        unsure = ""
        for folder in _folders(name):
            lines = list(self._lines(folder))
            for line in self._mentions(lines, os.path.relpath(stem, folder or ".")):
                said, sure = self._judge(lines, line, set())
                if sure:
                    return said
                unsure = unsure or said
            if unsure:
                break
        return self._not_visited(name) or unsure or "no makefile compiles it in this configuration"

    def _mentions(self, lines: list[_Line], relative: str) -> Iterator[_Line]:
        for line in lines:
            if line.left.startswith(("hostprogs", "userprogs")):
                wanted = relative
            elif _LIST.search(line.left):
                wanted = f"{relative}.o"
            else:
                continue
            if any(_matches(word, wanted) for word in line.words):
                yield line

    def _judge(self, lines: list[_Line], line: _Line, seen: set[str]) -> tuple[str, bool]:
        """What a line that mentions the object says, and whether that settles it."""
        place = f"{line.file}, line {line.number}"
        if line.left.startswith(("hostprogs", "userprogs")):
            return f"it is a program of the build or of user space ({place})", True
        for text, wanted in line.conditions:
            if (holds := self._holds(text)) is not None and holds is not wanted:
                return f"{self._condition(text, wanted)} ({place})", True
        for option in _OPTION.findall(line.left):
            if self._options.get(option) not in ("y", "m"):
                return f"{option} is not set ({place})", True
        base = _LIST.sub("", line.left)
        if base not in ("obj", "lib", "") and base not in seen:
            # A part of the composite object base.o: is that one built?
            for upper in self._mentions(lines, base):
                said, sure = self._judge(lines, upper, seen | {base})
                if sure:
                    return said, True
        return f"{place} mentions it, and this configuration does not compile it", False

    def _not_visited(self, name: str) -> str:
        """Why kbuild does not descend into the folder of ``name`` (or one above it); empty when it does."""
        folders = list(_folders(name))
        for folder, parent in pairwise(folders):
            if folder in self._visited:
                break
            wanted = os.path.relpath(folder, parent or ".")
            for line in self._lines(parent):
                if wanted in line.words or f"{wanted}/" in line.words:
                    options = [
                        o for o in _OPTION.findall(line.left) if self._options.get(o) not in ("y", "m")
                    ]
                    if options:
                        return f"{options[0]} is not set ({line.file}, line {line.number}: {wanted}/)"
        return ""

    def _holds(self, text: str) -> bool | None:
        """Whether a simple condition on one option holds; None: not simple."""
        kind, _, rest = text.partition(" ")
        options = _OPTION.findall(rest)
        if len(options) != 1:
            return None
        value = self._options.get(options[0], "")
        match kind:
            case "ifdef":
                return bool(value)
            case "ifndef":
                return not value
            case "ifeq" | "ifneq":
                form = re.fullmatch(r"\(?\s*\$\(CONFIG_\w+\)\s*,\s*([\w]*)\s*\)?", rest.strip())
                if form is None:
                    return None
                return (value == form[1]) is (kind == "ifeq")
            case _:
                return None

    def _condition(self, text: str, wanted: bool) -> str:
        option = _OPTION.findall(text)[0]
        value = self._options.get(option)
        state = f"{option} is {value}" if value else f"{option} is not set"
        return f"{state}, and the makefile asks for {'' if wanted else 'the contrary of '}`{text.strip()}`"

    def _lines(self, folder: str) -> Iterator[_Line]:
        """The assignments of a folder's makefile with their conditions."""
        base = self._tree / folder
        path = next((base / n for n in ("Kbuild", "Makefile") if (base / n).is_file()), None)
        if path is None:
            return
        name = os.path.relpath(path, self._tree)
        conditions: list[tuple[str, bool]] = []
        number = 0
        rest = path.read_text(errors="replace").replace("\t", " ").split("\n")
        while number < len(rest):
            first = number
            text = rest[number]
            while text.endswith("\\") and number + 1 < len(rest):
                number += 1
                text = text[:-1] + " " + rest[number]
            number += 1
            text = text.partition("#")[0]
            if control := _CONDITION.match(text):
                _nest(conditions, control[1], control[2].strip())
            elif assign := _ASSIGN.match(text):
                yield _Line(name, first + 1, assign[1], tuple(assign[2].split()), tuple(conditions))


def _folders(name: str) -> Iterator[str]:
    """The folder of a file and those above it, up to the tree's root (the empty name)."""
    while name:
        name = name.rpartition("/")[0]
        yield name


def _matches(word: str, wanted: str) -> bool:
    """Whether a makefile's word can become ``wanted``; ``foo_$(BITS).o`` may hold anything there."""
    pattern = re.sub(r"\$[({][^)}]*[)}]", "*", word)
    return bool(pattern.strip("*./os")) and fnmatchcase(wanted, pattern.removeprefix("./"))


def _nest(conditions: list[tuple[str, bool]], word: str, rest: str) -> None:
    if word == "endif":
        if conditions:
            conditions.pop()
    elif word == "else":
        if conditions:
            text, wanted = conditions.pop()
            # "else ifeq …": only the newer condition is kept; it is a reason, not a proof.
            conditions.append((rest, True) if rest.startswith("if") else (text, not wanted))
    else:
        conditions.append((f"{word} {rest}", True))


def _configuration(path: Path) -> Mapping[str, str]:
    """Options of a ``.config`` that are set."""
    rows = (line.partition("=") for line in path.read_text().splitlines() if line.startswith("CONFIG_"))
    return {name: value for name, mark, value in rows if mark}
