"""Persistence: put modules into the store of their kernel, take them out, load what is installed at boot.

    install    file -> checks -> store (one commit)             nothing happens to the running kernel
    load --all store -> switches -> guard -> mark -> each patch as `kmend load` does it
    healthy    the mark is taken away: the next boot loads again

Joins the store (:mod:`kmend.runtime.persistence`) with what is known of modules and with the manager.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kmend.action import Following
from kmend.core.config import Config
from kmend.core.errors import Failed, KmendError, Refusal, Refused, Unable, UsageError
from kmend.core.live import ActionReport, Check, KernelState, Phase, Result, Step
from kmend.core.progress import Progress
from kmend.core.run import run
from kmend.examine import read_module_file
from kmend.manager import Manager
from kmend.runtime import act, journal, persistence, preflight
from kmend.runtime.journal import Action, Journal
from kmend.runtime.kernel_state import read_kernel
from kmend.runtime.observe import observe
from kmend.runtime.patches import read_module, read_patches
from kmend.runtime.persistence import ALL, OFF_FILE, Guard, Installed, Persistence, Store
from kmend.runtime.place import Place, is_folder
from kmend.runtime.preflight import ModuleFile

if TYPE_CHECKING:
    from kmend.module.layout import Layout
    from kmend.view import TargetView

#: The unit that loads at boot; the Debian package brings it.
UNIT = "kmend-load.service"
#: Where systemd looks for units (systemd.unit(5)), as far as packages and administrators put them there.
UNIT_FOLDERS = tuple(Path(name) for name in ("/etc/systemd/system", "/usr/lib/systemd/system"))
#: Checks of `kmend load` that hold for every boot; the others are about this very moment.
LASTING = ("release", "build id", "signature", "functions")
#: Where the modules of installed kernels lie.
KERNELS = Path("/lib/modules")
#: Seconds for which `kmend healthy` waits for another kmend's end: its timer comes once in a boot, and what
#: it does not do then trips the guard at the next one.
HEALTHY_LIMIT = 600.0


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A module that may be installed: its file's contents, what they say, the report beside it."""

    path: str
    data: bytes
    module: ModuleFile
    report: bytes
    checks: tuple[Check, ...]
    warnings: tuple[Refusal, ...]

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        return tuple(row.refusal for row in self.checks if row.refusal is not None)


@dataclass(frozen=True, slots=True)
class _Here:
    """A patch of the installed names that the kernel has; ``sha256`` is '' when kmend did not load it."""

    sha256: str
    replace: bool
    settled: bool


@dataclass(frozen=True, slots=True)
class _Acting:
    """One command at work, with the lock held. Each of its actions is in the journal before it is done."""

    book: Journal
    verb: str
    by: journal.Who
    actions: list[Action] = field(default_factory=list)

    def begin(self, name: str, text: str, **detail: object) -> Action:
        """Write down what is about to be done about one patch."""
        self.actions.append(self.book.begin(self.verb, name, self.by, text, detail))
        return self.actions[-1]

    def end(self, result: str, text: str, **detail: object) -> None:
        """All that has no end yet is over."""
        for action in self.actions:
            action.end(result, text, **detail)

    def broken(self, error: BaseException, names: Sequence[str]) -> None:
        """An error ends it: write down how, where nothing is begun yet for each of ``names``."""
        match error:
            case KmendError() if self.actions:
                self.end(_result(error).value, error.what, **journal.reasons(error.reasons))
            case KmendError():
                for name in names:
                    self.book.refused(self.verb, name, self.by, error.what, error.reasons)
            case _:
                why = f"stopped by {type(error).__name__}; the same command goes on with it"
                self.end(journal.INTERRUPTED, why)


class Installer:
    """Persistence on one machine. ``manager`` loads; ``off_file`` and ``unit_folders`` are for tests."""

    def __init__(
        self,
        config: Config,
        progress: Progress,
        *,
        place: Place | None = None,
        manager: Manager | None = None,
        off_file: Path = OFF_FILE,
        unit_folders: Sequence[Path] = UNIT_FOLDERS,
    ) -> None:
        self.config, self.progress = config, progress
        self.place = place or Place()
        self.manager = manager or Manager(config, progress, place=self.place)
        self.off_file, self.unit_folders = off_file, tuple(unit_folders)

    # -- what there is -------------------------------------------------------------------------------

    def look(self, release: str | None = None) -> Persistence | None:
        """How loading at boot stands for a release (default: the running one)."""
        kernel = read_kernel(self.place)
        return persistence.look(
            self.place,
            self.config.state,
            release or kernel.release,
            kernel.boot_id,
            off_file=self.off_file,
        )

    def stores(self) -> tuple[Store, ...]:
        """Everything that is installed.

        Raises:
            Failed, Refused: a store cannot be read.
        """
        found = persistence.releases(self.config.state)
        stores = (persistence.read(self.config.state, release) for release in found)
        return tuple(store for store in stores if store.patches)

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
        self._close_killed("install", kernel)
        candidates = [self._candidate(path, kernel) for path in paths]
        _distinct(candidates)
        if any(row.refusals for row in candidates):
            found = tuple(_not_installed(row, candidates) for row in candidates)
            for one in found:
                self._refused("install", one.patch, kernel, one.why, one.refused)
            return found
        by = self._who()
        with self._acting("install", [row.module.name for row in candidates], kernel) as acting:
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
                row.path: acting.begin(row.module.name, change.words(row), release=change.store.release)
                for change in changes
                for row in change.candidates
            }
            reports: list[ActionReport] = []
            for change, new in zip(changes, _put(changes, by.login or by.user), strict=True):
                try:
                    persistence.commit(new)
                except KmendError as error:
                    if not reports:
                        raise  # no index has been replaced
                    for row in change.candidates:
                        reports.append(_unwritten(row, error))
                        result, why = reports[-1].result.value, reports[-1].why
                        actions[row.path].end(result, why, **journal.reasons(error.reasons))
                    continue
                warnings = [*unit, *self._guard_warnings(new, kernel)]
                for row in change.candidates:
                    actions[row.path].end("done", change.words(row))
                    reports.append(_installed(row, new, change.step(row), warnings, kernel))
        return tuple(reports)

    def _candidate(self, path: str, kernel: KernelState) -> _Candidate:
        """Read a file and hold it against every check that there is for its kernel.

        Raises:
            UsageError, Failed: it cannot be read, is no livepatch module, or was built for no release.
        """
        self.progress.step(f"checking {path}")
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise Failed(
                f"{path} cannot be read",
                why=error.strerror or str(error),
                next_step="name a livepatch module (.ko)",
                rule="unreadable",
            ) from error
        from kmend.kernel.prepared import open_target
        from kmend.view import TargetView

        view: TargetView | None = None
        problem = ""
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
        build_id = kernel.build_id if running else plain.build_id
        try:
            target = open_target(self.config, release)
            if not build_id or target.build_id == build_id:
                view = TargetView(self.config, target)
            else:
                problem = f"the target {release} in the cache is another build than the module's kernel"
        except KmendError as error:
            problem = error.what
        layout = view.layout if view is not None else self._own_layout() if running else None
        module = plain if layout is None else read_module_file(data, path, layout)
        checks: list[Check] = []
        warnings: list[Refusal] = []
        if running:
            checks += self._lasting(module)
        elif not (KERNELS / release).is_dir():
            warnings.append(
                Refusal(
                    "kernel-absent",
                    f"{release} is not installed on this machine",
                    f"there is no {KERNELS / release}; {kernel.release} is running",
                    "nothing, if that kernel is still to come; the patch waits for it",
                )
            )
        if view is None:
            checks.append(Check("rules of kmend check", None, problem))
        else:
            checked = view.check(data, path)
            rows = [Check("rules of kmend check", False, row.what, row) for row in checked.refusals]
            number = sum(checked.checked.values())
            text = f"{number} things looked at, no objection"
            checks += rows or [Check("rules of kmend check", True, text)]
        return _Candidate(
            path, data, module, _report_beside(path, module.sha256), tuple(checks), tuple(warnings)
        )

    def _lasting(self, module: ModuleFile) -> list[Check]:
        """The checks of a load that hold for every boot. Without ``/sys``, as in a chroot, what the kernel
        has and allows cannot be looked at; the boot will.

        Raises:
            Unable: (rule ``no-livepatch``) ``/sys`` is there, and the kernel has no livepatch support.
        """
        try:
            seen = observe(self.place, self.config.state)
        except Unable as error:
            if error.rule != "no-livepatch" or is_folder(self.place.sys / "kernel"):
                raise
            return [Check(name, None, error.why) for name in LASTING]
        return [row for row in preflight.look(self.place, module, seen) if row.name in LASTING]

    def _own_layout(self) -> Layout | None:
        """How the running kernel lays its livepatch structures out, by its own BTF."""
        from kmend import running

        try:
            return running.layout(self.place)
        except KmendError:
            return None

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

    def _guard_warnings(self, store: Store, kernel: KernelState) -> list[Refusal]:
        found = self.look(store.release)
        if found is None or kernel.release != store.release:
            return []
        rows = []
        if found.guard is Guard.TRIPPED:
            rows.append(_tripped(found))
        if found.off:
            rows.append(_off(found.off))
        return rows

    # -- uninstall -----------------------------------------------------------------------------------

    def chosen(self, names: Sequence[str], release: str | None = None) -> list[str]:
        """The patches that :meth:`uninstall` would take out. Nothing is changed.

        Raises:
            Unable: not root (rule ``not-root``).
            UsageError: one is not installed (rule ``not-installed``). Failed, Refused: the store is damaged.
        """
        require_root("uninstall")
        kernel = read_kernel(self.place)
        self._close_killed("uninstall", kernel)
        with self._told("uninstall", names or [ALL], kernel):
            store = persistence.read(self.config.state, persistence.release_of(release or kernel.release))
            return _chosen(store, names, self._taken_out(store, kernel))

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
        with self._acting("uninstall", names or [ALL], kernel) as acting:
            store = persistence.read(self.config.state, chosen)
            gone = _chosen(store, names, self._taken_out(store, kernel))
            for name in gone:
                acting.begin(name, f"for {chosen}", release=chosen, names=gone)
            if gone or is_folder(store.folder):
                # also for what is out of the index: the killed run may not have synced it, nor swept
                persistence.drop(store, gone)
            acting.end("done", f"for {chosen}")
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
        kernel = read_kernel(self.place)
        reports = []
        for name in names:
            why = f"{name} stays installed, as {failed.patch} could not be taken back"
            self._refused("uninstall", name, kernel, why, failed.refused)
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

    def _taken_out(self, store: Store, kernel: KernelState) -> list[str]:
        """What an uninstall had taken out of the store when it was killed or interrupted, and nobody has put
        back since. Also what it had written the end of: of several names, the next one's may lack."""
        try:
            records = Journal(self.config.state, kernel.boot_id).records()
        except KmendError:
            return []
        found = journal.resumable_in_store(records, kernel.boot_id, store.release)
        lists = [row.detail.get("names") for row in found if row.verb == "uninstall"]
        names = [str(name) for row in lists if isinstance(row, list) for name in row]
        return [name for name in dict.fromkeys(names) if store.named(name) is None]

    # -- boot ----------------------------------------------------------------------------------------

    def load_all(
        self, following: Following, *, boot: bool = False, retry: bool = False
    ) -> tuple[ActionReport, ...]:
        """Load everything that is installed for the running release, up to the first that does not succeed.

        ``boot``: this is what the machine does by itself when it starts, so a mark is made before and stays
        until the boot is known to be healthy. ``retry``: also if a former boot never got healthy.

        Raises:
            Refused: loading is switched off (``switched-off``), a former boot never got healthy
                (``crash-guard``), the store is damaged or not safe. Unable: not root.
            Failed: the mark cannot be written: then nothing is loaded.
        """
        act.require_power(self.place, "load")
        kernel = read_kernel(self.place)
        found = self.look()
        if found is None or (found.trouble is None and not found.store.patches):
            return ()
        with self._told("load", [ALL], kernel):
            self._require_allowed(found, kernel, retry=retry)
        here = self._here(kernel)
        rows = found.store.wanted
        passed = [row for row in found.store.patches if row not in rows]
        reports = [_superseded(row, rows[0].name) for row in passed]
        # a cumulative patch of which the index does not know that it is one
        replacing = [at for at, row in enumerate(rows) if _is_here(row, here) and here[row.name].replace]
        over = max(replacing, default=0)
        reports += [_superseded(row, rows[over].name) for row in rows[:over]]
        rows = rows[over:]
        missing = [row for row in rows if not (_is_here(row, here) and here[row.name].settled)]
        if boot and missing and found.guard is Guard.CLEAR:
            with self._told("load", [ALL], kernel), journal.acting(self.place, "load --all"):
                persistence.arm(found.store, kernel.boot_id, kernel.taint or 0)
        done = 0
        for at, row in enumerate(rows):
            later = next((one for one in rows[at + 1 :] if _is_here(one, here)), None)
            if row not in missing:
                reports.append(ActionReport("load", row.name, Result.DONE, f"{row.name} is in force already"))
            elif later is not None and not _is_here(row, here):
                reports.append(_out_of_order(row, later))
                self._refused("load", row.name, kernel, reports[-1].why, reports[-1].refused)
            else:
                reports.append(self._load(found.store, row, following, kernel))
            done += 1
            begun = reports[-1].result is Result.PENDING and not following.wait
            if reports[-1].result is not Result.DONE and not begun:
                break
        else:
            self._all_loaded(found, kernel)
        left = rows[done:]
        if left:
            why = f"was not loaded, as it comes after {rows[done - 1].name}"
            for row in left:
                if not _is_here(row, here):
                    self._refused("load", row.name, kernel, f"{row.name} {why}")
            names = ", ".join(row.name for row in left)
            reports[-1] = replace(
                reports[-1],
                next_step=(reports[-1].next_step + "; " if reports[-1].next_step else "")
                + f"not loaded because they come after it: {names}",
            )
        return tuple(reports)

    def _all_loaded(self, found: Persistence, kernel: KernelState) -> None:
        """Take the mark of a former boot away. Only now: loading itself may be what ended that boot."""
        if found.guard is not Guard.TRIPPED:
            self._close_killed("load --all", kernel)
            return
        self._wait()
        with self._acting("load", [ALL], kernel, HEALTHY_LIMIT) as acting:
            text = "loaded again after a boot that never got healthy"
            acting.begin(ALL, text)
            persistence.disarm(self.config.state, found.release)
            acting.end("done", text)

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

    def _load(self, store: Store, row: Installed, following: Following, kernel: KernelState) -> ActionReport:
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
            self._refused("load", row.name, kernel, error.what, error.reasons)
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

    def healthy(self) -> ActionReport:
        """This boot is well: the next one may load again. Waits for a kmend that acts just now.

        Raises:
            Unable: not root (rule ``not-root``). Failed: the mark cannot be removed.
            Refused: the store is damaged; another kmend acts for longer than :data:`HEALTHY_LIMIT`.
        """
        require_root("healthy")
        kernel = read_kernel(self.place)
        self._close_killed("healthy", kernel)
        with self._told("healthy", [ALL], kernel):
            if self._mark() is None:
                return _no_mark()
        self._wait()
        with self._acting("healthy", [ALL], kernel, HEALTHY_LIMIT) as acting:
            return self._healthy(acting)

    def _mark(self) -> Persistence | None:
        """How loading at boot stands, if a boot has left its mark.

        Raises:
            Refused: the store is damaged.
        """
        found = self.look()
        if found is not None and found.trouble is not None:
            raise Refused([found.trouble])
        return found if found is not None and found.attempt is not None else None

    def _healthy(self, acting: _Acting) -> ActionReport:
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
                self._refused("healthy", name, kernel, refusal.what, (refusal,))
            return ActionReport("healthy", "", Result.REFUSED, refusal.what, refused=(refusal,))
        minutes = max(0.0, time.time() - found.attempt.time) / 60
        text = f"this boot is healthy, {minutes:.0f} minutes after its patches were loaded"
        for name in found.attempt.patches:
            acting.begin(name, f"for {found.release}", release=found.release)
        persistence.disarm(self.config.state, found.release)
        acting.end("done", text)
        return ActionReport("healthy", "", Result.DONE, text)

    # -- the journal ---------------------------------------------------------------------------------

    def _who(self) -> journal.Who:
        return journal.who(self.place, " ".join(sys.argv[:8]))

    @contextmanager
    def _acting(
        self, verb: str, names: Sequence[str], kernel: KernelState, limit: float = journal.LOCK_LIMIT
    ) -> Iterator[_Acting]:
        """Hold the lock, after ``limit`` seconds of waiting at most; what killed runs left open is closed.
        An error inside ends what is begun, or is written down for each of ``names``; with the lock held, or
        the next one would take what is begun for killed.
        """
        book = Journal(self.config.state, kernel.boot_id)
        with ExitStack() as held:
            with self._told(verb, names, kernel):
                held.enter_context(journal.acting(self.place, verb, limit))
            journal.close_killed(book, self.place, verb)
            acting = _Acting(book, verb, self._who())
            try:
                yield acting
            except BaseException as error:
                acting.broken(error, names)
                raise

    def _wait(self) -> None:
        """Say so when another kmend has to be waited for."""
        if not journal.is_free(self.place):
            self.progress.step("waiting for the kmend that acts on this kernel now")

    def _close_killed(self, verb: str, kernel: KernelState) -> None:
        """Write down the end of what killed runs began, also where this command has nothing to do or is
        refused. Where another kmend acts it has done so itself, and what is open is its own.
        """
        book = Journal(self.config.state, kernel.boot_id)
        with suppress(KmendError):
            if journal.unfinished(book.records(), book.boot) and journal.is_free(self.place):
                with journal.acting(self.place, verb):
                    journal.close_killed(book, self.place, verb)

    def _refused(
        self, verb: str, name: str, kernel: KernelState, text: str, refusals: Sequence[Refusal] = ()
    ) -> None:
        """A line in the journal about what was not even begun."""
        Journal(self.config.state, kernel.boot_id).refused(verb, name, self._who(), text, refusals)

    @contextmanager
    def _told(self, verb: str, names: Sequence[str], kernel: KernelState) -> Iterator[None]:
        """Write down what is refused inside."""
        try:
            yield
        except KmendError as error:
            for name in names:
                self._refused(verb, name, kernel, error.what, error.reasons)
            raise


# -- words -------------------------------------------------------------------------------------------


def require_root(verb: str) -> None:
    """Refuse at once what would fail half way. Being root is enough: no capability for loading is needed.

    Raises:
        Unable: rule ``not-root``.
    """
    if os.geteuid() != 0:
        raise Unable(
            f"kmend {verb} needs root",
            why="what is loaded at boot is root's to decide",
            next_step=f"sudo kmend {verb} …",
            rule="not-root",
        )


def _no_mark() -> ActionReport:
    return ActionReport("healthy", "", Result.DONE, "no patch waits for this boot to be healthy")


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


def _is_here(row: Installed, here: Mapping[str, _Here]) -> bool:
    """Whether the kernel has this very file. Of one that was loaded by hand nobody knows; the name tells."""
    return row.name in here and here[row.name].sha256 in ("", row.sha256)


def _report_beside(path: str, sha256: str) -> bytes:
    """The build report beside the module, if it is the report of this very file; else nothing."""
    try:
        data = Path(path).with_suffix(".json").read_bytes()
        return data if json.loads(data)["sha256"] == sha256 else b""
    except (OSError, ValueError, KeyError, TypeError):
        return b""


def _distinct(candidates: Sequence[_Candidate]) -> None:
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


@dataclass(frozen=True, slots=True)
class _Change:
    """What an install adds to one store."""

    store: Store
    candidates: tuple[_Candidate, ...]

    def step(self, row: _Candidate) -> str:
        """What becomes of what was there."""
        return _step(self.store, row)

    def words(self, row: _Candidate) -> str:
        """For the journal."""
        return f"for {self.store.release}, {self.step(row)}"


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


def _result(error: KmendError) -> Result:
    return Result.FAILED if isinstance(error, Failed) else Result.REFUSED


def _row(candidate: _Candidate, user: str) -> Installed:
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


def _step(store: Store, candidate: _Candidate) -> str:
    former = store.named(candidate.module.name)
    if former is None:
        return "new in the store"
    if former.sha256 == candidate.module.sha256:
        return "it was installed already"
    return f"takes the place of another {former.name} ({former.sha256[:12]}…)"


def _installed(
    row: _Candidate, store: Store, step: str, warnings: Sequence[Refusal], kernel: KernelState
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


def _not_installed(row: _Candidate, all_rows: Sequence[_Candidate]) -> ActionReport:
    others = [one.module.name for one in all_rows if one.refusals and one is not row]
    why = f"{row.module.name} was not installed" + (
        "" if row.refusals else f", because {', '.join(others)} was refused"
    )
    return ActionReport(
        "install", row.module.name, Result.REFUSED, why, checks=row.checks, refused=row.refusals
    )


def _unwritten(row: _Candidate, error: KmendError) -> ActionReport:
    return ActionReport(
        "install",
        row.module.name,
        _result(error),
        f"{row.module.name} was not installed for {row.module.release}",
        checks=row.checks,
        refused=error.reasons,
    )


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
