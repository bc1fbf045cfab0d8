"""One look at the whole: kernel, patches, what is left of former ones, a transition, unfinished actions."""

from __future__ import annotations

import re
import shutil
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kmend.core.errors import KmendError, Unable
from kmend.core.kmsg import KernelMessage
from kmend.core.live import KernelState, LivePatch, LogEntry, Transition
from kmend.runtime import blockers, journal, klog, tasks
from kmend.runtime.journal import Forced, Journal
from kmend.runtime.kernel_state import read_kernel
from kmend.runtime.patches import read_left, read_patches
from kmend.runtime.place import Place, is_folder

#: ``klp_force_transition()`` names no patch; the line before it that starts a transition does.
_FORCING = "livepatch: forcing remaining tasks"
_STARTING = re.compile(r"^livepatch: '([^']+)': starting (patching|unpatching) transition")
_ENABLING = re.compile(r"^livepatch: enabling patch '([^']+)'")
#: Of so many boots before this one the kernel's words are looked up.
_FORMER_BOOTS = 5
#: Seconds that a message comes after the beginning of an action that heard it, and before its end, at least.
_WITHIN = 1e-4


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look found. ``unfinished`` are actions of this boot whose kmend no longer runs.

    ``resumable`` are those and the ones that were interrupted (:func:`kmend.runtime.journal.resumable`).
    ``acting`` says that one runs now. ``notes`` are sentences about what could not be seen.
    """

    kernel: KernelState
    patches: tuple[LivePatch, ...]
    left: tuple[LivePatch, ...]
    transition: Transition | None
    unfinished: tuple[journal.Record, ...]
    acting: bool
    notes: tuple[str, ...] = ()
    resumable: tuple[journal.Record, ...] = ()

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
    patches = read_patches(place, journal.replacing(records, kernel.boot_id))
    left = read_left(place, patches)
    forced = _forced(place, journal.forced(records, kernel.boot_id), [row.name for row in left])
    patches = tuple(replace(row, forced=row.name in forced.patches) for row in patches)
    left = tuple(
        replace(row, forced=row.name in forced.patches, pinned_by=_pinned_by(row, forced)) for row in left
    )
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
    return Seen(
        kernel,
        patches,
        left,
        transition,
        unfinished=journal.unfinished(records, kernel.boot_id) if free else (),
        acting=not free,
        notes=tuple(notes),
        resumable=journal.resumable(records, kernel.boot_id) if free else (),
    )


def _records(state: Path, boot: str, notes: list[str]) -> tuple[journal.Record, ...]:
    try:
        return Journal(state, boot).records()
    except KmendError as error:
        notes.append(f"{error.what}: what kmend did before is not known")
        return ()


def _forced(place: Place, known: Forced, left: Sequence[str]) -> Forced:
    """What was forced, ``known`` from the journal, and by hand as far as the kernel log still has it.

    ``left`` are the modules that are left of former patches. What the log says of a patch that it saw being
    forced counts: it has also seen what came afterwards.
    """
    try:
        if not any(row.message.text.startswith(_FORCING) for row in klog.read_all(place, _FORCING.encode())):
            return known
        records = klog.read_all(place, b"livepatch: ")
    except Unable:
        return known
    found, told, last, direction = Forced(), set[str](), "", ""
    for row in records:
        if row.message.user:
            continue
        text = row.message.text
        if match := _ENABLING.match(text):
            found.again(match[1])
        elif match := _STARTING.match(text):
            last, direction = match.groups()
        elif text.startswith(_FORCING) and last:
            told.add(last)
            found.patches.add(last)
            # whether it was replacing the others is seen from what they have become
            kept = [last] if direction == "unpatching" else [name for name in left if name != last]
            found.pins |= dict.fromkeys(kept, last)
    return Forced(found.patches | (known.patches - told), found.pins | known.pins)


def _pinned_by(row: LivePatch, forced: Forced) -> str:
    """Whose forced transition keeps this module; '' where nothing does, or another module refers to it."""
    if row.module is None or not row.module.references or row.module.holders:
        return ""
    return forced.pins.get(row.name, "")


def read_log(place: Place, state: Path) -> tuple[tuple[LogEntry, ...], tuple[str, ...]]:
    """kmend's journal and the kernel's livepatch messages, and notes about what could not be read.

    Boot after boot, in each by time. What the kernels of the last former boots said, also when they died, is
    in systemd's journal, if anywhere. Where there are several boots, a line stands before each.
    """
    notes: list[str] = []
    here = read_kernel(place).boot_id
    records = _records(state, here, notes)
    names = {row.patch for row in records} - {""}
    former = [boot for boot in dict.fromkeys(row.boot for row in records) if boot != here]
    rows: dict[str, list[LogEntry]] = {boot: [] for boot in (*former, here)}
    patches: dict[str, dict[str, None]] = {boot: {} for boot in rows}
    for record in records:
        rows[record.boot].append(_journal_entry(record))
        patches[record.boot][record.patch] = None
    try:
        said = klog.concerning(klog.read_all(place), names)
    except Unable as error:
        notes.append(f"{error.what}: the kernel's own messages are not shown")
        said = ()
    began = klog.epoch_of_boot()
    drifts = _drifts(records, here, said, began)
    for row in said:
        time = began + row.message.seconds + _drift(drifts, row.number)
        rows[here].append(_kernel_entry(time, row.message, here))
    if former and shutil.which("journalctl"):
        for boot in former[-_FORMER_BOOTS:]:
            try:
                kept = klog.kept(boot, names)
            except KmendError as error:
                notes.append(f"{error.what}: what the kernels of former boots said is not shown")
                break
            rows[boot] += [_kernel_entry(row.time, row.message, boot) for row in kept]
    ordered = {boot: sorted(rows[boot], key=lambda row: row.time) for boot in rows if rows[boot]}
    out: list[LogEntry] = []
    for boot, entries in ordered.items():
        if len(ordered) > 1:
            out.append(_boundary(boot, entries[0].time, boot == here, patches[boot]))
        out += entries
    return tuple(out), tuple(notes)


def _drifts(
    records: Sequence[journal.Record], boot: str, said: Sequence[klog.Record], epoch: float
) -> list[tuple[int, float]]:
    """By how much the kernel's clock was off in each action that heard it, and its first message's number."""
    numbers, found = [row.number for row in said], []
    begins = {row.id: row.time for row in records if row.boot == boot and row.event == "begin"}
    for row in records:
        if row.boot != boot or row.event != "end" or row.id not in begins:
            continue
        match row.detail.get("heard"):
            case [int(first), int(last)]:
                mine = said[bisect_left(numbers, first) : bisect_right(numbers, last)]
            case _:
                continue
        if mine:
            at, until = (epoch + one.message.seconds for one in (mine[0], mine[-1]))
            drift = klog.drift(at, until, begins[row.id] + _WITHIN, row.time - _WITHIN)
            found.append((mine[0].number, drift))
    return sorted(found)


def _drift(drifts: Sequence[tuple[int, float]], number: int) -> float:
    """That of the last action before a message, or of the first one after it; 0 when nothing tells."""
    at = bisect_right(drifts, number, key=lambda row: row[0])
    return drifts[max(at - 1, 0)][1] if drifts else 0.0


def about(rows: Sequence[LogEntry], name: str) -> tuple[LogEntry, ...]:
    """What concerns one patch: its actions, lines that name it, and what the kernel said during its actions.

    The kernel often does not name the patch when it says why it refuses it.
    """
    word = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")
    under_way: set[str] = set()
    found = []
    for row in rows:
        record = row.record or {}
        event, number = record.get("event"), str(record.get("id", ""))
        if event == "boot":
            under_way.clear()
        elif row.source == "kmend" and record.get("patch") == name:
            if event == "end":
                under_way.discard(number)
            else:
                under_way.add(number)
            found.append(row)
            continue
        if (row.source == "kernel" and under_way) or word.search(row.text):
            found.append(row)
    return tuple(found)


def _kernel_entry(time: float, message: KernelMessage, boot: str) -> LogEntry:
    return LogEntry(time, "kernel", message.text, message, record={"boot": boot})


def _boundary(boot: str, time: float, here: bool, patches: Iterable[str]) -> LogEntry:
    """The line before those of a boot; it names the patches, so that who asks for one of them sees it too."""
    names = ", ".join(filter(None, patches))
    text = f"---- {'this boot' if here else 'boot'} {boot}" + (f": {names}" if names else "") + " ----"
    return LogEntry(time, "kmend", text, record={"event": "boot", "boot": boot})


def _journal_entry(row: journal.Record) -> LogEntry:
    result = f" [{row.result}]" if row.result else ""
    by = f", by {row.user}" if row.event == "begin" or row.result == "refused" else ""
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
