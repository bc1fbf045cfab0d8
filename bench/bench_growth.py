"""Builds of patches of 1, 10 and 50 C files: wall time against merely compiling their units, and growth.

Every patch adds one statement to one function of each of its files, so every unit has a changed function.
The originals are not in the cache, so each unit is compiled twice. The files are the first ones of the kernel
image that the edit fits, in order.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from bench_header import compile_twice
from kmend.core.target import Linkage, Target, Unit
from kmend.kernel import kbuild, store
from measure import CMDLINE, cache_beside, forget, settings, show, target_of, watch

COUNTS = (1, 10, 50)
#: Folders whose files are part of the kernel image, small and large.
FOLDERS = ("fs", "mm", "kernel", "net/core", "block")
#: A function of the file's own without an attribute, its body's first declaration or statement.
FUNCTION = re.compile(r"^(?:static )?(?:int|void|bool|long|ssize_t) (\w+)\([^()]*\)\n\{\n", re.MULTILINE)
#: What is added: a call and a string.
STATEMENT = 'pr_info("one more\\n");'
EXPORTED = re.compile(r"EXPORT_SYMBOL\w*\((\w+)\)")


def edited(text: str) -> str | None:
    """The text with a statement more before the last ``return`` of an exported function; None: none fits."""
    names = set(EXPORTED.findall(text))
    for found in FUNCTION.finditer(text):
        end = text.find("\n}\n", found.end())
        body = text[found.end() : end]
        last = body.rfind("\n") + 1
        if found[1] in names and body[last:].startswith("\treturn ") and "#" not in body and "\n\n" in body:
            return text[: found.end() + last] + f"\t{STATEMENT}\n" + text[found.end() + last :]
    return None


def changes(target: Target) -> list[tuple[str, str, str, Unit]]:
    """Path, old and new text, and unit, for as many files as the largest build needs."""
    units = kbuild.unit_map(target)
    out: list[tuple[str, str, str, Unit]] = []
    for folder in FOLDERS:
        for file in sorted((target.source / folder).glob("*.c")):
            path = f"{folder}/{file.name}"
            mine = units.units(path)
            if len(mine) != 1 or mine[0].linkage is not Linkage.BUILTIN or units.includers(path):
                continue
            text = file.read_text(errors="surrogateescape")
            new = edited(text)
            if new is not None:
                out.append((path, text, new, mine[0]))
            if len(out) == COUNTS[-1]:
                return out
    return out


def patch_of(rows: list[tuple[str, str, str, Unit]], folder: Path) -> Path:
    """One patch of all changes."""
    out = folder / f"files{len(rows)}.patch"
    with out.open("wb") as patch:
        for path, old, new, _ in rows:
            (folder / "old").write_text(old, errors="surrogateescape")
            (folder / "new").write_text(new, errors="surrogateescape")
            labels = ["--label", f"a/{path}", "--label", f"b/{path}"]
            subprocess.run(["diff", "-u", *labels, folder / "old", folder / "new"], stdout=patch, check=False)
    return out


def main() -> int:
    config = settings()
    target = target_of(config, CMDLINE.release)
    rows: list[list[str]] = []
    notes: list[str] = []
    with cache_beside(config, target.release) as cache, TemporaryDirectory(prefix="kmend-bench-") as name:
        folder = Path(name)
        own_target = store.open_target(replace(config, cache=cache), target.release)
        found = changes(target)
        if len(found) < COUNTS[-1]:
            sys.exit(f"only {len(found)} files fit the edit")
        for count in COUNTS:
            some = found[:count]
            words = (
                "build",
                patch_of(some, folder),
                "--kernel",
                target.release,
                "-o",
                folder,
                "-n",
                f"n{count}",
            )
            units = tuple(unit for _, _, _, unit in some)
            kbuild.commands(own_target, units)  # asked for once and kept: not what is measured here
            base = compile_twice(config, own_target, units)
            seen = watch(*words, cache=cache)
            forget(cache / "objects")
            document = json.loads((folder / f"n{count}.json").read_text())
            times = document["timings"]
            own = seen.seconds - times.get("compile", 0.0)
            functions = sum(len(row["functions"]) for row in document["objects"])
            rows.append(
                [
                    f"{count} files, {functions} functions",
                    f"{base:.1f}",
                    f"{seen.seconds:.1f}",
                    f"{seen.seconds / base:.2f}",
                    f"{own:.2f}",
                    f"{1000 * own / count:.0f}",
                    f"{seen.peak:.0f}",
                ]
            )
            shown = ", ".join(
                f"{stage} {1000 * value:.0f}" for stage, value in times.items() if value >= 0.005
            )
            notes.append(
                f"{count} files, ms: {shown}; start and end {1000 * (seen.seconds - times['total']):.0f}"
            )
    show(
        "kmend build of patches of many files, no original in the cache",
        ("", "compiling", "kmend", "x", "own s", "own ms/file", "peak MB"),
        rows,
        ["own: all of kmend's wall time but the stage `compile`, Python's start included", *notes],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
