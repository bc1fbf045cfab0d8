"""What is looked at before a module is loaded: its file, the running kernel, and each check's outcome.

Joins the checks that need nothing but the live machine (:mod:`kmend.runtime.preflight`) with what the pure
stages know of a module's file, and with the target in the cache if it is that of the kernel which runs.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kmend.core.config import Config
from kmend.core.errors import Failed, KmendError, Unable
from kmend.core.live import Check, KernelState
from kmend.core.progress import Progress
from kmend.core.target import Release
from kmend.runtime import act, preflight, refusals
from kmend.runtime.observe import Seen, observe
from kmend.runtime.patches import IDENTITY, identity
from kmend.runtime.place import Place
from kmend.runtime.preflight import ModuleFile, Wanted
from kmend.runtime.symbols import SymbolTable

if TYPE_CHECKING:
    from kmend.elf.model import ElfFile
    from kmend.module.describe import Description
    from kmend.module.layout import Layout
    from kmend.view import TargetView

#: A module of this size is none.
MOST = 256 << 20


@dataclass(frozen=True, slots=True)
class Examined:
    """What a load would look at first: the file, the machine, and each check's outcome.

    ``table`` is None when the kernel shows this user no symbols.
    """

    module: ModuleFile
    description: Description
    elf: ElfFile
    seen: Seen
    checks: tuple[Check, ...]
    table: SymbolTable | None = None


def examine(config: Config, progress: Progress, place: Place, path: str) -> Examined:
    """Everything that :meth:`kmend.manager.Manager.load` would look at before it loads; nothing is changed.

    Raises:
        UsageError, Failed: the file cannot be read or is no livepatch module.
        Unable: the running kernel has no livepatch support.
    """
    data = contents_of(path)
    seen = observe(place, config.state, holding=True)
    progress.step(f"checking {path}")
    examiner = Examiner(config, progress, place, seen.kernel)
    return examiner.examine(data, examiner.read(data, path), seen)


class Examiner:
    """Looks at modules for the kernel that runs.

    ``view`` is that kernel's target in the cache; None where there is none, and ``problem`` says why.
    ``layout`` is how the kernel lays its livepatch structures out, by the target or by its own BTF; None
    where neither tells.
    """

    def __init__(self, config: Config, progress: Progress, place: Place, kernel: KernelState) -> None:
        from kmend.running import OwnFiles

        self.progress, self.place, self.kernel = progress, place, kernel
        self._files = OwnFiles(kernel)
        self.view, self.problem = view_of(config, Release(kernel.release), kernel.build_id)
        self.layout = _layout(place, self.view)

    def read(self, data: bytes, path: str) -> ModuleFile:
        """As :func:`read_module_file`."""
        return read_module_file(data, path, self.layout)

    def examine(self, data: bytes, module: ModuleFile, seen: Seen) -> Examined:
        """Hold a module against every check."""
        from kmend.elf.reader import read
        from kmend.module.describe import describe

        elf, table = read(data, module.path), self.symbols()
        leftover = next((row for row in seen.left if row.name == module.name), None)
        without = replace(seen, left=tuple(row for row in seen.left if row is not leftover))
        checks = list(preflight.look(self.place, module, without, table))
        refused = {row.refusal.rule for row in checks if row.refusal is not None}
        checks += self.rules(data, module.path, elf, table, refused)
        checks += self._code(module, table)
        if leftover is not None:
            checks.append(refusals.leftover(leftover))
        return Examined(module, describe(elf, self.layout, module.path), elf, seen, tuple(checks), table)

    def _code(self, module: ModuleFile, table: SymbolTable | None) -> list[Check]:
        """The functions to be replaced, as they run, against the image of the same build."""
        from kmend import running

        if module.wanted is None:
            return [Check("running code", None, "which functions are replaced is not known")]
        self.progress.step("comparing the running code with the kernel's image")
        try:
            image = self._files.image() if self.view is None else self.view.image
            code = running.RunningCode(self.place, image, self._files.module, table)
            try:
                return list(running.checks(code.compare(module.wanted)))
            finally:
                code.close()
        except KmendError as error:
            return [Check("running code", None, f"{error.what}: {error.why}")]

    def symbols(self) -> SymbolTable | None:
        """The running kernel's; None when it shows this user none, which the checks say."""
        try:
            return SymbolTable(self.place)
        except Unable:
            return None

    def rules(
        self,
        data: bytes,
        path: str,
        elf: ElfFile,
        table: SymbolTable | None,
        refused: set[str] | None = None,
    ) -> list[Check]:
        """`kmend check` against the target in the cache, else against what this machine has of its kernel.

        ``refused`` are the rules by which the other checks of a load have refused; these say it then.
        """
        from kmend import facts

        unknown: tuple[facts.Unknown, ...] = ()
        try:
            if self.view is not None:
                checked, where = self.view.check(data, path), "the cache"
            elif self.layout is None:  # where the module's descriptors are is not known
                return [Check(facts.NAME, None, f"{self.problem}; and the kernel shows no BTF")]
            else:
                own = facts.RunningFacts(
                    self.place, self.kernel.release, self._files, self.layout, table, elf
                )
                checked, where = own.check(path), "the kernel's own files"
                unknown = own.unknown
        except (Failed, Unable) as error:  # damaged, or lacks what nothing here can make
            return [Check(facts.NAME, None, f"{error.what}: {error.why}")]
        told: frozenset[tuple[str, str]] = frozenset()
        if refused is not None:
            told = facts.named_by_others(self.place, table, checked.description, refused)
        return list(facts.checks(checked, unknown, told, where))


def view_of(config: Config, release: Release, build_id: str) -> tuple[TargetView | None, str]:
    """The target of that build ('': of any) in the cache; None when there is none of use, and why."""
    from kmend.kernel.prepared import open_target
    from kmend.view import TargetView

    try:
        target = open_target(config, release)
        if build_id and target.build_id != build_id:
            return None, f"{target.release} in the cache is another build than {build_id[:12]}…"
        view = TargetView(config, target)
        view.layout  # noqa: B018 - a cache that cannot tell it is of no use here
    except KmendError as error:
        return None, f"{error.what}: {error.why}" if error.why else error.what
    return view, ""


def _layout(place: Place, view: TargetView | None) -> Layout | None:
    """How the kernel lays its livepatch structures out: by the target, else by its own BTF."""
    from kmend import running

    if view is not None:
        return view.layout
    try:
        return running.layout(place)
    except KmendError:
        return None


def contents_of(path: str) -> bytes:
    """What is in a module's file.

    Raises:
        UsageError, Failed: as :func:`kmend.runtime.act.open_module` and :func:`contents`.
    """
    fd = act.open_module(path)
    try:
        return contents(fd, path)
    finally:
        os.close(fd)


def contents(fd: int, path: str) -> bytes:
    """
    Raises:
        Failed: (rule ``unreadable``) the file cannot be read.
    """
    data = b""
    try:
        while len(data) <= MOST and (chunk := os.pread(fd, 1 << 22, len(data))):
            data += chunk
        if len(data) > MOST:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    except OSError as error:
        raise Failed(
            f"{path} cannot be read",
            why=error.strerror or str(error),
            next_step="name a livepatch module (.ko)",
            rule="unreadable",
        ) from error
    return data


def read_module_file(data: bytes, path: str, layout: Layout | None) -> ModuleFile:
    """What a module's file says of itself; without ``layout`` its functions are those of its build report.

    Raises:
        UsageError: it is no livepatch module.
    """
    from kmend.elf.reader import read
    from kmend.module.describe import describe

    elf = read(data, path)
    found = describe(elf, layout, path)
    sha256 = hashlib.sha256(data).hexdigest()
    wanted = _wanted(found)
    if wanted is None:
        wanted = _reported(path, sha256)
    note = found.note or {}
    info = dict(found.info)
    return ModuleFile(
        path=path,
        name=(found.name or Path(path).name.partition(".")[0]).replace("-", "_"),
        vermagic=found.vermagic,
        build_id=str(note.get("build_id") or info.get("kmend_build_id") or ""),
        depends=tuple(word.replace("-", "_") for word in info.get("depends", "").split(",") if word),
        signed=data.endswith(preflight.SIGNED),
        identity=_identity(elf),
        sha256=sha256,
        wanted=wanted,
        replace=found.replace,
        note=note,
    )


def _identity(elf: ElfFile) -> str:
    return identity({name: section.data for name in IDENTITY if (section := elf.section(name)) is not None})


def _wanted(found: Description) -> tuple[Wanted, ...] | None:
    if found.objects is None:
        return None
    return tuple(Wanted(o.name, f.old_name, f.sympos) for o in found.objects for f in o.funcs)


def _reported(path: str, sha256: str) -> tuple[Wanted, ...] | None:
    """The functions that the build report beside the module names, if it is the report of this very file."""
    try:
        report = json.loads(Path(path).with_suffix(".json").read_bytes())
        if report["sha256"] != sha256:
            return None
        return tuple(
            Wanted(str(o["name"]), str(f["name"]), int(f["sympos"]))
            for o in report["objects"]
            for f in o["functions"]
            if f["status"] == "changed"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
