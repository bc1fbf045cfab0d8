"""Many kinds of sleeping system calls in a guest, and patches by kmend of the functions they sleep in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import inside

from kmend.core.config import Config
from kmend.core.run import run
from kmend.core.target import Target
from kmend.lab.guest import Guest
from kmend.lab.kernel import LabKernel

PROGRAMS = Path(__file__).parent / "programs"
MOUNTS = """
cd /sys/kernel
mountpoint -q debug || mount -t debugfs debugfs debug
mountpoint -q tracing || mount -t tracefs tracefs tracing
mkdir -p /dev/pts && { mountpoint -q /dev/pts || mount -t devpts devpts /dev/pts; }
echo 1000 >/proc/sys/fs/lease-break-time
"""
#: What waits in io_uring_enter(); only when it is asked for.
RINGS = ("io_uring", "io_uring-mask", "io_uring-submit", "io_uring-timeout")


@dataclass(frozen=True)
class Ended:
    """How one call came to its end. Times in milliseconds; ``timeout`` 0: it had none.

    ``early``: it ended before it was let go, or before its time.
    """

    returned: str
    errno: int
    took: int
    timeout: int
    early: bool

    @property
    def outcome(self) -> str:
        """What the program sees: the value, or the error's number."""
        late = self.timeout and self.took > self.timeout + 3000
        return (f"errno {self.errno}" if self.errno else self.returned) + (" late" if late else "")


@dataclass(frozen=True)
class Sleepers:
    """Sleeping processes of a guest, by kind."""

    guest: Guest
    pids: dict[str, int]

    def release(self, *, hurry: bool = False) -> dict[str, Ended]:
        """Let them go, wait for those with a timeout, and tell how each has ended.

        ``hurry``: those with a timeout are not waited for; what still sleeps has returned "asleep".
        """
        self.guest.run("touch /root/s/hurry" if hurry else ":", check=True)
        self.guest.run("touch /root/s/release", check=True)
        # its last act is to end them all: what comes next uses the same folder
        text = self.guest.run(
            "while [ ! -e /root/s/status ]; do usleep 100000; done; cat /root/s/results", timeout=240
        ).text
        found = {}
        for line in text.splitlines():
            name, returned, errno, took, timeout, early = line.split()
            found[name] = Ended(returned, int(errno), int(took), int(timeout), early == "1")
        assert found.keys() == self.pids.keys()
        return found


def compiled(name: str, folder: Path) -> bytes:
    """A program of this folder, linked statically: a guest needs nothing for it."""
    out = folder / name
    run(["gcc", "-static", "-O1", "-pthread", "-o", out, PROGRAMS / f"{name}.c"], timeout=120)
    return out.read_bytes()


def built(target: Target, name: str, folder: Path) -> Path:
    """The module that `kmend build` makes of ``programs/NAME-LINE.patch`` for that kernel."""
    line = "6.12" if target.release.startswith("6.12") else "6.1"
    patch = PROGRAMS / f"{name}-{line}.patch"
    folder.mkdir(parents=True, exist_ok=True)
    words = ("build", patch, "-n", name.replace("-", "_"), "--kernel", target.release, "-o", folder)
    run([sys.executable, "-m", "kmend", *words], timeout=900)
    return folder / f"{name.replace('-', '_')}.ko"


def settle(guest: Guest, program: bytes) -> None:
    """kmend, and the program, into a fresh guest."""
    inside.settle(guest)
    guest.put("/root/sleepers", program, 0o755)
    guest.run(MOUNTS, check=True)


@contextmanager
def prepared(target: Target, config: Config, name: str = "sleepers") -> Iterator[Guest]:
    """A guest of that kernel with the program, and the module of a patch under its sleepers in ``/root``."""
    with TemporaryDirectory(prefix="kmend-sleepers-") as scratch:
        program, module = compiled("sleepers", Path(scratch)), built(target, name, Path(scratch))
        with Guest.of(LabKernel.of(target), config.lab) as guest:
            settle(guest, program)
            guest.put(f"/root/{module.name}", module.read_bytes())
            yield guest


def asleep(guest: Guest, seconds: int, *names: str) -> Sleepers:
    """Put them to sleep; those with a timeout for so many seconds."""
    words = " ".join(names)
    done = guest.run(
        f"rm -rf /root/s; mkdir /root/s; (./sleepers /root/s {seconds} {words} >/root/s/out 2>&1; "
        "echo $? >/root/s/status) & \n"
        "while [ ! -e /root/s/asleep ]; do [ ! -e /root/s/status ] || { cat /root/s/out; exit 1; }; "
        "usleep 50000; done; cat /root/s/asleep",
        timeout=120,
    )
    assert done.status == 0, f"they did not fall asleep: {done.text}{done.errors}"
    rows = [line.split() for line in done.text.splitlines()]
    return Sleepers(guest, {name: int(pid) for name, pid in rows})


def act(guest: Guest, *words: str, timeout: float = 240.0) -> dict[str, Any]:
    """A verb that acts on one patch: its action, with the exit status."""
    found = inside.answer(guest, *words, timeout=timeout)
    assert "actions" in found, found
    return {**found["actions"][0], "status": found["status"]}


def seconds_of_last(guest: Guest) -> float:
    """How long the last transition took by the kernel's own log."""
    began = ended = 0.0
    for row in guest.dmesg():
        if "starting patching transition" in row.text or "starting unpatching transition" in row.text:
            began = row.seconds
        elif row.text.endswith("patching complete"):
            ended = row.seconds
    assert ended > began > 0
    return ended - began


def seconds_of_tasks(action: dict[str, Any]) -> float:
    """When kmend first saw that no task was left; an unpatching goes on in the kernel after that."""
    (transition,) = action["transitions"]
    return next((float(at) for at, left, _ in transition["samples"] if left == 0), transition["seconds"])
