"""A target as the pure stages see it: image, symbols, exports, modules and the glue compiled for it.

The stages are imported where they are used: a build opens the target while its compilers run.
"""

from __future__ import annotations

import hashlib
import struct
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from kmend.core.config import Config
from kmend.core.errors import Failed, KmendError, UsageError
from kmend.core.files import scratch_folder, write_atomically
from kmend.core.target import VMLINUX, Target
from kmend.kernel import compile as compiling

if TYPE_CHECKING:
    from kmend.diff.unit import UnitObject
    from kmend.elf.model import ElfFile
    from kmend.module.layout import Layout
    from kmend.module.resolve import Resolution
    from kmend.verify.callers import TargetCallers
    from kmend.verify.rules import Checked
    from kmend.verify.symbols import World


class TargetView:
    """Lazily opened parts of a target: image, symbols, exports, modules, glue."""

    def __init__(self, config: Config, target: Target) -> None:
        from kmend.kernel import kallsyms, symvers
        from kmend.kernel.vmlinux import Image
        from kmend.verify.provenance import VmlinuxBinary

        self.config, self.target = config, target
        self._modules: dict[str, UnitObject | None] = {}
        #: of the modules that :meth:`take` has taken: the modules that each needs itself
        self._depends: dict[str, tuple[str, ...]] = {}
        self._sites: dict[str, frozenset[int]] = {}
        self._layout: Layout | None = None
        self.image = Image.open(target.vmlinux)
        self.symbols = kallsyms.load(target)
        self.exports = symvers.load(target.symvers)
        self.vmlinux = VmlinuxBinary(self.image, self.symbols)

    def glue(self, *, forget: bool = False, own_init: bool = False) -> ElfFile:
        """``glue.c`` compiled for this target; made once. As :func:`kmend.module.layout.glue_source`."""
        from kmend.elf.reader import read
        from kmend.module.layout import glue_source

        source = glue_source(forget=forget, own_init=own_init)
        digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        path = self.target.folder / f"glue-{digest}.o"
        if not path.exists():
            with scratch(self.config) as folder:
                made = compiling.compile_snippet(self.target, source, out=folder, module_name="kmend")
                write_atomically(path, made.read_bytes())
        return read(path.read_bytes(), path.name)

    @property
    def layout(self) -> Layout:
        """The sizes and offsets of the kernel's own structures, measured by its compiler."""
        if self._layout is None:
            from kmend.module.layout import read_layout

            self._layout = read_layout(self.glue())
        return self._layout

    def takes_back(self) -> bool:
        """Whether the kernel clears what it relocated for a module when that goes.

        Probed by the function that does it: 0c05e7bd2d01 "livepatch,x86: Clear relocation targets on a module
        removal" (6.3).
        """
        return bool(self.symbols.named("clear_relocate_add"))

    def forget(self) -> Resolution | None:
        """How a module reaches ``text_poke_set()`` to do it itself; None: no need, or no such function."""
        from kmend.module.resolve import Livepatched

        found = self.symbols.named("text_poke_set")
        return None if self.takes_back() or len(found) != 1 else Livepatched(VMLINUX, "text_poke_set", 0)

    def module(self, name: str) -> UnitObject:
        """A module of the target, parsed.

        Raises:
            Failed: the target has no such module.
        """
        found = self.optional_module(name)
        if found is None:
            raise Failed(f"{self.target.release} has no module {name}", rule="unknown-module")
        return found

    def optional_module(self, name: str) -> UnitObject | None:
        from kmend.diff.unit import UnitObject
        from kmend.kernel import modules

        if name not in self._modules:
            known = modules.find(self.target, name)
            data = modules.module_file(self.target, name).path.read_bytes() if known else None
            self._modules[name] = UnitObject.parse(data, f"{name}.ko") if data is not None else None
        return self._modules[name]

    def take(self, name: str, path: Path) -> str:
        """Count a module that is not one of the kernel's own (or is a newer build of one) as the target's.

        Returns the sha256 of the module, unpacked.

        Raises:
            UsageError: (``object-file``) the file is no module of that name for this kernel.
        """
        from kmend.diff.unit import UnitObject
        from kmend.kernel.modules import unpack
        from kmend.kernel.symvers import module_name
        from kmend.module.layout import modinfo

        try:
            data = unpack(path)
            unit = UnitObject.parse(data, path.name)
        except KmendError as error:
            raise _object_file(path, name, error.why or error.what) from error
        info = dict(modinfo(unit.elf))
        ours = dict(modinfo(self.glue())).get("vermagic", "")
        if module_name(info.get("name", "")) != name:
            raise _object_file(path, name, f"it is the module {info.get('name', '?')!r}")
        if info.get("vermagic", "") != ours:
            why = f"its vermagic is {info.get('vermagic', '').strip()!r}, the target's {ours.strip()!r}"
            raise _object_file(path, name, why)
        self._modules[name] = unit
        self._depends[name] = tuple(module_name(d) for d in info.get("depends", "").split(",") if d)
        return hashlib.sha256(data).hexdigest()

    def dependencies(self, name: str) -> tuple[str, ...]:
        """All modules that must be loaded before this one, each after those that it needs itself."""
        from kmend.kernel.modules import module_dependencies

        if name not in self._depends:
            return module_dependencies(self.target, name)
        found: dict[str, None] = {}
        for first in self._depends[name]:
            found |= dict.fromkeys((*self.dependencies(first), first))
        return tuple(found)

    def world(self) -> World:
        from kmend.verify.symbols import World

        return World(self.symbols, self.vmlinux, self.exports, self.module, self.dependencies)

    def callers(self) -> TargetCallers:
        """Who reaches a function in the kernel as it is."""
        from kmend.verify.callers import TargetCallers

        return TargetCallers(self.image, self.symbols, self.optional_module)

    def traceable(self, obj: str, place: int) -> bool:
        """Whether ftrace can redirect the function: the object's ``__mcount_loc`` lists it."""
        from kmend.verify.rules import mcount_sites

        if obj not in self._sites:
            if obj == VMLINUX:
                self._sites[obj] = self._vmlinux_sites()
            else:
                self._sites[obj] = mcount_sites(self.module(obj))
        sites = self._sites[obj]
        return place in sites or (obj == VMLINUX and place + 4 in sites)

    def _vmlinux_sites(self) -> frozenset[int]:
        bounds = [self.symbols.named(n) for n in ("__start_mcount_loc", "__stop_mcount_loc")]
        if any(len(b) != 1 for b in bounds):
            raise Failed("the image has no table of ftrace sites", rule="no-ftrace")
        start, stop = bounds[0][0].address, bounds[1][0].address
        data = self.image.read(start, stop - start)
        return frozenset(struct.unpack(f"<{len(data) // 8}Q", data))

    def check(self, data: bytes, name: str, *, livepatch: bool = True) -> Checked:
        """Hold a finished module against every rule of :mod:`kmend.verify.rules`.

        Raises:
            UsageError: no ELF file, no livepatch module.
        """
        from kmend.elf.reader import read
        from kmend.module.layout import modinfo
        from kmend.verify.rules import TargetFacts, check, check_ordinary

        facts = TargetFacts(
            self.target.release,
            dict(modinfo(self.glue())).get("vermagic", ""),
            self.layout,
            self.exports,
            self.symbols,
            self.optional_module,
            self.traceable,
        )
        return (check if livepatch else check_ordinary)(read(data, name), facts, name)


def _object_file(path: Path, name: str, why: str) -> UsageError:
    return UsageError(
        f"{path} is not the module {name} of this kernel",
        why=why,
        next_step="name the .ko that is loaded on the machines to be patched: `modinfo -n " + name + "`",
        rule="object-file",
    )


def scratch(config: Config) -> AbstractContextManager[Path]:
    """A folder for this run only. What killed runs left of theirs goes, whatever this run will need."""
    compiling.sweep_killed(config)
    return scratch_folder(config.cache / "scratch", "build")
