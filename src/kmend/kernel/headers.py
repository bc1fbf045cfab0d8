"""Which units a header can reach: the include lines of the whole configured tree, backwards.

The index never leaves a unit out: conditionals (``#if``) are not evaluated, and a name that
several folders could supply (``#include "core.h"`` through some ``-I``) leads to all of them. It
names too many units instead; the preprocessor says afterwards which of them the change really
reaches (:func:`kmend.kernel.compile.preprocessed`).

``includes.txt`` in the target's folder has a row per including file: its path, then what it includes
as it is written there, ``"`` before the names that are looked for beside the file first.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from kmend.core.errors import Failed
from kmend.core.files import write_atomically
from kmend.core.progress import Progress
from kmend.core.run import run
from kmend.core.target import Target, Unit
from kmend.kernel import kbuild

FILE = "includes.txt"
#: scripts/Makefile.lib, c_flags: every unit begins with these (6.1: Makefile, USERINCLUDE and LINUXINCLUDE).
FORCED = ("include/linux/compiler-version.h", "include/linux/kconfig.h", "include/linux/compiler_types.h")
#: Folders of the tree that hold no code of the kernel itself, and other architectures.
_LEFT_OUT = frozenset({"Documentation", "LICENSES", "tools", "samples", "scripts", "arch", "debian"})
_FILES = ("--include=*.[chS]", "--include=*.inc")
_LINE = re.compile(
    r'^([^:]+):[ \t]*#[ \t]*(?:include[ \t]*|define[ \t]+\w*INCLUDE_FILE[ \t]+)([<"])([^">]+)[">]'
)
_PATTERN = r'^[ \t]*#[ \t]*(include|define[ \t]+[A-Z_]*INCLUDE_FILE)[ \t]*[<"]'


def build_index(target: Target, progress: Progress) -> None:
    """Write the index: one search through the tree (2 s), then kept.

    Raises:
        Failed: the tree cannot be searched, or the index not be written.
    """
    progress.step(f"indexing the include lines of {target.release}")
    rows: dict[str, list[str]] = {}
    for line in _search(target, ["-rHE", *_FILES, "-e", _PATTERN, *_tops(target)]):
        match = _LINE.match(line)
        if match:
            mark = '"' if match[2] == '"' else ""
            rows.setdefault(match[1], []).append(mark + match[3])
    text = "".join("\t".join((file, *names)) + "\n" for file, names in sorted(rows.items()))
    write_atomically(target.folder / FILE, text.encode())


class HeaderMap:
    """The include graph of a target, read whole: asked only when a patch changes a header."""

    def __init__(self, tree: Path, text: str) -> None:
        self._tree = tree
        self._rows = [line.split("\t") for line in text.splitlines()]
        self._exists: dict[str, bool] = {}
        #: last part of an included name -> (including file, the name as written)
        self._by_name: dict[str, list[tuple[str, str]]] = {}
        for file, *names in self._rows:
            for name in names:
                self._by_name.setdefault(posixpath.basename(name.lstrip('"')), []).append((file, name))

    def includers(self, changed: Iterable[str]) -> frozenset[str]:
        """Every file of the index from which one of the ``changed`` files can be reached, itself included."""
        reached = set(changed)
        if reached & set(FORCED):
            return frozenset(row[0] for row in self._rows) | reached
        waiting = list(reached)
        while waiting:
            header = waiting.pop()
            for file, name in self._by_name.get(posixpath.basename(header), ()):
                if file not in reached and self._may_mean(file, name, header):
                    reached.add(file)
                    waiting.append(file)
        return frozenset(reached)

    def _may_mean(self, file: str, name: str, header: str) -> bool:
        """Whether ``#include name`` in ``file`` can lead to ``header``."""
        beside = name.startswith('"')
        spec = name.lstrip('"')
        if beside:
            near = posixpath.normpath(posixpath.join(posixpath.dirname(file), spec))
            if near == header:
                return True
            if self._is_file(near):
                return False  # gcc looks beside the including file first
        tail = posixpath.normpath(spec)
        while tail.startswith("../"):
            tail = tail[3:]
        return header == tail or header.endswith("/" + tail)

    def _is_file(self, path: str) -> bool:
        known = self._exists.get(path)
        if known is None:
            known = self._exists[path] = not path.startswith("..") and (self._tree / path).is_file()
        return known


@lru_cache(maxsize=2)
def _read(path: Path, tree: Path, _mtime: int) -> HeaderMap:
    return HeaderMap(tree, path.read_text(errors="surrogateescape"))


def load(target: Target, progress: Progress) -> HeaderMap:
    """The target's include graph; the index is made on first use.

    Raises:
        Failed: as :func:`build_index`.
    """
    path = target.folder / FILE
    if not path.exists():
        build_index(target, progress)
    return _read(path, target.source, path.stat().st_mtime_ns)


def units_reached(target: Target, headers: Iterable[str], progress: Progress) -> tuple[Unit, ...]:
    """Units that may include one of the headers, by source; more than really do, never fewer."""
    files = load(target, progress).includers(headers)
    return tuple(_units(target, files))


def _units(target: Target, files: frozenset[str]) -> Iterator[Unit]:
    for unit in kbuild.unit_map(target).all_units():
        if unit.source in files or not unit.source.endswith((".c", ".S")):
            yield unit


def mentioning(target: Target, names: Iterable[str], progress: Progress) -> frozenset[str]:
    """The C files and headers of the tree in which one of the names stands (a second or two).

    Raises:
        Failed: the tree cannot be searched.
    """
    progress.step("looking for the names that a header's change adds")
    patterns = [word for name in sorted(names) for word in ("-e", name)]
    # As parts of words first: that is ten times as fast as whole words, and nearly always enough.
    found = _search(target, ["-rlF", *_FILES, *patterns, *_tops(target)])
    return frozenset(_search(target, ["-lwF", *patterns, *found])) if found else frozenset()


def _tops(target: Target) -> list[str]:
    """The folders of the tree that hold the kernel's own code."""
    names = (
        entry.name
        for entry in os.scandir(target.source)
        if entry.is_dir() and entry.name not in _LEFT_OUT and not entry.name.startswith(".")
    )
    return [*sorted(names), "arch/x86"]


def _search(target: Target, arguments: list[str]) -> list[str]:
    result = run(["grep", *arguments], cwd=target.source, check=False)
    if result.status > 1:
        raise Failed(
            f"the sources in {target.source} could not be searched", why=result.errors.strip(), rule="kbuild"
        )
    return result.text.splitlines()
