"""``kmend module --new``: a folder to begin with, the text of the functions to be replaced in it.

The livepatch API has no way to call the function that was replaced, so a replacement begins as a copy of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kmend.core.config import Config
from kmend.core.errors import Failed, Refusal, Refused, UsageError
from kmend.core.files import write_atomically
from kmend.core.progress import Progress
from kmend.core.target import VMLINUX, Release, Target
from kmend.kernel import kbuild, store
from kmend.module.descriptor import FILE, PREFIX
from kmend.patch.extract import Function, find_function, includes, needed_by
from kmend.verify.symbols import module_places
from kmend.view import TargetView

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class Beginning:
    """What is asked for: a folder ``name`` below ``output``; ``source`` chooses among several files."""

    name: str
    functions: tuple[str, ...]
    obj: str
    release: Release
    output: Path
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """What was written: ``functions`` with the files that they come from."""

    folder: Path
    files: tuple[str, ...]
    functions: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def begin(wanted: Beginning, config: Config, progress: Progress) -> Made:
    """Write the folder: one C file for each source file that the functions come from, and a descriptor.

    Raises:
        UsageError: (``module-name``, ``exists``) the name is none, or the folder is there already.
        Refused: (``function-not-found``, ``unknown-module``) for each function that has no text, or is no
            function of the object.
    """
    if not _NAME.fullmatch(wanted.name):
        raise UsageError(
            f"{wanted.name!r} is no name for a module",
            why="letters, digits, dashes and underscores",
            next_step="give another name to --new",
            rule="module-name",
        )
    folder = wanted.output / wanted.name
    if folder.exists():
        raise UsageError(
            f"{folder} is there already",
            why="what you have written must not be lost",
            next_step="give another name to --new",
            rule="exists",
        )
    target = store.fetch(config, wanted.release, progress)
    view = TargetView(config, target)
    obj = wanted.obj.replace("-", "_")
    if obj != VMLINUX and view.optional_module(obj) is None:
        raise Refused(
            [
                Refusal(
                    "unknown-module",
                    obj,
                    f"{target.release} has no such module; perhaps it is built in",
                    "leave --object out, or check the spelling",
                )
            ]
        )
    progress.step(f"looking for {', '.join(wanted.functions)} in the source")
    found = _find(view, target, obj, wanted)
    return _write(view, target, obj, wanted, folder, found)


def _count(view: TargetView, obj: str, name: str) -> int:
    """How many symbols of that name the object has."""
    return len(view.symbols.named(name) if obj == VMLINUX else module_places(view.module(obj), name))


def _find(view: TargetView, target: Target, obj: str, wanted: Beginning) -> dict[str, list[Function]]:
    """The functions by source file.

    Raises:
        Refused: with a row for each that was not found.
    """
    sources = dict.fromkeys(u.source for u in kbuild.unit_map(target).all_units() if u.owner == obj)
    if wanted.source is not None:
        sources = dict.fromkeys([wanted.source])
    places: dict[str, list[tuple[str, Function]]] = {name: [] for name in wanted.functions}
    for source in sources:
        if not source.endswith((".c", ".h")):
            continue
        if wanted.source is None and not (target.source / source).exists():
            continue  # made while the kernel is built
        text = _text(target, source)
        for name in wanted.functions:
            if name in text and (function := find_function(text, name)) is not None:
                places[name].append((source, function))
    refusals = []
    out: dict[str, list[Function]] = {}
    for name, rows in places.items():
        if not _count(view, obj, name):
            why = f"{obj} has no symbol of that name: inlined into its callers, or not compiled at all"
            refusals.append(Refusal("function-not-found", name, why, "replace a caller of it"))
        elif not rows:
            why = "no C file of the object defines it in plain text; it may come from a macro or a header"
            next_step = (
                "for a system call name the function that its body calls; else name the file with --source"
            )
            refusals.append(Refusal("function-not-found", name, why, next_step))
        elif len(rows) > 1:
            why = f"several files define it: {', '.join(source for source, _ in rows)}"
            refusals.append(Refusal("function-not-found", name, why, "name one with --source"))
        else:
            out.setdefault(rows[0][0], []).append(rows[0][1])
    if refusals:
        raise Refused(refusals)
    return out


def _text(target: Target, source: str) -> str:
    try:
        return (target.source / source).read_text(errors="replace")
    except OSError as error:
        raise Failed(
            f"{source} cannot be read",
            why=error.strerror or str(error),
            next_step="name a file of the kernel's source tree",
            rule="unreadable",
        ) from error


def _write(
    view: TargetView,
    target: Target,
    obj: str,
    wanted: Beginning,
    folder: Path,
    found: dict[str, list[Function]],
) -> Made:
    files: dict[str, str] = {}
    cflags: list[str] = []
    notes: list[str] = []
    several: list[str] = []
    for source, functions in found.items():
        text = _text(target, source)
        needed = needed_by(text, tuple(functions), lambda name: bool(_count(view, obj, name)))
        several += [name for name in needed.declared if _count(view, obj, name) > 1]
        name = f"{PurePosixPath(source).stem}.c"
        while name in files:
            name = f"{PurePosixPath(name).stem}_.c"
        licence = text.partition("\n")[0] if "SPDX-License-Identifier" in text.partition("\n")[0] else ""
        lines = [licence or "// SPDX-License-Identifier: GPL-2.0-or-later"]
        lines += [f"/* From {source} of {target.release} ({target.source_version}). */", "", *includes(text)]
        lines += ['#include "kmend.h"', ""]
        lines += [part if part.endswith("\n") else f"{part}\n" for part in needed.parts()]
        lines += [function.renamed(PREFIX + function.name) for function in functions]
        files[name] = "\n".join(lines).rstrip("\n") + "\n"
        for flags in (("-iquote", str(PurePosixPath(source).parent)),):
            if list(flags) != cflags[-2:]:
                cflags += flags
        if needed.copied:
            notes.append(f"{name} has copies of what was inlined: {', '.join(needed.copied)}")
        if needed.declared:
            notes.append(f"{name} declares what {obj} keeps to itself: {', '.join(needed.declared)}")
    names = [f.name for functions in found.values() for f in functions]
    files[FILE] = _descriptor(view, obj, wanted.name, names, cflags, several)
    notes += [f"{obj} has several symbols {n}: set its sympos in {FILE}" for n in several]
    notes += [
        f"{obj} has {_count(view, obj, n)} functions {n}: set its sympos in {FILE}"
        for n in names
        if _count(view, obj, n) > 1
    ]
    for name, content in files.items():
        write_atomically(folder / name, content.encode())
    return Made(
        folder,
        tuple(files),
        tuple((f.name, source) for source, functions in found.items() for f in functions),
        tuple(notes),
    )


def _descriptor(
    view: TargetView, obj: str, name: str, functions: list[str], cflags: list[str], several: list[str]
) -> str:
    flags = ", ".join(f'"{flag}"' for flag in cflags)
    lines = [
        f'name = "{name.replace("-", "_")}"',
        'description = ""',
        "# take the place of all older livepatches",
        "replace = true",
        "# for headers beside the source file, relative to the kernel's tree",
        f"cflags = [{flags}]",
        "",
        "[[object]]",
        f'name = "{obj}"',
        '# callbacks = { pre_patch = "function", post_unpatch = "function" }',
    ]
    for function in functions:
        count = _count(view, obj, function)
        lines += ["", "[[object.func]]", f'old_name = "{function}"', f'new_func = "{PREFIX}{function}"']
        if count > 1:
            lines.append(f"# one of {count}, counted from 1 in the order of /proc/kallsyms")
            lines.append("sympos = 0")
    if several:
        lines += ["", "[symbols]"]
        for symbol in several:
            lines.append(
                f"# one of {_count(view, obj, symbol)}, counted from 1 in the order of /proc/kallsyms"
            )
            lines.append(f'{symbol} = {{ object = "{obj}", sympos = 0 }}')
    return "\n".join(lines) + "\n"
