"""kmend acts on the kernel that it runs on: in guests of both stock kernels, as root, with real modules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bank
import pytest
from resident import Resident, first

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


@dataclass(frozen=True)
class Line:
    """A line of kernels: its modules, and one guest for all tests, with kmend in it."""

    release: str
    guest: Guest
    kmend: Resident

    def act(self, *words: str) -> dict[str, Any]:
        """An acting verb; the first of its actions, with the exit status."""
        return self.kmend.act(*words)

    def insert(self, file: str) -> dict[str, Any]:
        """Give a module to the kernel as kmend does, without any of kmend's checks before."""
        name = {"alien": "one"}.get(file, file)  # as the module names itself
        return dict(json.loads(self.kmend.run(INSERT.format(file=file, name=name)).text))


#: What stands between kmend's checks and its action is a race; the kernel's answer is provoked without it.
INSERT = """
import json, os
from kmend.core.errors import Refused
from kmend.runtime import act, klog
from kmend.runtime.place import Place
log = klog.KernelLog(Place(), new_only=True)
fd = act.open_module("/root/{file}.ko")
try:
    act.insert("{name}", fd, "", lambda: tuple(row.message for row in log.read()))
    print(json.dumps(dict(rule="", what="")))
except Refused as error:
    (row,) = error.refusals
    print(json.dumps(dict(rule=row.rule, what=row.what, why=row.why, next_step=row.next_step)))
os.close(fd)
"""
LINES = {"6.1": "target_55", "6.12": "target_612"}


def made(guest: Guest, modules: dict[str, Path], release: str) -> Line:
    kmend = Resident(guest)
    for name, path in modules.items():
        guest.put(f"/root/{name}.ko", path.read_bytes())
    other = release.replace("6.1.0-55", "6.1.0-54").replace("6.12.117", "6.12.116")
    guest.run(f"sed s/{release}/{other}/ /root/one.ko >/root/wrong.ko", check=True)
    # with MODVERSIONS the kernel itself does not look at the release (same_magic(), kernel/module/version.c)
    guest.run("sed 's/ mod_unload / mod_unlo4d /' /root/one.ko >/root/alien.ko", check=True)
    guest.run(MOUNTS, check=True)
    return Line(release, guest, kmend)


@pytest.fixture(scope="module", params=["6.1", pytest.param("6.12", marks=pytest.mark.slow)])
def line(
    request: pytest.FixtureRequest, config: Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Line]:
    """One guest of each line for all tests: each leaves it as it was, but for the last ones of this file."""
    target: Target = request.getfixturevalue(LINES[request.param])
    modules = bank.build(target, tmp_path_factory.mktemp("bank"))
    with Guest.of(LabKernel.of(target), config.lab) as running:
        yield made(running, modules, target.release)


CLEAN = """
for d in /sys/kernel/livepatch/*/; do
    [ -d $d ] || continue
    n=$(basename $d); echo 0 >$d/enabled; while [ -d $d ]; do usleep 100000; done
done
for m in $(grep -l K /sys/module/*/taint); do rmmod $(basename $(dirname $m)); done
for m in probe hook sleeper; do [ ! -d /sys/module/$m ] || rmmod $m; done
echo 1 >/proc/sys/kernel/ftrace_enabled
killall sleep 2>/dev/null; true
"""


@pytest.fixture(autouse=True)
def clean(line: Line) -> Iterator[None]:
    """One test's failure is not the next one's."""
    yield
    line.guest.run(CLEAN, timeout=120)


def rules(found: dict[str, Any]) -> list[str]:
    return [row["rule"] for row in found["refused"]]


#: Whatever a livepatch leaves: its folder, its module, its hand on a function.
LEFT = (
    "ls /sys/kernel/livepatch; grep -l K /sys/module/*/taint; cat /sys/kernel/tracing/enabled_functions; true"
)


def nothing_is_left(line: Line) -> None:
    assert line.guest.run(LEFT).text == ""


def test_a_patch_is_loaded_shown_and_taken_back(line: Line) -> None:
    stock = line.guest.run("cat /proc/cmdline").text
    found = line.act("load", "/root/one.ko")
    assert (found["status"], found["result"]) == (0, "done")
    assert line.guest.run("cat /proc/cmdline").text == "patched"
    status = line.kmend.answer("status")
    assert [(row["name"], row["phase"], row["order"]) for row in status["patches"]] == [("one", "enabled", 1)]
    assert status["patches"][0]["objects"] == [
        {
            "name": "vmlinux",
            "patched": True,
            "functions": [{"name": "cmdline_proc_show", "sympos": 1, "shadowed_by": None}],
        }
    ]
    assert {flag["letter"] for flag in status["kernel"]["taint_flags"]} >= {"K", "O"}
    twice = line.act("load", "/root/one.ko")
    assert (twice["status"], rules(twice)) == (1, ["already-loaded"])
    assert line.act("unload", "one")["status"] == 0
    assert line.guest.run("cat /proc/cmdline").text == stock
    nothing_is_left(line)
    text = line.kmend.ask("log").text
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
        ("huge", "out-of-memory"),
        ("wrong", "vermagic"),
    ],
)
def test_what_cannot_be_loaded_is_named_and_leaves_nothing(line: Line, name: str, rule: str) -> None:
    found = line.act("load", f"/root/{name}.ko")
    assert (found["status"], found["result"], rules(found)) == (1, "refused", [rule])
    (row,) = found["refused"]
    assert row["what"] and row["why"] and row["next_step"]
    assert line.guest.run(f"ls -d /sys/module/{name}").text == ""
    nothing_is_left(line)


def test_the_kernels_own_answers_are_understood(line: Line) -> None:
    """The same and more without kmend's checks before: what a race would let through."""
    stock = [
        ("unknown", "old-function"),
        ("several", "ambiguous-symbol"),
        ("nowhere", "old-function"),
        ("notrace", "no-ftrace-entry"),
        ("twice", "function-twice"),
        ("refusing", "pre-patch-callback"),
        ("huge", "out-of-memory"),
        ("alien", "vermagic"),
        ("unmarked", "not-a-livepatch"),
    ]
    for name, rule in stock:
        assert line.insert(name)["rule"] == rule, name
        nothing_is_left(line)
    for name in ("probe", "hook"):
        line.guest.run(f"/usr/sbin/insmod /root/{name}.ko", check=True)
        assert line.insert("one")["rule"] == "ftrace-conflict", name
        line.guest.run(f"rmmod {name}", check=True)
    line.guest.run("echo 0 >/proc/sys/kernel/ftrace_enabled", check=True)
    assert line.insert("one")["rule"] == "ftrace-conflict"
    line.guest.run("echo 1 >/proc/sys/kernel/ftrace_enabled", check=True)
    nothing_is_left(line)
    # the last, as it does not go away at once
    assert line.insert("one")["rule"] == ""
    assert line.insert("one")["rule"] == "already-loaded"
    assert line.act("unload", "one")["status"] == 0
    nothing_is_left(line)


def test_what_is_no_livepatch_is_not_even_given_to_the_kernel(line: Line) -> None:
    found = line.kmend.answer("load", "/root/unmarked.ko")
    assert (found["status"], rules(found)) == (2, ["not-a-livepatch"])
    found = line.kmend.answer("load", "/root/absent.ko")
    assert (found["status"], rules(found)) == (1, ["unreadable"])
    nothing_is_left(line)


@pytest.mark.parametrize("name", ["probe", "hook"])
def test_who_else_changes_where_a_function_goes_is_named(line: Line, name: str) -> None:
    line.guest.run(f"/usr/sbin/insmod /root/{name}.ko", check=True)
    found = line.act("load", "/root/one.ko")
    assert (found["status"], rules(found)) == (1, ["ftrace-conflict"])
    line.guest.run(f"rmmod {name}", check=True)
    nothing_is_left(line)


def test_without_ftrace_nothing_is_tried(line: Line) -> None:
    line.guest.run("echo 0 >/proc/sys/kernel/ftrace_enabled", check=True)
    found = line.act("load", "/root/one.ko")
    assert (found["status"], rules(found)) == (1, ["ftrace-off"])
    nothing_is_left(line)


# -- somebody else is at it too ---------------------------------------------------------------------

#: A transition that lasts: a kernel thread never leaves the function.
HELD = """
/usr/sbin/insmod /root/sleeper.ko
/usr/sbin/insmod /root/kthread.ko
grep -q 1 /sys/kernel/livepatch/kthread/transition
"""


def test_another_transition_is_waited_for_by_the_user(line: Line) -> None:
    line.guest.run(HELD, check=True)
    found = line.act("load", "/root/one.ko")
    assert (found["status"], found["result"], rules(found)) == (1, "refused", ["transition-running"])
    assert line.insert("one")["rule"] == "transition-running"
    found = line.act("load", "/root/kthread.ko", "--no-wait")  # this very one is gone on with
    assert (found["status"], found["result"]) == (0, "pending")
    assert line.act("unload", "kthread")["status"] == 0
    nothing_is_left(line)


def wait_for(line: Line, what: str) -> None:
    line.guest.run(f"n=0; until {what}; do [ $((n+=1)) -lt 600 ] || exit 1; usleep 50000; done", check=True)


@contextmanager
def hand(line: Line, what: str) -> Iterator[None]:
    """Somebody tries ``what`` without pause until it succeeds, and no longer than this lasts."""
    line.guest.run(
        "rm -f /root/rest /root/rests\n"
        f"( until [ -e /root/rest ] || {what}; do :; done; touch /root/rests ) >/dev/null 2>&1 &",
        check=True,
    )
    try:
        yield
    finally:
        line.guest.run("touch /root/rest", check=True)
        wait_for(line, "[ -e /root/rests ]")


@pytest.mark.slow
def test_a_hand_that_turns_a_load_round_is_told_and_cleaned_up_after(line: Line) -> None:
    line.guest.run("/usr/sbin/insmod /root/sleeper.ko", check=True)
    number = line.kmend.begin("load", "/root/kthread.ko", "--json")
    wait_for(line, "grep -q 1 /sys/kernel/livepatch/kthread/transition 2>/dev/null")
    line.guest.run("echo 0 >/sys/kernel/livepatch/kthread/enabled", check=True)
    found = first(line.kmend.end(number).document("load"))
    # kmend sees it turned, or already gone
    assert (found["status"], found["result"], rules(found)) in (
        (1, "failed", ["turned-round"]),
        (1, "failed", ["taken-away"]),
    )
    assert "somebody else" in found["why"]
    assert line.guest.run("ls -d /sys/module/kthread").text == ""
    nothing_is_left(line)
    status = line.kmend.answer("status")
    assert (status["patches"], status["left"], status["unfinished"]) == ([], [], [])


@pytest.mark.slow
def test_a_hand_that_removes_what_is_being_loaded(line: Line) -> None:
    line.guest.run("/usr/sbin/insmod /root/sleeper.ko", check=True)
    number = line.kmend.begin("load", "/root/kthread.ko", "--json")
    wait_for(line, "grep -q 1 /sys/kernel/livepatch/kthread/transition 2>/dev/null")
    line.guest.run(
        "echo 0 >/sys/kernel/livepatch/kthread/enabled; until rmmod kthread 2>/dev/null || "
        "[ ! -d /sys/module/kthread ]; do :; done",
        check=True,
    )
    found = first(line.kmend.end(number).document("load"))
    assert (found["status"], found["result"]) == (1, "failed")
    assert rules(found) in (["turned-round"], ["taken-away"])
    nothing_is_left(line)


@pytest.mark.slow
def test_a_hand_that_keeps_what_is_being_taken_back(line: Line) -> None:
    line.guest.run("/usr/sbin/insmod /root/sleeper.ko && /usr/sbin/insmod /root/kthread.ko", check=True)
    line.guest.run("echo 1 >/sys/kernel/livepatch/kthread/force", check=True)
    wait_for(line, "grep -q 0 /sys/kernel/livepatch/kthread/transition")
    assert line.kmend.answer("list")["patches"][0]["phase"] == "enabled"
    # unpatching is at an end as soon as it begins, unless somebody sleeps in the new code: turn it quickly
    with hand(line, "echo 1 >/sys/kernel/livepatch/kthread/enabled"):
        found = line.act("unload", "kthread")
    assert (found["status"], found["result"]) in ((0, "done"), (1, "failed"))
    if found["status"]:
        assert rules(found) == ["turned-round"]
        assert line.kmend.answer("list")["patches"][0]["phase"] == "enabled"


def test_rmmod_by_hand_between_disable_and_unload(line: Line) -> None:
    assert line.act("load", "/root/one.ko")["status"] == 0
    assert line.act("disable", "one")["status"] == 0
    line.guest.run("rmmod one", check=True)
    found = line.kmend.answer("unload", "one")
    assert (found["status"], rules(found)) == (2, ["unknown-patch"])
    nothing_is_left(line)


@pytest.mark.slow
def test_rmmod_by_hand_while_it_is_unloaded(line: Line) -> None:
    assert line.act("load", "/root/one.ko")["status"] == 0
    with hand(line, "rmmod one"):
        found = line.act("unload", "one")
    assert (found["status"], found["result"], rules(found)) == (0, "done", [])
    nothing_is_left(line)


#: Loads and takes back without pause, as a hand would; all that is read meanwhile may vanish at any moment.
HAND = """
while [ ! -e /root/stop ]; do
    /usr/sbin/insmod /root/one.ko; /usr/sbin/insmod /root/all_new.ko
    for name in all_new one; do
        echo 0 >/sys/kernel/livepatch/$name/enabled
        until rmmod $name || [ ! -d /sys/module/$name ]; do usleep 1000; done
    done
done >/dev/null 2>&1
"""
#: Looks again and again in one process. Prints each answer that is not a sensible one, and what it has seen.
LOOKS = """
import contextlib, io, json, time
import kmend.cli
phases, troubles, looks, end = set(), [], 0, time.monotonic() + 120
while looks < {looks} and time.monotonic() < end:
    for words in (["status"], ["list"], ["blockers"], ["info", "one"], ["status", "one"]):
        looks += 1
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = kmend.cli.main([*words, "--json", "--quiet"])
        found = json.loads(out.getvalue())
        rules = [row["rule"] for row in found.get("refused", ())]
        if status and (not rules or not set(rules) <= {{"unknown-patch", "no-transition"}}):
            troubles.append([words, status, rules, err.getvalue()[-500:]])
        if words == ["status"]:
            phases |= {{row["phase"] for row in found["patches"] + found["left"]}}
print(json.dumps([looks, sorted(phases), troubles]))
"""


@pytest.mark.slow
def test_what_vanishes_while_it_is_read_is_no_trouble(line: Line) -> None:
    line.guest.put("/root/hand.sh", HAND.encode())
    line.guest.run("rm -f /root/stop; sh /root/hand.sh >/dev/null 2>&1 &", check=True)
    looks, phases, troubles = json.loads(line.kmend.run(LOOKS.format(looks=40)).text)
    line.guest.run("touch /root/stop; while ps | grep -q '[h]and.sh'; do usleep 100000; done", timeout=120)
    assert troubles == []
    assert looks >= 40
    assert len(phases) >= 2, phases


def test_a_cumulative_patch_replaces_and_what_it_replaced_is_unloaded(line: Line) -> None:
    two = line.kmend.answer("load", "/root/one.ko", "/root/other.ko")
    assert [row["result"] for row in two["actions"]] == ["done", "done"]
    found = line.act("load", "/root/all_new.ko")
    assert (found["status"], found["replaced"]) == (0, ["one", "other"])
    assert sorted(found["removed"]) == ["one", "other"]
    names = [row["name"] for row in line.kmend.answer("list")["patches"]]
    assert names == ["all_new"]
    assert "cumulative" in line.guest.run("cat /proc/version").text
    assert line.kmend.answer("unload", "--all")["result"] == "done"
    nothing_is_left(line)


@pytest.mark.slow
def test_sleepers_are_woken_and_do_not_notice(line: Line) -> None:
    """16 s by the kernel alone: its first signals come with the 15th retry."""
    line.guest.put(
        "/root/sleeper.sh",
        b"#!/bin/sh\nfor i in 1 2 3 4 5 6 7 8; do (/usr/bin/sleep 1000; echo $? >>/root/ended) & done\n",
        0o755,
    )
    line.guest.run("rm -f /root/ended; /root/sleeper.sh; usleep 500000")
    found = line.act("load", "/root/naps.ko")
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
    assert (
        line.guest.run("cat /root/ended").text == ""
    )  # restart_syscall() does not enter the patched function
    line.guest.run("killall sleep")
    assert line.act("unload", "naps")["status"] == 0


@pytest.mark.slow
def test_what_cannot_be_woken_is_explained_and_the_patch_taken_back(line: Line) -> None:
    line.guest.run("/usr/sbin/insmod /root/sleeper.ko", check=True)
    found = line.act("load", "/root/kthread.ko", "--wait", "3")
    assert (found["status"], found["result"], rules(found)) == (1, "reversed", ["transition-stalled"]), (
        json.dumps(found)
    )
    assert "kernel thread" in found["refused"][0]["why"]
    assert "kmend-sleeper" in found["refused"][0]["why"]
    assert found["removed"] == ["kthread"]
    assert line.guest.run("ls /sys/kernel/livepatch; ls -d /sys/module/kthread").text == ""
    line.guest.run("rmmod sleeper", check=True)


@pytest.mark.slow
def test_a_patch_that_cannot_be_taken_back_stays_in_force(line: Line) -> None:
    assert line.act("load", "/root/sleepy.ko")["status"] == 0
    # not `cat`: it uses sendfile(), which the kernel's own signal after 15 s makes begin anew
    line.guest.run("dd if=/proc/cmdline of=/root/slept bs=4096 count=1 2>/dev/null & usleep 300000")
    found = line.act("unload", "sleepy", "--wait", "2")
    assert (found["status"], found["result"]) == (1, "reversed")
    assert "sleeps uninterruptibly" in found["refused"][0]["why"]
    assert line.kmend.answer("list")["patches"][0]["phase"] == "enabled"
    found = line.act("unload", "sleepy", "--wait", "60")
    assert found["status"] == 0
    assert line.guest.run("cat /root/slept").text == "sleepy"


@pytest.mark.slow
def test_disable_enable_and_what_a_hand_did_in_between(line: Line) -> None:
    assert line.act("load", "/root/one.ko")["status"] == 0
    found = line.act("disable", "one")
    assert (found["status"], found["removed"]) == (0, [])
    left = line.kmend.answer("list")["left"]
    assert [(row["name"], row["phase"]) for row in left] == [("one", "left behind")]
    again = line.act("enable", "one")
    assert (again["status"], rules(again)) == (1, ["not-enabled-again"])
    assert "kmend load /root/one.ko" in again["refused"][0]["next_step"]
    assert line.act("load", "/root/one.ko")["status"] == 0  # removes what is left first
    line.guest.run("echo 0 >/sys/kernel/livepatch/one/enabled; sleep 2; rmmod one", check=True)
    found = line.kmend.answer("unload", "one")
    assert (found["status"], rules(found)) == (2, ["unknown-patch"])
    nothing_is_left(line)


@pytest.mark.slow
def test_force_wants_to_be_confirmed_and_is_remembered(line: Line) -> None:
    line.guest.run("/usr/sbin/insmod /root/sleeper.ko", check=True)
    line.act("load", "/root/kthread.ko", "--no-wait")
    found = line.act("force", "kthread")
    assert (found["status"], rules(found)) == (1, ["not-confirmed"])
    assert "work()" in found["refused"][0]["what"]
    found = line.act("force", "kthread", "--yes-i-know")
    assert (found["status"], found["result"]) == (0, "done")
    (patch,) = line.kmend.answer("status")["patches"]
    assert (patch["phase"], patch["forced"]) == ("enabled", True)
    assert line.act("unload", "kthread")["status"] == 0
    line.guest.run("rmmod sleeper", check=True)


@pytest.mark.slow
def test_a_killed_kmend_leaves_what_the_next_one_understands(line: Line) -> None:
    line.guest.run("/usr/sbin/insmod /root/sleeper.ko", check=True)
    line.guest.run(
        "kmend load /root/kthread.ko --wait 600 >/root/out 2>&1 & \n"
        "until grep -q 1 /sys/kernel/livepatch/kthread/transition 2>/dev/null; do usleep 100000; done\n"
        "usleep 700000; for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline | grep -q 'load /root/kthread' "
        "&& kill -9 ${p#/proc/}; done; true",
        timeout=120,
    )
    status = line.kmend.answer("status")
    assert [(row["verb"], row["patch"]) for row in status["unfinished"]] == [("load", "kthread")]
    assert not status["acting"]
    assert "an action did not end: `kmend load /root/kthread.ko`" in line.kmend.ask("status").text
    found = line.act("load", "/root/kthread.ko", "--wait", "3")  # goes on, and stalls in its turn
    assert (found["result"], found["removed"]) == ("reversed", ["kthread"])
    status = line.kmend.answer("status")
    assert (status["unfinished"], status["patches"], status["left"]) == ([], [], [])
    line.guest.run("rmmod sleeper", check=True)


@pytest.mark.slow
def test_the_kernels_complaints_meanwhile_are_told(line: Line) -> None:
    found = line.act("load", "/root/warning.ko")
    assert found["status"] == 0
    assert [row["rule"] for row in found["warnings"]] == ["kernel-complained"]
    assert "kmend test" in str(found["warnings"]) or "warn+" in str(found["warnings"])
    assert [row["callbacks"] for row in found["all"]] == [["post_patch of vmlinux: warn()"]]
    assert line.act("unload", "warning")["status"] == 0


@pytest.mark.slow
def test_only_root_acts_and_anybody_may_look(line: Line) -> None:
    line.guest.run("chmod 711 /root; cp /root/one.ko /tmp", check=True)
    found = line.guest.run("/usr/bin/setpriv --reuid 65534 --clear-groups kmend load /tmp/one.ko")
    assert (found.status, "needs root" in found.errors) == (3, True)
    seen = line.guest.run("/usr/bin/setpriv --reuid 65534 --clear-groups kmend status")
    assert (seen.status, "no livepatch is loaded" in seen.text) == (0, True)


# -- the last ones: what they switch on stays on until the next boot ---------------------------------


def test_lockdown(line: Line) -> None:
    line.guest.run("echo integrity >/sys/kernel/security/lockdown", check=True)
    found = line.act("load", "/root/one.ko")
    assert (found["status"], rules(found)) == (1, ["lockdown"])
    assert line.insert("one")["rule"] == "lockdown"
    assert "locked down" in found["refused"][0]["why"]
    nothing_is_left_locked(line)


def test_signed_modules_only(line: Line) -> None:
    line.guest.run("echo 1 >/sys/module/module/parameters/sig_enforce", check=True)
    found = line.act("load", "/root/one.ko")
    assert (found["status"], rules(found)) == (1, ["unsigned"])
    assert line.insert("one")["rule"] == "unsigned"
    nothing_is_left_locked(line)


@pytest.mark.slow
def test_no_more_modules(line: Line) -> None:
    line.guest.run("echo 1 >/proc/sys/kernel/modules_disabled", check=True)
    found = line.act("load", "/root/one.ko")
    assert found["status"] == 1
    assert rules(found)[0] == "modules-disabled"  # and `unsigned`, if the test above has run in this guest
    assert line.insert("one")["rule"] == "not-root"
    nothing_is_left_locked(line)


def nothing_is_left_locked(line: Line) -> None:
    """A locked down kernel does not show tracefs."""
    assert line.guest.run("ls /sys/kernel/livepatch; grep -l K /sys/module/*/taint").text == ""
