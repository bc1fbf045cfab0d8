"""The kernel that a guest runs: its image and its modules, and which of them the guest needs at boot."""

from __future__ import annotations

import gzip
import lzma
from dataclasses import dataclass
from pathlib import Path

from kmend.core.errors import Failed, Unable
from kmend.core.run import run
from kmend.core.target import Target

#: What the guest needs before it can reach anything else: a bus, the agent's port, the host's files.
BOOT_MODULES = ("virtio_pci", "virtio_console", "9p", "9pnet_virtio", "overlay")


@dataclass(frozen=True, slots=True)
class LabKernel:
    """A kernel to boot. ``modules`` is the folder ``…/lib/modules/RELEASE`` with ``modules.dep``.

    ``drivers`` is a folder of the same form with what guests need and this kernel lacks.

    ``vmlinux`` is what the vmlinuz unpacks to, KASLR's relocations included; without it a first boot under
    TCG takes twice as long.
    """

    release: str
    vmlinuz: Path
    modules: Path
    vmlinux: Path | None = None
    drivers: Path | None = None

    @classmethod
    def of(cls, target: Target, drivers: Path | None = None) -> LabKernel:
        """The kernel of a prepared target.

        Raises:
            Unable: the target has no bootable image or no modules (a custom target may lack them).
        """
        if target.vmlinuz is None or target.modules is None:
            lacking = "bootable image (vmlinuz)" if target.vmlinuz is None else "modules folder"
            raise Unable(
                f"{target.release} cannot be booted in the lab",
                why=f"this target has no {lacking}",
                next_step="give it one, or use a packaged kernel: `kmend kernel fetch RELEASE`",
                rule="no-lab-kernel",
            )
        return cls(target.release, target.vmlinuz, target.modules, target.vmlinux, drivers)


def boot_modules(kernel: LabKernel) -> tuple[tuple[str, bytes], ...]:
    """The modules that the guest loads at boot, in loading order: file name and uncompressed contents.

    What is built in (``modules.builtin``) is left out.

    Raises:
        Unable: the kernel has not got one of them, or ``modules.dep`` is missing.
    """
    try:
        table = (kernel.modules / "modules.dep").read_text()
        builtin_file = kernel.modules / "modules.builtin"
        builtin = builtin_file.read_text() if builtin_file.exists() else ""
        if kernel.drivers is not None:
            table += (kernel.drivers / "modules.dep").read_text()
    except OSError as error:
        raise Unable(
            f"the modules of {kernel.release} cannot be used",
            why=str(error),
            next_step=f"fetch the kernel again: `kmend kernel fetch {kernel.release}`",
            rule="no-lab-kernel",
        ) from error
    built_in = {module_name(line) for line in builtin.splitlines()}
    order: dict[str, None] = {}
    for name in BOOT_MODULES:
        if name not in built_in:
            order.update(dict.fromkeys(_with_dependencies(name, table, kernel.release)))
    return tuple((module_name(path) + ".ko", _contents(_place(kernel, path))) for path in order)


def _place(kernel: LabKernel, path: str) -> Path:
    if kernel.drivers is not None and (own := kernel.drivers / path).is_file():
        return own
    return kernel.modules / path


def module_name(path: str) -> str:
    """The kernel's name of the module in that file: no suffix, underscores."""
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def _with_dependencies(name: str, table: str, release: str) -> list[str]:
    for line in table.splitlines():
        path, colon, rest = line.partition(":")
        if colon and module_name(path) == name:
            # depmod lists all that are needed; the one to load first stands last
            return [*reversed(rest.split()), path]
    raise Unable(
        f"{release} cannot be a guest",
        why=f"it has the driver {name} neither built in nor as a module",
        next_step="use a kernel with virtio, 9p and overlayfs, as distributions configure them",
        rule="no-lab-kernel",
    )


def _contents(path: Path) -> bytes:
    try:
        match path.suffix:
            case ".ko":
                return path.read_bytes()
            case ".xz":
                return lzma.decompress(path.read_bytes())
            case ".gz":
                return gzip.decompress(path.read_bytes())
            case _:
                return run(["zstd", "-dcq", path]).stdout
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise Failed(
            f"the module {path} cannot be read",
            why=str(error),
            next_step="fetch the kernel again with `kmend kernel fetch`",
            rule="corrupt-module",
        ) from error
