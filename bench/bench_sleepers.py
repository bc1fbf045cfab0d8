"""How long a transition takes with 77 kinds of system calls asleep in what is patched, and what they return.

    .venv/bin/python bench/bench_sleepers.py [RUNS] [RELEASE...]      (default: 5 runs, 6.1 and 6.12)

Boots each kernel, with a patch of 41 functions built by kmend (tests/lab/programs/sleepers-*.patch).
Once undisturbed; then RUNS times by the kernel alone (`--no-wake`: its own signals come with the 15th
retry) and with kmend's waking, in turn; patching and unpatching each, every time with fresh sleepers.
Seconds are the kernel log's, "starting" to "complete"; for unpatching also when no task was left any more,
as what follows is the kernel's waiting for grace periods of RCU-tasks, which nothing shortens. That timeouts
are kept is looked at in the first run of each kind; in the others a call that still sleeps at the end is
left out.

Ends with status 1 when kmend changes a call's result that the kernel's own signalling leaves alone, and when
the medians of patching are not what was wanted: 2 s at most with kmend, 15 s or more by the kernel alone.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/lab"))

import sleeping  # noqa: E402 - the path above makes it importable
from sleeping import Ended  # noqa: E402 - as above

from kmend.core.target import Release  # noqa: E402 - as above
from kmend.lab.guest import Guest  # noqa: E402 - as above
from measure import settings, show, spread, target_of  # noqa: E402 - as above

RELEASES = ("6.1.0-56-amd64", "6.12.117+deb12-amd64")
#: Calls with a timeout sleep so long: checks, loading and 17 s of transition must be over by then.
SECONDS = {"load": 90, "unload": 50}
VERBS = ("load", "unload")
#: Who ends a transition, with the flags that leave it to them.
SIDES = {"kernel": ("--no-wake", "--wait", "120"), "kmend": ()}
#: Seconds that the median of patching may take with kmend, and has to take by the kernel alone (which shows
#: that something held it up).
FAST, SLOW = 2.0, 15.0
WORDS = {"load": "/root/sleepers.ko", "unload": "sleepers"}

Results = dict[str, Ended]


class Kernel:
    """The measurements of one kernel."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.seconds: dict[tuple[str, str], list[float]] = {}
        self.tasks: dict[tuple[str, str], list[float]] = {}
        self.results: dict[tuple[str, str], list[Results]] = {}

    def undisturbed(self) -> Results:
        """What the calls return when nothing happens."""
        return sleeping.asleep(self.guest, 20).release()

    def transition(self, who: str, verb: str, *flags: str) -> None:
        """Fresh sleepers, one transition, and how they end."""
        sleepers = sleeping.asleep(self.guest, SECONDS[verb])
        action = sleeping.act(self.guest, verb, WORDS[verb], *flags)
        if action["result"] != "done":
            sys.exit(f"{verb} by {who}: {action['result']}: {action['why']}\n{action['refused']}")
        key = (who, verb)
        self.seconds.setdefault(key, []).append(sleeping.seconds_of_last(self.guest))
        self.tasks.setdefault(key, []).append(sleeping.seconds_of_tasks(action))
        runs = self.results.setdefault(key, [])
        runs.append(sleepers.release(hurry=bool(runs)))
        took, tasks = self.seconds[key][-1], self.tasks[key][-1]
        print(f"  {verb} by {who}: {took:.2f} s, no task left after {tasks:.2f} s", flush=True)


def outcomes(rows: list[Results], name: str) -> str:
    """What a call returned in all runs; several outcomes with how often."""
    found = Counter(row[name].outcome for row in rows if row[name].returned != "asleep")
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{text} ({number})" for text, number in found.most_common())


def report(release: str, runs: int, stock: Results, kernel: Kernel) -> bool:
    """Print both tables; whether all is as wanted: what calls return, and the medians of patching."""
    rows = []
    for verb in VERBS:
        for who in SIDES:
            times, tasks = kernel.seconds[who, verb], kernel.tasks[who, verb]
            word = "patching" if verb == "load" else "unpatching"
            rows.append([f"{word}, {who}", str(len(times)), spread(times), spread(tasks)])
    show(
        f"{release}: {len(stock)} kinds of sleepers in 41 patched functions (median; least-most)",
        ("", "runs", "transition, s", "until no task was left, s"),
        rows,
    )
    table, worse = [], []
    for name in stock:
        seen = {
            who: outcomes([*kernel.results[who, "load"], *kernel.results[who, "unload"]], name)
            for who in SIDES
        }
        plain = stock[name].outcome
        if {plain} != set(seen.values()):
            table.append([name, plain, seen["kernel"], seen["kmend"]])
        if seen["kernel"] == plain != seen["kmend"]:
            worse.append(name)
    same = len(stock) - len(table)
    show(
        f"{release}: what the calls return, where it is not always the same",
        ("call", "undisturbed", "kernel's own signal", "kmend"),
        table,
        [
            f"{same} other kinds return the same in all {4 * runs} transitions, and their timeouts hold",
            f"changed by kmend and not by the kernel: {', '.join(worse) or 'none'}",
        ],
    )
    alone, woken = (median(kernel.seconds[who, "load"]) for who in SIDES)
    print(
        f"patching, medians: {woken:.2f} s with kmend (wanted: {FAST:.0f} s at most), "
        f"{alone:.2f} s by the kernel alone (wanted: {SLOW:.0f} s at least)"
    )
    return not worse and woken <= FAST and alone >= SLOW


def main() -> int:
    """Each kernel in turn."""
    words = sys.argv[1:]
    runs = int(words.pop(0)) if words and words[0].isdigit() else 5
    config, good = settings(), True
    for release in words or RELEASES:
        with sleeping.prepared(target_of(config, Release(release)), config) as guest:
            kernel = Kernel(guest)
            stock = kernel.undisturbed()
            for _ in range(runs):
                for who, flags in SIDES.items():
                    for verb in VERBS:
                        kernel.transition(who, verb, *flags)
            complaints = [row.text for row in guest.dmesg() if row.level < 4 and not row.livepatch]
        good &= report(release, runs, stock, kernel)
        print(f"kernel log, worse than a warning: {complaints or 'nothing'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
