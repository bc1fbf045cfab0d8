"""A first build on an empty machine: download, verify, unpack, prepare, build; time, memory, disk.

The cache is a folder of its own beside the usual one and is removed afterwards; some 250 MB are downloaded.
Limits: 90 s on 2 processors, 400 MB for kmend's own process, 3 GB of disk for the target.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import EXT4, disk, settings, show, watch

TIME_LIMIT, OWN_LIMIT, DISK_LIMIT = 90, 400, 3.0


def main() -> int:
    beside = settings().cache.parent
    beside.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="kmend-bench-", dir=beside) as name:
        cache, out = Path(name) / "cache", Path(name) / "out"
        out.mkdir()
        run = watch("build", EXT4.patch, "--kernel", EXT4.release, "-o", out, cache=cache)
        target = disk(cache / "targets" / EXT4.release)
        whole = disk(cache)
        timings = json.loads((out / f"{EXT4.module}.json").read_text())["timings"]
    rows = [
        [step.text[:70], f"{step.seconds:.1f}", f"{step.peak:.0f}"]
        for step in run.steps
        if step.seconds >= 0.05
    ]
    rows.append(["the whole command", f"{run.seconds:.1f}", f"{run.peak:.0f}"])
    largest = sorted(run.children.items(), key=lambda item: -item[1])[:5]
    show(
        f"Cold build of {EXT4.patch.name} for {EXT4.release} in an empty cache",
        ("step", "seconds", "kmend's peak MB"),
        rows,
        [
            f"limits: {TIME_LIMIT} s for all, {OWN_LIMIT} MB, {DISK_LIMIT:.0f} GB for the target",
            f"disk taken by the target: {target / 1e9:.2f} GB (the whole cache: {whole / 1e9:.2f} GB)",
            "steps overlap (image and source are worked on at once); one is counted until the next is told",
            "kmend's own count: " + ", ".join(f"{stage} {value:.1f} s" for stage, value in timings.items()),
            "largest children, MB: " + ", ".join(f"{name} {size:.0f}" for name, size in largest),
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
