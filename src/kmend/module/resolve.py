"""How the module gets at a symbol that it does not carry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Exported:
    """An ordinary undefined symbol: exported by vmlinux, held to its CRC (``CONFIG_MODVERSIONS``)."""

    name: str
    crc: int
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class Livepatched:
    """A livepatch symbol ``.klp.sym.OBJ.NAME,SYMPOS``.

    Documentation/livepatch/module-elf-format.rst. ``sympos`` 0: the name is unique in the
    object; else its position in the object's kallsyms, from 1. ``obj`` is ``vmlinux`` or a
    module's name; the kernel resolves it when the object that it patches is there.
    """

    obj: str
    name: str
    sympos: int

    @property
    def symbol(self) -> str:
        return f".klp.sym.{self.obj}.{self.name},{self.sympos}"


@dataclass(frozen=True, slots=True)
class Shared:
    """What the patch itself brings along for another object: new, global, defined in a unit of ``obj``.

    Both objects' code lies in the one module, so the reference is an ordinary one inside of it. ``obj`` is
    ``vmlinux``, or a module that the referring one depends on: what the definition in turn needs of ``obj``
    is then in place before the referring module is.
    """

    obj: str
    name: str


Resolution = Exported | Livepatched | Shared
