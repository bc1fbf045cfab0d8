"""Tasks in a guest that hold a transition up, each for another reason, and how kmend names them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sleeping
from resident import Resident

from kmend.core.run import run
from kmend.core.target import Target
from kmend.lab.guest import Guest

#: Its number is asked for by the file that it writes once it holds the task.
TRACER = """
import os, sys, time
sys.path.insert(0, "/opt/kmend")
from kmend.runtime import syscalls
pid = int(sys.argv[1])
assert syscalls.ptrace(syscalls.PTRACE_SEIZE, pid) == 0
assert syscalls.ptrace(syscalls.PTRACE_INTERRUPT, pid) == 0
os.waitpid(pid, syscalls.WALL)
open("/root/tracer", "w").write(str(os.getpid()))
time.sleep(100000)
"""
#: Starts a task of each kind and prints NAME PID. The frozen one is frozen, and so on, when it ends.
START = """
cd /root
rm -f tracer
exec 3>&1 >/dev/null 2>&1 </dev/null
./idle sleep & echo sleeper $! >&3
./idle vfork & parent=$!; echo vfork $parent >&3
./idle sleep & stopped=$!; echo stopped $stopped >&3
./idle sleep & traced=$!; echo traced $traced >&3
./idle sleep & frozen=$!; echo frozen $frozen >&3
/usr/bin/unshare --pid --fork --mount-proc ./idle sleep & outer=$!
sleep 1
echo inner $(cat /proc/$outer/task/$outer/children) >&3
echo vforked $(cat /proc/$parent/task/$parent/children) >&3
kill -STOP $stopped
/usr/bin/python3 tracer.py $traced & echo tracer $! >&3
mkdir -p /sys/fs/cgroup
mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /sys/fs/cgroup/cold
echo $frozen >/sys/fs/cgroup/cold/cgroup.procs
echo 1 >/sys/fs/cgroup/cold/cgroup.freeze
while [ ! -e tracer ]; do usleep 50000; done
while ! grep -q 'frozen 1' /sys/fs/cgroup/cold/cgroup.events; do usleep 50000; done
"""
END = """
kill -9 $(cat /root/tracer); killall -CONT idle
echo 0 >/sys/fs/cgroup/cold/cgroup.freeze
killall -9 idle; sleep 1; true
"""


@dataclass(frozen=True)
class Named:
    """What `kmend blockers --json` says of one task."""

    row: dict[str, Any]

    @property
    def short(self) -> tuple[str, str | None, bool]:
        """Cause, function, whether it may be woken."""
        return self.row["cause"], self.row["function"], self.row["wakeable"]


def hall(target: Target, folder: Path) -> dict[str, Path]:
    """The modules ``hall`` and ``hall_patch``, built by the kernel's own makefiles."""
    for name in ("hall", "hall-patch"):
        text = (sleeping.PROGRAMS / f"{name}.c").read_text()
        (folder / f"{name.replace('-', '_')}.c").write_text(text)
    (folder / "Makefile").write_text("obj-m := hall.o hall_patch.o\n")
    run(
        ["make", "-s", "-C", target.source, f"M={folder}", f"CC={target.compiler}", "modules"],
        timeout=300,
    )
    return {name: folder / f"{name}.ko" for name in ("hall", "hall_patch")}


def settle(guest: Guest, program: bytes, modules: dict[str, Path]) -> None:
    """The program ``idle`` and modules into a guest that has kmend."""
    guest.put("/root/idle", program, 0o755)
    guest.put("/root/tracer.py", TRACER.encode())
    for name, path in modules.items():
        guest.put(f"/root/{name}.ko", path.read_bytes())
    guest.run(sleeping.MOUNTS, check=True)


def pids(text: str) -> dict[str, int]:
    """Lines of NAME PID."""
    return {name: int(pid) for name, pid in (line.split() for line in text.splitlines())}


def blockers(kmend: Resident) -> dict[int, Named]:
    """What kmend says now, by thread."""
    found = kmend.answer("blockers")["transition"]
    assert found is not None, "no transition is under way"
    return {row["tid"]: Named(row) for row in found["blockers"]}


def many(guest: Guest, number: int) -> None:
    """So many threads of one process, asleep in the function."""
    guest.run(MANY.replace("NUMBER", str(number)), timeout=300, check=True)


def cost(guest: Guest) -> tuple[dict[str, Any], float, float]:
    """`kmend blockers` during a transition: the answer, its seconds, its memory in MB."""
    guest.put("/root/measure.py", MEASURE.encode())
    seconds, kilobytes = guest.run("/usr/bin/python3 measure.py", timeout=300, check=True).text.split()
    document = json.loads(guest.get("/root/answer"))
    return document["transition"], float(seconds), int(kilobytes) / 1024


MANY = """
cd /root
rm -f ready
echo 20000 >/proc/sys/kernel/threads-max
(./idle threads NUMBER >ready 2>&1 </dev/null &)
while ! grep -q ready ready; do grep idle: ready && exit 1; usleep 50000; done
sleep 1
"""
MEASURE = """
import resource, subprocess, time
began = time.monotonic()
with open("/root/answer", "w") as out:
    subprocess.run(["kmend", "blockers", "--json"], stdout=out, check=True)
print(time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
