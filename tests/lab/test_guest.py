"""Guests of the stock kernel: they obey, they are told apart when they end, and nothing of them stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep, time

import pytest

from kmend.core.config import Config
from kmend.core.errors import Failed
from kmend.core.run import run
from kmend.lab import initramfs, snapshot
from kmend.lab.guest import Guest
from kmend.lab.host import Settings
from kmend.lab.kernel import LabKernel
from kmend.lab.machine import Accel, MachineSettings
from kmend.lab.outcome import CommandTimeout, KernelOops, LostGuest

pytestmark = [pytest.mark.lab, pytest.mark.target]

TCG = Settings(accel=Accel.TCG)


@pytest.fixture(scope="module")
def guest(kernel_55: LabKernel, config: Config) -> Iterator[Guest]:
    """One guest for all tests that leave it well."""
    with Guest.of(kernel_55, config.lab) as running:
        yield running


@pytest.fixture
def fresh(kernel_55: LabKernel, config: Config) -> Iterator[Guest]:
    """A guest to break."""
    with Guest.of(kernel_55, config.lab) as running:
        yield running


def test_it_runs_the_stock_kernel_and_returns_all_three_results(guest: Guest, kernel_55: LabKernel) -> None:
    assert guest.run("uname -r", check=True).text == kernel_55.release
    status, out, err = guest.run("cat; printf 'e\\0' >&2; exit 7", stdin=b"\0\xff\n\n")
    assert (status, out, err) == (7, b"\0\xff\n\n", b"e\0")
    assert guest.run(["printf", "%s|", "a b", "c'd", "$x"]).text == "a b|c'd|$x|"
    assert guest.run("echo $HERE; echo ü", env={"HERE": "it's"}).text == "it's\nü"
    with pytest.raises(Failed, match="status 3"):
        guest.run("echo why >&2; exit 3", check=True)


def test_the_kernel_is_not_at_its_link_address(guest: Guest) -> None:
    """As under KASLR: an address held as a constant must not fit by chance."""
    (line,) = [line for line in guest.run("grep ' _text$' /proc/kallsyms").text.splitlines() if line]
    assert int(line.split()[0], 16) not in (0, 0xFFFFFFFF81000000)


def test_the_packed_image_boots_as_well(kernel_55: LabKernel, tmp_path: Path) -> None:
    """A custom target's vmlinux may lack relocations; KVM takes this way always."""
    packed = LabKernel(kernel_55.release, kernel_55.vmlinuz, kernel_55.modules)
    with Guest.of(packed, tmp_path, TCG) as guest:
        assert guest.run("uname -r").text == kernel_55.release


def test_files_go_both_ways_unchanged(guest: Guest) -> None:
    data = bytes(range(256)) * 4096 + b"\n\0"
    guest.put("/root/deep/folder/odd 'name'", data, 0o700)
    assert guest.get("/root/deep/folder/odd 'name'") == data
    assert guest.run("stat -c %a /root/deep/folder/*").text == "700"
    guest.put("/root/empty", b"")
    assert guest.get("/root/empty") == b""
    with pytest.raises(Failed):
        guest.get("/root/absent")


def test_the_clock_is_right_and_random_numbers_are_fresh(
    guest: Guest, kernel_55: LabKernel, config: Config
) -> None:
    assert abs(int(guest.run("date +%s").text) - time()) < 5
    first = guest.run("head -c 32 /dev/urandom").stdout
    with Guest.of(kernel_55, config.lab, share=False) as other:
        assert abs(int(other.run("date +%s").text) - time()) < 5
        assert other.run("head -c 32 /dev/urandom").stdout != first
        assert any("virtual machine fork" in message.text for message in other.dmesg())


def test_the_hosts_programs_are_there_and_cannot_be_changed(guest: Guest) -> None:
    assert "ext4" in guest.run("/usr/sbin/mkfs.ext4 -V; /usr/bin/dd --version; echo ext4").text
    assert "coreutils" in guest.run("/usr/bin/dd --version", check=True).text
    guest.run("echo mine >/usr/bin/kmend-was-here", check=True)  # only in the guest's memory
    assert not Path("/usr/bin/kmend-was-here").exists()
    assert guest.run("touch /kmend/host/bin/kmend-was-here").status != 0
    assert guest.run("mount -o remount,rw /kmend/host; touch /kmend/host/bin/kmend-was-here").status != 0
    assert not Path("/usr/bin/kmend-was-here").exists()


def test_every_module_can_be_loaded_by_name(guest: Guest) -> None:
    for name in ("ext4", "loop", "xfs", "dummy"):
        guest.run(["modprobe", name], check=True)
    assert "xfs" in guest.run("lsmod").text
    # the kernel's own request goes the same way
    guest.run("ip link add v0 type veth && ip link del v0 || modprobe veth", check=True)


def test_a_command_that_does_not_end_is_killed_with_all_its_children(guest: Guest) -> None:
    start = monotonic()
    with pytest.raises(CommandTimeout) as error:
        guest.run("echo part; sleep 1000 & sleep 1000", timeout=1)
    assert monotonic() - start < 10
    assert error.value.done.text == "part"
    assert "sleep 1000" not in guest.run("ps w").text.replace("grep", "")


def test_what_stays_in_the_background_holds_nobody(guest: Guest) -> None:
    start = monotonic()
    assert guest.run("(sleep 2; echo late) & echo now").text == "now"
    assert monotonic() - start < 1.9
    assert guest.run("echo next").text == "next"
    sleep(2)
    assert guest.run("echo last").text == "last"


def test_the_log_can_be_read_while_a_command_runs(fresh: Guest) -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(len(fresh.dmesg())))
    threading.Timer(0.3, thread.start).start()
    fresh.run("sleep 2")
    thread.join(1)
    assert found
    assert found[0] > 100


def test_a_panic_is_an_oops(fresh: Guest) -> None:
    start = monotonic()
    with pytest.raises(KernelOops) as error:
        fresh.run("echo c >/proc/sysrq-trigger; sleep 100")
    assert "sysrq triggered crash" in error.value.what
    assert error.value.report.lines
    assert monotonic() - start < 20
    assert "Kernel panic" in fresh.console()
    with pytest.raises(KernelOops):
        fresh.run("true")


def test_a_guest_that_goes_away_is_lost(fresh: Guest) -> None:
    with pytest.raises(LostGuest) as error:
        fresh.run("poweroff -f; sleep 100")
    assert "QEMU ended" in error.value.why
    assert error.value.console


def test_a_guest_that_falls_silent_is_lost(fresh: Guest) -> None:
    os.kill(fresh.pid, signal.SIGSTOP)
    with pytest.raises(LostGuest, match="lost"):
        fresh.run("true", timeout=0.5)
    assert not alive(fresh.pid)


def test_a_command_that_kills_its_own_agent_is_answered_all_the_same(fresh: Guest) -> None:
    done = fresh.run("echo before; killall -9 sh agent; sleep 1000", timeout=20)
    assert done.status == 137
    assert done.text == "before"
    assert fresh.run("echo well").text == "well"
    assert fresh.dmesg()


def test_two_processors(kernel_55: LabKernel, config: Config) -> None:
    with Guest.of(kernel_55, config.lab, Settings(cpus=2)) as guest:
        assert guest.run("nproc").text == "2"


def test_a_second_start_takes_a_moment(kernel_55: LabKernel, config: Config) -> None:
    took = []
    for _ in range(3):
        start = monotonic()
        with Guest.of(kernel_55, config.lab) as guest:
            assert "boot" not in guest.timings
        took.append(monotonic() - start)
    assert min(took) < 1.5  # 0.35 s on an idle machine


def test_a_damaged_snapshot_is_replaced(kernel_55: LabKernel, config: Config, tmp_path: Path) -> None:
    with Guest.of(kernel_55, config.lab, TCG, share=False):
        pass
    key = snapshot.key_of(kernel_55.vmlinuz, initramfs.build(kernel_55), MachineSettings(), direct=True)
    (tmp_path / "snapshots").mkdir()
    run(["cp", "-a", "--sparse=always", config.lab / "snapshots" / key, tmp_path / "snapshots"])
    with (tmp_path / "snapshots" / key / "mem").open("r+b") as file:
        file.seek(100 << 20)
        file.write(os.urandom(4096))
    with Guest.of(kernel_55, tmp_path, TCG, share=False) as guest:
        assert "boot" in guest.timings
        assert guest.run("echo well").text == "well"


def test_a_sound_snapshot_that_does_not_wake_is_replaced(kernel_55: LabKernel, tmp_path: Path) -> None:
    """Its digest is right, but its contents are no machine: only trying tells."""
    key = snapshot.key_of(kernel_55.vmlinuz, initramfs.build(kernel_55), MachineSettings(), direct=True)
    folder = tmp_path / "snapshots" / key
    folder.mkdir(parents=True)
    (folder / "mem").write_bytes(b"")
    os.truncate(folder / "mem", 512 << 20)
    (folder / "state").write_bytes(b"no machine state")
    fds = [os.open(folder / name, os.O_RDONLY) for name in ("mem", "state")]
    digest = snapshot._digest(*fds)
    for fd in fds:
        os.close(fd)
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "sha256": digest, "memory": 512 << 20}))
    with Guest.of(kernel_55, tmp_path, TCG, share=False) as guest:
        assert "boot" in guest.timings
        assert guest.run("echo well").text == "well"


SLEEPER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
from pathlib import Path
from kmend.lab.guest import Guest
from kmend.lab.kernel import LabKernel
with Guest.of(LabKernel(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])), Path(sys.argv[4])) as guest:
    print(guest.pid, flush=True)
    guest.run("sleep 1000", timeout=1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_guest_outlives_kmend(kernel_55: LabKernel, config: Config, number: signal.Signals) -> None:
    words = [kernel_55.release, str(kernel_55.vmlinuz), str(kernel_55.modules), str(config.lab)]
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        pid = int(child.stdout.readline())
        assert alive(pid)
        sleep(0.3)
        child.send_signal(number)
        child.wait(20)
    deadline = monotonic() + 5
    while alive(pid) and monotonic() < deadline:
        sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether that process runs; a zombie that its new parent has not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
