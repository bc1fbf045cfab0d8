"""What `kmend blockers` costs with 5,000 threads asleep in a patched function, and how they are woken.

    .venv/bin/python bench/bench_blockers.py [THREADS] [RELEASE...]      (default: 5000, 6.1 and 6.12)

In a guest of each kernel. Seconds and memory are those of `kmend blockers --json`, Python's start included;
then the patch is taken back and loaded over fresh threads: seconds until the last of them has switched, and
how many kmend has woken. In a slow guest the kernel's own signals, after 15 s, come before the last one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/lab"))

import inside  # noqa: E402 - the path above makes it importable
import sleeping  # noqa: E402 - as above
import waiting  # noqa: E402 - as above

from kmend.core.target import Release  # noqa: E402 - as above
from kmend.lab.guest import Guest  # noqa: E402 - as above
from kmend.lab.kernel import LabKernel  # noqa: E402 - as above
from measure import settings, show, target_of  # noqa: E402 - as above

RELEASES = ("6.1.0-56-amd64", "6.12.117+deb12-amd64")
#: MB that `kmend blockers` may take.
LIMIT = 100


def main() -> int:
    """Each kernel in turn."""
    words = sys.argv[1:]
    number = int(words.pop(0)) if words and words[0].isdigit() else 5000
    config, rows, good = settings(), [], True
    with tempfile.TemporaryDirectory(prefix="kmend-bench-blockers-") as scratch:
        program = sleeping.compiled("idle", Path(scratch))
        for release in words or RELEASES:
            target = target_of(config, Release(release))
            module = sleeping.built(target, "blockers", Path(scratch) / release)
            with Guest.of(LabKernel.of(target), config.lab) as guest:
                inside.settle(guest)
                waiting.settle(guest, program, {"blockers": module})
                waiting.many(guest, number)
                sleeping.act(guest, "load", "/root/blockers.ko", "--no-wait")
                seen, seconds, memory = waiting.cost(guest)
                sleeping.act(guest, "unload", "blockers")
                guest.run("killall -9 idle; sleep 1")
                waiting.many(guest, number)
                action = sleeping.act(guest, "load", "/root/blockers.ko")
                (transition,) = action["transitions"]
                good &= memory < LIMIT and action["result"] == "done" and seen["left"] >= number
                rows.append(
                    [
                        release,
                        str(seen["left"]),
                        str(len(seen["blockers"])),
                        f"{seconds:.1f}",
                        f"{memory:.0f}",
                        f"{transition['seconds']:.1f}",
                        str(len(transition["woken"])),
                    ]
                )
    show(
        f"kmend blockers --json, {number} threads asleep in a patched function",
        ("kernel", "tasks left", "read in full", "s", "MB", "woken and switched, s", "woken"),
        rows,
        [f"limit of memory: {LIMIT} MB"],
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
