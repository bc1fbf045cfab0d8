"""The values of a trial: what happened when a livepatch module was tried in a guest."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from kmend.core.kmsg import KernelMessage, KernelReport, ReportKind


class Outcome(Enum):
    """Four different ends, told apart on purpose (the patch is wrong / the kernel died / nobody knows)."""

    PASSED = "passed"
    #: the script's exit status is not 0 on the patched side, or loading, transition or taking back failed
    FAILED = "failed"
    #: the kernel oopsed, hit a BUG or panicked on the patched side
    OOPS = "oops"
    #: the guest died or fell silent without a word of the kernel
    LOST = "lost"


class Phase(Enum):
    """``KMEND_PHASE`` as a script sees it."""

    STOCK = "stock"
    PATCHED = "patched"
    RESTORED = "restored"


@dataclass(frozen=True, slots=True)
class ScriptRun:
    """A run of the user's script. ``status`` is None when it did not end; ``note`` then says why not."""

    phase: Phase
    status: int | None
    stdout: str
    stderr: str
    seconds: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class SysfsObject:
    """``/sys/kernel/livepatch/PATCH/OBJECT``. ``functions`` as sysfs spells them: ``name,sympos``."""

    name: str
    patched: bool
    functions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SysfsPatch:
    """``/sys/kernel/livepatch/PATCH``. ``replace`` is None before 6.11, which does not show it."""

    name: str
    enabled: bool
    transition: bool
    replace: bool | None
    objects: tuple[SysfsObject, ...]


@dataclass(frozen=True, slots=True)
class PatchTrial:
    """One module's way through the guest.

    ``transition`` and ``take_back_transition`` are seconds between the kernel's own messages "starting …
    transition" and "… complete" (None: no such pair in the log). ``gone``: its sysfs folder and its module
    have disappeared after taking back. ``unpatched``: the log has its "unpatching complete".
    """

    name: str
    file: str
    loaded: bool = False
    complete: bool = False
    transition: float | None = None
    take_back_transition: float | None = None
    gone: bool = False
    unpatched: bool = False
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Side:
    """One guest's story.

    ``sysfs`` is the tree as it was after the script ran (on the patched side). ``taint_before`` and
    ``taint_after`` are numbers of ``/proc/sys/kernel/tainted``, None when the guest could not be asked.
    ``lost`` is empty, or says how the guest was lost; ``console`` then has its last lines.
    """

    runs: tuple[ScriptRun, ...] = ()
    sysfs: tuple[SysfsPatch, ...] = ()
    messages: tuple[KernelMessage, ...] = ()
    reports: tuple[KernelReport, ...] = ()
    taint_before: int | None = None
    taint_after: int | None = None
    lost: str = ""
    console: tuple[str, ...] = ()
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def oopses(self) -> tuple[KernelReport, ...]:
        """The reports of a kernel that died."""
        return tuple(report for report in self.reports if report.kind is ReportKind.OOPS)

    @property
    def warnings(self) -> tuple[KernelReport, ...]:
        """The reports of a kernel that went on."""
        return tuple(report for report in self.reports if report.kind is ReportKind.WARNING)

    def run_of(self, phase: Phase) -> ScriptRun | None:
        """The run in that phase, if the guest came that far."""
        return next((run for run in self.runs if run.phase is phase), None)


@dataclass(frozen=True, slots=True)
class TrialReport:
    """Everything that `kmend try` has to tell. ``why`` is one sentence; ``stock`` is None without a script.

    ``timings`` are wall seconds: ``boot`` (only when no snapshot was there), ``verdict`` (from the start of
    the trial to the moment when the patched run's result was known), ``total``.
    """

    release: str
    outcome: Outcome
    why: str
    next_step: str
    accel: str
    patches: tuple[PatchTrial, ...]
    stock: Side | None
    patched: Side
    artefacts: str = ""
    timings: dict[str, float] = field(default_factory=dict)
