"""A guest: a stock kernel that runs in QEMU, obeys, and is certain to be gone afterwards.

    with Guest.of(target, config.lab) as guest:
        guest.put("/root/fix.ko", data)
        guest.run("insmod /root/fix.ko", check=True)

Three ends are told apart: a command's exit status (:class:`~kmend.lab.channel.Done`), a kernel that
died (:class:`~kmend.lab.outcome.KernelOops`), and a guest of which nothing more is known
(:class:`~kmend.lab.outcome.LostGuest`).
"""

from __future__ import annotations

import contextlib
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from time import monotonic, time
from types import TracebackType
from typing import Self

from kmend.core import kmsg
from kmend.core.errors import Failed
from kmend.core.kmsg import KernelMessage
from kmend.core.progress import Progress, Silent, Timings
from kmend.core.target import Target
from kmend.lab import cpio
from kmend.lab.channel import Channel, Done, Expired, Hangup
from kmend.lab.host import Host, Settings
from kmend.lab.kernel import LabKernel
from kmend.lab.machine import Machine
from kmend.lab.outcome import CommandTimeout, KernelOops, LostGuest, lost
from kmend.lab.snapshot import Snapshot

#: For programs that a command starts: the host's first, because scripts are written for them; busybox's
#: for what the host lacks.
USER_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/kmend/bin"
#: busybox alone, for our own commands.
LEAN_PATH = "/kmend/bin"

#: A restored guest answers in 0.1 s; one that takes this long will not.
RESTORE_LIMIT = 15.0
#: How long a killed command may take to be gone, in seconds.
KILL_LIMIT = 5.0

_PREAMBLE = """\
echo 0 >/proc/self/oom_score_adj
export PATH={path} HOME=/root USER=root LANG=C.UTF-8 TERM=dumb
{env}cd /root
"""
_9P = "ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000"
#: What the guest gets of the host's /etc, beside /etc/alternatives, through which programs in /usr lead.
_HOST_ETC = ("ld.so.cache", "mke2fs.conf")


class Guest:
    """A running guest. Use it as a context manager, within one thread: that thread's end kills QEMU.

    ``timings`` has wall seconds: ``boot`` (only when there was no snapshot), ``restore`` (QEMU's start to the
    agent's first answer), ``share`` (mounting the host's files).
    """

    def __init__(self, host: Host, *, share: bool = True) -> None:
        """``share=False`` leaves the host's ``/usr`` and the modules out until :meth:`mount_share`."""
        self._host = host
        self._share = share
        self._machine: Machine | None = None
        self._main: Channel | None = None
        self._control: Channel | None = None
        self._clock = Timings()
        self.shared = False
        self._abandoned = False

    @classmethod
    def of(
        cls,
        kernel: Target | LabKernel,
        lab: Path,
        settings: Settings | None = None,
        progress: Progress | None = None,
        *,
        share: bool = True,
    ) -> Self:
        """A guest that runs ``kernel``; ``lab`` is the cache folder of snapshots (``config.lab``).

        Raises:
            Unable: the target has no image or modules, or QEMU or busybox is missing.
        """
        chosen = kernel if isinstance(kernel, LabKernel) else LabKernel.of(kernel)
        return cls(Host(chosen, lab, settings or Settings(), progress or Silent()), share=share)

    @property
    def timings(self) -> dict[str, float]:
        """Wall seconds of the start's stages."""
        return {**self._host.clock.seconds, **self._clock.seconds}

    @property
    def accel(self) -> str:
        """``tcg`` or ``kvm``; '' before the start."""
        return self._machine.settings.accel.value if self._machine else ""

    @property
    def pid(self) -> int:
        """The process id of QEMU."""
        return self._running().process.pid

    def __enter__(self) -> Self:
        """Start: restore the snapshot; boot and make one when there is none, or when it proves damaged.

        Raises:
            LostGuest, KernelOops: the guest does not come up. Unable: a program or driver is missing.
            Failed: the cache folder cannot be written.
        """
        snapshot = self._host.snapshot()
        try:
            try:
                self._restore(snapshot)
            except (Failed, Hangup):
                if self._abandoned:
                    raise
                # whatever is wrong with it, a fresh one tells whether it was the snapshot
                self.close()
                self._host.discard(snapshot)
                snapshot.close()
                snapshot = self._host.snapshot()
                self._restore(snapshot)
        except BaseException:
            self.close()
            raise
        finally:
            snapshot.close()
        try:
            if self._share:
                self.mount_share()
            else:
                self._lean(_clock())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the guest. Safe to call again, and from another thread."""
        if self._machine is not None:
            self._machine.close()

    def abandon(self) -> None:
        """From another thread: kill the guest now or as soon as it starts; who uses it gets LostGuest."""
        self._abandoned = True
        if self._machine is not None:
            self._machine.kill()

    def run(
        self,
        command: str | Sequence[str],
        *,
        timeout: float = 60.0,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        check: bool = False,
        oops_grace: float | None = None,
    ) -> Done:
        """Run a command as root in ``/root`` and return its exit status, output and errors.

        ``command`` is text for the guest's shell, or a list of words. The shell is busybox's, which runs its
        own ``cat``, ``dd``, ``mount`` and so on before any other: that is quick, and the same on every host.
        Name a program by its path (``/usr/bin/dd``), or run a script with a ``#!`` line, to have the host's.
        ``timeout`` is in seconds. With ``oops_grace`` a command is given only so many more seconds once the
        kernel has oopsed: what waits for a lock of a dead task waits forever.

        Raises:
            CommandTimeout: it took longer and was killed, with all of its process group.
            Failed: (``check``) its status is not 0 (rule ``guest-command``).
            LostGuest, KernelOops: the guest has died, or even killing the command does not bring it back.
        """
        text = command if isinstance(command, str) else shlex.join(command)
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in (env or {}).items())
        script = _PREAMBLE.format(path=USER_PATH, env=exports) + text + "\n"
        done = self._command(script, stdin, timeout, oops_grace)
        if check and done.status != 0:
            raise Failed(
                f"a command in the guest ended with status {done.status}",
                why=f"{text.strip()[:300]}\n{(done.errors or done.text)[-1000:]}".rstrip(),
                next_step="look at the guest's kernel log",
                rule="guest-command",
            )
        return done

    def put(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a file in the guest, making its folder.

        Raises:
            Failed: it cannot be written. LostGuest, KernelOops: as :meth:`run`.
        """
        name = shlex.quote(path)
        folder = shlex.quote(str(PurePosixPath(path).parent))
        # 16 MB took 4 s
        self.run(
            f"mkdir -p {folder} && cat >{name} && chmod {mode:o} {name}",
            stdin=data,
            check=True,
            timeout=60 + len(data) / 1e5,
        )

    def get(self, path: str) -> bytes:
        """The contents of a file in the guest.

        Raises:
            Failed: it cannot be read. LostGuest, KernelOops: as :meth:`run`.
        """
        return self.run(f"cat {shlex.quote(path)}", check=True, timeout=600).stdout

    def dmesg(self) -> tuple[KernelMessage, ...]:
        """The whole kernel log, asked over the second channel: also while a command runs or hangs.

        Raises:
            LostGuest, KernelOops: as :meth:`run`.
        """
        return kmsg.parse(self._ask("dmesg -r").stdout.decode(errors="replace"))

    def console(self) -> str:
        """What the serial console has shown since this guest's start; also after its end."""
        return self._machine.console().decode(errors="replace").replace("\r", "") if self._machine else ""

    def mount_share(self) -> None:
        """Give the guest the host's ``/usr`` (read-only, changes stay in the guest's memory) and all modules.

        Raises:
            Failed: the kernel cannot mount them. LostGuest, KernelOops: as :meth:`run`.
        """
        if self.shared:
            return
        modules = f"/usr/lib/modules/{shlex.quote(self._host.kernel.release)}"
        script = f"""set -e
{_clock()}
cd /
cpio -idu 2>/dev/null
mount -t 9p -o {_9P} usr /kmend/host
mount -t tmpfs -o mode=755 tmpfs /kmend/over
mkdir /kmend/over/upper /kmend/over/work
mount -t overlay -o lowerdir=/kmend/host,upperdir=/kmend/over/upper,workdir=/kmend/over/work overlay /usr
mkdir -p {modules}
mount -t 9p -o {_9P} modules {modules}
[ -x /sbin/modprobe ] || echo /kmend/bin/modprobe >/proc/sys/kernel/modprobe
"""
        with self._clock.measure("share"):
            done = self._lean(script, stdin=cpio.archive(_host_etc()))
        if done.status != 0:
            raise Failed(
                "the guest cannot see the host's files",
                why=done.errors,
                next_step="check that this user may read /usr and the kernel's modules",
                rule="guest-share",
            )
        self.shared = True

    def _lean(self, script: str, stdin: bytes = b"", timeout: float = 30.0) -> Done:
        return self._command(f"PATH={LEAN_PATH}\n{script}", stdin, timeout, None)

    def _restore(self, snapshot: Snapshot) -> None:
        with self._clock.measure("restore"):
            machine = self._host.restore(snapshot)
            self._machine = machine
            if self._abandoned:
                raise LostGuest("it was given up", ())
            self._main, self._control = Channel(machine.main), Channel(machine.control)
            try:
                machine.greeted()
            except Failed as error:
                raise LostGuest(f"{error.why} {machine.errors()}".strip(), ()) from error
            self._command(":", b"", RESTORE_LIMIT, None)

    def _command(self, script: str, stdin: bytes, timeout: float, oops_grace: float | None) -> Done:
        """Run on the main channel, kill at the deadline, and turn every other end into an error of ours."""
        self._running()
        assert self._main is not None
        start = monotonic()
        watch = _OopsWatch(self._running(), start + timeout, oops_grace)
        try:
            self._main.send(script, stdin, start + timeout)
            while True:
                try:
                    return self._main.wait(min(watch.deadline, monotonic() + 1.0), watch)
                except Expired:
                    if monotonic() < watch.deadline:
                        continue
                seconds = monotonic() - start
                self._ask('read -r pid </kmend/run/kmend.main/pid && kill -KILL -"$pid"')
                try:
                    done = self._main.wait(monotonic() + KILL_LIMIT)
                except Expired as error:
                    raise self._lost(f"a command runs since {seconds:.0f} s and cannot be killed") from error
                raise CommandTimeout(seconds, done, oops=watch.seen)
        except Hangup as error:
            raise self._lost(str(error)) from error

    def _ask(self, script: str, timeout: float = 10.0) -> Done:
        """Run a short command of our own on the second channel."""
        self._running()
        assert self._control is not None
        deadline = monotonic() + timeout
        try:
            self._control.send(f"PATH={LEAN_PATH}\n{script}\n", b"", deadline)
            return self._control.wait(deadline)
        except Hangup as error:
            raise self._lost(str(error)) from error
        except Expired as error:
            raise self._lost(f"it has not answered for {timeout:.0f} s") from error

    def _lost(self, why: str) -> LostGuest | KernelOops:
        return lost(self._running(), why)

    def _running(self) -> Machine:
        if self._machine is None:
            raise Failed(
                "the guest has not been started",
                why="it is a context manager",
                next_step="use it in a `with` block",
                rule="guest-lost",
            )
        return self._machine


class _OopsWatch:
    """Reads the console as it grows; an oops brings the deadline near."""

    def __init__(self, machine: Machine, deadline: float, grace: float | None) -> None:
        self._machine = machine
        self._grace = grace
        self._offset = len(machine.console()) if grace is not None else 0
        self.deadline = deadline
        self.seen = False

    def __call__(self) -> None:
        if self._grace is None or self.seen:
            return
        data = self._machine.console(self._offset)
        end = data.rfind(b"\n") + 1
        self._offset += end
        if any(kmsg.is_death(message.text) for message in kmsg.parse(data[:end].decode(errors="replace"))):
            self.seen = True
            self.deadline = min(self.deadline, monotonic() + self._grace)


def _clock() -> str:
    """Sets the restored guest's clock, which stands where the snapshot was made, to the present."""
    return f"date -u -s @{time():.0f} >/dev/null"


def _host_etc() -> Iterator[cpio.Entry]:
    yield cpio.folder("etc/alternatives")
    with contextlib.suppress(OSError):
        for entry in sorted(Path("/etc/alternatives").iterdir()):
            if not entry.name.endswith(".gz"):  # manual pages
                yield cpio.link(f"etc/alternatives/{entry.name}", str(entry.readlink()))
    for name in _HOST_ETC:
        with contextlib.suppress(OSError):
            path = Path("/etc", name)
            if stat.S_ISREG(path.stat().st_mode):
                yield cpio.file(f"etc/{name}", path.read_bytes())
