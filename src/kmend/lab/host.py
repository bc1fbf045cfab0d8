"""What guests start from: the initramfs, the accelerator that works here, the snapshot.

One :class:`Host` may serve several guests of the same kernel, also from several threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from kmend.core.errors import Failed, KmendError
from kmend.core.files import write_atomically
from kmend.core.progress import Progress, Timings
from kmend.lab import direct, initramfs
from kmend.lab.channel import Channel, Expired, Hangup
from kmend.lab.kernel import LabKernel
from kmend.lab.machine import Accel, Machine, MachineSettings, Shares
from kmend.lab.outcome import lost
from kmend.lab.snapshot import Snapshot, Snapshots, boot_id, key_of

#: The guest's boot takes 5 s under TCG on an idle machine.
BOOT_LIMIT = 120.0
#: A stock kernel boots in 1 to 2 s under a KVM that works. One that hangs burns a processor meanwhile.
KVM_LIMIT = 5.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What a caller may choose. ``memory`` in MiB; ``accel`` None: KVM where it is proved to work."""

    cpus: int = 1
    memory: int = 512
    accel: Accel | None = None
    #: added to the kernel's command line
    parameters: tuple[str, ...] = ()
    #: a file that is the guest's disk (raw); it keeps what the guest has written when the guest is killed
    disk: Path | None = None


class _KvmAnswered(Exception):
    """A guest under KVM came up first; the slow boot is not needed."""


class Host:
    """The start of guests that run one kernel with one set of settings."""

    def __init__(self, kernel: LabKernel, lab: Path, settings: Settings, progress: Progress) -> None:
        """Build the initramfs (in memory).

        Raises:
            Unable: busybox or a driver is missing.
        """
        self.kernel = kernel
        self.clock = Timings()
        self._lab = lab
        self._settings = settings
        self._progress = progress
        self._initrd = initramfs.build(kernel)
        self._snapshots = Snapshots(lab)
        self._lock = threading.Lock()
        self._machine: MachineSettings | None = None

    def snapshot(self) -> Snapshot:
        """Open the snapshot to restore from; boots a guest and makes it when there is none.

        Raises:
            LostGuest, KernelOops: the guest does not boot. Unable: QEMU is missing.
            Failed: the cache cannot be written.
        """
        with self._lock:
            if self._machine is None:
                self._machine = self._chosen()
            return self._snapshot_of(self._machine)

    def discard(self, snapshot: Snapshot) -> None:
        """Remove a snapshot that does not come to life."""
        self._snapshots.remove(snapshot)

    def restore(self, snapshot: Snapshot) -> Machine:
        """Start QEMU from the snapshot."""
        assert self._machine is not None
        return Machine(
            self._machine,
            direct.stub() if self._is_direct(self._machine) else self.kernel.vmlinuz,
            self._initrd,
            self._shares(),
            snapshot.memory_fd,
            state_fd=snapshot.state_fd,
            disk=self._settings.disk,
        )

    def _shares(self) -> Shares:
        return Shares(Path("/usr"), self.kernel.modules)

    def _machine_of(self, accel: Accel) -> MachineSettings:
        chosen = self._settings
        return MachineSettings(
            accel, chosen.cpus, chosen.memory, chosen.parameters, disk=chosen.disk is not None
        )

    def _snapshot_of(self, machine: MachineSettings, stop: threading.Event | None = None) -> Snapshot:
        key = key_of(self.kernel.vmlinuz, self._initrd, machine, direct=self._is_direct(machine))
        if found := self._snapshots.find(key):
            return found
        self._progress.step(f"booting {self.kernel.release} once, to keep a snapshot of it")

        def build(memory_fd: int, state_fd: int) -> None:
            with self.clock.measure("boot"):
                self._boot(machine, memory_fd, state_fd, stop)

        return self._snapshots.make(key, machine.memory << 20, build)

    def _boot(
        self, machine: MachineSettings, memory_fd: int, state_fd: int | None, stop: threading.Event | None
    ) -> None:
        """Boot until both agents answer; with ``state_fd`` save the machine then. QEMU is gone afterwards."""
        os.ftruncate(memory_fd, machine.memory << 20)
        image: Path | bytes = self.kernel.vmlinuz
        if self._is_direct(machine) and self.kernel.vmlinux is not None:
            image = direct.moved(self.kernel.vmlinux, machine.memory << 20)
        guest = Machine(machine, image, self._initrd, self._shares(), memory_fd)
        del image  # 60 MB
        try:
            _answers(guest, monotonic() + BOOT_LIMIT, stop)
            if state_fd is not None:
                guest.save(state_fd)
        finally:
            guest.close()

    def _is_direct(self, machine: MachineSettings) -> bool:
        """Whether the unpacked image is started: under TCG, where unpacking takes seconds."""
        vmlinux = self.kernel.vmlinux
        return machine.accel is Accel.TCG and vmlinux is not None and direct.possible(vmlinux)

    def _chosen(self) -> MachineSettings:
        """The machine with the accelerator that was asked for, or the best that works here."""
        if self._settings.accel is not None:
            return self._machine_of(self._settings.accel)
        known = self._kvm_answer()
        if known is None:
            known = self._probe_kvm()
            self._keep_kvm_answer(known)
        return self._machine_of(Accel.KVM if known else Accel.TCG)

    def _probe_kvm(self) -> bool:
        """Whether this kernel really boots under KVM here: ``/dev/kvm`` may be there, and a guest hang in it.

        The probe races the boot under TCG that is needed otherwise, for at most :data:`KVM_LIMIT` seconds;
        whoever answers first wins.
        """
        works, over = threading.Event(), threading.Event()

        def probe() -> None:
            memory_fd = os.memfd_create("kmend-probe", os.MFD_CLOEXEC)
            try:
                os.ftruncate(memory_fd, self._settings.memory << 20)
                machine = self._machine_of(Accel.KVM)
                guest = Machine(machine, self.kernel.vmlinuz, self._initrd, self._shares(), memory_fd)
                try:
                    _answers(guest, monotonic() + KVM_LIMIT, over)
                    works.set()
                finally:
                    guest.close()
            except (KmendError, Hangup, Expired, _KvmAnswered, OSError):
                pass  # it does not work, for whatever reason: that is the answer
            finally:
                os.close(memory_fd)
                over.set()

        thread = threading.Thread(target=probe, name="kmend-kvm-probe")
        thread.start()
        try:
            self._progress.step("finding out whether KVM works here")
            with contextlib.suppress(_KvmAnswered):
                self._snapshot_of(self._machine_of(Accel.TCG), stop=works).close()
                over.wait(KVM_LIMIT)
        finally:
            over.set()
            thread.join()
        return works.is_set()

    def _kvm_answer(self) -> bool | None:
        """What an earlier probe of this kernel found in this boot of the host; False when there is no KVM."""
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            return False
        try:
            answers = json.loads(self._kvm_file().read_text())
            answer = answers.get(self._kvm_key())
        except (OSError, ValueError, AttributeError):
            return None
        return answer if isinstance(answer, bool) else None

    def _keep_kvm_answer(self, works: bool) -> None:
        answers: dict[str, object] = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._kvm_file().read_text())
            if isinstance(found, dict):
                answers = {key: value for key, value in found.items() if key.startswith(boot_id())}
        answers[self._kvm_key()] = works
        with contextlib.suppress(Failed):  # a cache that may only be read: the probe is repeated
            write_atomically(self._kvm_file(), json.dumps(answers).encode())

    def _kvm_file(self) -> Path:
        return self._lab / "kvm.json"

    def _kvm_key(self) -> str:
        return f"{boot_id()} {self.kernel.release} {self.kernel.vmlinuz.stat().st_size}"


def _answers(guest: Machine, deadline: float, stop: threading.Event | None) -> None:
    """Wait until both agents of a booting guest answer.

    Raises:
        LostGuest, KernelOops: it does not come up. _KvmAnswered: ``stop`` was set meanwhile.
    """

    def watch() -> None:
        if stop is not None and stop.is_set():
            raise _KvmAnswered

    try:
        for connection in (guest.main, guest.control):
            channel = Channel(connection)
            channel.send(":", b"", deadline)
            channel.wait(deadline, watch)
    except (Hangup, Expired) as error:
        raise lost(guest, str(error) or f"it has not come up in {BOOT_LIMIT:.0f} s") from error
