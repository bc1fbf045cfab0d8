"""What differs between the kernel lines that kmend knows, as data, each row with the commit it came from.

Everything else in this package is the same in both lines: ``kernel/livepatch/`` of Debian's 6.1.192 and
6.12.117 was compared line by line.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Feature(Enum):
    """Something that later lines have and earlier ones lack."""

    CLEAR_RELOCS = "clear-relocs"
    COND_RESCHED = "cond-resched"
    REVERSE_LAST = "reverse-last"
    STATE_NAMES = "state-names"
    REPLACE_ATTRIBUTE = "replace-attribute"


@dataclass(frozen=True, slots=True)
class Difference:
    """A row: the feature, the first mainline release that has it, its commit and what it changes."""

    feature: Feature
    since: tuple[int, int]
    commit: str
    subject: str
    effect: str


DIFFERENCES = (
    Difference(
        Feature.CLEAR_RELOCS,
        (6, 3),
        "0c05e7bd2d01",
        "livepatch,x86: Clear relocation targets on a module removal",
        "a patched module that goes and comes again can be patched again; before, its second load is "
        "refused when the patch has livepatch relocations for it",
    ),
    Difference(
        Feature.COND_RESCHED,
        (6, 4),
        "e3ff7c609f39",
        "livepatch,sched: Add livepatch task switching to cond_resched()",
        "a task that runs in the kernel without sleeping may switch in cond_resched()",
    ),
    Difference(
        Feature.REVERSE_LAST,
        (6, 4),
        "e3ff7c609f39",
        "livepatch,sched: Add livepatch task switching to cond_resched()",
        "klp_reverse_transition() turns the target state round after all TIF_PATCH_PENDING flags are "
        "cleared; before, it did so first",
    ),
    Difference(
        Feature.STATE_NAMES,
        (6, 10),
        "d927752f287f",
        "livepatch: Rename KLP_* to KLP_TRANSITION_*",
        "KLP_UNDEFINED, KLP_UNPATCHED, KLP_PATCHED are named KLP_TRANSITION_IDLE, …_UNPATCHED, …_PATCHED",
    ),
    Difference(
        Feature.REPLACE_ATTRIBUTE,
        (6, 11),
        "adb68ed26a3e",
        'livepatch: Add "replace" sysfs attribute',
        "/sys/kernel/livepatch/PATCH/replace",
    ),
)


@dataclass(frozen=True, slots=True)
class Line:
    """A kernel line: its name (``6.1``) and what it has of :data:`DIFFERENCES`."""

    name: str
    features: frozenset[Feature]

    def has(self, feature: Feature) -> bool:
        """Whether this line has the feature."""
        return feature in self.features

    @property
    def state_names(self) -> tuple[str, str, str]:
        """The names of the task states -1, 0 and 1 in ``include/linux/livepatch.h``."""
        if self.has(Feature.STATE_NAMES):
            return ("KLP_TRANSITION_IDLE", "KLP_TRANSITION_UNPATCHED", "KLP_TRANSITION_PATCHED")
        return ("KLP_UNDEFINED", "KLP_UNPATCHED", "KLP_PATCHED")


def line(major: int, minor: int) -> Line:
    """The line of a mainline release, from 6.1 on.

    A version decides here, not a probe: the model stands for kernels that need not be at hand.
    """
    return Line(
        f"{major}.{minor}", frozenset(row.feature for row in DIFFERENCES if row.since <= (major, minor))
    )


#: Debian 12's kernel.
LINE_6_1 = line(6, 1)
#: Debian 12's backported kernel.
LINE_6_12 = line(6, 12)
LINES = {row.name: row for row in (LINE_6_1, LINE_6_12)}
