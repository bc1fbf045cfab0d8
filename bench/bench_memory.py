"""What kmend takes of memory and disk, in every stage of the two examples.

kmend's own process (limit 400 MB) is told apart from its children: compilers, QEMU (the guest has 512 MB).
Peaks are the kernel's own high-water marks, set back at each step. The stages of fetching and preparing a
kernel are in bench_cold.py, which runs them. Limit of the disk: 3 GB for each target.
"""

from __future__ import annotations

import sys
from tempfile import TemporaryDirectory

from measure import (
    CMDLINE,
    EXT4,
    Example,
    Watched,
    cache_beside,
    disk,
    settings,
    show,
    target_of,
    watch,
)

OWN_LIMIT, DISK_LIMIT = 400, 3.0
#: What is shown of the children; others are small.
PROGRAMS = ("cc1", "as", "objtool", "make", "qemu-system-x86_64")


def measured(example: Example) -> list[tuple[str, Watched]]:
    """Every verb that the example needs, each in a cache that knows nothing of it yet."""
    config = settings()
    with cache_beside(config, example.release) as cache, TemporaryDirectory(prefix="kmend-bench-") as out:
        module = f"{out}/{example.module}.ko"
        runs = [
            ("build", ("build", example.patch, "--kernel", example.release, "-o", out)),
            ("build, again", ("build", example.patch, "--kernel", example.release, "-o", out)),
            ("check", ("check", module)),
            ("info", ("info", module)),
            ("try, cold", ("try", module, "--run", example.script)),
            ("try, snapshot", ("try", module, "--run", example.script)),
        ]
        return [(f"{example.name}: {label}", watch(*words, cache=cache)) for label, words in runs]


def main() -> int:
    rows = []
    notes = [f"limit of kmend's own process: {OWN_LIMIT} MB"]
    for example in (CMDLINE, EXT4):
        for label, run in measured(example):
            sizes = [run.children.get(name, 0.0) for name in PROGRAMS]
            rows.append([label, f"{run.peak:.0f}", *(f"{size:.0f}" if size else "" for size in sizes)])
            if len(run.steps) > 1:
                rows += [[f"    {step.text[:60]}", f"{step.peak:.0f}"] for step in run.steps if step.peak]
    config = settings()
    for example in (CMDLINE, EXT4):
        size = disk(target_of(config, example.release).folder)
        notes.append(f"disk taken by {example.release}: {size / 1e9:.2f} GB (limit {DISK_LIMIT:.0f} GB)")
    width = 2 + len(PROGRAMS)
    show(
        "Peak memory in MB: kmend's own process, and the largest child of each program",
        ("", "kmend", *(name.removesuffix("-system-x86_64") for name in PROGRAMS)),
        [[*row, *[""] * (width - len(row))] for row in rows],
        notes,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
