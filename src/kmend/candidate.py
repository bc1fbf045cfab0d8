"""What is looked at before a module is installed: its file, and each check that holds for every boot.

For the kernel that runs as :mod:`kmend.examine` does it for a load, but for what is so at this very moment.
For another one there is the target in the cache, if any.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kmend.core.config import Config
from kmend.core.errors import Failed, Refusal, Unable, UsageError
from kmend.core.files import read_regular
from kmend.core.live import Check, KernelState
from kmend.core.progress import Silent
from kmend.core.target import Release
from kmend.elf.reader import read
from kmend.examine import MOST, Examiner, contents_of, read_module_file, view_of
from kmend.runtime import persistence, preflight
from kmend.runtime.observe import observe
from kmend.runtime.place import Place, is_folder
from kmend.runtime.preflight import ModuleFile

if TYPE_CHECKING:
    from kmend.view import TargetView

#: Checks of `kmend load` that hold for every boot; the others are about this very moment.
LASTING = ("release", "build id", "signature", "functions")
#: Where the modules of installed kernels lie.
KERNELS = Path("/lib/modules")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A module that may be installed: its file's contents, what they say, the report beside it."""

    path: str
    data: bytes
    module: ModuleFile
    report: bytes
    checks: tuple[Check, ...]
    warnings: tuple[Refusal, ...]

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Why it is not installed; empty when it may be."""
        return tuple(row.refusal for row in self.checks if row.refusal is not None)


def look(config: Config, place: Place, path: str, kernel: KernelState) -> Candidate:
    """Read a file and hold it against every check that there is for its kernel.

    Raises:
        UsageError, Failed: it cannot be read, is no livepatch module, or was built for no release.
        Unable: (rule ``no-livepatch``) it is for the running kernel, which has no livepatch support.
    """
    data = contents_of(path)
    plain = read_module_file(data, path, None)
    release = persistence.release_of(plain.release)
    if not persistence.is_name(plain.name):
        raise UsageError(
            f"{path} names itself {plain.name!r}",
            why="that is no name of a module",
            next_step="build it again, with a name of letters, digits and underscores (-n)",
            rule="module-name",
        )
    if release == kernel.release:
        examiner = Examiner(config, Silent(), place, kernel)
        module = examiner.read(data, path)
        checks = _lasting(config, place, module)
        checks += examiner.rules(data, path, read(data, path), examiner.symbols())
        warnings: tuple[Refusal, ...] = ()
    else:
        view, problem = view_of(config, release, plain.build_id)
        module = plain if view is None else read_module_file(data, path, view.layout)
        checks = list(_rules(view, problem, data, path))
        warnings = () if (KERNELS / release).is_dir() else (_kernel_absent(release, kernel),)
    return Candidate(path, data, module, _report_beside(path, module.sha256), tuple(checks), warnings)


def _lasting(config: Config, place: Place, module: ModuleFile) -> list[Check]:
    """The checks of a load that hold for every boot. Without ``/sys``, as in a chroot, what the kernel
    has and allows cannot be looked at; the boot will.

    Raises:
        Unable: (rule ``no-livepatch``) ``/sys`` is there, and the kernel has no livepatch support.
    """
    try:
        seen = observe(place, config.state)
    except Unable as error:
        if error.rule != "no-livepatch" or is_folder(place.sys / "kernel"):
            raise
        return [Check(name, None, error.why) for name in LASTING]
    return [row for row in preflight.look(place, module, seen) if row.name in LASTING]


def _rules(view: TargetView | None, problem: str, data: bytes, path: str) -> Iterator[Check]:
    """`kmend check` for a kernel that does not run: against the target in the cache."""
    from kmend import facts

    if view is None:
        yield Check(facts.NAME, None, problem)
        return
    try:
        checked = view.check(data, path)
    except (Failed, Unable) as error:  # damaged, or lacks what nothing here can make
        yield Check(facts.NAME, None, f"{error.what}: {error.why}")
        return
    yield from facts.checks(checked, (), (), "the cache")


def _kernel_absent(release: Release, kernel: KernelState) -> Refusal:
    return Refusal(
        "kernel-absent",
        f"{release} is not installed on this machine",
        f"there is no {KERNELS / release}; {kernel.release} is running",
        "nothing, if that kernel is still to come; the patch waits for it",
    )


def _report_beside(path: str, sha256: str) -> bytes:
    """The build report beside the module, if it is the report of this very file; else nothing."""
    try:
        data = read_regular(Path(path).with_suffix(".json"), MOST)
        return data if json.loads(data)["sha256"] == sha256 else b""
    except (OSError, ValueError, KeyError, TypeError):
        return b""
