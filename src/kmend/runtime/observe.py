"""One look at the whole: kernel, patches, what is left of former ones, a transition, unfinished actions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from kmend.core.errors import KmendError, Unable
from kmend.core.live import KernelState, LivePatch, LogEntry, Transition
from kmend.runtime import blockers, journal, klog, tasks
from kmend.runtime.journal import Journal
from kmend.runtime.kernel_state import read_kernel
from kmend.runtime.patches import read_left, read_patches
from kmend.runtime.place import Place, is_folder

#: ``klp_force_transition()`` names no patch; the line before it that starts a transition does.
_FORCING = "livepatch: forcing remaining tasks"
_STARTING = re.compile(r"^livepatch: '([^']+)': (?:starting|reversing)")


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look found. ``unfinished`` are actions of this boot whose kmend no longer runs.

    ``acting`` says that one runs now. ``notes`` are sentences about what could not be seen.
    """

    kernel: KernelState
    patches: tuple[LivePatch, ...]
    left: tuple[LivePatch, ...]
    transition: Transition | None
    unfinished: tuple[journal.Record, ...]
    acting: bool
    notes: tuple[str, ...] = ()

    def named(self, name: str) -> LivePatch | None:
        """The patch, or what is left of it."""
        return next((row for row in (*self.patches, *self.left) if row.name == name), None)


def observe(place: Place, state: Path, *, limit: int = blockers.SHOWN, holding: bool = False) -> Seen:
    """Look at everything. ``holding``: the caller holds the lock of whoever acts, so no other kmend does.

    Raises:
        Unable: (rule ``no-livepatch``) the kernel has no livepatch support.
    """
    kernel = read_kernel(place)
    if not kernel.livepatch:
        raise Unable(
            f"{kernel.release} cannot be live patched",
            why=f"{place.livepatch} is not there: the kernel was built without CONFIG_LIVEPATCH"
            if is_folder(place.sys / "kernel")
            else f"{place.sys} is not mounted",
            next_step="boot a kernel with CONFIG_LIVEPATCH=y, as Debian's are",
            rule="no-livepatch",
        )
    notes: list[str] = []
    records = _records(state, kernel.boot_id, notes)
    forced = {*journal.forced(records, kernel.boot_id), *_forced(place)}
    patches = tuple(
        replace(row, forced=row.name in forced)
        for row in read_patches(place, journal.replacing(records, kernel.boot_id))
    )
    left = tuple(replace(row, forced=row.name in forced) for row in read_left(place, patches))
    moving = next((row for row in patches if row.phase.moving), None)
    transition = None
    if moving is not None:
        if tasks.supported(place):
            transition = blockers.look(place, moving, patches, limit)
        else:
            notes.append("this kernel does not show which tasks a transition waits for (patch_state)")
        if transition is not None and transition.unreadable:
            notes.append(
                f"{transition.unreadable} tasks of other users could not be asked: run kmend as root"
            )
    free = holding or journal.is_free(place)
    open_actions = journal.unfinished(records, kernel.boot_id)
    return Seen(kernel, patches, left, transition, open_actions if free else (), not free, tuple(notes))


def _records(state: Path, boot: str, notes: list[str]) -> tuple[journal.Record, ...]:
    try:
        return Journal(state, boot).records()
    except KmendError as error:
        notes.append(f"{error.what}: what kmend did before is not known")
        return ()


def _forced(place: Place) -> frozenset[str]:
    """Patches that were forced by hand, as far as the kernel log still has it."""
    try:
        if not any(row.message.text.startswith(_FORCING) for row in klog.read_all(place, _FORCING.encode())):
            return frozenset()
        records = klog.read_all(place, b"livepatch: ")
    except Unable:
        return frozenset()
    found, last = set(), ""
    for row in records:
        if row.message.user:
            continue
        if match := _STARTING.match(row.message.text):
            last = match[1]
        elif row.message.text.startswith(_FORCING) and last:
            found.add(last)
    return frozenset(found)


def read_log(place: Place, state: Path) -> tuple[tuple[LogEntry, ...], tuple[str, ...]]:
    """kmend's journal and the kernel's livepatch messages by time, and notes about what could not be read."""
    notes: list[str] = []
    kernel = read_kernel(place)
    rows = [_journal_entry(row) for row in _records(state, kernel.boot_id, notes)]
    names = {row.patch for row in _records(state, kernel.boot_id, [])}
    try:
        records = klog.concerning(klog.read_all(place), names)
    except Unable as error:
        notes.append(f"{error.what}: the kernel's own messages are not shown")
        records = ()
    boot = klog.epoch_of_boot()
    rows += [LogEntry(boot + row.message.seconds, "kernel", row.message.text, row.message) for row in records]
    return tuple(sorted(rows, key=lambda row: row.time)), tuple(notes)


def _journal_entry(row: journal.Record) -> LogEntry:
    result = f" [{row.result}]" if row.result else ""
    by = f", by {row.user}" if row.event == "begin" else ""
    return LogEntry(
        row.time,
        "kmend",
        f"{row.verb} {row.patch}: {row.text}{result}{by}",
        record={
            "event": row.event,
            "id": row.id,
            "boot": row.boot,
            "verb": row.verb,
            "patch": row.patch,
            "result": row.result,
            "user": row.user,
            "pid": row.pid,
            "detail": dict(row.detail),
        },
    )


def names_of(rows: Iterable[LivePatch]) -> str:
    """Names for a sentence."""
    return ", ".join(row.name for row in rows) or "none"
