"""Patches that come back at boot, in guests of stock kernels whose disk outlives them.

A guest has no systemd: its boot is the command of the unit, `kmend load --all --boot`; a power cut is QEMU
killed. The disk keeps what the guest's kernel had written to it, and nothing of its page cache.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from resident import Resident

from kmend.core.config import Config
from kmend.core.run import run
from kmend.core.target import Target
from kmend.lab.guest import Guest
from kmend.lab.host import Settings
from kmend.lab.kernel import LabKernel
from kmend.lab.outcome import KernelOops, LostGuest

pytestmark = [pytest.mark.lab, pytest.mark.target]

ROOT = Path(__file__).parents[2]
FRAME = """
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>
#include <linux/timer.h>
static int replacement(struct seq_file *m, void *v) {{ seq_puts(m, "{name}\\n"); return 0; }}
static struct klp_func funcs[] = {{ {{ .old_name = "{old}", .new_func = replacement }}, {{ }} }};
static struct klp_object objs[] = {{ {{ .funcs = funcs }}, {{ }} }};
static struct klp_patch patch = {{ .mod = THIS_MODULE, .objs = objs, .replace = {replace} }};
{extra}
static int __init start(void) {{ {first} return klp_enable_patch(&patch); }}
static void __exit end(void) {{ }}
module_init(start);
module_exit(end);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
"""
#: Panics some seconds after loading, when everything seems well.
BOMB = """
static unsigned int delay = 20;
module_param(delay, uint, 0444);
static void boom(struct timer_list *t) { panic("kmend test: the patch went off"); }
static DEFINE_TIMER(bomb, boom);
"""
MODULES = {
    "keep_a": FRAME.format(name="keep_a", old="cmdline_proc_show", replace="false", extra="", first=""),
    "keep_b": FRAME.format(name="keep_b", old="uptime_proc_show", replace="false", extra="", first=""),
    "keep_all": FRAME.format(name="keep_all", old="version_proc_show", replace="true", extra="", first=""),
    "keep_bomb": FRAME.format(
        name="keep_bomb",
        old="loadavg_proc_show",
        replace="false",
        extra=BOMB,
        first="mod_timer(&bomb, jiffies + delay * HZ);",
    ),
    "keep_oops": FRAME.format(
        name="keep_oops", old="stat_open", replace="false", extra="", first="*(volatile int *)8 = 1;"
    ),
}
BOOT = ("load", "--all", "--boot")
#: Mounts the disk where kmend keeps its state, as a machine's own boot would have by then.
MOUNT = "modprobe -a virtio_blk ext4 && mkdir -p /var/lib/kmend && mount /dev/vda /var/lib/kmend"


def build(target: Target, folder: Path) -> dict[str, bytes]:
    """The modules above, compiled for that kernel."""
    for name, text in MODULES.items():
        (folder / f"{name}.c").write_text(text)
    (folder / "Makefile").write_text("obj-m := " + " ".join(f"{name}.o" for name in MODULES) + "\n")
    run(["make", "-s", "-C", target.source, f"M={folder}", f"CC={target.compiler}", "modules"], timeout=300)
    return {name: (folder / f"{name}.ko").read_bytes() for name in MODULES}


@pytest.fixture(
    scope="module",
    params=["target_55", pytest.param("target_612", marks=pytest.mark.slow)],
    ids=["6.1", "6.12"],
)
def target(request: pytest.FixtureRequest) -> Target:
    found: Target = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def modules(target: Target, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return build(target, tmp_path_factory.mktemp("persistence"))


class Server:
    """A machine that can be booted again and again: the kernel, the modules, the disk."""

    def __init__(self, kernel: LabKernel, config: Config, modules: dict[str, bytes], disk: Path) -> None:
        self.kernel, self.lab, self.modules, self.disk = kernel, config.lab, modules, disk
        disk.write_bytes(b"")
        os.truncate(disk, 16 << 20)
        run(["mke2fs", "-q", "-t", "ext4", disk])

    @contextmanager
    def up(self) -> Iterator[tuple[Guest, Resident]]:
        """One boot of it, up to where its own boot would load the patches. Its end is a power cut."""
        with Guest.of(self.kernel, self.lab, Settings(disk=self.disk)) as guest:
            guest.run(MOUNT, check=True)
            for name, data in self.modules.items():
                guest.put(f"/root/{name}.ko", data)
            yield guest, Resident(guest)


@pytest.fixture
def server(target: Target, config: Config, modules: dict[str, bytes], tmp_path: Path) -> Server:
    return Server(LabKernel.of(target), config, modules, tmp_path / "disk")


def rules(found: dict[str, Any]) -> list[str]:
    return [row["rule"] for row in found["refused"]]


def results(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(row["patch"], row["result"]) for row in found["actions"]]


def loaded(guest: Guest) -> list[str]:
    return sorted(guest.run("ls /sys/kernel/livepatch").text.split())


def test_what_is_installed_is_loaded_at_the_next_boot_and_no_more_once_uninstalled(server: Server) -> None:
    with server.up() as (guest, kmend):
        found = kmend.answer("install", "/root/keep_a.ko", "/root/keep_b.ko")
        assert (found["status"], results(found)) == (0, [("keep_a", "done"), ("keep_b", "done")])
        assert {row["rule"] for row in found["actions"][0]["warnings"]} == {"no-boot-unit"}
        assert loaded(guest) == []
        # power cut: what `install` has reported is on the disk
    with server.up() as (guest, kmend):
        status = kmend.answer("status")["boot"]
        assert [row["name"] for row in status["patches"]] == ["keep_a", "keep_b"]
        found = kmend.answer(*BOOT)
        assert (found["status"], results(found)) == (0, [("keep_a", "done"), ("keep_b", "done")])
        assert guest.run("cat /proc/cmdline /proc/uptime").text == "keep_a\nkeep_b"
        assert kmend.answer("status")["boot"]["guard"] == "watching"
        # the unit may be started twice (initramfs, then systemd)
        again = kmend.answer(*BOOT)
        assert (again["status"], [row["why"] for row in again["actions"]]) == (
            0,
            ["keep_a is in force already", "keep_b is in force already"],
        )
        assert kmend.answer("healthy")["status"] == 0
        assert kmend.answer("status")["boot"]["guard"] == "clear"
        found = kmend.answer("uninstall", "keep_a", "--unload")
        assert found["status"] == 0
        assert loaded(guest) == ["keep_b"]
    with server.up() as (guest, kmend):
        assert results(kmend.answer(*BOOT)) == [("keep_b", "done")]
        assert kmend.answer("healthy")["status"] == 0
        assert kmend.answer("uninstall", "--all")["status"] == 0
    with server.up() as (guest, kmend):
        found = kmend.answer(*BOOT)
        assert (found["status"], found["actions"], loaded(guest)) == (0, [], [])


@pytest.mark.slow
def test_a_cumulative_patch_is_loaded_alone(server: Server) -> None:
    with server.up() as (guest, kmend):
        assert kmend.answer("install", "/root/keep_a.ko", "/root/keep_all.ko")["status"] == 0
    with server.up() as (guest, kmend):
        assert kmend.answer(*BOOT)["status"] == 0
        assert loaded(guest) == ["keep_all"]


def test_a_patch_that_crashes_the_machine_is_loaded_once(server: Server) -> None:
    """It goes off 20 s after loading: long after the load has reported that all is well."""
    with server.up() as (guest, kmend):
        assert kmend.answer("install", "/root/keep_a.ko", "/root/keep_bomb.ko")["status"] == 0
    with server.up() as (guest, kmend):
        assert kmend.answer(*BOOT)["status"] == 0
        assert loaded(guest) == ["keep_a", "keep_bomb"]
        with pytest.raises(KernelOops, match="the patch went off"):
            guest.run("sleep 100", timeout=120)
    for _ in range(2):  # and not the time after that either
        with server.up() as (guest, kmend):
            found = kmend.answer(*BOOT)
            assert (found["status"], rules(found)) == (1, ["crash-guard"])
            assert "keep_a, keep_bomb" in found["refused"][0]["why"]
            assert loaded(guest) == []
            text = kmend.ask("status").text
            assert "LEFT OFF: the boot of 20" in text
            assert "began to load keep_a, keep_bomb and was never found to be healthy" in text
            assert "stay off" in kmend.ask("log").text
            assert kmend.answer("status")["boot"]["not_loaded"] == []  # they are not to be in force
            # the timer comes in this boot too; it must not make the next one load again
            assert kmend.answer("healthy")["status"] == 0
    with server.up() as (guest, kmend):
        assert kmend.answer("uninstall", "keep_bomb")["status"] == 0
        assert rules(kmend.answer(*BOOT)) == ["crash-guard"]
        found = kmend.answer("load", "--all", "--retry")
        assert (found["status"], results(found)) == (0, [("keep_a", "done")])
    with server.up() as (guest, kmend):
        assert results(kmend.answer(*BOOT)) == [("keep_a", "done")]


@pytest.mark.slow
def test_a_boot_whose_kernel_oopsed_is_not_called_healthy(server: Server) -> None:
    with server.up() as (guest, kmend):
        assert kmend.answer("install", "/root/keep_a.ko")["status"] == 0
        assert kmend.answer(*BOOT)["status"] == 0
        guest.run("/usr/sbin/insmod /root/keep_oops.ko")
        found = kmend.answer("healthy")
        assert (found["status"], found["actions"][0]["refused"][0]["rule"]) == (1, "boot-unhealthy")
    with server.up() as (guest, kmend):
        assert rules(kmend.answer(*BOOT)) == ["crash-guard"]


@pytest.mark.slow
def test_the_switches(server: Server) -> None:
    with server.up() as (guest, kmend):
        assert kmend.answer("install", "/root/keep_a.ko")["status"] == 0
        guest.run("mkdir -p /etc/kmend && touch /etc/kmend/off", check=True)
        assert rules(kmend.answer(*BOOT)) == ["switched-off"]
        assert "switched off by the file /etc/kmend/off" in kmend.ask("status").text
        guest.run("rm /etc/kmend/off", check=True)
        # nothing was loaded, so there is nothing that this boot would have to survive
        assert kmend.answer("status")["boot"]["guard"] == "clear"
        guest.run("echo 'root=/dev/vda kmend=off quiet' >/run/line; mount -o bind /run/line /proc/cmdline")
        assert rules(kmend.answer(*BOOT)) == ["switched-off"]
        guest.run("umount /proc/cmdline", check=True)
        assert kmend.answer(*BOOT)["status"] == 0


@pytest.mark.slow
def test_a_module_that_was_tampered_with_is_not_loaded(server: Server) -> None:
    with server.up() as (guest, kmend):
        assert kmend.answer("install", "/root/keep_a.ko")["status"] == 0
        guest.run("cp /root/keep_b.ko $(ls /var/lib/kmend/*/keep_a.*.ko)", check=True)
        found = kmend.answer(*BOOT)
        assert (found["status"], found["actions"][0]["refused"][0]["rule"]) == (1, "store-damaged")
        assert loaded(guest) == []
        (row,) = kmend.answer("status")["boot"]["not_loaded"]
        assert (row["name"], row["rules"], row["tried"]) == ("keep_a", ["store-damaged"], True)
        assert "keep_a: NOT LOADED: " in kmend.ask("status").text
        guest.run("chmod 777 /var/lib/kmend", check=True)
        assert rules(kmend.answer(*BOOT)) == ["unsafe-store"]
        assert "(unsafe-store)" in kmend.ask("status").text
        assert rules(kmend.answer("install", "/root/keep_b.ko")) == ["unsafe-store"]


@pytest.mark.slow
def test_status_says_which_check_refused_a_patch_at_boot(server: Server) -> None:
    """The kernel at boot is not as it was when the patch was installed: here, ftrace is switched off."""
    with server.up() as (guest, kmend):
        assert kmend.answer("install", "/root/keep_a.ko", "/root/keep_b.ko")["status"] == 0
        (calm, _) = kmend.answer("status")["boot"]["not_loaded"]
        assert (calm["name"], calm["tried"]) == ("keep_a", False)
    with server.up() as (guest, kmend):
        guest.run("echo 0 >/proc/sys/kernel/ftrace_enabled", check=True)
        assert kmend.answer(*BOOT)["status"] == 1
        first, second = kmend.answer("status")["boot"]["not_loaded"]
        assert (first["name"], first["rules"]) == ("keep_a", ["ftrace-off"])
        assert second["name"] == "keep_b"
        assert second["why"] == "keep_b was not loaded, as it comes after keep_a"
        text = kmend.ask("log").text  # both boots, each behind its mark
        assert text.index("---- boot ") < text.index("install keep_a") < text.index("---- this boot ")


#: The disk becomes the root file system of a machine whose initramfs has just mounted it, read-only.
NEW_ROOT = """
set -e
umount /var/lib/kmend
mkdir -p /r
mount /dev/vda /r
cd /r
mkdir -p var/lib/kmend usr etc proc sys dev run tmp opt
mv 6.* log var/lib/kmend
cp -r /opt/kmend opt
for name in bin sbin lib lib64; do ln -s usr/$name $name; done
cp /usr/local/bin/kmend /usr/bin/kmend
cd /
sync
mount -o remount,ro /r
mount -o bind /usr /r/usr
"""


@pytest.mark.slow
def test_the_initramfs_loads_from_the_root_file_system_before_anything_runs_there(server: Server) -> None:
    with server.up() as (guest, kmend):
        assert kmend.answer("install", "/root/keep_a.ko")["status"] == 0
        guest.run(NEW_ROOT, check=True)
        script = (ROOT / "packaging/initramfs/scripts/kmend").read_bytes()
        guest.put("/scripts/kmend", script, 0o755)
        assert guest.run("rootmnt=/r /scripts/kmend", check=True).status == 0
        assert loaded(guest) == []  # nobody has switched it on
        switched = {"rootmnt": "/r", "KMEND_INITRAMFS": "yes"}
        guest.run("mount -o remount,rw /r; mkdir -p /r/etc/kmend; touch /r/etc/kmend/off")
        guest.run("mount -o remount,ro /r; /scripts/kmend", env=switched, check=True)
        assert loaded(guest) == []
        guest.run("mount -o remount,rw /r; rm /r/etc/kmend/off; mount -o remount,ro /r", check=True)
        done = guest.run("/scripts/kmend", env=switched, check=True, timeout=300)
        assert loaded(guest) == ["keep_a"], done
        # as it was, but for the mark
        mounts = guest.run("grep -E ' /r[ /]' /proc/mounts").text.splitlines()
        assert [line.split()[1] for line in mounts] == ["/r", "/r/usr"]
        assert mounts[0].split()[3].startswith("ro")
        assert guest.run("ls /r/var/lib/kmend/*/attempt.json").status == 0


def before(release: str) -> str:
    """The release before it, of the same length: 6.1.0-54-amd64, 6.12.116+deb12-amd64."""
    return re.sub(r"\d(?=(\+deb\d+)?-amd64$)", lambda digit: str(int(digit[0]) - 1), release)


@pytest.mark.slow
def test_what_is_installed_for_another_kernel_is_left_alone(server: Server) -> None:
    this = server.kernel.release
    other = before(this)
    with server.up() as (guest, kmend):
        guest.run(f"sed s/{this}/{other}/ /root/keep_a.ko >/root/other.ko", check=True)
        found = kmend.answer("install", "/root/other.ko", "/root/keep_b.ko")
        assert found["status"] == 0
        assert "kernel-absent" in {row["rule"] for row in found["actions"][0]["warnings"]}
        listed = kmend.answer("install", "--list")["stores"]
        assert [(row["release"], [one["name"] for one in row["patches"]]) for row in listed] == [
            (other, ["keep_a"]),
            (this, ["keep_b"]),
        ]
        assert results(kmend.answer(*BOOT)) == [("keep_b", "done")]


#: How many cuts of each kind; bench/power_cuts.py makes as many as it is told.
MOMENTS = 2
KINDS = ("changes", "boot")
#: One round of changes of the store, without pause: each action a fork of the process that runs this.
CHURN = """
import contextlib, io, os, sys, time
import kmend.cli
began = time.monotonic()
for words in {rounds} * (
    ["install", "/root/keep_a.ko", "/root/keep_b.ko"],
    ["load", "--all", "--boot"],
    ["healthy"],
    ["uninstall", "keep_a"],
    ["install", "/root/keep_all.ko"],
    ["uninstall", "--all", "--unload"],
    ["unload", "--all"],
):
    pid = os.fork()
    if pid == 0:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = kmend.cli.main([*words, "--quiet"])
        if status:
            print(words, status, said.getvalue(), flush=True)
        os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(str(words))
print(time.monotonic() - began)
"""
#: Every file that the index names is there and whole: not looked at with the code under test. Prints which
#: boots had written down that they load something.
SANE = """
import hashlib, json, pathlib
state = pathlib.Path("/var/lib/kmend")
for index in state.glob("*/index.json"):
    for row in json.loads(index.read_text())["patches"]:
        data = (index.parent / row["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == row["sha256"], row
rows = []
for line in (state / "log").read_text().splitlines() if (state / "log").exists() else []:
    try:
        rows.append(json.loads(line))
    except ValueError:
        pass  # the cut tore it
loads = [row["boot"] for row in rows if row["verb"] == "load" and row["event"] == "begin"]
print(json.dumps(sorted(set(loads))))
"""


class Cuts:
    """Power cuts of one machine: each boot looks at what the cut before has left, then is cut itself.

    A cut comes at a random moment of a round of changes, or of the boot's own ``load --all --boot`` with two
    patches installed; how long each takes is measured once, undisturbed.
    """

    def __init__(self, server: Server, chance: random.Random) -> None:
        self.server, self.chance = server, chance
        self.seconds: dict[str, float] = {}
        self.last = self.boot = ""
        with server.up() as (_, kmend):
            self.seconds["changes"] = float(kmend.run(CHURN.format(rounds=1)).text)
            self._install(kmend)
            began = monotonic()
            assert kmend.answer(*BOOT)["status"] == 0
            self.seconds["boot"] = monotonic() - began
            assert kmend.answer("healthy")["status"] == 0
            assert kmend.answer("uninstall", "--all", "--unload")["status"] == 0

    def _install(self, kmend: Resident) -> None:
        assert kmend.answer("install", "/root/keep_a.ko", "/root/keep_b.ko")["status"] == 0

    def cut(self, kind: str) -> str:
        """One cut; what the boot before it found."""
        moment = self.chance.uniform(0.0, 1.05 * self.seconds[kind])
        with self.server.up() as (guest, kmend):
            found = self._look(guest, kmend)
            if kind == "changes":
                self._cut(guest, kmend, moment, code=CHURN.format(rounds=100))
            else:
                self._install(kmend)
        if kind == "boot":
            with self.server.up() as (guest, kmend):
                self._cut(guest, kmend, moment)
        self.last = kind
        return f"{found}; now {kind}, cut after {moment:.2f} of {self.seconds[kind]:.2f} s"

    def end(self) -> str:
        """The last look."""
        with self.server.up() as (guest, kmend):
            return self._look(guest, kmend)

    def _cut(self, guest: Guest, kmend: Resident, moment: float, code: str | None = None) -> None:
        self.boot = guest.run("cat /proc/sys/kernel/random/boot_id", check=True).text.strip()
        number = kmend.begin(*BOOT, "--quiet") if code is None else kmend.begin(code=code)
        cutter = threading.Timer(moment, guest.abandon)
        cutter.start()
        with pytest.raises((LostGuest, KernelOops)):
            kmend.end(number)
            guest.run("sleep 60", timeout=120)  # it was over before the cut came
        cutter.join()

    def _look(self, guest: Guest, kmend: Resident) -> str:
        """What the last cut left is sound, loads or is left off as it should, and can be changed again."""
        began = json.loads(kmend.run(SANE).text)
        status = kmend.answer("status")
        boot = status["boot"]
        assert (status["status"], boot["trouble"]) == (0, None)
        there = [row["name"] for row in boot["patches"]]
        if self.last == "boot":  # which changes no store; and what had begun to load is not loaded again
            assert there == ["keep_a", "keep_b"]
            assert boot["guard"] == "tripped" or self.boot not in began
        found = kmend.answer(*BOOT)
        if boot["guard"] == "tripped" and there:
            assert (found["status"], rules(found), loaded(guest)) == (1, ["crash-guard"], [])
            found = kmend.answer("load", "--all", "--retry")
        assert found["status"] == 0, found
        assert loaded(guest) == sorted(row["name"] for row in boot["patches"] if not row["superseded"])
        # and the same commands do what they say again
        assert kmend.answer("healthy")["status"] == 0
        assert kmend.answer("install", "/root/keep_a.ko")["status"] == 0
        assert kmend.answer("uninstall", "--all", "--unload")["status"] == 0
        assert loaded(guest) == []
        left = guest.run("cd /var/lib/kmend; ls -A */ | grep -v index.json").text.split()
        assert [name for name in left if not name.endswith(":") and name != "lost+found/:"] == []
        return f"found {', '.join(there) or 'nothing'} ({boot['guard']})"


@pytest.mark.slow
def test_the_power_may_go_at_any_moment(server: Server) -> None:
    cuts = Cuts(server, random.Random(4))
    for kind in MOMENTS * KINDS:
        cuts.cut(kind)
    cuts.end()
