"""Acting on the running kernel: load, take back, turn round, force; each to its end, or back.

    file -> checks -> lock, journal -> finit_module -> transition followed -> what is left behind removed

Joins the live machine (:mod:`kmend.runtime`) with what the pure stages know of a module's file. One action at
a time holds the lock; each is in the journal before it begins, so that whoever comes after a killed kmend
knows what was under way.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from kmend.core import kmsg
from kmend.core.config import Config
from kmend.core.errors import Failed, KmendError, Refusal, Refused, Unable
from kmend.core.files import read_regular
from kmend.core.kmsg import KernelMessage
from kmend.core.live import (
    ActionReport,
    Check,
    End,
    Followed,
    LivePatch,
    Phase,
    Result,
    Step,
    Transition,
    tasks,
)
from kmend.core.progress import Progress
from kmend.core.target import Release
from kmend.runtime import act, blockers, callbacks, journal, klog, preflight, refusals
from kmend.runtime.callbacks import Called
from kmend.runtime.follow import Follower, Patience
from kmend.runtime.journal import Action, Journal
from kmend.runtime.kernel_state import read_kernel
from kmend.runtime.observe import Seen, observe
from kmend.runtime.patches import IDENTITY, identity, read_patch
from kmend.runtime.place import Place
from kmend.runtime.preflight import ModuleFile, Wanted
from kmend.runtime.symbols import SymbolTable
from kmend.runtime.wake import interrupt

if TYPE_CHECKING:
    from kmend.elf.model import ElfFile
    from kmend.module.describe import Description
    from kmend.module.layout import Layout
    from kmend.view import TargetView

#: A module of this size is none.
_MOST = 256 << 20
#: Taking back after a stall gets at least so many seconds: it is the way out.
WAY_BACK = 60.0
#: After `force` the kernel ends the transition at its next retry, within about a second.
FORCED_LIMIT = 10.0
#: Whoever answered "wait on" is asked again after so many seconds at the earliest.
ASK_AGAIN = 10.0


#: What the kernel says before it calls the first callback (``__klp_enable_patch()``).
_ENABLING = "livepatch: enabling patch '{}'"
#: Seconds that the folders of replaced patches may stay when the transition is over.
_REPLACED_LIMIT = 3.0


class OnStall(Enum):
    """What to do when a transition has not ended within the limit."""

    REVERSE = "reverse"
    WAIT = "wait"
    ASK = "ask"


class Choice(Enum):
    """What somebody who is asked at a stall may answer."""

    REVERSE = "reverse"
    WAIT = "wait"
    LEAVE = "leave"


Ask = Callable[[Transition | None], Choice]


@dataclass(frozen=True, slots=True)
class Following:
    """How a transition is followed. ``wait=False``: not at all."""

    wait: bool = True
    patience: Patience = field(default_factory=Patience)
    on_stall: OnStall = OnStall.REVERSE


@dataclass(slots=True)
class _Run:
    """One action under way: what it has found and done so far."""

    verb: str
    patch: str
    action: Action
    log: klog.KernelLog | None
    called: Called
    began: float
    steps: list[Step] = field(default_factory=list)
    followed: list[Followed] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    checks: tuple[Check, ...] = ()
    replaced: tuple[str, ...] = ()
    heard: list[KernelMessage] = field(default_factory=list)
    note: Mapping[str, object] = field(default_factory=dict)

    def step(self, text: str, **detail: object) -> None:
        self.steps.append(Step(self.seconds(), text))
        self.action.step(text, **detail)

    def told(self, step: Step) -> None:
        """Write down what was done about tasks when it is done: somebody may be watching."""
        self.steps.append(Step(self.seconds(), step.text, step.tids))
        self.action.step(step.text, tids=list(step.tids))

    def follow(self, follower: Follower) -> Followed:
        """Follow a transition, and keep what came of it."""
        began = self.seconds()
        found = replace(follower.run(), began=began)
        self.followed.append(found)
        return found

    def seconds(self) -> float:
        """Since the action began."""
        return round(time.monotonic() - self.began, 3)

    def messages(self) -> tuple[KernelMessage, ...]:
        """Everything that the kernel has said since the action began, as far as it could be read."""
        if self.log is not None:
            self.heard += [row.message for row in self.log.read()]
        return tuple(self.heard)


@dataclass(frozen=True, slots=True)
class Examined:
    """What a load would look at first: the file, the machine, and each check's outcome.

    ``table`` is None when the kernel shows this user no symbols.
    """

    module: ModuleFile
    description: Description
    elf: ElfFile
    seen: Seen
    checks: tuple[Check, ...]
    table: SymbolTable | None = None


class Manager:
    """Acts on one machine. ``ask`` is asked at a stall when the policy is to ask."""

    def __init__(
        self, config: Config, progress: Progress, *, place: Place | None = None, ask: Ask | None = None
    ) -> None:
        self.config, self.progress, self.ask = config, progress, ask
        self.place = place or Place()

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
        data = _contents(fd, path)
        seen = self._observe()
        self.progress.step(f"checking {path}")
        view, problem = self._view(seen)
        layout = self._layout(view)
        module = read_module_file(data, path, layout)
        report = self._loaded(module, data, fd, seen, (view, problem), layout, following, parameters)
        return replace(report, file=str(Path(path).absolute()), sha256=module.sha256, note=module.note)

    def _loaded(
        self,
        module: ModuleFile,
        data: bytes,
        fd: int,
        seen: Seen,
        target: tuple[TargetView | None, str],
        layout: Layout | None,
        following: Following,
        parameters: str,
    ) -> ActionReport:
        """Load what has been read; ``target`` is that of the cache, or why there is none."""
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
        examined = self._examined(data, module, layout, seen, *target)
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

        def work(run: _Run) -> ActionReport:
            run.checks = tuple(checks)
            if leftover is not None:
                act.remove(self.place, module.name)
                run.step(f"removed what a former {module.name} had left behind")
            self.progress.step(f"loading {module.name}")
            try:
                act.insert(module.name, fd, parameters, run.messages)
            except Refused:
                if any(row.text.startswith(_ENABLING.format(module.name)) for row in run.messages()):
                    run.called.unknown()  # it came as far as the first of them
                raise
            run.step("the kernel took the module")
            run.called.begins(Phase.PATCHING)
            return self._patched(run, following, before)

        return self._perform("load", module.name, f"from {path}", detail, seen, work)

    def examine(self, path: str) -> Examined:
        """Everything that :meth:`load` would look at before it loads; nothing is changed.

        Raises:
            UsageError, Failed: the file cannot be read or is no livepatch module.
            Unable: the running kernel has no livepatch support.
        """
        fd = act.open_module(path)
        try:
            data = _contents(fd, path)
        finally:
            os.close(fd)
        seen = self._observe()
        self.progress.step(f"checking {path}")
        view, problem = self._view(seen)
        layout = self._layout(view)
        module = read_module_file(data, path, layout)
        return self._examined(data, module, layout, seen, view, problem)

    def _examined(
        self,
        data: bytes,
        module: ModuleFile,
        layout: Layout | None,
        seen: Seen,
        view: TargetView | None,
        problem: str,
    ) -> Examined:
        from kmend.elf.reader import read
        from kmend.module.describe import describe

        elf = read(data, module.path)
        try:
            table: SymbolTable | None = SymbolTable(self.place)
        except Unable:
            table = None  # the checks say so
        checks = self._checks(module, data, seen, view, problem, table)
        return Examined(module, describe(elf, layout, module.path), elf, seen, tuple(checks), table)

    def _checks(
        self,
        module: ModuleFile,
        data: bytes,
        seen: Seen,
        view: TargetView | None,
        problem: str,
        table: SymbolTable | None,
    ) -> list[Check]:
        leftover = next((row for row in seen.left if row.name == module.name), None)
        without = replace(seen, left=tuple(row for row in seen.left if row is not leftover))
        checks = [
            *preflight.look(self.place, module, without, table),
            *self._rules(view, problem, data, module.path),
            *self._code(module, view, seen),
        ]
        if leftover is not None:
            checks.append(refusals.leftover(leftover))
        return checks

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
        found = interrupted[-1].detail.get("before") if interrupted else None
        before = set(map(str, found)) if isinstance(found, list) else set()
        detail: dict[str, object] = {
            "file": str(Path(module.path).absolute()),
            "sha256": module.sha256,
            "before": sorted(before),
            "replace": module.replace,
            **_terms(following),
        }

        def work(run: _Run) -> ActionReport:
            run.step("it is loaded already; its transition is followed from here")
            return self._patched(run, following, before)

        text = "goes on with a load that was begun"
        return self._perform("load", module.name, text, detail, seen, work)

    def _end_taking_back(self, module: ModuleFile, following: Following, seen: Seen) -> ActionReport:
        """Bring to its end what a load that was killed had begun when its own transition had stalled."""
        name = module.name

        def work(run: _Run) -> ActionReport:
            run.step("it is being taken back; that is followed from here")
            report = self._follow(run, Phase.UNPATCHING, following)
            if report is not None:
                return report
            self._remove_quietly(run, name)
            return self._report(run, Result.DONE, f"{name} is taken back, as was begun before it is loaded")

        detail: dict[str, object] = {"sha256": module.sha256, **_terms(following)}
        return self._perform("load", name, "ends the taking back that was begun", detail, seen, work)

    def _patched(self, run: _Run, following: Following, before: set[str]) -> ActionReport:
        """Follow the patching, deal with a stall, remove what it replaced of the patches ``before``."""
        if not following.wait:
            return self._report(run, Result.PENDING, f"{run.patch} is loaded; its transition goes on")
        report = self._follow(run, Phase.PATCHING, following)
        if report is not None:
            return report
        seen = self._after_replacing(before - {run.patch})
        run.replaced = tuple(sorted(before - {row.name for row in seen.patches} - {run.patch}))
        for row in seen.left:
            if row.phase is Phase.LEFT and row.name in run.replaced and not row.pinned_by:
                self._remove_quietly(run, row.name)
        took = run.followed[-1].seconds if run.followed else 0.0
        why = f"{run.patch} is in force; the transition took {took:.1f} s"
        return self._report(run, Result.DONE, why, self._way_back(run, seen.kernel.boot_id))

    def _after_replacing(self, before: set[str]) -> Seen:
        """A look when patches that were replaced have gone.

        They are disabled when the transition is over, and removed a moment later by a work queue
        (``klp_free_replaced_patches_async()``, kernel/livepatch/core.c).
        """
        deadline = time.monotonic() + _REPLACED_LIMIT
        while time.monotonic() < deadline and any(
            (row := read_patch(self.place, name, objects=False)) is not None and row.phase is Phase.DISABLED
            for name in before
        ):
            time.sleep(0.02)
        return self._observe()

    def _way_back(self, run: _Run, boot: str) -> str:
        """How to return to the patches that this one replaced, where their files are still what they were."""
        loads = journal.loads(_records(self._journal(boot)), boot)
        former = sorted((loads[name] for name in run.replaced if name in loads), key=lambda row: row.time)
        files = [shlex.quote(str(row.detail.get("file", ""))) for row in former if _is_still(row)]
        if not files or len(files) < len(run.replaced):
            return ""
        if former[0].detail.get("replace") is True:  # it replaces this one in its turn
            return f"to go back to {former[0].patch}: kmend load {' '.join(files)}"
        names = ", ".join(row.patch for row in former)
        return f"to go back to {names}: kmend unload {run.patch} && kmend load {' '.join(files)}"

    def _remove_quietly(self, run: _Run, name: str) -> None:
        try:
            removed = act.remove(self.place, name, limit=3.0)
        except KmendError as error:
            run.step(f"the module of {name} stays: {error.why}")
            return
        if removed:
            run.removed.append(name)
            run.step(f"unloaded {name}, which was left behind")

    # -- taking back --------------------------------------------------------------------------------

    def disable(self, name: str, following: Following) -> ActionReport:
        """Take a patch back; its module stays loaded."""
        return self._take_back("disable", name, following)

    def unload(self, name: str, following: Following) -> ActionReport:
        """Take a patch back if it is in force, and unload its module."""
        return self._take_back("unload", name, following)

    def loaded(self) -> tuple[str, ...]:
        """All patches and what is left of former ones, the top of the stack first; at the end what stays."""
        seen = self._observe(holding=False)
        left = sorted(seen.left, key=lambda row: bool(row.pinned_by))
        return tuple(row.name for row in (*reversed(seen.patches), *left))

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
            if seen.named(name) is None and any(
                row.patch == name and row.result != journal.PENDING for row in seen.resumable
            ):
                # killed or interrupted when all was done but the last line of the journal
                return self._perform(
                    verb,
                    name,
                    "it is not loaded",
                    {},
                    seen,
                    lambda run: self._report(
                        run, Result.DONE, f"{name} is gone: what was interrupted had done it"
                    ),
                )
            patch = refusals.known(seen, name)
            moving = next((row for row in seen.patches if row.phase.moving and row.name != name), None)
            if patch.phase is Phase.COMING:
                return self._refused(verb, name, seen, refusals.coming(name))
            if patch.pinned_by and verb == "unload":
                return self._refused(verb, name, seen, refusals.pinned(patch))
            if moving is not None and patch.phase is Phase.ENABLED:
                return self._refused(verb, name, seen, refusals.other_transition(moving, seen))

            def work(run: _Run) -> ActionReport:
                if patch.phase in (Phase.ENABLED, Phase.PATCHING):
                    turned = patch.phase is Phase.PATCHING
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
                    return self._report(run, Result.DONE, f"{name} is taken back and unloaded")
                return self._report(
                    run,
                    Result.DONE,
                    f"{name} is taken back; its module is still loaded",
                    f"kmend unload {name} removes it",
                )

            return self._perform(verb, name, f"it is {patch.phase.value}", _terms(following), seen, work)

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

            def work(run: _Run) -> ActionReport:
                if patch.phase is not Phase.PATCHING:
                    if not act.set_enabled(self.place, name, True, run.messages):
                        return self._report(run, Result.FAILED, f"{name} was gone before it could be turned")
                    run.step("turned its transition round" if patch.phase.moving else "enabled it")
                    if not patch.phase.moving:
                        run.called.begins(Phase.PATCHING)
                return self._patched(run, following, {row.name for row in seen.patches})

            return self._perform("enable", name, f"it is {patch.phase.value}", _terms(following), seen, work)

    def _not_enabled_again(self, name: str, seen: Seen) -> Refusal:
        loads = journal.loads(self._journal(seen.kernel.boot_id).records(), seen.kernel.boot_id)
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
            seen = self._observe()
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

            def work(run: _Run) -> ActionReport:
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

            def work(run: _Run) -> ActionReport:
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

    # -- following ----------------------------------------------------------------------------------

    def _follower(self, run: _Run, goal: Phase, patience: Patience) -> Follower:
        return Follower(self.place, run.patch, goal, patience, self.progress, told=run.told)

    def _follow(self, run: _Run, goal: Phase, following: Following) -> ActionReport | None:
        """Follow the transition; None: it has reached its goal. Otherwise the report of how it ended."""
        patience = following.patience
        while True:
            found = run.follow(self._follower(run, goal, patience))
            match found.end:
                case End.COMPLETE:
                    run.step(f"{goal.value} is complete after {found.seconds:.1f} s")
                    run.called.ends(goal)
                    return None
                case End.REVERSED:
                    report = self._turned_round(run, goal, following)
                    if report is not None:
                        return report
                    continue  # and round again: it goes where it was to go
                case End.GONE:
                    return self._interfered(run, refusals.taken_away(run.patch))
                case End.STALLED:
                    choice = self._choice(following.on_stall, found.last)
            run.step(
                f"stalled after {found.seconds:.0f} s with {refusals.left_words(found)}; now: {choice.value}"
            )
            match choice:
                case Choice.WAIT:
                    asked = following.on_stall is OnStall.ASK
                    patience = replace(patience, limit=max(patience.limit, ASK_AGAIN) if asked else math.inf)
                case Choice.LEAVE:
                    return self._report(
                        run,
                        Result.PENDING,
                        f"the transition of {run.patch} goes on",
                        "kmend status --watch",
                    )
                case Choice.REVERSE:
                    now = read_patch(self.place, run.patch, objects=False)
                    if now is not None and now.phase is goal:
                        return self._reverse(run, goal, following, found)
                    run.step("it ended just then")  # the next round says how

    def _choice(self, on_stall: OnStall, last: Transition | None) -> Choice:
        match on_stall:
            case OnStall.REVERSE:
                return Choice.REVERSE
            case OnStall.WAIT:
                return Choice.WAIT
            case OnStall.ASK:
                return Choice.REVERSE if self.ask is None else self.ask(last)

    def _turned_round(self, run: _Run, goal: Phase, following: Following) -> ActionReport | None:
        """Somebody else turned the transition round: it is followed to where it goes now.

        Not turned again: whoever did it may know why. None: they turned it a second time.
        """
        back = _other_way(goal)
        run.step("somebody turned it round; it is followed to its end")
        found = run.follow(self._follower(run, back, following.patience))
        refusal = refusals.turned(run.patch, goal)
        match found.end:
            case End.REVERSED:
                return None
            case End.STALLED:
                why = f"{run.patch} was turned round and has not ended"
                stalled = refusals.stalled(run.patch, back, found)
                return self._report(run, Result.STALLED, why, "kmend blockers", refused=(refusal, stalled))
            case End.COMPLETE:
                run.step(f"{back.value} is complete after {found.seconds:.1f} s")
                run.called.ends(back)
                return self._interfered(run, refusal)
            case End.GONE:
                return self._interfered(run, refusals.taken_away(run.patch))

    def _interfered(self, run: _Run, refusal: Refusal) -> ActionReport:
        """Somebody else took the patch back, or kept it: what this load brought goes with it."""
        if run.verb == "load" and read_patch(self.place, run.patch, objects=False) is None:
            self._remove_quietly(run, run.patch)
        return self._report(run, Result.FAILED, refusal.what, refused=(refusal,))

    def _reverse(
        self, run: _Run, goal: Phase, following: Following, stalled: Followed
    ) -> ActionReport | None:
        """Go back to how it was before: the stall's reason is what is reported.

        None: there was no way back any more, as the transition had reached its goal.
        """
        refusal = refusals.stalled(run.patch, goal, stalled)
        back = _other_way(goal)
        found = None
        if act.set_enabled(self.place, run.patch, back is Phase.PATCHING, run.messages):
            patience = replace(following.patience, limit=max(following.patience.limit, WAY_BACK))
            found = run.follow(self._follower(run, back, patience))
        if found is None or found.end is End.GONE:
            if goal is Phase.PATCHING:
                return self._interfered(run, refusals.taken_away(run.patch))
            run.step("it ended just then")
            run.called.ends(goal)
            return None
        if found.end is End.REVERSED:
            turned = refusals.turned_again(run.patch, goal)
            return self._report(
                run, Result.STALLED, turned.what, "kmend status --watch", refused=(refusal, turned)
            )
        if found.end is End.STALLED:
            why = f"{run.patch} does not come to an end in either direction"
            stuck = refusals.stalled(run.patch, back, found)
            next_step = "kmend blockers says what it waits for"
            return self._report(run, Result.STALLED, why, next_step, refused=(refusal, stuck))
        run.step(f"{back.value} is complete after {found.seconds:.1f} s")
        run.called.ends(back)
        if back is Phase.PATCHING:
            why = f"{run.patch} could not be taken back, and is in force as before"
        else:
            if run.verb == "load" and act.remove(self.place, run.patch):
                run.removed.append(run.patch)
            why = f"{run.patch} could not be brought into force, and was taken back"
        return self._report(run, Result.REVERSED, why, refused=(refusal,))

    # -- what all actions share ----------------------------------------------------------------------

    @contextmanager
    def _acting(self, verb: str, name: str) -> Iterator[None]:
        """Hold the lock. What is refused by an error before an action has begun is in the journal as well."""
        try:
            with journal.acting(self.place, f"{verb} {name}"):
                yield
        except Unable:
            raise  # this machine or user cannot do it: so it cannot write that down either
        except KmendError as error:
            patch = Path(name).name.removesuffix(".ko")
            with suppress(KmendError):
                book = self._journal(read_kernel(self.place).boot_id)
                book.refused(verb, patch, self._who(), error.what, error.reasons)
            raise

    def _who(self) -> journal.Who:
        return journal.who(self.place, " ".join(sys.argv[:8]))

    def _observe(self, limit: int = 0, *, holding: bool = True) -> Seen:
        """A look; by default as who holds the lock: what has no end in the journal is a killed run's."""
        return observe(self.place, self.config.state, limit=limit or blockers.SHOWN, holding=holding)

    def _journal(self, boot: str) -> Journal:
        return Journal(self.config.state, boot)

    def _perform(
        self,
        verb: str,
        name: str,
        text: str,
        detail: dict[str, object],
        seen: Seen,
        work: Callable[[_Run], ActionReport],
    ) -> ActionReport:
        """An action with its entries in the journal, however it ends; a refusal becomes its report."""
        boot = seen.kernel.boot_id
        book = self._journal(boot)
        journal.close_killed(book, self.place, f"{verb} {name}")
        action = book.begin(verb, name, self._who(), text, detail)
        try:
            log: klog.KernelLog | None = klog.KernelLog(self.place, new_only=True)
        except Unable:
            log = None
        earlier = journal.loads(_records(book), boot).get(name)
        known = detail if "callbacks" in detail or earlier is None else earlier.detail
        called = Called(self.place, callbacks.parsed(known.get("callbacks")))
        run = _Run(verb, name, action, log, called, time.monotonic())
        there = seen.named(name)
        run.note = there.module.note if there is not None and there.module is not None else {}
        try:
            return work(run)
        except Unable as error:  # this machine cannot do it: another exit status
            action.end(Result.FAILED.value, error.what, **journal.reasons(error.reasons))
            raise
        except KmendError as error:
            return self._report(run, Result.REFUSED, error.what, refused=error.reasons)
        except BaseException as error:  # Ctrl-C, SIGTERM: the kernel goes on with what was begun
            action.end(
                journal.INTERRUPTED, f"stopped by {type(error).__name__}; the kernel was left as it is"
            )
            raise
        finally:
            if log is not None:
                log.close()

    def _refused(self, verb: str, name: str, seen: Seen, *refused: Refusal, what: str = "") -> ActionReport:
        """The report of an action that was not even begun; the journal has one line of it."""
        what = what or refused[0].what
        book = self._journal(seen.kernel.boot_id)
        journal.close_killed(book, self.place, f"{verb} {name}")
        book.refused(verb, name, self._who(), what, refused)
        return ActionReport(verb, name, Result.REFUSED, what, refused=refused)

    def _report(
        self, run: _Run, result: Result, why: str, next_step: str = "", refused: tuple[Refusal, ...] = ()
    ) -> ActionReport:
        """The report of an action, which ends here in the journal too."""
        messages = run.messages()
        run.action.end(result.value, why, **journal.reasons(refused))
        return ActionReport(
            verb=run.verb,
            patch=run.patch,
            result=result,
            why=why,
            next_step=next_step,
            checks=run.checks,
            steps=tuple(run.steps),
            followed=tuple(run.followed),
            replaced=run.replaced,
            refused=refused,
            callbacks=run.called.told(),
            removed=tuple(run.removed),
            warnings=tuple(_warnings(messages, run.log is not None and run.log.lost, run.action.journal)),
            messages=tuple(row for row in messages if row.livepatch),
            seconds=run.seconds(),
            note=run.note,
            began=run.began,
        )

    # -- what the target in the cache tells ----------------------------------------------------------

    def _view(self, seen: Seen) -> tuple[TargetView | None, str]:
        """The target of the very kernel that runs, when it is in the cache; else why there is none."""
        from kmend.kernel.prepared import open_target
        from kmend.view import TargetView

        try:
            target = open_target(self.config, Release(seen.kernel.release))
            if target.build_id != seen.kernel.build_id:
                return None, f"{target.release} in the cache is another build than the one that runs"
            view = TargetView(self.config, target)
            view.layout  # noqa: B018 - a cache that cannot tell it is of no use here
        except KmendError as error:
            return None, f"{error.what}: {error.why}" if error.why else error.what
        return view, ""

    def _layout(self, view: TargetView | None) -> Layout | None:
        """How the kernel lays its livepatch structures out: by the target, else by its own BTF."""
        from kmend import running

        if view is not None:
            return view.layout
        try:
            return running.layout(self.place)
        except KmendError:
            return None

    def _code(self, module: ModuleFile, view: TargetView | None, seen: Seen) -> list[Check]:
        """The functions to be replaced, as they run, against the image of the same build."""
        from kmend import running

        if module.wanted is None:
            return [Check("running code", None, "which functions are replaced is not known")]
        release = seen.kernel.release
        self.progress.step("comparing the running code with the kernel's image")
        try:
            image = running.boot_image(release, seen.kernel.build_id) if view is None else view.image
            code = running.RunningCode(self.place, image, lambda name: running.module_file(release, name))
            try:
                return list(running.checks(code.compare(module.wanted)))
            finally:
                code.close()
        except KmendError as error:
            return [Check("running code", None, f"{error.what}: {error.why}")]

    def _rules(self, view: TargetView | None, problem: str, data: bytes, path: str) -> list[Check]:
        """`kmend check` against the target in the cache."""
        if view is None:
            return [Check("rules of kmend check", None, problem)]
        try:
            checked = view.check(data, path)
        except (Failed, Unable) as error:  # the cache is damaged, or lacks what nothing here can make
            return [Check("rules of kmend check", None, f"{error.what}: {error.why}")]
        rows = [Check("rules of kmend check", False, row.what, row) for row in checked.refusals]
        number = sum(checked.checked.values())
        return rows or [Check("rules of kmend check", True, f"{number} things looked at, no objection")]


# -- a module's file ---------------------------------------------------------------------------------


def _contents(fd: int, path: str) -> bytes:
    """
    Raises:
        Failed: (rule ``unreadable``) the file cannot be read.
    """
    data = b""
    try:
        while len(data) <= _MOST and (chunk := os.pread(fd, 1 << 22, len(data))):
            data += chunk
        if len(data) > _MOST:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    except OSError as error:
        raise Failed(
            f"{path} cannot be read",
            why=error.strerror or str(error),
            next_step="name a livepatch module (.ko)",
            rule="unreadable",
        ) from error
    return data


def read_module_file(data: bytes, path: str, layout: Layout | None) -> ModuleFile:
    """What a module's file says of itself; without ``layout`` its functions are those of its build report.

    Raises:
        UsageError: it is no livepatch module.
    """
    from kmend.elf.reader import read
    from kmend.module.describe import describe

    elf = read(data, path)
    found = describe(elf, layout, path)
    sha256 = hashlib.sha256(data).hexdigest()
    wanted = _wanted(found)
    if wanted is None:
        wanted = _reported(path, sha256)
    note = found.note or {}
    info = dict(found.info)
    return ModuleFile(
        path=path,
        name=(found.name or Path(path).name.partition(".")[0]).replace("-", "_"),
        vermagic=found.vermagic,
        build_id=str(note.get("build_id") or info.get("kmend_build_id") or ""),
        depends=tuple(word.replace("-", "_") for word in info.get("depends", "").split(",") if word),
        signed=data.endswith(preflight.SIGNED),
        identity=_identity(elf),
        sha256=sha256,
        wanted=wanted,
        replace=found.replace,
        note=note,
    )


def _callbacks(found: Description) -> list[tuple[str, dict[str, str]]] | None:
    """For the journal: each object's callbacks, in order; None where the descriptors are not read."""
    if found.objects is None:
        return None
    return [
        (row.name, {kind.value: function for kind, function in row.callbacks})
        for row in found.objects
        if row.callbacks
    ]


def _identity(elf: ElfFile) -> str:
    return identity({name: section.data for name in IDENTITY if (section := elf.section(name)) is not None})


def _wanted(found: Description) -> tuple[Wanted, ...] | None:
    if found.objects is None:
        return None
    return tuple(Wanted(o.name, f.old_name, f.sympos) for o in found.objects for f in o.funcs)


def _reported(path: str, sha256: str) -> tuple[Wanted, ...] | None:
    """The functions that the build report beside the module names, if it is the report of this very file."""
    try:
        report = json.loads(Path(path).with_suffix(".json").read_bytes())
        if report["sha256"] != sha256:
            return None
        return tuple(
            Wanted(str(o["name"]), str(f["name"]), int(f["sympos"]))
            for o in report["objects"]
            for f in o["functions"]
            if f["status"] == "changed"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


# -- words -------------------------------------------------------------------------------------------


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


def _is_still(row: journal.Record) -> bool:
    """Whether the file that a load named has the contents that it had."""
    try:
        data = read_regular(str(row.detail.get("file", "")), _MOST)
    except OSError:
        return False
    return hashlib.sha256(data).hexdigest() == row.detail.get("sha256")


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


def _other_way(goal: Phase) -> Phase:
    return Phase.UNPATCHING if goal is Phase.PATCHING else Phase.PATCHING


def _warnings(messages: Sequence[KernelMessage], lost: bool, book: Journal) -> Iterator[Refusal]:
    if lost:
        yield Refusal(
            "log-overwritten",
            "a part of what the kernel said meanwhile is not known",
            "its log was overwritten before kmend had read it: something else fills it",
            "a larger log (log_buf_len= on the kernel's command line) keeps more",
        )
    for report in kmsg.reports(messages):
        yield Refusal(
            "kernel-complained",
            f"the kernel reported meanwhile: {report.headline}",
            f"in {report.where}" if report.where else "see the kernel log",
            "look at dmesg; if it is the patch, take it back",
        )
    if book.trouble:
        yield Refusal(
            "journal-unwritable",
            "what was done could not be written down",
            book.trouble,
            "free space or mend the folder: without the journal a killed kmend leaves no trace",
        )


def _records(book: Journal) -> tuple[journal.Record, ...]:
    try:
        return book.records()
    except KmendError:
        return ()
