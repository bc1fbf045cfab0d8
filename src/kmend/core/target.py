"""A target: one exact kernel build (release and build id), as it lies on disk."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NewType, Protocol

Release = NewType("Release", str)
#: A link-time virtual address in the target's vmlinux (no KASLR offset).
Address = NewType("Address", int)

VMLINUX = "vmlinux"
#: Longest name of a module: MODULE_NAME_LEN - 1 (include/linux/module.h); kernel/livepatch/core.c reads
#: the object's name in a klp symbol with %55s.
MAX_MODULE_NAME = 55


@dataclass(frozen=True, slots=True)
class Target:
    """Everything later stages need to know of a prepared kernel. All paths exist.

    ``source`` is a configured, ``modules_prepare``d tree that no stage may change.
    ``vmlinux`` is the ELF image extracted from ``vmlinuz`` (section headers, no symbol
    table). ``modules`` holds ``kernel/**.ko`` and ``modules.dep``. ``banner`` is the
    kernel's own ``linux_banner`` (``Linux version … (gcc-12 (Debian …) 12.2.0, GNU ld …) #1 …``).
    ``source_version`` is the Debian version or ``custom``. ``folder`` is kmend's own
    cache folder of this target (writable; never holds anything that cannot be remade).
    """

    release: Release
    source_version: str
    banner: str
    build_id: str
    folder: Path
    source: Path
    config: Path
    symvers: Path
    vmlinux: Path
    vmlinuz: Path | None
    modules: Path | None
    compiler: str

    @property
    def version(self) -> str:
        """What ``uname -v`` prints: ``#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-1 (2026-11-14)``."""
        _, mark, tail = self.banner.partition(" #")
        return ("#" + tail).strip() if mark else ""


@dataclass(frozen=True, slots=True)
class KernelSymbol:
    """A row of kallsyms: link-time address, nm letter (lower case: local), name."""

    address: Address
    type: str
    name: str


class SymbolTable(Protocol):
    """The target's kallsyms, in the order in which the kernel itself walks it."""

    def named(self, name: str) -> tuple[KernelSymbol, ...]:
        """All symbols of that name, in ``sympos`` order (``sympos`` 1 is the first); empty when unknown."""

    def at(self, address: int) -> tuple[KernelSymbol, ...]:
        """All symbols that lie exactly at the address (aliases)."""

    def covering(self, address: int) -> KernelSymbol | None:
        """The last symbol at or below the address (the first of its aliases)."""

    def next_after(self, address: int) -> int | None:
        """The address of the first symbol strictly above ``address``."""


class Linkage(Enum):
    """How a unit gets into the kernel."""

    BUILTIN = "builtin"
    MODULE = "module"
    LIBRARY = "library"  # lib-y: a member of lib.a, linked only when wanted


@dataclass(frozen=True, slots=True)
class Unit:
    """A translation unit as kbuild names it.

    ``obj`` is the object as it is asked of make (``fs/ext4/mballoc.o``; units that
    kbuild spells with ``..`` keep that spelling), ``source`` the file that it is compiled
    from relative to the tree (normalised), ``owner`` is ``vmlinux`` or the module's
    name with dashes as underscores (``ext4``).
    """

    obj: str
    source: str
    owner: str
    linkage: Linkage


@dataclass(frozen=True, slots=True)
class ModuleFile:
    """A module of the target: its kernel name (underscores) and its file."""

    name: str
    path: Path
