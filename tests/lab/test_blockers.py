"""What holds a transition up is named rightly: each kind of task, in guests of stock kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sleeping
import waiting
from resident import Resident

from kmend.core.config import Config
from kmend.core.target import Target
from kmend.lab.guest import Guest
from kmend.lab.kernel import LabKernel

pytestmark = [pytest.mark.lab, pytest.mark.target]

THREADS = 5000


@pytest.fixture(
    scope="module",
    params=["target_56", pytest.param("target_612", marks=pytest.mark.slow)],
    ids=["6.1", "6.12"],
)
def machine(
    request: pytest.FixtureRequest, config: Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Resident]:
    """kmend in a guest, imported once: the kernel's own signals come 15 s after a load, and change what is
    looked at."""
    target: Target = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("blockers")
    modules = {"blockers": sleeping.built(target, "blockers", folder), **waiting.hall(target, folder)}
    with Guest.of(LabKernel.of(target), config.lab) as running:
        waiting.settle(running, sleeping.compiled("idle", folder), modules)
        yield Resident(running)


@pytest.fixture
def kmend(machine: Resident) -> Iterator[Resident]:
    """One test's tasks are not the next one's."""
    yield machine
    machine.guest.run(waiting.END)
    # in this order: a task that has switched finds nothing in the hall to open
    machine.guest.run("kill -9 $(cat /root/spinner)")
    machine.ask("unload", "--all")
    machine.guest.run("[ ! -e /proc/hall ] || { echo open >/proc/hall; sleep 1; rmmod hall; }")


def test_user_tasks(kmend: Resident) -> None:
    """A sleeper, a vfork parent, one that is stopped, traced, frozen, or in another PID namespace."""
    tasks = waiting.pids(kmend.guest.run(waiting.START, check=True).text)
    loaded = kmend.act("load", "/root/blockers.ko", "--no-wait")
    assert loaded["status"] == 0, loaded
    found = waiting.blockers(kmend)
    text = kmend.ask("blockers").text
    shown = {name: found[pid].short for name, pid in tasks.items() if pid in found}
    assert shown == {
        "sleeper": ("in-function", "hrtimer_nanosleep", True),
        "tracer": ("in-function", "hrtimer_nanosleep", True),
        "inner": ("in-function", "hrtimer_nanosleep", True),
        "vfork": ("vfork-parent", "kernel_clone", False),
        "stopped": ("stopped", "get_signal", False),
        "traced": ("traced", "get_signal", False),
        "frozen": ("frozen", "get_signal", False),
    }
    inner = found[tasks["inner"]].row
    assert inner["pids"] == [tasks["inner"], 1]
    assert f"its vfork child {tasks['vforked']} calls exec" in found[tasks["vfork"]].row["why"]
    assert f"traced by process {tasks['tracer']}, which has stopped it" in found[tasks["traced"]].row["why"]
    assert found[tasks["stopped"]].row["remedy"] == f"kill -CONT {tasks['stopped']} lets it go on"
    assert "thaw" in found[tasks["frozen"]].row["remedy"]
    assert f"{tasks['inner']} (1 in its namespace)" in text  # one of a group of equal sleepers
    assert f"{tasks['stopped']} (sleep) is stopped inside get_signal()" in text

    # the rest can be woken; those four hold it up, are named, and the patch is taken back
    action = kmend.act("load", "/root/blockers.ko", "--wait", "5")
    assert (action["status"], action["result"]) == (1, "reversed")
    (refused,) = action["refused"]
    assert refused["rule"] == "transition-stalled"
    left = {row["tid"]: row["cause"] for row in action["transitions"][0]["left"]["blockers"]}
    assert left == {
        tasks["vfork"]: "vfork-parent",
        tasks["stopped"]: "stopped",
        tasks["traced"]: "traced",
        tasks["frozen"]: "frozen",
    }
    assert kmend.guest.run("ls /sys/kernel/livepatch").text == ""


def test_kernel_side(kmend: Resident) -> None:
    """Uninterruptible sleep, a kernel thread in a patched function, and one that only computes."""
    guest = kmend.guest
    text = guest.run(
        "insmod /root/hall.ko; exec 3>&1 >/dev/null 2>&1 </dev/null\n"
        'for how in wait hard spin; do sh -c "echo $how >/proc/hall" & echo $how $! >&3; done; sleep 1',
        check=True,
    ).text
    tasks = waiting.pids(text)
    guest.put("/root/spinner", str(tasks["spin"]).encode())
    tasks["kthread"] = int(guest.run("pidof '[kmend-hall]' || pgrep kmend-hall", check=True).text.split()[0])
    loaded = kmend.act("load", "/root/hall_patch.ko", "--no-wait")
    assert loaded["status"] == 0, loaded
    found = waiting.blockers(kmend)
    assert {name: found[pid].row["cause"] for name, pid in tasks.items()} == {
        "wait": "in-function",
        "hard": "uninterruptible",
        "spin": "running",
        "kthread": "kthread",
    }
    for name in ("wait", "hard", "kthread"):
        assert (found[tasks[name]].row["function"], found[tasks[name]].row["object"]) == ("hall_wait", "hall")
    assert [name for name, pid in tasks.items() if found[pid].row["wakeable"]] == ["wait"]
    assert found[tasks["kthread"]].row["name"] == "kmend-hall"
    assert "no signal reaches it" in found[tasks["hard"]].row["remedy"]


@pytest.mark.slow
def test_a_process_of_many_threads(kmend: Resident) -> None:
    """All asleep in the function: looking at them is bearable, and so is waking them.

    On a slow machine the kernel's own signals come, after 15 seconds, before the last one is woken.
    """
    waiting.many(kmend.guest, THREADS)
    action = kmend.act("load", "/root/blockers.ko")
    assert action["result"] == "done", action["why"]
    (transition,) = action["transitions"]
    print(f"woken and switched in {transition['seconds']:.1f} s")
    said = [row.text for row in kmend.guest.dmesg()]
    began = max(at for at, text in enumerate(said) if "starting patching transition" in text)
    signalled = "livepatch: signaling remaining tasks" in said[began:]
    assert len(set(transition["woken"])) >= (THREADS // 10 if signalled else THREADS)
    first = transition["at_first"]
    assert first["left"] >= THREADS
    causes = {row["cause"] for row in first["blockers"] if row["name"] == "threads"}
    assert causes == {"in-function"}
    assert len(first["blockers"]) >= 100  # the others are counted

    assert kmend.act("unload", "blockers")["result"] == "done"
    kmend.guest.run("killall -9 idle; sleep 1")
    waiting.many(kmend.guest, THREADS)
    assert kmend.act("load", "/root/blockers.ko", "--no-wait")["result"] == "pending"
    _, seconds, memory = waiting.cost(kmend.guest)
    print(f"kmend blockers with {THREADS} threads: {seconds:.1f} s, {memory:.0f} MB")
    assert memory < 100
