"""Booted guests kept on disk: made once per kernel, QEMU and machine, restored in a tenth of a second.

A snapshot is a folder ``snapshots/KEY`` with the guest's memory (``mem``, sparse; restored guests map it
privately), the machine's state (``state``) and ``manifest.json``. It is built beside and renamed, under a
lock; the manifest's digest is checked once per boot of the host and whenever a file has been touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmend.core.errors import Failed
from kmend.core.files import locked, write_atomically
from kmend.lab.machine import MachineSettings, arguments, qemu

#: Part of every key: raise it when the agent's protocol or the meaning of a snapshot changes.
PROTOCOL = 1
#: A snapshot takes 130 MB of disk; more than this many kernels and machines are not kept.
KEPT = 8
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An opened snapshot. The caller closes both descriptors with :meth:`close`."""

    key: str
    memory_fd: int
    state_fd: int

    def close(self) -> None:
        os.close(self.memory_fd)
        os.close(self.state_fd)


def key_of(kernel: Path, initrd: bytes, settings: MachineSettings, *, direct: bool = False) -> str:
    """The name of the snapshot of that kernel image, initramfs, QEMU binary and machine.

    ``direct``: the image was unpacked beforehand (:mod:`~kmend.lab.direct`).

    Raises:
        Failed: the kernel image cannot be read. Unable: there is no QEMU.
    """
    program = qemu()
    try:
        # the binary's identity stands for its version, which would cost a start of QEMU to ask
        binary = program.resolve().stat()
        image = hashlib.sha256(kernel.read_bytes()).hexdigest()
    except OSError as error:
        raise Failed(
            f"{kernel} cannot be read",
            why=str(error),
            next_step="fetch the kernel again with `kmend kernel fetch`",
            rule="no-lab-kernel",
        ) from error
    parts = [
        *(str(PROTOCOL), str(direct), image, hashlib.sha256(initrd).hexdigest()),
        *(str(binary.st_size), str(binary.st_mtime_ns), str(binary.st_ino)),
        *arguments(settings, share_memory=False),
    ]
    if settings.accel.value == "kvm":
        # the host's processor shows through: a cache may be carried to another machine
        parts.append(boot_id())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def boot_id() -> str:
    """The id of the host's present boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Snapshots:
    """The snapshots in one cache folder."""

    def __init__(self, lab: Path) -> None:
        self._folder = lab / "snapshots"

    def find(self, key: str) -> Snapshot | None:
        """Open the snapshot if it is there and sound; a damaged one is removed."""
        try:
            return self._opened(key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(self._folder / key, ignore_errors=True)
            return None

    def make(self, key: str, room: int, build: Callable[[int, int], None]) -> Snapshot:
        """Have ``build(memory_fd, state_fd)`` fill a new snapshot, unless another process just made it.

        ``room`` is the guest's memory in bytes. Two that race build it once.

        Raises:
            Failed: no room, or the folder cannot be written; whatever ``build`` raises. Nothing is left.
        """
        try:
            with locked(self._lock):
                if found := self.find(key):
                    return found
                self._sweep()
                self._build(key, room, build)
        except OSError as error:
            raise Failed(
                f"the lab's folder {self._folder} cannot be written",
                why=error.strerror or str(error),
                next_step="free space, or name another cache with --cache DIR",
                rule="unwritable",
            ) from error
        if found := self.find(key):
            return found
        raise Failed(
            "a snapshot that was just written is not sound",
            why=f"{self._folder / key} does not have its own digest",
            next_step="check the disk, or name another cache with --cache DIR",
            rule="snapshot",
        )

    def remove(self, snapshot: Snapshot) -> None:
        """Remove a snapshot that has proved unusable, unless another process has replaced it meanwhile."""
        folder = self._folder / snapshot.key
        with contextlib.suppress(OSError):
            if (folder / "state").stat().st_ino == os.fstat(snapshot.state_fd).st_ino:
                shutil.rmtree(folder, ignore_errors=True)

    def _build(self, key: str, room: int, build: Callable[[int, int], None]) -> None:
        new = self._folder / f"{key}.new"
        new.mkdir(parents=True)
        try:
            free = shutil.disk_usage(new).free
            if free < room:
                # a guest whose memory file cannot grow would die of SIGBUS
                raise Failed(
                    f"no room for a snapshot in {self._folder}",
                    why=f"{free >> 20} MB are free, up to {room >> 20} MB are needed",
                    next_step="free space, or name another cache with --cache DIR",
                    rule="disk-full",
                )
            with _opened(new / "mem", os.O_CREAT) as memory, _opened(new / "state", os.O_CREAT) as state:
                build(memory, state)
                digest = _digest(memory, state)
            manifest = {"schema": 1, "sha256": digest, "memory": room}
            write_atomically(new / "manifest.json", json.dumps(manifest).encode())
            shutil.rmtree(self._folder / key, ignore_errors=True)
            new.rename(self._folder / key)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _opened(self, key: str) -> Snapshot | None:
        """Open and verify. Raises OSError, ValueError, KeyError or TypeError for a damaged one."""
        folder = self._folder / key
        with contextlib.ExitStack() as stack:
            # through the folder's descriptor: both files are of one snapshot even while it is replaced
            top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, top)
            with os.fdopen(os.open("manifest.json", os.O_RDONLY, dir_fd=top)) as file:
                manifest: dict[str, Any] = json.load(file)
            memory = os.open("mem", os.O_RDWR, dir_fd=top)
            undo = stack.enter_context(contextlib.ExitStack())
            undo.callback(os.close, memory)
            state = os.open("state", os.O_RDONLY, dir_fd=top)
            undo.callback(os.close, state)
            if os.fstat(memory).st_size != manifest["memory"]:
                raise ValueError("the memory file has the wrong size")
            stamp = _stamp(memory, state)
            if _read(top, "verified") != stamp:
                if _digest(memory, state) != manifest["sha256"]:
                    raise ValueError("the snapshot is damaged")
                with contextlib.suppress(Failed):  # a cache that may only be read is verified every time
                    write_atomically(folder / "verified", stamp.encode())
            with contextlib.suppress(OSError):
                os.utime(folder)  # what was used last is removed last
            undo.pop_all()
            return Snapshot(key, memory, state)

    def _sweep(self) -> None:
        """Remove what killed builders left, and the snapshots that have not been used for longest."""
        found = [path for path in self._folder.iterdir() if path.is_dir()] if self._folder.is_dir() else []
        whole = sorted((path for path in found if path.suffix != ".new"), key=_age, reverse=True)
        for path in [*whole[KEPT - 1 :], *(path for path in found if path.suffix == ".new")]:
            # our own lock is held already, so our own leftover is removed as well
            shutil.rmtree(path, ignore_errors=True)

    @property
    def _lock(self) -> Path:
        # one lock for all: a build takes seconds, and the sweep must not meet another's half-built folder
        return self._folder.with_name("snapshots.lock")


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _read(folder_fd: int, name: str) -> str:
    try:
        with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=folder_fd)) as file:
            return file.read()
    except OSError:
        return ""


def _stamp(*fds: int) -> str:
    """What must be unchanged for an earlier check to hold: the host's boot, and the files' change times."""
    parts = [boot_id()]
    for fd in fds:
        info = os.fstat(fd)
        parts += [str(info.st_ino), str(info.st_size), str(info.st_mtime_ns), str(info.st_ctime_ns)]
    return " ".join(parts)


def _digest(*fds: int) -> str:
    """SHA-256 over every block that is not all zero, with its place; holes cost nothing."""
    total = hashlib.sha256()
    zero = bytes(_BLOCK)
    for fd in fds:
        size = os.fstat(fd).st_size
        total.update(b"file %d\n" % size)
        at = 0
        while at < size:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA) // _BLOCK * _BLOCK
            except OSError:  # ENXIO: nothing but a hole up to the end
                break
            block = os.pread(fd, _BLOCK, at)
            if block != zero[: len(block)]:
                total.update(b"block %d\n" % at)
                total.update(block)
            at += _BLOCK
    return total.hexdigest()
