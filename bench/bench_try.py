"""How long `kmend try` takes to its verdict, warm and cold, and what a guest costs in memory.

Wall seconds are counted from the start of the command, Python included, on this machine as it is: let it be
idle. Limits: verdict within 2 s from a snapshot, within 8 s from a cold boot; a guest of 512 MB.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from kmend.core.config import load
from kmend.core.progress import Silent
from kmend.core.target import Release
from kmend.kernel.store import fetch

RELEASE = Release("6.1.0-56-amd64")
EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS = 5
WARM_LIMIT, COLD_LIMIT, GUEST_LIMIT = 2.0, 8.0, 512.0


@dataclass(frozen=True, slots=True)
class Measured:
    """``verdict`` and ``total`` in seconds, ``guest`` the largest QEMU's peak in MB."""

    verdict: float
    total: float
    guest: float


def kmend(*words: str, cache: Path) -> Measured:
    start = perf_counter()
    verdict, guest = 0.0, 0.0
    argv = [sys.executable, "-m", "kmend", *words, "--cache", str(cache)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if "verdict after" in line:
                verdict = perf_counter() - start
                guest = max(map(peak, guests_of(child.pid)), default=0.0)
        if child.wait() != 0:
            sys.exit(f"kmend {' '.join(words)} ended with status {child.returncode}")
    return Measured(verdict, perf_counter() - start, guest)


def guests_of(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def peak(pid: int) -> float:
    """Peak of a process's own and shared memory, in MB."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


def main() -> int:
    config = load()
    fetch(config, RELEASE, Silent())
    with tempfile.TemporaryDirectory(prefix="kmend-bench-") as name:
        folder = Path(name)
        kmend("build", str(EXAMPLES / "cmdline.patch"), "--kernel", RELEASE, "-o", name, cache=config.cache)
        words = ("try", str(folder / "kmend_cmdline.ko"), "--run", str(EXAMPLES / "cmdline-check.sh"))
        empty = folder / "cache"  # prepared kernels, but no snapshot, and no answer about KVM
        empty.mkdir()
        (empty / "targets").symlink_to(config.targets)
        cold = kmend(*words, cache=empty)
        disk = sum(file.stat().st_blocks * 512 for file in (empty / "lab").rglob("*")) / 1e6
        warm = [kmend(*words, cache=empty) for _ in range(RUNS)]
    verdict = median(run.verdict for run in warm)
    guest = max(run.guest for run in (cold, *warm))
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    rows = (
        ("verdict, warm (median)", verdict, WARM_LIMIT, "s"),
        ("verdict, cold boot", cold.verdict, COLD_LIMIT, "s"),
        ("guest's peak memory", guest, GUEST_LIMIT, "MB"),
    )
    for what, value, limit, unit in rows:
        print(f"{what:24} {value:8.2f} {unit:2}  limit {limit:g}  {'ok' if value <= limit else 'OVER'}")
    print(f"{'whole command, warm':24} {median(run.total for run in warm):8.2f} s")
    print(f"{'snapshot on disk':24} {disk:8.0f} MB")
    return 0 if all(value <= limit for _, value, limit, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
