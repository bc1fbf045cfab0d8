"""Which patches are installed: put modules into the store of their kernel, take them out.

    install    file -> checks -> store (one commit)             nothing happens to the running kernel
    uninstall  store (one commit)                               what is loaded stays loaded

Joins the store (:mod:`kmend.runtime.persistence`) with what is known of modules (:mod:`kmend.candidate`).
What a boot does with the store is in :mod:`kmend.boot`, what both share in :mod:`kmend.storing`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kmend import candidate
from kmend.boot import Boot, left_off
from kmend.candidate import Candidate
from kmend.core.config import Config
from kmend.core.errors import KmendError, Refusal, UsageError
from kmend.core.live import ActionReport, KernelState, Result, Step
from kmend.core.progress import Progress
from kmend.core.run import run
from kmend.runtime import journal, persistence
from kmend.runtime.kernel_state import read_kernel
from kmend.runtime.patches import read_patches
from kmend.runtime.persistence import ALL, Installed, Store
from kmend.runtime.place import Place, is_folder
from kmend.storing import Command, require_root, result_of

#: The unit that loads at boot; the Debian package brings it.
UNIT = "kmend-load.service"
#: Where systemd looks for units (systemd.unit(5)), as far as packages and administrators put them there.
UNIT_FOLDERS = tuple(Path(name) for name in ("/etc/systemd/system", "/usr/lib/systemd/system"))


@dataclass(frozen=True, slots=True)
class _Change:
    """What an install adds to one store."""

    store: Store
    candidates: tuple[Candidate, ...]

    def step(self, row: Candidate) -> str:
        """What becomes of what was there."""
        former = self.store.named(row.module.name)
        if former is None:
            return "new in the store"
        if former.sha256 == row.module.sha256:
            return "it was installed already"
        return f"takes the place of another {former.name} ({former.sha256[:12]}…)"

    def words(self, row: Candidate) -> str:
        """For the journal."""
        return f"for {self.store.release}, {self.step(row)}"


class Installer:
    """The stores of one machine. ``boot`` is what loads from them; ``unit_folders`` is for tests."""

    def __init__(
        self,
        config: Config,
        progress: Progress,
        *,
        place: Place | None = None,
        boot: Boot | None = None,
        unit_folders: Sequence[Path] = UNIT_FOLDERS,
    ) -> None:
        self.config, self.progress, self.unit_folders = config, progress, tuple(unit_folders)
        self.place = place or Place()
        self.boot = boot or Boot(config, progress, place=self.place)

    def stores(self) -> tuple[Store, ...]:
        """Everything that is installed.

        Raises:
            Failed, Refused: a store cannot be read.
        """
        found = persistence.releases(self.config.state)
        stores = (persistence.read(self.config.state, release) for release in found)
        return tuple(store for store in stores if store.patches)

    def _command(self, verb: str, kernel: KernelState) -> Command:
        return Command(self.config.state, self.place, kernel.boot_id, verb)

    # -- install -------------------------------------------------------------------------------------

    def install(self, paths: Sequence[str]) -> tuple[ActionReport, ...]:
        """Put modules into the stores of the releases that they were built for.

        All of them, or none; but when a release's index cannot be written after another's has been, what is
        in that other store stays, and the reports say which is which.

        Raises:
            Unable: not root (rule ``not-root``).
            UsageError, Failed: a file cannot be read or is no livepatch module; a store cannot be written.
            Refused: another kmend acts; a store is damaged or not safe.
        """
        require_root("install")
        kernel = read_kernel(self.place)
        command = self._command("install", kernel)
        command.close_killed()
        candidates = []
        for path in paths:
            self.progress.step(f"checking {path}")
            candidates.append(candidate.look(self.config, self.place, path, kernel))
        _distinct(candidates)
        if any(row.refusals for row in candidates):
            found = tuple(_not_installed(row, candidates) for row in candidates)
            for one in found:
                command.refused(one.patch, one.why, one.refused)
            return found
        with command.acting([row.module.name for row in candidates]) as begun:
            releases = dict.fromkeys(row.module.release for row in candidates)
            stores = [persistence.read(self.config.state, persistence.release_of(row)) for row in releases]
            for store in stores:
                persistence.require_safe(store)  # as the boot will
            unit = self._enable_unit()
            changes = [
                _Change(store, tuple(row for row in candidates if row.module.release == store.release))
                for store in stores
            ]
            actions = {
                row.path: begun.begin(row.module.name, change.words(row), release=change.store.release)
                for change in changes
                for row in change.candidates
            }
            reports: list[ActionReport] = []
            for change, new in zip(changes, _put(changes, command.by.login or command.by.user), strict=True):
                try:
                    persistence.commit(new)
                except KmendError as error:
                    if not reports:
                        raise  # no index has been replaced
                    for row in change.candidates:
                        report = _unwritten(row, error)
                        actions[row.path].end(
                            report.result.value, report.why, **journal.reasons(report.refused)
                        )
                        reports.append(report)
                    continue
                warnings = [*unit, *self._left_off(new, kernel)]
                for row in change.candidates:
                    actions[row.path].end("done", change.words(row))
                    reports.append(_installed(row, new, change.step(row), warnings, kernel))
        return tuple(reports)

    def _enable_unit(self) -> list[Refusal]:
        """Have systemd start the unit at boot. Comes first: without patches the unit does nothing."""
        if not any((folder / UNIT).exists() for folder in self.unit_folders):
            return [
                Refusal(
                    "no-boot-unit",
                    "nothing on this machine loads the patches at boot",
                    f"the unit {UNIT} is not installed; kmend's Debian package brings it",
                    "install the package (make deb), or run `kmend load --all --boot` from your boot scripts "
                    "and `kmend healthy` some minutes later",
                )
            ]
        why = "there is no systemctl"
        if shutil.which("systemctl"):
            done = run(["systemctl", "enable", UNIT], check=False, timeout=60)
            if done.status == 0:
                return []
            why = done.errors.strip() or f"systemctl ended with status {done.status}"
        return [
            Refusal(
                "unit-not-enabled",
                f"{UNIT} could not be enabled: the patches will not be loaded at boot",
                why,
                f"systemctl enable {UNIT}",
            )
        ]

    def _left_off(self, store: Store, kernel: KernelState) -> list[Refusal]:
        """Why the next boot would not load them all the same. Of another release only that one knows."""
        found = self.boot.look() if store.release == kernel.release else None
        if found is None:
            return []
        rows = left_off(found)
        forgetful = persistence.forgetful(self.place, store.folder)
        return rows if forgetful is None else [*rows, forgetful]

    # -- uninstall -----------------------------------------------------------------------------------

    def chosen(self, names: Sequence[str], release: str | None = None) -> list[str]:
        """The patches that :meth:`uninstall` would take out. Nothing is changed.

        Raises:
            Unable: not root (rule ``not-root``).
            UsageError: one is not installed (rule ``not-installed``). Failed, Refused: the store is damaged.
        """
        require_root("uninstall")
        kernel = read_kernel(self.place)
        command = self._command("uninstall", kernel)
        command.close_killed()
        with command.told(names or [ALL]):
            store = persistence.read(self.config.state, persistence.release_of(release or kernel.release))
            return _chosen(store, names, _taken_out(store, command))

    def uninstall(self, names: Sequence[str], release: str | None = None) -> tuple[ActionReport, ...]:
        """Take patches out of a release's store (no names: all of them). What is loaded stays loaded.

        A name that an uninstall had taken out when it was killed or interrupted is no error: the same command
        again says that it is done.

        Raises:
            Unable: not root (rule ``not-root``).
            UsageError: one is not installed (rule ``not-installed``); then none is taken out.
            Failed: the store cannot be written. Refused: another kmend acts; the store is damaged.
        """
        require_root("uninstall")
        kernel = read_kernel(self.place)
        chosen = persistence.release_of(release or kernel.release)
        command = self._command("uninstall", kernel)
        with command.acting(names or [ALL]) as begun:
            store = persistence.read(self.config.state, chosen)
            gone = _chosen(store, names, _taken_out(store, command))
            for name in gone:
                begun.begin(name, f"for {chosen}", release=chosen, names=gone)
            if gone or is_folder(store.folder):
                # also for what is out of the index: the killed run may not have synced it, nor swept
                persistence.drop(store, gone)
            begun.end("done", f"for {chosen}")
        here = {row.name for row in read_patches(self.place)} if chosen == kernel.release else set()
        return tuple(
            ActionReport(
                "uninstall",
                name,
                Result.DONE,
                f"{name} is not loaded any more when {chosen} boots"
                + ("" if store.named(name) else ": what was interrupted had taken it out"),
                next_step=f"it is still loaded; kmend unload {name} takes it back" if name in here else "",
            )
            for name in gone
        )

    def kept(self, names: Sequence[str], failed: ActionReport) -> tuple[ActionReport, ...]:
        """The reports of an uninstall that is not begun, because a patch could not be taken back before."""
        command = self._command("uninstall", read_kernel(self.place))
        reports = []
        for name in names:
            why = f"{name} stays installed, as {failed.patch} could not be taken back"
            command.refused(name, why, failed.refused)
            reports.append(
                ActionReport(
                    "uninstall",
                    name,
                    Result.REFUSED,
                    why,
                    f"the same command again; or kmend uninstall {name}, which leaves the kernel as it is",
                )
            )
        return tuple(reports)


def _chosen(store: Store, names: Sequence[str], taken_out: Sequence[str]) -> list[str]:
    """What is to be taken out; ``taken_out`` has what a killed run took out of the store before."""
    gone = list(dict.fromkeys(names)) or [*(row.name for row in store.patches), *taken_out]
    unknown = [name for name in gone if store.named(name) is None and name not in taken_out]
    if unknown:
        there = ", ".join(row.name for row in store.patches) or "none at all"
        raise UsageError(
            f"{unknown[0]} is not installed for {store.release}",
            why=f"installed for it: {there}",
            next_step="kmend install --list",
            rule="not-installed",
        )
    return gone


def _taken_out(store: Store, command: Command) -> list[str]:
    """What an uninstall had taken out of the store when it was killed or interrupted, and nobody has put
    back since. Also what it had written the end of: of several names, the next one's may lack."""
    try:
        records = command.book.records()
    except KmendError:
        return []
    found = journal.resumable_in_store(records, command.book.boot, store.release)
    lists = [row.detail.get("names") for row in found if row.verb == "uninstall"]
    names = [str(name) for row in lists if isinstance(row, list) for name in row]
    return [name for name in dict.fromkeys(names) if store.named(name) is None]


def _distinct(candidates: Sequence[Candidate]) -> None:
    """Refuse two files for one place in a store.

    Raises:
        UsageError: rule ``same-name``.
    """
    seen: dict[tuple[str, str], str] = {}
    for row in candidates:
        key = (row.module.release, row.module.name)
        if key in seen:
            raise UsageError(
                f"{seen[key]} and {row.path} are both {row.module.name} for {row.module.release}",
                why="the kernel loads one module of a name",
                next_step="install one of them, or build one with another name (-n)",
                rule="same-name",
            )
        seen[key] = row.path


def _put(changes: Sequence[_Change], user: str) -> list[Store]:
    """Write the files of all stores, before the first index: a disk that gets full then has changed none.

    Raises:
        Failed, Refused: as :func:`persistence.put`; no file stays.
    """
    new: list[Store] = []
    try:
        for change in changes:
            rows = [(_row(row, user), row.data, row.report) for row in change.candidates]
            new.append(persistence.put(change.store, rows))
    except KmendError:
        for change in changes[: len(new)]:
            persistence.sweep(change.store)
        raise
    return new


def _row(candidate: Candidate, user: str) -> Installed:
    module = candidate.module
    stem = f"{module.name}.{module.sha256[:16]}"
    return Installed(
        name=module.name,
        file=f"{stem}.ko",
        sha256=module.sha256,
        report=f"{stem}.json" if candidate.report else "",
        build_id=module.build_id,
        replace=module.replace,
        time=round(time.time(), 3),
        user=user,
    )


# -- words -------------------------------------------------------------------------------------------


def _installed(
    row: Candidate, store: Store, step: str, warnings: Sequence[Refusal], kernel: KernelState
) -> ActionReport:
    name, place = row.module.name, store.patches
    steps = [step]
    over = [one.name for one in place if one not in store.wanted]
    if name in over:
        steps.append(f"{store.wanted[0].name} is cumulative and comes later: this one is not loaded")
    elif row.module.replace and over:
        steps.append(f"it is cumulative: not loaded any more: {', '.join(over)}")
    running = store.release == kernel.release
    return ActionReport(
        "install",
        name,
        Result.DONE,
        f"{name} is installed for {store.release}, number {[one.name for one in place].index(name) + 1} "
        f"of {len(place)}",
        next_step="it is loaded at the next boot; `kmend load --all` loads it now" if running else "",
        checks=row.checks,
        steps=tuple(Step(0.0, text) for text in steps),
        warnings=(*row.warnings, *warnings),
    )


def _not_installed(row: Candidate, all_rows: Sequence[Candidate]) -> ActionReport:
    others = [one.module.name for one in all_rows if one.refusals and one is not row]
    why = f"{row.module.name} was not installed" + (
        "" if row.refusals else f", because {', '.join(others)} was refused"
    )
    return ActionReport(
        "install", row.module.name, Result.REFUSED, why, checks=row.checks, refused=row.refusals
    )


def _unwritten(row: Candidate, error: KmendError) -> ActionReport:
    return ActionReport(
        "install",
        row.module.name,
        result_of(error),
        f"{row.module.name} was not installed for {row.module.release}",
        checks=row.checks,
        refused=error.reasons,
    )
