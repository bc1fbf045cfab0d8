"""Kernel messages: lines of the kernel log as values, and the reports (oops, warning) among them.

A report is what the kernel prints between a headline and ``---[ end trace``: ``die()`` in
``arch/x86/kernel/dumpstack.c``, ``show_fault_oops()`` in ``arch/x86/mm/fault.c``, ``__warn()`` and
``panic()`` in ``kernel/panic.c``, the soft lockup detector in ``kernel/watchdog.c``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

#: Level of ``KERN_WARNING`` (include/linux/kern_levels.h); lower is more serious.
WARNING_LEVEL = 4

_RAW = re.compile(r"^(?:<(\d+)>)?\[ *(\d+\.\d+)\](?:\[ *[TC]\d+\])? ?(.*)$")
_DEATH = re.compile(
    r"^(?:watchdog: )?BUG: "  # page faults, soft lockups, atomic sleeps, list corruption
    r"|^kernel BUG at "
    r"|^Kernel panic - not syncing"
    r"|^Oops: "  # since 6.10 `die()` begins with it
    r"|^general protection fault"
    r"|: [0-9a-f]{4} \[#\d+\]"  # die(): "invalid opcode: 0000 [#1] PREEMPT SMP"
)
_WARNING = re.compile(r"^WARNING: ")
_CUT = "------------[ cut here ]------------"
_END = re.compile(r"^---\[ end (?:trace|Kernel panic)")
_RIP = re.compile(r"^RIP: \w+:(\S+)(?: \[(\w+)\])?")
#: No report of the kernel is longer; beyond it an ``end trace`` line was lost.
REPORT_LINES = 200


@dataclass(frozen=True, slots=True)
class KernelMessage:
    """One line. ``seconds`` since boot, ``level`` as in ``kern_levels.h``; ``user``: user space wrote it."""

    seconds: float
    level: int
    text: str
    user: bool = False

    @property
    def livepatch(self) -> bool:
        """Whether the livepatch core (or a report about it) says it."""
        return self.text.startswith("livepatch:")


class ReportKind(Enum):
    """``oops``: the kernel (or a task in it) died. ``warning``: it found something wrong and went on."""

    OOPS = "oops"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class KernelReport:
    """An oops, BUG, panic or WARN with its whole text; ``where`` is the function that ``RIP:`` names."""

    kind: ReportKind
    headline: str
    where: str
    lines: tuple[str, ...]


def parse(text: str) -> tuple[KernelMessage, ...]:
    """Read ``dmesg -r`` output or a console's text; lines of another form are left out.

    A console shows no level: such lines count as level 6 (``KERN_INFO``).
    """
    found = []
    for line in text.splitlines():
        match = _RAW.match(line.rstrip("\r"))
        if match is None:
            continue
        number = int(match[1]) if match[1] else 6
        # <facility * 8 + level>: facility 0 is the kernel itself (Documentation/ABI/testing/dev-kmsg)
        found.append(KernelMessage(float(match[2]), number & 7, match[3], user=number >> 3 != 0))
    return tuple(found)


def is_death(text: str) -> bool:
    """Whether a line without its time stamp is the headline of an oops, a BUG or a panic."""
    return _DEATH.search(text) is not None


def reports(messages: Iterable[KernelMessage]) -> tuple[KernelReport, ...]:
    """All oops and warning reports in the log, in order. What user space wrote to the log never counts."""
    lines = [message.text for message in messages if not message.user]
    found = []
    at = 0
    while at < len(lines):
        kind = _kind(lines[at])
        if kind is None:
            at += 1
            continue
        end = _end(lines, at)
        block = lines[at:end]
        where = next(
            (match[1] + (f" [{match[2]}]" if match[2] else "") for match in map(_RIP.match, block) if match),
            "",
        )
        found.append(KernelReport(kind, lines[at], where, tuple(block)))
        at = end
    return tuple(found)


def _kind(line: str) -> ReportKind | None:
    if _DEATH.search(line):
        return ReportKind.OOPS
    return ReportKind.WARNING if _WARNING.match(line) else None


def _end(lines: Sequence[str], start: int) -> int:
    """The index after the report that begins at ``start``."""
    for at in range(start + 1, min(len(lines), start + REPORT_LINES)):
        if _END.match(lines[at]):
            return at + 1
        if lines[at] == _CUT:
            return at
    # One line alone ("BUG: workqueue leaked lock…") has no end mark: then only what is plainly its trace.
    at = start + 1
    while at < min(len(lines), start + REPORT_LINES) and _trace_like(lines[at]):
        at += 1
    return at


_TRACE = re.compile(
    r"^(?: |Call Trace|RIP:|RSP:|R[A-Z0-9]{2}:|[CDFEG]S: |CR\d:|DR\d:|PKRU|Code:|CPU:|Hardware name|"
    r"Modules linked|#PF|PGD|Oops|Kernel Offset|</?(?:TASK|IRQ|NMI))"
)


def _trace_like(line: str) -> bool:
    return _TRACE.match(line) is not None
