"""How long `kmend try` takes to its verdict for the cmdline example: from a snapshot, and from a cold boot.

Seconds from the start of the command to the line that tells the verdict, seen from outside (Python's start
included) and as kmend counts them (from the start of the trial). Limits: 2 s from a snapshot, 8 s cold.
"""

from __future__ import annotations

import re
import sys
from tempfile import TemporaryDirectory

from measure import (
    CMDLINE,
    RUNS,
    Watched,
    cache_beside,
    disk,
    forget,
    kmend,
    middle,
    settings,
    show,
    spread,
    watch,
)

WARM_LIMIT, COLD_LIMIT = 2.0, 8.0


def verdict(seen: Watched) -> tuple[float, float]:
    """When the verdict was told: seconds from outside, seconds as kmend counts."""
    when, line = seen.said("verdict after")
    match = re.search(r"verdict after ([0-9.]+) s", line)
    return when, float(match[1]) if match else 0.0


def main() -> int:
    config = settings()
    with cache_beside(config, CMDLINE.release) as cache, TemporaryDirectory(prefix="kmend-bench-") as out:
        kmend("build", CMDLINE.patch, "--kernel", CMDLINE.release, "-o", out, cache=cache)
        words = ("try", f"{out}/{CMDLINE.module}.ko", "--run", CMDLINE.script)
        cold = []
        for _ in range(3):
            forget(cache / "lab")
            cold.append(watch(*words, cache=cache))
        warm = [watch(*words, cache=cache) for _ in range(RUNS)]
        snapshot = disk(cache / "lab")
    rows = []
    for label, runs, limit in (("from a snapshot", warm, WARM_LIMIT), ("cold boot", cold, COLD_LIMIT)):
        told = [verdict(run) for run in runs]
        rows.append(
            [
                label,
                spread([outside for outside, _ in told]),
                spread([inside for _, inside in told]),
                f"{middle([run.seconds for run in runs]):.2f}",
                f"{limit:.0f}",
            ]
        )
    guest = max(
        size for run in (*warm, *cold) for name, size in run.children.items() if name.startswith("qemu")
    )
    show(
        f"kmend try of the cmdline example (median of {RUNS}, cold of {len(cold)}; least-most)",
        ("", "verdict, s", "as kmend counts", "whole command", "limit"),
        rows,
        [f"QEMU at its largest: {guest:.0f} MB; the snapshot on the disk: {snapshot / 1e6:.0f} MB"],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
