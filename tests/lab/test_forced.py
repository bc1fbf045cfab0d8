"""What a forced transition leaves for the rest of a boot, and that kmend says so: in guests of its own."""

from __future__ import annotations

from collections.abc import Iterator

import bank
import pytest
from resident import Resident

from kmend.core.config import Config
from kmend.core.target import Target
from kmend.lab.guest import Guest
from kmend.lab.kernel import LabKernel

pytestmark = [pytest.mark.lab, pytest.mark.target, pytest.mark.slow]


@pytest.fixture(scope="module", params=["target_55", "target_612"], ids=["6.1", "6.12"])
def kmend(
    request: pytest.FixtureRequest, config: Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Resident]:
    target: Target = request.getfixturevalue(request.param)
    modules = bank.build(target, tmp_path_factory.mktemp("bank"))
    with Guest.of(LabKernel.of(target), config.lab) as guest:
        for name in ("one", "other", "kthread_all", "sleepy", "sleeper"):
            guest.put(f"/root/{name}.ko", modules[name].read_bytes())
        yield Resident(guest)


def test_a_forced_replace_keeps_what_it_replaced_and_not_itself(kmend: Resident) -> None:
    guest = kmend.guest
    guest.run("/usr/sbin/insmod /root/sleeper.ko", check=True)
    assert kmend.answer("load", "/root/one.ko", "/root/other.ko")["status"] == 0
    # its thread never leaves the loop that the patch is about
    assert kmend.act("load", "/root/kthread_all.ko", "--no-wait")["result"] == "pending"
    forced = kmend.act("force", "kthread_all", "--yes-i-know")
    assert (forced["status"], forced["result"]) == (0, "done")
    assert "the modules of one, other" in forced["why"]

    status = kmend.answer("status")
    assert [(row["name"], row["forced"]) for row in status["patches"]] == [("kthread_all", True)]
    pinned = {row["name"]: row["pinned_by"] for row in status["left"]}
    assert pinned == {"one": "kthread_all", "other": "kthread_all"}
    # so says the kernel
    assert guest.run("cat /sys/module/one/refcnt /sys/module/other/refcnt").text == "1\n1"
    assert guest.run("rmmod one; rmmod other").status != 0
    assert "kept until the next boot by the forced transition of kthread_all" in kmend.ask("status").text
    again = kmend.act("load", "/root/one.ko")
    assert (again["status"], [row["rule"] for row in again["refused"]]) == (1, ["module-in-use"])

    # taken back in the ordinary way, the patch that was forced into force goes
    assert kmend.act("unload", "kthread_all")["status"] == 0
    assert guest.run("ls /sys/kernel/livepatch; ls -d /sys/module/kthread_all 2>/dev/null").text == ""
    loaded = kmend.act("load", "/root/kthread_all.ko", "--no-wait")
    assert loaded["result"] == "pending"
    status = kmend.answer("status")
    assert [(row["name"], row["forced"]) for row in status["patches"]] == [("kthread_all", False)]
    assert {row["name"]: row["pinned_by"] for row in status["left"]} == pinned
    assert kmend.act("unload", "kthread_all")["status"] == 0
    guest.run("rmmod sleeper", check=True)


def test_a_patch_that_is_forced_out_of_force_is_kept(kmend: Resident) -> None:
    guest = kmend.guest
    assert kmend.act("load", "/root/sleepy.ko")["status"] == 0
    guest.run("dd if=/proc/cmdline of=/root/slept bs=4096 count=1 2>/dev/null & usleep 300000")
    assert kmend.act("unload", "sleepy", "--no-wait")["result"] == "pending"
    assert kmend.act("force", "sleepy", "--yes-i-know")["status"] == 0
    (row,) = [row for row in kmend.answer("status")["left"] if row["name"] == "sleepy"]
    assert (row["pinned_by"], row["module"]["references"]) == ("sleepy", 1)
    found = kmend.act("unload", "sleepy")
    assert (found["status"], [row["rule"] for row in found["refused"]]) == (1, ["module-in-use"])
    # the one that slept in its code comes back unharmed
    guest.run("while [ ! -s /root/slept ]; do usleep 200000; done", check=True, timeout=120)
    assert guest.run("cat /root/slept").text == "sleepy"
    assert guest.run("dmesg | grep -E 'BUG|Oops'").text == ""
