"""System calls asleep in what is patched: woken at once, and none returns what it would not without kmend.

The table of all that they return, and the times: bench/bench_sleepers.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sleeping
from sleeping import RINGS, Ended

from kmend.core.config import Config
from kmend.core.run import run
from kmend.core.target import Target
from kmend.lab.guest import Guest
from kmend.lab.kernel import LabKernel

pytestmark = [pytest.mark.lab, pytest.mark.target, pytest.mark.slow, pytest.mark.timeout(1800)]

#: The kernel's own signals come with the 15th retry.
ALONE, WOKEN = 14.0, 8.0
EINTR = 4
#: What returns early under the kernel's own signals, and under kmend: these calls have a timeout, or have
#: done a part of their work.
EARLY = {
    "epoll_wait-timeout": "errno 4",
    "epoll_pwait2-timeout": "errno 4",
    "unix-recv-timeout": "errno 4",
    "unix-send-timeout": "errno 4",
    "tcp-recv-timeout": "errno 4",
    "tcp-accept-timeout": "errno 4",
    "udp-recv-timeout": "errno 4",
    "semtimedop": "errno 4",
    "sigtimedwait": "errno 4",
    "io_getevents-timeout": "errno 4",
    "pipe-write-part": "65536",
    "unix-send-part": "16256",
}


@pytest.fixture(scope="module", params=["target_56", "target_612"], ids=["6.1", "6.12"])
def machine(request: pytest.FixtureRequest, config: Config) -> Iterator[Guest]:
    target: Target = request.getfixturevalue(request.param)
    with sleeping.prepared(target, config) as running:
        yield running


def outcomes(rows: dict[str, Ended]) -> dict[str, str]:
    return {name: row.outcome for name, row in rows.items() if row.returned != "asleep"}


def test_no_call_returns_what_it_would_not_without_kmend(machine: Guest) -> None:
    plain = outcomes(sleeping.asleep(machine, 20).release())
    assert len(plain) >= 70
    sleepers = sleeping.asleep(machine, 90)
    action = sleeping.act(machine, "load", "/root/sleepers.ko", "--no-wake", "--wait", "120")
    assert action["result"] == "done", action
    assert sleeping.seconds_of_last(machine) > ALONE
    assert action["transitions"][0]["woken"] == []
    by_kernel = outcomes(sleepers.release(hurry=True))
    sleepers = sleeping.asleep(machine, 50)
    action = sleeping.act(machine, "unload", "sleepers")
    assert action["result"] == "done", action
    assert sleeping.seconds_of_tasks(action) < WOKEN
    back = outcomes(sleepers.release(hurry=True))
    sleepers = sleeping.asleep(machine, 90)
    action = sleeping.act(machine, "load", "/root/sleepers.ko")
    assert action["result"] == "done", action
    assert sleeping.seconds_of_last(machine) < WOKEN
    assert len(action["transitions"][0]["woken"]) >= len(plain) - 1  # a wait for a lease has a timeout
    woken = outcomes(sleepers.release())
    assert sleeping.act(machine, "unload", "sleepers")["result"] == "done"
    for name, expected in plain.items():
        if by_kernel.get(name, expected) == expected:
            assert woken[name] == expected, name
            assert back.get(name, expected) == expected, name
    assert {name: woken[name] for name in plain if woken[name] != plain[name]} == EARLY
    # the kernel's own signals are harder on those without a timeout
    assert {by_kernel[name] for name in ("epoll_wait", "semop", "sigwaitinfo")} == {f"errno {EINTR}"}


def test_io_uring_waits_without_a_timeout_are_freed_unseen(target_612: Target, config: Config) -> None:
    """On 6.12, where the function that waits can be patched; the kernel alone never gets there."""
    with sleeping.prepared(target_612, config, "io-uring") as guest:
        sleepers = sleeping.asleep(guest, 300, *RINGS)
        alone = sleeping.act(guest, "load", "/root/io_uring.ko", "--no-wake", "--wait", "22")
        assert (alone["status"], alone["result"]) == (1, "reversed")

        # what cannot be begun anew is named, left alone, and the patch taken back
        action = sleeping.act(guest, "load", "/root/io_uring.ko", "--wait", "6")
        assert (action["status"], action["result"]) == (1, "reversed")
        (refused,) = action["refused"]
        assert refused["rule"] == "transition-stalled"
        left = {row["tid"]: row for row in action["transitions"][0]["left"]["blockers"]}
        assert left.keys() == {sleepers.pids["io_uring-submit"], sleepers.pids["io_uring-timeout"]}
        assert {(row["cause"], row["function"]) for row in left.values()} == {("io-uring", "io_cqring_wait")}
        assert "--interrupt-io-uring" in refused["why"]
        freed = {sleepers.pids["io_uring"], sleepers.pids["io_uring-mask"]}
        assert freed <= set(action["transitions"][0]["woken"])
        assert guest.run("ls /sys/kernel/livepatch").text == ""

        action = sleeping.act(guest, "load", "/root/io_uring.ko", "--interrupt-io-uring")
        assert action["result"] == "done", action
        ended = sleepers.release(hurry=True)
        assert {name: (row.outcome, row.early) for name, row in ended.items()} == {
            "io_uring": ("0", False),
            "io_uring-mask": ("0", False),
            "io_uring-submit": ("1", True),
            "io_uring-timeout": (f"errno {EINTR}", True),
        }


def test_io_uring_on_the_older_line(target_56: Target, config: Config, tmp_path: Path) -> None:
    """On 6.1 the waits are in a patch's own code, and it is taken back."""
    (tmp_path / "timeout_patch.c").write_text((sleeping.PROGRAMS / "timeout-patch.c").read_text())
    (tmp_path / "Makefile").write_text("obj-m := timeout_patch.o\n")
    make = ("make", "-s", "-C", target_56.source, f"M={tmp_path}", f"CC={target_56.compiler}", "modules")
    run(make, timeout=300)
    with Guest.of(LabKernel.of(target_56), config.lab) as guest:
        sleeping.settle(guest, sleeping.compiled("sleepers", tmp_path))
        guest.put("/root/timeout_patch.ko", (tmp_path / "timeout_patch.ko").read_bytes())
        assert sleeping.act(guest, "load", "/root/timeout_patch.ko")["result"] == "done"
        sleepers = sleeping.asleep(guest, 300, *RINGS)
        action = sleeping.act(guest, "unload", "timeout_patch", "--wait", "6")
        assert (action["status"], action["result"]) == (1, "reversed")
        left = {row["tid"]: row for row in action["transitions"][0]["left"]["blockers"]}
        assert left.keys() == {sleepers.pids["io_uring-submit"], sleepers.pids["io_uring-timeout"]}
        assert {(row["cause"], row["function"]) for row in left.values()} == {("io-uring", "kmend_timeout")}
        guest.run(f"kill -9 {' '.join(str(pid) for pid in left)}; sleep 1", check=True)
        action = sleeping.act(guest, "unload", "timeout_patch")
        assert action["result"] == "done", action
        assert action["transitions"][0]["seconds"] < WOKEN
        ended = sleepers.release(hurry=True)
        assert {name: ended[name].outcome for name in RINGS[:2]} == {"io_uring": "0", "io_uring-mask": "0"}
        assert not any(ended[name].early for name in RINGS[:2])
