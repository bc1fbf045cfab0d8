"""Hundreds of livepatches loaded, disabled, replaced and unloaded by kmend, in one guest under load.

    .venv/bin/python bench/soak.py [CYCLES] [MINUTES] [RELEASE]   (default: 500 cycles on 6.1.0-56-amd64)

Not on 6.1.0-55: the load soon meets that kernel's own ext4 crash (examples/ext4-null-folio.patch), with and
without patches. After MINUTES (default: no limit), at Ctrl-C or SIGTERM it ends with the cycles that it has
made by then, at the end of a batch.

The modules are built by kmend from small changes of functions that the load runs through: reading, sending
over TCP, forking, writing to ext4. The load writes and reads files on ext4, sends over the loopback device,
forks and executes programs, all the while. kmend runs in the guest, imported once; each action is a fork.

A cycle is one of: load and unload; load, disable and unload; two loads, a cumulative patch that replaces both
(and unloads their modules), unload. Ends with status 1 if the kernel has complained, if a module or a patched
function is left, if an action failed, or if memory is not back where it was.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/lab"))

from resident import Resident  # noqa: E402 - the path above makes it importable

from kmend.core.config import Config  # noqa: E402 - as above
from kmend.core.run import run  # noqa: E402 - as above
from kmend.core.target import Release, Target  # noqa: E402 - as above
from kmend.lab.guest import Guest  # noqa: E402 - as above
from kmend.lab.host import Settings  # noqa: E402 - as above
from kmend.lab.kernel import LabKernel  # noqa: E402 - as above
from kmend.lab.outcome import KernelOops, LostGuest  # noqa: E402 - as above
from measure import kmend, settings, target_of  # noqa: E402 - the path above belongs to it

#: Name, source file, a line of it, and what is put behind it: code that changes nothing for any real caller.
CHANGES = (
    (
        "soak_read",
        "fs/read_write.c",
        "ssize_t ksys_read(unsigned int fd, char __user *buf, size_t count)\n{\n",
        "\tssize_t ret = -EBADF;\n",
        "\n\tif (unlikely(count == 0x7ead7ead7eadUL))\n\t\treturn -EINVAL;\n",
    ),
    (
        "soak_send",
        "net/ipv4/tcp.c",
        "int tcp_sendmsg(struct sock *sk, struct msghdr *msg, size_t size)\n{\n",
        "\tint ret;\n",
        "\n\tif (unlikely(size == 0x7ead7ead7eadUL))\n\t\treturn -EMSGSIZE;\n",
    ),
    (
        "soak_fork",
        "kernel/fork.c",
        "pid_t kernel_clone(struct kernel_clone_args *args)\n{\n",
        "\tpid_t nr;\n",
        "\n\tif (unlikely(args->stack == 0x7ead7ead7eadUL))\n\t\treturn -EINVAL;\n",
    ),
    (
        "soak_ext4",
        "fs/ext4/file.c",
        "ext4_file_write_iter(struct kiocb *iocb, struct iov_iter *from)\n{\n",
        "\tstruct inode *inode = file_inode(iocb->ki_filp);\n",
        "\n\tif (unlikely(iocb->ki_pos == 0x7ead7ead7eadL))\n\t\treturn -EFBIG;\n",
    ),
)
ALL = "soak_all"
#: What runs meanwhile. Each counts what it has done; all at the lowest priority: kmend is not to be starved.
FILES = """#!/bin/sh
n=0
while :; do
    dd if=/dev/zero of=/mnt/files/a bs=16k count=16 2>/dev/null
    cp /mnt/files/a /mnt/files/b; mv /mnt/files/b /mnt/files/c; cat /mnt/files/c >/dev/null; rm /mnt/files/c
    n=$((n+1)); echo $n >/run/load/files
done
"""
FORKS = """#!/bin/sh
n=0
while :; do
    /usr/bin/true; ( : ); /usr/bin/uname >/dev/null; n=$((n+3)); echo $n >/run/load/forks
done
"""
NET = """
import os, socket, threading, time
server = socket.create_server(("127.0.0.1", 7777))
def echo():
    peer, _ = server.accept()
    while data := peer.recv(65536):
        peer.sendall(data)
threading.Thread(target=echo, daemon=True).start()
client = socket.create_connection(("127.0.0.1", 7777))
block, n = bytes(16384), 0
while True:
    client.sendall(block)
    left = len(block)
    while left:
        left -= len(client.recv(65536))
    n += 1
    if n % 50 == 0:
        with open("/run/load/net.new", "w") as out:
            out.write(str(n))
        os.rename("/run/load/net.new", "/run/load/net")
"""
PREPARE = """
set -e
modprobe -a virtio_blk ext4
mount /dev/vda /mnt
mkdir -p /mnt/files /mnt/state /var/lib/kmend /run/load
mount -o bind /mnt/state /var/lib/kmend
mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
mountpoint -q /sys/kernel/debug || mount -t debugfs debugfs /sys/kernel/debug
ip link set lo up
"""
#: In sessions of their own: their end is that of the group.
START = """
for name in files forks; do setsid nice -n 19 sh /root/$name.sh </dev/null >/dev/null 2>&1 & echo $!; done
setsid nice -n 19 /usr/bin/python3 /root/net.py </dev/null >/root/net.log 2>&1 & echo $!
"""
#: Drops what can be dropped, twice: what a grace period or a work queue gives back comes a moment later.
SETTLE = """
sync; echo 3 >/proc/sys/vm/drop_caches; sleep 5
sync; echo 3 >/proc/sys/vm/drop_caches; sleep 2
cat /proc/meminfo
"""
#: Runs in the guest. One JSON line per action that failed; the last one has the figures.
DRIVER = """
import io, json, os, sys, time, contextlib
import kmend.cli
from kmend.core.kmsg import reports

first, last, names = {first}, {last}, {names}

def action(*words):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        out, err, status = io.StringIO(), io.StringIO(), 99
        sys.argv = ["kmend", *words]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = kmend.cli.main([*words, "--json", "--quiet"])
        with os.fdopen(write, "w") as pipe:
            pipe.write(json.dumps([status, out.getvalue(), err.getvalue()]))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    status, out, err = json.loads(text)
    if status:
        print(json.dumps([cycle, words, status, out[-3000:], err[-2000:]]))
    counts[words[0]] = counts.get(words[0], 0) + 1
    if not status and words[0] in ("load", "unload", "disable"):
        for row in json.loads(out)["actions"]:
            for one in row["transitions"]:
                spent.append(one["seconds"])
                woken.append(len(one["woken"]))
            replaced.extend(row["replaced"])

counts, spent, woken, replaced = dict(), [], [], []
began = time.monotonic()
for cycle in range(first, last):
    one = names[cycle % len(names)]
    other = names[(cycle + 1) % len(names)]
    match cycle % 3:
        case 0:
            action("load", "/root/" + one + ".ko")
            action("unload", one)
        case 1:
            action("load", "/root/" + one + ".ko")
            action("disable", one)
            action("unload", one)
        case 2:
            action("load", "/root/" + one + ".ko")
            action("load", "/root/" + other + ".ko")
            action("load", "/root/{all}.ko")
            action("unload", "{all}")
print(json.dumps(dict(seconds=time.monotonic() - began, counts=counts, spent=sum(spent),
                      longest=max(spent), woken=sum(woken), replaced=len(replaced))))
"""
#: Cycles before memory is measured for the first time: caches that grow once, then stay, have grown.
WARM = 12
#: Cycles at a time, so that something is seen of the progress.
BATCH = 20
SHOWN = (
    *("MemAvailable", "MemFree", "Slab", "SReclaimable", "SUnreclaim", "VmallocUsed"),
    *("Percpu", "KernelStack", "PageTables", "Shmem"),
)
#: What memory may differ by, in kB. The guest at rest differs by a few hundred kB between two looks at the
#: same state (both are shown). One page kept by each of 500 cycles would be 2,000 kB of MemAvailable, 1 kB in
#: each 500 kB of Slab; a module's memory that is not given back at least 8 kB of VmallocUsed in each.
TOLERANCE = {
    "MemAvailable": 1500,
    "Slab": 512,
    "SUnreclaim": 512,
    "VmallocUsed": 256,
    "Percpu": 128,
    "KernelStack": 128,
}
#: Words in the kernel's log (lib/bug.c, kernel/rcu, kernel/locking, kernel/hung_task.c) that mean trouble.
BAD = (
    "WARNING:",
    "BUG:",
    "Oops",
    "rcu:",
    "INFO: ",
    "lockdep",
    "blocked for more than",
    "Call Trace",
    "general protection",
)


def module_sources(target: Target, folder: Path) -> dict[str, list[Path]]:
    """A patch file for each change; the cumulative patch has them all."""
    found: dict[str, list[Path]] = {}
    for name, file, head, line, added in CHANGES:
        old = (target.source / file).read_text()
        start = old.index(head)
        at = old.index(line, start) + len(line)
        new = old[:at] + added + old[at:]
        text = "".join(
            difflib.unified_diff(
                old.splitlines(keepends=True), new.splitlines(keepends=True), f"a/{file}", f"b/{file}"
            )
        )
        path = folder / f"{name}.patch"
        path.write_text(text)
        found[name] = [path]
    found[ALL] = [path for paths in found.values() for path in paths]
    return found


def built(target: Target, cache: Path, folder: Path) -> dict[str, Path]:
    """The modules, made by kmend."""
    found = {}
    for name, patches in module_sources(target, folder).items():
        words = [*map(str, patches), "--kernel", target.release, "-o", str(folder), "-n", name]
        done = kmend("build", *words, *([] if name == ALL else ["--no-replace"]), cache=cache)
        found[name] = folder / f"{name}.ko"
        functions = [row["name"] for obj in done.document["objects"] for row in obj["functions"]]
        print(f"built {name} in {done.seconds:.1f} s: {', '.join(functions)}", flush=True)
    return found


def memory(guest: Guest) -> dict[str, int]:
    """Some lines of /proc/meminfo in kB, once all that can be freed is freed."""
    rows = guest.run(SETTLE, check=True, timeout=120).text.splitlines()
    found = {row.split(":")[0]: int(row.split()[1]) for row in rows}
    return {name: found[name] for name in SHOWN}


class Load:
    """What keeps the guest busy."""

    def __init__(self, guest: Guest) -> None:
        self.guest, self.groups = guest, ""
        for name, text in (("files.sh", FILES), ("forks.sh", FORKS), ("net.py", NET)):
            guest.put(f"/root/{name}", text.encode())

    def start(self) -> None:
        self.groups = " ".join(f"-{word}" for word in self.guest.run(START, check=True).text.split())

    def stop(self) -> None:
        # busybox's kill takes a negative number for a group
        self.guest.run(f"kill -9 {self.groups}; usleep 300000; rm -f /mnt/files/*", timeout=60)

    def done(self) -> dict[str, int]:
        """Rounds that each part has made."""
        text = self.guest.run(
            "for n in files forks net; do echo $n $(cat /run/load/$n 2>/dev/null); done"
        ).text
        return {row.split()[0]: int(row.split()[1]) for row in text.splitlines() if len(row.split()) == 2}


def main() -> int:
    """As told on the command line."""
    cycles = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    limit = float(sys.argv[2]) * 60 if len(sys.argv) > 2 else math.inf
    release = Release(sys.argv[3] if len(sys.argv) > 3 else "6.1.0-56-amd64")
    config = settings()
    target = target_of(config, release)
    began, asked = monotonic(), list[int]()

    def over() -> bool:
        return bool(asked) or monotonic() - began > limit

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda which, _frame: asked.append(which))
    with tempfile.TemporaryDirectory(prefix="kmend-soak-") as scratch:
        return soaked(target, config, Path(scratch), cycles, over=over)


def soaked(
    target: Target,
    config: Config,
    folder: Path,
    cycles: int,
    *,
    warm: int = WARM,
    over: Callable[[], bool] = lambda: False,
) -> int:
    """Build, soak, look; the exit status. ``over`` is asked after each batch whether to end now.

    With fewer ``warm`` cycles than ``WARM`` memory is shown and decides nothing: caches still grow.
    """
    modules = built(target, config.cache, folder)
    disk = folder / "disk"
    disk.write_bytes(b"")
    os.truncate(disk, 128 << 20)
    run(["mke2fs", "-q", "-t", "ext4", "-b", "4096", disk])
    with Guest.of(LabKernel.of(target), config.lab, Settings(disk=disk)) as guest:
        try:
            return soak(guest, modules, cycles, target.release, warm, over)
        except (KernelOops, LostGuest) as error:
            print(f"{error.what}\n{error.why}\n{guest.console()[-6000:]}")
            return 1


def soak(
    guest: Guest, modules: dict[str, Path], cycles: int, release: str, warm: int, over: Callable[[], bool]
) -> int:
    """The cycles in a guest; the exit status."""
    guest.run(PREPARE, check=True)
    for name, path in modules.items():
        guest.put(f"/root/{name}.ko", path.read_bytes())
    resident, load = Resident(guest), Load(guest)
    names = [row[0] for row in CHANGES]
    troubles: list[Any] = []
    total: dict[str, Any] = {
        "seconds": 0.0,
        "counts": {},
        "spent": 0.0,
        "longest": 0.0,
        "woken": 0,
        "replaced": 0,
    }

    def some(first: int, last: int) -> dict[str, Any]:
        code = DRIVER.format(first=first, last=last, names=names, all=ALL)
        *failed, figures = [json.loads(line) for line in resident.run(code, timeout=3600).text.splitlines()]
        troubles.extend(failed)
        return dict(figures)

    start = max(row.seconds for row in guest.dmesg())
    bad: dict[str, None] = {}

    def listen() -> None:
        """The kernel's complaints so far: its log keeps the last minutes only."""
        for row in guest.dmesg():
            if row.seconds > start and any(word in row.text for word in BAD):
                bad[f"[{row.seconds:.6f}] {row.text}"] = None

    load.start()
    print(f"warm: {warm} cycles in {some(0, warm)['seconds']:.0f} s", flush=True)
    load.stop()
    before = memory(guest)
    again = memory(guest)
    load.start()
    began, at = monotonic(), 0
    while at < cycles and not over():
        batch = min(BATCH, cycles - at)
        found = some(at, at + batch)
        at += batch
        for key in ("seconds", "spent", "woken", "replaced"):
            total[key] += found[key]
        total["longest"] = max(total["longest"], found["longest"])
        for verb, number in found["counts"].items():
            total["counts"][verb] = total["counts"].get(verb, 0) + number
        listen()
        done = load.done()
        print(
            f"{at:4}/{cycles} cycles, {monotonic() - began:5.0f} s, {batch / found['seconds']:.2f} cycles/s; "
            f"load: {done}; {len(troubles)} failed, {len(bad)} complaints",
            flush=True,
        )
    load.stop()
    after = memory(guest)
    listen()
    return verdict(guest, total, troubles, list(bad), (before, again, after), at, release, warm >= WARM)


def verdict(
    guest: Guest,
    total: dict[str, Any],
    troubles: list[Any],
    bad: list[str],
    looks: tuple[dict[str, int], dict[str, int], dict[str, int]],
    cycles: int,
    release: str,
    settled: bool,
) -> int:
    """Print what came of it."""
    before, again, after = looks
    for row in troubles:
        print("failed:", *row)
    left = guest.run(
        "ls /sys/kernel/livepatch; grep -l K /sys/module/*/taint; cat /sys/kernel/tracing/enabled_functions"
    ).text
    print(f"\n{cycles} cycles on {release}: {total['counts']}, {total['replaced']} patches replaced")
    print(
        f"{total['seconds']:.0f} s, {cycles / total['seconds']:.3f} cycles/s, of which transitions "
        f"{total['spent']:.0f} s (longest {total['longest']:.1f} s); {total['woken']} tasks woken"
    )
    print(f"{'kB':14}{'before':>10}{'again':>10}{'after':>10}{'change':>9}{'allowed':>9}")
    grown = []
    for key, value in before.items():
        least, most = min(value, again[key]), max(value, again[key])
        change = after[key] - value
        allowed = TOLERANCE.get(key)
        over = allowed is not None and (
            least - after[key] > allowed if key == "MemAvailable" else after[key] - most > allowed
        )
        grown += [key] if over else []
        print(
            f"{key:14}{value:>10}{again[key]:>10}{after[key]:>10}{change:>+9}"
            f"{'' if allowed is None else allowed:>9}{'  OVER' if over else ''}"
        )
    print(
        f"kernel's complaints: {len(bad)}; left behind: {left or 'nothing'}; failed actions: {len(troubles)}"
    )
    for text in bad[:20]:
        print("  ", text)
    print(f"({os.cpu_count()} processors, load average {os.getloadavg()[0]:.1f})")
    return 1 if bad or left or troubles or (grown and settled) else 0


if __name__ == "__main__":
    sys.exit(main())
