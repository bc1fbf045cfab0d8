"""What happens to the installed patches when the machine boots: they are loaded, and the guard watches.

    load --all store -> switches -> guard -> mark -> each patch as `kmend load` does it
    healthy    the mark is taken away: the next boot loads again

Joins the store and its guard (:mod:`kmend.runtime.persistence`) with the manager. What is in the store is the
matter of :mod:`kmend.installer`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from kmend.action import Following
from kmend.core.config import Config
from kmend.core.errors import KmendError, Refusal, Refused, Unable
from kmend.core.live import ActionReport, KernelState, Phase, Result
from kmend.core.progress import Progress
from kmend.core.run import run
from kmend.examine import read_module_file
from kmend.manager import Manager
from kmend.runtime import act, journal, persistence
from kmend.runtime.journal import Journal
from kmend.runtime.kernel_state import read_kernel
from kmend.runtime.patches import read_module, read_patches
from kmend.runtime.persistence import ALL, OFF_FILE, Guard, Installed, Persistence, Store
from kmend.runtime.place import Place
from kmend.storing import Begun, Command, require_root

#: Seconds for which `kmend healthy` waits for another kmend's end: its timer comes once in a boot, and what
#: it does not do then trips the guard at the next one.
HEALTHY_LIMIT = 600.0


@dataclass(frozen=True, slots=True)
class _Here:
    """A patch that the kernel has; ``sha256`` is '' when kmend did not load it."""

    sha256: str
    replace: bool
    settled: bool


class Boot:
    """Loading at boot on one machine. ``manager`` loads; ``off_file`` is for tests."""

    def __init__(
        self,
        config: Config,
        progress: Progress,
        *,
        place: Place | None = None,
        manager: Manager | None = None,
        off_file: Path = OFF_FILE,
    ) -> None:
        self.config, self.progress, self.off_file = config, progress, off_file
        self.place = place or Place()
        self.manager = manager or Manager(config, progress, place=self.place)

    def look(self) -> Persistence | None:
        """How loading at boot stands for the running release; None for one that no store can be for."""
        kernel = read_kernel(self.place)
        return persistence.look(
            self.place, self.config.state, kernel.release, kernel.boot_id, off_file=self.off_file
        )

    # -- load --all ----------------------------------------------------------------------------------

    def load_all(
        self, following: Following, *, boot: bool = False, retry: bool = False
    ) -> tuple[ActionReport, ...]:
        """Load everything that is installed for the running release, up to the first that does not succeed.

        ``boot``: this is what the machine does by itself when it starts, so a mark is made before and stays
        until the boot is known to be healthy. ``retry``: also if a former boot never got healthy.

        Raises:
            Refused: loading is switched off (``switched-off``), a former boot never got healthy
                (``crash-guard``), the store is damaged or not safe; at boot also when a mark would not
                outlive a crash (``forgetful-state``). Unable: not root.
            Failed: the mark cannot be written: then nothing is loaded.
        """
        act.require_power(self.place, "load")
        kernel = read_kernel(self.place)
        found = self.look()
        if found is None or (found.trouble is None and not found.store.patches):
            return ()
        command = Command(self.config.state, self.place, kernel.boot_id, "load", "load --all")
        with command.told([ALL]):
            self._require_allowed(found, kernel, retry=retry)
        here = _of_store(found.store, self._here(kernel))
        rows = found.store.wanted
        reports = [_superseded(row, rows[0].name) for row in found.store.patches if row not in rows]
        # a cumulative patch of which the index does not know that it is one
        replacing = [at for at, row in enumerate(rows) if row.name in here and here[row.name].replace]
        over = max(replacing, default=0)
        reports += [_superseded(row, rows[over].name) for row in rows[:over]]
        rows = rows[over:]
        missing = [row for row in rows if row.name not in here or not here[row.name].settled]
        if boot and missing and found.guard is Guard.CLEAR:
            with command.told([ALL]):
                if (forgetful := persistence.forgetful(self.place, found.store.folder)) is not None:
                    raise Refused([forgetful])
                with journal.acting(self.place, command.words):
                    persistence.arm(found.store, kernel.boot_id, kernel.taint or 0)
        for at, row in enumerate(rows):
            after = rows[at + 1 :]
            later = next((one for one in after if one.name in here), None)
            if row not in missing:
                report = ActionReport("load", row.name, Result.DONE, f"{row.name} is in force already")
            elif later is not None and row.name not in here:
                report = _out_of_order(row, later)
                command.refused(row.name, report.why, report.refused)
            else:
                report = self._load(found.store, row, following, command)
            if report.result is not Result.DONE:
                why = f"was not loaded, as it comes after {row.name}"
                for one in after:
                    if one.name not in here:
                        command.refused(one.name, f"{one.name} {why}")
                return (*reports, _ends_it(report, after))
            reports.append(report)
        self._all_loaded(found, command)
        return tuple(reports)

    def _require_allowed(self, found: Persistence, kernel: KernelState, *, retry: bool) -> None:
        if found.off:
            raise Refused([_off(found.off)])
        if found.trouble is not None:
            raise Refused([found.trouble])
        if found.guard is Guard.TRIPPED and not retry:
            raise Refused([_tripped(found, self._last_words(found))])
        persistence.require_safe(found.store)
        if not kernel.boot_id:
            raise Unable(
                "this boot cannot be told from others",
                why=f"{self.place.proc}/sys/kernel/random/boot_id cannot be read",
                next_step="mount /proc",
                rule="no-proc",
            )

    def _load(self, store: Store, row: Installed, following: Following, command: Command) -> ActionReport:
        try:
            data = persistence.contents(store, row)
            path = str(store.folder / row.file)
            wanted = [
                name
                for name in read_module_file(data, path, None).depends
                if read_module(self.place, name) is None
            ]
            if wanted:
                # early in boot nobody else has asked for them yet; what comes of it, the checks will see
                run(["modprobe", "-a", *wanted], check=False, timeout=60)
            return self.manager.load(path, following)
        except KmendError as error:
            command.refused(row.name, error.what, error.reasons)
            return ActionReport("load", row.name, Result.REFUSED, error.what, refused=error.reasons)

    def _here(self, kernel: KernelState) -> dict[str, _Here]:
        """The patches that the kernel has. One whose transition goes on, or whose load was killed,
        interrupted or not waited for, is not settled: loading it again brings it to its end."""
        try:
            records = Journal(self.config.state, kernel.boot_id).records()
        except KmendError:
            records = ()
        loads = journal.loads(records, kernel.boot_id)
        begun = {row.patch for row in journal.resumable(records, kernel.boot_id)}
        return {
            patch.name: _Here(
                sha256=str(loads[patch.name].detail.get("sha256", "")) if patch.name in loads else "",
                replace=patch.replace is True,
                settled=patch.phase is Phase.ENABLED and patch.name not in begun,
            )
            for patch in read_patches(self.place, journal.replacing(records, kernel.boot_id))
        }

    def _last_words(self, found: Persistence) -> str:
        """How far the boot came that never got healthy, as kmend's journal has it."""
        assert found.attempt is not None
        try:
            records = Journal(self.config.state, "").records()
        except KmendError:
            return ""
        mine = [row for row in records if row.boot == found.attempt.boot]
        dangling = journal.unfinished(mine, found.attempt.boot)
        if dangling:
            return f"its last known action, `kmend {dangling[-1].verb} {dangling[-1].patch}`, did not end"
        loaded = ("done", journal.PENDING)
        ended = [
            row.patch
            for row in mine
            if row.event == "end" and row.verb == "load" and row.result in loaded and row.patch != ALL
        ]
        return f"it had loaded {', '.join(ended)}" if ended else ""

    def _all_loaded(self, found: Persistence, command: Command) -> None:
        """Take the mark of a former boot away. Only now: loading itself may be what ended that boot."""
        if found.guard is not Guard.TRIPPED:
            command.close_killed()
            return
        with self._waiting(command) as begun:
            text = "loaded again after a boot that never got healthy"
            begun.begin(ALL, text)
            persistence.disarm(self.config.state, found.release)
            begun.end("done", text)

    def _waiting(self, command: Command) -> AbstractContextManager[Begun]:
        """Hold the lock for the sake of the mark; say so when another kmend has to be waited for."""
        if not journal.is_free(self.place):
            self.progress.step("waiting for the kmend that acts on this kernel now")
        return command.acting([ALL], HEALTHY_LIMIT)

    # -- healthy -------------------------------------------------------------------------------------

    def healthy(self) -> ActionReport:
        """This boot is well: the next one may load again. Waits for a kmend that acts just now.

        Raises:
            Unable: not root (rule ``not-root``). Failed: the mark cannot be removed.
            Refused: the store is damaged; another kmend acts for longer than :data:`HEALTHY_LIMIT`.
        """
        require_root("healthy")
        command = Command(self.config.state, self.place, read_kernel(self.place).boot_id, "healthy")
        command.close_killed()
        with command.told([ALL]):
            if self._mark() is None:
                return _no_mark()
        with self._waiting(command) as begun:
            return self._healthy(command, begun)

    def _mark(self) -> Persistence | None:
        """How loading at boot stands, if a boot has left its mark.

        Raises:
            Refused: the store is damaged.
        """
        found = self.look()
        if found is not None and found.trouble is not None:
            raise Refused([found.trouble])
        return found if found is not None and found.attempt is not None else None

    def _healthy(self, command: Command, begun: Begun) -> ActionReport:
        """As it is found with the lock held: much may have happened while it was waited for."""
        kernel, found = read_kernel(self.place), self._mark()
        if found is None or found.attempt is None:
            return _no_mark()
        if found.guard is Guard.TRIPPED:
            row = _tripped(found)
            return ActionReport(
                "healthy", "", Result.DONE, f"nothing changes: {row.what}", next_step=row.next_step
            )
        fatal = (kernel.taint or 0) & ~found.attempt.taint & persistence.DEADLY_TAINT
        if fatal:
            refusal = Refusal(
                "boot-unhealthy",
                "the kernel has oopsed or locked up since the patches were loaded at boot",
                "the next boot leaves them off unless somebody has looked at it",
                "look at `kmend log` and dmesg; then kmend uninstall, or after the next boot "
                "kmend load --all --retry",
            )
            for name in found.attempt.patches:
                command.refused(name, refusal.what, (refusal,))
            return ActionReport("healthy", "", Result.REFUSED, refusal.what, refused=(refusal,))
        minutes = max(0.0, time.time() - found.attempt.time) / 60
        text = f"this boot is healthy, {minutes:.0f} minutes after its patches were loaded"
        for name in found.attempt.patches:
            begun.begin(name, f"for {found.release}", release=found.release)
        persistence.disarm(self.config.state, found.release)
        begun.end("done", text)
        return ActionReport("healthy", "", Result.DONE, text)


def _of_store(store: Store, there: Mapping[str, _Here]) -> dict[str, _Here]:
    """Those of the store's patches that the kernel has as this very file. Of one that was loaded by hand
    nobody knows; the name tells."""
    return {
        row.name: there[row.name]
        for row in store.patches
        if row.name in there and there[row.name].sha256 in ("", row.sha256)
    }


# -- words -------------------------------------------------------------------------------------------


def _no_mark() -> ActionReport:
    return ActionReport("healthy", "", Result.DONE, "no patch waits for this boot to be healthy")


def _superseded(row: Installed, by: str) -> ActionReport:
    return ActionReport(
        "load",
        row.name,
        Result.DONE,
        f"{row.name} is not loaded: {by}, which comes later, is cumulative",
    )


def _out_of_order(row: Installed, later: Installed) -> ActionReport:
    refusal = Refusal(
        "out-of-order",
        f"{row.name} was not loaded: {later.name}, which comes after it, is loaded already",
        "the patch that is loaded last has the word: where both replace a function, the older code would win",
        f"kmend unload {later.name}, then kmend load --all; or kmend uninstall {row.name}",
    )
    return ActionReport("load", row.name, Result.REFUSED, refusal.what, refused=(refusal,))


def _ends_it(report: ActionReport, after: Sequence[Installed]) -> ActionReport:
    """The report of a patch that did not get into force, with those that are not loaded because of it."""
    if not after:
        return report
    names = f"not loaded because they come after it: {', '.join(row.name for row in after)}"
    return replace(report, next_step=f"{report.next_step}; {names}" if report.next_step else names)


def left_off(found: Persistence) -> list[Refusal]:
    """Why the next boot would not load what is installed, as things stand."""
    rows = [_tripped(found)] if found.guard is Guard.TRIPPED else []
    return [*rows, _off(found.off)] if found.off else rows


def _off(by: str) -> Refusal:
    return Refusal(
        "switched-off",
        "loading the installed patches is switched off",
        f"by {by}",
        f"rm {OFF_FILE}"
        if by.startswith("the file")
        else "boot without that, or load by name: kmend load FILE",
    )


def tripped_words(found: Persistence) -> str:
    """Why nothing is loaded when a former boot never got healthy."""
    attempt = found.attempt
    if attempt is None or not attempt.boot:
        mark = found.store.folder / persistence.ATTEMPT
        return f"{mark} is damaged, so the last boot is not known to be well"
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(attempt.time))
    return (
        f"the boot of {when} began to load {', '.join(attempt.patches)} and was never found to be "
        "healthy: it crashed, or ended too early"
    )


def _tripped(found: Persistence, words: str = "") -> Refusal:
    return Refusal(
        "crash-guard",
        f"the installed patches of {found.release} stay off",
        tripped_words(found) + (f"; {words}" if words else ""),
        "kmend uninstall what is to blame; then kmend load --all --retry",
    )
