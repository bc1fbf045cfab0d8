"""The guest's first file system: busybox, the agent, the boot script and the modules that they need."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

from kmend.core.errors import Unable
from kmend.lab import cpio
from kmend.lab.kernel import LabKernel, boot_modules

#: Names of the virtio-serial ports. The second serves while the first is busy or stuck.
MAIN, CONTROL = "kmend.main", "kmend.control"

_INITTAB = "::sysinit:/kmend/boot\n" + "".join(f"::respawn:/kmend/agent {name}\n" for name in (MAIN, CONTROL))
_FOLDERS = (
    *("kmend", "kmend/bin", "kmend/modules", "kmend/run", "kmend/host", "kmend/over"),
    *("proc", "sys", "dev", "etc", "run", "tmp", "root", "usr", "var", "var/log", "mnt"),
)
_FILES = {
    "etc/inittab": _INITTAB,
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost kmend\n::1 localhost\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}
#: /bin and its like lead into the host's /usr once that is mounted (Debian: usr-merged since 12).
_LINKS = {
    **{name: f"usr/{name}" for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32")},
    "kmend/bin/sh": "busybox",
    "kmend/bin/init": "busybox",
    "etc/mtab": "../proc/self/mounts",
    "var/run": "../run",
    "var/tmp": "../tmp",
}


def build(kernel: LabKernel) -> bytes:
    """The initramfs for that kernel. Equal inputs give equal bytes.

    Raises:
        Unable: there is no static busybox, or the kernel lacks a driver.
    """
    modules = boot_modules(kernel)
    here = files("kmend.lab")
    entries = [cpio.folder(name) for name in _FOLDERS]
    entries.append(cpio.character("dev/console", 5, 1))
    entries.append(cpio.file("kmend/bin/busybox", busybox().read_bytes(), 0o755))
    entries += [cpio.link(name, target) for name, target in _LINKS.items()]
    entries += [cpio.file(name, text.encode()) for name, text in _FILES.items()]
    entries += [
        cpio.file(f"kmend/{name}", here.joinpath(f"{name}.sh").read_bytes(), 0o755)
        for name in ("boot", "agent")
    ]
    entries += [cpio.file(f"kmend/modules/{name}", data) for name, data in modules]
    entries.append(cpio.file("kmend/modules/order", "".join(f"{name}\n" for name, _ in modules).encode()))
    return cpio.archive(entries)


def busybox() -> Path:
    """The host's static busybox.

    Raises:
        Unable: there is none, or it needs shared libraries, which the guest has not got.
    """
    name = shutil.which("busybox")
    if name is not None:
        head = Path(name).read_bytes()[:4096]
        # a dynamic program names its loader (PT_INTERP) right behind the ELF headers
        if head.startswith(b"\x7fELF") and b"/ld-" not in head:
            return Path(name)
    raise Unable(
        "there is no static busybox" if name else "the program busybox is not there",
        why=f"{name} needs shared libraries; the guest has none when it boots"
        if name
        else "the lab's guests are made of it",
        next_step="apt-get install busybox-static",
        rule="missing-tool",
    )
