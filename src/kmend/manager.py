"""Acting on the running kernel: load, take back, turn round, force; each to its end, or back.

    file -> checks -> lock, journal -> finit_module -> transition followed -> what is left behind removed

Joins the live machine (:mod:`kmend.runtime`) with what is known of a module's file (:mod:`kmend.examine`).
What all actions share is in :mod:`kmend.action`.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kmend.action import Actor, Following, Run
from kmend.core.errors import Refusal, Refused
from kmend.core.live import ActionReport, End, Followed, LivePatch, Phase, Result, tasks
from kmend.examine import Examiner, contents
from kmend.runtime import act, blockers, journal, refusals
from kmend.runtime.follow import Patience
from kmend.runtime.kernel_state import read_kernel
from kmend.runtime.observe import Seen
from kmend.runtime.patches import read_patch
from kmend.runtime.place import is_folder
from kmend.runtime.preflight import ModuleFile
from kmend.runtime.wake import interrupt

if TYPE_CHECKING:
    from kmend.module.describe import Description

#: After `force` the kernel ends the transition at its next retry, within about a second.
FORCED_LIMIT = 10.0
#: What the kernel says before it calls the first callback (``__klp_enable_patch()``).
_ENABLING = "livepatch: enabling patch '{}'"
#: Seconds that the folders of replaced patches may stay when the transition is over.
_REPLACED_LIMIT = 3.0


class Manager(Actor):
    """The acting verbs on one machine."""

    # -- load ---------------------------------------------------------------------------------------

    def load(self, path: str, following: Following, parameters: str = "") -> ActionReport:
        """Load one module, and bring its transition to its end.

        Raises:
            UsageError, Failed: the file cannot be read or is no livepatch module.
            Unable: this machine or user cannot do it. Refused: another kmend is at it.
        """
        act.require_power(self.place, "load")
        with self._acting("load", path):
            fd = act.open_module(path)
            try:
                return self._load(path, fd, following, parameters)
            finally:
                os.close(fd)

    def _load(self, path: str, fd: int, following: Following, parameters: str) -> ActionReport:
        data = contents(fd, path)
        seen = self._observe()
        self.progress.step(f"checking {path}")
        examiner = Examiner(self.config, self.progress, self.place, seen.kernel)
        module = examiner.read(data, path)
        report = self._loaded(module, data, fd, seen, examiner, following, parameters)
        return replace(report, file=str(Path(path).absolute()), sha256=module.sha256, note=module.note)

    def _loaded(
        self,
        module: ModuleFile,
        data: bytes,
        fd: int,
        seen: Seen,
        examiner: Examiner,
        following: Following,
        parameters: str,
    ) -> ActionReport:
        """Load what has been read."""
        from kmend import plan

        path = module.path
        began = time.monotonic()
        interrupted = [row for row in seen.resumable if row.patch == module.name]
        there = next((row for row in seen.patches if row.name == module.name), None)
        if there is not None and _same(there, module, interrupted):
            finished = self._continue(there, module, interrupted, following, seen)
            if finished is not None:
                return finished
            if there.phase is Phase.UNPATCHING and interrupted and following.wait:
                ended = self._end_taking_back(module, following, seen)
                if ended.result is not Result.DONE:
                    return ended
                seen = self._observe()
        leftover = next((row for row in seen.left if row.name == module.name), None)
        examined = examiner.examine(data, module, seen)
        checks = [*examined.checks, *plan.objections(self.place, examined)]
        refused = tuple(row.refusal for row in checks if row.refusal is not None)
        if refused:
            report = self._refused("load", module.name, seen, *refused, what=f"{module.name} was not loaded")
            return replace(report, checks=tuple(checks), seconds=time.monotonic() - began, began=began)
        before = {row.name for row in seen.patches}
        detail: dict[str, object] = {
            "file": str(Path(path).absolute()),
            "sha256": module.sha256,
            "before": sorted(before),
            "replace": module.replace,
            "functions": None
            if module.wanted is None
            else [f"{row.object}:{row.name},{row.sympos}" for row in module.wanted],
            "not_checked": [row.name for row in checks if row.passed is None],
            "callbacks": _callbacks(examined.description),
            **_terms(following),
        }

        def work(run: Run) -> ActionReport:
            run.checks = tuple(checks)
            run.may_replace(module.replace, before)
            if leftover is not None:
                act.remove(self.place, module.name)
                run.step(f"removed what a former {module.name} had left behind")
            self.progress.step(f"loading {module.name}")
            _require_same(fd, module)
            try:
                act.insert(module.name, fd, parameters, run.messages)
            except Refused:
                if any(row.text.startswith(_ENABLING.format(module.name)) for row in run.messages()):
                    run.called.unknown()  # it came as far as the first of them
                raise
            run.step("the kernel took the module")
            run.called.begins(Phase.PATCHING)
            return self._patched(run, following)

        return self._perform("load", module.name, f"from {path}", detail, seen, work)

    def _continue(
        self,
        there: LivePatch,
        module: ModuleFile,
        interrupted: Sequence[journal.Record],
        following: Following,
        seen: Seen,
    ) -> ActionReport | None:
        """Finish what another run began with this very module; None: there is nothing to finish."""
        if there.phase is not Phase.PATCHING and not (there.phase is Phase.ENABLED and interrupted):
            return None
        found = next((row.detail["before"] for row in reversed(interrupted) if "before" in row.detail), None)
        before = set(map(str, found)) if isinstance(found, list) else set()
        detail: dict[str, object] = {
            "file": str(Path(module.path).absolute()),
            "sha256": module.sha256,
            "before": sorted(before),
            "replace": module.replace,
            **_terms(following),
        }

        def work(run: Run) -> ActionReport:
            run.step("it is loaded already; its transition is followed from here")
            run.may_replace(module.replace, before)
            return self._patched(run, following)

        text = "goes on with a load that was begun"
        return self._perform("load", module.name, text, detail, seen, work)

    def _end_taking_back(self, module: ModuleFile, following: Following, seen: Seen) -> ActionReport:
        """Bring to its end what a load that was killed had begun when its own transition had stalled."""
        name = module.name

        def work(run: Run) -> ActionReport:
            run.step("it is being taken back; that is followed from here")
            report = self._follow(run, Phase.UNPATCHING, following)
            if report is not None:
                return report
            self._remove_quietly(run, name)
            return self._report(run, Result.DONE, f"{name} is taken back, as was begun before it is loaded")

        file = str(Path(module.path).absolute())
        detail: dict[str, object] = {"file": file, "sha256": module.sha256, **_terms(following)}
        return self._perform("load", name, "ends the taking back that was begun", detail, seen, work)

    def _patched(self, run: Run, following: Following) -> ActionReport:
        """Follow the patching, deal with a stall, remove what it replaced."""
        if not following.wait:
            return self._report(run, Result.PENDING, f"{run.patch} is loaded; its transition goes on")
        report = self._follow(run, Phase.PATCHING, following)
        if report is not None:
            return report
        seen = self._after_replacing(run.below)
        run.replaced = tuple(sorted(run.below - {row.name for row in seen.patches}))
        for row in seen.left:
            if row.phase is Phase.LEFT and row.name in run.replaced and not row.pinned_by:
                self._remove_quietly(run, row.name)
        took = run.followed[-1].seconds if run.followed else 0.0
        why = f"{run.patch} is in force; the transition took {took:.1f} s"
        return self._report(run, Result.DONE, why, self._way_back(run, seen.kernel.boot_id, unload=run.patch))

    def _after_replacing(self, before: Collection[str]) -> Seen:
        """A look when patches that were replaced have gone.

        They are disabled when the transition is over, and removed a moment later by a work queue
        (``klp_free_replaced_patches_async()``, kernel/livepatch/core.c).
        """
        deadline = time.monotonic() + _REPLACED_LIMIT
        while time.monotonic() < deadline and any(map(self._is_going, before)):
            time.sleep(0.02)
        return self._observe()

    def _is_going(self, name: str) -> bool:
        row = read_patch(self.place, name, objects=False)
        if row is None:  # its files go before its folder does
            return is_folder(self.place.livepatch / name)
        return row.phase is Phase.DISABLED

    # -- taking back --------------------------------------------------------------------------------

    def disable(self, name: str, following: Following) -> ActionReport:
        """Take a patch back; its module stays loaded."""
        return self._take_back("disable", name, following)

    def unload(self, name: str, following: Following) -> ActionReport:
        """Take a patch back if it is in force, and unload its module."""
        return self._take_back("unload", name, following)

    def loaded(self) -> tuple[str, ...]:
        """All patches and what is left of former ones, in the order in which they can be taken back.

        First the one that moves, as no other can be while it does; then the top of the stack; at the end what
        stays.
        """
        seen = self._observe(holding=False)
        down = list(reversed(seen.patches))
        patches = sorted(down, key=lambda row: not row.phase.moving)
        left = sorted(seen.left, key=lambda row: bool(row.pinned_by))
        return tuple(row.name for row in (*patches, *left))

    def close_killed(self, verb: str) -> None:
        """Write down the end of what killed runs began, where nothing is left to be done about it.

        Raises:
            Unable: not root. Refused: another kmend is at it.
        """
        act.require_power(self.place, verb)
        with journal.acting(self.place, verb):
            journal.close_killed(self._journal(read_kernel(self.place).boot_id), self.place, verb)

    def _take_back(self, verb: str, name: str, following: Following) -> ActionReport:
        """
        Raises:
            UsageError: there is no such patch. Unable: not root. Refused: another kmend is at it.
        """
        act.require_power(self.place, verb)
        with self._acting(verb, name):
            seen = self._observe()
            ended = [row for row in seen.resumable if row.patch == name and row.result != journal.PENDING]
            if seen.named(name) is None and ended:
                # killed or interrupted: before the kernel did it, or when all was done but the journal's line
                had = ended[-1].verb
                why = f"{name} is not loaded: the `kmend {had}` that was interrupted has left nothing of it"
                return self._perform(
                    verb, name, "it is not loaded", {}, seen, lambda run: self._report(run, Result.DONE, why)
                )
            patch = refusals.known(seen, name)
            moving = next((row for row in seen.patches if row.phase.moving and row.name != name), None)
            if patch.phase is Phase.COMING:
                return self._refused(verb, name, seen, refusals.coming(name))
            if patch.pinned_by and verb == "unload":
                return self._refused(verb, name, seen, refusals.pinned(patch))
            if moving is not None and patch.phase is Phase.ENABLED:
                return self._refused(verb, name, seen, refusals.other_transition(moving, seen))

            def work(run: Run) -> ActionReport:
                if patch.phase in (Phase.ENABLED, Phase.PATCHING):
                    turned = patch.phase is Phase.PATCHING
                    if turned:
                        run.may_replace(patch.replace, (row.name for row in seen.patches))
                    if act.set_enabled(self.place, name, False, run.messages):
                        run.step("turned its transition round" if turned else "disabled it")
                        if not turned:
                            run.called.begins(Phase.UNPATCHING)
                    else:
                        run.step("somebody else has taken it back meanwhile")
                if patch.phase.moving or patch.phase is Phase.ENABLED:
                    if not following.wait:
                        return self._report(run, Result.PENDING, f"{name} is being taken back")
                    report = self._follow(run, Phase.UNPATCHING, following)
                    if report is not None:
                        return report
                if verb == "unload":
                    if act.remove(self.place, name):
                        run.removed.append(name)
                        run.step("unloaded its module")
                    else:
                        run.step("somebody else has unloaded its module meanwhile")
                    return self._taken(run, seen, f"{name} is taken back and unloaded", "")
                why, removes = (
                    f"{name} is taken back; its module is still loaded",
                    f"kmend unload {name} removes it",
                )
                return self._taken(run, seen, why, removes)

            return self._perform(verb, name, f"it is {patch.phase.value}", _terms(following), seen, work)

    def _taken(self, run: Run, seen: Seen, why: str, next_step: str) -> ActionReport:
        """It is taken back, and perhaps had come into force before it could be turned round."""
        run.replaced = self._lost(run)
        if run.replaced:
            names = ", ".join(run.replaced)
            why += f"; it had come into force at the last moment: {names}, which it replaced, went with it"
            next_step = self._way_back(run, seen.kernel.boot_id, unload="") or "kmend status"
        return self._report(run, Result.DONE, why, next_step)

    def enable(self, name: str, following: Following) -> ActionReport:
        """Turn a patch that is being taken back round; enable a disabled one on kernels before 5.1.

        Raises:
            UsageError: there is no such patch. Unable: not root. Refused: another kmend is at it.
        """
        act.require_power(self.place, "enable")
        with self._acting("enable", name):
            seen = self._observe()
            patch = refusals.known(seen, name)
            match patch.phase:
                case Phase.COMING:
                    return self._refused("enable", name, seen, refusals.coming(name))
                case Phase.LEFT:
                    return self._refused("enable", name, seen, self._not_enabled_again(name, seen))
                case Phase.ENABLED:
                    journal.close_killed(self._journal(seen.kernel.boot_id), self.place, f"enable {name}")
                    return ActionReport("enable", name, Result.DONE, f"{name} is enabled already")
                case Phase.PATCHING | Phase.UNPATCHING | Phase.DISABLED:
                    pass

            def work(run: Run) -> ActionReport:
                if patch.phase is not Phase.PATCHING:
                    if not act.set_enabled(self.place, name, True, run.messages):
                        return self._report(run, Result.FAILED, f"{name} was gone before it could be turned")
                    run.step("turned its transition round" if patch.phase.moving else "enabled it")
                    if not patch.phase.moving:
                        run.called.begins(Phase.PATCHING)
                run.may_replace(patch.replace, (row.name for row in seen.patches))
                return self._patched(run, following)

            return self._perform("enable", name, f"it is {patch.phase.value}", _terms(following), seen, work)

    def _not_enabled_again(self, name: str, seen: Seen) -> Refusal:
        loads = self._loads(seen.kernel.boot_id)
        file = loads[name].detail.get("file") if name in loads else None
        return Refusal(
            "not-enabled-again",
            f"{name} was disabled, and the kernel does not enable a patch a second time",
            "only its module is left (since Linux 5.1 the patch itself goes with the end of unpatching)",
            f"kmend load {file or 'FILE'}: what is left is removed first",
        )

    # -- force, signal ------------------------------------------------------------------------------

    def force(self, name: str, *, confirmed: bool) -> ActionReport:
        """End a transition whatever tasks are doing. Without ``confirmed`` it only says what would break.

        Raises:
            UsageError: there is no such patch. Unable: not root. Refused: another kmend is at it.
        """
        act.require_power(self.place, "force")
        with self._acting("force", name):
            seen = self._observe(limit=sys.maxsize)
            patch = refusals.known(seen, name)
            if not patch.phase.moving:
                return self._refused("force", name, seen, refusals.no_transition(patch))
            if not confirmed:
                return replace(
                    self._refused("force", name, seen, refusals.not_confirmed(name, seen.transition)),
                    followed=(Followed(End.STALLED, 0.0, last=seen.transition),),
                )
            left = seen.transition.left if seen.transition else 0
            pins = _pins(patch, seen)

            def work(run: Run) -> ActionReport:
                for line in refusals.held_by(seen.transition):
                    run.step(f"left: {line}")
                act.force(self.place, name, run.messages)
                run.step(f"forced {tasks(left)}", forced=patch.phase.value, pins=pins)
                found = run.follow(self._follower(run, patch.phase, Patience(limit=FORCED_LIMIT, wake=False)))
                run.followed[-1] = replace(found, last=seen.transition)
                if found.end is not End.COMPLETE:
                    return self._report(run, Result.STALLED, f"{name} was forced, but has not ended yet")
                run.called.ends(patch.phase)
                return self._report(run, Result.DONE, f"{name} was forced: {_forced_words(patch, pins)}")

            return self._perform("force", name, f"{tasks(left)} left", {}, seen, work)

    def signal(self, name: str | None, *, io_uring: bool = False) -> ActionReport:
        """Interrupt, once, the tasks that hold the running transition up.

        Raises:
            UsageError: there is no such patch. Unable: not root. Refused: another kmend is at it.
        """
        act.require_power(self.place, "signal")
        with self._acting("signal", name or ""):
            seen = self._observe(limit=sys.maxsize)
            moving = next((row for row in seen.patches if row.phase.moving), None)
            if name is not None:
                patch = refusals.known(seen, name)
                if not patch.phase.moving:
                    return self._refused("signal", name, seen, refusals.no_transition(patch))
            if moving is None:
                none = Refusal("no-transition", "no transition is under way", "nothing waits", "kmend status")
                return self._refused("signal", name or "", seen, none)

            def work(run: Run) -> ActionReport:
                rows = seen.transition.blockers if seen.transition else ()
                chosen = [
                    row.task.tid
                    for row in rows
                    if row.wakeable or (io_uring and row.cause.value == "io-uring")
                ]
                woken = interrupt(chosen)
                run.step(f"interrupted {len(woken.interrupted)} of {tasks(len(rows))}")
                time.sleep(0.05)
                left = blockers.look(self.place, moving, seen.patches)
                run.followed.append(Followed(End.STALLED, 0.0, woken=tuple(woken.interrupted), last=left))
                return self._report(
                    run,
                    Result.DONE,
                    f"interrupted {tasks(len(woken.interrupted))}; {left.left} left",
                )

            return self._perform("signal", moving.name, "interrupts tasks", {}, seen, work)


# -- words -------------------------------------------------------------------------------------------


def _callbacks(found: Description) -> list[tuple[str, dict[str, str]]] | None:
    """For the journal: each object's callbacks, in order; None where the descriptors are not read."""
    if found.objects is None:
        return None
    return [
        (row.name, {kind.value: function for kind, function in row.callbacks})
        for row in found.objects
        if row.callbacks
    ]


def _terms(following: Following) -> dict[str, object]:
    """How a transition is followed, for the journal: whoever watches can say what comes next."""
    if not following.wait:
        return {}
    patience = following.patience
    return {"wait": patience.limit, "wake": patience.wake, "on_stall": following.on_stall.value}


def _same(there: LivePatch, module: ModuleFile, interrupted: Sequence[journal.Record]) -> bool:
    """Whether what is loaded is this very file: by its notes, else by what a killed run wrote down."""
    if module.identity:
        return there.module is not None and there.module.identity == module.identity
    return any(row.detail.get("sha256") == module.sha256 for row in interrupted)


def _require_same(fd: int, module: ModuleFile) -> None:
    """The kernel reads the file anew (``kernel_read_file()``): it must still be what was checked.

    Raises:
        Refused: (rule ``file-changed``) it is not. Failed: it cannot be read.
    """
    if hashlib.sha256(contents(fd, module.path)).hexdigest() != module.sha256:
        raise Refused(
            [
                Refusal(
                    "file-changed",
                    f"{module.name} was not loaded: {module.path} has changed since it was checked",
                    "something writes to it while it is being loaded",
                    "wait until it is complete, then load it again",
                )
            ]
        )


def _pins(patch: LivePatch, seen: Seen) -> list[str]:
    """Whose modules forcing this transition keeps until the next boot: see :class:`journal.Forced`."""
    if patch.phase is Phase.UNPATCHING:
        return [patch.name]
    if patch.replace is False:
        return []
    # where it is not known whether it replaces them, what becomes of them tells
    return [row.name for row in seen.patches if row.name != patch.name]


def _forced_words(patch: LivePatch, pins: Sequence[str]) -> str:
    if patch.phase is Phase.UNPATCHING:
        return "its module stays loaded until the next boot, as tasks may still run its code"
    kept = (
        f"; the modules of {', '.join(pins)}, if it replaced them, stay until the next boot" if pins else ""
    )
    return f"tasks may go on in the old functions until they leave them{kept}"
