"""The values of a build report (schema 1), as the stages hand them on."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from kmend.core.errors import Refusal


class Outcome(Enum):
    """``result`` of a build report."""

    BUILT = "built"
    REFUSED = "refused"
    NOTHING_CHANGED = "nothing-changed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class FunctionRow:
    """A function of the module.

    ``status`` is ``changed`` (it replaces one) or ``new``; ``why`` says what made it so.
    """

    name: str
    sympos: int
    status: str
    why: str


@dataclass(frozen=True, slots=True)
class ObjectRow:
    """``vmlinux`` or a module, with what the patch brings for it."""

    name: str
    functions: tuple[FunctionRow, ...]


@dataclass(frozen=True, slots=True)
class Verified:
    """How many functions were compared with the target's own bytes, how many were identical.

    ``skipped`` names what was passed over.
    """

    functions: int = 0
    identical: int = 0
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UnitCounts:
    """How many units the patch may reach, how many had to be compiled, and in how many code changed."""

    considered: int = 0
    compiled: int = 0
    changed: int = 0


@dataclass(frozen=True, slots=True)
class KernelId:
    release: str
    version: str
    build_id: str


@dataclass(frozen=True, slots=True)
class BuildReport:
    """Everything a build has to tell. ``timings`` are wall seconds per stage; ``units`` only people see.

    ``cves`` are the CVE names that the patch mentions. ``digest`` names what the module was made from; its
    note has the same (``report``), which tells that the two belong together.
    """

    name: str
    result: Outcome
    kernel: KernelId
    module: str | None = None
    sha256: str | None = None
    objects: tuple[ObjectRow, ...] = ()
    refused: tuple[Refusal, ...] = ()
    warnings: tuple[Refusal, ...] = ()
    verified: Verified = Verified()
    units: UnitCounts = UnitCounts()
    timings: dict[str, float] = field(default_factory=dict)
    cves: tuple[str, ...] = ()
    digest: str = ""
