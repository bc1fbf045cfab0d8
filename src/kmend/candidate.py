"""What is looked at before a module is installed: its file, and each check that holds for every boot.

    file -> what it says of itself -> the running kernel, if it is for that one -> the target in the cache

As :mod:`kmend.examine` does it for a load; but the kernel may be another than the one that runs, and what is
so at this very moment is no matter.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kmend.core.config import Config
from kmend.core.errors import Failed, KmendError, Refusal, Unable, UsageError
from kmend.core.live import Check, KernelState
from kmend.core.target import Release
from kmend.examine import read_module_file
from kmend.runtime import persistence, preflight
from kmend.runtime.observe import observe
from kmend.runtime.place import Place, is_folder
from kmend.runtime.preflight import ModuleFile

if TYPE_CHECKING:
    from kmend.module.layout import Layout
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
    data = _contents(path)
    plain = read_module_file(data, path, None)
    release = persistence.release_of(plain.release)
    if not persistence.is_name(plain.name):
        raise UsageError(
            f"{path} names itself {plain.name!r}",
            why="that is no name of a module",
            next_step="build it again, with a name of letters, digits and underscores (-n)",
            rule="module-name",
        )
    running = release == kernel.release
    view, problem = _view(config, release, kernel.build_id if running else plain.build_id)
    layout = view.layout if view is not None else _own_layout(place) if running else None
    module = plain if layout is None else read_module_file(data, path, layout)
    checks = [*(_lasting(config, place, module) if running else ()), *_rules(view, problem, data, path)]
    warnings = () if running or (KERNELS / release).is_dir() else (_kernel_absent(release, kernel),)
    return Candidate(path, data, module, _report_beside(path, module.sha256), tuple(checks), warnings)


def _contents(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Failed(
            f"{path} cannot be read",
            why=error.strerror or str(error),
            next_step="name a livepatch module (.ko)",
            rule="unreadable",
        ) from error


def _view(config: Config, release: Release, build_id: str) -> tuple[TargetView | None, str]:
    """The target of that build ('': of any) when it is in the cache; else why there is none."""
    from kmend.kernel.prepared import open_target
    from kmend.view import TargetView

    try:
        target = open_target(config, release)
        if build_id and target.build_id != build_id:
            return None, f"the target {release} in the cache is another build than the module's kernel"
        return TargetView(config, target), ""
    except KmendError as error:
        return None, error.what


def _own_layout(place: Place) -> Layout | None:
    """How the running kernel lays its livepatch structures out, by its own BTF."""
    from kmend import running

    try:
        return running.layout(place)
    except KmendError:
        return None


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


def _rules(view: TargetView | None, problem: str, data: bytes, path: str) -> list[Check]:
    """`kmend check` against the target in the cache."""
    if view is None:
        return [Check("rules of kmend check", None, problem)]
    checked = view.check(data, path)
    rows = [Check("rules of kmend check", False, row.what, row) for row in checked.refusals]
    number = sum(checked.checked.values())
    return rows or [Check("rules of kmend check", True, f"{number} things looked at, no objection")]


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
        data = Path(path).with_suffix(".json").read_bytes()
        return data if json.loads(data)["sha256"] == sha256 else b""
    except (OSError, ValueError, KeyError, TypeError):
        return b""
