"""Where the seconds of a transition go that kmend brings to its end: the kernel's own functions, traced.

    .venv/bin/python bench/bench_transition.py [RUNS] [RELEASE...]      (default: 5 runs, 6.1 and 6.12)

The sleepers and the patch of bench_sleepers.py, loaded with ftrace's function tracer on three functions of
kernel/livepatch/transition.c. The kernel retries when a second is over, rounded to full seconds of its own
(``round_jiffies_relative(HZ)``): 0.75 to 1.75 s after the first attempt. Since 6.4 it then changes each
call of ``cond_resched()`` back, and each of ``preempt_schedule()`` to and fro (``__sched_dynamic_update()``,
kernel/sched/core.c), before patching counts as complete: some thousand places in the kernel's code, 0.5 to
0.9 s in an emulated machine that does nothing else.
The log's clock is not the tracer's: no time is taken between the two.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/lab"))

import sleeping  # noqa: E402 - the path above makes it importable

from kmend.core.target import Release  # noqa: E402 - as above
from kmend.lab.guest import Guest  # noqa: E402 - as above
from measure import settings, show, spread, target_of  # noqa: E402 - as above

RELEASES = ("6.1.0-56-amd64", "6.12.117+deb12-amd64")
ATTEMPT, RETRY, END = "klp_try_complete_transition", "klp_transition_work_fn", "klp_complete_transition"
TRACING = f"""
cd /sys/kernel/tracing
echo {ATTEMPT} {RETRY} {END} >set_ftrace_filter
[ $(wc -l <set_ftrace_filter) = 3 ] || {{ cat set_ftrace_filter; exit 1; }}
echo local >trace_clock
echo function >current_tracer
"""
_CALL = re.compile(r" (\d+\.\d+): (\w+) <-")


@dataclass(frozen=True, slots=True)
class Times:
    """Of one transition, in seconds.

    ``free``: from kmend's first look until it saw no task left; ``retry``: from the kernel's first attempt to
    the retry that ended it; ``changing``: from there until :data:`END` is called; ``whole``: "starting" to
    "patching complete" in the kernel's log.
    """

    free: float
    retries: int
    retry: float
    changing: float
    whole: float


def transition(guest: Guest) -> Times:
    """Load over fresh sleepers, and unload again."""
    sleepers = sleeping.asleep(guest, 90)
    guest.run("echo >/sys/kernel/tracing/trace", check=True)
    action = sleeping.act(guest, "load", "/root/sleepers.ko")
    if action["result"] != "done":
        sys.exit(f"load: {action['result']}: {action['why']}")
    calls = [(float(at), name) for at, name in _CALL.findall(guest.run("cat /sys/kernel/tracing/trace").text)]
    whole = sleeping.seconds_of_last(guest)
    began = calls[0][0]
    retries = [at for at, name in calls if name == RETRY]
    ended = next(at for at, name in calls if name == END)
    free = sleeping.seconds_of_tasks(action)
    sleepers.release(hurry=True)
    if sleeping.act(guest, "unload", "sleepers")["result"] != "done":
        sys.exit("it cannot be unloaded")
    last = max((at for at in retries if at < ended), default=began)
    return Times(free, len(retries), last - began, ended - last, whole)


def main() -> int:
    """Each kernel in turn."""
    words = sys.argv[1:]
    runs = int(words.pop(0)) if words and words[0].isdigit() else 5
    config, rows = settings(), []
    for release in words or RELEASES:
        with sleeping.prepared(target_of(config, Release(release)), config) as guest:
            guest.run(TRACING, check=True)
            found = [transition(guest) for _ in range(runs)]
        columns = (
            [row.free for row in found],
            [row.retry for row in found],
            [row.changing for row in found],
            [row.whole for row in found],
        )
        many = sorted({row.retries for row in found})
        rows.append([release, str(runs), *map(spread, columns), ", ".join(map(str, many))])
    show(
        "Patching 77 kinds of sleepers with kmend, in seconds (median; least-most)",
        ("", "runs", "no task left", "the retry that ends it", "cond_resched() back", "all", "retries"),
        rows,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
