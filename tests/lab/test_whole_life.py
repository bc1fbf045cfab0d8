"""A machine's whole life with kmend, from the package's installation to its removal, as a user would type it.

First in a chroot of a clean Debian 12: the package goes in and out, `kmend doctor` names what lacks, and with
exactly that installed a kernel is fetched. Then that very root becomes the disk of a machine, which boots the
stock kernel with Debian's own initramfs and systemd: everything else, building included, happens there.

All but `kmend try`. The machine is QEMU without hardware support already; the lab's guest inside of it
had not come up after three and a half minutes, where the lab allows two. So the modules are built and
tried in the chroot, on the host's own processor, and what the machine then builds has to be the same
file, byte for byte, as what was tried.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bookworm
import pytest
import test_boot
from bookworm import Root, Server, Terminal

from kmend import __version__
from kmend.core.config import Config
from kmend.core.run import run
from kmend.core.target import Target

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(5400)]

CHECKOUT = Path(__file__).parents[2]
RELEASE = "6.1.0-56-amd64"
#: What a server has, kmend's own needs left out.
SERVER = (
    *("systemd-sysv", "udev", "dbus", "initramfs-tools", "kmod", "zstd", "bash-completion", "man-db"),
    f"linux-image-{RELEASE}",
)
#: What the console shows of the crash (test_boot.BOMB).
WENT_OFF = "Kernel panic - not syncing: kmend test: the patch went off"
DROP_IN = "/etc/systemd/system/kmend-healthy.timer.d"
EXAMPLES = "/usr/share/doc/kmend/examples"
#: The second fix; built together with the first, so that the module replaces the first one's.
SECOND = """\
--- a/fs/proc/version.c
+++ b/fs/proc/version.c
@@ -10,5 +10,6 @@
 static int version_proc_show(struct seq_file *m, void *v)
 {
+\tseq_puts(m, "kmend=2 ");
 \tseq_printf(m, linux_proc_banner,
 \t\tutsname()->sysname,
 \t\tutsname()->release,
"""
#: Both modules, by name, as they are built.
BUILDS = {
    "kmend_cmdline": f"kmend build {EXAMPLES}/cmdline.patch",
    "kmend_both": f"kmend build {EXAMPLES}/cmdline.patch version.patch -n kmend_both",
}


@pytest.fixture(scope="module")
def scratch(config: Config) -> Iterator[Path]:
    """A folder with room for a root and a disk, gone with the tests (they take some 8 GB)."""
    bookworm.require()
    config.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="whole-life-", dir=config.cache) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def package(scratch: Path) -> Path:
    """What `make deb` makes."""
    script = CHECKOUT / "packaging/build_deb.py"
    done = run([sys.executable, script, scratch / "package"], timeout=600, clean_env=False)
    return Path(done.text.strip())


def older(package: Path, scratch: Path) -> Path:
    """The package as if it were of an earlier version."""
    folder = scratch / "older"
    run(["dpkg-deb", "-R", package, folder])
    control = folder / "DEBIAN/control"
    control.write_text(control.read_text().replace(f"Version: {__version__}\n", "Version: 0.0.1\n"))
    file = scratch / "kmend_0.0.1_amd64.deb"
    run(["dpkg-deb", "--root-owner-group", "-Znone", "-b", folder, file])
    shutil.rmtree(folder)
    return file


def traces(root: Root) -> list[str]:
    """Everything on the disk that has kmend in its name, outside of root's home."""
    done = root.run("find / -xdev -path /root -prune -o -path /proc -prune -o -name '*kmend*' -print")
    return sorted(done.text.split())


def test_lintian_has_nothing_to_say(package: Path) -> None:
    """But what ``packaging/lintian-overrides`` gives a reason for."""
    if bookworm.which("lintian") is None:
        pytest.skip("no lintian on this machine: apt-get install lintian")
    root = ["--allow-root"] if os.geteuid() == 0 else []
    done = run(["lintian", *root, "--tag-display-limit", "0", package], check=False, timeout=600)
    assert (done.status, done.text) == (0, "")


def test_the_package_comes_and_goes_in_a_bare_root(config: Config, scratch: Path, package: Path) -> None:
    """Nothing but debootstrap's minimal system: what the package depends on is enough to run it."""
    root = bookworm.unpacked(config, scratch / "bare")
    before = traces(root)
    shutil.copy(package, root.path("/root/kmend.deb"))
    shutil.copy(older(package, scratch), root.path("/root/older.deb"))
    root.install("./older.deb")
    assert root.run("kmend --version").text == f"kmend {__version__}\n"
    # lists what is wanted at boot, for the unit; nothing has to be installed for it
    assert root.run("kmend install --list").text == "nothing is installed\n"
    store = root.path(f"/var/lib/kmend/{RELEASE}")
    store.mkdir(parents=True)
    (store / "kept").write_text("an installed patch")
    root.run("cd /etc/kmend; echo 'jobs = 1' >kmend.toml; echo '# mine' >>initramfs.conf; touch off")

    root.install("./kmend.deb")
    assert (
        root.run("dpkg-query -W -f '${Version} ${Status}' kmend").text
        == f"{__version__} install ok installed"
    )
    files = root.run(
        "dpkg -L kmend | sort; cat /etc/kmend/*; find /var/lib/kmend /etc/systemd -name '*kmend*'"
    ).text
    root.run("apt-get -q -y install --reinstall ./kmend.deb")  # and again
    again = root.run(
        "dpkg -L kmend | sort; cat /etc/kmend/*; find /var/lib/kmend /etc/systemd -name '*kmend*'"
    ).text
    assert again == files
    assert "# mine" in files  # an administrator's change outlives an upgrade
    assert (store / "kept").read_text() == "an installed patch"
    assert "/etc/systemd/system/sysinit.target.wants/kmend-load.service" in files
    assert root.run("dpkg --verify kmend").text in ("", "??5?????? c /etc/kmend/initramfs.conf\n")

    root.run("dpkg --remove kmend")
    assert not root.path("/usr/lib/kmend").exists()
    assert not root.path("/usr/bin/kmend").exists()
    assert (store / "kept").exists()
    assert root.path("/etc/kmend/kmend.toml").exists()
    root.install("./kmend.deb")
    assert (store / "kept").exists()
    assert root.run("readlink /etc/systemd/system/kmend-load.service", check=False).text == ""  # not masked

    root.run("dpkg --purge kmend")
    assert traces(root) == before
    shutil.rmtree(root.folder)


# -- a root that can build -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepared:
    """A root with kmend, after what `kmend doctor` asked for was done; what it said before and after."""

    root: Root
    lacking: dict[str, Any]
    content: str
    status: int
    #: what was tried: the module's digest by its name, and what `kmend try --json` said
    tried: dict[str, tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def prepared(config: Config, scratch: Path, package: Path) -> Prepared:
    root = bookworm.unpacked(config, scratch / "root", *SERVER)
    shutil.copy(package, root.path("/root/kmend.deb"))
    root.path("/root/version.patch").write_text(SECOND)
    root.install("./kmend.deb")
    asked = root.run("kmend doctor --json", check=False)
    assert asked.status == 3, asked.errors
    lacking = json.loads(asked.text)
    root.run(f"{lacking['command'].replace('apt-get install', 'apt-get -q -y install')} && apt-get clean")
    content = root.run("kmend doctor", check=False)
    root.run(f"kmend kernel fetch {RELEASE}", timeout=3000)
    tried = {}
    root.run("mkdir tried")
    for name, command in BUILDS.items():
        root.run(f"{command} --kernel {RELEASE} -o tried", timeout=900)
        check = f"--run {EXAMPLES}/cmdline-check.sh"
        said = root.run(f"kmend try tried/{name}.ko {check} --json", check=False, timeout=900)
        digest = hashlib.sha256(root.path(f"/root/tried/{name}.ko").read_bytes()).hexdigest()
        tried[name] = digest, json.loads(said.text)
    return Prepared(root, lacking, content.text, content.status, tried)


def test_doctor_names_what_lacks_and_is_content_when_it_is_there(prepared: Prepared) -> None:
    ready = prepared.lacking["verbs"]
    assert not any(ready[verb] for verb in ("build", "module", "kernel", "try"))
    assert all(ready[verb] for verb in ("diff", "check", "info", "install", "uninstall", "healthy"))
    assert not {"test", "deb", "setup"} & set(ready)
    packages = {row["package"] for row in prepared.lacking["lacks"]}
    assert {"gcc-12", "qemu-system-x86", "busybox-static", "dwarves", "libelf-dev"} <= packages
    assert not {"git", "python3-venv", "openssl", "gpg-agent"} & packages
    assert prepared.status == 0, prepared.content
    for verb in ("build", "module", "kernel", "try", "diff", "install"):
        assert re.search(rf"^{verb} +ready$", prepared.content, re.MULTILINE), prepared.content
    assert "apt-get" not in prepared.content


def test_both_modules_pass_their_trial(prepared: Prepared) -> None:
    for name, (_, verdict) in prepared.tried.items():
        assert verdict["result"] == "passed", (name, verdict)


def test_pages_completion_and_units_as_installed(prepared: Prepared) -> None:
    root = prepared.root
    pages = root.run("ls /usr/share/man/man1/kmend*.gz").text.split()
    assert len(pages) > 20
    said = root.run(
        "for page in /usr/share/man/man1/kmend*.gz; do man --warnings -l $page 2>&1 >/dev/null; done"
    ).text
    assert said == ""
    assert "kmend-load - " in root.run("man -l /usr/share/man/man1/kmend-load.1.gz").text
    # as an interactive bash finds it: by the loader of bash-completion
    offered = root.run(
        "source /usr/share/bash-completion/bash_completion && _completion_loader kmend; "
        "COMP_WORDS=(kmend unl) COMP_CWORD=1; _kmend; echo ${COMPREPLY[@]}"
    ).text
    assert offered == "unload\n"
    assert root.run("systemd-analyze verify --man=yes /usr/lib/systemd/system/kmend-*").errors == ""


def test_the_initramfs_has_the_script_and_the_switch_only_when_it_is_on(prepared: Prepared) -> None:
    root = prepared.root
    conf, image = root.path("/etc/kmend/initramfs.conf"), f"/boot/initrd.img-{RELEASE}"
    was = conf.read_text()
    list_it = f"lsinitramfs {image} | grep kmend | sort"
    try:
        root.run(f"update-initramfs -u -k {RELEASE}")
        assert root.run(list_it).text.split() == ["scripts/local-bottom/kmend"]
        conf.write_text("KMEND_INITRAMFS=yes\n")
        root.run(f"update-initramfs -u -k {RELEASE}")
        assert root.run(list_it).text.split() == ["conf/conf.d/kmend", "scripts/local-bottom/kmend"]
    finally:
        conf.write_text(was)
        root.run(f"update-initramfs -u -k {RELEASE}")


# -- the machine ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(prepared: Prepared, scratch: Path) -> Server:
    """A machine with that root, before kmend was installed on it; the fetched kernel lies in the cache."""
    root = prepared.root
    bookworm.make_bootable(root)
    server = Server(scratch / "disk", scratch / "vmlinuz", scratch / "initrd")
    shutil.copy(root.path(f"/boot/vmlinuz-{RELEASE}"), server.vmlinuz)
    shutil.copy(root.path(f"/boot/initrd.img-{RELEASE}"), server.initrd)
    # made here: in the machine update-initramfs had not ended after nine minutes
    conf = root.path("/etc/kmend/initramfs.conf")
    was = conf.read_text()
    conf.write_text("KMEND_INITRAMFS=yes\n")
    root.run(f"update-initramfs -u -k {RELEASE}")
    shutil.copy(root.path(f"/boot/initrd.img-{RELEASE}"), server.initrd.with_suffix(".early"))
    conf.write_text(was)
    shutil.copy(server.initrd, root.path(f"/boot/initrd.img-{RELEASE}"))
    root.run("mv /var/cache/kmend cache && dpkg --purge kmend && mv cache /var/cache/kmend")
    bookworm.disk_of(root, server.disk)
    shutil.rmtree(root.folder)
    return server


def loaded(machine: Terminal) -> list[str]:
    """What the kernel itself says is in force."""
    return sorted(
        machine.type("grep -l 1 /sys/kernel/livepatch/*/enabled | cut -d/ -f5", check=False).text.split()
    )


def boot(machine: Terminal) -> dict[str, Any]:
    found = machine.answer("kmend status --json")["boot"]
    assert isinstance(found, dict)
    return found


def when(machine: Terminal, unit: str) -> int:
    """When a unit became active in this boot, in microseconds of the machine's own clock."""
    shown = machine.type(f"systemctl show -P ActiveEnterTimestampMonotonic {unit}").text
    return int(shown)


def well(machine: Terminal) -> None:
    """The kernel has nothing to complain about."""
    said = machine.type("dmesg | grep -E '\\bBUG\\b|Oops|WARNING|Call Trace|rcu.*stall'", check=False).text
    assert said == ""


@pytest.mark.target
def test_a_patch_that_crashes_the_machine_costs_one_reboot(
    server: Server, target_56: Target, scratch: Path
) -> None:
    """Nobody helps: the kernel panics, reboots the machine by itself, and it stays up without the patch."""
    disk = scratch / "crashing"
    run(["cp", "--reflink=auto", "--sparse=always", server.disk, disk], timeout=600)
    module = scratch / "keep_bomb.ko"  # goes off 20 s after loading
    folder = scratch / "bomb"
    folder.mkdir()
    module.write_bytes(test_boot.build(target_56, folder)["keep_bomb"])
    bookworm.put(module, disk)
    with replace(server, disk=disk).up("panic=1", reboots=True) as machine:
        machine.type("apt-get -q -y install ./kmend.deb --no-install-recommends")
        machine.type("kmend install keep_bomb.ko")
        assert loaded(machine) == []
        machine.type("systemctl reboot", check=False)
        machine.boots(2)
        machine.boots(3)
        assert machine.console.count(WENT_OFF) == 1
        machine.ready()

        assert loaded(machine) == []
        assert "keep_bomb" not in machine.type("cat /proc/modules").text
        assert boot(machine)["guard"] == "tripped"
        text = machine.type("kmend status").text
        assert "LEFT OFF: the boot of 20" in text
        assert "began to load keep_bomb and was never found to be healthy" in text
        shown = machine.type("systemctl show -P ActiveState -P Result kmend-load.service").text
        assert sorted(shown.split()) == ["exit-code", "failed"]
        assert "stay off" in machine.type("journalctl -b -u kmend-load.service").text
        assert "stay off" in machine.type("kmend log").text
        machine.type("sleep 40")  # longer than the patch would have taken
        assert machine.console.count("] Linux version ") == 3
        assert machine.console.count("Kernel panic") == machine.console.count(WENT_OFF) == 1
        machine.off()
    disk.unlink()


def test_the_whole_life(server: Server, prepared: Prepared, capsys: pytest.CaptureFixture[str]) -> None:
    history: list[tuple[str, float]] = []

    with server.up() as machine:
        machine.type("apt-get -q -y install ./kmend.deb --no-install-recommends")
        content = machine.type("kmend doctor").text
        assert "lacks" not in content
        for verb in ("build", "try", "plan", "load", "status", "install"):
            assert re.search(rf"^{verb} +ready$", content, re.MULTILINE), content

        for name, command in BUILDS.items():
            machine.type(command, timeout=900)
            assert machine.type(f"sha256sum {name}.ko").text.split()[0] == prepared.tried[name][0]

        plan = machine.answer("kmend plan kmend_cmdline.ko --json")
        assert plan["result"] == "would-load"
        machine.type("kmend load kmend_cmdline.ko")
        assert loaded(machine) == ["kmend_cmdline"]
        assert machine.type("cat /proc/cmdline").text.endswith(" kmend=1\n")
        assert "kmend_cmdline" in machine.type("kmend status").text

        plan = machine.answer("kmend plan kmend_both.ko --json")
        assert (plan["result"], plan["replaced"]) == ("would-load", ["kmend_cmdline"])
        machine.type("kmend load kmend_both.ko")
        assert loaded(machine) == ["kmend_both"]
        assert machine.type("cat /proc/version").text.startswith("kmend=2 ")
        assert machine.type("cat /proc/cmdline").text.endswith(" kmend=1\n")
        assert "kmend_cmdline" not in machine.type("cat /proc/modules").text

        machine.type("kmend unload kmend_both")
        assert loaded(machine) == []
        assert machine.type("cat /proc/version").text.startswith("Linux version ")
        assert "kmend=1" not in machine.type("cat /proc/cmdline").text

        machine.type("kmend install kmend_both.ko")
        assert machine.type("systemctl is-enabled kmend-load.service").text == "enabled\n"
        assert loaded(machine) == []
        well(machine)
        history += machine.history
        machine.off("systemctl reboot")

    with server.up() as machine:
        assert loaded(machine) == ["kmend_both"]
        assert machine.type("cat /proc/version").text.startswith("kmend=2 ")
        assert machine.type("systemctl show -P Result kmend-load.service").text == "success\n"
        assert 0 < when(machine, "kmend-load.service") < when(machine, "sysinit.target")
        assert boot(machine)["guard"] == "watching"
        # five minutes, unless the administrator wants it otherwise (as docs/boot.md has it)
        assert machine.type("systemctl is-active kmend-healthy.timer").text == "active\n"
        machine.type(
            f"mkdir -p {DROP_IN} && "
            f"printf '[Timer]\\nOnActiveSec=\\nOnActiveSec=2s\\n' >{DROP_IN}/soon.conf && "
            "systemctl daemon-reload && systemctl restart kmend-healthy.timer"
        )
        machine.type(f"while test -e /var/lib/kmend/{RELEASE}/attempt.json; do sleep 1; done", timeout=120)
        assert boot(machine)["guard"] == "clear"
        assert "is healthy" in machine.type("journalctl -b -u kmend-healthy.service; kmend log").text
        # also what the kernel of the boot before said, as systemd has kept it
        before, this = machine.type("kmend log").text.split("---- this boot ")
        assert before.startswith("20")
        assert "---- boot " in before
        assert "livepatch: 'kmend_both': unpatching complete" in before
        assert "livepatch: 'kmend_both': patching complete" in this
        well(machine)
        history += machine.history
        machine.off()

    # earlier still: with the initramfs that was made when this was switched on
    with replace(server, initrd=server.initrd.with_suffix(".early")).up() as machine:
        assert loaded(machine) == ["kmend_both"]
        lines = machine.type("dmesg").text
        enabled = lines.index("livepatch: 'kmend_both': patching complete")
        assert enabled < lines.index("systemd[1]: systemd ")
        # the unit has found it in force
        assert machine.type("systemctl show -P Result kmend-load.service").text == "success\n"
        assert lines.count("livepatch: enabling patch") == 1
        assert machine.type("findmnt -n -o OPTIONS /").text.startswith("rw")
        assert machine.type("findmnt -rn -o TARGET | grep -v binfmt_misc | sort | uniq -d").text == ""
        # by the timer, which the administrator has set to two seconds
        machine.type(f"while test -e /var/lib/kmend/{RELEASE}/attempt.json; do sleep 1; done", timeout=120)
        assert boot(machine)["guard"] == "clear"
        well(machine)
        history += machine.history
        machine.off()

    with server.up("kmend=off") as machine:
        assert loaded(machine) == []
        # passed over as asked, which is no failure of the boot
        shown = machine.type("systemctl show -P ActiveState -P ConditionResult kmend-load.service").text
        assert shown.split() == ["inactive", "no"]
        status = boot(machine)
        assert "kmend=off" in status["off"]
        assert status["guard"] == "clear"  # nothing was tried
        assert "kmend=off" in machine.type("kmend status").text
        # by hand it still goes, and the package's removal does not touch what is loaded
        machine.type("kmend load kmend_both.ko")
        machine.type("kmend uninstall kmend_both")
        assert machine.type("kmend install --list").text == "nothing is installed\n"
        machine.type("dpkg --purge kmend")
        assert loaded(machine) == ["kmend_both"]
        # /var/cache/man is man's own, which forgets pages that are gone in its daily run
        spared = "-path /root -prune -o -path /var/cache/man -prune"
        left = machine.type(f"find / -xdev {spared} -o -name '*kmend*' -print").text.split()
        assert left == [DROP_IN]
        well(machine)
        history += machine.history
        machine.off()

    with capsys.disabled():
        sys.stdout.write("\n" + "".join(f"{seconds:7.1f} s  {command}\n" for command, seconds in history))
