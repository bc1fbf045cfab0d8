"""A whole Debian 12 for tests: a root folder to run commands in, and a machine that boots from it.

The folder is made by debootstrap from this machine's own package sources and kept, packed, under kmend's
cache (folder ``tests``; it can be deleted). Commands run in it under ``chroot``, in mount and process
namespaces of their own: what they mount or leave running is gone with them. The machine is QEMU with the
kernel and the initramfs that Debian's own packages put into the folder's ``/boot``, and the folder as an
ext4 disk; systemd is its init. A small program in it takes commands from a virtio port, as a terminal
would.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import pytest

from kmend.core.config import Config
from kmend.core.run import Result, environment, run

SUITE = "bookworm"
#: Counts how :func:`unpacked` makes a root: one that was kept from before a change is made again.
RECIPE = 2
#: The programs that making a root takes, and the packages that have them.
NEEDED = {"debootstrap": "debootstrap", "unshare": "util-linux", "mke2fs": "e2fsprogs"}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: ``$0`` is the folder, ``$1`` the command. /sys is there as in a container: this machine's, read-only.
ENTER = f"""
mount -t proc proc "$0/proc"
mount -t sysfs -o ro sysfs "$0/sys"
mount --rbind /dev "$0/dev"
exec chroot "$0" env -i PATH={PATH} HOME=/root TERM=dumb LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive \\
    bash -c "cd /root; $1"
"""
#: Settings of this machine's apt without which its sources may not be reachable from the folder.
APT_SETTINGS = re.compile(r"Acquire::(?:https?::|Check-Valid-Until|Check-Date|Retries)")


def require() -> None:
    """Skip the test where a root cannot be made, and say how it could."""
    if os.geteuid() != 0:
        pytest.skip("makes a Debian root with debootstrap and chroot: run the test as root")
    lacking = sorted({package for name, package in NEEDED.items() if which(name) is None})
    if lacking:
        pytest.skip(f"makes a Debian root: apt-get install {' '.join(lacking)}")


def which(name: str) -> str | None:
    """A program, also in the folders that are root's alone."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{PATH}")


@dataclass(frozen=True, slots=True)
class Root:
    """A Debian root in a folder."""

    folder: Path

    def run(self, command: str, *, check: bool = True, timeout: float = 1200.0) -> Result:
        """A command of bash in it, as root, in root's home."""
        words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", ENTER]
        done = run([*words, self.folder, command], timeout=timeout, check=False)
        if check and done.status != 0:
            raise AssertionError(f"{command}: status {done.status}\n{done.text}\n{done.errors}")
        return done

    def install(self, *packages: str) -> None:
        """apt-get install, without what is only recommended."""
        self.run(f"apt-get -q -y -o Dpkg::Use-Pty=0 install --no-install-recommends {' '.join(packages)}")

    def path(self, name: str) -> Path:
        """A file in it."""
        return self.folder / name.lstrip("/")


def sources() -> list[tuple[str, str]]:
    """This machine's entries for the suite: (address, suite)."""
    done = run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(CODENAME) $(COMPONENT)"])
    rows: dict[tuple[str, str], None] = {}
    for line in done.text.splitlines():
        match line.split():
            case [address, _, codename, "main"] if codename.startswith(SUITE):
                rows[address, codename] = None
            case _:  # another repository's
                continue
    return list(rows)


def unpacked(config: Config, to: Path, *packages: str) -> Root:
    """A new root in ``to``: debootstrap's minimal system and ``packages``; made once, then unpacked."""
    entries = sources()
    plain = [address for address, codename in entries if codename == SUITE]
    if not plain:
        pytest.skip(f"apt on this machine has no source for {SUITE}: add one, and run apt-get update")
    kept = [line for line in run(["apt-config", "dump"]).text.splitlines() if APT_SETTINGS.match(line)]
    key = hashlib.sha256(json.dumps([RECIPE, entries, kept, packages]).encode()).hexdigest()[:16]
    store = config.cache / "tests"
    packed = store / f"{SUITE}-{len(packages)}-{key}.tar.zst"
    to.mkdir(parents=True)
    root = Root(to)
    if packed.exists():
        run(["tar", "--zstd", "--numeric-owner", "-xpf", packed, "-C", to], timeout=1200)
        return root
    store.mkdir(parents=True, exist_ok=True)
    for old in store.glob(f"{SUITE}-{len(packages)}-*"):
        old.unlink()
    run([which("debootstrap") or "debootstrap", "--variant=minbase", SUITE, to, plain[0]], timeout=1800)
    root.path("/etc/dpkg/dpkg.cfg.d/fast").write_text("force-unsafe-io\n")  # nobody keeps this disk
    root.path("/etc/apt/sources.list").unlink(missing_ok=True)
    root.path("/etc/apt/sources.list.d/debian.sources").write_text(
        "\n".join(
            f"Types: deb\nURIs: {address}\nSuites: {codename}\nComponents: main\n"
            "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
            for address, codename in entries
        )
    )
    root.path("/etc/apt/apt.conf.d/90machine").write_text("\n".join(kept) + "\n")
    shutil.copy("/etc/resolv.conf", root.path("/etc/resolv.conf"))
    shutil.copy("/etc/hosts", root.path("/etc/hosts"))
    root.run("apt-get -q update")
    if packages:
        root.install(*packages)
    root.run("apt-get clean")
    beside = packed.with_suffix(".new")
    run(["tar", "--zstd", "--numeric-owner", "-cpf", beside, "-C", to, "."], timeout=1200)
    beside.rename(packed)
    return root


# -- the machine -------------------------------------------------------------------------------------

PORT = "typist"
#: Runs in the machine: one JSON line in, one out.
TYPIST = f'''#!/usr/bin/python3
import json, os, signal, subprocess
with open("/dev/virtio-ports/{PORT}", "r+b", buffering=0) as port:
    waiting = b""
    while True:
        byte = port.read(4096)
        waiting += byte or b""
        while b"\\n" in waiting:
            line, waiting = waiting.split(b"\\n", 1)
            asked = json.loads(line)
            child = subprocess.Popen(
                ["bash", "-lc", asked["command"]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, start_new_session=True, cwd="/root",
                env={{"HOME": "/root", "TERM": "dumb", "LC_ALL": "C.UTF-8", "PATH": "{PATH}"}})
            try:
                out, errors = child.communicate(timeout=asked["timeout"])
                status = child.returncode
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                out, errors = child.communicate()
                status = 124
            answer = json.dumps({{"status": status, "out": out.decode(errors="replace"),
                                 "errors": errors.decode(errors="replace")}}).encode() + b"\\n"
            while answer:
                answer = answer[port.write(answer):]
'''
UNIT = f"""[Unit]
Description=Commands of the test
After=dev-virtio\\x2dports-{PORT}.device
BindsTo=dev-virtio\\x2dports-{PORT}.device

[Service]
ExecStart=/usr/local/sbin/typist

[Install]
WantedBy=multi-user.target
"""
#: As the lab's own guests: one thread for all processors, or a function that runs while its text is modified
#: makes the guest livelock.
QEMU = (
    *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
    *("-accel", "tcg,thread=single", "-cpu", "max", "-machine", "q35,vmport=off", "-m", "3072"),
    *("-device", "virtio-serial-pci", "-device", "virtio-rng-pci"),
)
WORDS = "root=/dev/vda ro console=ttyS0 panic=-1 mitigations=off tsc=unstable"


def make_bootable(root: Root) -> None:
    """What a machine needs beside its packages: where its root is, and who takes the commands."""
    root.path("/etc/fstab").write_text("/dev/vda / ext4 errors=remount-ro 0 1\n")
    root.path("/etc/hostname").write_text("server\n")
    typist = root.path("/usr/local/sbin/typist")
    typist.write_text(TYPIST)
    typist.chmod(0o755)
    root.path("/etc/systemd/system/typist.service").write_text(UNIT)
    root.run("systemctl enable typist.service && systemctl set-default multi-user.target")


def put(file: Path, disk: Path) -> None:
    """Copy a file into root's home on a disk that no machine has mounted."""
    commands = disk.with_suffix(".commands")
    commands.write_text(f"cd /root\nwrite {file} {file.name}\n")
    run([which("debugfs") or "debugfs", "-w", "-f", commands, disk])


def disk_of(root: Root, file: Path, gigabytes: int = 10) -> None:
    """The root as an ext4 file system in a (sparse) file."""
    with file.open("wb") as new:
        new.truncate(gigabytes << 30)
    run(["mke2fs", "-q", "-t", "ext4", "-d", root.folder, file], timeout=1800)


class Terminal:
    """Commands typed on a running machine."""

    def __init__(self, connection: socket.socket, console: Path, process: subprocess.Popen[bytes]) -> None:
        self._connection, self._console, self.process = connection, console, process
        self.history: list[tuple[str, float]] = []

    def type(self, command: str, *, timeout: float = 300.0, check: bool = True) -> Result:
        """Run a command in bash, as root; its end. Seconds are the machine's own."""
        began = monotonic()
        self._connection.settimeout(timeout + 120)
        self._connection.sendall(json.dumps({"command": command, "timeout": timeout}).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            try:
                part = self._connection.recv(1 << 16)
            except TimeoutError:
                part = b""
            if not part:
                raise AssertionError(f"no answer to {command!r}; the console's end:\n{self.console[-3000:]}")
            answer += part
        row = json.loads(answer)
        done = Result((command,), row["status"], row["out"].encode(), row["errors"].encode())
        self.history.append((command, monotonic() - began))
        if check and done.status != 0:
            raise AssertionError(f"{command}: status {done.status}\n{done.text}\n{done.errors}")
        return done

    def answer(self, command: str, *, timeout: float = 300.0, check: bool = True) -> dict[str, object]:
        """The JSON document that a command prints."""
        found = json.loads(self.type(command, timeout=timeout, check=check).text)
        assert isinstance(found, dict)
        return found

    @property
    def console(self) -> str:
        """What the serial console has shown."""
        return self._console.read_bytes().decode(errors="replace")

    def ready(self, limit: float = 600.0) -> None:
        """Wait until the machine is up: until then the line that asks for it waits in the port."""
        self.type("systemctl is-system-running --wait", timeout=limit, check=False)

    def boots(self, number: int, limit: float = 1200.0) -> None:
        """Wait until the console has shown the beginning of so many boots.

        What is typed before a machine is reset is lost with it. The first boot after a reset may be slow, as
        QEMU still has to forget what it translated of the one before: its kernel had a root after 227 s,
        where the first one had needed 20.
        """
        until = monotonic() + limit
        while self.console.count("] Linux version ") < number:
            if monotonic() > until or self.process.poll() is not None:
                raise AssertionError(f"no boot {number}; the console's end:\n{self.console[-3000:]}")
            sleep(1)

    def off(self, command: str = "systemctl poweroff") -> None:
        """Shut the machine down as its user would, and wait for its end."""
        self.type(command, check=False)
        try:
            self.process.wait(240)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(
                f"{command} does not end; the console's end:\n{self.console[-3000:]}"
            ) from error


@dataclass(frozen=True, slots=True)
class Server:
    """A machine with a disk; ``boot`` holds the kernel and initramfs that are on the disk too."""

    disk: Path
    vmlinuz: Path
    initrd: Path

    @contextmanager
    def up(self, *words: str, limit: float = 600.0, reboots: bool = False) -> Iterator[Terminal]:
        """One boot; ``words`` are added to the kernel's command line. At the end it is killed.

        ``reboots``: it comes up again after a reboot, with the same kernel and the same words.
        """
        mine, other = socket.socketpair()
        console = self.disk.with_suffix(".console")
        argv = [
            *QEMU,
            *(() if reboots else ("-no-reboot",)),
            *("-kernel", str(self.vmlinuz), "-initrd", str(self.initrd)),
            *("-append", " ".join((WORDS, *words))),
            *("-drive", f"if=none,id=disk,format=raw,file={self.disk},cache=unsafe"),
            *("-device", "virtio-blk-pci,drive=disk"),
            *("-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=port,fd={other.fileno()}"),
            *("-device", f"virtserialport,chardev=port,name={PORT}"),
        ]
        with mine, other:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
                stdout=(log := console.with_suffix(".qemu").open("wb")),
                pass_fds=[other.fileno()],
                env=environment(),
                start_new_session=True,
            )
            log.close()
            try:
                other.close()
                terminal = Terminal(mine, console, process)
                terminal.ready(limit)
                yield terminal
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
