"""A change of an inline function in a header that well over a hundred units include: wall time and memory.

`kmend build` against merely compiling the units whose code can change, before and after the patch, with as
many compilers at once as kmend runs. What kmend adds is finding those units (the preprocessor runs on each
one that may include the header, before and after), comparing and proving.

Rows of kmend:
  cold     nothing of the units is known but kbuild's commands for them
  warm     the originals are in the cache
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from kmend.core.config import Config
from kmend.core.target import Target, Unit
from kmend.kernel import compile as compiling
from kmend.kernel import kbuild
from measure import (
    CMDLINE,
    ENVIRONMENT,
    Watched,
    cache_beside,
    command,
    forget,
    settings,
    show,
    target_of,
    watch,
)


@dataclass(frozen=True, slots=True)
class Edit:
    """A header and one replacement in it."""

    header: str
    before: str
    after: str


EDIT = Edit(
    "include/linux/hid.h",
    "{\n\treturn hid_open_report(hdev);\n}",
    "{\n\tif (!hdev->ll_driver)\n\t\treturn -ENODEV;\n\treturn hid_open_report(hdev);\n}",
)


def patch_of(target: Target, edit: Edit, folder: Path) -> Path:
    """The edit as a patch file."""
    text = (target.source / edit.header).read_text()
    if text.count(edit.before) != 1:
        sys.exit(f"{edit.header} has another text than this benchmark knows")
    (folder / "old").write_text(text)
    (folder / "new").write_text(text.replace(edit.before, edit.after))
    labels = ["--label", f"a/{edit.header}", "--label", f"b/{edit.header}"]
    made = subprocess.run(
        ["diff", "-u", *labels, folder / "old", folder / "new"], capture_output=True, check=False
    )
    out = folder / "header.patch"
    out.write_bytes(made.stdout)
    return out


def compiled_units(target: Target, said: str) -> tuple[Unit, ...]:
    """The units that a run compiled, from the command lines that it showed with ``--debug``."""
    sources = set()
    for line in said.splitlines():
        _, mark, rest = line.partition(" && ")
        argv = shlex.split(rest) if mark else []
        if "-c" in argv and "-o" in argv:
            sources.add(argv[-1])
    units = kbuild.unit_map(target)
    return tuple(unit for source in sorted(sources) for unit in units.units(source))


def compile_twice(config: Config, target: Target, units: tuple[Unit, ...]) -> float:
    """Seconds of compiler and objtool for two objects of every unit, at most ``config.jobs`` at once."""
    commands = kbuild.commands(target, units)
    with TemporaryDirectory(prefix="kmend-bench-") as name:

        def one(job: tuple[int, Unit]) -> None:
            compiling.compile_unit(
                target,
                job[1],
                commands[job[1]],
                tree=target.source,
                out=Path(name) / str(job[0]),
                extra_flags=compiling.SPLIT_WITH_TYPES,
            )

        start = perf_counter()
        with ThreadPoolExecutor(max_workers=config.jobs) as pool:
            list(pool.map(one, [(run, unit) for unit in units for run in range(2)]))
        return perf_counter() - start


def counted(seen: Watched, words: str) -> str:
    """What a line of progress says in front of ``words``."""
    found = [match[1] for _, line in seen.lines if (match := re.search(rf"([\d of]+) {words}", line))]
    return found[-1].strip() if found else "?"


def main() -> int:
    config = settings()
    target = target_of(config, CMDLINE.release)
    with cache_beside(config, target.release) as cache, TemporaryDirectory(prefix="kmend-bench-") as name:
        folder = Path(name)
        patch = patch_of(target, EDIT, folder)
        words = ("build", patch, "--kernel", target.release, "-o", folder, "-n", "header")
        # kbuild's commands are asked for once and kept: a first run that is not counted
        said = subprocess.run(
            command(*words, "--debug", "--json", cache=cache),
            capture_output=True,
            text=True,
            check=False,
            env=ENVIRONMENT,
        )
        report = json.loads(said.stdout)
        units = compiled_units(target, said.stderr)
        forget(cache / "objects")
        cold = watch(*words, cache=cache, statuses=(0, 1))
        base = compile_twice(config, target, units)
        warm = watch(*words, cache=cache, statuses=(0, 1))
    objects = report["objects"]
    functions = sum(len(row["functions"]) for row in objects)
    timings = ", ".join(f"{stage} {value:.1f}" for stage, value in report["timings"].items() if value >= 0.05)
    show(
        f"A change of {EDIT.header}: {len(units)} units compiled, before and after",
        ("", "seconds", "x compiling", "peak MB"),
        [
            ["merely compiling them", f"{base:.1f}", "", ""],
            ["  kmend build, cold", f"{cold.seconds:.1f}", f"{cold.seconds / base:.2f}", f"{cold.peak:.0f}"],
            ["  kmend build, warm", f"{warm.seconds:.1f}", f"{warm.seconds / base:.2f}", f"{warm.peak:.0f}"],
        ],
        [
            f"{counted(cold, 'units that may include')} units may include the header and see the change",
            f"result: {report['result']}; {functions} functions of {len(objects)} objects replaced"
            + "".join(f"; refused: {rule}" for rule in sorted({r["rule"] for r in report["refused"]})),
            f"of the first run, in seconds: {timings}",
            *(f"step: {step.seconds:6.1f} s  {step.text[:80]}" for step in cold.steps if step.seconds >= 0.5),
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
