"""One QEMU process: its command line, its start, its certain end.

Nothing of it lies in the file system: the two agent channels and the monitor are socket
pairs, console and QEMU's own messages go to memory files. So a killed kmend leaves no file,
and the kernel kills QEMU together with the thread that started it (``PR_SET_PDEATHSIG``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from time import monotonic, sleep

from kmend.core.errors import Failed, Unable
from kmend.core.run import environment
from kmend.lab.initramfs import CONTROL, MAIN
from kmend.lab.qmp import Qmp

log = logging.getLogger("kmend.run")

QEMU = "qemu-system-x86_64"


class Accel(Enum):
    """How QEMU executes the guest.

    TCG always runs with ``thread=single``: with one thread per virtual CPU a guest livelocks when a patched
    function runs while its text is being modified (measured: 3 of 3 runs on two CPUs).
    """

    TCG = "tcg"
    KVM = "kvm"


@dataclass(frozen=True, slots=True)
class MachineSettings:
    """What a guest is made of. ``memory`` in MiB; ``parameters`` are added to the kernel's command line.

    ``disk``: it has a virtio disk (``/dev/vda`` once ``virtio_blk`` is loaded); which file that is, is told
    to each :class:`Machine`, so that guests with different disks share a snapshot.
    """

    accel: Accel = Accel.TCG
    cpus: int = 1
    memory: int = 512
    parameters: tuple[str, ...] = ()
    disk: bool = False


@dataclass(frozen=True, slots=True)
class Shares:
    """Folders of the host that the guest may read (never write): ``/usr`` and the kernel's modules."""

    usr: Path
    modules: Path


#: ``tsc=unstable``: a restored guest's TSC jumps; ``mitigations=off``: under TCG they only cost;
#: ``panic=-1`` with ``-no-reboot``: a panic ends QEMU at once instead of hanging.
KERNEL_PARAMETERS = (
    *("console=ttyS0", "quiet", "panic=-1", "mitigations=off", "tsc=unstable"),
    "rdinit=/kmend/bin/init",
)
_ACCEL = {Accel.TCG: "tcg,thread=single", Accel.KVM: "kvm"}
#: Runs the rest of the command line only when its parent still is who it was before the death signal was set.
_GUARD = 'parent=$1; shift; test "$PPID" = "$parent" && exec "$@"'


def qemu() -> Path:
    """The QEMU binary.

    Raises:
        Unable: it is not installed.
    """
    found = shutil.which(QEMU)
    if found is None:
        raise Unable(
            f"the program {QEMU} is not there",
            why="the lab's guests run in it",
            next_step="apt-get install qemu-system-x86",
            rule="missing-tool",
        )
    return Path(found)


def arguments(settings: MachineSettings, *, share_memory: bool) -> list[str]:
    """The part of QEMU's command line that makes the machine, without any path: part of a snapshot's key."""
    share = "on" if share_memory else "off"
    return [
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-accel", _ACCEL[settings.accel], "-cpu", "max"),
        *("-smp", str(settings.cpus), "-m", str(settings.memory)),
        *(
            "-object",
            f"memory-backend-file,id=mem,size={settings.memory}M,share={share},mem-path=/proc/self/fd/%mem%",
        ),
        # q35 rather than pc: the kernel finds less to probe, and boots about a second sooner under TCG
        *("-machine", "q35,memory-backend=mem,vmport=off,sata=off,smbus=off,i8042=off"),
        *("-chardev", "file,id=console,path=/proc/self/fd/%console%", "-serial", "chardev:console"),
        *("-device", "virtio-serial-pci"),
        *("-chardev", "socket,id=main,fd=%main%", "-device", f"virtserialport,chardev=main,name={MAIN}"),
        *("-chardev", "socket,id=control,fd=%control%"),
        *("-device", f"virtserialport,chardev=control,name={CONTROL}"),
        *("-chardev", "socket,id=qmp,fd=%qmp%", "-mon", "chardev=qmp,mode=control"),
        # a changed id tells the restored kernel to reseed its random numbers (drivers/virt/vmgenid.c)
        *("-device", "vmgenid,guid=%guid%"),
        *("-fsdev", f"local,id=usr,{_SHARE},path=%usr%", "-device", "virtio-9p-pci,fsdev=usr,mount_tag=usr"),
        *("-fsdev", f"local,id=modules,{_SHARE},path=%modules%"),
        *("-device", "virtio-9p-pci,fsdev=modules,mount_tag=modules"),
        *(_DISK if settings.disk else ()),
        *("-append", " ".join((*KERNEL_PARAMETERS, *settings.parameters))),
    ]


#: What the guest has written is in the host's file or page cache once it counts as written: killing QEMU is a
#: power cut that loses the guest's memory, and nothing that the disk has acknowledged.
_DISK = (
    *("-drive", "if=none,id=disk,format=raw,file=/proc/self/fd/%disk%,file.locking=off,cache=writeback"),
    *("-device", "virtio-blk-pci,drive=disk"),
)
_SHARE = "security_model=none,readonly=on,multidevs=remap"


class Machine:
    """A running QEMU. The thread that starts it must outlive it: its end kills QEMU."""

    def __init__(
        self,
        settings: MachineSettings,
        kernel: Path | bytes,
        initrd: bytes,
        shares: Shares,
        memory_fd: int,
        *,
        state_fd: int | None = None,
        disk: Path | None = None,
    ) -> None:
        """Start QEMU: boot (the guest's memory is the file ``memory_fd``, shared), or restore.

        ``kernel`` is a vmlinuz, or the contents of an image that :mod:`~kmend.lab.direct` made. ``disk`` is
        the file behind the disk, when the machine has one; None: an empty disk that nobody has looked at yet.

        To restore, ``state_fd`` is the saved machine state; the memory file then only serves as the
        guest's first contents and is never written.

        Raises:
            Unable: QEMU is not there. Failed: it cannot be started.
        """
        self.settings = settings
        self._ended = threading.Lock()
        program = qemu()
        with contextlib.ExitStack() as stack:
            ours: dict[str, socket.socket] = {}
            theirs: dict[str, int] = {}
            for name in ("main", "control", "qmp"):
                mine, other = socket.socketpair()
                ours[name] = mine
                stack.callback(other.close)
                theirs[name] = other.fileno()
            self._console, self._errors = _Memory("kmend-console"), _Memory("kmend-qemu")
            initrd_fd = _given(initrd, stack)
            keep = [initrd_fd]
            if isinstance(kernel, bytes):
                keep.append(_given(kernel, stack))
                kernel = Path(f"/proc/self/fd/{keep[-1]}")
            values = {
                **{name: str(fd) for name, fd in theirs.items()},
                "mem": str(memory_fd),
                "console": str(self._console.fd),
                "guid": str(uuid.uuid4()),
                # a comma ends an option's value in QEMU's syntax unless it is doubled
                "usr": str(shares.usr).replace(",", ",,"),
                "modules": str(shares.modules).replace(",", ",,"),
            }
            line = [_filled(word, values) for word in arguments(settings, share_memory=state_fd is None)]
            line += ["-kernel", str(kernel), "-initrd", f"/proc/self/fd/{initrd_fd}"]
            keep += [*theirs.values(), memory_fd, self._console.fd]
            if settings.disk:
                keep.append(_disk_fd(disk, stack))
                line = [_filled(word, {"disk": str(keep[-1])}) for word in line]
            if state_fd is not None:
                line += ["-incoming", "defer"]
                keep.append(state_fd)
            argv = [
                "setpriv",
                "--pdeathsig",
                "KILL",
                "sh",
                "-c",
                _GUARD,
                "sh",
                str(os.getpid()),
                str(program),
            ]
            log.debug("%s", shlex.join([*argv, *line]))
            try:
                self.process = subprocess.Popen(
                    [*argv, *line],
                    stdin=subprocess.DEVNULL,
                    stdout=self._errors.fd,
                    stderr=self._errors.fd,
                    pass_fds=keep,
                    env=environment(),
                    start_new_session=True,
                )
            except OSError as error:
                for end in ours.values():
                    end.close()
                self._console.close()
                self._errors.close()
                raise Failed(
                    "QEMU cannot be started",
                    why=str(error),
                    next_step="run `kmend doctor`: it names the packages that lack",
                    rule="qemu",
                ) from error
        self.main, self.control = ours["main"], ours["control"]
        self._qmp_socket = ours["qmp"]
        self.qmp = Qmp(self._qmp_socket)
        # the memory is a file of its own: neither saved into nor read from the state
        ignore_shared = [{"capability": "x-ignore-shared", "state": True}]
        with self.closed_on_error():
            self.qmp.send("qmp_capabilities")
            self.qmp.send("migrate-set-capabilities", capabilities=ignore_shared)
            if state_fd is not None:
                self.qmp.send("migrate-incoming", uri=f"fd:{state_fd}")

    @contextlib.contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """End the machine when the block ends with an exception."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def greeted(self) -> None:
        """Take QEMU's answers to what was sent at the start.

        Raises:
            Failed: it refused something, or has ended.
        """
        for _ in range(2):
            self.qmp.receive()

    def console(self, start: int = 0) -> bytes:
        """The console's bytes from offset ``start`` on."""
        return self._console.read(start)

    def errors(self) -> str:
        """What QEMU itself said (stdout and stderr)."""
        return self._errors.read(0).decode(errors="replace").strip()

    def save(self, state_fd: int, timeout: float = 30.0) -> None:
        """Write the machine's state to ``state_fd`` and end QEMU; its memory file then is complete.

        Raises:
            Failed: QEMU could not do it in time (``timeout`` seconds).
        """
        # Not stopped before: a saved state that says "paused" would be restored as paused.
        self.greeted()
        self.qmp.command("getfd", fd=state_fd, fdname="state")
        self.qmp.command("migrate", uri="fd:state")
        deadline = monotonic() + timeout
        while True:
            answer = self.qmp.command("query-migrate")
            status = answer.get("status")
            if status == "completed":
                break
            if status == "failed" or monotonic() > deadline:
                raise Failed(
                    "the guest's snapshot cannot be written",
                    why=str(answer.get("error-desc", f"QEMU says {status}")),
                    next_step="free space in the cache folder, or name another with --cache",
                    rule="snapshot",
                )
            sleep(0.01)
        self.qmp.send("quit")
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise Failed("QEMU does not end", why="it was told to quit", rule="qemu") from error

    def close(self) -> None:
        """Kill QEMU if it still runs, and free everything. Safe to call twice and from another thread."""
        with self._ended:
            self.kill()
            self.process.wait()
            for end in (self.main, self.control, self._qmp_socket, self._console, self._errors):
                end.close()

    def kill(self) -> None:
        """Kill QEMU's process group; whoever waits for the guest is told that it is lost."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


class _Memory:
    """A file in memory that QEMU writes and we read; keeps its last contents when closed."""

    def __init__(self, name: str) -> None:
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        self._kept: bytes | None = None

    def read(self, start: int) -> bytes:
        if self._kept is not None:
            return self._kept[start:]
        return os.pread(self.fd, max(os.fstat(self.fd).st_size - start, 0), start)

    def close(self) -> None:
        if self._kept is None:
            self._kept = self.read(0)
            os.close(self.fd)


def _given(data: bytes, stack: contextlib.ExitStack) -> int:
    """A memory file with these contents, which lives as long as ``stack`` (QEMU has its own hold on it)."""
    fd = os.memfd_create("kmend-file", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return fd


def _disk_fd(disk: Path | None, stack: contextlib.ExitStack) -> int:
    if disk is None:
        return _given(bytes(1 << 20), stack)
    try:
        fd = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Failed(
            f"the guest's disk {disk} cannot be opened",
            why=error.strerror or str(error),
            next_step="name a file that can be written",
            rule="guest-disk",
        ) from error
    stack.callback(os.close, fd)
    return fd


def _filled(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(f"%{name}%", value)
    return word
