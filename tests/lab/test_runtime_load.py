"""kmend acts on the kernel that it runs on: in guests of stock kernels, as root, with real modules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bank
import inside
import pytest

from kmend.core.config import Config
from kmend.core.target import Target
from kmend.lab.guest import Guest
from kmend.lab.kernel import LabKernel

pytestmark = [pytest.mark.lab, pytest.mark.target]

MOUNTS = """
cd /sys/kernel
mountpoint -q debug || mount -t debugfs debugfs debug
mountpoint -q tracing || mount -t tracefs tracefs tracing
mountpoint -q security || mount -t securityfs securityfs security
"""


@pytest.fixture(scope="module")
def modules(target_55: Target, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return bank.build(target_55, tmp_path_factory.mktemp("bank"))


def made(guest: Guest, modules: dict[str, Path]) -> Guest:
    inside.settle(guest)
    for name, path in modules.items():
        guest.put(f"/root/{name}.ko", path.read_bytes())
    guest.run(MOUNTS, check=True)
    return guest


@pytest.fixture(scope="module")
def guest(kernel_55: LabKernel, modules: dict[str, Path], config: Config) -> Iterator[Guest]:
    """One guest for all tests that leave it as it was."""
    with Guest.of(kernel_55, config.lab) as running:
        yield made(running, modules)


@pytest.fixture
def fresh(kernel_55: LabKernel, modules: dict[str, Path], config: Config) -> Iterator[Guest]:
    with Guest.of(kernel_55, config.lab) as running:
        yield made(running, modules)


CLEAN = """
for d in /sys/kernel/livepatch/*/; do
    [ -d $d ] || continue
    n=$(basename $d); echo 0 >$d/enabled; while [ -d $d ]; do usleep 100000; done
done
for m in $(grep -l K /sys/module/*/taint); do rmmod $(basename $(dirname $m)); done
for m in probe sleeper; do [ ! -d /sys/module/$m ] || rmmod $m; done
killall sleep 2>/dev/null; true
"""


@pytest.fixture(autouse=True)
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """One test's failure is not the next one's."""
    yield
    if "guest" in request.fixturenames:
        request.getfixturevalue("guest").run(CLEAN, timeout=120)


def act(guest: Guest, *words: str) -> dict[str, Any]:
    """An acting verb; the first of its actions, with the exit status."""
    found = inside.answer(guest, *words)
    if "actions" not in found:  # it did not come as far as that
        return found
    return {**found["actions"][0], "status": found["status"], "all": found["actions"]}


def rules(found: dict[str, Any]) -> list[str]:
    return [row["rule"] for row in found["refused"]]


def nothing_is_left(guest: Guest) -> None:
    assert (
        guest.run("ls /sys/kernel/livepatch; cut -d' ' -f1 /proc/modules | grep -xE 'one|other|all_new'").text
        == ""
    )


def test_a_patch_is_loaded_shown_and_taken_back(guest: Guest) -> None:
    stock = guest.run("cat /proc/cmdline").text
    found = act(guest, "load", "/root/one.ko")
    assert (found["status"], found["result"]) == (0, "done")
    assert guest.run("cat /proc/cmdline").text == "patched"
    status = inside.answer(guest, "status")
    assert [(row["name"], row["phase"], row["order"]) for row in status["patches"]] == [("one", "enabled", 1)]
    assert status["patches"][0]["objects"] == [
        {
            "name": "vmlinux",
            "patched": True,
            "functions": [{"name": "cmdline_proc_show", "sympos": 1, "shadowed_by": None}],
        }
    ]
    assert {flag["letter"] for flag in status["kernel"]["taint_flags"]} >= {"K", "O"}
    twice = act(guest, "load", "/root/one.ko")
    assert (twice["status"], rules(twice)) == (1, ["already-loaded"])
    assert act(guest, "unload", "one")["status"] == 0
    assert guest.run("cat /proc/cmdline").text == stock
    nothing_is_left(guest)
    text = inside.ask(guest, "log").text
    assert text.index("load one: from /root/one.ko, by root") < text.index("'one': patching complete")
    assert "'one': unpatching complete" in text  # may be over before kmend has written down what it did
    assert text.index("disabled it") < text.index("unloaded its module")
    assert "unload one: one is taken back and unloaded [done]" in text


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("unknown", "old-function"),
        ("several", "ambiguous-symbol"),
        ("nowhere", "old-function"),
        ("notrace", "no-ftrace-entry"),
        ("twice", "function-twice"),
        ("refusing", "pre-patch-callback"),
    ],
)
def test_what_the_kernel_refuses_is_named_and_leaves_nothing(guest: Guest, name: str, rule: str) -> None:
    found = act(guest, "load", f"/root/{name}.ko")
    assert (found["status"], found["result"], rules(found)) == (1, "refused", [rule])
    assert guest.run(f"ls /sys/kernel/livepatch; ls -d /sys/module/{name}").text == ""


def test_what_is_no_livepatch_for_this_kernel_is_not_even_given_to_it(guest: Guest) -> None:
    found = inside.answer(guest, "load", "/root/unmarked.ko")
    assert (found["status"], rules(found)) == (2, ["not-a-livepatch"])
    guest.run("sed s/6.1.0-55-amd64/6.1.0-54-amd64/ /root/one.ko >/root/wrong.ko", check=True)
    wrong = act(guest, "load", "/root/wrong.ko")
    assert (wrong["status"], rules(wrong)) == (1, ["vermagic"])
    found = inside.answer(guest, "load", "/root/absent.ko")
    assert (found["status"], rules(found)) == (1, ["unreadable"])
    nothing_is_left(guest)


def test_who_else_changes_where_a_function_goes_is_named(guest: Guest) -> None:
    guest.run("/usr/sbin/insmod /root/probe.ko", check=True)
    found = act(guest, "load", "/root/one.ko")
    assert (found["status"], rules(found)) == (1, ["ftrace-conflict"])
    guest.run("rmmod probe; echo 0 >/proc/sys/kernel/ftrace_enabled", check=True)
    found = act(guest, "load", "/root/one.ko")
    assert (found["status"], rules(found)) == (1, ["ftrace-off"])
    guest.run("echo 1 >/proc/sys/kernel/ftrace_enabled", check=True)
    nothing_is_left(guest)


def test_a_cumulative_patch_replaces_and_what_it_replaced_is_unloaded(guest: Guest) -> None:
    two = inside.answer(guest, "load", "/root/one.ko", "/root/other.ko")
    assert [row["result"] for row in two["actions"]] == ["done", "done"]
    found = act(guest, "load", "/root/all_new.ko")
    assert (found["status"], found["replaced"]) == (0, ["one", "other"])
    assert sorted(found["removed"]) == ["one", "other"]
    names = [row["name"] for row in inside.answer(guest, "list")["patches"]]
    assert names == ["all_new"]
    assert "cumulative" in guest.run("cat /proc/version").text
    assert inside.answer(guest, "unload", "--all")["result"] == "done"
    nothing_is_left(guest)


@pytest.mark.slow
def test_sleepers_are_woken_and_do_not_notice(guest: Guest) -> None:
    """16 s by the kernel alone: its first signals come with the 15th retry."""
    guest.put(
        "/root/sleeper.sh",
        b"#!/bin/sh\nfor i in 1 2 3 4 5 6 7 8; do (/usr/bin/sleep 1000; echo $? >>/root/ended) & done\n",
        0o755,
    )
    guest.run("rm -f /root/ended; /root/sleeper.sh; usleep 500000")
    found = act(guest, "load", "/root/naps.ko")
    assert found["status"] == 0, found
    (transition,) = found["transitions"]
    assert transition["end"] == "complete"
    assert transition["seconds"] < 14
    assert len(transition["woken"]) >= 8
    asleep = [row for row in transition["at_first"]["blockers"] if row["name"] == "sleep"]
    assert len(asleep) == 8
    assert {(row["cause"], row["function"], row["wakeable"]) for row in asleep} == {
        ("in-function", "hrtimer_nanosleep", True)
    }
    assert asleep[0]["stack"][0].startswith("hrtimer_nanosleep+")
    assert guest.run("cat /root/ended").text == ""  # restart_syscall() does not enter the patched function
    guest.run("killall sleep")
    assert act(guest, "unload", "naps")["status"] == 0


@pytest.mark.slow
def test_what_cannot_be_woken_is_explained_and_the_patch_taken_back(guest: Guest) -> None:
    guest.run("/usr/sbin/insmod /root/sleeper.ko", check=True)
    found = act(guest, "load", "/root/kthread.ko", "--wait", "3")
    assert (found["status"], found["result"], rules(found)) == (1, "reversed", ["transition-stalled"])
    assert "kernel thread" in found["refused"][0]["why"]
    assert "kmend-sleeper" in found["refused"][0]["why"]
    assert found["removed"] == ["kthread"]
    assert guest.run("ls /sys/kernel/livepatch; ls -d /sys/module/kthread").text == ""
    guest.run("rmmod sleeper", check=True)


@pytest.mark.slow
def test_a_patch_that_cannot_be_taken_back_stays_in_force(guest: Guest) -> None:
    assert act(guest, "load", "/root/sleepy.ko")["status"] == 0
    guest.run("cat /proc/cmdline >/root/slept & usleep 300000")
    found = act(guest, "unload", "sleepy", "--wait", "2")
    assert (found["status"], found["result"]) == (1, "reversed")
    assert "sleeps uninterruptibly" in found["refused"][0]["why"]
    assert inside.answer(guest, "list")["patches"][0]["phase"] == "enabled"
    found = act(guest, "unload", "sleepy", "--wait", "60")
    assert found["status"] == 0
    assert guest.run("cat /root/slept").text == "sleepy"


@pytest.mark.slow
def test_disable_enable_and_what_a_hand_did_in_between(guest: Guest) -> None:
    assert act(guest, "load", "/root/one.ko")["status"] == 0
    found = act(guest, "disable", "one")
    assert (found["status"], found["removed"]) == (0, [])
    left = inside.answer(guest, "list")["left"]
    assert [(row["name"], row["phase"]) for row in left] == [("one", "left behind")]
    again = act(guest, "enable", "one")
    assert (again["status"], rules(again)) == (1, ["not-enabled-again"])
    assert "kmend load /root/one.ko" in again["refused"][0]["next_step"]
    assert act(guest, "load", "/root/one.ko")["status"] == 0  # removes what is left first
    guest.run("echo 0 >/sys/kernel/livepatch/one/enabled; sleep 2; rmmod one", check=True)
    found = inside.answer(guest, "unload", "one")
    assert (found["status"], rules(found)) == (2, ["unknown-patch"])
    nothing_is_left(guest)


@pytest.mark.slow
def test_force_wants_to_be_confirmed_and_is_remembered(guest: Guest) -> None:
    guest.run("/usr/sbin/insmod /root/sleeper.ko", check=True)
    act(guest, "load", "/root/kthread.ko", "--no-wait")
    found = act(guest, "force", "kthread")
    assert (found["status"], rules(found)) == (1, ["not-confirmed"])
    assert "work()" in found["refused"][0]["what"]
    found = act(guest, "force", "kthread", "--yes-i-know")
    assert (found["status"], found["result"]) == (0, "done")
    (patch,) = inside.answer(guest, "status")["patches"]
    assert (patch["phase"], patch["forced"]) == ("enabled", True)
    assert act(guest, "unload", "kthread")["status"] == 0
    guest.run("rmmod sleeper", check=True)


@pytest.mark.slow
def test_a_killed_kmend_leaves_what_the_next_one_understands(guest: Guest) -> None:
    guest.run("/usr/sbin/insmod /root/sleeper.ko", check=True)
    guest.run(
        "kmend load /root/kthread.ko --wait 600 >/root/out 2>&1 & \n"
        "until grep -q 1 /sys/kernel/livepatch/kthread/transition 2>/dev/null; do usleep 100000; done\n"
        "usleep 700000; for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline | grep -q 'load /root/kthread' "
        "&& kill -9 ${p#/proc/}; done; true",
        timeout=120,
    )
    status = inside.answer(guest, "status")
    assert [(row["verb"], row["patch"]) for row in status["unfinished"]] == [("load", "kthread")]
    assert not status["acting"]
    assert "an action did not end: `kmend load kthread`" in inside.ask(guest, "status").text
    found = act(guest, "load", "/root/kthread.ko", "--wait", "3")  # goes on, and stalls in its turn
    assert (found["result"], found["removed"]) == ("reversed", ["kthread"])
    status = inside.answer(guest, "status")
    assert (status["unfinished"], status["patches"], status["left"]) == ([], [], [])
    guest.run("rmmod sleeper", check=True)


@pytest.mark.slow
def test_the_kernels_complaints_meanwhile_are_told(guest: Guest) -> None:
    found = act(guest, "load", "/root/warning.ko")
    assert found["status"] == 0
    assert [row["rule"] for row in found["warnings"]] == ["kernel-complained"]
    assert "kmend test" in str(found["warnings"]) or "warn+" in str(found["warnings"])
    assert act(guest, "unload", "warning")["status"] == 0


@pytest.mark.slow
def test_only_root_acts_and_anybody_may_look(guest: Guest) -> None:
    guest.run("chmod 711 /root; cp /root/one.ko /tmp", check=True)
    found = guest.run("/usr/bin/setpriv --reuid 65534 --clear-groups kmend load /tmp/one.ko")
    assert (found.status, "needs root" in found.errors) == (3, True)
    seen = guest.run("/usr/bin/setpriv --reuid 65534 --clear-groups kmend status")
    assert (seen.status, "no livepatch is loaded" in seen.text) == (0, True)


@pytest.mark.slow
def test_signed_modules_only(fresh: Guest) -> None:
    fresh.run("echo 1 >/sys/module/module/parameters/sig_enforce", check=True)
    found = act(fresh, "load", "/root/one.ko")
    assert (found["status"], rules(found)) == (1, ["unsigned"])


@pytest.mark.slow
def test_lockdown(fresh: Guest) -> None:
    fresh.run("echo integrity >/sys/kernel/security/lockdown", check=True)
    found = act(fresh, "load", "/root/one.ko")
    assert (found["status"], rules(found)) == (1, ["lockdown"])
    nothing_is_left(fresh)


@pytest.mark.slow
def test_no_more_modules(fresh: Guest) -> None:
    fresh.run("echo 1 >/proc/sys/kernel/modules_disabled", check=True)
    found = act(fresh, "load", "/root/one.ko")
    assert (found["status"], rules(found)) == (1, ["modules-disabled"])


@pytest.mark.slow
def test_the_later_line_of_kernels(target_612: Target, config: Config, tmp_path: Path) -> None:
    """6.12 shows `replace`; the rest is the same life."""
    built = bank.build(target_612, tmp_path)
    with Guest.of(LabKernel.of(target_612), config.lab) as running:
        guest = made(running, built)
        assert act(guest, "load", "/root/one.ko")["status"] == 0
        assert inside.answer(guest, "list")["patches"][0]["replace"] is False
        guest.run("/usr/bin/sleep 1000 & /usr/bin/sleep 1000 & usleep 300000")
        found = act(guest, "load", "/root/naps.ko")
        assert found["status"] == 0, found
        assert len(found["transitions"][0]["woken"]) == 2
        found = act(guest, "load", "/root/all_new.ko")
        assert (found["status"], sorted(found["removed"])) == (0, ["naps", "one"])
        assert inside.answer(guest, "list")["patches"][0]["replace"] is True
        assert inside.answer(guest, "unload", "--all")["result"] == "done"
        assert guest.run("ls /sys/kernel/livepatch").text == ""
